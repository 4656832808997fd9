"""What a label means: the same in folders, tables, Parquet, shards and data sets of the hub."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import pytest
from conftest import noise_image

from leanclip.config.data import DataConfig
from leanclip.data import Dataset, open_dataset
from leanclip.data.tools.check import open_parts, read_parts
from leanclip.data.tools.findings import find
from leanclip.errors import DataError, SampleError

SYNSETS = ("n01440764 tench, Tinca tinca", "n02012849 crane", "n03126707 crane, hoist")
NUMBERS = [str(number) for number in range(12)]


def open_at(root: Path, format: str, **more: object) -> Dataset:
    values = {"format": format, "root": str(root), "workers": 0, "max_bad_fraction": 1.0}
    return open_dataset(DataConfig.model_validate(values | more))


def names_by_sample(dataset: Dataset) -> list[str | None]:
    """The name of each sample's class; None where its label is none."""
    found = []
    for index in range(len(dataset)):
        try:
            label = dataset[index].label
        except SampleError:
            found.append(None)
        else:
            found.append(None if label is None else dataset.classes[label])
    return found


def make_folders(root: Path, names: Sequence[str], images: int = 1) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(images):
            noise_image(len(name) + number).save(root / name / f"{number}.png")
    return root


def png() -> bytes:
    noise_image(1).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def hub_rows(names: Sequence[str], labels: Sequence[int]) -> datasets.Dataset:
    features = datasets.Features(
        {"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=list(names))}
    )
    rows = {"image": [png()] * len(labels), "label": list(labels)}
    return datasets.Dataset.from_dict(rows, features=features)


def as_hub(root: Path, names: Sequence[str], labels: Sequence[int], **more: object) -> Dataset:
    hub_rows(names, labels).save_to_disk(root / "saved")
    return open_at(root / "saved", "hub", **more)


def as_parquet(root: Path, names: Sequence[str], labels: Sequence[int], **more: object) -> Dataset:
    hub_rows(names, labels).to_parquet(root / "rows.parquet")
    return open_at(root / "rows.parquet", "table", **more)


def as_csv(root: Path, names: Sequence[str], labels: Sequence[int], **more: object) -> Dataset:
    (root / "names.txt").write_text("\n".join(names) + "\n")
    (root / "rows.csv").write_text("image,label\n" + "".join(f"x.png,{n}\n" for n in labels))
    return open_at(root / "rows.csv", "table", **{"class_names": str(root / "names.txt"), **more})


def as_json(root: Path, names: Sequence[str], labels: Sequence[int], **more: object) -> Dataset:
    (root / "names.txt").write_text("\n".join(names) + "\n")
    lines = [json.dumps({"image": "x.png", "label": number}) for number in labels]
    (root / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return open_at(root / "rows.jsonl", "table", **{"class_names": str(root / "names.txt"), **more})


def as_shards(root: Path, names: Sequence[str], labels: Sequence[int], **more: object) -> Dataset:
    (root / "classes.txt").write_text("\n".join(names) + "\n")
    with tarfile.open(root / "0.tar", "w") as tar:
        for number, label in enumerate(labels):
            for suffix, content in (("png", png()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return open_at(root, "shards", **more)


FORMATS = [as_hub, as_parquet, as_csv, as_json, as_shards]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANCLIP_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("make", FORMATS)
@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["1", "2", "3"], [0, 1, 2, 1]),
        (["2", "0", "1"], [2, 0, 1]),  # each is the number of another
        (["10", "3", "cat"], [0, 1, 2]),
    ],
)
def test_a_whole_number_is_an_index_whatever_names_look_like(
    tmp_path: Path, make: Callable[..., Dataset], names: list[str], labels: list[int]
) -> None:
    dataset = make(tmp_path, names, labels)
    assert list(dataset.classes) == names
    assert [dataset[index].label for index in range(len(labels))] == labels
    (tmp_path / "twice.txt").write_text("crane\nheron\ncrane\n")
    dataset = make(tmp_path, names, labels, class_names=str(tmp_path / "twice.txt"))
    assert list(dataset.classes) == ["crane", "heron", "crane"]
    assert dataset.templates


@pytest.mark.parametrize("make", [as_csv, as_json, as_shards])
@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (["cat", "dog"], ["dog", "cat", "1", "fox"], ["dog", "cat", "dog", None]),
        (["tabby cat", "dog"], ["tabby_cat", "tabby cat"], ["tabby cat"] * 2),
        (["cat", "dog"], ["1.0", "0.0", "0.5"], ["dog", "cat", None]),  # as pandas writes them
        (["10", "20"], ["20", "10"], ["20", "10"]),  # numbers of no class: names
        (["1", "2", "3"], ["1", "3"], ["2", None]),  # never both: 3 is no index
        (["crane", "fox", "crane"], ["fox", "crane", "2"], ["fox", None, "crane"]),
        (["7\tant", "3\tbee"], ["3", "7", "0"], ["bee", "ant", None]),
        (["cat\tdog", "dog\tcat"], ["cat", "dog", "1"], ["dog", "cat", "cat"]),  # keys before names
        (SYNSETS, ["n02012849", "n01440764", "2"], ["crane", "tench", "crane"]),
    ],
)
def test_names_and_keys_are_labels_too(
    tmp_path: Path,
    make: Callable[..., Dataset],
    names: Sequence[str],
    labels: Sequence[str],
    expected: list[str | None],
) -> None:
    assert names_by_sample(make(tmp_path, names, labels)) == expected


