"""CLIP_benchmark's WebDataset folders, read as they are."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Command, assert_refused, make_model, noise_image, report_of

from leanclip.data import open_dataset, parse_source


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def make_wds(root: Path, words: str = "cls", *, shards: int = 11, kind: str = "webp") -> Path:
    """A folder as CLIP_benchmark publishes them: `shards` of two samples, for a test split."""
    (root / "test").mkdir(parents=True)
    (root / "test/nshards.txt").write_text(f"{shards}")
    if words == "cls":
        (root / "classnames.txt").write_text("ant\nbee\ncow\n")
        (root / "zeroshot_classification_templates.txt").write_text("a {c}\nthe photo of {c}.")
    else:
        (root / "dataset_type.txt").write_text("retrieval\n")
    for shard in range(shards):
        with tarfile.open(root / f"test/{shard}.tar", "w") as tar:
            for i in (2 * shard, 2 * shard + 1):
                file = io.BytesIO()
                noise_image(i).save(file, kind.replace("jpg", "jpeg"))
                text = str(i % 3) if words == "cls" else f"picture {i}\nimage {i}\n"
                add(tar, f"s{i:07d}.{words}", text.encode())
                add(tar, f"s{i:07d}.{kind}", file.getvalue())
    return root


def test_shards_come_by_number_and_labels_by_name(tmp_path: Path) -> None:
    dataset = open_dataset(parse_source(f"wds:{make_wds(tmp_path / 'wds_x')}"))
    assert len(dataset) == 22
    assert list(dataset.classes) == ["ant", "bee", "cow"]
    assert list(dataset.templates) == ["a {}", "the photo of {}."]
    for i in range(22):  # of 10.tar after those of 2.tar
        sample = dataset[i]
        assert sample.id.endswith(f"test/{i // 2}.tar/s{i:07d}")
        assert sample.label == i % 3
    assert dataset[4].captions == ["a bee", "the photo of bee."]


def test_captions_are_a_line_each(tmp_path: Path) -> None:
    dataset = open_dataset(parse_source(f"wds:{make_wds(tmp_path / 'w', 'txt', kind='jpg')}"))
    assert not dataset.classes
    assert dataset[21].captions == ["picture 21", "image 21"]


def test_both_kinds_are_measured(command: Command, workplace: Path) -> None:
    make_model(workplace / "m")
    make_wds(workplace / "a")
    make_wds(workplace / "b", "txt")
    for root, metric in (("a", "zeroshot_top1"), ("b", "image_to_text_R@1")):
        done = command("eval", "--model", "m", "--data", f"wds:{root}", "--out", f"e{root}")
        assert done.returncode == 0, done.stderr
        assert "22 images" in done.stdout
        assert metric in report_of(workplace / f"e{root}")["metrics"]


def test_names_may_come_from_another_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("x\ny\nz\n")
    root = make_wds(tmp_path / "w", shards=1)
    dataset = open_dataset(parse_source(f"wds:{root}", [f"class_names={tmp_path}/names.txt"]))
    assert list(dataset.classes) == ["x", "y", "z"]


def test_a_probe_learns_from_its_train_split(command: Command, workplace: Path) -> None:
    make_model(workplace / "m")
    root = make_wds(workplace / "a")
    make_wds(workplace / "b", shards=3)
    (workplace / "b/test").rename(root / "train")
    done = command("eval", "--model", "m", "--data", "wds:a", "--task", "all", "--out", "e")
    assert done.returncode == 0, done.stderr
    assert "Trained on 6 labelled images of a, " in done.stdout
    assert report_of(workplace / "e")["data"]["knn"]["samples"] == 22


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda r: (r / "test/3.tar").unlink(), ("a/test/3.tar: no such shard", "nshards.txt")),
        (lambda r: (r / "test/nshards.txt").write_text("many"), ("found 'many'",)),
        (lambda r: (r / "dataset_type.txt").write_text("multilabel"), ("is 'multilabel'",)),
        (lambda r: (r / "classnames.txt").write_text("ant\nbee\n"), ("'2' is no known class",)),
        (lambda r: (r / "classnames.txt").write_text(""), ("classnames.txt: is empty",)),
        (lambda r: (r / "classnames.txt").unlink(), ("no caption with this key",)),
        (
            lambda r: (r / "zeroshot_classification_templates.txt").write_text("a photo"),
            ("the template 'a photo' has no {}",),
        ),
        (lambda r: (r / "test").rename(r / "val"), ("no folder test in a (found: val)",)),
    ],
)
def test_what_is_missing_or_wrong_is_one_line(
    command: Command, workplace: Path, spoil: Callable[[Path], object], words: tuple[str, ...]
) -> None:
    make_model(workplace / "m")
    spoil(make_wds(workplace / "a"))
    assert_refused(command("eval", "--model", "m", "--data", "wds:a"), *words)
