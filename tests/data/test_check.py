"""`leanclip data check`: what it finds in data with known faults, and what it leaves alone."""

import io
import json
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_refused, make_pairs, noise_image
from PIL import Image, ImageEnhance
from skimage import data as photographs
from test_inference import save_tiny

from leanclip.data import parse_source
from leanclip.data.tools.check import ODD, RECORD, open_parts, read_parts
from leanclip.data.tools.duplicates import (
    FINGERPRINT,
    NEIGHBOURS,
    exact_groups,
    fingerprint,
    near_pairs,
)
from leanclip.data.tools.findings import Findings, expected_pairs, find
from leanclip.report.data_check import problems

Command = Callable[..., subprocess.CompletedProcess[str]]

PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "rocket", "page", "retina", "coins")


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(photographs, name)()).convert("RGB")


def compressed(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=50)
    return Image.open(file).convert("RGB")


def cropped(image: Image.Image) -> Image.Image:
    x, y = image.width // 100, image.height // 100
    return image.crop((x, y, image.width - x, image.height - y))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "quality 50": compressed,
    "half the size": lambda image: image.reduce(2),
    "2% cropped": cropped,
    "10% brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
}


def fingerprints(images: list[Image.Image]) -> np.ndarray:
    rows = np.zeros(len(images), FINGERPRINT)
    for row, image in zip(rows, images, strict=True):
        row["signs"], row["colors"] = fingerprint(image)
    return rows


def checked(
    *words: str, splits: tuple[str, ...] = (), workers: int = 0, batch: int = 8
) -> Findings:
    parts = open_parts([parse_source(words[0], words[1:])], splits)
    read_parts(parts, workers=workers)
    return find(parts, batch_size=batch, context_length=77)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_photographs_are_found_again(change: str) -> None:
    images = [photograph(name) for name in PHOTOGRAPHS]
    again = [CHANGES[change](image) for image in images]
    pairs, crowded = near_pairs(fingerprints(images + again))
    found = {tuple(pair) for pair in pairs.tolist()}
    all_of_them = {(i, i + len(images)) for i in range(len(images))}
    hard = {(7, 15)} if change == "2% cropped" else set()  # a grid of coins that moved
    assert all_of_them - hard <= found <= all_of_them
    assert crowded == 0


def test_drawings_that_differ_are_not_duplicates() -> None:
    import random

    from leanclip.data.formats.shapes import _seen_scenes, draw  # pyright: ignore[reportPrivateUsage]

    scenes = list(_seen_scenes(random.Random(0), "val"))
    pairs, _ = near_pairs(fingerprints([draw(scene) for _, scene in scenes]))
    assert len(scenes) == 100
    assert pairs.tolist() == []


def test_flat_pictures_are_not_compared_and_crowds_are_told() -> None:
    flat = [Image.new("RGB", (40, 40), (i, i, i)) for i in range(0, 200, 2)]
    pairs, crowded = near_pairs(fingerprints(flat))
    assert (len(pairs), crowded) == (0, 0)
    same = fingerprints([noise_image(1)] * (NEIGHBOURS + 5))
    pairs, crowded = near_pairs(same)
    assert crowded > 0
    assert len(pairs) <= NEIGHBOURS * len(same)
    assert {i for pair in pairs.tolist() for i in pair} == set(range(len(same)))
    assert near_pairs(np.zeros(0, FINGERPRINT))[0].shape == (0, 2)


def test_equal_hashes_are_one_group() -> None:
    hashes = np.array([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4], [0, 2, 3, 4]], np.uint64)
    group = exact_groups(hashes)
    assert group[0] == group[2]
    assert len(set(group.tolist())) == 3


def test_expected_pairs_is_what_batches_show() -> None:
    texts = [[0], [0], [1], [0, 1], [2, 2], [3]]  # a sample's captions
    rows = [(i, text, 1 / len(t)) for i, t in enumerate(texts) for text in t]
    samples, ids, weights = (np.array(column) for column in zip(*rows, strict=True))
    expected = expected_pairs(weights, ids, samples, batch=4)
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(20_000):
        drawn = [rng.choice(texts[i]) for i in rng.permutation(len(texts))[:4]]
        seen.append(sum(a == b for a in drawn for b in drawn) - 4)
    assert expected == pytest.approx(np.mean(seen), abs=0.05)
    ones = np.ones(6)
    shared = np.array([0, 0, 0, 1, 1, 2])  # c (c - 1): 6 + 2
    assert expected_pairs(ones, shared, np.arange(6), 4) == pytest.approx(4 * 3 * 8 / 30)
    assert expected_pairs(ones, shared, np.arange(6), 100) == pytest.approx(8)
    assert expected_pairs(ones[:0], shared[:0], shared[:0], 4) == 0


