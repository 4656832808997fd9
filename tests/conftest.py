"""Shared by the tests: tiny models, small data sets, and the command line as a process."""

import contextlib
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from leftovers import Leftovers, watched
from PIL import Image

from leanclip.config.data import DataConfig
from leanclip.config.schema import Config
from leanclip.config.strict_yaml import dump_yaml
from leanclip.data import open_dataset
from leanclip.data.batch import Batch, Position
from leanclip.data.loader import training_batches
from leanclip.errors import LeanclipError
from leanclip.evaluation import Task, open_tasks
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.text import Tokenizer
from leanclip.preprocess.tokenizer import tokenize
from leanclip.weights import save_weights

# Models this small gain nothing from a second thread, which slows down parallel tests.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

Command = Callable[..., subprocess.CompletedProcess[str]]
DATA = Path(__file__).parent / "golden"
PROJECT = Path(__file__).parent.parent

CLASSES = ("ant", "bee", "cow", "dog", "eel")
TINY = {  # a model that runs in milliseconds
    "embed_dim": 16,
    "image_resolution": 32,
    "vision_layers": 2,
    "vision_width": 32,
    "vision_heads": 2,
    "vision_patch_size": 8,
    "context_length": 24,
    "vocab_size": 49408,
    "transformer_width": 32,
    "transformer_heads": 2,
    "transformer_layers": 2,
}


def run_cli(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `leanclip` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from leanclip.cli.main import main; main()", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=600,
        check=False,
    )


