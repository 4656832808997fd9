"""Self-contained HTML pages: no scripts, nothing from the network, images inside.

Templates escape all values but those of `svg`, which is markup.
"""

import base64
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from leanclip.io.files import write_text
from leanclip.preprocess.decoding import Source
from leanclip.preprocess.images import center_square, encode_jpeg, image_or_none
from leanclip.report.plots import COLORS, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THUMBNAIL = 112  # pixels: twice the size on the page, for high-density screens


class Tile(NamedTuple):
    """A thumbnail and its caption."""

    image: str | None  # a data: URL; None: the image cannot be read
    alt: str
    title: str = ""
    caption: str = ""
    kind: str = ""  # "right", "wrong" or neither


def write_page(path: Path, template: str, **values: object) -> None:
    """Render a template into a file, atomically."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters |= {"shorten": shorten, "percent": _percent}
    write_text(path, environment.get_template(template).render(values))


def shorten(text: str, length: int = 200) -> str:
    """A text cut to a length."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def tile(source: Source, alt: str, *, title: str = "", caption: str = "", kind: str = "") -> Tile:
    """A tile of an image, cut to a square; `alt` is its text alternative."""
    image = image_or_none(source)
    if image is None:
        return Tile(None, alt, title, caption, kind)
    image = image.crop(center_square(image))
    if image.width > THUMBNAIL:
        image = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    data = base64.b64encode(encode_jpeg(image, 85)).decode()
    return Tile(f"data:image/jpeg;base64,{data}", alt, title, caption, kind)


def svg(figure: "Figure", name: str) -> Markup:
    """A figure as SVG for a page, whose stylesheet sets the colours in plots.COLORS.

    `name` is unique on the page: the ids in the SVG derive from it.
    """
    from matplotlib import rc_context

    file = io.StringIO()
    # Text is not drawn as paths: the browser's fonts may have more glyphs.
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.sans-serif": ["DejaVu Sans"],
    }
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    # In HTML, SVG has no namespaces: ElementTree would write ns0:svg and ns1:href.
    root = ElementTree.fromstring(file.getvalue())
    for element in root.iter():
        element.tag = element.tag.removeprefix("{http://www.w3.org/2000/svg}")
        if (target := element.attrib.pop("{http://www.w3.org/1999/xlink}href", None)) is not None:
            element.set("href", target)
        if element.tag == "g":
            element.attrib.pop("id", None)  # figure_1, axes_1: not unique on the page
        if "style" in element.attrib:
            for color, variable in COLORS.items():
                style = element.attrib["style"].replace(color, f"var(--{variable})")
                element.attrib["style"] = style
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _finalize(value: object) -> object:
    """Replace characters that cannot be displayed."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    return value


def _percent(fraction: float) -> str:
    """A fraction as a CSS length from 0% to 100%."""
    return f"{100 * min(max(fraction, 0.0), 1.0):.2f}%"
