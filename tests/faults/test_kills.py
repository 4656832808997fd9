"""Killed at any moment, a run goes on to the same weights; a full disk costs a checkpoint only."""

import contextlib
import random
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Command, Forked, weights_hash

from leanclip import checkpoint
from leanclip.tracking import read_metrics

pytestmark = pytest.mark.usefixtures("left")

OPTIONS = (
    "train", "-c", "config.yaml", "-o", "evaluate.retrieval=null", "-o", "checkpoint.every_steps=1",
)  # fmt: skip


def is_being_written(run: Path) -> bool:
    return any(run.glob("checkpoints/.step-*.tmp"))


@pytest.mark.parametrize(
    ("kills", "epochs"), [(4, 8), pytest.param(20, 60, marks=pytest.mark.slow)]
)
def test_kills_at_random_moments(
    command: Command, workplace: Path, kills: int, epochs: int
) -> None:
    options = (*OPTIONS, "-o", f"train.epochs={epochs}")
    command(*options, "--output-dir", "whole")
    run, chance, in_the_middle = workplace / "run", random.Random(7), 0
    for kill in range(kills):
        process = Forked(*options, "--output-dir", "run", folder=workplace)
        lines = len(read_metrics(run))
        process.until(lambda before=lines: len(read_metrics(run)) > before)  # it has gone on
        if kill % 2:
            process.until(lambda: is_being_written(run))
        time.sleep(chance.uniform(0, 0.04))  # of the order of a step with its checkpoint
        process.send_all(signal.SIGKILL)
        assert process.code() == -signal.SIGKILL
        in_the_middle += is_being_written(run)
        found, skipped = checkpoint.newest(run / "checkpoints")
        assert skipped == []  # what has the name of a step is whole
        assert found is not None or kill == 0
    assert in_the_middle > 0
    done = command(*options, "--output-dir", "run")
    assert done.returncode == 0, done.stderr
    assert weights_hash(run) == weights_hash(workplace / "whole")
    assert [line["train/loss"] for line in read_metrics(run)] == [
        line["train/loss"] for line in read_metrics(workplace / "whole")
    ]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "latest",
        f"step-{epochs * 3 - 1:08d}",
        f"step-{epochs * 3:08d}",
    ]


# --- no room


def assert_went_on_without(said: str, run: Path, steps: list[int]) -> None:
    """Checkpoints of these steps are whole, and for each later one there is a word."""
    assert said.count("no checkpoint at step") == 9 - len(steps) - 1
    assert "those before it are as they were" in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "step-00000009: cannot be written" in last
    assert len(read_metrics(run)) == 9
    found, skipped = checkpoint.newest(run / "checkpoints")
    assert skipped == []
    assert (found and int(found.name[-8:])) == (steps[-1] if steps else None)
    assert not is_being_written(run)


def test_a_file_that_cannot_be_written_costs_a_checkpoint_only(workplace: Path) -> None:
    def limit() -> None:  # AdamW's moments are 13 MB
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))

    options = (*OPTIONS, "-o", "train.epochs=3", "--output-dir", "run")
    process = Forked(*options, folder=workplace, before=limit)
    assert process.code() == 2
    assert_went_on_without(process.said(), workplace / "run", [])
    process = Forked(*options, folder=workplace)
    assert process.code() == 0, process.said()


@pytest.fixture
def small_disk(workplace: Path) -> Iterator[Path]:
    """A file system with room for two checkpoints, not three."""
    disk = workplace / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=50m", "leanclip", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_the_checkpoints_before(small_disk: Path, workplace: Path) -> None:
    options = (*OPTIONS, "-o", "train.epochs=3", "--output-dir", str(small_disk / "run"))
    process = Forked(*options, folder=workplace)
    assert process.code() == 2
    assert_went_on_without(process.said(), small_disk / "run", [1, 2])


def test_a_full_disk_does_not_end_a_run(small_disk: Path, workplace: Path) -> None:
    run = small_disk / "run"
    options = (*OPTIONS, "-o", "train.epochs=15", "--output-dir", str(run))
    process = Forked(*options, folder=workplace)
    process.until(lambda: list(run.glob("checkpoints/step-*2")))
    with contextlib.suppress(OSError), (small_disk / "other").open("wb", buffering=0) as other:
        while other.write(bytes(4096)):  # nothing is left, not even for metrics
            continue
    process.until(lambda: "metrics" in process.said())
    (small_disk / "other").unlink()
    assert process.code() == 2  # there is still no room for a third
    assert "step-00000045: cannot be written" in process.said()
    assert read_metrics(run)[-1]["step"] == 45
    found, skipped = checkpoint.newest(run / "checkpoints")
    assert found is not None
    assert skipped == []
