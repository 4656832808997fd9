"""Killed at any moment, a command goes on: the same bits, nothing lost, nothing left."""

import hashlib
import io
import json
import random
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, Forked, make_model, noise_image, tries, weights_hash
from leftovers import Leftovers
from web import PIECE, Server, serving

import leanclip
from leanclip.inference.embeddings import read_embeddings
from leanclip.io.files import read_metrics
from leanclip.training import checkpoint

OPTIONS = (
    "train", "-c", "config.yaml", "-o", "evaluate.retrieval=null", "-o", "checkpoint.every_steps=1",
)  # fmt: skip


def is_being_written(run: Path) -> bool:
    return any(run.glob("checkpoints/.step-*.tmp"))


@pytest.mark.parametrize("kills", [2, pytest.param(tries(20), marks=pytest.mark.slow)])
def test_training(command: Command, workplace: Path, left: Leftovers, kills: int) -> None:
    """Every second kill is in the midst of a checkpoint, every third of all its processes."""
    options = (*OPTIONS, "-o", f"train.epochs={2 * kills}", "-o", "data.workers=1")
    command(*options, "--output-dir", "whole")
    run, chance, in_the_middle = workplace / "run", random.Random(7), 0
    for kill in range(kills):
        process = Forked(*options, "--output-dir", "run", folder=workplace)
        lines = len(read_metrics(run))
        process.until(lambda before=lines: len(read_metrics(run)) > before)  # it has gone on
        if kill % 2:
            process.until(lambda: is_being_written(run))
        time.sleep(chance.uniform(0, 0.04))  # of the order of a step with its checkpoint
        (process.send_all if kill % 3 else process.send)(signal.SIGKILL)
        assert process.code() == -signal.SIGKILL
        left.check(goes_on=True)
        in_the_middle += is_being_written(run)
        found, skipped = checkpoint.newest(run / "checkpoints")
        assert skipped == []  # what has the name of a step is whole
        assert found is not None or kill == 0
    print(f"training: {kills} kills, {in_the_middle} in the midst of a checkpoint")
    assert in_the_middle > 0
    done = command(*options, "--output-dir", "run")
    assert done.returncode == 0, done.stderr
    assert weights_hash(run) == weights_hash(workplace / "whole")
    assert [line["train/loss"] for line in read_metrics(run)] == [
        line["train/loss"] for line in read_metrics(workplace / "whole")
    ]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "latest",
        f"step-{kills * 6 - 1:08d}",
        f"step-{kills * 6:08d}",
    ]


def kill_often(
    words: tuple[str, ...],
    kills: int,
    made: Callable[[], list[Path]],
    left: Leftovers,
    chance: Iterator[float],
) -> Iterator[list[Path]]:
    """What a command has made at each kill, which comes when it has made something more.

    Every third is not of all its processes. What was there before stays as it is.
    """
    kept: dict[Path, int] = {}
    for kill in range(kills):
        process = Forked(*words, folder=left.folder)
        assert process.kill_after(
            lambda before=kept: len(made()) > len(before), next(chance), all_of_it=kill % 3 > 0
        )
        left.check(goes_on=True)
        for path, changed in kept.items():
            assert path.stat().st_mtime_ns == changed, "a finished shard was made again"
        kept = {path: path.stat().st_mtime_ns for path in made()}
        yield list(kept)


def up_to(seconds: float, seed: int) -> Iterator[float]:
    """Random times."""
    chance = random.Random(seed)
    while True:
        yield chance.uniform(0, seconds)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("kills", [3, pytest.param(tries(12), marks=pytest.mark.slow)])
def test_packing(command: Command, workplace: Path, left: Leftovers, kills: int) -> None:
    (workplace / "large").mkdir()
    for i in range(12 * kills):
        noise_image(i, (600, 500)).save(workplace / f"large/{i:03d}.jpg")
        (workplace / f"large/{i:03d}.txt").write_text(f"picture number {i}\n")
    words = ("data", "pack", "pairs:large", "killed", "--shard-size", "3", "--workers", "2")
    packed, killed, half = workplace / "killed", 0, 0

    def made() -> list[Path]:  # a record is written after its shard
        return [path.with_suffix(".tar") for path in packed.glob("0*.json")]

    for _ in kill_often(words, kills, made, left, up_to(0.03, 3)):
        killed += 1
        half += any(packed.glob("*.part"))
    print(f"packing: {killed} kills, {half} in the midst of a shard")
    assert killed == kills
    assert command(*words).returncode == 0
    assert command(*words[:3], "whole", *words[4:-1], "0").returncode == 0
    assert digests(packed) == digests(workplace / "whole")
    assert len(digests(packed)) == 4 * kills + 1


