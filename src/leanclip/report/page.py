"""One page of HTML that holds everything: no script, nothing from the network, pictures inside.

Text is escaped unless it is `Html`, which only `tag` makes: names and captions come from
strangers. Charts are SVG and tables, so that a page needs no library to be drawn.
"""

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from leanclip.io.files import write_text
from leanclip.preprocess.images import Source, as_jpeg, image_to_show, middle_square

SIDE = 112  # of a thumbnail, in pixels: twice what is shown, for fine screens
MAX_POINTS = 400  # of a line
_VOID = {  # elements without an inside, in HTML and in SVG
    "img",
    "meta",
    "br",
    "line",
    "rect",
    "polyline",
    "circle",
}
_NO_NETWORK = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

Points = Sequence[tuple[float, float]]


class Html(str):
    """Text that is HTML already; made by `tag` alone."""

    __slots__ = ()


def tag(name: str, /, *inner: "str | Iterable[str]", **attributes: object) -> Html:
    """An element: attributes and inner text are escaped, inner elements are taken as they are.

    `class_` is class; an underscore in the name of an attribute is a hyphen.
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            key = key.rstrip("_").replace("_", "-")
            words.append(f'{key}="{html.escape(printable(str(value)))}"')
    opening = " ".join(words)
    return Html(f"<{opening}/>" if name in _VOID else f"<{opening}>{join(inner)}</{name}>")


def join(inner: Iterable["str | Iterable[str]"]) -> Html:
    """Elements and texts, one after another; lists of them, too."""
    found = []
    for one in inner:
        if isinstance(one, Html):
            found.append(one)
        elif isinstance(one, str):
            found.append(html.escape(printable(one)))
        else:
            found.append(join(one))
    return Html("".join(found))


def printable(text: str) -> str:
    """Text without what has no picture of its own: controls, half characters."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in text)


def shortened(text: str, length: int = 200) -> str:
    """The start of a text that may be of any length."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def write_page(path: Path, title: str, *body: "str | Iterable[str]") -> None:
    """Write the page whole or not at all."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_NO_NETWORK),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(Path(__file__).with_name("page.css").read_text(encoding="utf-8"))),
    )
    page = tag("html", head, tag("body", tag("main", *body)), lang="en")
    write_text(path, f"<!doctype html>\n{page}\n")


def section(title: str, *inner: "str | Iterable[str]") -> Html:
    """A part of the page with its heading."""
    return tag("section", tag("h2", title), *inner)


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()
) -> Html:
    """A table; the columns `numbers` are set to the right."""

    def cells(kind: str, row: Sequence[str]) -> list[Html]:
        return [tag(kind, one, class_="n" if i in numbers else None) for i, one in enumerate(row)]

    body = [tag("tr", cells("td", row)) for row in rows]
    return tag("table", tag("thead", tag("tr", cells("th", head))), tag("tbody", body))


def bar(share: float, *, low: float | None = None, high: float | None = None) -> Html:
    """A share of 1 as a bar, with the line of its interval."""
    parts = [tag("span", class_="fill", style=f"width:{_percent(share)}")]
    if low is not None and high is not None:
        place = f"left:{_percent(low)};width:{_percent(high - low)}"
        parts.append(tag("span", class_="interval", style=place))
    return tag("span", parts, class_="bar", aria_hidden="true")


def thumbnail(source: Source, words: str = "") -> Html:
    """A picture inside the page, cut to a square; its words are for who cannot see it."""
    image = image_to_show(source)
    if image is None:
        return tag("span", "no picture", class_="thumb missing")
    image = image.crop(middle_square(image))
    if image.width > SIDE:
        image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    data = base64.b64encode(as_jpeg(image, 85)).decode()
    return tag(
        "img",
        src=f"data:image/jpeg;base64,{data}",
        alt=shortened(words),
        title=shortened(words),
        class_="thumb",
    )


def figure(image: Html, *words: "str | Iterable[str]", kind: str | None = None) -> Html:
    """A picture over its words; `kind` is "right" or "wrong" where there is a verdict."""
    return tag("figure", image, tag("figcaption", *words), class_=kind)


def gallery(figures: Iterable[Html]) -> Html:
    """Pictures in rows that wrap."""
    return tag("div", figures, class_="gallery")


