"""The machine has too little of something, or its clock goes back: said in a line, nothing lost."""

import contextlib
import ctypes
import json
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    Command,
    Forked,
    make_config,
    make_model,
    make_pairs,
    some_of,
    tries,
    weights_hash,
)
from leftovers import Leftovers
from test_food101 import make_archive
from torch.utils.data._utils import worker
from web import serving

from leanclip.data.readers import shard_cache
from leanclip.errors import SampleError
from leanclip.io.files import read_metrics
from leanclip.training import checkpoint

pytestmark = pytest.mark.usefixtures("left")

TRAIN = (
    "train", "-c", "config.yaml", "-o", "evaluate.retrieval=null", "-o", "checkpoint.every_steps=1",
)  # fmt: skip
COMMANDS = {  # of each what it writes, and how long a file may be for it not to come to its end
    "train": ((*TRAIN, "--output-dir", "out/run"), 10_000_000),  # AdamW's moments have 13 MB
    "pack": (("data", "pack", "pairs:data", "out/run", "--workers", "1"), 8_000),
    "embed": (("embed", "data", "--model", "tiny", "--out", "out/run", "--num-gpus", "0"), 700),
    "download": (("data", "food101", "out/run/food-101", "--checksum", "none"), 5_000),
}
NO_RIGHT = 77  # exit code of a process that may not mount anything
_CLONE_NEWNS = 0x20000  # linux/sched.h
DAY = 86_400


def assert_said(process: Forked, *words: str) -> None:
    """It ended by one line that holds one of the words."""
    code = process.code()
    if code == NO_RIGHT:
        pytest.skip("NOT TESTED: this user may not mount file systems")
    assert code == 2, process.output()
    said = [line for line in process.output().splitlines() if line.startswith("error: ")]
    assert len(said) == 1, process.output()
    assert "Traceback" not in process.output(), process.output()
    assert any(word in said[0] for word in words), said


def in_own_mounts(*mounts: str) -> Callable[[], None]:
    """Gives a process file systems that no other sees: what follows `mount`, of each."""

    def begin() -> None:
        if ctypes.CDLL(None).unshare(_CLONE_NEWNS):
            os._exit(NO_RIGHT)
        for words in ("--make-rprivate /", *mounts):
            if subprocess.run(["mount", *words.split()], capture_output=True).returncode:
                os._exit(NO_RIGHT)

    return begin


@pytest.fixture
def prepared(workplace: Path) -> Iterator[dict[str, tuple[str, ...]]]:
    """The words of COMMANDS, with what they need."""
    (workplace / "out").mkdir()
    (workplace / "served").mkdir()
    make_model(workplace / "tiny")
    make_archive(workplace / "served/food-101.tar", mode="w")
    with serving(workplace / "served") as server:
        words = {name: words for name, (words, _) in COMMANDS.items()}
        yield words | {"download": (*words["download"], "--url", f"{server.url}/food-101.tar")}


