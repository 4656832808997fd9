"""Real class data: scikit-learn's handwritten digits, trained from scratch, told by words."""

import json
from pathlib import Path

import pytest
from conftest import TINY, make_config, run_cli
from PIL import Image
from sklearn.datasets import load_digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_digits(root: Path) -> Path:
    """A `folder` data set: 1,400 digits in train, the other 397 in test."""
    images, labels = load_digits(return_X_y=True)
    for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / ("train" if i < 1400 else "test") / NAMES[label]
        folder.mkdir(parents=True, exist_ok=True)
        # 8 x 8 pixels in 0..16
        Image.fromarray((pixels.reshape(8, 8) * 15.9).astype("uint8")).save(folder / f"{i:04d}.png")
    return root


@pytest.mark.slow
def test_digits_are_named_zero_shot_after_training_from_scratch(tmp_path: Path) -> None:
    write_digits(tmp_path / "data")
    make_config(
        tmp_path / "config.yaml",
        model=TINY | {"vision_width": 64, "vision_layers": 3},
        data={
            "format": "folder",
            "split": "train",
            "templates": ["a handwritten {}", "the digit {}", "{}"],
            "crop_scale": [0.7, 1.0],
        },
        train={"epochs": 50, "batch_size": 32, "log_every": 100},
        optimizer={"learning_rate": 1e-3, "warmup_fraction": 0.1},
        checkpoint={"every_epochs": None},
        evaluate={
            "retrieval": None,
            "zero_shot": {"split": "test", "templates": ["a handwritten {}"]},
        },
    )
    done = run_cli("train", "-c", "config.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "runs/config/report.json").read_text())["metrics"]
    print(metrics)
    assert metrics["zeroshot_top1"] >= 0.95
