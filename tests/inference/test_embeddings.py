"""`leanclip embed`: shards of features, killed and continued, over ranks; nothing lost."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
from conftest import Command, Forked, assert_refused, noise_image
from pyarrow import dataset
from test_inference import save_tiny

import leanclip
from leanclip.cli.use import _embedded
from leanclip.errors import ConfigError, DataError
from leanclip.inference.embeddings import Source, embed, read_embeddings, shards_of


@pytest.fixture
def photos(workplace: Path) -> Path:
    """The workplace with a model in `tiny` and 50 images in `photos`, in folders."""
    save_tiny(workplace / "tiny")
    for i in range(50):
        folder = workplace / "photos" / f"{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        noise_image(i).save(folder / f"{i:03d}.png")
    return workplace


WORDS = ("embed", "photos", "--model", "tiny", "--out", "out", "--shard-size", "8")


def expected_rows() -> tuple[list[str], np.ndarray]:
    paths = sorted(Path("photos").rglob("*.png"))
    return [str(path.relative_to("photos")) for path in paths], leanclip.load("tiny").embed_images(
        paths
    )


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_ids_and_features_are_those_of_the_folder(
    photos: Path, command: Command, format: str
) -> None:
    done = command(*WORDS, "--format", format, "--batch-size", "3")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["images"], said["skipped"], said["shards"]) == (50, 0, 7)
    ids, features = read_embeddings("out")
    names, expected = expected_rows()
    assert ids == names
    np.testing.assert_allclose(features, expected, atol=1e-6)
    assert [len(names) for names, _ in shards_of("out")] == [8, 8, 8, 8, 8, 8, 2]
    assert not list(Path("out").glob(".*"))


def test_half_the_space(photos: Path, command: Command) -> None:
    assert command(*WORDS, "--dtype", "float16").returncode == 0
    _, features = read_embeddings("out")
    assert features.dtype == np.float16
    np.testing.assert_allclose(features, expected_rows()[1], atol=1e-3)


def test_ranks_share_the_shards(photos: Path) -> None:
    ranks = [
        Forked(*WORDS, folder=photos, environment={"RANK": str(rank), "WORLD_SIZE": "3"})
        for rank in range(3)
    ]
    assert [rank.code() for rank in ranks] == [0, 0, 0]
    ids, features = read_embeddings("out")
    names, expected = expected_rows()
    assert ids == names
    np.testing.assert_allclose(features, expected, atol=1e-6)


@pytest.mark.slow
def test_it_starts_the_ranks_itself(photos: Path) -> None:
    done = Forked(*WORDS, "--num-procs", "2", folder=photos)
    assert done.code() == 0, done.output()
    assert json.loads(done.output().splitlines()[-1])["missing_shards"] == 0
    assert read_embeddings("out")[0] == expected_rows()[0]


def test_what_cannot_be_read_is_skipped_and_named(photos: Path, command: Command) -> None:
    (photos / "photos/1/004.png").write_bytes(b"nothing")
    done = command(*WORDS)
    assert_refused(done, "1 bad of 50 samples", "004.png", "--max-bad-fraction")
    done = command(*WORDS, "--max-bad-fraction", "0.05")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["skipped"] == 1
    assert "skipped: 1/004.png" in done.stderr
    ids, features = read_embeddings("out")
    names, expected = expected_rows_without("1/004.png")
    assert ids == names
    np.testing.assert_allclose(features, expected, atol=1e-6)


def test_a_stricter_second_start_says_what_the_first_skipped(
    photos: Path, command: Command
) -> None:
    for name in ("0/000.png", "1/001.png", "2/047.png"):
        (photos / "photos" / name).write_bytes(b"nothing")
    assert command(*WORDS, "--max-bad-fraction", "0.1").returncode == 0
    for missing in ([], ["00002.npy"], ["00000.npy", "00006.npy"]):  # of shards of all kinds
        for name in missing:
            (photos / "out" / name).unlink()
        done = command(*WORDS, "--max-bad-fraction", "0.05")
        assert_refused(done, "3 bad of 50 samples", "--max-bad-fraction")
    done = command(*WORDS, "--max-bad-fraction", "0.1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["skipped"] == 3
    noise_image(0).save(photos / "photos/0/000.png")  # mended
    (photos / "out/00000.npy").unlink()
    done = command(*WORDS, "--max-bad-fraction", "0.05")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["skipped"] == 2
    assert len(read_embeddings("out")[0]) == 48


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_bad_images_are_a_share_of_those_of_all_ranks(photos: Path, world_size: int) -> None:
    clip, source = leanclip.load("tiny"), Source.of(photos / "photos")
    for row in (0, 20, 33, 49):  # of several ranks' shards
        source.path(row).write_bytes(b"nothing")

    def work(out: str, share: float) -> None:
        for rank in range(world_size):
            embed(clip, source, Path(out), shard_size=8, max_bad_fraction=share, workers=0,
                  rank=rank, world_size=world_size)  # fmt: skip

    work("enough", 0.08)
    assert len(read_embeddings("enough")[0]) == 46
    with pytest.raises(DataError, match="bad of 50 samples"):
        work("little", 0.07)


def test_nothing_to_embed(photos: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert_refused(command("embed", "-", *WORDS[2:]), "no images", "standard input")
    for path in (photos / "photos").rglob("*.png"):
        path.write_bytes(b"nothing")
    for format in ("npy", "parquet"):
        words = (*WORDS[:5], format, *WORDS[6:], "--format", format, "--max-bad-fraction", "1")
        done = command(*words)
        assert done.returncode == 0, done.stderr
        assert read_embeddings(format)[1].shape == (0, 16)


def test_other_readers_of_parquet_read_the_folder(photos: Path, command: Command) -> None:
    (photos / "photos/0/bad.png").write_bytes(b"not an image")
    done = command(*WORDS, "--format", "parquet", "--max-bad-fraction", "1")
    assert done.returncode == 0, done.stderr
    assert list(photos.glob("out/*.skipped.json"))
    ids, features = read_embeddings("out")
    rows = pandas.read_parquet("out")
    assert rows["id"].tolist() == dataset.dataset("out").to_table()["id"].to_pylist() == ids
    np.testing.assert_array_equal(np.stack(rows["embedding"].tolist()), features)


def expected_rows_without(name: str) -> tuple[list[str], np.ndarray]:
    paths = [path for path in sorted(Path("photos").rglob("*.png")) if not str(path).endswith(name)]
    return [str(path.relative_to("photos")) for path in paths], leanclip.load("tiny").embed_images(
        paths
    )


def test_another_start_must_agree(photos: Path, command: Command) -> None:
    assert command(*WORDS).returncode == 0
    noise_image(99).save(photos / "photos/0/new.png")
    assert_refused(command(*WORDS), "out: has features of other images, ids", "another folder")
    (photos / "photos/0/new.png").unlink()
    save_tiny(photos / "other", embed_dim=8)
    other = command(*WORDS[:3], "other", *WORDS[4:])
    assert_refused(other, "other weights, embed_dim")
    assert_refused(command(*WORDS, "--format", "csv"), "unknown format csv")
    assert_refused(command("embed", "nowhere", *WORDS[2:]), "nowhere: no such folder")
    (photos / "out/00003.npy").unlink()
    with pytest.raises(DataError, match=r"1 of 7 shards are missing, the first is 00003\.npy"):
        read_embeddings("out")
    assert command(*WORDS).returncode == 0
    assert len(read_embeddings("out")[0]) == 50
    with pytest.raises(ConfigError, match="no embeddings"):
        read_embeddings(photos / "photos")


def test_paths_from_standard_input(
    photos: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys,
        "stdin",
        io.TextIOWrapper(io.BytesIO(b"photos/0/003.png\n\nphotos/0/000.png\nphotos/0/003.png")),
    )
    done = command("embed", "-", *WORDS[2:])
    assert done.returncode == 0, done.stderr
    ids, features = read_embeddings("out")
    assert ids == [f"photos/0/{number}.png" for number in ("003", "000", "003")]
    np.testing.assert_allclose(features, leanclip.load("tiny").embed_images(ids), atol=1e-6)
    assert_refused(command(*WORDS, "--num-gpus", "64"), "64 GPU(s) requested, this machine has")
    refused = command("embed", "-", *WORDS[2:], "--num-procs", "2")
    assert_refused(refused, "cannot read standard input")


def test_names_are_kept_as_they_are(photos: Path) -> None:
    odd = photos / "odd"
    odd.mkdir()
    for name in ("a\nb.png", "é ü.png", "x.PNG"):
        noise_image(0).save(odd / "t.png")
        (odd / "t.png").rename(odd / name)
    assert list(Source.of(odd).names) == sorted(["a\nb.png", "é ü.png", "x.PNG"])


def test_the_summary_counts_in_the_singular_and_plural() -> None:
    one = {"images": 1, "skipped": 0, "shards": 1, "out": "E", "format": "npy", "embed_dim": 8}
    assert _embedded(one) == "1 image in E: 1 shard (npy), 8 dimensions; 0 skipped"
    many = one | {"images": 1500, "skipped": 2, "shards": 2}
    assert _embedded(many) == "1,498 images in E: 2 shards (npy), 8 dimensions; 2 skipped"