def limit_of(name: str) -> Callable[[], None]:
    """Gives a command no file that is as long as it needs one."""
    limit = COMMANDS[name][1]
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def digests(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- memory and files


@pytest.fixture
def workers(workplace: Path) -> None:
    make_config(
        workplace / "config.yaml",
        data={"workers": 2},
        model={"image_resolution": 224, "vision_patch_size": 32},
        train={"batch_size": 12, "epochs": 4},
    )


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_too_little_shared_memory_is_said(workplace: Path) -> None:
    """Only semaphores are in /dev/shm, a page each: batches have memory of their own."""
    mount = in_own_mounts("-t tmpfs -o size=16k tmpfs /dev/shm")
    process = Forked(*TRAIN, "--output-dir", "run", folder=workplace, before=mount)
    assert_said(process, "not enough memory or shared memory")


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_a_megabyte_of_shared_memory_is_enough(workplace: Path) -> None:
    mount = in_own_mounts("-t tmpfs -o size=1m tmpfs /dev/shm")  # containers have 64
    process = Forked(*TRAIN, "--output-dir", "run", folder=workplace, before=mount)
    code = process.code()
    if code == NO_RIGHT:
        pytest.skip("NOT TESTED: this user may not mount file systems")
    assert code == 0, process.output()


def open_no_more_than(more: int) -> None:
    """Let this process open so many files beside those that it has open."""
    used = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    free = [number for number in range(1000) if number not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[more], free[more]))


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_too_few_open_files_are_said(workplace: Path, left: Leftovers) -> None:
    chance, codes = random.Random(17), []
    for attempt in range(tries(5)):
        limit = partial(open_no_more_than, chance.randrange(2, 30))  # what fails first differs
        run = f"run-{attempt}"
        words = (*TRAIN, "-o", "train.report_to=null")  # TensorBoard's thread prints its own errors
        process = Forked(*words, "--output-dir", run, folder=workplace, before=limit)
        codes.append(process.code())
        if codes[-1]:
            assert_said(process, "open")
        assert not (workplace / run / "skipped.jsonl").exists(), "taken for bad samples"
        left.check()
    print(f"open files: {len(codes)} tries, {codes.count(2)} were too few")
    assert 2 in codes


@pytest.mark.usefixtures("workers")
def test_a_worker_that_is_ended_before_it_has_begun_is_not_waited_for(workplace: Path) -> None:
    work = worker._worker_loop

    def work_late(*arguments: Any) -> None:
        time.sleep(2)  # meanwhile there are no files for the second worker, and all is over
        work(*arguments)

    def hurt() -> None:
        worker._worker_loop = work_late
        open_no_more_than(11)

    process = Forked(*TRAIN, "--output-dir", "run", folder=workplace, before=hurt)
    assert_said(process, "too few files may be open")


# --- room


@pytest.mark.parametrize("name", some_of(COMMANDS, "pack"))
def test_a_file_that_cannot_be_written_is_said(
    prepared: dict[str, tuple[str, ...]], workplace: Path, left: Leftovers, name: str
) -> None:
    process = Forked(*prepared[name], folder=workplace, before=limit_of(name))
    assert_said(process, "File too large", "cannot be written", "no space")
    left.check(goes_on=name == "download")
    process = Forked(*prepared[name], folder=workplace)
    assert process.code() == 0, process.output()


@pytest.fixture
def small_disk(workplace: Path, left: Leftovers) -> Iterator[Path]:
    """A file system with room for two checkpoints, not three."""
    disk = workplace / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=50m", "leanclip", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("NOT TESTED: this user may not mount file systems")
    try:
        yield disk
        left.check()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_the_checkpoints_before(small_disk: Path, workplace: Path) -> None:
    run = small_disk / "run"
    process = Forked(*TRAIN, "-o", "train.epochs=3", "--output-dir", str(run), folder=workplace)
    assert_said(process, "step-00000009: cannot be written")
    assert process.output().count("no checkpoint at step") == 9 - 2 - 1
    assert "earlier ones are unchanged" in process.output()
    assert len(read_metrics(run)) == 9
    found, skipped = checkpoint.newest(run / "checkpoints")
    assert skipped == []
    assert found is not None
    assert found.name == "step-00000002"
    assert json.loads((run / "status.json").read_text())["state"] == "failed"


@pytest.mark.slow
def test_a_full_disk_does_not_end_a_run(small_disk: Path, workplace: Path) -> None:
    run = small_disk / "run"
    options = (*TRAIN, "-o", "train.epochs=15", "--output-dir", str(run))
    process = Forked(*options, folder=workplace)
    process.until(lambda: list(run.glob("checkpoints/step-*2")))
    process.send(signal.SIGSTOP)  # so that it does not end meanwhile
    with contextlib.suppress(OSError), (small_disk / "other").open("wb", buffering=0) as other:
        while other.write(bytes(4096)):  # nothing is left, not even for metrics
            continue
    process.send(signal.SIGCONT)
    process.until(lambda: "metrics" in process.output())
    (small_disk / "other").unlink()
    assert_said(process, "step-00000045: cannot be written")  # there is no room for a third
    assert read_metrics(run)[-1]["step"] == 45
    found, skipped = checkpoint.newest(run / "checkpoints")
    assert found is not None
    assert skipped == []


