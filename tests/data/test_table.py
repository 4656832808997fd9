"""The table format: rows of each kind of file, malformed ones, and the stream."""

import csv
import itertools
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from conftest import noise_image, small_batches
from pyarrow import parquet

from leanclip.config.data import DataConfig
from leanclip.data import Dataset, open_dataset
from leanclip.data.batch import Position
from leanclip.data.readers import csv_rows, json_lines
from leanclip.data.skipped import Bad
from leanclip.errors import DataError, SampleError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEANCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config(root: Path, **more: object) -> DataConfig:
    return DataConfig.model_validate({"format": "table", "root": str(root), "workers": 0} | more)


def captions(root: Path, **more: object) -> list[object]:
    """Each row's captions, or the kind of what is wrong with it."""
    dataset = open_dataset(config(root, **more))
    return [captions_or_kind(dataset, root, index) for index in range(len(dataset))]


def captions_or_kind(dataset: Dataset, root: Path, index: int) -> object:
    try:
        return list(dataset[index].captions)
    except SampleError as caught:
        error = caught
    assert str(error).startswith(f"{root} row {index + 1}: ")
    assert "\n" not in str(error)
    return error.kind


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "image,caption\nx.jpg,one\ny.jpg,two\n"),
        ("a.csv", "image,caption\nx.jpg,one\ny.jpg,two"),
        ("a.CSV", "\ufeffImage, Caption\r\n\r\nx.jpg,one\r\n\r\n\ny.jpg,two\r\n\r\n"),
        ("a.csv", "filepath\ttitle\nx.jpg\tone\ny.jpg\ttwo\n"),
        ("a.csv", "text;image_path\none;x.jpg\ntwo;y.jpg\n"),
        ("a.tsv", 'image\tid\tcaption\nx.jpg\t1\tone\n"y.jpg"\t2\ttwo\n'),
        ("a.jsonl", '{"image": "x.jpg", "text": "one"}\n\n{"text": ["two", ""], "image": "y.jpg"}'),
        ("a.csv", "image,caption\rx.jpg,one\r\ry.jpg,two"),
        ("a.csv", "\ufeffsep=;\r\nimage;caption\r\nx.jpg;one\r\ny.jpg;two\r\n"),
        ("a.csv", '"SEP=||"\rimage|caption\rx.jpg|one\ry.jpg|two\r'),
        ("a.tsv", "sep=\t\ntext\timage\none\tx.jpg\ntwo\ty.jpg\n"),
        ("a.tsv", "image,caption\nx.jpg,one\ny.jpg,two\n"),
        ("a.csv", 'image;caption;"size, in px"\nx.jpg;one;3,5\ny.jpg;two;4,5\n'),
        ("a.csv", '"a,b\nc"|image|"x;y"|text|\n1|x.jpg|2|one|\n1|y.jpg|2|two|\n'),
        ("a.csv", "image,caption,note;remark;more\nx.jpg,one,\ny.jpg,two,a;b\n"),
        ("a.csv", "n,image,n,caption\n1,x.jpg,2,one\n1,y.jpg,2,two\n"),
        ("a.jsonl", '{"image": "x.jpg", "text": "one"}\r{"image": "y.jpg", "text": "two"}\r'),
        ("a.ndjson", '\ufeff{"image": "x.jpg", "txt": "one"}\n{"image": "y.jpg", "txt": "two"}'),
    ],
)
def test_tables_as_they_are_written(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path / name, content)
    dataset = open_dataset(config(path))
    assert [dataset[i].captions for i in range(len(dataset))] == [["one"], ["two"]]
    assert [dataset[i].image for i in range(2)] == [tmp_path / "x.jpg", tmp_path / "y.jpg"]
    assert dataset[0].id == str(tmp_path / "x.jpg")


def test_rows_are_those_of_the_csv_module(tmp_path: Path, monkeypatch) -> None:
    texts = [
        'a "b", c',
        "one\ntwo\r\n\nthree",
        '"',
        "é, ü\n",
        "a,\rb\r",
        "plain",
        "a\u2028b\x85c",
        '""\n"',
        "x" * 500,
        "end",
    ]
    path = tmp_path / "a.csv"
    for chunk, end in itertools.product((7, 64, 1 << 20), ("\r\n", "\n", "\r")):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator=end)
            writer.writerow(["image", "caption"])
            writer.writerows(["x.jpg", text] for text in texts * 3)
        monkeypatch.setattr(csv_rows, "_CHUNK", chunk)
        os.utime(path, ns=(0, chunk))  # or the rows would be found in the cache
        assert captions(path) == [[text] for text in texts * 3]


