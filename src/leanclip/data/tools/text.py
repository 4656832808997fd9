"""Findings of a check in words: the summary, and what is over the thresholds."""

from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN = 3  # examples of each kind; check.json has more
NEAR_LEAKAGE = 0.01  # default fraction of a split's images with near-duplicates in another


def problems(
    values: Mapping[str, Any], *, max_problems: float = 0.01, max_leakage: float | None = None
) -> list[str]:
    """What is over the thresholds, one per line.

    Args:
        values: of `Findings`.
        max_problems: the fraction of unusable samples that is allowed.
        max_leakage: the fraction of a split's images that may be in another one, exactly or
            nearly; None: no exact ones, and NEAR_LEAKAGE near ones.
    """
    lines = []
    for name, part in values["parts"].items():
        if part["unusable_share"] > max_problems:
            count = sum(part["unusable"].values())
            lines.append(
                f"{name}: {count:,} of {part['samples']:,} samples ({part['unusable_share']:.1%}) "
                f"are unusable; the limit is {max_problems:.1%} (--max-problems)"
            )
    limits = (0.0, NEAR_LEAKAGE) if max_leakage is None else (max_leakage, max_leakage)
    for one in values["duplicates"]["across"]:
        for kind, limit in zip(("exact", "near"), limits, strict=True):
            if one[f"{kind}_share"] > limit:
                names = " and ".join(one["parts"])
                lines.append(
                    f"{names}: {_leak(one, kind)}; the limit is {limit:.1%} (--max-leakage)"
                )
    return lines


def check_text(values: Mapping[str, Any], problems: Sequence[str]) -> str:
    """The whole summary, the verdict last."""
    lines = []
    for name, part in values["parts"].items():
        lines += [f"{name}: {part['samples']:,} samples ({part['format']}:{part['root']})"]
        lines += [f"  {line}" for line in _part(part)] + [""]
    lines += ["duplicates"]
    lines += [f"  {line}" for line in _duplicates(values["duplicates"])] + [""]
    if problems:
        lines += ["Problems:", *(f"  {problem}" for problem in problems)]
    else:
        lines += ["No problems above the thresholds."]
    return "\n".join(lines)


def _part(part: Mapping[str, Any]) -> list[str]:
    lines = []
    for kind, count in part["unusable"].items():
        lines.append(f"unusable: {count:,} {kind}")
        lines += [f"  {reason}" for reason in part["examples"][kind][:_SHOWN]]
    if not part["unusable"]:
        lines.append("unusable: none")
    lines += part["remarks"]
    if side := part.get("short_side"):
        lines.append(
            f"short sides: {side['smallest']} to {side['largest']} pixels, median {side['median']}"
        )
    if part["odd_images"]:
        odd = ", ".join(f"{count:,} {word}" for word, count in part["odd_images"].items())
        lines.append(f"unusual images, usable: {odd}")
    if "captions" in part:
        lines += _captions(part["captions"])
    if "classes" in part:
        lines += _classes(part["classes"])
    found = part["false_negatives"]
    what = "of the same class" if "classes" in part else "with the same caption"
    lines.append(
        f"false negatives: {found['per_sample']:.2f} other samples {what} per sample of a batch of "
        f"{found['batch_size']:,}, on average ({found['expected_pairs']:,.1f} ordered pairs)"
    )
    if found["per_sample"] >= 0.1:
        lines += ["  the loss pushes these apart: use a multi-positive loss, captions that differ,"]
        lines += ["  or smaller batches"]
    return lines


def _captions(found: Mapping[str, Any]) -> list[str]:
    lines = [
        f"captions: {found['captions']:,}, {found['distinct']:,} distinct "
        f"({found['duplicate_share']:.1%} repeat another)",
        f"over {found['context_length']} tokens, cut in training: {found['over_context']:,} "
        f"({found['over_context_share']:.1%})",
    ]
    lines += [
        f"{kind.replace('_', ' ')} captions: {found[kind]:,}"
        for kind in ("blank", "very_long")
        if found[kind]
    ]
    common = found["most_common"][:_SHOWN]
    return lines + [f"  {one['times']:,} times: {one['caption']}" for one in common]


def _classes(found: Mapping[str, Any]) -> list[str]:
    smallest, largest = (
        ", ".join(f"{name} {count:,}" for name, count in found[kind].items())
        for kind in ("smallest", "largest")
    )
    lines = [f"classes: {found['classes']:,}; smallest: {smallest}; largest: {largest}"]
    if empty := found["empty"]:
        more = ", ..." * (len(empty) > 10)
        lines.append(f"classes without images: {len(empty):,} ({', '.join(empty[:10])}{more})")
    return lines


def _duplicates(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for one in found["across"]:
        names = " and ".join(one["parts"])
        lines.append(f"{names}: {_leak(one, 'exact')}, {_leak(one, 'near')}")
        lines += _examples(one["examples"])
    for name, one in found["within"].items():
        lines.append(
            f"{name}: {one['exact']:,} exact copies of another image, {one['near']:,} images with "
            f"near-duplicates"
        )
        lines += _examples(one["examples"])
    if found["crowded"]:
        lines.append(
            f"{found['crowded']:,} images look like too many others to be compared with them all; "
            f"near-duplicates among these may be missing"
        )
    return lines


def _leak(one: Mapping[str, Any], kind: str) -> str:
    """The images that two parts share."""
    words = {"exact": "exact copies", "near": "near-duplicates"}[kind]
    return f"{one[kind]:,} {words} ({one[f'{kind}_share']:.2%})"


def _examples(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"  {(' = ' if one['exact'] else ' ~ ').join(one['images'])}" for one in pairs[:_SHOWN]]
