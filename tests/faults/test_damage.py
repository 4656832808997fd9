"""What lies in a run's folder is damaged, changed or in use: said, and the best made of it."""

import random
import shutil
import signal
from pathlib import Path

import pytest
from conftest import Command, Forked, make_model, noise_image, some_of, tries, weights_hash
from leftovers import Leftovers

from leanclip.training import checkpoint

pytestmark = pytest.mark.usefixtures("left")

OPTIONS = (
    "train", "-c", "config.yaml", "-o", "train.epochs=6", "-o", "evaluate.retrieval=null",
    "-o", "checkpoint.every_steps=3", "-o", "checkpoint.keep=3",
)  # fmt: skip


@pytest.fixture
def stopped(workplace: Path) -> Path:
    """A run that was stopped and has three checkpoints."""
    run = workplace / "stopped"
    process = Forked(*OPTIONS, "--output-dir", "stopped", folder=workplace)
    process.until(lambda: (run / "checkpoints/step-00000009").is_dir())
    process.send(signal.SIGTERM)
    assert process.code() == 143
    return run


def hurt(path: Path, chance: random.Random) -> str:
    """Flip a bit of a file, or cut it; what was done."""
    content = bytearray(path.read_bytes())
    place = chance.randrange(len(content))
    if chance.random() < 0.3:
        path.write_bytes(content[:place])
        return f"{path.name} cut at byte {place}"
    content[place] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return f"a bit of byte {place} of {path.name} flipped"


@pytest.mark.parametrize("count", [1, pytest.param(tries(25), marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_passed_over_and_named(
    command: Command, workplace: Path, stopped: Path, left: Leftovers, count: int
) -> None:
    command(*OPTIONS, "--output-dir", "whole")
    chance = random.Random(19)
    for attempt in range(count):
        run = workplace / f"run-{attempt}"
        shutil.copytree(stopped, run)
        *_, before, newest = sorted((run / "checkpoints").glob("step-*"))
        what = hurt(chance.choice(sorted(newest.iterdir())), chance)
        process = Forked(*OPTIONS, "--output-dir", run.name, folder=workplace)
        assert process.code() == 0, f"{what}: {process.output()}"
        said = process.output()
        assert f"warning: checkpoint skipped: {run.name}/checkpoints/{newest.name}" in said, what
        assert f"resuming from {run.name}/checkpoints/{before.name}," in said, what
        assert weights_hash(run) == weights_hash(workplace / "whole"), what
        left.check()
        shutil.rmtree(run)
    print(f"damaged checkpoints: {count}")


def test_a_checkpoint_whose_place_is_damaged_is_named(workplace: Path, stopped: Path) -> None:
    """By its state it would be older than those that are."""
    newest, _ = checkpoint.newest(stopped / "checkpoints")
    assert newest is not None
    state = newest / "state.json"
    state.write_text(state.read_text().replace('"epoch": ', '"epoch": -'))
    found, skipped = checkpoint.newest(stopped / "checkpoints")
    assert found is not None
    assert found.name < newest.name
    assert skipped == [f"{state}: is missing or cut short"]


def test_a_manifest_that_is_none(stopped: Path) -> None:
    newest, _ = checkpoint.newest(stopped / "checkpoints")
    assert newest is not None
    manifest = newest / "manifest.json"
    whole = manifest.read_text()
    for old, new in (('"size"', '"sizd"'), ("{", "["), ('"', "\xff")):
        manifest.write_bytes(whole.replace(old, new).encode("latin-1"))
        found, skipped = checkpoint.newest(stopped / "checkpoints")
        assert found is not None
        assert skipped == [f"{newest}: has no manifest"]


@pytest.mark.slow
def test_a_changed_configuration_is_refused(
    command: Command, workplace: Path, stopped: Path
) -> None:
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    options = (*OPTIONS, "--output-dir", "stopped")
    for change in ("optimizer.learning_rate=0.5", "seed=3", "train.batch_size=6"):
        process = Forked(*options, "-o", change, folder=workplace)
        assert process.code() == 2, process.output()
        last = process.output().splitlines()[-1]
        assert last.startswith("error: stopped: holds a run of another configuration (")
        assert change.partition("=")[0] in last
        for path, content in before.items():
            assert path.read_bytes() == content
    assert command(*options).returncode == 0
    command(*OPTIONS, "--output-dir", "whole")
    assert weights_hash(stopped) == weights_hash(workplace / "whole")


@pytest.mark.parametrize("name", some_of(["train", "pack", "embed"], "train"))
def test_a_second_start_in_the_same_folder_is_refused(
    workplace: Path, left: Leftovers, name: str
) -> None:
    for i in range(16):
        noise_image(i, (600, 500)).save(workplace / f"data/{i:03d}.png", compress_level=1)
        (workplace / f"data/{i:03d}.txt").write_text("words")
    make_model(workplace / "tiny")
    words, begun = {
        "train": (
            (*OPTIONS, "-o", "train.epochs=100000", "-o", "data.workers=1", "--output-dir", "out"),
            "checkpoints/step-*",
        ),
        "pack": (("data", "pack", "pairs:data", "out", "--workers", "1"), "*.tar.part"),
        "embed": (
            ("embed", "data", "--model", "tiny", "--out", "out", "--shard-size", "1"),
            "*.npy",
        ),
    }[name]
    first = Forked(*words, folder=workplace)
    first.until(lambda: list((workplace / "out").glob(begun)))
    first.send(signal.SIGSTOP)  # not to end before the second is there
    second = Forked(*words, folder=workplace)
    assert second.code() == 2, second.output()
    assert "error: out: another process" in second.output()
    first.send(signal.SIGKILL)
    assert first.code() == -signal.SIGKILL
    third = Forked(*words, folder=workplace)  # though a worker may still be there
    if name == "train":
        third.until(lambda: "resuming from" in third.output())
        third.send(signal.SIGTERM)
    assert third.code() == (143 if name == "train" else 0), third.output()
    left.check()
