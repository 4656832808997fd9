"""What `check` read, made into findings: plain values for JSON, lines for a person, a verdict.

Shapes: N samples, B batch.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from leanclip.data.dataset import Dataset
from leanclip.data.tools.check import ODD, VERY_LONG, Part
from leanclip.data.tools.duplicates import exact_groups, near_pairs

EXAMPLES = 10  # of each kind that are shown
NEAR_LEAKAGE = 0.01  # share of a split's images that may nearly be in another, where none is set


class Pair(NamedTuple):
    """Two images that are the same, or nearly: the numbers of their parts, and their indices."""

    parts: tuple[int, int]
    indices: tuple[int, int]
    is_exact: bool


@dataclass
class Findings:
    """Everything that was found: as plain values, with some pairs of duplicates, and a verdict."""

    values: dict[str, Any]
    pairs: list[Pair]
    problems: list[str]

    def to_plain(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return self.values | {"problems": self.problems}


def find(
    parts: Sequence[Part],
    *,
    batch_size: int,
    context_length: int,
    max_problems: float = 0.01,
    max_leakage: float | None = None,
) -> Findings:
    """Findings of parts that were read.

    Args:
        parts: after `read_parts`.
        batch_size: of the expected false negatives.
        context_length: the most tokens of a caption.
        max_problems: the share of samples that may be unusable.
        max_leakage: the share of a split's images that may be in another one, exactly or nearly;
            null: no exact ones, and NEAR_LEAKAGE near ones.
    """
    values: dict[str, Any] = {"parts": {}}
    for part in parts:
        values["parts"][part.name] = _part_findings(part, batch_size, context_length)
    duplicates, pairs = _duplicates(parts)
    values["duplicates"] = duplicates
    return Findings(values, pairs, _problems(values, max_problems, max_leakage))


def expected_pairs(
    weights: np.ndarray, texts: np.ndarray, samples: np.ndarray, batch: int
) -> float:
    """Ordered pairs i != j of a random batch that are drawn the same text, on average.

    With one text a sample, c samples sharing each of them, N in all, and a batch of B that is
    drawn without repetition, this is B (B - 1) * sum over texts of c (c - 1) / (N (N - 1)). A
    sample of several texts is drawn each with its weight, and c (c - 1) becomes the square of
    the sum of weights less the sum of squares.

    Args:
        weights: how probably a sample is drawn a text, one of each of its entries.
        texts: which text an entry is.
        samples: which sample an entry is of.
        batch: B; of fewer samples, all are in the batch.
    """
    count = len(np.unique(samples))
    batch = min(batch, count)
    if count < 2:
        return 0.0
    _, text = np.unique(texts, return_inverse=True)
    totals = np.bincount(text, weights)
    _, entry = np.unique(text * (int(samples.max()) + 1) + samples, return_inverse=True)
    own = np.bincount(entry, weights)
    same = float((totals**2).sum() - (own**2).sum())
    return batch * (batch - 1) * max(same, 0.0) / (count * (count - 1))


def paired_images(parts: Sequence[Part], findings: Findings) -> list[tuple[Path | bytes, str]]:
    """The images of the pairs of duplicates, one after the other, each with a title."""
    shown = []
    for one in findings.pairs[: 2 * EXAMPLES]:
        for number, index in zip(one.parts, one.indices, strict=True):
            sample = parts[number].dataset[index]
            sign = "=" if one.is_exact else "~"
            shown.append((sample.image, f"{sign} {parts[number].name}: {sample.id[-40:]}"))
    return shown


def _part_findings(part: Part, batch_size: int, context_length: int) -> dict[str, Any]:
    size = len(part.dataset)
    unusable = Counter(one.kind for one in part.bad)
    shown: dict[str, list[str]] = {kind: [] for kind in unusable}
    for one in part.bad:
        if len(shown[one.kind]) < EXAMPLES:
            shown[one.kind].append(one.reason)
    images = part.images
    short = np.minimum(images["width"], images["height"])
    odd = {word: int((images["odd"] >> bit & 1).sum()) for bit, word in enumerate(ODD)}
    found: dict[str, Any] = {
        "format": part.config.format,
        "root": part.config.root,
        "samples": size,
        "unusable": dict(unusable.most_common()),
        "unusable_share": len(part.bad) / max(size, 1),
        "examples": shown,
        "remarks": part.dataset.remarks(),
        "odd_images": {word: count for word, count in odd.items() if count},
    }
    if len(images):
        low, middle, high = np.percentile(short, [0, 50, 100], method="nearest").tolist()
        found["short_side"] = {"smallest": low, "median": middle, "largest": high}
    if part.dataset.classes:
        labels, samples = images["label"], np.arange(len(images))
        found["classes"] = _classes(part.dataset, labels)
        expected = expected_pairs(np.ones(len(labels)), labels, samples, batch_size)
    else:
        found["captions"] = _captions(part, context_length)
        _, sample, times = np.unique(
            part.captions["index"], return_inverse=True, return_counts=True
        )
        expected = expected_pairs(1 / times[sample], part.captions["text"], sample, batch_size)
    batch = min(batch_size, size)
    found["false_negatives"] = {
        "batch_size": batch,
        "expected_pairs": expected,
        "per_sample": expected / max(batch, 1),
    }
    return found


def _captions(part: Part, context_length: int) -> dict[str, Any]:
    captions = part.captions
    texts, first, times = np.unique(captions["text"], return_index=True, return_counts=True)
    total = max(len(captions), 1)
    over = int((captions["tokens"] > context_length).sum())
    common = []
    for place in np.argsort(-times, kind="stable")[:EXAMPLES].tolist():
        if times[place] > 1:
            row = int(first[place])
            index = int(captions["index"][row])
            among = row - int(np.searchsorted(captions["index"], index))  # rows are in order
            text = part.dataset[index].captions[among]
            common.append({"caption": text[:200], "times": int(times[place])})
    return {
        "captions": len(captions),
        "distinct": len(texts),
        "duplicate_share": (len(captions) - len(texts)) / total,
        "most_common": common,
        "blank": int((captions["length"] == 0).sum()),
        "context_length": context_length,
        "over_context": over,
        "over_context_share": over / total,
        "very_long": int((captions["length"] > VERY_LONG).sum()),
    }


def _classes(dataset: Dataset, labels: np.ndarray) -> dict[str, Any]:
    times = Counter(dataset.classes)
    names = [
        name if times[name] == 1 else f"{name} ({label})"  # ImageNet's list has two cranes
        for label, name in enumerate(dataset.classes)
    ]
    counts = np.bincount(labels[labels >= 0], minlength=len(names))
    order = np.argsort(counts, kind="stable")
    return {
        "classes": len(names),
        "smallest": {names[label]: int(counts[label]) for label in order[:3]},
        "largest": {names[label]: int(counts[label]) for label in order[:-4:-1]},
        "empty": [names[label] for label in np.flatnonzero(counts == 0)],
        "counts": {name: int(count) for name, count in zip(names, counts, strict=True)},
    }


@dataclass
class _Copies:
    """Images of all parts, and which of them are the same."""

    images: np.ndarray  # (N,) RECORD
    group: np.ndarray  # (N,) equal for equal files
    near: np.ndarray  # (P, 2) rows of near duplicates, not of equal files
    crowded: int

    def pair(self, a: int, b: int, *, is_exact: bool) -> Pair:
        """The images in two rows."""
        a, b = sorted((a, b), key=lambda row: (self.images["part"][row], row))
        one, other = self.images["part"][[a, b]].tolist(), self.images["index"][[a, b]].tolist()
        return Pair((one[0], one[1]), (other[0], other[1]), is_exact)


def _duplicates(parts: Sequence[Part]) -> tuple[dict[str, Any], list[Pair]]:
    """Exact and near duplicates within and across parts, and examples, those across first."""
    images = np.concatenate([part.images for part in parts])
    group = exact_groups(images["sha"])
    # One image of each file's copies in a part: a thousand copies would crowd the others out.
    first = np.sort(np.unique(group * len(parts) + images["part"], return_index=True)[1])
    near, crowded = near_pairs(images[first])
    near = first[near].reshape(-1, 2)
    copies = _Copies(images, group, near[group[near[:, 0]] != group[near[:, 1]]], crowded)
    pairs: list[Pair] = []
    across, within = [], {}
    for a, b in combinations(range(len(parts)), 2):
        counts, examples = _across(copies, a, b)
        names = {"parts": [parts[a].name, parts[b].name]}
        across.append(names | counts | {"examples": _named(parts, examples)})
        pairs += examples
    for number, part in enumerate(parts):
        counts, examples = _within(copies, number)
        within[part.name] = counts | {"examples": _named(parts, examples)}
        pairs += examples
    return {"across": across, "within": within, "crowded": crowded}, pairs


def _across(copies: _Copies, a: int, b: int) -> tuple[dict[str, Any], list[Pair]]:
    """Images of part b that are in part a too."""
    group, part = copies.group, copies.images["part"]
    in_a, in_b = np.flatnonzero(part == a), np.flatnonzero(part == b)
    leaked = in_b[np.isin(group[in_b], group[in_a])]
    rows = copies.near[(np.sort(part[copies.near], axis=1) == [a, b]).all(axis=1)]
    similar = np.setdiff1d(rows[part[rows] == b], leaked)
    examples = [
        copies.pair(int(in_a[np.argmax(group[in_a] == group[row])]), row, is_exact=True)
        for row in leaked[:EXAMPLES].tolist()
    ]
    examples += [copies.pair(*row, is_exact=False) for row in rows[:EXAMPLES].tolist()]
    smaller = max(1, min(len(in_a), len(in_b)))
    counts = {"exact": len(leaked), "near": len(similar)}
    return counts | {f"{kind}_share": n / smaller for kind, n in counts.items()}, examples


def _within(copies: _Copies, number: int) -> tuple[dict[str, Any], list[Pair]]:
    """Images of a part that are in it more than once."""
    part = copies.images["part"]
    rows = np.flatnonzero(part == number)
    order = rows[np.argsort(copies.group[rows], kind="stable")]
    same = np.flatnonzero(copies.group[order[1:]] == copies.group[order[:-1]])
    near = copies.near[(part[copies.near] == number).all(axis=1)]
    examples = [
        copies.pair(int(order[place]), int(order[place + 1]), is_exact=True)
        for place in same[:EXAMPLES].tolist()
    ]
    examples += [copies.pair(*row, is_exact=False) for row in near[:EXAMPLES].tolist()]
    return {"exact": len(same), "near": len(np.unique(near))}, examples


def _named(parts: Sequence[Part], pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    return [
        {
            "images": [
                parts[number].dataset.name(index)
                for number, index in zip(one.parts, one.indices, strict=True)
            ],
            "exact": one.is_exact,
        }
        for one in pairs
    ]


def _problems(values: dict[str, Any], max_problems: float, max_leakage: float | None) -> list[str]:
    """What is over the thresholds, a line each."""
    problems = []
    for name, part in values["parts"].items():
        if part["unusable_share"] > max_problems:
            count = sum(part["unusable"].values())
            problems.append(
                f"{name}: {count:,} of {part['samples']:,} samples are unusable, over the share "
                f"of {max_problems:g}"
            )
    for one in values["duplicates"]["across"]:
        limits = (0.0, NEAR_LEAKAGE) if max_leakage is None else (max_leakage, max_leakage)
        for kind, limit in zip(("exact", "near"), limits, strict=True):
            if one[f"{kind}_share"] > limit:
                copies = "copies" if kind == "exact" else "near copies"
                problems.append(
                    f"{' and '.join(one['parts'])}: {one[kind]:,} images of the one have {copies} "
                    f"in the other, over the share of {limit:g}"
                )
    return problems
