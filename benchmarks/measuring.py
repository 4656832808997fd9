"""What all benchmarks share: options, turns, the gate before timing, memory, the record in JSON.

    options -> gate: outputs agree, else no figure -> in_turn: A B A B ... -> record -> JSON

A file holds a list of records, each with its machine, versions, commit and command: parts that are
measured at different times, or before and after a change, stand side by side (`--add`).
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from leanclip.training.monitor import peak_memory

HERE = Path(__file__).parent
ROUNDS = 5
PRODUCTS = 8
PEERS = (
    "transformers",
    "open_clip_torch",
    "numpy",
    "pillow",
    "simplejpeg",
    "faiss-cpu",
    "usearch",
    "ftfy",
)
STARTED = time.time()


class NotTheSame(AssertionError):
    """Two ways that are to be compared give different results: there is no figure."""


def options(doc: str | None, **more: Any) -> argparse.ArgumentParser:
    """The options of every benchmark; `more` are defaults of them."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each way, in turn")
    parser.add_argument("--threads", type=int, help="of PyTorch; its own choice by default")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="sizes of a moment: figures mean nothing"
    )
    parser.add_argument("--out", type=Path, help="file of records; else they are printed")
    parser.add_argument("--add", action="store_true", help="keep the records that are in the file")
    parser.add_argument("--note", default="", help="a word on what was measured, for the table")
    parser.add_argument("--once", nargs="*", help=argparse.SUPPRESS)  # in a process of its own
    parser.set_defaults(**more)
    return parser


def chosen(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line; sets PyTorch's threads."""
    options = parser.parse_args(words)
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def finish(results: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Print the record, or write it to its file."""
    record = {**facts(options), "results": results}
    if options.out is None:
        print(json.dumps(record, indent=1))
        return
    kept = []
    if options.add and options.out.exists():
        kept = json.loads(options.out.read_text())
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(json.dumps([*kept, record], indent=1) + "\n")
    temporary.replace(options.out)


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """Where, with what and when a record was measured."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PEERS:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    script, words = Path(sys.argv[0]), list(sys.argv[1:])
    for name, count in (("--out", 2), ("--add", 1), ("--note", 2)):  # say nothing of the figures
        if name in words:
            del words[words.index(name) : words.index(name) + count]
    is_script = script.resolve().parent == HERE
    commit, is_dirty = _commit()
    return {
        "machine": machine(options.device),
        "versions": versions,
        "commit": commit,
        "dirty": is_dirty,
        "command": " ".join(["python", f"benchmarks/{script.name}", *words]) if is_script else None,
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "seconds": round(time.time() - STARTED),
        "note": options.note,
    }


def machine(device: str = "cpu") -> dict[str, Any]:
    """The processor, its cores, PyTorch's threads, memory, and what else was running."""
    found = None
    with suppress(OSError):
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    about: dict[str, Any] = {
        "processor": found[1].strip() if found else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_average": round(os.getloadavg()[0], 1),
    }
    if device.startswith("cuda"):
        about["gpu"] = torch.cuda.get_device_name(device)
    return about


def _commit() -> tuple[str | None, bool | None]:
    """The commit, and whether what runs here differs from it; the records themselves may."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, check=False, cwd=HERE.parent
        )
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    if not commit:
        return None, None
    changed = git("status", "--porcelain", "--", "src", "benchmarks/*.py", "configs")
    return commit, bool(changed)


def agree(
    ours: torch.Tensor | Mapping[str, torch.Tensor],
    theirs: torch.Tensor | Mapping[str, torch.Tensor],
    bound: float,
    what: str,
) -> float:
    """The gate: the norm of the difference over the norm of all values, within the bound.

    Raises:
        NotTheSame: it is over the bound, not finite, or a part is missing.
    """
    if isinstance(ours, torch.Tensor) or isinstance(theirs, torch.Tensor):
        assert isinstance(ours, torch.Tensor)
        assert isinstance(theirs, torch.Tensor)
        ours, theirs = {"": ours}, {"": theirs}
    if ours.keys() != theirs.keys():
        raise NotTheSame(f"{what}: only one of them has {sorted(ours.keys() ^ theirs.keys())}")
    if wrong := [name for name, value in ours.items() if value.shape != theirs[name].shape]:
        raise NotTheSame(f"{what}: other shapes of {wrong}")
    apart = sum(
        float((a.double().cpu() - theirs[name].double().cpu()).square().sum())
        for name, a in ours.items()
    )
    size = sum(float(value.double().square().sum()) for value in theirs.values())
    difference = (apart / size) ** 0.5 if size else apart**0.5
    if not difference <= bound:  # not a number is refused too
        raise NotTheSame(f"{what}: the difference is {difference:.2g}, the bound {bound:.2g}")
    return difference


def in_turn(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    warm: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each way in each round, A B A B ...; rounds before the first are not counted.

    Args:
        ways: what is called.
        rounds: how often each is.
        device: what is waited for before and after.
        clock: `time.process_time` where other work runs beside.
        warm: rounds before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + warm):
        for name, run in ways.items():
            wait_for(device)
            start = clock()
            run()
            wait_for(device)
            if number >= warm:
                seconds[name].append(clock() - start)
    return seconds


def compared(
    ways: Mapping[str, Callable[[], object]], rounds: int, first: str = "leanclip", **more: Any
) -> dict[str, Any]:
    """Seconds of each way, median and spread, and the others' over the first one's."""
    seconds = in_turn(ways, rounds, **more)
    return {
        "seconds": {name: spread(taken) for name, taken in seconds.items()},
        "ratios": ratios(seconds, first),
    }


def wait_for(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, least and greatest, to so many digits."""
    return {
        "median": significant(statistics.median(values), digits),
        "least": significant(min(values), digits),
        "greatest": significant(max(values), digits),
    }


def ratios(seconds: Mapping[str, Sequence[float]], first: str) -> dict[str, dict[str, Any]]:
    """Of each other way: its time over the first one's, in each round."""
    found = {}
    for name, taken in seconds.items():
        if name != first:
            each = [b / a for a, b in zip(seconds[first], taken, strict=True)]
            found[name] = spread(each) | {"rounds": [significant(ratio) for ratio in each]}
    return found


def significant(value: float, digits: int = 4) -> float:
    """Rounded to so many digits."""
    return float(f"{value:.{digits}g}")


def peak_bytes() -> int:
    """The most resident memory of this process, mapped files included."""
    return round(peak_memory(torch.device("cpu")) * 1e9)


def resident_bytes(process: int | str = "self", field: str = "VmRSS") -> int:
    """Resident memory of a process now (VmRSS), or only its own (RssAnon)."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def in_own_process(script: str, *words: object, **environment: str) -> Any:
    """What `script --once WORDS` prints as its last line, in a fresh process."""
    done = subprocess.run(
        [sys.executable, script, "--once", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    if done.returncode:
        raise RuntimeError(f"{script} {words}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def command_line(*words: str) -> list[str]:
    """`leanclip` with these words, by the Python that runs this."""
    return [sys.executable, "-c", "from leanclip.cli.main import main; main()", *words]


def product_rate(
    device: str, dtype: torch.dtype, size: int | None = None
) -> tuple[Callable[[], None], int]:
    """Eight products of square matrices, large ones by default, and their FLOPs."""
    size = size or (8192 if device.startswith("cuda") else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> None:
        for _ in range(PRODUCTS):  # one alone is too short to be compared with a step
            torch.mm(a, b, out=out)

    return run, PRODUCTS * 2 * size**3
