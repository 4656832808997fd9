"""Pictures of predictions, attention maps and features, by matplotlib.

Each function returns a figure, and writes it if a path is given.

Shapes: N images or texts, E embedding, h x w places of a map.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from leanclip.evaluation.classification import Prediction
from leanclip.preprocess.decoding import Source, open_image
from leanclip.preprocess.images import Preprocess, view
from leanclip.report.plots import new_figure, sanitize_label, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def classification(
    images: Sequence[Source],
    predictions: Sequence[Sequence[Prediction]],
    path: Path | None = None,
    *,
    top: int = 5,
) -> "Figure":
    """Each image beside bars of its most probable labels, as in OpenAI's notebook."""
    rows = len(images)
    figure = new_figure(7, 2.1 * rows)
    grid = figure.subplots(rows, 2, squeeze=False, width_ratios=(1, 2))
    for (left, right), image, found in zip(grid, images, predictions, strict=True):
        left.imshow(open_image(image))
        left.axis("off")
        shown = found[:top]
        right.barh(range(len(shown)), [one.probability for one in shown])
        right.set_yticks(range(len(shown)), [sanitize_label(one.label, 30) for one in shown])
        right.invert_yaxis()
        right.set_xlim(0, 1)
        right.spines[["top", "right"]].set_visible(False)
        for place, one in enumerate(shown):
            right.text(one.probability + 0.01, place, f"{one.probability:.1%}", va="center")
    grid[-1, 1].set_xlabel("probability")
    return saved(figure, path)


def heat_maps(
    images: Sequence[Source],
    maps: np.ndarray,
    titles: Sequence[str],
    path: Path | None = None,
    *,
    preprocess: Preprocess | None = None,
) -> "Figure":
    """Each image, as a model with `preprocess` sees it, under its map of (N, h, w)."""
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure = new_figure(2.6 * columns, 2.9 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, image, heat, title in zip(grid, images, maps, titles, strict=False):
        seen = open_image(image)
        seen = view(seen, preprocess or Preprocess(), min(seen.size))
        axes.imshow(seen)
        extent = (-0.5, seen.width - 0.5, seen.height - 0.5, -0.5)
        axes.imshow(heat, cmap="jet", alpha=0.45, interpolation="bilinear", extent=extent)
        axes.set_title(sanitize_label(title, 30), fontsize=8)
    return saved(figure, path)


def scatter(
    features: np.ndarray,
    names: Sequence[str],
    path: Path | None = None,
    *,
    groups: Sequence[str] | None = None,
) -> "Figure":
    """Named features (N, E) in the plane of their first two principal components.

    `groups` has the group of each, such as "image" or "text"; every group has its own marker.
    """
    points, explained = plane(features)
    figure = new_figure(8, 6)
    axes = figure.subplots()
    kinds = list(dict.fromkeys(groups)) if groups else [""]
    for kind, marker in zip(kinds, "os^Dv<>p*" * len(kinds), strict=False):
        rows = [i for i in range(len(points)) if groups is None or groups[i] == kind]
        axes.scatter(points[rows, 0], points[rows, 1], marker=marker, label=kind)
    for (x, y), name in zip(points, names, strict=True):
        axes.annotate(
            sanitize_label(name, 40), (x, y), xytext=(4, 4), textcoords="offset points", size=8
        )
    axes.set_xlabel(f"first component ({explained[0]:.0%} of the variance)")
    axes.set_ylabel(f"second component ({explained[1]:.0%})")
    if groups:
        figure.legend(loc="outside right upper")
    return saved(figure, path)


def plane(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, E) projected to two principal components, (N, 2), and explained variance (2,).

    The sign of a component is that for which its largest coordinate is positive.
    """
    centred = features - features.mean(axis=0)
    _, sizes, directions = np.linalg.svd(centred.astype(np.float64), full_matrices=False)
    if len(sizes) < 2:  # a single row
        return np.zeros((len(features), 2)), np.zeros(2)
    chosen = directions[:2]  # (2, E)
    largest = np.abs(chosen).argmax(axis=1)
    chosen = chosen * np.sign(chosen[[0, 1], largest])[:, None]
    variance = sizes**2
    return centred @ chosen.T, variance[:2] / max(variance.sum(), 1e-12)
