"""Which split is read where none is named: one rule for every command."""

import json
import tarfile
from pathlib import Path

import pytest
from conftest import (
    TINY,
    Command,
    assert_refused,
    configured_tasks,
    make_model,
    make_pairs,
    noise_image,
    report_of,
)

from leanclip.config.data import DataConfig
from leanclip.config.schema import Config
from leanclip.config.sections import parse
from leanclip.data import open_dataset
from leanclip.data.splits import default_split, find_splits
from leanclip.errors import DataError


def make_split(folder: Path, format: str = "folder", count: int = 2, first: int = 0) -> None:
    """Images of two classes, pairs, or a shard of them."""
    if format == "folder":
        for name in ("ant", "bee"):
            (folder / name).mkdir(parents=True)
            for i in range(count):
                noise_image(first + i).save(folder / name / f"{i}.png")
        return
    pairs = make_pairs(folder if format == "pairs" else folder.parent / f"{folder.name} pairs")
    if format == "shards":
        folder.mkdir()
        with tarfile.open(folder / "0.tar", "w") as tar:
            for path in sorted(pairs.iterdir()):
                tar.add(path, path.name)


def config(root: Path, format: str = "folder", **more: object) -> DataConfig:
    return DataConfig.model_validate({"format": format, "root": str(root), "workers": 0} | more)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANCLIP_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("format", ["folder", "pairs", "shards"])
@pytest.mark.parametrize(
    ("there", "trained", "evaluated"),
    [
        (("train", "val", "test"), "train", "val"),
        (("train", "dev"), "train", "dev"),
        (("train",), "train", "train"),
        (("test", "validation"), None, "validation"),
        (("val",), None, "val"),
    ],
)
def test_the_split_of_training_and_of_evaluation(
    tmp_path: Path, format: str, there: tuple[str, ...], trained: str | None, evaluated: str
) -> None:
    for name in there:
        make_split(tmp_path / "d" / name, format)
    settings = config(tmp_path / "d", format)
    assert set(find_splits(settings)) == set(there)
    task = "zero_shot" if format == "folder" else "retrieval"
    assert default_split(settings, task) == evaluated
    if trained is None:
        with pytest.raises(DataError, match=r"has the splits .*, and no train; set data\.split"):
            open_dataset(settings)
        return
    assert default_split(settings) == trained
    dataset = open_dataset(settings)
    assert len(dataset) == (4 if format == "folder" else 12)
    assert all(f"/{trained}/" in dataset.name(index) for index in range(len(dataset)))
    values = {"model": TINY, "data": {"format": format, "root": str(tmp_path / "d")}}
    (opened,) = configured_tasks(parse(Config, values | {"evaluate": {task: {}}}, where="test"))
    assert opened.data.split == evaluated


def test_evaluation_takes_none_of_several_splits_that_training_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "d"
    for name in ("train", "val", "test"):
        make_split(root / name)
    source = {"format": "folder", "root": str(root)}
    sources = [source, source | {"split": "val"}]
    values = {"model": TINY, "data": {"format": "mixture", "sources": sources}}
    values["evaluate"] = {"zero_shot": source}
    (opened,) = configured_tasks(parse(Config, values, where="test"))
    assert (opened.data.split, caplog.messages) == ("test", [])
    sources.append(source | {"split": "test"})
    configured_tasks(parse(Config, values, where="test"))
    assert "uses the training data" in caplog.text


