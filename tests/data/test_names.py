"""Names of files that are not UTF-8, as unzipped archives and old disks have them."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from conftest import Command, assert_refused, make_config, make_model, noise_image, report_of

from leanclip.inference.embeddings import read_embeddings
from leanclip.search import Index

LATIN = os.fsdecode(b"caf\xe9")  # "café" in Latin-1
CYRILLIC = os.fsdecode(b"\xea\xee\xf2")  # in Windows-1251


@pytest.fixture
def photos(workplace: Path) -> Path:
    """Two classes, with captions; one image cannot be read."""
    root = workplace / "photos"
    for number, name in enumerate(
        (f"{LATIN}/a", f"{LATIN}/{CYRILLIC}", "blue/b", f"blue/{LATIN}", "blue/caf\\xe9")
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(number).save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(f"picture {number}\n")
    (root / "blue" / f"bad{LATIN}.png").write_bytes(b"no image")
    (root / "blue" / f"bad{LATIN}.txt").write_text("bad\n")
    make_model(workplace / "m")
    return root


def ids_of(root: Path) -> list[str]:
    found = sorted(root.rglob("*.png"))
    return [path.relative_to(root).as_posix() for path in found if "bad" not in path.name]


def test_an_index_of_pictures(photos: Path, command: Command) -> None:
    words = ("--model", "m", "--max-bad-fraction", "0.5")
    done = command("search", "build", "photos", *words, "--out", "i", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == 5
    bad = f"{photos.resolve()}/blue/bad{LATIN}.png".encode("unicode_escape").decode()
    assert f"skipped: {bad}: cannot be read as an image" in done.stderr
    assert command("search", "update", "i", "--max-bad-fraction", "0.5").returncode == 0
    for label, expected in (("café", 2), (LATIN, 2), ("blue", 3)):
        done = command("search", "find", "i", "x", "--label", label, "--grid", "grid.png")
        hits = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(hits) == expected, done.stderr
        assert all(Path(hit["path"]).is_file() for hit in hits)
    assert Index.open("i").labels() == {"blue": 3, "café": 2}


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_embeddings(photos: Path, command: Command, format: str) -> None:
    words = ("--model", "m", "--max-bad-fraction", "0.5", "--format", format, "--shard-size", "2")
    done = command("embed", "photos", *words, "--out", "e")
    assert done.returncode == 0, done.stderr
    ids, _ = read_embeddings("e")
    assert ids == ids_of(photos)
    words = ("--root", "photos", "--model", "m", "--out", "i", "--json")
    done = command("search", "build", "e", *words)
    assert json.loads(done.stdout)["files"] == 5
    if format == "parquet":
        parts = [pandas.read_parquet(path) for path in sorted(Path("e").glob("*.parquet"))]
        texts = pandas.concat(parts)["id"].to_list()
        assert texts.count("blue/caf\\xe9.png") == 2  # one of them is called so


def test_paths_on_standard_input(
    photos: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [f"photos/{name}" for name in ids_of(photos)]
    listed = b"\r\n".join(os.fsencode(path) for path in paths) + b"\n\n"

    def give(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    give(listed)
    done = command("classify", "-", "--labels", "a,b", "--model", "m")
    assert [json.loads(line)["image"] for line in done.stdout.splitlines()] == paths, done.stderr
    give(listed)
    words = ("--model", "m", "--out", "e", "--format", "parquet")
    assert command("embed", "-", *words).returncode == 0
    assert read_embeddings("e")[0] == paths
    for path in (f"photos/{LATIN}/a.png", f"photos/blue/bad{LATIN}.png"):
        give(Path(path).read_bytes())  # an image, and no list
        done = command("classify", "-", "--labels", "a,b", "--model", "m")
        if "bad" in path:
            assert_refused(done, "no such image")  # it is a text
        else:
            assert json.loads(done.stdout)["image"] == "-"
    give(b"r\xe9d\nblue\n")
    assert_refused(command("classify", paths[0], "--labels", "-", "--model", "m"), "not UTF-8 text")


def test_training_checking_and_reports(photos: Path, command: Command) -> None:
    data = {"format": "pairs", "root": "photos", "max_bad_fraction": 0.5, "workers": 0}
    make_config(Path("config.yaml"), data=data, evaluate={"retrieval": {}, "pictures": True})
    done = command("train", "-c", "config.yaml", "--output-dir", "run")
    assert done.returncode == 0, done.stderr
    (line,) = Path("run/skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == f"photos/blue/bad{LATIN}.png"
    assert list(report_of(Path("run"))["bad"]) == [f"photos/blue/bad{LATIN}.png"]
    assert "bad" in Path("run/report.html").read_text()
    words = ("--max-problems", "0.5", "--out", "c")
    done = command("data", "check", "folder:photos", *words)
    assert done.returncode == 0, done.stderr
    assert "café" in done.stdout
    done = command("eval", "--model", "m", "--data", "folder:photos/blue")
    assert_refused(done, "no class folders")
    (Path("photos") / "blue" / f"bad{LATIN}.png").unlink()
    done = command("eval", "--model", "m", "--data", "folder:photos", "--out", "e")
    classes = report_of(Path("e"))["classes"]["zero_shot"]["per_class"]
    assert [one["name"] for one in classes] == ["blue", "café"]
    done = command("data", "pack", "folder:photos", "p")
    assert Path("p/classes.txt").read_text() == "blue\ncafé\n"
    done = command("data", "check", f"pairs:photos/{LATIN}")
    assert_refused(done, "root", "is not UTF-8", "rename it")


def test_what_a_process_prints_is_the_name_itself(photos: Path) -> None:
    out = os.fsdecode(b"out-\xe9")
    code = "from leanclip.cli.main import main; main()"
    words = ("data", "check", "pairs:photos/blue", "--max-problems", "1", "--out", out)
    environment = os.environ | {"PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert os.fsencode(f"{out}/check.json\n") in done.stdout
