"""Pictures of a run, with matplotlib (the extra `plots`), which is imported only to draw.

Each function draws one figure into a file; PNG or SVG by the file's suffix.
"""

import logging
import textwrap
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from leanclip.evaluate import Report
from leanclip.images import Source, open_image
from leanclip.tracking import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


log = logging.getLogger("leanclip")


def run_pictures(folder: Path, report: Report) -> list[Path]:
    """Draw what a run's folder can show: similarity.png, predictions.png, curves.png."""
    if find_spec("matplotlib") is None:
        log.info("no pictures: matplotlib is missing; get it with: pip install 'leanclip[plots]'")
        return []
    drawn = []
    if report.examples:
        images, texts = zip(*report.examples, strict=True)
        drawn.append(folder / "similarity.png")
        similarity_matrix(images, texts, report.similarity.numpy(), drawn[-1])
    if report.predictions:
        images, said, meant = zip(*report.predictions, strict=True)
        titles = [
            f"{name}" if name == truth else f"{name} (is: {truth})"
            for name, truth in zip(said, meant, strict=True)
        ]
        drawn.append(folder / "predictions.png")
        image_grid(images, titles, drawn[-1])
    lines = read_metrics(folder)
    if any("train/loss" in line for line in lines):
        drawn.append(folder / "curves.png")
        curves(lines, drawn[-1])
    return drawn


def similarity_matrix(
    images: Sequence[Source], texts: Sequence[str], similarity: np.ndarray, path: Path
) -> None:
    """The cosine similarities (n_texts, n_images) as numbers and colours, images on top.

    The picture of OpenAI's and PASSL's demonstration notebooks.
    """
    rows, columns = similarity.shape
    figure = _figure(3.2 + 1.1 * columns, 1.2 + 0.75 * rows)
    axes = figure.add_axes((3.2 / (3.2 + 1.1 * columns), 0.02, 0.78 * columns / (columns + 1), 0.74))
    axes.imshow(similarity, aspect="auto")
    middle = (similarity.min() + similarity.max()) / 2
    for (row, column), value in np.ndenumerate(similarity):
        ink = "black" if value > middle else "white"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", size=10, color=ink)
    axes.set_yticks(range(rows), [textwrap.fill(text, 34) for text in texts])
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    for column, image in enumerate(images):
        thumbnail = axes.inset_axes((column / columns, 1.01, 1 / columns, 1.2 / rows))
        thumbnail.imshow(open_image(image))
        thumbnail.axis("off")
    figure.suptitle("Cosine similarity between text and image features")
    figure.savefig(path)


def curves(lines: Sequence[Mapping[str, float]], path: Path) -> None:
    """Training loss, learning rate and temperature, and every `val/` figure, by step."""
    charts: dict[str, list[str]] = {
        "loss": ["train/loss"],
        "learning rate": ["train/lr"],
        "logit scale": ["train/logit_scale"],
    }
    measured = sorted({name for line in lines for name in line if name.startswith("val/")})
    if measured:
        charts["evaluation"] = measured
    figure = _figure(4 * len(charts), 3.4)
    for axes, (title, names) in zip(figure.subplots(1, len(charts)), charts.items(), strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, marker="o" if len(points) < 10 else None, label=name)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize="x-small")
    figure.savefig(path)


def image_grid(images: Sequence[Source], captions: Sequence[str], path: Path) -> None:
    """Images in rows of six, each over its caption."""
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    figure = _figure(2.2 * columns, 2.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, image, caption in zip(grid, images, captions, strict=False):
        axes.imshow(open_image(image))
        axes.set_title(textwrap.fill(caption, 28), fontsize=8)
    figure.savefig(path)


def _figure(width: float, height: float) -> "Figure":
    """A figure of so many inches, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