@pytest.mark.parametrize("chunk", [100, 1 << 20])
def test_a_spoilt_row_does_not_spoil_the_next(tmp_path: Path, monkeypatch, chunk: int) -> None:
    monkeypatch.setattr(csv_rows, "_CHUNK", chunk)
    rows: list[tuple[bytes, object]] = [
        (b"x.jpg,good", ["good"]),
        (b"x.jpg", "malformed row"),
        (b"x.jpg,a,b", "malformed row"),
        (b'x.jpg,"a"b', "malformed row"),
        (b'x.jpg,5" wide', ['5" wide']),
        (b"x.jpg,", "empty caption"),
        (b'x.jpg,"  "', "empty caption"),
        (b"x.jpg,caf\xe9", "caption not UTF-8"),
        (b"x.jpg,a\0b", "malformed row"),
        (b",good", "missing image"),
        (b"x\0.jpg,good", "malformed row"),
        (b"http://a/x.jpg,good", "image at a URL"),
        (b"HTTPS://a/x.jpg,good", "image at a URL"),
        (b"s3://a/x.jpg,good", "image at a URL"),
        (b"x.jpg," + b"long " * 20_000, ["long " * 20_000]),
        (b'x.jpg,"never closed', "malformed row"),
        (b"x.jpg,after it", ["after it"]),
        (b"x.jpg,last", ["last"]),
    ]
    content = b"image,caption\n" + b"\n".join(row for row, _ in rows) + b"\n"
    assert captions(write(tmp_path / "a.csv", content)) == [expected for _, expected in rows]


def test_spoilt_json_lines(tmp_path: Path) -> None:
    rows: list[tuple[str, object]] = [
        ('{"image": "x.jpg", "caption": "good"}', ["good"]),
        ('{"image": "x.jpg", "caption": ["a", null, " ", "b"]}', ["a", "b"]),
        ('{"image": "x.jpg", "caption": []}', "empty caption"),
        ('{"image": "x.jpg", "caption": NaN}', "empty caption"),
        ('{"image": "x.jpg"}', "empty caption"),
        ('{"image": "x.jpg", "caption": 5}', "malformed row"),
        ('{"image": "x.jpg", "caption": {"a": 1}}', "malformed row"),
        ('{"image": 5, "caption": "good"}', "malformed row"),
        ('{"caption": "good"}', "missing image"),
        ('{"image": "x.jpg", "caption": "\\ud800"}', "caption not UTF-8"),
        ('{"image": "x.jpg", "caption": "cut', "malformed row"),
        ("[1, 2]", "malformed row"),
        ("[" * 100_000, "malformed row"),
        ('{"image": "x.jpg", "caption": "last"}', ["last"]),
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(row for row, _ in rows))
    assert captions(path) == [expected for _, expected in rows]


def test_large_and_undecodable_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MAX_ROW_BYTES", 100)
    monkeypatch.setattr(json_lines, "_BATCH_BYTES", 60)
    good = '{"image": "x.jpg", "caption": "%s"}'
    lines = [good % n for n in range(9)]
    lines[2:2] = [good % ("long " * 50), good % "caf\udce9", good % "long " + " " * 300]
    content = "\n".join(lines).encode("utf-8", "surrogateescape")
    expected: list[object] = [[str(n)] for n in range(9)]
    expected[2:2] = ["oversized row", "caption not UTF-8", "oversized row"]
    assert captions(write(tmp_path / "a.jsonl", content)) == expected


def test_several_caption_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "image,en,de\nx.jpg,dog,Hund\ny.jpg,cat,\n")
    assert captions(path, caption_column=("en", "de")) == [["dog", "Hund"], ["cat"]]
    assert captions(path, caption_column="de") == [["Hund"], "empty caption"]


