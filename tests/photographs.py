"""The eight photographs of "Interacting with CLIP", from scikit-image, and their descriptions."""

from pathlib import Path

from PIL import Image
from skimage import data as photographs

# The eight pictures and descriptions of OpenAI's and PASSL's "Interacting with CLIP".
DESCRIPTIONS = {
    "page": "a page of text about segmentation",
    "chelsea": "a facial photo of a tabby cat",
    "astronaut": "a portrait of an astronaut with the American flag",
    "rocket": "a rocket standing on a launchpad",
    "motorcycle_right": "a red motorcycle standing in a garage",
    "camera": "a person looking at a camera on a tripod",
    "horse": "a black-and-white silhouette of a horse",
    "coffee": "a cup of coffee on a saucer",
}


def write_photographs(root: Path) -> Path:
    """A `pairs` folder of scikit-image's photographs."""
    root.mkdir()
    for name, description in DESCRIPTIONS.items():
        photograph(name).save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(f"{description}\n")
    return root


def photograph(name: str) -> Image.Image:
    """One of them."""
    if name == "motorcycle_right":
        pixels = photographs.stereo_motorcycle()[1]
    else:
        pixels = getattr(photographs, name)()
    if pixels.dtype == bool:  # the horse is a mask
        pixels = (pixels * 255).astype("uint8")
    return Image.fromarray(pixels)