def test_folders_that_are_no_splits(tmp_path: Path) -> None:
    for name in ("train", "car", "bus"):  # a class of CIFAR-100
        (tmp_path / "a" / name).mkdir(parents=True)
        noise_image(1).save(tmp_path / "a" / name / "1.png")
    assert open_dataset(config(tmp_path / "a")).classes == ["bus", "car", "train"]
    make_split(tmp_path / "b" / "train")  # a split, or a class with folders in it?
    (tmp_path / "b" / "car").mkdir()
    assert default_split(config(tmp_path / "b")) == "train"  # the other is empty
    noise_image(1).save(tmp_path / "b" / "car" / "1.png")
    for task in ("train", "zero_shot"):
        with pytest.raises(DataError, match=r"has train, named like a split, beside .*\(car\)"):
            default_split(config(tmp_path / "b"), task)
    assert open_dataset(config(tmp_path / "b", split=".")).classes == ["car", "train"]
    assert open_dataset(config(tmp_path / "b", split="train")).classes == ["ant", "bee"]
    make_split(tmp_path / "b" / "val")  # two are no chance
    assert default_split(config(tmp_path / "b")) == "train"
    make_pairs(tmp_path / "c" / "holiday")
    make_pairs(tmp_path / "c" / "test")
    with pytest.raises(DataError, match="has test, named like a split"):
        open_dataset(config(tmp_path / "c", "pairs"))
    assert len(open_dataset(config(tmp_path / "c", "pairs", split="."))) == 24


@pytest.mark.parametrize("format", ["folder", "pairs"])
@pytest.mark.parametrize("names", [("Train", "Val"), ("TRAIN", "test"), ("train", "Testing")])
def test_splits_by_other_names_are_no_classes(
    format: str, names: tuple[str, str], tmp_path: Path
) -> None:
    for name in names:
        make_split(tmp_path / "d" / name, format)
    for task in ("train", "zero_shot"):
        with pytest.raises(DataError, match=r"has T\w+ and \w+, .*set data\.split"):
            default_split(config(tmp_path / "d", format), task)
    for name in names:
        dataset = open_dataset(config(tmp_path / "d", format, split=name))
        assert len(dataset) == (4 if format == "folder" else 12)


def test_every_command_reads_the_same_splits(command: Command, workplace: Path) -> None:
    make_split(Path("d/train"), count=4)
    make_split(Path("d/val"), count=3, first=10)
    make_model(workplace / "m")
    data = ["-o", "data.format=folder", "-o", "data.root=d", "-o", "evaluate={zero_shot: {}}"]
    done = command("train", "-c", "config.yaml", *data, "--dry-run")
    assert "data: 8 samples of folder in d, split train, 2 classes: ant, bee" in done.stdout
    done = command("eval", "--model", "m", "--data", "folder:d", "--out", "e")
    assert done.returncode == 0, done.stderr
    assert (report_of(Path("e"))["data"]["zero_shot"]["split"]) == "val"
    done = command("data", "check", "folder:d", "--out", "c", "--json")
    assert json.loads(done.stdout)["parts"].keys() == {"train", "val"}
    assert command("data", "pack", "folder:d", "p").returncode == 0
    assert json.loads(Path("p/index.json").read_text())["samples"] == 8
    done = command("search", "build", "d", "--model", "m", "--out", "i", "--json")
    assert json.loads(done.stdout)["files"] == 14
    done = command("search", "find", "i", "x", "--label", "ant", "-k", "20", "--json")
    labels = {json.loads(line)["label"] for line in done.stdout.splitlines()}
    assert labels == {"ant"}
    assert_refused(command("eval", "--model", "m", "--data", "folder:d", "--split", "no"), "val")


def test_a_split_without_a_class_is_told_with_advice_that_works(
    command: Command, workplace: Path
) -> None:
    make_split(Path("d/train"), count=4)
    make_split(Path("d/test"), count=3)
    for path in Path("d/test/ant").iterdir():
        path.unlink()
    Path("d/test/ant").rmdir()
    make_model(workplace / "m")
    words = ("eval", "--model", "m", "--data", "folder:d", "--task", "knn", "--out", "e")
    assert_refused(
        command(*words),
        "split test: 1 of the classes of the other split are missing",
        "ant",
        "empty folder",
    )
    Path("names.txt").write_text("Ant\nBee\n")
    assert command(*words, "--classes", "names.txt").returncode == 0
    Path("d/test/ant").mkdir()
    assert command(*words).returncode == 0
