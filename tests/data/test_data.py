"""The formats, and a stream of batches that is a function of its seed and position."""

import itertools
import json
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import make_pairs, noise_image

from leanclip.cli.arguments import images_in
from leanclip.config.data import DataConfig
from leanclip.data import open_dataset
from leanclip.data.dataset import read_class_names, read_lines, read_templates
from leanclip.data.formats import shapes
from leanclip.errors import DataError, SampleError
from leanclip.io.files import read_json_lines


def config(root: Path, format: str = "pairs", **more: object) -> DataConfig:
    return DataConfig.model_validate({"format": format, "root": str(root), "workers": 0} | more)


def make_food(root: Path) -> Path:
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "classes.txt").write_text("apple_pie\nfrench_fries\n")
    (root / "meta" / "labels.txt").write_text("Apple pie\nFrench fries\n")
    for split, numbers in (("train", (1, 2, 3)), ("test", (4,))):
        lines = [f"{c}/{n}" for c in ("apple_pie", "french_fries") for n in numbers]
        (root / "meta" / f"{split}.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            (root / "images" / line).parent.mkdir(parents=True, exist_ok=True)
            noise_image(len(line)).save(root / "images" / f"{line}.jpg")
    return root


# --- pairs


def test_pairs_are_keyed_by_path_and_suffixes_have_any_case(tmp_path: Path) -> None:
    for i, name in enumerate(("a/1.jpg", "b/1.JPG", "b/c/2.Png", "3.jpeg", "4.bmp", "5.WEBP")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(i).save(path)
        path.with_suffix(".txt").write_text(f"caption of {name}\n\n  second  \n")
    (tmp_path / "notes.md").write_text("not an image")
    dataset = open_dataset(config(tmp_path))
    assert len(dataset) == 6
    for i in range(6):
        sample = dataset[i]
        name = Path(sample.id).relative_to(tmp_path)
        assert list(sample.captions) == [f"caption of {name}", "second"]


def test_an_empty_caption_file_is_named(tmp_path: Path) -> None:
    make_pairs(tmp_path / "p", 3)
    (tmp_path / "p" / "001.txt").write_text("  \n\n")
    with pytest.raises(SampleError, match=r"001\.txt: an empty caption file"):
        open_dataset(config(tmp_path / "p"))[1]
    (tmp_path / "p" / "001.txt").write_text("")
    with pytest.raises(DataError, match=r"001\.txt: an empty caption file"):
        open_dataset(config(tmp_path / "p"))
    assert len(open_dataset(config(tmp_path / "p", max_bad_fraction=0.5))) == 3


def test_a_missing_caption_file_is_named(tmp_path: Path) -> None:
    make_pairs(tmp_path / "p", 3)
    (tmp_path / "p" / "002.txt").unlink()
    with pytest.raises(DataError, match=r"002\.png: has no caption file 002\.txt"):
        open_dataset(config(tmp_path / "p"))


def test_a_caption_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    make_pairs(tmp_path / "p", 1)
    (tmp_path / "p" / "000.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SampleError, match=r"000\.txt: is not UTF-8"):
        open_dataset(config(tmp_path / "p"))[0]


ODD = "one\u2028line \x0c with\x85 odd\x1c \x0bseparators\u2029!"  # str.splitlines ends lines there


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_only_line_ends_end_lines(tmp_path: Path, end: str) -> None:
    make_pairs(tmp_path / "pairs", 1)
    (caption,) = (tmp_path / "pairs").rglob("*.txt")
    path = tmp_path / "lines.txt"
    for file, lines in ((caption, [ODD, "two"]), (path, [f"{ODD}{{}}", "a {}"])):
        file.write_bytes(end.join([*lines, ""]).encode())
    pairs = DataConfig(format="pairs", root=str(tmp_path / "pairs"), workers=0)
    assert open_dataset(pairs)[0].captions == [ODD, "two"]
    whole = pairs.model_copy(update={"one_caption_per_line": False})
    assert open_dataset(whole)[0].captions == [f"{ODD}\ntwo"]
    assert read_class_names(path) == read_templates(path) == read_lines(path) == lines
    assert images_in(path.read_bytes()) == lines
    (tmp_path / "lines.jsonl").write_bytes(end.join(['{"a": "\u2028"}', "[1]", ""]).encode())
    assert read_json_lines(tmp_path / "lines.jsonl") == [{"a": "\u2028"}, [1]]


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root: no such folder: .*nowhere"):
        open_dataset(config(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no images found"):
        open_dataset(config(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"data\.split: no folder val .*found: train"):
        open_dataset(config(tmp_path, split="val"))


# --- food101


def test_food101(tmp_path: Path) -> None:
    make_food(tmp_path)
    train = open_dataset(config(tmp_path, "food101"))
    test = open_dataset(config(tmp_path, "food101", split="test"))
    assert (len(train), len(test)) == (6, 2)
    assert train.classes == ["apple pie", "french fries"]
    assert [train[i].label for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert train[5].image == tmp_path / "images/french_fries/3.jpg"
    assert "a photo of french fries, a type of food." in train[5].captions
    assert test[0].captions == ["a photo of apple pie, a type of food."]
    own = open_dataset(config(tmp_path, "food101", templates=("yum, {}!",)))
    assert own[0].captions == ["yum, apple pie!"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda r: (r / "meta/train.txt").write_text("pizza/1\n"), "'pizza/1' is not of the form"),
        (lambda r: (r / "meta/train.txt").write_text("apple_pie/../x\n"), "is not of the form"),
        (lambda r: (r / "meta/train.txt").write_text(""), r"train\.txt: lists no images"),
        (lambda r: (r / "meta/train.txt").unlink(), r"train\.txt: no such file"),
        (lambda r: (r / "meta/labels.txt").write_text("x\n"), "classes.txt has 2 lines and labels"),
        (lambda r: (r / "meta").rename(r / "other"), "no folder meta .* is it Food-101"),
    ],
)
def test_a_spoilt_food101_is_named(tmp_path: Path, spoil, words: str) -> None:
    spoil(make_food(tmp_path))
    with pytest.raises(DataError, match=words):
        open_dataset(config(tmp_path, "food101"))


# --- folder


def test_folder_of_classes(tmp_path: Path) -> None:
    for name in ("tabby_cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        noise_image(1).save(tmp_path / "train" / name / "1.png")
    dataset = open_dataset(config(tmp_path, "folder", split="train"))
    assert dataset.classes == ["dog", "tabby cat"]
    assert dataset[1].captions == ["a photo of a tabby cat."]
    (tmp_path / "classes.txt").write_text("dog\thound\n")
    assert open_dataset(config(tmp_path, "folder", split="train")).classes == ["hound", "tabby cat"]
    with pytest.raises(DataError, match=r"the template 'a cat' has no {}"):
        open_dataset(config(tmp_path, "folder", split="train", templates=("a cat",)))
    with pytest.raises(DataError, match="no class folders"):
        open_dataset(config(tmp_path / "train" / "dog", "folder"))


def test_an_empty_class_folder_is_a_class_and_hidden_names_are_passed_over(tmp_path: Path) -> None:
    for name in ("ant", "bee", ".git"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="no images found"):
        open_dataset(config(tmp_path, "folder"))
    for path in ("bee/1.png", "bee/.hidden.png", ".git/2.png"):
        noise_image(1).save(tmp_path / path)
    (tmp_path / "bee" / ".trash").mkdir()
    noise_image(2).save(tmp_path / "bee" / ".trash" / "3.png")
    dataset = open_dataset(config(tmp_path, "folder"))
    assert dataset.classes == ["ant", "bee"]
    assert [(dataset[i].id, dataset[i].label) for i in range(len(dataset))] == [
        (str(tmp_path / "bee" / "1.png"), 1)
    ]


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    make_pairs(tmp_path / "elsewhere", 2)
    root = make_pairs(tmp_path / "root", 1)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(root)
    dataset = open_dataset(config(root))
    assert [dataset[i].id for i in range(len(dataset))] == [
        str(root / name) for name in ("000.png", "linked/000.png", "linked/001.png")
    ]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch) -> None:
    root = make_pairs(tmp_path / "root", 1)
    monkeypatch.chdir(root)
    for _ in range(20):  # to a path that is too long for the system
        Path("d" * 250).mkdir()
        os.chdir("d" * 250)
    with pytest.raises(DataError, match="d: cannot be read: File name too long"):
        open_dataset(config(root))


def test_a_file_of_class_names_has_no_gaps(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "c" / name).mkdir(parents=True)
        noise_image(1).save(tmp_path / "c" / name / "1.png")
    names = tmp_path / "names.txt"
    settings = config(tmp_path / "c", "folder", class_names=str(names))
    with pytest.raises(DataError, match=r"data\.class_names: no such file: .*names\.txt"):
        open_dataset(settings)
    names.write_text(" Ant \nBee\n\n\n")
    assert open_dataset(settings).classes == ["Ant", "Bee"]
    for content, words in (
        (b"\n \n", "is empty; write one class name per line"),
        (b"Ant\n\nBee\n", "line 2 is blank"),
        (b"\xff\xfe", "is not UTF-8"),
    ):
        names.write_bytes(content)
        for format in ("folder", "table", "shards"):
            if format == "folder":
                root = tmp_path / "c"
            elif format == "table":
                (root := tmp_path / "a.csv").write_text("image,label\nx.png,1\n")
            else:
                with tarfile.open(root := tmp_path / "0.tar", "w") as tar:
                    tar.add(tmp_path / "c/ant/1.png", "0.png")
            with pytest.raises(DataError, match=words):
                open_dataset(config(root, format, class_names=str(names)))


# --- shapes


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes") / "drawn"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "_COUNTS", {"train": 300, "val": 20, "unseen": 48})
        assert list(shapes.draw_dataset(root))[-1] == (368, 368)
    return root


def test_drawings_are_ordinary_files(drawings: Path) -> None:
    train = open_dataset(config(drawings, "shapes"))
    assert len(train) == 300
    assert Path(train[0].id).suffix == ".png"
    assert len(train[0].captions) == 4
    val = open_dataset(config(drawings, "shapes", split="val"))
    captions = [val[i].captions for i in range(20)]
    assert len({caption for (caption,) in captions}) == 20
    unseen = open_dataset(config(drawings, "shapes", split="unseen"))
    assert (len(unseen.classes), len(unseen)) == (24, 48)
    assert unseen[0].captions[0] == f"a {unseen.classes[0]}"


def test_unseen_classes_are_never_trained_on(drawings: Path) -> None:
    unseen = {shapes.class_name(*c) for c in shapes.UNSEEN}
    texts = [path.read_text() for path in drawings.rglob("*.txt")]
    assert len(texts) == 320
    assert not any(name in text for name in unseen for text in texts)
    for split in ("train", "val"):
        scenes = list(itertools.islice(shapes._seen_scenes(random.Random(3), split), 100))
        drawn = {(f.texture, f.color, f.shape) for _, scene in scenes for f in scene.figures}
        assert len(drawn) > 50
        assert drawn.isdisjoint(shapes.UNSEEN)


def test_every_attribute_of_an_unseen_class_is_seen() -> None:
    seen = set(shapes.CLASSES) - shapes.UNSEEN
    assert len(shapes.UNSEEN) == 24
    for chosen in shapes.UNSEEN:
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert any(c[i] == chosen[i] for c in seen)
            assert any((c[i], c[j]) == (chosen[i], chosen[j]) for c in seen)


def test_drawing_is_deterministic(drawings: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shapes, "_COUNTS", {"train": 300, "val": 20, "unseen": 48})
    list(shapes.draw_dataset(tmp_path / "again"))
    list(shapes.draw_dataset(tmp_path / "other", seed=1))
    files = sorted(p.relative_to(drawings) for p in drawings.rglob("*") if p.is_file())
    again, other = (
        [(tmp_path / which / p).read_bytes() for p in files if p.suffix == ".png"]
        for which in ("again", "other")
    )
    first = [(drawings / p).read_bytes() for p in files if p.suffix == ".png"]
    assert again == first
    assert other != first


def test_a_scene_is_drawn_as_its_caption_says() -> None:
    rng = random.Random(5)
    for _, scene in itertools.islice(shapes._seen_scenes(rng, "val"), 50):
        image = np.asarray(shapes.draw(scene)).astype(int)
        for figure in scene.figures:
            ink = np.abs(image - np.array(shapes.COLORS[figure.color])).sum(axis=2) < 60
            assert ink.sum() > 20, scene
        first, second = scene.figures
        caption = shapes.full_caption(scene, rng)
        before, relation, _ = next(
            c for r in shapes.RELATIONS if (c := caption.partition(f" {r} a"))[1]
        )
        names = [shapes.class_name(f.texture, f.color, f.shape) for f in scene.figures]
        assert all(name in caption for name in names)
        if names[0] not in before:
            first, second = second, first
        dx, dy = shapes.RELATIONS[relation[1:-2]]
        assert (first.x - second.x) * dx + (first.y - second.y) * dy > 0.3


def test_finished_drawings_are_kept_and_others_are_not_touched(drawings: Path) -> None:
    facts = json.loads((drawings / "shapes.json").read_text())
    assert facts["train"] == 300
    with pytest.raises(DataError, match="holds other drawings"):
        list(shapes.draw_dataset(drawings, seed=9))
    with pytest.raises(DataError, match="is not empty"):
        list(shapes.draw_dataset(drawings / "train"))
    with pytest.raises(DataError, match="leanclip data shapes"):
        open_dataset(config(drawings / "train", "shapes"))