@pytest.mark.parametrize("name", some_of(COMMANDS, "pack"))
def test_a_folder_that_is_read_only_is_said(
    prepared: dict[str, tuple[str, ...]], workplace: Path, name: str
) -> None:
    """What an earlier start left there stays as it is."""
    if name == "train":
        process = Forked(*prepared[name], folder=workplace)
        process.until(lambda: list(workplace.glob("out/run/checkpoints/step-*")))
        process.send(signal.SIGTERM)
        assert process.code() == 143
    else:
        assert Forked(*prepared[name], folder=workplace, before=limit_of(name)).code() == 2
    before = digests(workplace / "out")
    mount = in_own_mounts(f"--bind -o ro {workplace}/out {workplace}/out")
    process = Forked(*prepared[name], folder=workplace, before=mount)
    assert_said(process, "Read-only file system")
    assert digests(workplace / "out") == before
    process = Forked(*prepared[name], folder=workplace)
    assert process.code() == 0, process.output()


# --- the clock


@pytest.mark.slow
def test_a_clock_that_goes_back_changes_nothing(command: Command, workplace: Path) -> None:
    """By a day while it was stopped, and by another while it runs."""
    options = (*TRAIN, "-o", "train.epochs=15")
    command(*options, "--output-dir", "whole")
    run = workplace / "run"

    def go_back() -> None:
        tell, calls = time.time, count()
        time.time = lambda: tell() - DAY * (1 + (next(calls) > 200))

    process = Forked(*options, "--output-dir", "run", folder=workplace)
    process.until(lambda: len(read_metrics(run)) >= 5)
    process.send(signal.SIGTERM)
    assert process.code() == 143
    process = Forked(*options, "--output-dir", "run", folder=workplace, before=go_back)
    assert process.code() == 0, process.output()
    assert weights_hash(run) == weights_hash(workplace / "whole")
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 46))
    changes = [b["time"] - a["time"] for a, b in pairwise(lines)]
    assert sum(change < -DAY / 2 for change in changes) == 2
    assert all(line["train/samples_per_second"] > 0 for line in lines)
    assert all(0 <= line["train/data_wait_fraction"] <= 1 for line in lines)
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert names == ["step-00000044", "step-00000045"]
    assert json.loads((run / "status.json").read_text())["state"] == "done"


def test_fetched_files_of_a_clock_that_was_ahead(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that could not be fetched is tried again, and the stale go before the used."""
    monkeypatch.setenv("LEANCLIP_CACHE", str(workplace / "cache"))
    make_pairs(workplace / "served")
    with serving(workplace / "served") as server:
        urls = [f"{server.url}/{name}.tar" for name in "abc"]
        with pytest.raises(SampleError, match="404"):
            shard_cache.fetched_shard(urls[0], 1e9)
        with pytest.raises(SampleError, match="404"):  # it is not asked for again so soon
            shard_cache.fetched_shard(urls[0], 1e9)
        assert len(server.asked) == 1
        ahead = time.time() + DAY
        for path in (workplace / "cache").rglob("*.failed"):
            os.utime(path, (ahead, ahead))
        for name in "abc":
            (workplace / f"served/{name}.tar").write_bytes(bytes(1000))
        first = shard_cache.fetched_shard(urls[0], 1e9)
        os.utime(first, (ahead, ahead))
        second = shard_cache.fetched_shard(urls[1], 1e9)
        third = shard_cache.fetched_shard(urls[2], 2000)
        assert [path.exists() for path in (first, second, third)] == [False, True, True]
