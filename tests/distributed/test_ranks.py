"""Several ranks through the command line: the same run as one process makes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import (
    PROJECT,
    Command,
    Forked,
    assert_refused,
    fork_ranks,
    run_cli,
)

from leanclip.config.schema import load_config
from leanclip.data import open_dataset
from leanclip.data.batch import Position
from leanclip.data.loader import training_batches
from leanclip.distributed.launch import launch
from leanclip.distributed.preemption import HANDLED_SIGNALS
from leanclip.io.files import read_metrics
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.text import Tokenizer
from leanclip.training import checkpoint

OPTIONS = ("train", "-c", "config.yaml", "-o", "train.epochs=4", "-o", "data.max_bad_fraction=0.2")
NO_EVALUATION = ("-o", "evaluate.retrieval=null")
BEST = ("-o", "evaluate.every_epochs=1", "-o", "checkpoint.best_metric=image_to_text_R@1")
LONG = ("-o", "train.epochs=20", "-o", "checkpoint.every_steps=9", *NO_EVALUATION)


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


def batch_of(world_size: int) -> tuple[str, str]:
    """The option that makes a global batch of 4."""
    return "-o", f"train.batch_size={4 // world_size}"


@pytest.mark.parametrize(
    ("world_size", "micro_batches"), [(2, 1), (2, 2), pytest.param(4, 1, marks=pytest.mark.slow)]
)
def test_ranks_reach_the_losses_of_one(
    command: Command, workplace: Path, world_size: int, micro_batches: int
) -> None:
    (workplace / "data" / "003.png").write_bytes(b"no image")
    options = (*OPTIONS, *NO_EVALUATION)
    command(*options, "--output-dir", "one")
    more = (*batch_of(world_size), "-o", f"train.micro_batches={micro_batches}")
    ranks = fork_ranks(world_size, *options, *more, "--output-dir", "many", folder=workplace)
    assert [rank.code() for rank in ranks] == [0] * world_size
    one, many = losses(workplace / "one"), losses(workplace / "many")
    assert len(one) == 12
    assert many == pytest.approx(one, abs=1e-4)
    assert [rank.output() for rank in ranks[1:]] == [""] * (world_size - 1)
    assert ranks[0].output().count("skipped: data/003.png") == 1
    (skipped,) = (workplace / "many/skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["id"].endswith("003.png")


def test_the_command_starts_ranks_that_speak_as_one(command: Command, workplace: Path) -> None:
    command(*OPTIONS, *NO_EVALUATION, "--output-dir", "one")
    done = run_cli(
        *OPTIONS, *NO_EVALUATION, *batch_of(2), "--num-procs", "2", "--output-dir", "two",
        "-o", "optimizer.reference_batch=8", "-o", "optimizer.learning_rate=0.002",
        cwd=workplace,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert losses(workplace / "two") == pytest.approx(losses(workplace / "one"), abs=1e-4)
    lines = [line for line in said_by(done.stderr) if not line.startswith("warning")]
    assert [line.split(":")[0] for line in lines] == [
        "model",
        "data",
        "steps",
        "learning rate",
        "folder",
    ]
    assert "learning rate: peak 0.001, " in lines[3]
    assert "(0.002 x batch 4 / reference batch 8)" in lines[3]
    assert done.stdout.count("Folder:   two") == 1


@pytest.mark.slow
def test_an_outer_torchrun_starts_the_same_ranks(command: Command, workplace: Path) -> None:
    command(*OPTIONS, "--output-dir", "one")
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            PROJECT / "tools/train.py", *OPTIONS[1:], *batch_of(2), "--num-gpus", "0",
            "--output-dir", "two",
        ],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert losses(workplace / "two") == pytest.approx(losses(workplace / "one"), abs=1e-4)
    assert done.stdout.count("Folder:   two") == 1


def test_a_mistake_is_said_once(workplace: Path) -> None:
    done = run_cli(
        *OPTIONS, "-o", "data.root=nowhere", "--num-procs", "2", "--max-restarts", "3",
        cwd=workplace,
    )  # fmt: skip
    assert_refused(done, "data.root: no such folder: nowhere")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_signals_are_answered_as_before_when_the_ranks_are_done() -> None:
    before = [signal.getsignal(number) for number in HANDLED_SIGNALS]
    assert launch(["models"], ranks=1) == 0
    assert [signal.getsignal(number) for number in HANDLED_SIGNALS] == before


def said_by(errors: str) -> list[str]:
    """The lines on stderr without those that say how far it is."""
    return [line for line in errors.splitlines() if not line.startswith("step ")]


# --- another number of ranks


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_goes_on_with_the_next_sample(
    workplace: Path, before: int, after: int
) -> None:
    def start(world_size: int) -> list[Forked]:
        # Batches of 2 a rank: 3 steps of two ranks or 6 of one make an epoch. Hardly anything is
        # learned, so the first evaluation is the best.
        options = ("-o", "train.batch_size=2", "-o", "optimizer.learning_rate=1e-9", *BEST)
        options = (*OPTIONS, "-o", "train.epochs=8", *options, "--output-dir", "run")
        return fork_ranks(world_size, *options, folder=workplace)

    run, best = workplace / "run", f"step-{12 // (2 * before):08d}"
    ranks = start(before)
    ranks[0].until(lambda: len(losses(run)) > 12 // (2 * before))
    ranks[-1].send(signal.SIGTERM)
    assert [rank.code() for rank in ranks] == [143] * before
    found, _ = checkpoint.newest(run / "checkpoints")
    assert found is not None
    stopped = json.loads((found / "state.json").read_text())
    assert [rank.code() for rank in start(after)] == [0] * after
    found, skipped = checkpoint.newest(run / "checkpoints")
    assert found is not None
    assert skipped == []
    ended = json.loads((found / "state.json").read_text())
    assert ended["epoch"] == 8
    # What two ranks leave out at an epoch's end where one had stopped in the middle of a batch.
    assert ended["samples"] == 8 * 12 - stopped["sample"] % (2 * after)
    left = (8 - stopped["epoch"]) * 12 - stopped["sample"]
    assert ended["step"] == stopped["step"] + left // (2 * after)
    # Steps are counted on: names, metrics and the best checkpoint stay those of before.
    lines = [line for line in read_metrics(run) if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, ended["step"] + 1))
    counts = [line["train/samples"] for line in lines]
    assert counts == sorted(counts)
    assert (run / "checkpoints/best").read_text() == f"{best}\n"
    assert json.loads((run / "checkpoints" / best / "state.json").read_text())["epoch"] == 1
    assert ended["best"][2:] == [int(best[-8:]), 7]
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["steps"]) == ("done", *2 * [ended["step"]])


@pytest.mark.slow
def test_the_same_global_batch_goes_on_with_fewer_ranks(workplace: Path) -> None:
    def start(world_size: int, batch_size: int, run: str, *more: str) -> list[Forked]:
        options = (*OPTIONS, *LONG, "-o", f"train.batch_size={batch_size}", "--output-dir", run)
        return fork_ranks(world_size, *options, *more, folder=workplace)

    run = workplace / "run"
    ranks = start(2, 2, "run")
    ranks[0].until(lambda: len(losses(run)) >= 4)
    ranks[0].send(signal.SIGTERM)
    assert [rank.code() for rank in ranks] == [143, 143]
    (other,) = start(1, 3, "run")
    assert other.code() == 2
    assert "train.batch_size" in other.output()
    assert [rank.code() for rank in start(1, 4, "run", "-o", "train.micro_batches=2")] == [0]
    assert [rank.code() for rank in start(1, 4, "whole")] == [0]
    assert losses(run) == pytest.approx(losses(workplace / "whole"), rel=1e-4)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (3, 5), (5, 3)])
@pytest.mark.parametrize("batches", [1, 2])
def test_no_sample_of_an_epoch_is_repeated(
    workplace: Path, before: int, after: int, batches: int
) -> None:
    config = load_config("config.yaml")
    dataset = open_dataset(config.data)

    def stream(batch_size: int, start: Position):
        return training_batches(
            dataset, config.data, preprocess=Preprocess(32), tokenizer=Tokenizer(24), truncate=True,
            batch_size=batch_size, seed=0, start=start,
        )  # fmt: skip

    seen: list[int] = []
    position = Position()
    first = stream(before, position)
    for _ in range(batches):
        batch, position = next(first)
        seen += batch.indices.tolist()
    for batch, following in stream(after, position):
        if position.epoch == 0:
            seen += batch.indices.tolist()
        if following.epoch > 0:
            break
    assert len(set(seen)) == len(seen) > 12 - max(before, after)
