"""A long run with bad samples, evaluations, ends and resumes: does anything grow?

    OMP_NUM_THREADS=1 python benchmarks/soak.py FOLDER --seconds 600 > benchmarks/soak.json

The real command line trains a tiny model on 400 pictures, of which 1% are broken, with a data
worker, an evaluation and a checkpoint after each epoch of 25 steps, and metrics at every step. At
the end of each piece it is ended, by SIGTERM and SIGKILL in turn, and the next piece takes it up
again. Called again with the same FOLDER it goes on with more pieces and reports on all of them.

While it runs, /proc is read once a second for the process and all that it started: memory that is
theirs alone (RssAnon) and shared (RssShmem), open files, threads, child processes, zombies. An
evaluation starts workers of its own and takes memory for a moment, so what counts is the least that
was there in each tenth of a piece, after its first WARM_UP steps:

- a line through the least memory, with a height of its own in each piece, gives the growth per
  1000 steps: at most LIMIT KiB, or three standard errors of that growth where they are more;
- the least number of files, threads, children and zombies must be no more in the second half of a
  piece than in the first, and that of files in the run's folder no more after any than the first.

Exit code 1 where anything grows.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

PAIRS, BATCH = 400, 16
WARM_UP = 500  # steps
TENTHS = 10
LIMIT = 100  # KiB per 1000 steps
MEMORY = ("main_kib", "others_kib", "shared_kib")
COUNTS = ("files", "threads", "children", "zombies")
MODEL = {
    "embed_dim": 16, "image_resolution": 32, "vision_layers": 2, "vision_width": 32,
    "vision_heads": 2, "vision_patch_size": 8, "context_length": 24, "vocab_size": 49408,
    "transformer_width": 32, "transformer_heads": 2, "transformer_layers": 2,
}  # fmt: skip
CONFIG = {
    "model": MODEL,
    "data": {"format": "pairs", "root": "data", "workers": 1, "max_bad_fraction": 0.02},
    "train": {"epochs": 100_000, "batch_size": BATCH, "log_every": 1},
    "optimizer": {"learning_rate": 1e-4},
    "checkpoint": {"every_epochs": 1, "keep": 2},
    "evaluate": {
        "every_epochs": 1,
        "pictures": False,
        "retrieval": {"limit": 100},
        "zero_shot": {"format": "folder", "root": "classes"},
    },
}
MAIN = "from leanclip.cli.main import main; main()"


@dataclass
class Sample:
    """What a process and all that it started held at a moment."""

    seconds: float  # since the piece began
    step: int
    main_kib: int  # RssAnon of the first process
    others_kib: int  # of its children together
    shared_kib: int  # RssShmem of all
    files: int
    threads: int
    children: int
    zombies: int


def tree(first: int) -> list[int]:
    """A process and all that it started, and they."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found = [first]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def look(first: int, began: float, step: int) -> Sample | None:
    """Read /proc once; None where a process ended meanwhile."""
    memory, shared, files, threads, zombies = [], 0, 0, 0, 0
    processes = tree(first)
    try:
        for process in processes:
            status = Path(f"/proc/{process}/status").read_text()
            if "State:\tZ" in status:
                zombies += 1
                continue
            memory.append(_number("RssAnon", status))
            shared += _number("RssShmem", status)
            threads += _number("Threads", status)
            files += len(list(Path(f"/proc/{process}/fd").iterdir()))
    except OSError:
        return None
    if not memory:
        return None
    return Sample(
        round(time.monotonic() - began, 2), step, memory[0], sum(memory[1:]), shared, files,
        threads, len(processes) - 1 - zombies, zombies,
    )  # fmt: skip


def _number(name: str, status: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+)", status, re.MULTILINE)
    return int(found[1]) if found else 0


# --- what runs


