"""The `shapes` format: the built-in data set of drawn figures, alone and in pairs.

    seed -> scenes -> Pillow -> root/train, root/val (images with .txt captions: the pairs format)
                                root/unseen/<class>  (images by class: the folder format)

Settings: split, templates, class_names.
A class is a texture, a colour and a figure: "striped red circle". Of the 192 classes, the 24 in
UNSEEN never occur in train or val and are the zero-shot test. They differ from each other, and from
the seen ones, in as little as one word.
"""

import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from leanclip.config.data import DataConfig
from leanclip.data.dataset import Dataset
from leanclip.data.formats import folder, pairs
from leanclip.data.prompts import PROMPTS
from leanclip.errors import DataError

COLORS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (240, 215, 30),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "purple": (140, 50, 170),
    "brown": (125, 75, 35),
    "black": (25, 25, 25),
}
TEXTURES = ("plain", "striped", "dotted", "hollow")
FIGURES = ("circle", "square", "triangle", "star", "heart", "cross")
SIZES = {"small": (0.25, 0.3), "large": (0.38, 0.43)}  # range of the radius / side
RELATIONS = {  # phrase -> (x, y) of the first figure's centre relative to the second's
    "above": (0, -1),
    "below": (0, 1),
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
}

CLASSES = tuple(itertools.product(TEXTURES, COLORS, FIGURES))
UNSEEN = frozenset(random.Random(2021).sample(CLASSES, 24))

SIDE = 72  # of a drawing, in pixels
_FINE = 3  # antialiasing: drawn this many times larger, then reduced
_COUNTS = {"train": 10_000, "val": 100, "unseen": 24 * 25}


@dataclass(frozen=True)
class Figure:
    """One figure of a scene, in units of the drawing's side."""

    texture: str
    color: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    angle: float  # radians


@dataclass(frozen=True)
class Scene:
    """One drawing: a figure, or two with the relation of the first to the second."""

    figures: tuple[Figure, ...]
    relation: str | None
    background: tuple[int, int, int]


def open_dataset(config: DataConfig) -> Dataset:
    """The drawings of `config.split`: "train" and "val" as pairs, "unseen" as class data.

    Raises:
        DataError: nothing was drawn at `config.root`.
    """
    if not (Path(config.root) / "shapes.json").is_file():
        raise DataError(
            f"data.root: no drawings in {config.root} "
            f"(draw them with: leanclip data shapes {config.root})"
        )
    if config.split == "unseen":
        own = PROMPTS["shapes"].templates
        templates = own if config.templates is None else config.templates
        unseen = folder.open_dataset(config.model_copy(update={"templates": templates}))
        unseen.about = "unseen"
        return unseen
    return pairs.open_dataset(config.model_copy(update={"split": config.split or "train"}))


