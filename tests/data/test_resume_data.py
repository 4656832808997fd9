"""Every format: a stream whose process is killed goes on with the very next sample."""

import json
import multiprocessing
import os
import signal
import tarfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from conftest import make_pairs, noise_image

from leanclip.config.data import DataConfig
from leanclip.data import Dataset, open_dataset
from leanclip.data.batch import Position
from leanclip.data.loader import training_batches
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.text import Tokenizer

COUNT = 24


def make_folder(root: Path) -> dict[str, object]:
    for i in range(COUNT):
        path = root / f"class_{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(i).save(path)
    return {"format": "folder", "root": str(root)}


def make_pairs_source(root: Path) -> dict[str, object]:
    return {"format": "pairs", "root": str(make_pairs(root, COUNT))}


def make_table(root: Path) -> dict[str, object]:
    make_pairs(root, COUNT)
    rows = (json.dumps({"image": f"{i:03d}.png", "caption": f"number {i}"}) for i in range(COUNT))
    (root / "train.jsonl").write_text("\n".join(rows))
    return {"format": "table", "root": str(root)}


def make_shards(root: Path) -> dict[str, object]:
    make_pairs(root / "pairs", COUNT)
    for shard in range(4):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for i in range(6 * shard, 6 * shard + 6):
                for suffix in ("png", "txt"):
                    tar.add(root / "pairs" / f"{i:03d}.{suffix}", f"{i:03d}.{suffix}")
    return {"format": "shards", "root": str(root), "shuffle_buffer": 7}


def make_stream(root: Path) -> dict[str, object]:
    import datasets

    make_pairs(root / "pairs", COUNT)
    (root / "parquet").mkdir()
    for shard in range(3):
        rows = [
            {"image": (root / f"pairs/{i:03d}.png").read_bytes(), "caption": f"number {i}"}
            for i in range(8 * shard, 8 * shard + 8)
        ]
        table = datasets.Dataset.from_list(rows)
        table.to_parquet(root / f"parquet/train-0000{shard}-of-00003.parquet")
    return {
        "format": "hub",
        "root": str(root / "parquet"),
        "streaming": True,
        "epoch_size": COUNT,
        "shuffle_buffer": 5,
    }


def make_mixture(root: Path) -> dict[str, object]:
    sources = [make_pairs_source(root / "a"), make_table(root / "b")]
    return {"format": "mixture", "sources": tuple(sources), "epoch_size": COUNT}


def write_ids(dataset: Dataset, config: DataConfig, start: Position, out: Path) -> None:
    """Append a line for each batch: the position after it, and what is in it."""
    batches = training_batches(
        dataset,
        config,
        preprocess=Preprocess(8),
        tokenizer=Tokenizer(16),
        truncate=True,
        batch_size=5,
        seed=4,
        start=start,
    )
    with out.open("a") as file:
        for batch, position in islice(batches, 30):
            samples = [image.numpy().tobytes().hex()[:24] for image in batch.images]
            file.write(json.dumps([*position, samples, batch.tokens.tolist()]) + "\n")
            file.flush()
            time.sleep(0.01)  # so that there is a moment to be killed at


@pytest.mark.parametrize(
    "make", [make_pairs_source, make_folder, make_table, make_shards, make_stream, make_mixture]
)
def test_a_killed_stream_goes_on_with_the_next_sample(
    make: Callable[[Path], dict[str, object]], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    values = make(tmp_path / "data" / "x") if make is not make_shards else None
    values = values or make(tmp_path / "data")
    config = DataConfig.model_validate({"workers": 0} | values)
    dataset = open_dataset(config)
    write_ids(dataset, config, Position(), tmp_path / "whole")
    whole = (tmp_path / "whole").read_text().splitlines()
    assert len(set(whole)) == len(whole) == 30

    context = multiprocessing.get_context("fork")
    out, position, killed = tmp_path / "killed", Position(), 0
    out.touch()
    lines: list[str] = []
    while len(lines) < 12:
        wanted = len(lines) + 4
        workers = config.model_copy(update={"workers": 2 if killed % 2 == 0 else 0})
        process = context.Process(target=write_ids, args=(dataset, workers, position, out))
        process.start()
        while out.read_text().count("\n") < wanted:
            assert process.is_alive() or process.exitcode == 0
            time.sleep(0.002)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += 1
        lines = [line for line in out.read_text().splitlines() if line.endswith("]")]
        out.write_text("\n".join(lines) + "\n")
        epoch, sample, *_ = json.loads(lines[-1])
        position = Position(epoch, sample)
    assert killed >= 2
    assert lines == whole[: len(lines)]
