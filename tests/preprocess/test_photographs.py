"""Real photographs with the descriptions of CLIP's demonstration, through the command line."""

from pathlib import Path

from conftest import TINY, Command, make_config, report_of
from photographs import write_photographs
from PIL import Image


def test_eight_photographs_are_told_apart_both_ways(command: Command, workplace: Path) -> None:
    for path in write_photographs(workplace / "photographs").glob("*.png"):
        with Image.open(path) as photograph:  # decoding the large ones takes most of the time
            photograph.reduce(max(1, min(photograph.size) // 100)).save(path)
    make_config(
        workplace / "config.yaml",
        model=TINY | {"image_resolution": 48, "vision_patch_size": 16},
        data={"root": "photographs", "crop_scale": [0.5, 1.0]},
        train={"epochs": 160, "batch_size": 8, "log_every": 10},
        optimizer={"learning_rate": 2e-3, "warmup_fraction": 0.1},
        checkpoint={"every_epochs": None},
        evaluate={"pictures": True},
    )
    done = command("train", "-c", "config.yaml")
    assert done.returncode == 0, done.stderr
    metrics = report_of(workplace / "runs/config")["metrics"]
    assert metrics["image_to_text_R@1"] == 1.0
    assert metrics["text_to_image_R@1"] == 1.0
    assert "(8 images, 8 captions): R@1 100.0% image→text" in done.stdout
    assert (workplace / "runs/config/similarity.png").is_file()