def test_values_of_csv_are_text(tmp_path: Path) -> None:
    values = ["007", "NA", "null", "1e3", "true", "2020-01-01", '"NaN"', "N/A"]
    path = write(tmp_path / "a.csv", "image,label\n" + "".join(f"0.png,{v}\n" for v in values))
    texts = [value.strip('"') for value in values]
    assert open_dataset(config(path)).classes == sorted(texts)
    assert captions(path, caption_column="label") == [[text] for text in texts]


@pytest.mark.parametrize("values", [("007", "08"), ("1e3", "2.50"), ("NA", "null"), ("true",) * 2])
def test_columns_of_one_kind_are_text(tmp_path: Path, values: tuple[str, str]) -> None:
    """A reader that guesses types would make numbers, truth values or nothing of them."""
    path = write(tmp_path / "a.csv", "image,label\n" + "".join(f"0.png,{v}\n" for v in values))
    assert captions(path, caption_column="label") == [[value] for value in values]


def test_a_row_that_is_changed_is_read_anew_and_its_index_made_anew(
    tmp_path: Path, cache: Path
) -> None:
    path = write(tmp_path / "a.csv", "image,caption\nx.jpg,one\n")
    assert captions(path) == captions(path) == [["one"]]
    assert len(list((cache / "indices").glob("a-*"))) == 1
    write(path, "image,caption\nlonger.jpg,two\nx.jpg,three\n")
    assert captions(path) == [["two"], ["three"]]


# --- classes


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "image,label\nx.jpg,10\ny.jpg,9\nspoilt\nx.jpg,\nz.jpg,9\n"),
        ("a.jsonl", '{"image": "x", "label": 10}\n{"image": "y", "label": "9"}\n[\n{"image": "z"}'),
    ],
)
def test_labels_are_numbered_in_order(tmp_path: Path, name: str, content: str) -> None:
    dataset = open_dataset(config(write(tmp_path / name, content)))
    assert dataset.classes == ["9", "10"]
    assert (dataset[0].label, dataset[1].label) == (1, 0)
    assert dataset[0].captions == ["a photo of a 10."]
    with pytest.raises(SampleError, match=r"row 4: .* is no known class"):
        dataset[3]


def test_names_of_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "image,kind\nx.jpg,red_fox\ny.jpg,badger\n")
    dataset = open_dataset(config(path, label_column="kind", templates=("{}!",)))
    assert dataset.classes == ["badger", "red fox"]
    assert (dataset[0].captions, dataset[0].label) == (["red fox!"], 1)
    names = write(tmp_path / "names.txt", "fox\nred_fox\n")
    dataset = open_dataset(config(path, label_column="kind", class_names=str(names)))
    assert (dataset[0].captions, dataset[0].label) == (["a photo of a red_fox."], 1)
    numbers = write(tmp_path / "b.csv", "image,label,caption\nx.jpg,1,a\ny.jpg,2,b\n")
    dataset = open_dataset(config(numbers, label_column="label", class_names=str(names)))
    assert (dataset[0].captions, dataset[0].label) == (["a photo of a red_fox."], 1)
    with pytest.raises(SampleError, match="'2' is no known class"):
        dataset[1]
    names.write_text("fox\nfox\n")
    twice = open_dataset(config(numbers, label_column="label", class_names=str(names)))
    assert (twice.classes, twice[0].label) == (["fox", "fox"], 1)
    write(tmp_path / "c.csv", "image,label\nx.jpg,fox\n")
    twice = open_dataset(config(tmp_path / "c.csv", class_names=str(names)))
    with pytest.raises(SampleError, match="'fox' is the name of several classes"):
        twice[0]


def test_an_image_in_base64_is_one_bad_row_of_a_short_reason(tmp_path: Path) -> None:
    long = "A" * 5000
    path = write(tmp_path / "a.csv", f"image,caption\n{long},one\nx.png,two\n")
    dataset = open_dataset(config(path))
    with pytest.raises(
        SampleError, match=r"path of 5000 characters \(base64 is not supported\)"
    ) as e:
        dataset[0]
    assert e.value.kind == "malformed row"
    bad = Bad.of(long, SampleError("kind", long))
    assert (len(bad.id), len(bad.reason)) == (300, 300)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("keep", [0, 9, -9])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, cache: Path, kind: str, keep: int) -> None:
    path = write(tmp_path / "a.csv", "image,label\n" + "x.png,a\ny.png,b\n" * 9)
    if kind == "parquet":
        path = tmp_path / "a.parquet"
        parquet.write_table(
            pa.table({"image": ["x.png", "y.png"] * 9, "label": ["a", "b"] * 9}), path
        )

    def labels() -> list[object]:
        dataset = open_dataset(config(path))
        return [dataset.classes, [dataset[i].label for i in range(len(dataset))]]

    expected = [["a", "b"], [0, 1] * 9]
    assert labels() == expected
    (kept,) = (cache / "indices").glob("*.arrow")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:keep])
    assert labels() == expected
    assert kept.read_bytes() == whole


