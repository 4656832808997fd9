"""Alphas between two models: which are measured, and which is taken."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Command, assert_refused, noise_image

from leanclip import CLIP, ConfigError, Preprocess
from leanclip.evaluation.sweep import Point, choose, parse_alphas
from leanclip.preprocess.decoding import open_image
from leanclip.report.plots import pareto_front
from leanclip.report.text import sweep_rule
from leanclip.weights import save_weights


def make_model(folder: Path, seed: int, mean: float = 0.5, **arch: Any) -> CLIP:
    torch.manual_seed(seed)
    model = CLIP(**TINY | arch).eval()
    folder.mkdir(parents=True)
    preprocess = Preprocess(model.config.image_resolution, mean=(mean, mean, mean))
    save_weights(folder, model.state_dict(), model.config, preprocess)
    return model


def make_classes(root: Path, count: int = 8) -> None:
    for label, name in enumerate(("ant", "bee", "cow")):
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise_image(100 * label + i).save(root / name / f"{i}.png")


def test_alphas_are_read_as_they_are_meant() -> None:
    tenths = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    assert parse_alphas("0,0.1,...,1") == tenths
    assert parse_alphas("0.25, 0.5") == [0, 0.25, 0.5, 1]
    assert parse_alphas("0,0.3,...,1") == [0, 0.3, 0.6, 0.9, 1]
    assert parse_alphas("0.1,0.2,...,0.4,0.6,0.7,...,0.9") == [0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7,
                                                             0.8, 0.9, 1]  # fmt: skip
    for words in ("0,x", "0,2", "...,1", "0.5,...,1", "0,0.1,...", "0,0.1,...,...", "nan", ""):
        with pytest.raises(ConfigError, match="--sweep"):
            parse_alphas(words)


def points(*figures: tuple[float, float, float]) -> list[Point]:
    return [Point(alpha, {"top": task}, {"top": retention}) for alpha, task, retention in figures]


def test_the_rules_by_hand() -> None:
    some = points(
        (0, 0.5, 0.8), (0.3, 0.7, 0.79), (0.6, 0.8, 0.72), (0.8, 0.8, 0.72), (1, 0.9, 0.5)
    )
    assert choose(some, "top", "top", None).chosen == 0.6  # 1.52 of 1.30, 1.49, 1.52, 1.52, 1.40
    assert choose(some, "top", "top", 0.01).chosen == 0.3
    assert choose(some, "top", "top", 0.0).chosen == 0
    assert choose(some, "top", "top", 0.08).chosen == 0.6
    assert choose(some, "top", "top", 1.0).chosen == 1
    assert "at least 79.0%, 1 points below" in sweep_rule(choose(some, "top", "top", 0.01))


def test_the_front_by_hand() -> None:
    assert pareto_front([(1, 5), (2, 4), (2, 3), (3, 4), (0, 5), (3, 4)]) == [0, 3, 5]


@pytest.mark.parametrize("mean", [0.5, pytest.param(0.3, marks=pytest.mark.slow)])
def test_a_sweep_measures_what_eval_does(mean: float, command: Command, workplace: Path) -> None:
    make_model(workplace / "a", 1)
    make_model(workplace / "b", 2, mean=mean)
    make_classes(workplace / "c")
    words = ("interpolate", "a", "b", "--sweep", "0.5", "--data", "folder:c",
             "--retention", "pairs:data", "--out", "best")  # fmt: skip
    done = command(*words, "--max-drop", "0.05")
    assert done.returncode == 0, done.stderr
    found = json.loads((workplace / "best/sweep.json").read_text())
    assert [point["alpha"] for point in found["points"]] == [0, 0.5, 1]
    for i, point in enumerate(found["points"]):
        mixture = f"mix-{i}"
        command("interpolate", "a", "b", "--alpha", str(point["alpha"]), "--out", mixture)
        for kind, data in (("task", "folder:c"), ("retention", "pairs:data")):
            command("eval", "--model", mixture, "--data", data, "--out", "out")
            expected = json.loads((workplace / "out/report.json").read_text())["metrics"]
            assert point[kind] == pytest.approx(expected, abs=1e-5), point["alpha"]
        if point["alpha"] == found["chosen"]:
            same = (workplace / mixture / "model.safetensors").read_bytes()
            assert (workplace / "best/model.safetensors").read_bytes() == same
    assert f"chosen: {found['chosen']:g}, the best zeroshot_top1" in done.stdout
    assert min(open_image(workplace / "best/pareto.png").size) > 300
    assert_refused(command(*words), "best: already exists")


def test_options_that_do_not_go_together(command: Command, workplace: Path) -> None:
    make_model(workplace / "a", 1)
    words = ("interpolate", "a", "a", "--out", "b")
    assert_refused(command(*words, "--data", "pairs:data"), "--data: needs --sweep")
    assert_refused(command(*words, "--sweep", "0,1"), "--data: missing; give FORMAT:ROOT")
    only = ("--sweep", "0,1", "--data", "pairs:data")
    assert_refused(command(*words, *only), "--sweep: needs --data and --retention")
    both = ("--data", "pairs:data", "--retention", "pairs:nope")
    assert_refused(command(*words, "--sweep", "0,1", *both), "no such folder: nope")
    assert_refused(
        command(*words, "--sweep", "0,1", "--alpha", "0.5", *both), "--alpha: cannot be combined"
    )