def test_odd_images_are_told_apart(tmp_path: Path) -> None:
    image = noise_image(0, (64, 48))
    exif = Image.Exif()
    exif[0x0112] = 6
    make_pairs(tmp_path / "d", 0)
    image.save(tmp_path / "d/plain.png")
    noise_image(1, (90, 20)).save(tmp_path / "d/tiny.png")
    image.convert("CMYK").save(tmp_path / "d/CMYK.jpg")
    Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64)).save(
        tmp_path / "d/16-bit.png"
    )
    image.quantize(8).save(tmp_path / "d/palette.png")
    image.convert("RGBA").save(tmp_path / "d/transparent.png")
    image.convert("L").save(tmp_path / "d/greyscale.jpg")
    image.save(tmp_path / "d/turned.jpg", exif=exif)
    image.save(
        tmp_path / "d/animated.webp", save_all=True, append_images=[noise_image(5, (64, 48))]
    )
    image.save(tmp_path / "d/misnamed.jpg", "PNG")
    for path in list((tmp_path / "d").iterdir()):
        path.with_suffix(".txt").write_text(f"the {path.stem} one")
    parts = open_parts([parse_source(f"pairs:{tmp_path / 'd'}")])
    read_parts(parts, workers=0)
    (part,) = parts
    assert part.bad == []
    for row in part.images:
        name = Path(part.dataset.name(int(row["index"]))).stem
        found = {word for bit, word in enumerate(ODD) if row["odd"] >> bit & 1}
        assert found == ({name} - {"plain"}), name
    assert RECORD.itemsize <= 320


