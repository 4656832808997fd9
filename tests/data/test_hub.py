"""The hub format on data sets made here: saved, in files, in folders of images, and streamed."""

import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import torch
from conftest import make_pairs, noise_image, small_batches
from pyarrow import parquet

from leanclip.config.data import DataConfig
from leanclip.data import open_dataset
from leanclip.data.batch import Position
from leanclip.data.formats.mixture import Mixture
from leanclip.data.loader import evaluation_batches
from leanclip.data.tools.pack import pack
from leanclip.errors import ConfigError, DataError, SampleError
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.text import Tokenizer


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def config(root: Path | str, **more: object) -> DataConfig:
    return DataConfig.model_validate({"format": "hub", "root": str(root), "workers": 0} | more)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    noise_image(seed).save(file, "PNG")
    return file.getvalue()


def make_parts(folder: Path, sizes: tuple[int, ...] = (7, 6, 5, 5)) -> Path:
    """Parquet as the hub has it: images in structs, several files of one split."""
    folder.mkdir()
    numbers = itertools.count()
    for part, size in enumerate(sizes):
        these = list(itertools.islice(numbers, size))
        images = [{"bytes": png(i), "path": f"{i}.png"} for i in these]
        table = pa.table({"image": images, "text": [f"text {i}" for i in these]})
        parquet.write_table(table, folder / f"train-{part:05d}-of-{len(sizes):05d}.parquet")
    return folder


# --- on the disk


def test_a_saved_data_set_with_images_and_labels(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "pixels": datasets.Image(),
            "label": datasets.ClassLabel(names=["red_fox", "cat"]),
            "other": datasets.Value("int64"),
        }
    )
    rows = datasets.Dataset.from_dict(
        {"pixels": [{"bytes": png(i), "path": None} for i in range(3)] + [None]}
        | {"label": [1, 0, None, 1], "other": [0, 0, 0, 0]},
        features=features,
    )
    rows.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"val": rows}).save_to_disk(tmp_path / "dict")
    for dataset in (
        open_dataset(config(tmp_path / "plain")),
        open_dataset(config(tmp_path / "dict", split="val", templates=("a photo of a {}.",))),
    ):
        assert dataset.classes == ["red fox", "cat"]
        assert (dataset[0].image, dataset[0].label) == (png(0), 1)
        assert dataset[1].captions == ["a photo of a red fox."]
        for index, kind in ((2, "unknown class"), (3, "missing image")):
            with pytest.raises(SampleError, match=f" row {index + 1}: ") as caught:
                dataset[index]
            assert caught.value.kind == kind
    with pytest.raises(DataError, match=r"data\.split: .* has val, no train"):
        open_dataset(config(tmp_path / "dict"))


def test_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict(
        {"image": ["x.png"], "text": ["a"]}, split=datasets.Split.VALIDATION
    )
    rows.save_to_disk(tmp_path / "saved")
    for split in (None, "validation"):
        assert len(open_dataset(config(tmp_path / "saved", split=split))) == 1
    with pytest.raises(DataError, match=r"data\.split: .*split validation\), with no train"):
        open_dataset(config(tmp_path / "saved", split="train"))
    (tmp_path / "a.csv").write_text("image,text\nx.png,a\n")
    assert len(open_dataset(config(tmp_path / "a.csv", split="train"))) == 1
    with pytest.raises(DataError, match=r"data\.split: .*a\.csv is a file"):
        open_dataset(config(tmp_path / "a.csv", split="val"))


def test_a_folder_of_images(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        noise_image(len(name)).save(tmp_path / "images" / name / "1.png")
    dataset = open_dataset(config(tmp_path / "images"))
    assert dataset.classes == ["cat", "dog"]
    assert dataset[1].image == tmp_path / "images" / "dog" / "1.png"


def test_a_folder_of_images_with_captions_streamed_or_not(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "images", 3)
    lines = [{"file_name": f"{i:03d}.png", "text": f"text {i}"} for i in range(3)]
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in root.glob("*.txt"):
        path.unlink()
    dataset = open_dataset(config(root))
    expected = {(root / f"{i:03d}.png", f"text {i}") for i in range(3)}
    assert {(dataset[i].image, dataset[i].captions[0]) for i in range(3)} == expected
    stream = open_dataset(config(root, streaming=True, epoch_size=3))
    samples: list[Any] = list(stream.visits((0, 0)))
    assert {(sample.image, sample.captions[0]) for sample in samples} == expected


IMAGE, TEXT = datasets.Image(), datasets.Value("string")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"mask": IMAGE, "image": IMAGE}, "image"),
        ({"depth": IMAGE, "path": TEXT, "Img": IMAGE, "jpg": IMAGE}, "Img"),
        ({"mask": IMAGE, "image_path": TEXT}, "image_path"),
        ({"file_name": TEXT, "photo": IMAGE, "edges": IMAGE}, "photo"),
        ({"file_name": TEXT}, "file_name"),
    ],
)
def test_the_usual_name_comes_before_the_first_column_of_images(
    tmp_path: Path, columns: dict[str, Any], expected: str
) -> None:
    values = {
        name: [{"bytes": name.encode(), "path": None}] if kind is IMAGE else [f"{name}.png"]
        for name, kind in columns.items()
    }
    features = datasets.Features(columns | {"caption": TEXT})
    rows = datasets.Dataset.from_dict(values | {"caption": ["a"]}, features=features)
    rows.save_to_disk(tmp_path / "saved")
    image = open_dataset(config(tmp_path / "saved"))[0].image
    text = image.decode() if isinstance(image, bytes) else image.name
    assert text.removesuffix(".png") == expected


