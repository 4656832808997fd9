"""Locked towers run once: the same losses, from features in the run's folder."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, Command, make_config, make_pairs, noise_image, ranks_of, weights_hash

from leanclip.config.schema import load_config
from leanclip.data import open_dataset
from leanclip.io.files import read_metrics
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess
from leanclip.training import feature_cache


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    monkeypatch.setattr(feature_cache, "BLOCK", 5)
    monkeypatch.setattr(feature_cache, "BLOCKS_PER_SHARD", 1)
    (workplace / "data" / "003.png").write_bytes(b"no image")
    torch.manual_seed(1)
    torch.save(CLIP(**TINY).state_dict(), workplace / "start.pt")


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


def settings(workplace: Path, tower: str, **sections: object) -> Path:
    values: dict[str, object] = {
        "data": {"augment": False, "max_bad_fraction": 0.2},
        "finetune": {f"lock_{tower}": "all"},
        "train": {"epochs": 3},
    }
    return make_config(workplace / "locked.yaml", **(values | sections))


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("more", ["train.micro_batches=1", "train.micro_batches=2"])
def test_the_losses_are_those_without_the_features(
    workplace: Path, command: Command, tower: str, more: str
) -> None:
    config = str(settings(workplace, tower))
    for run, is_used in (("with", "true"), ("without", "false")):
        words = ("-o", f"finetune.cache_features={is_used}", "-o", more)
        done = command("train", "-c", config, "--load", "start.pt", "--output-dir", run, *words)
        assert done.returncode == 0, done.stderr
    assert losses(Path("with")) == pytest.approx(losses(Path("without")), rel=1e-5)
    assert (Path("with") / "features" / tower / "00002.npy").is_file()
    assert not (Path("without") / "features").exists()
    skipped = [(Path(run) / "skipped.jsonl").read_text() for run in ("with", "without")]
    assert skipped[0] == skipped[1]
    assert "003.png" in skipped[0]


def test_a_tower_that_sees_something_else_each_time_is_not_kept(
    workplace: Path, command: Command
) -> None:
    config = str(settings(workplace, "image", data={"max_bad_fraction": 0.2}))
    done = command("train", "-c", config, "--load", "start.pt", "--output-dir", "run")
    assert done.returncode == 0, done.stderr
    assert not Path("run/features").exists()
    dry = command(
        "train", "-c", config, "--load", "start.pt", "-o", "data.augment=false", "--dry-run"
    )
    assert "the image tower runs once" in dry.stdout


def test_images_are_not_read_again(workplace: Path, command: Command) -> None:
    words = ("train", "-c", str(settings(workplace, "image", evaluate={"retrieval": None})))
    words = (*words, "--load", "start.pt", "--output-dir", "run")
    assert command(*words).returncode == 0
    before = weights_hash(Path("run"))
    for path in Path("run/checkpoints").iterdir():
        path.rename(f"old-{path.name}")
    for i in range(12):
        Path(f"data/{i:03d}.png").write_bytes(b"gone")
    assert command(*words).returncode == 0
    assert weights_hash(Path("run")) == before


def test_class_data_has_every_prompt(workplace: Path, command: Command) -> None:
    for i in range(12):
        path = workplace / "classes" / f"c{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(i).save(path)
    data = {"format": "folder", "root": "classes", "templates": ["a {}", "one {}", "the {}"]}
    config = str(settings(workplace, "text", data=data, evaluate={"retrieval": None}))
    for run, is_used in (("with", "true"), ("without", "false")):
        words = ("--output-dir", run, "-o", f"finetune.cache_features={is_used}")
        assert command("train", "-c", config, "--load", "start.pt", *words).returncode == 0
    digests = [
        json.loads(path.read_text()) for path in Path("with/features/text").glob("*.ids.json")
    ]
    assert sum(map(len, digests)) == 9
    assert losses(Path("with")) == pytest.approx(losses(Path("without")), rel=1e-5)


def features_of(world_size: int, tower: str, folder: Path) -> dict[str, str]:
    """SHA-256 of what `world_size` ranks write."""
    config = load_config("locked.yaml")
    dataset = open_dataset(config.data)
    preprocess = Preprocess(TINY["image_resolution"])

    def work(rank: int) -> int:
        torch.manual_seed(1)
        cache = feature_cache.build_feature_cache(
            CLIP(**TINY), [tower], dataset, config.data, preprocess, folder, "fp32"
        )
        return cache.is_used

    assert all(ranks_of(world_size, work, folder.parent))
    paths = sorted((folder / tower).iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("tower", ["image", "text"])
def test_ranks_and_interruptions_leave_the_same_bytes(workplace: Path, tower: str) -> None:
    make_pairs(workplace / "more", 23)
    data = {"root": "more", "augment": False}
    settings(workplace, tower, data=data)
    whole = features_of(1, tower, workplace / "one")
    assert features_of(2, tower, workplace / "two") == whole
    folder = workplace / "two" / tower
    assert len(list(folder.glob("*.npy"))) == 5
    for shard in (1, 3):
        (folder / f"{shard:05d}.npy").unlink()
    (folder / "00001.ids.json").write_text("[1, ")  # cut short
    assert features_of(1, tower, workplace / "two") == whole
    settings(workplace, tower, data=data | {"augment": True})
    if tower == "text":  # written anew for other settings
        assert features_of(1, tower, workplace / "two")["_index.json"] != whole["_index.json"]
