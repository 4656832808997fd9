"""One of a job's processes is killed, or gets no memory: a data worker, a rank, the launcher."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import (
    Command,
    Forked,
    fork_ranks,
    make_config,
    make_table,
    noise_image,
    tries,
    weights_hash,
)
from leftovers import Leftovers, children

from leanclip.io.files import read_metrics
from leanclip.training import checkpoint

OPTIONS = (
    "train", "-c", "config.yaml", "-o", "train.epochs=20", "-o", "evaluate.retrieval=null",
    "-o", "checkpoint.every_steps=9",
)  # fmt: skip
RANKS = (*OPTIONS, "-o", "train.batch_size=2", "--num-procs", "2", "--output-dir", "two")


# --- data workers


@pytest.mark.slow
def test_a_killed_worker_is_said_and_the_run_goes_on(
    command: Command, workplace: Path, left: Leftovers
) -> None:
    kills = tries(4)
    options = (*OPTIONS, "-o", f"train.epochs={10 * kills}", "-o", "data.workers=2")
    command(*options, "--output-dir", "whole")
    run, chance = workplace / "run", random.Random(11)
    for _ in range(kills):
        process = Forked(*options, "--output-dir", "run", folder=workplace)
        lines = len(read_metrics(run))
        process.until(lambda before=lines: len(read_metrics(run)) > before)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(chance.choice(children(process.pid)), signal.SIGKILL)
        assert process.code() == 2, process.output()
        last = process.output().splitlines()[-1]
        assert last.startswith("error: ")
        assert "the process that was reading it died; if the system ended it" in last
        assert "Traceback" not in process.output()
        assert json.loads((run / "status.json").read_text())["state"] == "failed"
        left.check()
        assert checkpoint.newest(run / "checkpoints")[1] == []
    print(f"data workers: {kills} kills")
    assert command(*options, "--output-dir", "run").returncode == 0
    assert weights_hash(run) == weights_hash(workplace / "whole")


def test_a_worker_without_memory_is_said(workplace: Path, left: Leftovers) -> None:
    """It may have no more than it has; that a large image cannot be read then is not its fault."""
    options = (*OPTIONS, "-o", "data.workers=1", "-o", "train.epochs=100000")
    noise_image(0, (4000, 3000)).save(workplace / "large.png")
    process = Forked(*options, "--output-dir", "run", folder=workplace)
    process.until(lambda: len(read_metrics(workplace / "run")) >= 3)
    (worker,) = children(process.pid)
    limit = 1 << 28  # less than it has: nothing more can be had
    resource.prlimit(worker, resource.RLIMIT_AS, (limit, limit))
    (workplace / "large.png").replace(workplace / "data/000.png")
    assert process.code() == 2, process.output()
    assert "Traceback" not in process.output()
    assert "memory" in process.output().splitlines()[-1]
    assert not (workplace / "run/skipped.jsonl").exists()
    left.check()


@pytest.mark.slow
def test_workers_end_with_a_killed_trainer_that_took_no_batches(
    workplace: Path, left: Leftovers
) -> None:
    """What they have ready does not fit into the pipe, and nobody will ever read it."""
    make_table(workplace / "many", 1000)
    make_config(
        workplace / "config.yaml",
        data={"format": "table", "root": "many/caption.csv", "workers": 2},
        train={"batch_size": 500, "epochs": 1000},
    )
    process = Forked(*OPTIONS, "--output-dir", "run", folder=workplace)
    process.until(lambda: len(read_metrics(workplace / "run")) >= 1)
    process.send(signal.SIGSTOP)
    time.sleep(1)  # they fill it
    process.send(signal.SIGKILL)
    assert process.code() == -signal.SIGKILL
    left.goes_on = True


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_worker_killed_amid_a_message_is_not_waited_for(
    workplace: Path, left: Leftovers, which: int
) -> None:
    """The pipe is full, one of the two has written a part of its batch: nobody writes the rest."""
    make_table(workplace / "many", 1000)
    make_config(
        workplace / "config.yaml",
        data={"format": "table", "root": "many/caption.csv", "workers": 2},
        train={"batch_size": 500, "epochs": 1000},
    )
    process = Forked(*OPTIONS, "--output-dir", "run", folder=workplace)
    process.until(lambda: len(read_metrics(workplace / "run")) >= 1)
    process.send(signal.SIGSTOP)
    time.sleep(2)  # they fill it
    os.kill(children(process.pid)[which], signal.SIGKILL)
    process.send(signal.SIGCONT)
    assert process.code() == 2, process.output()
    assert "the process that was reading it died" in process.output().splitlines()[-1]
    left.check()


@pytest.mark.slow
def test_a_killed_packer_is_said_and_packing_goes_on(
    command: Command, workplace: Path, left: Leftovers
) -> None:
    for i in range(12):
        noise_image(i, (900, 700)).save(workplace / f"data/{i:03d}.png", compress_level=1)
    words = ("data", "pack", "pairs:data", "packed", "--shard-size", "2", "--workers", "2")
    process = Forked(*words, folder=workplace)
    process.until(lambda: list(workplace.glob("packed/*.tar.part")))
    os.kill(children(process.pid)[0], signal.SIGKILL)
    assert process.code() == 2
    assert "the process that was reading it died" in process.output().splitlines()[-1]
    left.check()
    assert command(*words).returncode == 0


# --- ranks and their launcher


def started(*options: str) -> subprocess.Popen[str]:
    """A job of two ranks that has begun."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from leanclip.cli.main import main; main()", *RANKS, *options],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for_lines(process, 12)
    assert len(children(process.pid)) == 2
    return process


