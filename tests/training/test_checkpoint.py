"""A run's checkpoints: whole or not there, verified, the newest kept, and free of pickles."""

from pathlib import Path

import pytest
import torch
from conftest import TINY

from leanclip import CLIP, Preprocess, WeightsError
from leanclip.config.training import OptimizerConfig
from leanclip.training import checkpoint
from leanclip.training.optimizer import build_optimizer
from leanclip.weights import load_into, read_weights


def trained() -> tuple[CLIP, torch.optim.Optimizer]:
    model = CLIP(**TINY)
    optimizer = build_optimizer(model, OptimizerConfig())
    for _ in range(2):
        model.encode_image(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def write(root: Path, step: int, *, keep: int = 2) -> tuple[Path, CLIP, torch.optim.Optimizer]:
    model, optimizer = trained()
    progress = checkpoint.Progress(step, 1, 40, 64, [48, 16], 1.5)
    folder = checkpoint.save(root, progress, model, optimizer, Preprocess(32), keep=keep)
    return folder, model, optimizer


def names_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("step-*"))


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    folder, model, optimizer = write(tmp_path, 7)
    drawn = torch.randn(3)
    other = CLIP(**TINY)
    other_optimizer = build_optimizer(other, OptimizerConfig())
    progress = checkpoint.restore(folder, other, other_optimizer)
    assert progress == checkpoint.Progress(7, 1, 40, 64, [48, 16], 1.5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[ours].items():
            assert torch.equal(other_optimizer.state[theirs][key], value)
    assert torch.equal(torch.randn(3), drawn)  # the random state too


def test_nothing_in_it_is_a_pickle(tmp_path: Path) -> None:
    folder, *_ = write(tmp_path, 7)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "state.json",
        "training.safetensors",
    ]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 20, 100):
        write(tmp_path, step)
    assert names_in(tmp_path) == ["step-00000020", "step-00000100"]


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder, *_ = write(tmp_path, step, keep=3)
    (folder / "model.safetensors").write_bytes(b"")
    write(tmp_path, 2)  # the run went on from 1
    assert names_in(tmp_path) == ["step-00000001", "step-00000002"]
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-00000002", [])


@pytest.mark.parametrize(
    "name", ["model.safetensors", "training.safetensors", "state.json", "config.json"]
)
def test_a_flipped_byte_is_found_and_the_one_before_is_taken(tmp_path: Path, name: str) -> None:
    write(tmp_path, 1)
    folder, *_ = write(tmp_path, 2)
    assert checkpoint.newest(tmp_path) == (folder, [])
    damaged = bytearray((folder / name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / name).write_bytes(damaged)
    found, skipped = checkpoint.newest(tmp_path)
    assert found == tmp_path / "step-00000001"
    assert skipped == [f"{folder / name}: differs from its checksum"]


def test_what_is_cut_short_or_unfinished_is_not_taken(tmp_path: Path) -> None:
    folder, *_ = write(tmp_path, 3)
    (folder / "model.safetensors").write_bytes(b"x")
    (tmp_path / ".step-00000009.tmp").mkdir()
    found, skipped = checkpoint.newest(tmp_path)
    assert found is None
    assert "model.safetensors: is missing or cut short" in skipped[0]
    (folder / "manifest.json").unlink()
    assert checkpoint.newest(tmp_path)[1] == [f"{folder}: has no manifest"]
    write(tmp_path, 10)
    assert not list(tmp_path.glob(".step-*"))  # what a killed run left is swept


def test_no_checkpoints(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nowhere") == (None, [])


def test_a_checkpoint_is_a_folder_of_weights(tmp_path: Path) -> None:
    folder, model, _ = write(tmp_path / "checkpoints", 4)
    for source in (folder, tmp_path):  # itself, and the run that it is of
        weights = read_weights(source)
        assert weights.model == model.config
        assert weights.preprocess == Preprocess(32)
        other = CLIP(**TINY)
        load_into(other, weights)
        assert torch.equal(
            other.get_parameter("text_projection"), model.get_parameter("text_projection")
        )
    bare = read_weights(folder / "model.safetensors")
    assert bare.model is None
    load_into(CLIP(**TINY), bare)


def test_weights_of_another_shape_name_the_keys(tmp_path: Path) -> None:
    folder, *_ = write(tmp_path, 4)
    wide = CLIP(**TINY | {"embed_dim": 24})
    before = wide.state_dict()["visual.proj"].clone()
    with pytest.raises(
        WeightsError, match=r"shapes differ: text_projection \(32, 16\) there, \(32, 24\) in the"
    ):
        load_into(wide, read_weights(folder))
    assert torch.equal(wide.state_dict()["visual.proj"], before)  # nothing is half loaded
    with pytest.raises(WeightsError, match=r"missing keys: .*resblocks\.2.* and \d+ more"):
        load_into(CLIP(**TINY | {"vision_layers": 3}), read_weights(folder))
    with pytest.raises(WeightsError, match=r"unexpected keys: .*resblocks\.1"):
        load_into(CLIP(**TINY | {"vision_layers": 1}), read_weights(folder))


def test_another_activation_is_an_error(tmp_path: Path) -> None:
    folder, *_ = write(tmp_path, 4)
    with pytest.raises(WeightsError, match=r"activation quick_gelu.*set model\.activation="):
        load_into(CLIP(**TINY, activation="gelu"), read_weights(folder))


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        read_weights(tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match=r"no config\.json, .* or checkpoints in it"):
        read_weights(tmp_path)
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(WeightsError, match=r"w\.safetensors: not a known kind of weights file"):
        read_weights(tmp_path / "w.safetensors")
    folder, *_ = write(tmp_path / "c", 4)
    (folder / "config.json").write_text('{"format": "leanclip"}')
    with pytest.raises(WeightsError, match=r"config\.json: cannot be read"):
        read_weights(folder)