def test_captions_are_no_labels(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("leanclip.data.readers.columns.MAX_CLASSES", 5)
    path = write(tmp_path / "a.csv", "image,label\n" + "".join(f"x.jpg,{i}\n" for i in range(6)))
    with pytest.raises(DataError, match="over 5 distinct values; if these are captions"):
        open_dataset(config(path))


# --- Parquet


def test_parquet_of_paths_bytes_and_structs(tmp_path: Path) -> None:
    image = b"\xff\xd8 not looked at here"
    texts = [["one", ""], ["two"], None, []]
    images: dict[str, list[Any]] = {
        "path": ["x.jpg", "y.jpg", "z.jpg", None],
        "bytes": [image, image, image, None],
        "struct": [
            {"bytes": image, "path": None},
            {"bytes": None, "path": "y.jpg"},
            {"bytes": image, "path": "z.jpg"},
            None,
        ],
    }
    expected: dict[str, list[Path | bytes]] = {
        "path": [tmp_path / "x.jpg", tmp_path / "y.jpg"],
        "bytes": [image, image],
        "struct": [image, tmp_path / "y.jpg"],
    }
    for name, column in images.items():
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(pa.table({"other": range(4), "image": column, "caption": texts}), path)
        dataset = open_dataset(config(path))
        assert [dataset[i].image for i in range(2)] == expected[name]
        assert [dataset[i].captions for i in range(2)] == [["one"], ["two"]]
        for index, kind in ((2, "empty caption"), (3, "missing image")):
            with pytest.raises(SampleError) as caught:
                dataset[index]
            assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (pa.binary_view(), pa.string_view()),
        (pa.large_binary(), pa.large_string()),
        (pa.binary_view(), pa.list_(pa.string_view())),
        (pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())]), pa.string()),
        (pa.struct([("bytes", pa.binary()), ("path", pa.string())]), pa.list_(pa.string())),
        (pa.binary(), pa.large_list(pa.large_string())),
        (pa.binary(), pa.list_view(pa.string_view())),
        (pa.binary(), pa.large_list_view(pa.large_string())),
        (pa.dictionary(pa.int8(), pa.binary()), pa.dictionary(pa.int16(), pa.large_string())),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_repeated", [True, False])
def test_parquet_of_any_kind_of_text(
    tmp_path: Path, image: pa.DataType, text: pa.DataType, is_repeated: bool
) -> None:
    count = 600
    images = [b"image %d" % (i % 50 if is_repeated else i) * 400 for i in range(count)]
    texts = [None if i == 1 else f"caption {i % 50 if is_repeated else i}" for i in range(count)]
    is_list = not pa.types.is_dictionary(text) and pa.types.is_nested(text)
    columns = {
        "image": [{"bytes": one, "path": ""} for one in images],
        "caption": [[one, None] for one in texts] if is_list else texts,
    }
    table = pa.table(
        {
            "image": pa.array(columns["image"] if pa.types.is_struct(image) else images, image),
            "caption": pa.array(columns["caption"], text),
            "label": pa.array([str(i % 3) for i in range(count)], pa.string_view()),
        }
    )
    path = tmp_path / "a.parquet"
    is_cut = "struct<bytes: binary_view" not in str(image)  # which pyarrow cannot write in groups
    parquet.write_table(table, path, row_group_size=400 if is_cut else count)
    dataset = open_dataset(config(path))
    good = [i for i in range(count) if i != 1]
    assert [dataset[i].image for i in good] == [images[i] for i in good]
    assert [dataset[i].captions for i in good] == [[texts[i]] for i in good]
    with pytest.raises(SampleError, match="empty caption"):
        dataset[1]
    labels = open_dataset(config(path, label_column="label"))
    assert (labels.classes, labels[301].label) == (["0", "1", "2"], 1)


