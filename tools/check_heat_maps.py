"""Check the heat maps of a model trained on the built-in drawings, on new drawings.

python tools/check_heat_maps.py runs/quickstart

Prints three numbers, and fails if one is below its minimum:

- drawings of one shape: the mean of `gradient_map` for its label on the shape, divided by that on
  the background (2.0);
- drawings of two shapes: the fraction of the map on the shape that the label names (two thirds);
- how often a shape's own label puts a larger fraction on it than the other label does (0.9).

Shapes: N drawings, S side of a drawing.
"""

import math
import random
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

import leanclip
from leanclip.data.formats.shapes import CLASSES, SIDE, UNSEEN, Figure, Scene, class_name, draw
from leanclip.inference.attention_maps import gradient_map, rollout

DRAWINGS = 200
MIN_RATIO, MIN_SHARE, MIN_ORDERED = 2.0, 2 / 3, 0.9


def main(source: str, seed: int = 0) -> None:
    """Measure, print and compare with the minima."""
    clip = leanclip.load(source, device="cpu")
    rng = random.Random(f"heat maps {seed}")
    classes = sorted(UNSEEN)
    single = [_scene([classes[i % len(classes)]], rng) for i in range(DRAWINGS)]
    double = [_scene(rng.sample(CLASSES, 2), rng) for _ in range(DRAWINGS)]
    on, off = _on_and_off(_maps(clip, single, 0), single, 0)
    ratio = float(on.mean() / off.mean())
    on, off = _on_and_off(_maps(clip, single, None), single, 0)
    print(f"one shape: {ratio:.2f} times the background (rollout {on.mean() / off.mean():.2f})")
    shares = np.array([_shares(_maps(clip, double, named), double) for named in (0, 1)])  # (2, N)
    share = float((shares[0].mean() + 1 - shares[1].mean()) / 2)
    ordered = float((shares[0] > shares[1]).mean())
    print(f"two shapes: {share:.1%} on the named one; ordered by label in {ordered:.1%}")
    if ratio < MIN_RATIO or share < MIN_SHARE or ordered < MIN_ORDERED:
        sys.exit(f"below {MIN_RATIO}, {MIN_SHARE:.1%} or {MIN_ORDERED:.1%}")


def _scene(classes: Sequence[tuple[str, str, str]], rng: random.Random) -> Scene:
    """One shape near the centre, or two beside or above each other."""
    dx, dy = rng.choice([(0.25, 0.0), (0.0, 0.25)]) if len(classes) == 2 else (0.0, 0.0)
    figures = []
    for chosen, sign in zip(classes, (1, -1), strict=False):
        radius = rng.uniform(0.25, 0.43) * (0.55 if len(classes) == 2 else 1)
        x, y = (0.5 + sign * d + rng.uniform(-0.03, 0.03) for d in (dx, dy))
        angle = math.radians(rng.uniform(-10, 10))
        figures.append(Figure(*chosen, "large", x, y, radius, angle))
    light = rng.randint(210, 245)
    return Scene(tuple(figures), None, (light, light, light))


def _maps(clip: leanclip.InferenceModel, scenes: Sequence[Scene], named: int | None) -> np.ndarray:
    """Maps (N, S, S) for the labels of each scene's figure `named`; None: rollout."""
    pixels = torch.stack([clip.preprocess(draw(scene)) for scene in scenes])
    if named is None:
        found = rollout(clip.model, pixels)
    else:
        figures = [scene.figures[named] for scene in scenes]
        texts = ["a " + class_name(one.texture, one.color, one.shape) for one in figures]
        found = gradient_map(clip.model, pixels, clip.embed_texts(texts, as_torch=True))
    return F.interpolate(found[:, None], (SIDE, SIDE), mode="bilinear")[:, 0].numpy()


def _shares(maps: np.ndarray, scenes: Sequence[Scene]) -> np.ndarray:
    """The mean on the first figure over the sum of both figures' means, (N,)."""
    first, second = (_on_and_off(maps, scenes, figure)[0] for figure in (0, 1))
    return first / (first + second).clip(1e-12)


def _on_and_off(maps: np.ndarray, scenes: Sequence[Scene], figure: int) -> np.ndarray:
    """Each map's mean within a figure's outline, and outside it: (2, N)."""
    means = []
    for heat, scene in zip(maps, scenes, strict=True):
        solid = replace(scene.figures[figure], texture="plain", color="black")
        mask = np.asarray(draw(Scene((solid,), None, (255, 255, 255))))[..., 0] < 128
        means.append((heat[mask].mean(), heat[~mask].mean()))
    return np.array(means).T


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(sys.argv[1], *map(int, sys.argv[2:]))
