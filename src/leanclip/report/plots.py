"""Pictures of a run, with matplotlib (the extra `plots`), which is imported only to draw.

Each function draws one figure, into a file where it is given one; PNG or SVG by its suffix.
"""

import logging
import textwrap
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from leanclip.evaluation import Report
from leanclip.io.files import read_metrics
from leanclip.io.optional_imports import need
from leanclip.preprocess.images import Source, image_to_show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MEASURED = ("val/", "retention/")  # names of metrics of evaluations
log = logging.getLogger("leanclip")


def run_pictures(folder: Path, report: Report) -> list[Path]:
    """Draw what a run's folder can show: similarity.png, predictions.png, curves.png."""
    if not can_draw():
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


def check_pictures(
    folder: Path,
    samples: Sequence[tuple[Source, str]],
    duplicates: Sequence[tuple[Source, str]],
) -> list[Path]:
    """Draw what a check of data found: samples.png, and duplicates.png, where there are any."""
    if not can_draw():
        return []
    drawn = []
    for name, shown in (("samples", samples), ("duplicates", duplicates)):
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)  # of an earlier check
        if shown:
            images, titles = zip(*shown, strict=True)
            image_grid(images, titles, path)
            drawn.append(path)
    return drawn


def similarity_matrix(
    images: Sequence[Source],
    texts: Sequence[str],
    similarity: np.ndarray,
    path: Path | None = None,
) -> "Figure":
    """The cosine similarities (n_texts, n_images) as numbers and colours, images on top.

    The picture of OpenAI's and PASSL's demonstration notebooks.
    """
    rows, columns = similarity.shape
    left, cell_width, cell_height, top = 3.4, 1.1, 0.75, 1.6  # inches
    width, height = left + cell_width * columns + 0.1, top + cell_height * rows + 0.1
    figure = new_figure(width, height, layout=None)
    axes = figure.add_axes(
        (left / width, 0.1 / height, 1 - (left + 0.1) / width, 1 - (top + 0.1) / height)
    )
    axes.imshow(similarity, aspect="auto")
    middle = (similarity.min() + similarity.max()) / 2
    for (row, column), value in np.ndenumerate(similarity):
        ink = "black" if value > middle else "white"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", size=10, color=ink)
    axes.set_yticks(range(rows), [sanitize_label(text, 36) for text in texts])
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    for column, image in enumerate(images):
        box = (left + cell_width * (column + 0.04), height - top + 0.05)
        size = (0.92 * cell_width, top - 0.5)
        thumbnail = figure.add_axes(
            (box[0] / width, box[1] / height, size[0] / width, size[1] / height), anchor="S"
        )
        _draw(thumbnail, image)
        thumbnail.axis("off")
    figure.suptitle("Cosine similarity between text and image features", y=1 - 0.15 / height)
    return saved(figure, path)


def curves(lines: Sequence[Mapping[str, float]], path: Path) -> None:
    """Training loss, learning rate and temperature by step, and evaluations where there are two."""
    charts: dict[str, list[str]] = {
        "loss": ["train/loss"],
        "learning rate": ["train/lr"],
        "logit scale": ["train/logit_scale"],
    }
    evaluations = [line for line in lines if any(name.startswith(MEASURED) for name in line)]
    if len(evaluations) > 1:
        charts["evaluation"] = sorted(
            name
            for name in evaluations[-1]
            if name.startswith(MEASURED) and not name.endswith(("_rank", "_ece"))  # of other scales
        )
    figure = new_figure(4 * len(charts), 3.4)
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


def pareto_picture(
    places: Sequence[tuple[float, float]],
    labels: Sequence[str],
    path: Path,
    *,
    chosen: int,
    axes: tuple[str, str],
) -> list[Path]:
    """Two figures of each candidate against each other; the best trades joined by a line.

    Args:
        places: across, up; more is better in both.
        labels: beside each place.
        path: of the picture.
        chosen: which one is marked.
        axes: the names of the figures.
    """
    if not can_draw():
        return []
    from matplotlib.ticker import PercentFormatter

    figure = new_figure(6, 4.5)
    plot = figure.subplots()
    front = sorted(places[i] for i in pareto_front(places))
    plot.plot(*zip(*front, strict=True), color="tab:blue", alpha=0.5, label="Pareto front")
    plot.plot(*zip(*places, strict=True), "o", color="tab:blue")
    plot.plot(
        *places[chosen], "o", color="tab:red", markersize=11, label=f"chosen: {labels[chosen]}"
    )
    for place, label in zip(places, labels, strict=True):
        plot.annotate(label, place, xytext=(5, 4), textcoords="offset points", fontsize=8)
    for set_name, name in zip((plot.set_xlabel, plot.set_ylabel), axes, strict=True):
        set_name(sanitize_label(name, 60))
    for axis in (plot.xaxis, plot.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    plot.legend(fontsize="small")
    plot.grid(alpha=0.3)
    figure.savefig(path)
    return [path]


def pareto_front(places: Sequence[tuple[float, float]]) -> list[int]:
    """Those that no other beats in both figures, nor in one with the other equal."""
    return [
        i
        for i, (x, y) in enumerate(places)
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in places)
    ]


def image_grid(
    images: Sequence[Source],
    captions: Sequence[str],
    path: Path | None = None,
    *,
    columns: int = 6,
) -> "Figure":
    """Images in rows, each under its caption."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = new_figure(2.2 * columns, 2.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, image, caption in zip(grid, images, captions, strict=False):
        _draw(axes, image)
        axes.set_title(sanitize_label(caption, 28), fontsize=8)
    return saved(figure, path)


def _draw(axes: "Axes", image: Source) -> None:
    """An image, or words in its place where it cannot be read."""
    shown = image_to_show(image)
    if shown is not None:
        axes.imshow(shown)
    else:
        axes.text(0.5, 0.5, "no picture", ha="center", va="center", transform=axes.transAxes)


def sanitize_label(text: str, width: int) -> str:
    """A caption as it stands, in lines: a dollar sign is no formula, a control no character."""
    printable = "".join(c if c.isprintable() else " " for c in text[:500])
    return textwrap.fill(printable, width).replace("$", r"\$")


def saved(figure: "Figure", path: Path | None) -> "Figure":
    """The figure, written to a path if there is one."""
    if path is not None:
        figure.savefig(path)
    return figure


def new_figure(
    width: float, height: float, *, layout: Literal["constrained"] | None = "constrained"
) -> "Figure":
    """A figure of so many inches, drawn without a display.

    Raises:
        ConfigError: matplotlib is missing.
    """
    need("matplotlib", "drawing", extra="plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def can_draw() -> bool:
    """Whether matplotlib is installed; the log says so where it is not."""
    if find_spec("matplotlib") is None:
        log.info("no pictures: matplotlib is missing; get it with: pip install matplotlib")
        return False
    return True