def test_a_number_out_of_range_is_not_said_to_be_a_name(tmp_path: Path) -> None:
    dataset = as_csv(tmp_path, ["1", "2", "3"], [3])
    with pytest.raises(SampleError, match=r"'3' is no known class: .* 3 classes .* from 0"):
        dataset[0]


def test_a_file_of_names_goes_by_number_for_class_labels_that_are_numbers(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("".join(f"name {number}\n" for number in NUMBERS))
    alphabetical = sorted(NUMBERS)  # as datasets' own imagefolder has them
    dataset = as_hub(tmp_path, alphabetical, range(12), class_names=str(names))
    assert names_by_sample(dataset) == [f"name {number}" for number in alphabetical]
    folders = make_folders(tmp_path / "folders", NUMBERS)
    assert open_at(folders, "folder").classes == NUMBERS
    dataset = open_at(folders, "folder", class_names=str(names))
    by_folder = {Path(dataset[i].id).parent.name: dataset[i].label for i in range(12)}
    assert by_folder == {number: int(number) for number in NUMBERS}
    assert dataset.classes[10] == "name 10"
    names.write_text("one\ntwo\n")
    with pytest.raises(DataError, match=r"names\.txt: has 2 names for 12 classes"):
        as_parquet(tmp_path, alphabetical, range(12), class_names=str(names))


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["007", "7b", "10"], ["007", "10", "7b"]),
        (["2", "1_0"], ["1 0", "2"]),  # Python alone takes 1_0 for a number
    ],
)
def test_folders_that_are_numbers_are_in_their_order(
    tmp_path: Path, folders: list[str], expected: list[str]
) -> None:
    assert open_at(make_folders(tmp_path / "c", folders), "folder").classes == expected


def test_a_synset_mapping_gives_names_by_folder(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "c", [line[:9] for line in SYNSETS])
    mapping = tmp_path / "synset_mapping.txt"
    mapping.write_text("\n".join(reversed(SYNSETS)) + "\n")
    dataset = open_at(root, "folder", class_names=str(mapping))
    assert dataset.classes == ["tench", "crane", "crane"]
    assert [dataset[index].label for index in range(3)] == [0, 1, 2]
    found = as_hub(tmp_path, ["n03126707", "n01440764"], [0, 1], class_names=str(mapping))
    assert list(found.classes) == ["crane", "tench"]
    mapping.write_text("n01440764\ttench\nfish\tFish\n")
    with pytest.raises(DataError, match="names the class 'fish', which has no folder"):
        open_at(root, "folder", class_names=str(mapping))
    mapping.write_text("ant\tAnt\nbee Bee\n")
    with pytest.raises(DataError, match="line 2 is not a folder, a tab and a name"):
        open_at(root, "folder", class_names=str(mapping))


def test_folders_that_systems_make_are_no_classes(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "c", ["ant", "bee"], images=2)
    make_folders(root, ["@eaDir", "__MACOSX", "ant/@eaDir"])
    dataset = open_at(root, "folder")
    assert (dataset.classes, len(dataset)) == (["ant", "bee"], 4)


def test_a_name_of_two_classes_counts_each(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "c", ["a", "b", "c"], images=2)
    (root / "classes.txt").write_text("crane\nfox\ncrane\n")
    parts = open_parts([DataConfig(format="folder", root=str(root), workers=0)])
    read_parts(parts, workers=0)
    found = find(parts, batch_size=2, context_length=77).values["parts"]["all"]["classes"]
    assert found["classes"] == 3
    assert sum(found["counts"].values()) == 6


def test_a_split_without_some_class_takes_names_of_all(tmp_path: Path) -> None:
    root = tmp_path / "d"
    make_folders(root / "train", ["ant", "bee", "cow"])
    make_folders(root / "test", ["bee", "cow"])
    names = tmp_path / "names.txt"
    for content in ("Ant\nBee\nCow\n", "ant\tAnt\nbee\tBee\ncow\tCow\n"):
        names.write_text(content)
        settings = {"class_names": str(names)}
        assert open_at(root, "folder", split="train", **settings).classes == ["Ant", "Bee", "Cow"]
        test = open_at(root, "folder", split="test", **settings)
        assert test.classes == ["Ant", "Bee", "Cow"]
        assert [test[index].label for index in range(2)] == [1, 2]
    names.write_text("Bee\nCow\n")
    assert open_at(root, "folder", split="test", class_names=str(names)).classes == ["Bee", "Cow"]
    names.write_text("ant\tAnt\nowl\tOwl\n")
    with pytest.raises(DataError, match="names the class 'owl', which has no folder"):
        open_at(root, "folder", split="test", class_names=str(names))