def draw_dataset(root: Path, *, seed: int = 0) -> Iterator[tuple[int, int]]:
    """Draw the data set into `root`, yielding (drawn, total) as it goes.

    A complete data set of the same seed is not drawn again; `shapes.json`, written last, marks it.
    Drawings are the same for the same seed and version of Pillow.

    Raises:
        DataError: `root` has other content.
    """
    mark = root / "shapes.json"
    facts = {"seed": seed, "side": SIDE, **_COUNTS}
    total = sum(_COUNTS.values())
    if mark.is_file():
        if json.loads(mark.read_text()) != facts:
            raise DataError(f"{root}: holds other drawings; remove it or choose another folder")
        yield total, total
        return
    if root.exists() and any(path.name not in _COUNTS for path in root.iterdir()):
        raise DataError(f"{root}: is not empty; choose another folder")
    done = 0
    for split in _COUNTS:
        rng = random.Random(f"{seed} {split}")
        scenes = _unseen_scenes(rng) if split == "unseen" else _seen_scenes(rng, split)
        for path, scene in scenes:
            path = root / split / path
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(scene).save(path, compress_level=1)
            if split != "unseen":
                lines = captions(scene, rng) if split == "train" else [full_caption(scene, rng)]
                path.with_suffix(".txt").write_text("\n".join(lines) + "\n")
            done += 1
            yield done, total
    mark.write_text(json.dumps(facts))


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB image of SIDE x SIDE pixels."""
    side = SIDE * _FINE
    image = Image.new("RGB", (side, side), scene.background)
    for figure in scene.figures:
        ink = Image.new("RGB", image.size, COLORS[figure.color])
        image.paste(ink, mask=_mask(figure, side))
    return image.reduce(_FINE)


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """Four captions of a scene, which may leave attributes out."""
    return [_caption(scene, rng, full=False) for _ in range(4)]


def full_caption(scene: Scene, rng: random.Random) -> str:
    """A caption with all attributes: "a large striped red circle above a small blue star"."""
    return _caption(scene, rng, full=True)


def class_name(texture: str, color: str, shape: str) -> str:
    """The class as words: "striped red circle"."""
    return f"{texture} {color} {shape}"


def _seen_scenes(rng: random.Random, split: str) -> Iterator[tuple[Path, Scene]]:
    """Scenes without unseen classes; a fifth of train and all of val have two figures.

    No two scenes of val have the same pair of classes, so that no caption fits two drawings.
    """
    seen = [c for c in CLASSES if c not in UNSEEN]
    pairs = rng.sample(list(itertools.combinations(seen, 2)), _COUNTS["val"])
    for i in range(_COUNTS[split]):
        if split == "val":
            classes = rng.sample(pairs[i], 2)
        else:
            classes = rng.sample(seen, 2 if rng.random() < 0.2 else 1)
        yield Path(f"{i // 1000:02d}/{i:05d}.png"), _scene(classes, rng)


def _unseen_scenes(rng: random.Random) -> Iterator[tuple[Path, Scene]]:
    """Scenes of one figure of an unseen class, equally many per class."""
    classes = sorted(UNSEEN)
    for i in range(_COUNTS["unseen"]):
        chosen = classes[i % len(classes)]
        name = class_name(*chosen).replace(" ", "_")
        yield Path(f"{name}/{i // len(classes):03d}.png"), _scene([chosen], rng)


def _scene(classes: Sequence[tuple[str, str, str]], rng: random.Random) -> Scene:
    relation = rng.choice(list(RELATIONS)) if len(classes) == 2 else None
    dx, dy = RELATIONS[relation] if relation else (0, 0)
    shrink = 0.55 if relation else 1.0  # two figures share the drawing
    figures = []
    for chosen, side in zip(classes, (0.25, -0.25), strict=False):
        size = rng.choice(list(SIZES))
        radius = shrink * rng.uniform(*SIZES[size])
        free = min(0.1, 0.48 - radius - (0.25 if relation else 0))  # how far a centre may move
        x, y = (0.5 + side * d + rng.uniform(-free, free) for d in (dx, dy))
        angle = math.radians(rng.uniform(-10, 10))
        figures.append(Figure(*chosen, size, x, y, radius, angle))
    light = rng.randint(215, 243)
    red, green, blue = (light + rng.randint(-12, 12) for _ in range(3))
    return Scene(tuple(figures), relation, (red, green, blue))


def _caption(scene: Scene, rng: random.Random, *, full: bool) -> str:
    phrases = [_phrase(figure, rng, full=full) for figure in scene.figures]
    start = rng.choice(("", "", "a picture of ", "a drawing of ", "there is "))
    if scene.relation is None:
        return start + phrases[0]
    first, second = phrases
    relation = scene.relation
    if rng.random() < 0.5:  # the same scene, described from the second figure
        dx, dy = RELATIONS[relation]
        relation = next(name for name, d in RELATIONS.items() if d == (-dx, -dy))
        first, second = second, first
    return f"{start}{first} {relation} {second}"


def _phrase(figure: Figure, rng: random.Random, *, full: bool) -> str:
    """The figure in a caption: "a large striped red circle", "a red circle"."""
    words = {"size": figure.size, "texture": figure.texture, "color": figure.color}
    for attribute, chance in (("size", 0.5), ("texture", 0.4), ("color", 0.4)):
        if not full and rng.random() < chance:
            del words[attribute]
    words = [*words.values(), figure.shape]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _mask(figure: Figure, side: int) -> Image.Image:
    """The figure's mask: its outline, filled with its texture."""
    mask = Image.new("L", (side, side), 0)
    _fill_outline(ImageDraw.Draw(mask), figure, side)
    if figure.texture == "hollow":
        blurred = mask.filter(ImageFilter.BoxBlur(0.035 * side))
        return ImageChops.subtract(mask, blurred.point([0] * 251 + [255] * 5))
    if figure.texture in ("striped", "dotted"):
        return ImageChops.multiply(mask, _pattern(figure, side))
    return mask


def _pattern(figure: Figure, side: int) -> Image.Image:
    """Stripes or dots on a paler ground, so that the outline stays visible."""
    pattern = Image.new("L", (side, side), 70)
    pen = ImageDraw.Draw(pattern)
    step = side // 11
    if figure.texture == "striped":
        lean = side * math.sin(figure.angle)
        for left in range(-side, 2 * side, step):
            pen.line((left, 0, left + lean, side), 255, step // 2)
        return pattern
    radius = 0.3 * step
    for row, y in enumerate(range(0, side, step)):
        for x in range(row % 2 * step // 2, side, step):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), 255)
    return pattern


def _fill_outline(pen: ImageDraw.ImageDraw, figure: Figure, side: int) -> None:
    x, y, r = figure.x * side, figure.y * side, figure.radius * side
    if figure.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), 255)
    else:
        c, s = r * math.cos(figure.angle), r * math.sin(figure.angle)
        corners = _CORNERS[figure.shape]
        pen.polygon([(x + c * u - s * v, y + s * u + c * v) for u, v in corners], 255)


def _corners(radii: Sequence[float], start: float) -> tuple[tuple[float, float], ...]:
    """Corners at equal angles from `start` (in turns, from twelve o'clock), at given radii."""
    turns = [2 * math.pi * (start + i / len(radii)) for i in range(len(radii))]
    return tuple((r * math.sin(t), -r * math.cos(t)) for r, t in zip(radii, turns, strict=True))


_HEART = [(math.sin(t) ** 3, t) for t in (2 * math.pi * i / 40 for i in range(40))]
_ARM = 0.34  # half the width of the cross's arms
_CORNERS = {  # around (0, 0), within the circle of radius 1
    "square": _corners([1.0] * 4, 1 / 8),
    "triangle": _corners([1.0] * 3, 0),
    "star": _corners([1.0, 0.42] * 5, 0),
    "cross": tuple(
        (x, y)
        for sx, sy in ((1, 1), (1, -1), (-1, -1), (-1, 1))
        for x, y in [(_ARM * sx, sy), (_ARM * sx, _ARM * sy), (sx, _ARM * sy)][:: sx * sy]
    ),
    "heart": tuple(
        (x, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17)
        for x, t in _HEART
    ),
}