@pytest.mark.parametrize("kills", [3, pytest.param(tries(12), marks=pytest.mark.slow)])
def test_embedding(workplace: Path, left: Leftovers, kills: int) -> None:
    make_model(workplace / "tiny")
    for i in range(10 * kills):
        noise_image(i).save(workplace / f"data/more-{i:03d}.png")
    count = 12 + 10 * kills
    words = ("embed", "data", "--model", "tiny", "--out", "out", "--shard-size", "2")
    words = (*words, "--batch-size", "1", "--num-gpus", "0")
    out, killed, kept = workplace / "out", 0, []
    for kept in kill_often(words, kills, lambda: list(out.glob("0*.npy")), left, up_to(0.01, 5)):
        killed += 1
        for path in kept:
            assert np.load(path).shape[0] == len(
                json.loads(path.with_suffix(".ids.json").read_text())
            )
    print(f"embedding: {killed} kills")
    assert killed == kills
    last = Forked(*words, folder=workplace)
    assert last.code() == 0, last.output()
    assert f"{len(kept)} of {count // 2} shards are finished" in last.output()
    ids, features = read_embeddings(out)
    paths = sorted(workplace.glob("data/*.png"))
    assert ids == [path.name for path in paths]
    expected = leanclip.load("tiny").embed_images(paths)
    np.testing.assert_allclose(features, expected, atol=1e-6)


@pytest.fixture
def server(workplace: Path) -> Iterator[Server]:
    """It serves a small food-101.tar, slowly."""
    (workplace / "served").mkdir()
    names = [f"apple_pie/{i}" for i in range(20)]
    files = {f"images/{name}.jpg": jpeg(i) for i, name in enumerate(names)}
    files |= {"meta/train.txt": "\n".join(names).encode(), "meta/classes.txt": b"apple_pie\n"}
    with tarfile.open(workplace / "served/food-101.tar", "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"food-101/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with serving(workplace / "served") as server:
        yield server


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    noise_image(seed, (300, 200)).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.mark.parametrize("kills", [3, pytest.param(tries(12), marks=pytest.mark.slow)])
def test_downloading(server: Server, workplace: Path, left: Leftovers, kills: int) -> None:
    archive = workplace / "served/food-101.tar"
    checksum = hashlib.md5(archive.read_bytes()).hexdigest()
    words = ("data", "food101", "food/food-101", "--url", f"{server.url}/food-101.tar")
    words = (*words, "--checksum", checksum)
    fetched, chance, killed = workplace / "food/food-101.tar", random.Random(9), 0
    part = workplace / "food/food-101.tar.part"
    server.pause = 0.15 * kills / (archive.stat().st_size / PIECE)
    have: list[int] = []  # at each start that asked for more
    while killed < kills:
        if not fetched.exists() and not (workplace / "food/food-101").exists():
            have.append(part.stat().st_size if part.exists() else 0)
        asked = len(server.asked)
        process = Forked(*words, folder=workplace)
        if not process.kill_after(
            lambda before=asked: len(server.asked) > before or fetched.exists(),
            chance.uniform(0, 0.2),
            all_of_it=False,
        ):
            break
        killed += 1
        left.check(goes_on=True)
    print(f"downloading: {killed} kills, at {have[1:]} of {archive.stat().st_size} bytes")
    assert killed >= kills / 2
    assert have == sorted(have), "what had come was thrown away"
    if not fetched.exists() and not (workplace / "food/food-101").exists():
        have.append(part.stat().st_size)
    last = Forked(*words, folder=workplace)
    assert last.code() == 0, last.output()
    assert [wanted for _, wanted in server.asked] == [
        f"bytes={size}-" if size else None for size in have
    ]
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            assert (workplace / "food" / member.name).read_bytes() == file.read()
    assert sorted(path.name for path in (workplace / "food").iterdir()) == ["food-101"]