def test_unusable_samples_and_captions_are_counted(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "d", 20)
    whole = (root / "000.png").read_bytes()
    (root / "000.png").write_bytes(whole[: len(whole) // 2])
    (root / "001.png").write_bytes(b"no image")
    (root / "002.txt").unlink()
    (root / "003.txt").write_text("\n")
    (root / "004.txt").write_bytes("caf\xe9".encode("latin-1"))
    (root / "005.txt").write_text("word " * 100)
    (root / "006.txt").write_text("the same")
    (root / "007.txt").write_text("the  same")
    for workers in (0, 2):
        findings = checked(f"pairs:{root}", workers=workers)
        part = findings.values["parts"]["all"]
        assert part["samples"] == 20
        assert part["unusable"] == {
            "damaged image": 1,
            "not an image": 1,
            "missing caption": 1,
            "empty caption": 1,
            "caption not UTF-8": 1,
        }
        assert "001.png" in part["examples"]["not an image"][0]
        captions = part["captions"]
        assert captions["over_context"] == 1
        assert captions["most_common"] == [{"caption": "the same", "times": 2}]
        assert captions["captions"] - captions["distinct"] == 1
        assert "5 of 20 samples (25.0%) are unusable" in problems(findings.values)[0]


def test_leaks_are_found_and_decide(tmp_path: Path) -> None:
    for split, names in (("train", PHOTOGRAPHS[:6]), ("test", PHOTOGRAPHS[4:])):
        make_pairs(tmp_path / "d" / split, 0)
        for name in names:
            path = tmp_path / "d" / split / f"{name}.png"
            image = photograph(name)
            is_near = (split, name) == ("test", "page")
            (compressed(image) if is_near else image).save(path)
            path.with_suffix(".txt").write_text(f"a {name}")
    image = tmp_path / "d/train/chelsea"
    for suffix in (".png", ".txt"):
        image.with_name(f"again{suffix}").write_bytes(image.with_suffix(suffix).read_bytes())
    findings = checked(f"pairs:{tmp_path / 'd'}")
    assert list(findings.values["parts"]) == ["train", "test"]
    duplicates = findings.values["duplicates"]
    (across,) = duplicates["across"]
    assert (across["exact"], across["near"]) == (1, 1)
    names = [[Path(name).stem for name in one["images"]] for one in across["examples"]]
    assert names == [["rocket", "rocket"], ["page", "page"]]
    assert duplicates["within"]["train"]["exact"] == 1
    assert duplicates["within"]["train"]["near"] == 0
    assert len(problems(findings.values)) == 2  # exact and near
    assert problems(checked(f"pairs:{tmp_path / 'd'}", splits=("train",)).values) == []


def test_classes_are_counted(tmp_path: Path) -> None:
    for name, count in (("cat", 3), ("dog", 1)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(count):
            noise_image(10 * count + i).save(tmp_path / "pets" / name / f"{i}.png")
    part = checked(f"folder:{tmp_path / 'pets'}", batch=4).values["parts"]["all"]
    assert part["classes"]["counts"] == {"cat": 3, "dog": 1}
    assert part["false_negatives"]["expected_pairs"] == pytest.approx(6)


def test_parts_of_one_name_are_all_kept_and_split_by_files(tmp_path: Path) -> None:
    roots = [make_pairs(tmp_path / where / "food", 1) for where in "abc"]
    parts = open_parts([parse_source(f"pairs:{root}") for root in (*roots, roots[1])])
    assert [part.name for part in parts] == ["all", "food/all", "food/all (2)"]
    assert [part.config.root for part in parts] == list(map(str, roots))
    for split in ("train", "test"):
        (tmp_path / "tables").mkdir(exist_ok=True)
        (tmp_path / "tables" / f"{split}.csv").write_text("image,caption\nx.png,a\n")
        (tmp_path / "shards" / split).mkdir(parents=True)
        with tarfile.open(tmp_path / "shards" / split / "0.tar", "w") as tar:
            tar.add(roots[0] / "000.png", "0.png")
            tar.add(roots[0] / "000.txt", "0.txt")
    for source in ("table:tables", "shards:shards"):
        format, root = source.split(":")
        parts = open_parts([parse_source(f"{format}:{tmp_path / root}")])
        assert [part.name for part in parts] == ["train", "test"]


def test_the_command_prints_writes_and_exits(command: Command) -> None:
    done = command("data", "check", "pairs:data", "--workers", "0")
    assert done.returncode == 0, done.stderr
    assert "all: 12 samples (pairs:data)" in done.stdout
    assert "No problems" in done.stdout
    for name in ("check.json", "samples.png"):
        assert Path("runs/check-data", name).is_file()
        assert f"runs/check-data/{name}" in done.stdout
    assert not Path("runs/check-data/duplicates.png").exists()
    Path("data/003.png").write_bytes(Path("data/004.png").read_bytes())
    Path("data/005.png").write_bytes(b"")
    done = command("data", "check", "config.yaml", "--json", "--out", "here", "--workers", "0")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads(Path("here/check.json").read_text())
    assert found["parts"]["all"]["unusable"] == {"empty file": 1}
    assert found["parts"]["all"]["captions"]["context_length"] == 24  # the model's
    assert found["parts"]["all"]["false_negatives"]["batch_size"] == 4
    assert len(found["problems"]) == 1
    assert Path("here/duplicates.png").is_file()
    done = command("data", "check", "pairs:data", "--max-problems", "0.1", "--workers", "0")
    assert done.returncode == 0, done.stdout
    assert "003.png = data/004.png" in done.stdout


def test_every_command_names_what_is_not_read_in_shards(command: Command) -> None:
    save_tiny(Path("tiny"))
    images = sorted(Path("data").glob("*.png"))
    with tarfile.open("a.tar", "w") as tar:
        for number, path in enumerate(images):
            stem = f"v2.{number} of me" if number < 4 else f"{number:03d}"
            tar.add(path, f"{stem}.heic" if number == 11 else f"{stem}.png")
            if number != 6:
                tar.add(path.with_suffix(".txt"), f"{stem}.txt")
            tar.add(path, f"{stem}.npy")
        tar.add(images[6].with_suffix(".txt"), "006.txt")
    data = ("-o", "data.format=shards", "-o", "data.root=a.tar", "-o", "data.max_bad_fraction=0.5")
    results = []
    for words, where in (
        (("data", "check", "shards:a.tar", "--workers", "0"), "stdout"),
        (("data", "pack", "shards:a.tar", "packed", "-o", "max_bad_fraction=0.5"), "stderr"),
        (("train", "-c", "config.yaml", "--dry-run", *data), "stderr"),
        (("search", "build", "a.tar", "--model", "tiny", "--out", "index"), "stderr"),
    ):
        done = command(*words)
        results.append(done)
        printed = getattr(done, where)
        assert "members that are not read: 13 (12 .npy, 1 .heic)" in printed, (words, done.stderr)
        assert re.search(r"not next to each other in the tar: 1 \([^ ]*a\.tar/006\)", printed), (
            words
        )
    checked = results[0]
    assert checked.returncode == 1
    assert "all: 12 samples" in checked.stdout
    assert "a.tar/011: no image with this key; members that are not read: .heic" in (checked.stdout)
    (skipped,) = Path("packed/skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["id"] == "a.tar/011"


def test_mistakes_are_refused(command: Command) -> None:
    assert_refused(command("data", "check", "nothing"), "SRC nothing", "FORMAT:ROOT")
    assert_refused(command("data", "check", "pairs:data", "--split", "x"), "no folder x in data")
    assert_refused(
        command("data", "check", "pairs:data", "-o", "streaming=true"), "streaming: false"
    )
