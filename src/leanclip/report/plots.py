"""Pictures of runs and data by matplotlib, which is imported only to draw.

Functions with a `path` write the figure there, as PNG or SVG by suffix; the others draw for pages,
which embed the figures as SVG.

Shapes: C classes.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from leanclip.evaluation import Report
from leanclip.evaluation.sweep import Sweep
from leanclip.evaluation.tasks import RETENTION
from leanclip.io.files import read_metrics
from leanclip.preprocess.images import Source, image_or_none
from leanclip.report.samples import examples, predictions
from leanclip.report.text import metric_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MAX_POINTS = 400  # of a line
MAX_COUNTED = 25  # classes of a confusion matrix with printed counts
LINES = ("#2563eb", "#c83428", "#16803d", "#b7791f", "#9061c2", "#1f9ba8", "#c2618f", "#808a96")
GRID, SOFT, ON_COLOR = "#d9dee5", "#5b6470", "#ffffff"
# The variables of the pages' stylesheet that replace these colours in SVG.
COLORS = {LINES[0]: "c0", LINES[1]: "c1", LINES[2]: "c2", GRID: "line", SOFT: "soft",
          ON_COLOR: "hot"}  # fmt: skip

Points = Sequence[tuple[float, float]]


def run_pictures(folder: Path, report: Report) -> list[Path]:
    """Draw those of similarity.png, predictions.png and curves.png that there are results for."""
    drawn = []
    if found := examples(report):
        drawn.append(folder / "similarity.png")
        similarity_matrix(*found, drawn[-1])
    if shown := predictions(report):
        images, predicted, targets = zip(*shown, strict=True)
        titles = [
            name if name == target else f"{name} (true: {target})"
            for name, target in zip(predicted, targets, strict=True)
        ]
        drawn.append(folder / "predictions.png")
        image_grid(images, titles, drawn[-1])
    if charts := training_charts(read_metrics(folder)):
        drawn.append(folder / "curves.png")
        figure = new_figure(4 * len(charts), 3.4)
        grid = figure.subplots(1, len(charts), squeeze=False).ravel()
        for axes, (title, series) in zip(grid, charts.items(), strict=True):
            _draw_lines(axes, series)
            axes.set_title(title)
            axes.set_xlabel("step")
        figure.savefig(drawn[-1])
    return drawn


def check_pictures(
    folder: Path,
    samples: Sequence[tuple[Source, str]],
    duplicates: Sequence[tuple[Source, str]],
) -> list[Path]:
    """Draw samples.png and duplicates.png of a data check, if there are any."""
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
    """Cosine similarities (texts, images) as numbers and colours, with the images on top.

    The picture of OpenAI's and PASSL's notebooks.
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


def training_charts(lines: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Points]]:
    """Loss, learning rate, logit scale and evaluations by step: chart -> line -> points.

    Lines of a single point are left out.
    """
    names = {
        "loss": {"train/loss": ""},
        "learning rate": {"train/lr": ""},
        "logit scale": {"train/logit_scale": ""},
        "evaluation": {
            name: metric_label(name.removeprefix("val/"))
            for name in sorted({name for line in lines for name in line})
            if name.startswith(("val/", RETENTION)) and name.endswith(("_top1", "_R@1"))
        },
    }
    charts = {}
    for title, labels in names.items():
        series = {
            label: [(line["step"], line[name]) for line in lines if name in line]
            for name, label in labels.items()
        }
        if series := {label: points for label, points in series.items() if len(points) > 1}:
            charts[title] = series
    return charts


def line_chart(series: Mapping[str, Points]) -> "Figure":
    """Lines over steps, with a legend if there is more than one; for a page."""
    figure = new_figure(4.2, 2.4)
    _draw_lines(figure.subplots(), series)
    return figure