def draw(folder: Path) -> None:
    """The data: 400 pairs, of which four are broken, each in its way; and 40 images by class."""
    rng = np.random.default_rng(0)

    def picture() -> Image.Image:
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(blocks).resize((48, 40))

    (folder / "data").mkdir(parents=True)
    for i in range(PAIRS):
        path = folder / f"data/{i:03d}.jpg"
        picture().save(path)
        path.with_suffix(".txt").write_text(f"picture number {i}\nimage {i}\n")
    whole = (folder / "data/050.jpg").read_bytes()
    (folder / "data/050.jpg").write_bytes(whole[: len(whole) // 2])  # cut short
    (folder / "data/150.jpg").write_bytes(b"")
    (folder / "data/250.jpg").write_bytes(b"<html>not found</html>")
    (folder / "data/350.txt").write_text("\n")  # no caption
    for i in range(40):
        place = folder / "classes" / ("ant", "bee", "cow", "dog")[i % 4]
        place.mkdir(parents=True, exist_ok=True)
        picture().save(place / f"{i}.jpg")
    (folder / "config.yaml").write_text(json.dumps(CONFIG))  # JSON is YAML


class Training:
    """`leanclip train`; its step is that of metrics.jsonl."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder = folder
        self.words = ["train", "-c", "config.yaml", "--output-dir", "run"]
        if ranks > 1:
            self.words += ["--num-procs", str(ranks)]
        self.log = folder / "run/metrics.jsonl"

    def start(self) -> subprocess.Popen[bytes]:
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", MAIN, *self.words],
                cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def step(self) -> int:
        """The step that it wrote last, 0 if none."""
        if not self.log.is_file():
            return 0
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 4000))
            lines = file.read().split(b"\n")
        whole = [line for line in lines if line.startswith(b'{"step"') and line.endswith(b"}")]
        return int(json.loads(whole[-1])["step"]) if whole else 0

    def kept(self) -> int:
        """The files of the run's folder; of TensorBoard's each start has one, they do not count."""
        everything = (self.folder / "run").rglob("*")
        return sum(p.is_file() and "tensorboard" not in p.parts for p in everything)


def watch(training: Training, seconds: float, number: int) -> tuple[list[Sample], int]:
    """One piece: start, read /proc until the time is over, end it; the samples and its exit code.

    The even ones end by SIGTERM, the odd ones by SIGKILL of all processes.
    """
    process = training.start()
    began, samples = time.monotonic(), []
    try:
        while time.monotonic() - began < seconds and process.poll() is None:
            found = look(process.pid, began, training.step())
            samples += [found] if found else []
            time.sleep(min(1, seconds / 60))
        if process.poll() is None and number % 2 == 0:
            process.terminate()
            process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return samples, process.returncode


# --- what is made of it


def after_warm_up(samples: list[Sample], steps: int) -> list[Sample]:
    """From so many steps after the first step of this piece."""
    moving = [sample for sample in samples if sample.step > samples[0].step]
    return [sample for sample in moving if sample.step >= moving[0].step + steps]


def growth(pieces: list[list[Sample]], name: str) -> tuple[float, float]:
    """KiB per 1000 steps of one line through the least of each stretch, and its standard error.

    Each piece has a height of its own.
    """
    steps, values = [], []  # of the stretches, each less its piece's mean
    for piece in pieces:
        parts = stretches(piece)
        x = np.array([np.mean([sample.step for sample in part]) for part in parts])
        y = np.array([min(getattr(sample, name) for sample in part) for part in parts])
        steps.append(x - x.mean())
        values.append(y - y.mean())
    dx, dy = np.concatenate(steps), np.concatenate(values)
    slope = float((dx * dy).sum() / (dx**2).sum())
    freedom = max(1, len(dx) - len(pieces) - 1)
    error = float(np.sqrt(((dy - slope * dx) ** 2).sum() / freedom / (dx**2).sum()))
    return 1000 * slope, 1000 * error


def stretches(piece: list[Sample]) -> list[list[Sample]]:
    """A piece in TENTHS parts of as many samples."""
    return [[piece[i] for i in part] for part in np.array_split(np.arange(len(piece)), TENTHS)]


def halves(piece: list[Sample], name: str) -> tuple[int, int]:
    """The least of it in the first half of a piece and in the second."""
    values = [getattr(sample, name) for sample in piece]
    return min(values[: len(values) // 2]), min(values[len(values) // 2 :])


@dataclass
class Piece:
    """What a piece of the run came to."""

    code: int  # its exit code, below 0 a signal
    kept: int  # files in the run's folder after it
    samples: list[Sample]


def report(pieces: list[Piece], warm_up: int = WARM_UP) -> dict:
    """The judgement, with its numbers."""
    warm = [after_warm_up(piece.samples, warm_up) for piece in pieces]
    used = [some for some in warm if len(some) >= TENTHS]
    if not used:
        raise SystemExit(f"no piece lasted longer than its warm-up of {warm_up} steps")
    grows, memory, counts = [], {}, {}
    for name in MEMORY:
        slope, error = growth(used, name)
        all_of_it = [getattr(sample, name) for some in used for sample in some]
        memory[name] = {
            "KiB per 1000 steps": round(slope, 1),
            "standard error": round(error, 1),
            "least": min(all_of_it),
            "most": max(all_of_it),
        }
        if slope > max(LIMIT, 3 * error):
            grows.append(f"{name}: {slope:.0f} KiB per 1000 steps")
    for name in COUNTS:
        both = [halves(some, name) for some in used]
        counts[name] = {"first half": [a for a, _ in both], "second half": [b for _, b in both]}
        if any(after > before for before, after in both):
            grows.append(f"{name}: {both}")
    kept = [piece.kept for piece in pieces]
    if max(kept[1:], default=0) > kept[0]:
        grows.append(f"files in the run's folder: {kept}")
    wanted = [-signal.SIGKILL if i % 2 else 128 + signal.SIGTERM for i in range(len(pieces))]
    if [piece.code for piece in pieces] != wanted:
        grows.append(f"exit codes {[piece.code for piece in pieces]}, not {wanted}")
    steps = pieces[-1].samples[-1].step
    return {
        "pieces": len(pieces),
        "minutes": round(sum(piece.samples[-1].seconds for piece in pieces) / 60, 1),
        "steps": steps,
        "epochs and evaluations": steps // (PAIRS // BATCH),
        "samples of /proc after the warm-up": sum(map(len, used)),
        "memory": memory,
        "counts": counts,
        "files in the run's folder": kept,
        "exit codes": [piece.code for piece in pieces],
        "limit, KiB per 1000 steps": LIMIT,
        "grows": grows,
        "passes": not grows,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=600, help="of all pieces")
    parser.add_argument("--pieces", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="steps of each piece")
    settings = parser.parse_args()
    folder = settings.folder
    if not (folder / "config.yaml").is_file():
        draw(folder)
    training = Training(folder, settings.ranks)
    path = folder / "pieces.jsonl"
    before = len(path.read_text().splitlines()) if path.is_file() else 0
    for number in range(before, before + settings.pieces):
        samples, code = watch(training, settings.seconds / settings.pieces, number)
        piece = Piece(code, training.kept(), samples)
        with path.open("a") as file:
            file.write(json.dumps(asdict(piece)) + "\n")
    pieces = []
    for line in path.read_text().splitlines():
        facts = json.loads(line)
        facts["samples"] = [Sample(**sample) for sample in facts["samples"]]
        pieces.append(Piece(**facts))
    found = report(pieces, settings.warm_up)
    print(json.dumps({"ranks": settings.ranks, **found}, indent=1))
    sys.exit(0 if found["passes"] else 1)


if __name__ == "__main__":
    main()
