"""The plots of README.md: a function for each, from a script's records to an SVG file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cells import Records, found, merged

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "leanclip",  # the same file from the same figures
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
}
OURS, OTHERS = "#1f5fbf", ("#b0b4bb", "#7d838c", "#d9b44a")


def train_step(records: Records, path: Path) -> None:
    """Images a second beside the peers, relative to leanclip's."""
    results = merged(records)
    names = list(results)
    ways = ["leanclip", "transformers, to 77", "transformers, to the longest", "open_clip"]
    ways = [w for w in ways if any(found(r, "images_per_second", w) for r in results.values())]
    bars = {
        way: [
            (found(results[name], "images_per_second", way, "median") or 0)
            / results[name]["images_per_second"]["leanclip"]["median"]
            for name in names
        ]
        for way in ways
    }
    figure, axes = _axes(1.0 + 0.75 * len(names))
    for place, way in enumerate(ways):
        at = [i + (place - (len(ways) - 1) / 2) * 0.25 for i in range(len(names))]
        color = OURS if way == "leanclip" else OTHERS[place - 1]
        axes.barh(at, bars[way], 0.23, label=way, color=color)
        for y, name, width in zip(at, names, bars[way], strict=True):
            rate = found(results[name], "images_per_second", way, "median")
            if rate:
                axes.text(width + 0.01, y, f"{rate:.3g}/s", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("images a second, leanclip = 1")
    axes.set_xlim(0, 1.25)
    _save(figure, axes, path)


def loss(records: Records, path: Path) -> None:
    """Seconds against pairs, tiled and dense."""
    results = merged(records)
    figure, axes = _axes(3)
    for kind, style in (("clip", "-"), ("multi-positive", "--"), ("siglip", ":")):
        by_pairs = results.get(kind, {})
        pairs = [int(name.split()[0].replace(",", "")) for name in by_pairs]
        for way, color in (("leanclip", OURS), ("dense", OTHERS[1])):
            seconds = [found(r, "seconds", way, "median") for r in by_pairs.values()]
            label = f"{kind}, {'tiled' if way == 'leanclip' else 'dense'}"
            axes.plot(pairs, seconds, style, color=color, marker="o", markersize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("pairs N")
    axes.set_ylabel("seconds, forward and backward")
    _save(figure, axes, path)


def growth(records: Records, path: Path) -> None:
    """Seconds against the number of images, by command."""
    results = merged(records)
    figure, axes = _axes(3)
    for task, result in results.items():
        if isinstance(result, dict) and "seconds" in result:
            sizes = [int(size) for size in result["seconds"]]
            seconds = [one["median"] for one in result["seconds"].values()]
            axes.plot(sizes, seconds, marker="o", markersize=3, label=task)
    axes.set_xlim(0)
    axes.set_ylim(0)
    axes.set_xlabel("images")
    axes.set_ylabel("seconds, the start included")
    _save(figure, axes, path)


CHARTS: dict[str, Callable[[Records, Path], None]] = {
    "train_step": train_step,
    "loss": loss,
    "growth": growth,
}


def _axes(height: float) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update(STYLE)  # pyright: ignore[reportCallIssue, reportArgumentType]
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(6.5, height), layout="constrained")


def _save(figure: Any, axes: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    lines, names = axes.get_legend_handles_labels()
    columns = min(3, len(names))
    figure.legend(
        lines, names, frameon=False, fontsize=8, loc="outside upper center", ncols=columns
    )
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
