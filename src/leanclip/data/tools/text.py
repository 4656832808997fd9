"""Findings of a check as lines for a person."""

from typing import Any

from leanclip.data.tools.findings import EXAMPLES, Findings

_SHOWN = 3  # examples of each kind; check.json has more


def check_text(findings: Findings) -> str:
    """The whole summary, the verdict last."""
    lines = []
    for name, part in findings.values["parts"].items():
        lines += [f"{name}: {part['samples']:,} samples ({part['format']}:{part['root']})"]
        lines += [f"  {line}" for line in _part(part)] + [""]
    lines += ["duplicates"]
    lines += [f"  {line}" for line in _duplicates(findings.values["duplicates"])] + [""]
    if findings.problems:
        lines += ["Problems:", *(f"  {problem}" for problem in findings.problems)]
    else:
        lines += ["No problems above the thresholds."]
    return "\n".join(lines)


def _part(part: dict[str, Any]) -> list[str]:
    lines = []
    for kind, count in part["unusable"].items():
        lines.append(f"unusable: {count:,} {kind}")
        lines += [f"  {reason}" for reason in part["examples"][kind][:_SHOWN]]
    if not part["unusable"]:
        lines.append("unusable: none")
    lines += part["remarks"]
    if "short_side" in part:
        side = part["short_side"]
        lines.append(
            f"short sides: {side['smallest']} to {side['largest']} pixels, median {side['median']}"
        )
    if part["odd_images"]:
        odd = ", ".join(f"{count:,} {word}" for word, count in part["odd_images"].items())
        lines.append(f"odd images, usable all the same: {odd}")
    if "captions" in part:
        lines += _captions(part["captions"])
    if "classes" in part:
        lines += _classes(part["classes"])
    return [*lines, *_false_negatives(part["false_negatives"], is_class="classes" in part)]


def _captions(found: dict[str, Any]) -> list[str]:
    lines = [
        f"captions: {found['captions']:,}, {found['distinct']:,} distinct "
        f"({found['duplicate_share']:.1%} repeat another)",
        f"over {found['context_length']} tokens, which training cuts: {found['over_context']:,} "
        f"({found['over_context_share']:.1%})",
    ]
    if found["blank"]:
        lines.append(f"blank captions: {found['blank']:,}")
    if found["very_long"]:
        lines.append(f"very long captions: {found['very_long']:,}")
    lines += [
        f"  {one['times']:,} times: {one['caption']}" for one in found["most_common"][:_SHOWN]
    ]
    return lines


def _classes(found: dict[str, Any]) -> list[str]:
    def listed(counts: dict[str, int]) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in counts.items())

    lines = [
        f"classes: {found['classes']:,}; smallest: {listed(found['smallest'])}; "
        f"largest: {listed(found['largest'])}"
    ]
    if found["empty"]:
        names = ", ".join(found["empty"][:EXAMPLES])
        lines.append(f"classes without images: {len(found['empty']):,} ({names})")
    return lines


def _false_negatives(found: dict[str, Any], *, is_class: bool) -> list[str]:
    what = "are of the same class" if is_class else "have the same caption"
    lines = [
        f"false negatives: in a batch of {found['batch_size']:,}, on average "
        f"{found['per_sample']:.2f} others {what} as a sample ({found['expected_pairs']:,.1f} "
        f"ordered pairs)"
    ]
    if found["per_sample"] >= 0.1:
        lines.append("  training pushes these apart; a multi-positive loss helps, or captions that")
        lines.append("  differ, or smaller batches")
    return lines


def _duplicates(found: dict[str, Any]) -> list[str]:
    lines = []
    for one in found["across"]:
        lines.append(
            f"{' and '.join(one['parts'])}: {one['exact']:,} images of the one are in the other "
            f"({one['exact_share']:.2%}), {one['near']:,} more nearly ({one['near_share']:.2%})"
        )
        lines += _examples(one["examples"])
    for name, one in found["within"].items():
        lines.append(
            f"{name}: {one['exact']:,} exact copies of another, {one['near']:,} with a near one"
        )
        lines += _examples(one["examples"])
    if found["crowded"]:
        lines.append(
            f"{found['crowded']:,} images look like too many others to be compared with them all; "
            f"near copies among these may be missing"
        )
    return lines


def _examples(pairs: list[dict[str, Any]]) -> list[str]:
    return [f"  {(' = ' if one['exact'] else ' ~ ').join(one['images'])}" for one in pairs[:_SHOWN]]