def line_chart(title: str, series: Mapping[str, Points]) -> Html:
    """Lines over steps, each with its own colour, and a legend where there are several."""
    width, height, left, bottom, top = 340, 190, 48, 22, 8
    points = [point for line in series.values() for point in line]
    x_low, x_high = _range([x for x, _ in points])
    y_low, y_high = _range([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return left + across * (width - left - 8), height - bottom - up * (height - bottom - top)

    drawn = []
    for share in (0, 0.5, 1):
        value = y_low + share * (y_high - y_low)
        _, y = place(x_low, value)
        drawn.append(tag("line", x1=left, x2=width - 8, y1=f"{y:.1f}", y2=f"{y:.1f}"))
        drawn.append(
            tag("text", _tick(value, y_high), x=left - 5, y=f"{y + 3:.1f}", text_anchor="end")
        )
        step = x_low + share * (x_high - x_low)
        x, _ = place(step, y_low)
        anchor = ("start", "middle", "end")[int(2 * share)]
        drawn.append(tag("text", f"{step:,.0f}", x=f"{x:.1f}", y=height - 6, text_anchor=anchor))
    for i, line in enumerate(series.values()):
        places = [place(*point) for point in _thinned(line)]
        drawn.append(
            tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places), class_=f"c{i}")
        )
        if len(places) < 12:
            drawn += [
                tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.5, class_=f"c{i}")
                for x, y in places
            ]
    chart = tag("svg", drawn, viewBox=f"0 0 {width} {height}", role="img", aria_label=title)
    keys = [tag("span", name, class_=f"key c{i}") for i, name in enumerate(series)]
    legend = tag("div", keys, class_="legend") if len(series) > 1 else ""
    return tag("div", tag("h3", title), chart, legend, class_="chart")


def matrix(
    counts: np.ndarray, totals: np.ndarray, names: Sequence[str], labels: Sequence[str]
) -> Html:
    """Counts (C, C), rows what is and columns what was said, as squares by the row's share.

    Args:
        counts: whole numbers.
        totals: of the rows, (C,); more than their sums where columns are left out.
        names: of the classes, for the words on a square.
        labels: of rows and columns, short.
    """
    size, cell = len(counts), 20
    edge = 22
    drawn: list[Html] = []
    for i, label in enumerate(labels):
        middle = edge + cell * (i + 0.65)
        drawn.append(tag("text", label, x=edge - 4, y=f"{middle:.0f}", text_anchor="end"))
        drawn.append(
            tag("text", label, x=f"{edge + cell * (i + 0.5):.0f}", y=edge - 6, text_anchor="middle")
        )
    for row, column in np.argwhere(counts):
        count, share = int(counts[row, column]), counts[row, column] / totals[row]
        kind = "right" if row == column else "wrong"
        words = f"is {names[row]}, said {names[column]}: {count} of {totals[row]}"
        x, y = edge + cell * column, edge + cell * row
        inner = tag("title", shortened(words))
        # Small shares are mistakes worth seeing: none is paler than a quarter.
        square = tag("rect", x=x, y=y, width=cell - 1, height=cell - 1, class_=kind,
                     fill_opacity=f"{0.25 + 0.75 * share:.2f}")  # fmt: skip
        number = tag("text", str(count), x=x + cell / 2, y=y + 14, text_anchor="middle",
                     class_="hot" if share > 0.5 else None)  # fmt: skip
        drawn.append(tag("g", inner, square, number if size <= 20 and count < 1000 else ""))
    whole = edge + cell * size
    frame = tag("rect", x=edge - 0.5, y=edge - 0.5, width=cell * size, height=cell * size,
                class_="frame")  # fmt: skip
    return tag(
        "svg",
        drawn,
        frame,
        viewBox=f"0 0 {whole + 1} {whole + 1}",
        role="img",
        aria_label="confusion matrix",
        class_="matrix",
        style=f"max-width:{min(34, 2 + 1.6 * size):.0f}rem",
    )


def heat(images: Sequence[Html], texts: Sequence[str], values: np.ndarray) -> Html:
    """Values (n_texts, n_images) as numbers and colours, images on top, texts beside or above."""
    low, high = _range([float(value) for value in values.ravel()])
    cells: list[Html] = [tag("div", class_="corner"), *(tag("div", one) for one in images)]
    for text, row in zip(texts, values, strict=True):
        cells.append(tag("div", shortened(text), class_="caption"))
        for value in row:
            is_number = math.isfinite(value)
            share = (value - low) / (high - low) if is_number else 0.0
            words, kind = (
                f"{value:.2f}" if is_number else "–",
                "cell hot" if share > 0.5 else "cell",
            )
            cells.append(tag("div", words, class_=kind, style=f"--v:{share:.2f}"))
    return tag("div", cells, class_="heat", style=f"--n:{len(images)}")


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest of the finite values, made different."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _tick(value: float, top: float) -> str:
    """A value in a few characters; what is nothing beside the top of the scale is 0."""
    words = f"{value:.3g}" if abs(value) > 1e-4 * abs(top) else "0"
    return words if len(words) < 8 else f"{value:.1e}".replace("e-0", "e-")


def _thinned(line: Points) -> list[tuple[float, float]]:
    """Of a long line MAX_POINTS, evenly, and the last; no infinite ones."""
    finite = [point for point in line if all(map(math.isfinite, point))]
    step = -(-len(finite) // MAX_POINTS) if finite else 1
    return [*finite[::step], *finite[-1:]]
