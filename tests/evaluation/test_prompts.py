"""Names and templates: where they come from, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import (
    TINY,
    Command,
    assert_refused,
    make_model,
    make_table,
    noise_image,
    ranks_of,
    report_of,
)

from leanclip import CLIP, build_classifier
from leanclip.data import open_dataset, parse_source
from leanclip.data.dataset import read_templates
from leanclip.data.formats.shapes import UNSEEN, class_name
from leanclip.data.prompts import FOOD101_TRAINING, PROMPTS


def test_known_names_are_those_of_the_data() -> None:
    folders = sorted(class_name(*one).replace(" ", "_") for one in UNSEEN)
    assert [one.replace("_", " ") for one in folders] == list(PROMPTS["shapes"].classes)
    names = PROMPTS["food101"].classes
    assert len(names) == len(set(names)) == 101
    assert list(names) == sorted(names, key=lambda name: name.replace(" ", "~"))  # as the archive
    assert (names[0], names[-1]) == ("apple pie", "waffles")
    for prompts in PROMPTS.values():
        assert prompts.source
        assert all("{}" in template for template in (*prompts.templates, *FOOD101_TRAINING))


def classes_in(root: Path) -> Path:
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        noise_image(len(name)).save(root / name / "0.png")
    return root


def test_templates_come_from_the_folder_of_the_data(tmp_path: Path) -> None:
    root = classes_in(tmp_path / "c")
    assert open_dataset(parse_source(f"folder:{root}")).templates == ("a photo of a {}.",)
    (root / "templates.txt").write_text("a {}\n\nthe {c} there\n{} {c}\n")
    expected = ["a {}", "the {} there", "{} {c}"]
    assert open_dataset(parse_source(f"folder:{root}")).templates == expected
    assert read_templates(root / "templates.txt") == expected
    own = open_dataset(parse_source(f"folder:{root}", ['templates=["one {}"]']))
    assert list(own.templates) == ["one {}"]


def test_names_and_templates_of_the_command_line(command: Command, workplace: Path) -> None:
    make_model(workplace / "m")
    classes_in(workplace / "c")
    (workplace / "names.txt").write_text("emmet\nhoney bee\n")
    (workplace / "templates.txt").write_text("one {}\ntwo {}\n")
    options = ("eval", "--model", "m", "--data", "folder:c", "--out", "e")
    done = command(*options, "--classes", "names.txt", "--templates", "templates.txt")
    assert done.returncode == 0, done.stderr
    (classes,) = report_of(workplace / "e")["classes"].values()
    assert [row["name"] for row in classes["per_class"]] == ["emmet", "honey bee"]


def test_ranks_share_the_work_of_a_classifier(tmp_path: Path) -> None:
    model = CLIP(**TINY).eval()
    words = (["ant", "bee", "a honey bee"], ["a {}", "{}"])
    expected = build_classifier(model, *words)

    def work(rank: int) -> bool:
        return torch.equal(build_classifier(model, *words, shared=True), expected)

    assert ranks_of(2, work, tmp_path) == [True, True]


BROKEN: list[tuple[str, Callable[[Path], object], tuple[str, ...], tuple[str, ...]]] = [
    (
        "folder",
        lambda at: (at / "n.txt").write_text("ant\nbee\ncow\n"),
        ("--classes", "n.txt"),
        ("n.txt", "3 names for 2 classes", "ant, bee"),
    ),
    (
        "folder",
        lambda at: (at / "n.txt").write_text("ant\tAnt\nwasp\tWasp\n"),
        ("--classes", "n.txt"),
        ("n.txt: names the class 'wasp', which has no folder", "ant, bee"),
    ),
    (
        "folder",
        lambda at: (at / "n.txt").write_text(""),
        ("--classes", "n.txt"),
        ("n.txt: is empty; write one class name per line",),
    ),
    ("folder", lambda _: 0, ("--classes", "none.txt"), ("--classes: no such file: none.txt",)),
    (
        "folder",
        lambda at: (at / "t.txt").write_text("a {}\na photo\n"),
        ("--templates", "t.txt"),
        ("t.txt: the template 'a photo' has no {} for the name",),
    ),
    (
        "folder",
        lambda at: (at / "t.txt").write_text("\n"),
        ("--templates", "t.txt"),
        ("t.txt: no templates; write one per line, with {} for the name",),
    ),
    ("folder", lambda _: 0, ("--templates", "no.txt"), ("--templates: no such file: no.txt",)),
    (
        "folder",
        lambda at: (at / "folder/templates.txt").write_text("no place\n"),
        (),
        ("folder/templates.txt: the template 'no place' has no {}",),
    ),
    (
        "table",
        lambda at: (at / "n.txt").write_text("ant\nbee\ncow\n"),
        ("--classes", "n.txt"),
        ("is no known class", "unknown class", "max_bad_fraction"),
    ),
    (
        "table",
        lambda at: (at / "table/label.csv").write_text("image,label\n0.bmp,7\n1.bmp,0\n"),
        ("--classes", "five.txt"),
        ("label.csv row 1: '7' is no known class",),
    ),
    (
        "folder",
        lambda _: 0,
        ("--task", "retrieval", "--classes", "five.txt"),
        ("--classes: does not apply to retrieval",),
    ),
    (
        "folder",
        lambda _: 0,
        ("--task", "zeroshot", "--shots", "3"),
        ("--shots: does not apply to zero_shot",),
    ),
    ("folder", lambda _: 0, ("--task", "zero"), ("--task zero: no such task; known: zeroshot",)),
    (
        "folder",
        lambda _: 0,
        ("--task", "knn", "--train-split", "train"),
        ("data.split: no folder train in folder",),
    ),
]


@pytest.mark.parametrize(("format", "spoil", "options", "words"), BROKEN)
def test_bad_names_and_templates_are_one_line(
    command: Command,
    workplace: Path,
    format: str,
    spoil: Callable[[Path], object],
    options: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    make_model(workplace / "m")
    classes_in(workplace / "folder")
    root = "folder"
    if format == "table":
        make_table(workplace / "table", 10)
        root = "table/label.csv"
    (workplace / "five.txt").write_text("ant\nbee\ncow\ndog\neel\n")
    spoil(workplace)
    done = command("eval", "--model", "m", "--data", f"{format}:{root}", *options)
    assert_refused(done, *words)