def _draw_lines(axes: "Axes", series: Mapping[str, Points]) -> None:
    """Draw at most MAX_POINTS finite points of each line, evenly spaced, and its last."""
    axes.set_prop_cycle(color=LINES)
    for label, points in series.items():
        finite = [point for point in points if all(map(math.isfinite, point))]
        step = max(1, -(-len(finite) // MAX_POINTS))
        places = np.array([*finite[::step], *finite[-1:]]).reshape(-1, 2)
        marker = "o" if len(places) < 12 else None
        axes.plot(
            *places.T, marker=marker, markersize=3, linewidth=1.3, label=sanitize_label(label, 40),
            clip_on=False,
        )  # fmt: skip
    axes.grid(color=GRID, linewidth=0.7, clip_on=False)
    axes.tick_params(length=0, labelsize=7.5, labelcolor=SOFT)
    axes.spines[:].set_visible(False)
    if len(series) > 1:
        axes.legend(fontsize=7.5, frameon=False, labelcolor=SOFT)


def confusion_matrix(
    counts: np.ndarray, totals: np.ndarray, names: Sequence[str], numbers: Sequence[int]
) -> "Figure":
    """Counts as squares, darker for a larger fraction of their row; for a page.

    Args:
        counts: (C, C) integers, rows are true classes, columns predicted ones.
        totals: images of each true class, (C,), including columns that are left out.
        names: of the classes.
        numbers: of the classes, for the columns.
    """
    from matplotlib.patches import Rectangle

    size = len(counts)
    figure = new_figure(0.22 * size + 2, 0.22 * size + 0.4)
    axes = figure.subplots()
    for row, column in np.argwhere(counts):
        fraction = counts[row, column] / totals[row]
        # Single errors stay visible.
        square = Rectangle(
            (column - 0.46, row - 0.46), 0.92, 0.92, linewidth=0, clip_on=False,
            facecolor=LINES[2] if row == column else LINES[1], alpha=0.25 + 0.75 * fraction,
        )  # fmt: skip
        axes.add_patch(square)
        if size <= MAX_COUNTED and counts[row, column] < 1000:
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", size=6,
                      color=ON_COLOR if fraction > 0.5 else SOFT)  # fmt: skip
    labels = [
        f"{sanitize_label(name[:30], 100)}  {n}" for name, n in zip(names, numbers, strict=True)
    ]
    axes.set_xticks(range(size), [str(number) for number in numbers])
    axes.set_yticks(range(size), labels)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=6, labelcolor=SOFT)
    axes.spines[:].set_color(GRID)
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), aspect="equal")
    return figure


def pareto_picture(sweep: Sweep, path: Path) -> None:
    """The task's metric against retention's for every alpha, with the Pareto front."""
    from matplotlib.ticker import PercentFormatter

    places = [(p.task[sweep.task], p.retention[sweep.retention]) for p in sweep.points]
    figure = new_figure(6, 4.5)
    axes = figure.subplots()
    front = sorted(places[i] for i in pareto_front(places))
    axes.plot(*zip(*front, strict=True), color="tab:blue", alpha=0.5, label="Pareto front")
    axes.plot(*zip(*places, strict=True), "o", color="tab:blue")
    for point, place in zip(sweep.points, places, strict=True):
        alpha = f"{point.alpha:g}"
        if point.alpha == sweep.chosen:
            axes.plot(*place, "o", color="tab:red", markersize=11, label=f"chosen: {alpha}")
        axes.annotate(alpha, place, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel=f"task: {sweep.task}", ylabel=f"retention: {sweep.retention}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path)


def pareto_front(places: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the points that no other point dominates."""
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
    """Images in rows, captions above them."""
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
    """Draw an image, or "no picture" where it cannot be read."""
    shown = image_or_none(image)
    if shown is not None:
        axes.imshow(shown)
    else:
        axes.text(0.5, 0.5, "no picture", ha="center", va="center", transform=axes.transAxes)


def sanitize_label(text: str, width: int) -> str:
    """A caption wrapped to a width; `$` is no formula, control characters are replaced."""
    return textwrap.fill(printable(text[:500]), width).replace("$", r"\$")


def printable(text: str) -> str:
    """Text with characters that cannot be displayed, such as controls, replaced by space or �."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in text)


def saved(figure: "Figure", path: Path | None) -> "Figure":
    """Write a figure to a path, if there is one, and return it."""
    if path is not None:
        figure.savefig(path)
    return figure


def new_figure(
    width: float, height: float, *, layout: Literal["constrained"] | None = "constrained"
) -> "Figure":
    """A figure of a size in inches, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout=layout)
    FigureCanvasAgg(figure)
    return figure
