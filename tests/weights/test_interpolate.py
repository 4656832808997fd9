"""Weights between two others."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, assert_refused
from safetensors.torch import load_file

import leanclip
from leanclip import CLIP, Preprocess, WeightsError
from leanclip.weights import interpolate, read_weights, save_weights

Command = Callable[..., subprocess.CompletedProcess[str]]
RESNET = TINY | {
    "vision_layers": [1, 1, 1, 1],
    "vision_width": 4,
    "vision_patch_size": None,
}


def write(folder: Path, seed: int, mean: float = 0.5, **arch: Any) -> CLIP:
    torch.manual_seed(seed)
    folder.mkdir()
    model = CLIP(**TINY | arch)
    with torch.no_grad():
        model.get_parameter("ln_final.bias").fill_(-0.0)
    state = {
        name: torch.tensor(seed) if name.endswith("batches_tracked") else tensor
        for name, tensor in model.state_dict().items()
    }
    save_weights(folder, state, model.config, Preprocess(32, mean=(mean, mean, mean)))
    return model


def test_the_ends_are_the_two_to_the_bit(command: Command, tmp_path: Path) -> None:
    for arch in ({}, RESNET):
        folder = tmp_path / f"vision-{len(arch)}"
        folder.mkdir()
        write(folder / "a", 1, **arch)
        write(folder / "b", 2, **arch)
        for alpha, name in (("0", "a"), ("1", "b")):
            done = command("interpolate", str(folder / "a"), str(folder / "b"),
                           "--alpha", alpha, "--out", str(folder / alpha))  # fmt: skip
            assert done.returncode == 0, done.stderr
            ours, theirs = (load_file(folder / n / "model.safetensors") for n in (alpha, name))
            assert ours.keys() == theirs.keys()
            for key in ours:
                assert ours[key].numpy().tobytes() == theirs[key].numpy().tobytes(), key


def test_between_is_the_formula_and_says_where_it_is_from(command: Command, tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", 1), write(tmp_path / "b", 2)
    done = command("interpolate", "a", "b", "--alpha", "0.25", "--out", "c")
    assert "0.75 * a + 0.25 * b -> c" in done.stdout
    state = leanclip.load(tmp_path / "c").model.state_dict()
    for name, a in first.state_dict().items():
        expected = 0.75 * a + 0.25 * second.state_dict()[name]
        torch.testing.assert_close(state[name], expected)
    facts = json.loads((tmp_path / "c/config.json").read_text())
    assert facts["provenance"] == "0.75 * a + 0.25 * b"
    assert_refused(command("interpolate", "a", "b", "--out", "c"), "c: already exists")


def test_half_precision_is_interpolated_in_float32(command: Command, tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", 1), write(tmp_path / "b", 2)
    torch.save({n: t.half() for n, t in second.state_dict().items()}, tmp_path / "b.pt")
    done = command("interpolate", "a", "b.pt", "--out", "c")
    assert done.returncode == 0, done.stderr
    state = load_file(tmp_path / "c/model.safetensors")
    a, b = first.state_dict()["visual.proj"], second.state_dict()["visual.proj"]
    assert state["visual.proj"].dtype == torch.float32
    assert torch.equal(state["visual.proj"], 0.5 * a + 0.5 * b.half().float())


def test_two_that_do_not_go_together(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "a", 1)
    write(tmp_path / "deep", 2, vision_layers=3, activation="gelu")
    assert_refused(
        command("interpolate", "a", "deep", "--out", "c"),
        "deep: not of the architecture of a", "activation: quick_gelu there, gelu here",
        "vision_layers: 2 there, 3 here",
    )  # fmt: skip
    assert not (tmp_path / "c").exists()
    for name in ("a", "deep"):
        torch.save(load_file(tmp_path / name / "model.safetensors"), tmp_path / f"{name}.pt")
    assert_refused(command("interpolate", "a.pt", "deep.pt", "--out", "c"), "name it with --arch")
    with pytest.raises(WeightsError, match="unexpected keys"):
        interpolate(read_weights(tmp_path / "a"), read_weights(tmp_path / "deep.pt"), 0.5)
    assert command("interpolate", "a", "a", "--alpha", "1.5", "--out", "c").returncode == 2


def test_another_preprocessing_is_said(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "a", 1)
    write(tmp_path / "b", 2, mean=0.25)
    done = command("interpolate", "a", "b", "--alpha", "0.6", "--out", "c")
    assert "that of b is used" in done.stderr
    assert leanclip.load(tmp_path / "c").preprocess.mean == (0.25,) * 3
