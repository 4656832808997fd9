"""Real photographs with the descriptions of CLIP's demonstration, through the command line."""

import json
from pathlib import Path

from conftest import TINY, make_config, run_cli
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
        if name == "motorcycle_right":
            pixels = photographs.stereo_motorcycle()[1]
        else:
            pixels = getattr(photographs, name)()
        if pixels.dtype == bool:  # the horse is a mask
            pixels = (pixels * 255).astype("uint8")
        Image.fromarray(pixels).save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(f"{description}\n")
    return root


def test_eight_photographs_are_told_apart_both_ways(tmp_path: Path) -> None:
    write_photographs(tmp_path / "data")
    make_config(
        tmp_path / "config.yaml",
        model=TINY | {"image_resolution": 48, "vision_patch_size": 16},
        data={"crop_scale": [0.5, 1.0]},
        train={"epochs": 160, "batch_size": 8, "log_every": 10},
        optimizer={"learning_rate": 2e-3, "warmup": 0.1},
        checkpoint={"every_epochs": None},
        evaluate={"pictures": True},
    )
    done = run_cli("train", "-c", "config.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "runs/config/report.json").read_text())["metrics"]
    assert metrics["image_to_text_R@1"] == 1.0
    assert metrics["text_to_image_R@1"] == 1.0
    assert "for 100.0% of 8 images" in done.stdout
    assert (tmp_path / "runs/config/similarity.png").is_file()