def test_parquet_in_parts_is_one_table(tmp_path: Path) -> None:
    path = tmp_path
    for part, rows in enumerate((range(7), range(7, 20))):
        column = pa.array([f"text {i}" for i in rows]).dictionary_encode()
        table = pa.table({"path": [f"{i}.jpg" for i in rows], "text": column})
        path = tmp_path / f"train-0000{part}-of-00002.parquet"
        parquet.write_table(table, path, row_group_size=3)
    dataset = open_dataset(config(tmp_path))
    assert [dataset[i].captions for i in range(len(dataset))] == [[f"text {i}"] for i in range(20)]
    parquet.write_table(pa.table({"path": ["a"], "t": ["b"]}), path)
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet: .*other columns than"):
        open_dataset(config(tmp_path))


def test_parquet_batches_are_of_equal_rows(tmp_path: Path) -> None:
    images = [bytes([i]) * 50_000 for i in range(23)]
    table = pa.table({"image": images, "label": [i % 3 for i in range(23)]})
    notes = {"info": {"features": {"label": {"names": ["red_fox", "cat", "dog"]}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(notes)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    dataset = open_dataset(config(tmp_path / "a.parquet"))
    copy = pickle.loads(pickle.dumps(dataset))
    assert [copy[i].image for i in range(23)] == images
    assert dataset.classes == ["red fox", "cat", "dog"]
    assert dataset[4].label == 1
    plain = table.replace_schema_metadata(None)
    parquet.write_table(plain, tmp_path / "b.parquet")
    assert open_dataset(config(tmp_path / "b.parquet")).classes == ["0", "1", "2"]


# --- what stops everything


@pytest.mark.parametrize(
    ("name", "content", "more", "words"),
    [
        ("a.csv", "", {}, "has no rows"),
        ("a.csv", "image,caption\n", {}, "has no rows"),
        ("a.csv", "caption\none\n", {}, r"no column of images found; set data\.image_column"),
        ("a.csv", "image,x y\na,b\n", {}, r"captions or labels found; .*\(columns: image, x y\)"),
        ("a.csv", "image,caption\na,b\n", {"image_column": "pic"}, "has no column 'pic'"),
        ("a.csv", "image,caption\na,b\n", {"caption_column": ("caption", "b")}, "no column 'b'"),
        (
            "a.csv",
            "image,caption,label\na,b,c\n",
            {"caption_column": "caption", "label_column": "label"},
            "caption_column or label_column, not both",
        ),
        ("a.csv", "image,caption\na,b\n", {"split": "val"}, r"data\.split: .*a\.csv is a file"),
        ("a.csv", "image,label\na,\n", {}, "no row has a label"),
        ("a.csv", "image,caption\na,b\n".encode("utf-16"), {}, "is UTF-16 text; save it as UTF-8"),
        ("a.csv", "image,caption\na,b\n".encode("utf-16-le"), {}, "is UTF-16 text; save it as"),
        ("a.tsv", "image\tcaption\ra\tb\r".encode("utf-16-be"), {}, "is UTF-16 text; save it as"),
        ("a.jsonl", '{"image": "a"}\n'.encode("utf-16-le"), {}, "is UTF-16 text; save it as"),
        ("a.csv", "image,caption\na,b\n".encode("utf-32"), {}, "is UTF-32 text"),
        ("a.csv", "image\0,caption\na,b\n", {}, "has NUL bytes in its first line"),
        ("a.csv", "image,caf\u00e9\na,b\n".encode("latin-1"), {}, "header: is not UTF-8 text"),
        ("a.csv", "image,caption,caption\na,b,c\n", {}, "has 2 columns named 'caption'; rename"),
        ("a.csv", "image,label,image\na,b,c\n", {}, "has 2 columns named 'image'; rename"),
        (
            "a.tsv",
            "a cat\thttp://x/1.jpg\na dog\thttp://x/2.jpg\n",
            {},
            "has no header line, but values in",
        ),
        (
            "a.csv",
            "1.png,a cat\n2.png,a dog\n",
            {},
            "has no header line, but values in .*1.png, a cat",
        ),
        ("a.csv", "one,a cat\ntwo,a dog\n", {}, ", or write the columns' names above the"),
        ("a.csv", "image caption\nx.jpg one\n", {}, "separated by ' '; save it with commas"),
        ("a.csv", 'image;"x, y"\na;b\n', {}, r"data\.caption_column \(columns: image, 'x, y'\)$"),
        ("a.csv.gz", b"\x1f\x8b", {}, "is none of .csv .*unpack it first"),
        ("a.csv", 'image,"caption\n' + "a,b\n" * 2000, {}, "header: an open quote, or over 65536"),
        ("a.jsonl", "\n \n", {}, "has no rows"),
        (
            "a.jsonl",
            '{"image": "a", "label": ["b"]}\n',
            {},
            "the column 'label' has lists of labels",
        ),
        ("a.jsonl", "[1]\n", {}, "none of the first rows is a JSON object"),
        ("a.parquet", b"PAR1 but no more", {}, r"a\.parquet: cannot be read as Parquet"),
    ],
)
def test_what_is_no_table_is_refused(
    tmp_path: Path, name: str, content: str | bytes, more: dict[str, object], words: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=words) as caught:
        open_dataset(config(path, **more))
    assert "\n" not in str(caught.value)


def test_splits_are_files_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "image,caption\nx.jpg,one\n")
    write(tmp_path / "val.jsonl", '{"image": "x.jpg", "caption": "two"}\n')
    assert open_dataset(config(tmp_path))[0].captions == ["one"]
    assert open_dataset(config(tmp_path, split="val"))[0].captions == ["two"]
    with pytest.raises(DataError, match=r"one table test .*found: train\.csv, val\.jsonl"):
        open_dataset(config(tmp_path, split="test"))
    with pytest.raises(DataError, match="no such table"):
        open_dataset(config(tmp_path / "nowhere"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    path = write(tmp_path / "a.csv", "image,caption\nx.jpg,one\n")
    with pytest.raises(DataError, match=r"a\.csv: cannot write to the cache .*set LEANCLIP_CACHE"):
        open_dataset(config(path))


# --- the stream


def make_table(folder: Path, rows: int = 17) -> Path:
    lines = ["image,caption,second"]
    for i in range(rows):
        noise_image(i).save(folder / f"{i}.png")
        lines.append(f'{i}.png,"picture {i},\nin two lines",image {i}')
    return write(folder / "table.csv", "\n".join(lines))


def stream(root: Path, count: int, start: Position = Position(), workers: int = 0) -> list[Any]:  # noqa: B008
    settings = config(root, workers=workers, caption_column=("caption", "second"))
    batches = small_batches(settings, batch_size=5, start=start)
    return [
        (position, batch.indices.tolist(), batch.tokens, batch.images, batch.bad)
        for batch, position in itertools.islice(batches, count)
    ]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        (p, i, bad) == (q, j, worse) and torch.equal(t, u) and torch.equal(x, y)
        for (p, i, t, x, bad), (q, j, u, y, worse) in zip(a, b, strict=True)
    )


def test_the_position_alone_rebuilds_the_stream(tmp_path: Path) -> None:
    path = make_table(tmp_path)
    (tmp_path / "3.png").unlink()
    (tmp_path / "4.png").write_bytes(b"no image")
    whole = stream(path, 7)
    assert {(one.id, one.kind) for *_, bad in whole for one in bad} == {
        (str(tmp_path / "3.png"), "missing file"),
        (str(tmp_path / "4.png"), "not an image"),
    }
    assert same(stream(path, 7, workers=2), whole)
    for done in range(1, 7):
        assert same(stream(path, 7 - done, whole[done - 1][0]), whole[done:])


def test_workers_read_parquet(tmp_path: Path) -> None:
    images = []
    for i in range(12):
        noise_image(i).save(tmp_path / "one.png")
        images.append((tmp_path / "one.png").read_bytes())
    columns = {"image": images, "caption": ["a"] * 12, "second": ["b"] * 12}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    whole = stream(tmp_path / "a.parquet", 4)
    assert [len(indices) for _, indices, *_ in whole] == [5, 5, 5, 5]
    assert same(stream(tmp_path / "a.parquet", 4, workers=2), whole)