class Forked:
    """`leanclip` as a fork of this process, which has imported torch already.

    It has its own session; its output goes to a file.

    Args:
        words: the command line.
        folder: the folder of the output file.
        environment: additional variables.
        before: called first in the process.
    """

    def __init__(
        self,
        *words: str,
        folder: Path,
        environment: dict[str, str] | None = None,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        for name in ("leanclip.training.loop", "torch._dynamo", "torch.utils.tensorboard"):
            import_module(name)  # or each fork does, which takes a second
        tokenize("a")  # reads the vocabulary
        self.folder = folder
        number = len(list(folder.glob("*.said")))
        self._file = folder / f"{number}.said"
        self._file.touch()

        def work() -> None:
            from leanclip.cli.main import main

            os.setsid()
            sys.stdout = sys.stderr = self._file.open("w", buffering=1)
            os.environ.update(environment or {})
            before()
            main(words)

        self._process = multiprocessing.get_context("fork").Process(target=work)
        self._process.start()
        self.pid = self._process.pid or 0

    def send(self, number: int) -> None:
        """Send it a signal, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def send_all(self, number: int) -> None:
        """Send a signal to its whole group, as a terminal and some schedulers do."""
        os.killpg(self.pid, number)

    def is_running(self) -> bool:
        """Whether it is running."""
        return self._process.is_alive()

    def kill_after(self, is_so: Callable[[], object], seconds: float, *, all_of_it: bool) -> bool:
        """Kill it, or its whole group, some time after a condition; false if it had finished."""
        deadline = time.monotonic() + 120
        while self.is_running() and not is_so():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):  # it has ended just now
            (self.send_all if all_of_it else self.send)(signal.SIGKILL)
        code = self.code()
        assert code in (0, -signal.SIGKILL), self.output()
        return code != 0

    def until(self, is_so: Callable[[], object]) -> None:
        """Wait for a condition while it runs."""
        deadline = time.monotonic() + 120
        while not is_so():
            # asked again after the end: it may have come true and ended between the two questions
            assert self._process.is_alive() or is_so(), f"it ended: {self.output()}"
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def code(self) -> int:
        """Wait for its end; the exit code, or minus the signal that ended it."""
        self._process.join(120)
        if self._process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f"it does not end: {self.output()}")
        return self._process.exitcode

    def output(self) -> str:
        """Its output so far."""
        return self._file.read_text()


def fork_ranks(
    world_size: int, *words: str, folder: Path, own: Sequence[Sequence[str]] = ()
) -> list[Forked]:
    """The ranks of a job, as torchrun would start them; `own`: additional words of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = (*words, "--num-gpus", "0")
    numbers = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    return [
        Forked(*words, *more, folder=folder, environment=shared | number)
        for number, more in zip(numbers, own or [()] * world_size, strict=True)
    ]


def tries(default: int) -> int:
    """Repetitions of a slow test: the variable LEANCLIP_TRIES, or `default`."""
    return int(os.environ.get("LEANCLIP_TRIES", default))


def some_of(names: Iterable[str], *quick: str) -> list[Any]:
    """Parameters of a test; those that are not quick are marked slow."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


def weights_hash(run: Path) -> str:
    """SHA-256 of the newest checkpoint's weights."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """A user's mistake: exit code 2, and a last line that contains every word."""
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in last, last


def noise_image(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """An image of random blocks, different for each seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def make_pairs(root: Path, count: int = 12) -> Path:
    """A `pairs` folder of `count` noise images."""
    root.mkdir(parents=True)
    for i in range(count):
        noise_image(i).save(root / f"{i:03d}.png")
        (root / f"{i:03d}.txt").write_text(f"picture number {i}\nimage {i}\n")
    return root


def make_config(path: Path, **sections: Any) -> Path:
    """A config file of the tiny model on pairs in `data`; sections are merged into it."""
    values: dict[str, Any] = {
        "model": dict(TINY),
        "data": {"format": "pairs", "root": "data", "workers": 0},
        "train": {"epochs": 2, "batch_size": 4, "log_every": 1},
        "optimizer": {"learning_rate": 1e-3},
        "evaluate": {"retrieval": {}, "pictures": False},  # those take most of the time
    }
    for name, section in sections.items():
        both = isinstance(section, dict) and name in values
        values[name] = values[name] | section if both else section
    path.write_text(dump_yaml(values))
    return path


def configured_tasks(config: Config) -> list[Task]:
    """The opened tasks of a configuration."""
    return open_tasks(config.data, config.evaluate)


def report_of(folder: Path) -> dict[str, Any]:
    """The report.json of an evaluation."""
    return json.loads((folder / "report.json").read_text())


def make_model(folder: Path, **changes: Any) -> Path:
    """A folder with weights of the tiny model."""
    torch.manual_seed(1)
    model = CLIP(**TINY | changes)
    folder.mkdir(parents=True)
    save_weights(folder, model.state_dict(), model.config, Preprocess(32))
    return folder


def make_table(root: Path, count: int) -> Path:
    """Two tables of `count` small images: with captions, some repeated, and with classes."""
    root.mkdir()
    lines = []
    for i in range(count):
        Image.new("RGB", (8, 8), (i % 256, i * 7 % 256, i // 256)).save(root / f"{i}.bmp")
        lines.append((f"{i}.bmp", f"picture {i % 700} of them", CLASSES[i % 5]))
    for name, place in (("caption", 1), ("label", 2)):
        rows = [f"image,{name}", *(f"{line[0]},{line[place]}" for line in lines)]
        (root / f"{name}.csv").write_text("\n".join(rows) + "\n")
    return root


def ranks_of(world_size: int, work: Callable[[int], object], folder: Path) -> list[Any]:
    """The results of `work(rank)` in `world_size` processes of a gloo group."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def run(rank: int) -> None:
        store = f"file://{folder}/store-{world_size}"
        if world_size > 1:
            torch.distributed.init_process_group(
                "gloo", init_method=store, rank=rank, world_size=world_size
            )
        try:
            queue.put((rank, work(rank), None))
        except BaseException:
            queue.put((rank, None, traceback.format_exc()))
        if world_size > 1:
            torch.distributed.destroy_process_group()

    processes = [context.Process(target=run, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    results = {}
    for _ in processes:
        rank, result, error = queue.get()
        if error is not None:
            for process in processes:
                process.kill()
            raise AssertionError(f"rank {rank}: {error}")
        results[rank] = result
    for process in processes:
        process.join()
    return [results[rank] for rank in range(world_size)]


def small_batches(
    settings: DataConfig, *, batch_size: int, start: Position, **more: Any
) -> Iterator[tuple[Batch, Position]]:
    """The training stream of a data set, of small images and short captions."""
    return training_batches(
        open_dataset(settings),
        settings,
        preprocess=Preprocess(16),
        tokenizer=Tokenizer(12),
        truncate=True,
        batch_size=batch_size,
        seed=3,
        start=start,
        **more,
    )


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with `data` of twelve pairs and `config.yaml`."""
    monkeypatch.chdir(tmp_path)
    make_pairs(tmp_path / "data")
    make_config(tmp_path / "config.yaml")
    return tmp_path


@pytest.fixture
def left(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Leftovers]:
    """Checks at the end, and at `left.check()`, that killed processes have left nothing behind."""
    with watched(workplace) as leftovers:
        monkeypatch.setenv("TMPDIR", str(leftovers.temporary))
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield leftovers


@pytest.fixture
def command(workplace: Path) -> Command:
    """`command("train", "-c", ...)` in the workplace, as `run_cli` but in this process.

    A new process takes seconds to import torch; tests of processes use `run_cli` or `Forked`.
    """
    from leanclip.cli.main import main

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main(arguments)
            except SystemExit as end:
                code = int(end.code or 0)
            except LeanclipError:
                traceback.print_exc()
                code = 1
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())

    return run


@contextlib.contextmanager
def terminal(columns: int = 100) -> Iterator[Callable[[], str]]:
    """Print to a terminal; call the value after the block for what it shows."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    shown: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(reader, 65536):
                shown.append(part)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        with (
            open(writer, "w") as stream,  # noqa: PTH123, a descriptor
            contextlib.redirect_stdout(stream),
            contextlib.redirect_stderr(stream),
        ):
            yield lambda: b"".join(shown).decode()
    finally:
        thread.join()
        os.close(reader)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what cannot be encoded, such as file names: pytest-xdist sends reports as UTF-8."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report
