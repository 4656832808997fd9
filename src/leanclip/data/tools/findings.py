"""Findings of `leanclip data check`: numbers from the arrays that `check` read.

The values are plain, as in check.json; `text` words them.

Shapes: N images, P pairs, B batch.
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

EXAMPLES = 10  # of each kind


class Pair(NamedTuple):
    """Two images that are the same, or nearly: the numbers of their parts, and their indices."""

    parts: tuple[int, int]
    indices: tuple[int, int]
    is_exact: bool


@dataclass
class Findings:
    """Plain values of parts and duplicates, and some pairs of duplicates."""

    values: dict[str, Any]
    pairs: list[Pair]


def find(parts: Sequence[Part], *, batch_size: int, context_length: int) -> Findings:
    """Findings in parts that were read.

    Args:
        parts: after `read_parts`.
        batch_size: B of the expected false negatives.
        context_length: tokens of a caption that training reads.
    """
    values = {part.name: _part(part, batch_size, context_length) for part in parts}
    duplicates, pairs = _duplicates(parts)
    return Findings({"parts": values, "duplicates": duplicates}, pairs)


def expected_pairs(
    weights: np.ndarray, texts: np.ndarray, samples: np.ndarray, batch: int
) -> float:
    """Expected number of ordered pairs i != j with the same text in a random batch.

    With one text per sample, c samples sharing each of them, N in all, and a batch of B drawn
    without replacement, this is B (B - 1) * sum over texts of c (c - 1) / (N (N - 1)). One of a
    sample's several texts is drawn by its weight, and c (c - 1) becomes the square of the sum of
    weights less the sum of squares.

    Args:
        weights: the probability that a sample is drawn with a text, one of each of its entries.
        texts: the text of each entry.
        samples: the sample of each entry.
        batch: B, at most N.
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


def _part(part: Part, batch_size: int, context_length: int) -> dict[str, Any]:
    size, images = len(part.dataset), part.images
    examples: dict[str, list[str]] = {}
    for one in part.bad:
        examples.setdefault(one.kind, []).append(one.reason)
    odd = {word: int((images["odd"] >> bit & 1).sum()) for bit, word in enumerate(ODD)}
    found: dict[str, Any] = {
        "format": part.config.format,
        "root": part.config.root,
        "samples": size,
        "unusable": dict(Counter(one.kind for one in part.bad).most_common()),
        "unusable_fraction": len(part.bad) / max(size, 1),
        "examples": {kind: reasons[:EXAMPLES] for kind, reasons in examples.items()},
        "warnings": part.dataset.data_warnings(),
        "unusual_images": {word: count for word, count in odd.items() if count},
    }
    if len(images):
        short = np.minimum(images["width"], images["height"])
        sides = np.percentile(short, [0, 50, 100], method="nearest").tolist()
        found["short_side"] = dict(zip(("smallest", "median", "largest"), sides, strict=True))
    if part.dataset.classes:
        found["classes"] = _classes(part.dataset, images["label"])
        weights, texts, samples = np.ones(len(images)), images["label"], np.arange(len(images))
    else:
        found["captions"] = _captions(part, context_length)
        texts = part.captions["text"]
        _, samples, times = np.unique(
            part.captions["index"], return_inverse=True, return_counts=True
        )
        weights = 1 / times[samples]
    expected, batch = expected_pairs(weights, texts, samples, batch_size), min(batch_size, size)
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
        "duplicate_fraction": (len(captions) - len(texts)) / total,
        "most_common": common,
        "blank": int((captions["length"] == 0).sum()),
        "context_length": context_length,
        "over_context": over,
        "over_context_fraction": over / total,
        "very_long": int((captions["length"] > VERY_LONG).sum()),
    }


def _classes(dataset: Dataset, labels: np.ndarray) -> dict[str, Any]:
    times = Counter(dataset.classes)
    names = [
        name if times[name] == 1 else f"{name} ({label})"  # ImageNet's list has two cranes
        for label, name in enumerate(dataset.classes)
    ]
    counts = np.bincount(labels[labels >= 0], minlength=len(names)).tolist()
    by_name = dict(zip(names, counts, strict=True))
    ascending = sorted(by_name.items(), key=lambda item: item[1])
    return {
        "classes": len(names),
        "smallest": dict(ascending[:3]),
        "largest": dict(ascending[:-4:-1]),
        "empty": [name for name, count in by_name.items() if not count],
        "counts": by_name,
    }


def _duplicates(parts: Sequence[Part]) -> tuple[dict[str, Any], list[Pair]]:
    """Exact and near duplicates across and within parts, and examples, those across first."""
    images = np.concatenate([part.images for part in parts])
    group = exact_groups(images["sha"])
    # One image of each file's copies in a part: a thousand copies would crowd the others out.
    first = np.sort(np.unique(group * len(parts) + images["part"], return_index=True)[1])
    near, crowded = near_pairs(images[first])
    near = first[near].reshape(-1, 2)
    near = near[group[near[:, 0]] != group[near[:, 1]]]
    pairs: list[Pair] = []
    across, within = [], {}
    for a, b in combinations(range(len(parts)), 2):
        found, examples = _copies(images, group, near, a, b)
        smaller = max(1, min(len(parts[a].images), len(parts[b].images)))
        found |= {f"{kind}_fraction": count / smaller for kind, count in found.items()}
        names = {"parts": [parts[a].name, parts[b].name]}
        across.append(names | found | {"examples": _named(parts, examples)})
        pairs += examples
    for number, part in enumerate(parts):
        found, examples = _copies(images, group, near, number, number)
        within[part.name] = found | {"examples": _named(parts, examples)}
        pairs += examples
    return {"across": across, "within": within, "crowded": crowded}, pairs


def _copies(
    images: np.ndarray, group: np.ndarray, near: np.ndarray, a: int, b: int
) -> tuple[dict[str, Any], list[Pair]]:
    """Images of part b that are copies of one in part a; within a part, of an earlier one.

    Args:
        images: (N,) RECORD of all parts.
        group: (N,) equal for equal files.
        near: (P, 2) rows of near duplicates, not of equal files.
        a: number of a part.
        b: likewise, or the same.
    """
    part = images["part"]
    in_a, in_b = np.flatnonzero(part == a), np.flatnonzero(part == b)
    groups, first = np.unique(group[in_a], return_index=True)
    originals = in_a[first]  # of each group
    exact = np.setdiff1d(in_b[np.isin(group[in_b], groups)], originals)
    rows = near[(np.sort(part[near], axis=1) == [a, b]).all(axis=1)]
    similar = np.setdiff1d(rows[part[rows] == b], exact)

    def pair(one: int, other: int, *, is_exact: bool) -> Pair:
        one, other = sorted((one, other), key=lambda row: (part[row], row))
        return Pair((a, b), (int(images["index"][one]), int(images["index"][other])), is_exact)

    examples = [
        pair(int(originals[np.searchsorted(groups, group[row])]), row, is_exact=True)
        for row in exact[:EXAMPLES].tolist()
    ]
    examples += [pair(one, other, is_exact=False) for one, other in rows[:EXAMPLES].tolist()]
    return {"exact": len(exact), "near": len(similar)}, examples


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