def test_a_csv_of_other_signs_is_left_to_the_layout_table(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for content, words in (
        ("image;caption\nx.png;a\n", "separated by ';'; format table reads such files"),
        ("image\tcaption\nx.png\ta\n", "separated by '\\\\t'; format table"),
        ("a cat,1.png\na dog,2.png\n", "has no header line, but values"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=words):
            open_dataset(config(path))


def test_lists_of_labels_are_refused_in_words(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["cat", "dog"])
    many = {"tags": datasets.Sequence(TEXT), "labels": datasets.Sequence(names)}
    values = {"image": ["x.png"] * 2, "tags": [["a"], ["a", "b"]], "labels": [[0, 1], []]}
    rows = datasets.Dataset.from_dict(
        values | {"n": [0, 1]},
        features=datasets.Features({"image": TEXT} | many | {"n": datasets.Value("int64")}),
    )
    rows.save_to_disk(tmp_path / "saved")
    for name in ("parts/a.parquet", "a.jsonl", "x.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith("parquet"):
            rows.to_parquet(tmp_path / name)
        else:
            rows.to_json(tmp_path / name)
    for format, root, more in (
        ("hub", "saved", {}),
        ("hub", "saved", {"label_column": "tags"}),
        ("hub", "parts", {}),
        ("hub", "parts", {"streaming": True, "epoch_size": 2}),
        ("table", "x.parquet", {}),
        ("table", "a.jsonl", {}),
    ):
        settings = config(tmp_path / root, **more).model_copy(update={"format": format})
        with pytest.raises(
            DataError, match=r"has lists of labels; .* data\.label_column"
        ) as caught:
            open_dataset(settings)
        assert repr(more.get("label_column", "labels")) in str(caught.value)
        if not settings.streaming:
            other = settings.model_copy(update={"label_column": "n"})
            assert open_dataset(other).classes == ["0", "1"]


def test_labels_without_names(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("image,label\nx.png,10\ny.png,9\n")
    dataset = open_dataset(config(path))
    assert (dataset.classes, dataset[0].label) == (["9", "10"], 1)
    assert dataset[0].image == tmp_path / "x.png"
    with pytest.raises(DataError, match=r"its classes have no names; set data\.class_names"):
        open_dataset(config(path, streaming=True, epoch_size=2))


def test_parquet_parts_by_index(tmp_path: Path) -> None:
    settings = config(make_parts(tmp_path / "parts"))
    dataset = open_dataset(settings)
    assert [dataset[i].captions for i in range(len(dataset))] == [[f"text {i}"] for i in range(23)]
    batches = evaluation_batches(
        dataset, settings, preprocess=Preprocess(16), tokenizer=Tokenizer(12), batch_size=10
    )
    assert [len(batch) for batch in batches] == [10, 10, 3]


# --- streaming


def stream(root: Path, count: int, start: Position = Position(), **more: object) -> list[Any]:  # noqa: B008
    settings = config(root, streaming=True, shuffle_buffer=4, **{"epoch_size": 23} | more)
    batches = small_batches(settings, batch_size=5, start=start)
    return [
        (position, batch.tokens, batch.images, batch.bad)
        for batch, position in itertools.islice(batches, count)
    ]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        (p, bad) == (q, worse) and torch.equal(t, u) and torch.equal(x, y)
        for (p, t, x, bad), (q, u, y, worse) in zip(a, b, strict=True)
    )


def order(root: Path, key: tuple[int, ...], start: int = 0, **more: object) -> list[str]:
    settings = config(root, streaming=True, shuffle_buffer=4, **{"epoch_size": 23} | more)
    samples: list[Any] = list(open_dataset(settings).visits(key, start))
    return [sample.captions[0] for sample in samples]


def test_the_position_alone_rebuilds_the_stream(tmp_path: Path) -> None:
    root = make_parts(tmp_path / "parts")
    whole = stream(root, 7)
    assert same(stream(root, 7, workers=2), whole)
    for done in range(1, 7):
        assert same(stream(root, 7 - done, whole[done - 1][0]), whole[done:])


def test_each_epoch_of_a_stream_has_every_row_in_a_new_order(tmp_path: Path) -> None:
    root = make_parts(tmp_path / "parts")
    first, second = order(root, (0, 0)), order(root, (0, 1))
    assert sorted(first) == sorted(second) == sorted(f"text {i}" for i in range(23))
    assert first != second
    assert first[:7] != [f"text {i}" for i in range(7)]
    firsts = {order(root, (seed, 0))[0] for seed in range(8)}
    assert len({int(name.split()[1]) // 7 for name in firsts}) > 1  # of different files


def test_a_stream_shorter_than_its_epoch_starts_anew(tmp_path: Path) -> None:
    root = make_parts(tmp_path / "parts", (3, 2))
    whole = order(root, (0, 0), epoch_size=12)
    assert len(whole) == 12
    assert len(set(whole[:5])) == len(set(whole[5:10])) == 5
    for start in range(12):
        assert order(root, (0, 0), start, epoch_size=12) == whole[start:]


def test_bad_rows_of_a_stream_keep_their_places(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "p", 10)
    rows = [{"image": f"{i:03d}.png", "text": f"text {i}"} for i in range(10)]
    rows[2]["text"] = " "
    rows[5]["image"] = "gone.png"
    rows[8]["image"] = "http://a/b.png"
    path = root / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = stream(path, 4, epoch_size=10)
    assert [position for position, *_ in found] == [(0, 5), (1, 0), (1, 5), (2, 0)]
    bad = [one for *_, some in found for one in some]
    expected = ["empty caption", "image at a URL", "missing file"]
    assert sorted(one.kind for one in bad) == sorted(expected * 2)
    assert len({one.id for one in bad}) == 3  # the same names in the next epoch
    assert same(stream(path, 2, Position(1, 0), epoch_size=10), found[2:])
    source = config(path, streaming=True, epoch_size=10, max_bad_fraction=0.5)
    assert pack(source, tmp_path / "packed", workers=0)["samples"] == 7
    lines = (tmp_path / "packed" / "skipped.jsonl").read_text().splitlines()
    kinds = sorted(json.loads(line)["kind"] for line in lines)
    assert kinds == expected


def test_a_stream_without_a_length_or_an_index(tmp_path: Path) -> None:
    root = make_parts(tmp_path / "parts")
    with pytest.raises(
        DataError, match=r"number of rows of its stream is unknown; set data\.epoch_size"
    ):
        open_dataset(config(root, streaming=True))
    with pytest.raises(DataError, match=r"set data\.streaming: false to evaluate"):
        open_dataset(config(root, streaming=True, epoch_size=5))[0]


def test_a_stream_in_a_mixture_has_a_size_of_its_own(tmp_path: Path) -> None:
    pairs = {"format": "pairs", "root": str(make_pairs(tmp_path / "p", 20))}
    streamed = {"format": "hub", "root": str(make_parts(tmp_path / "parts"))}
    streamed |= {"streaming": True, "epoch_size": 60}
    dataset = open_dataset(config("", format="mixture", sources=(pairs, streamed)))
    assert isinstance(dataset, Mixture)
    assert (len(dataset), dataset.fractions.tolist()) == (80, [0.25, 0.75])
    visits = list(itertools.islice(dataset.visits((0, 0)), 80))
    came = [visit for visit in visits if not isinstance(visit, int)]
    assert 40 < len(came) < 75
    assert {sample.source for sample in came} == {1}
    with pytest.raises(ConfigError, match="epoch_size goes with streaming: true only"):
        open_dataset(config("", format="mixture", sources=(pairs | {"epoch_size": 3}, streamed)))


# --- what stops everything


def test_what_cannot_be_opened_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but no more")
    (tmp_path / "a.zip").write_bytes(b"PK")
    wide = datasets.Dataset.from_dict({"a": [1], "b": [2]})
    wide.save_to_disk(tmp_path / "wide")
    latin = os.fsdecode(bytes(tmp_path) + b"/latin/caf\xe9")
    Path(latin).mkdir(parents=True)
    noise_image(1).save(f"{latin}/a.png")
    for root, words in (
        (tmp_path / "latin", r"generating the dataset: 'utf-8' codec can't encode"),
        (tmp_path / "nowhere", "no such folder, and no id on the hub"),
        (tmp_path / "empty", "cannot be read: "),
        (tmp_path / "a.parquet", "cannot be read: "),
        (tmp_path / "a.zip", "is none of .parquet"),
        (tmp_path / "wide", r"no column of images found; .*\(columns: a, b\)"),
        (make_parts(tmp_path / "parts", (1,)), None),
    ):
        with pytest.raises(DataError, match=words) as caught:
            open_dataset(config(root, split=None if words else "nosuch"))
        assert "\n" not in str(caught.value)
        assert str(root) in str(caught.value)


def test_an_id_without_a_network(tmp_path: Path) -> None:
    code = (
        "from leanclip.config.data import DataConfig; from leanclip.data import open_dataset\n"
        "try: open_dataset(DataConfig(format='hub', root='somebody/some-data:a-config'))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith("DataError data.root: somebody/some-data:a-config: cannot be read: ")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_parts(tmp_path / "parts", (1,))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"hub needs datasets: pip install .*\.\[hub\]"):
        open_dataset(config(root))