def wait_for_lines(process: subprocess.Popen[str], count: int) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(Path("two"))) < count:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


def end_of(process: subprocess.Popen[str]) -> str:
    """What it said on stderr; a job that does not end fails."""
    try:
        return process.communicate(timeout=120)[1]
    finally:
        process.kill()


@pytest.mark.slow
def test_dead_ranks_are_started_again(workplace: Path, left: Leftovers) -> None:
    kills = tries(2)
    options = ("-o", f"train.epochs={20 * kills}")
    process = started("--max-restarts", str(kills), *options)
    chance = random.Random(13)
    for _ in range(kills):
        time.sleep(chance.uniform(0, 0.1))
        os.kill(chance.choice(children(process.pid)), signal.SIGKILL)
        ended, deadline = len(read_metrics(Path("two"))), time.monotonic() + 120
        while len(read_metrics(Path("two"))) >= ended:  # it has not gone on yet
            assert time.monotonic() < deadline
            if len(read_metrics(Path("two"))) > ended + 30:
                break
            time.sleep(0.005)
    errors = end_of(process)
    assert process.returncode == 0, errors
    assert errors.count("resuming from two/checkpoints/step-") == kills
    left.check()
    whole = (*OPTIONS, *options, "-o", "train.batch_size=2", "--output-dir", "whole")
    assert [rank.code() for rank in fork_ranks(2, *whole, folder=workplace)] == [0, 0]
    assert weights_hash(workplace / "two") == weights_hash(workplace / "whole")
    print(f"ranks: {kills} kills")


@pytest.mark.slow
def test_a_dead_rank_ends_the_job(workplace: Path, left: Leftovers) -> None:
    process = started()
    os.kill(children(process.pid)[1], signal.SIGKILL)
    errors = end_of(process)
    assert process.returncode == 1
    said = [line for line in errors.splitlines() if not line.startswith("step ")]
    (last,) = said[5:]  # after the headline
    assert "rank 1: -9" in last
    left.check()
    assert checkpoint.newest(Path("two/checkpoints"))[1] == []
    assert json.loads(Path("two/status.json").read_text())["state"] == "failed"


@pytest.mark.slow
def test_ranks_end_with_their_launcher(workplace: Path, left: Leftovers) -> None:
    process = started("-o", "train.epochs=100000", "-o", "data.workers=1")
    process.kill()
    end_of(process)
    assert process.returncode == -signal.SIGKILL
    left.goes_on = True


@pytest.mark.slow
def test_a_second_ctrl_c_ends_all_ranks_at_once(workplace: Path, left: Leftovers) -> None:
    process = started("-o", "train.epochs=100000")
    for rank in children(process.pid):
        os.kill(rank, signal.SIGSTOP)  # neither comes to the edge of its step
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    errors = end_of(process)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    left.goes_on = True


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_ranks_start_ends_them(
    workplace: Path, left: Leftovers, number: int, code: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "from leanclip.cli.main import main; main()", *RANKS],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not children(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(0.2)  # they import
    process.send_signal(signal.SIGUSR1)
    process.send_signal(number)
    errors = end_of(process)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert not Path("two").exists()


@pytest.mark.slow
def test_a_fault_on_one_rank_is_said_before_others_miss_it(
    workplace: Path, left: Leftovers
) -> None:
    options = (*OPTIONS, "-o", "train.batch_size=2", "--output-dir", "two", "-o", "data.workers=1")
    first, second = fork_ranks(2, *options, folder=workplace)
    second.until(lambda: children(second.pid) and len(read_metrics(Path("two"))) >= 3)
    os.kill(children(second.pid)[0], signal.SIGKILL)  # what reads its data
    assert second.code() == 2
    assert "the process that was reading it died" in second.output()
    assert first.code() == 1
    assert first.output().splitlines()[-1] == "rank 0: another rank is gone"
    assert "Traceback" not in first.output() + second.output()
    left.check()
