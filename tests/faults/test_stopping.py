"""Signals: training stops or saves at the edge of a step, on all ranks, and goes on to the bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Command, Forked, fork_ranks, weights_hash
from leftovers import children

from leanclip.distributed.preemption import deferred_signals, nothing_to_save
from leanclip.io.files import read_metrics
from leanclip.training import checkpoint

pytestmark = pytest.mark.usefixtures("left")

OPTIONS = (
    "train", "-c", "config.yaml", "-o", "train.epochs=15", "-o", "evaluate.retrieval=null",
    "-o", "checkpoint.every_epochs=null", "-o", "checkpoint.every_steps=20",
)  # fmt: skip
SIGNALS = ((signal.SIGTERM, 143), (signal.SIGINT, 130))


WHOLE: list[str] = []  # made once: it depends on nothing of a test


@pytest.fixture
def whole(command: Command, workplace: Path) -> str:
    """The weights of the run that nothing stopped."""
    if not WHOLE:
        command(*OPTIONS, "--output-dir", "whole")
        WHOLE.append(weights_hash(workplace / "whole"))
    return WHOLE[0]


def state_of(run: Path) -> str:
    return json.loads((run / "status.json").read_text())["state"]


def assert_stopped_at_an_edge(run: Path) -> None:
    """The newest checkpoint is of the last step that was made."""
    found, skipped = checkpoint.newest(run / "checkpoints")
    assert found is not None
    assert skipped == []
    step = json.loads((found / "state.json").read_text())["step"]
    assert 5 <= step < 45
    assert step == read_metrics(run)[-1]["step"]
    assert state_of(run) == "preempted"


@pytest.mark.parametrize(
    ("number", "code", "to_all"),
    [(signal.SIGTERM, 143, False), (signal.SIGTERM, 143, True), (signal.SIGINT, 130, True)],
)
def test_a_signal_stops_at_a_steps_edge(
    command: Command, workplace: Path, whole: str, number: int, code: int, to_all: bool
) -> None:
    run = workplace / "run"
    options = (*OPTIONS, "--output-dir", "run", "-o", "data.workers=1")
    process = Forked(*options, folder=workplace)
    process.until(lambda: len(read_metrics(run)) >= 5)
    (process.send_all if to_all else process.send)(number)
    assert process.code() == code
    assert "run the same command again" in process.output()
    assert "Traceback" not in process.output()
    assert_stopped_at_an_edge(run)
    done = command(*options)
    assert "resuming from run/checkpoints/step-" in done.stderr
    assert weights_hash(run) == whole
    assert state_of(run) == "done"


def test_sigusr1_saves_and_goes_on(workplace: Path, whole: str) -> None:
    run = workplace / "run"
    process = Forked(*OPTIONS, "--output-dir", "run", "-o", "data.workers=1", folder=workplace)
    process.until(lambda: len(read_metrics(run)) >= 5)
    process.send_all(signal.SIGUSR1)
    process.until(lambda: list(run.glob("checkpoints/step-*")))
    (first, *_) = sorted(run.glob("checkpoints/step-*"))
    assert 5 <= int(first.name[-8:]) < 20
    assert process.code() == 0
    assert weights_hash(run) == whole


def test_a_second_ctrl_c_ends_at_once(workplace: Path) -> None:
    run = workplace / "run"
    options = ("-o", "train.batch_size=12", "-o", "train.epochs=100000")
    process = Forked(*OPTIONS, *options, "--output-dir", "run", folder=workplace)
    process.until(lambda: len(read_metrics(run)) >= 5)
    os.kill(process.pid, signal.SIGSTOP)  # both arrive before the step's edge
    process.send(signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    process.send(signal.SIGINT)
    assert process.code() == 130


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_before_the_first_step_ends(workplace: Path, number: int, code: int) -> None:
    os.mkfifo(workplace / "wait.yaml")  # it waits to read its configuration
    process = Forked("train", "-c", "wait.yaml", "--output-dir", "run", folder=workplace)
    with (workplace / "wait.yaml").open("w"):  # open: it has begun to read
        process.send(signal.SIGUSR1)
        process.send(number)
        assert process.code() == code
    assert not (workplace / "run").exists()
    assert "Traceback" not in process.output()


def test_a_rank_that_dies_before_the_first_step_is_a_failure(workplace: Path) -> None:
    """The launcher sends SIGTERM to the other one, which nobody asked to stop."""
    config = (workplace / "config.yaml").read_text()
    os.mkfifo(workplace / "wait.yaml")  # read by the launcher, then waited for by the ranks
    process = subprocess.Popen(
        [
            sys.executable, "-c", "from leanclip.cli.main import main; main()",
            "train", "-c", "wait.yaml", "--output-dir", "run", "--num-procs", "2",
        ],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    (workplace / "wait.yaml").write_text(config)
    while sum(map(_is_handling_sigterm, children(process.pid))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "rank 0: -9" in errors


def _is_handling_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught, blocked = (
        int(status.split(f"{name}:")[1].split()[0], 16) >> (signal.SIGTERM - 1) & 1
        for name in ("SigCgt", "SigBlk")
    )
    return bool(caught and not blocked)


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signals_wait_for_an_import_of_pytorch(number: int, code: int) -> None:
    reached: list[str] = []

    def work() -> None:
        with nothing_to_save():
            with deferred_signals():
                signal.raise_signal(number)
                reached.append("imported")
            reached.append("over")

    with pytest.raises(SystemExit) as end:
        work()
    assert reached == ["imported"]
    assert end.value.code == code


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(workplace: Path) -> None:
    options = (*OPTIONS, "-o", "train.batch_size=2")
    assert [r.code() for r in fork_ranks(2, *options, "--output-dir", "w", folder=workplace)] == [
        0,
        0,
    ]
    run = workplace / "run"
    ranks = fork_ranks(2, *options, "--output-dir", "run", folder=workplace)
    ranks[0].until(lambda: len(read_metrics(run)) >= 5)
    ranks[1].send(signal.SIGTERM)
    assert ranks[1].code() == 143
    assert state_of(run) == "preempted"  # rank 0 had done all when the first rank ended
    assert [rank.code() for rank in ranks] == [143, 143]
    assert_stopped_at_an_edge(run)
    ranks = fork_ranks(2, *options, "--output-dir", "run", folder=workplace)
    assert [rank.code() for rank in ranks] == [0, 0]
    assert "resuming from run/checkpoints/step-" in ranks[0].output()
    assert ranks[1].output() == ""
    assert weights_hash(run) == weights_hash(workplace / "w")


@pytest.mark.parametrize(
    ("number", "code"), [SIGNALS[0], pytest.param(*SIGNALS[1], marks=pytest.mark.slow)]
)
def test_a_signal_to_the_launcher_stops_all_ranks(workplace: Path, number: int, code: int) -> None:
    run = workplace / "run"
    process = subprocess.Popen(
        [
            sys.executable, "-c", "from leanclip.cli.main import main; main()",
            *OPTIONS, "--output-dir", "run", "-o", "train.batch_size=2", "--num-procs", "2",
            "-o", "train.epochs=1000", "--max-restarts", "1",
        ],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while len(read_metrics(run)) < 5:
        assert process.poll() is None
    os.killpg(process.pid, number)  # a terminal's group: the ranks are in others
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert errors.count("run the same command again") == 1
    assert errors.count("Traceback") == 0
    assert_stopped_at_an_edge(run)
