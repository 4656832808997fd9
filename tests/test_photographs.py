"""Real photographs with the descriptions of CLIP's demonstration, through the command line."""

import json
from pathlib import Path

from conftest import TINY, make_config, run_cli
from photographs import write_photographs


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
