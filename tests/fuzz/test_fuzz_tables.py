"""Tables and tars, edited: their samples come, or are named as bad ones; never slow or large."""

import csv
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from conftest import noise_image
from hypothesis import given
from hypothesis import strategies as st
from mutations import EDITS, TIMES, Edits, bounded, check_words, edited, examples, odd_values

from leanclip.config.data import DataConfig
from leanclip.data import open_dataset
from leanclip.data.readers import csv_rows
from leanclip.errors import LeanclipError, SampleError


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANCLIP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def read_all(config: DataConfig) -> None:
    """Every sample of a data set; bad ones are told in a line."""
    dataset = open_dataset(config)
    for index in range(min(len(dataset), 50)):
        assert dataset.name(index)
        try:
            sample = dataset[index]
            assert sample.captions
            assert all(isinstance(caption, str) for caption in sample.captions)
        except SampleError as error:
            check_words(error)


ROWS = [
    {"image": f"{i}.png", "caption": f'a "{i}", é\nline', "label": str(i % 3)} for i in range(12)
]
TABLES = {
    "csv": "image,caption,label\n"
    + "".join(f'{r["image"]},"a ""{r["label"]}"", é\nline",{r["label"]}\n' for r in ROWS),
    "tsv": "image\tcaption\tlabel\n"
    + "".join(f"{r['image']}\twords\t{r['label']}\n" for r in ROWS),
    "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
}


@pytest.mark.parametrize("kind", TABLES)
@examples(25)
@given(EDITS, st.booleans())
def test_a_table(tmp_path_factory: Any, kind: str, edits: Edits, is_class_data: bool) -> None:
    path = tmp_path_factory.getbasetemp() / f"table.{kind}"
    data = TABLES[kind].encode()
    content = edited(data, edits, [m.start() for m in re.finditer(rb'[\n",\t{]', data)])
    if kind == "jsonl" and len(edits) > 3:
        content = "".join(json.dumps(odd_values(dict(r), edits)) + "\n" for r in ROWS).encode()
    path.write_bytes(content)
    label = "label" if is_class_data else None
    with bounded(content, path.name, seconds=10, megabytes=100):
        read_all(DataConfig(format="table", root=str(path), label_column=label))


PIECES = [
    "a",
    "b",
    '"',
    ",",
    "\n",
    "\r\n",
    "\r",
    "x,y\n",
    '"q"',
    ',"',
    '",',
    '",\n',
    '""',
    " ",
    "\u2028",
]


@examples(200)
@given(st.lists(st.sampled_from(PIECES), max_size=25), st.integers(7, 30))
def test_valid_csv_is_read_as_by_the_csv_module(
    tmp_path_factory: Any, pieces: list[str], chunk: int
) -> None:
    text = "image,caption,\n" + "".join(pieces)
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except csv.Error:
        return
    path = tmp_path_factory.getbasetemp() / "valid.csv"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_rows, "_CHUNK", chunk)
        batches = csv_rows.open_csv(path).read(["image", "caption"])
        found = [tuple(row.values())[:2] for batch in batches for row in batch.to_pylist()]
    assert found == [tuple(row[:2]) if len(row) == 3 else (None, None) for row in rows[1:]]


def _tar(format: int) -> bytes:
    file = io.BytesIO()
    image = io.BytesIO()
    noise_image(1, (8, 8)).save(image, "PNG")
    parts = {"jpg": image.getvalue(), "txt": b"words", "json": b'{"caption": "x"}', "cls": b"1"}
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for i in range(4):
            long = "folder/" * 20 if i == 2 else ""
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{long}é{i}.{extension}")
                member.size = len(content)
                if format == tarfile.PAX_FORMAT:
                    member.pax_headers = {"comment": "x" * 30}
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


TARS = {"gnu": _tar(tarfile.GNU_FORMAT), "pax": _tar(tarfile.PAX_FORMAT)}
_FIELDS = (0, 124, 148, 156, 257, 386, 482, 512)  # name, size, checksum, type, magic, sparse map


def with_checksums(data: bytes) -> bytes:
    """A tar whose headers' sums are right, so that what is wrong in them is looked at."""
    found = bytearray(data)
    for at in range(0, len(found) - 511, 512):
        if found[at + 257 : at + 262] == b"ustar":
            found[at + 148 : at + 156] = b" " * 8
            found[at + 148 : at + 156] = b"%06o\0 " % sum(found[at : at + 512])
    return bytes(found)


@pytest.mark.parametrize("format", TARS)
@examples(40)
@given(EDITS, st.sampled_from([b"", b"0", b"5", b"x", b"L", b"K", b"S", b"g", b"1"]))
def test_a_tar(tmp_path_factory: Any, format: str, edits: Edits, kind: bytes) -> None:
    data = bytearray(TARS[format])
    if kind:  # of one member
        data[512 * (edits[0][1] % 4) + 156 :][:1] = kind
        data[512 * (edits[0][1] % 4) + 156] = kind[0]
    marks = [block + field for block in range(0, len(data), 512) for field in _FIELDS]
    content = with_checksums(edited(bytes(data), edits, marks))
    path = tmp_path_factory.getbasetemp() / "x.tar"
    path.write_bytes(content)
    with bounded(content, path.name, seconds=10, megabytes=100):
        read_all(DataConfig(format="shards", root=str(path)))


def header(kind: bytes, size: bytes, rest: bytes = b"") -> bytes:
    """A member's header."""
    block = bytearray(512)
    block[0:5] = b"a.jpg"
    block[100:107] = b"0000644"
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000" if kind != b"S" else b"ustar  \0"
    block[386 : 386 + len(rest)] = rest
    return with_checksums(bytes(block))


HUGE = b"\x80" + (2**62).to_bytes(11, "big")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a pax header of exabytes", header(b"x", HUGE) + bytes(512)),
        ("a long name of exabytes", header(b"L", HUGE) + bytes(512)),
        ("a long name below nothing", header(b"L", b"\xff" + b"\xff" * 11) + bytes(512)),
        ("a sparse map that is cut", header(b"S", b"00000001000", b"\0" * 96 + b"\1")),
        ("a pax header of digits", header(b"x", b"%011o" % 300_000) + b"1" * 300_032),
        (
            "pax headers in a row",
            (header(b"x", b"%011o" % 9) + b"9 a=b\n".ljust(512, b"\0")) * 3000,
        ),
    ],
)
def test_tars_that_lie(tmp_path: Path, name: str, content: bytes) -> None:
    good = TARS["gnu"]
    for data in (content, good[:1024] + content):
        path = tmp_path / "x.tar"
        path.write_bytes(data)
        with bounded(data, "lies.tar", seconds=10, megabytes=100):
            read_all(DataConfig(format="shards", root=str(path)))


@pytest.mark.parametrize("name", ["table.csv", "table.jsonl"])
def test_a_row_of_many_megabytes_is_a_bad_one(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".csv"):
        path.write_bytes(b"image,caption\n1.png,a\n2.png," + b"x" * (17 << 20) + b"\n3.png,b\n")
    else:
        row = b'{"image": "1.png", "caption": "a"}\n'
        path.write_bytes(row + b'{"image": [' + b"[]," * (6 << 20) + b"[]]}\n" + row)
    with bounded(b"", name, seconds=60, megabytes=200):
        dataset = open_dataset(DataConfig(format="table", root=str(path)))
        assert dataset[0].captions == ["a"]
        with pytest.raises(SampleError, match="row 2: over 16777216 bytes"):
            dataset[1]
        read_all(DataConfig(format="table", root=str(path), label_column="caption"))


PARQUET = """
import random, sys
from mutations import bounded, edited
from test_fuzz_tables import parquet_edits, parquet_seeds, read_all
from leanclip.config.data import DataConfig
from pathlib import Path
first, count, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
seeds = parquet_seeds()
for number in range(first, first + count):
    content = parquet_edits(seeds[number % len(seeds)], number)
    path = folder / "table.parquet"
    path.write_bytes(content)
    print(number, flush=True)
    with bounded(content, path.name, seconds=20, megabytes=400):
        read_all(DataConfig(format="table", root=str(path)))
"""


def parquet_seeds() -> list[bytes]:
    """Tables as several programs write them."""
    import pyarrow
    from pyarrow import parquet

    image = {"bytes": b"x" * 20, "path": "1.png"}
    rows = [{"image": image, "text": f"words {i % 5}", "label": i % 3} for i in range(40)]
    seeds = []
    options: dict[str, Any]
    for options in (
        {"compression": "snappy"},
        {"compression": "zstd", "use_dictionary": False, "data_page_version": "2.0"},
        {"compression": "gzip", "row_group_size": 7},
    ):
        file = io.BytesIO()
        notes = {b"huggingface": b'{"info": {"features": {"label": {"names": ["a", "b", "c"]}}}}'}
        table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(notes)
        parquet.write_table(table, file, **options)
        seeds.append(file.getvalue())
    return seeds


def parquet_edits(data: bytes, number: int) -> bytes:
    """One of many damaged files; mostly in the footer, whose length and ends stay."""
    import random

    choose = random.Random(number)
    kinds = (
        ("flip", "byte", "flip", "swap") if number % 3 else ("number", "cut", "double", "insert")
    )
    edits = [
        (choose.choice(kinds), 2 * choose.randrange(2**31) + 1, choose.randrange(2**32))
        for _ in range(choose.randint(1, 4))
    ]
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    content = edited(data, edits, range(4 if number % 2 else footer, len(data) - 8))
    return content[:-8] + data[-8:] if number % 3 else content


@pytest.mark.parametrize("first", [0])
def test_parquet(tmp_path: Path, first: int) -> None:
    """In a process of its own: pyarrow is C++, and what ends it would end the tests."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", PARQUET, str(first), str(TIMES or 40), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env=os.environ | {"PYTHONPATH": f"{here}:{here.parent}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert done.returncode == 0, f"{done.stdout[-100:]} {done.stderr[-3000:]}"


@pytest.mark.parametrize("names", ["3", '"abc"', "null", "[" * 50_000, '{"a": 1}'])
def test_notes_in_parquet_that_are_none(tmp_path: Path, names: str) -> None:
    import pyarrow
    from pyarrow import parquet

    notes = {b"huggingface": f'{{"info": {{"features": {{"label": {{"names": {names}}}}}}}}}'}
    table = pyarrow.table({"image": ["1.png", "2.png"], "label": [0, 1]})
    table = table.replace_schema_metadata({k: v.encode() for k, v in notes.items()})
    parquet.write_table(table, tmp_path / "x.parquet")
    read_all(DataConfig(format="table", root=str(tmp_path / "x.parquet"), label_column="label"))


def test_a_small_parquet_that_unpacks_to_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value of 5 MB a thousand times, of which the file holds one."""
    import pyarrow
    from pyarrow import parquet

    value = pyarrow.array(["x" * 5_000_000])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, "int32"), value)
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"image": ["1.png"] * 1000, "caption": column})
    parquet.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 1_000_000
    monkeypatch.setattr("leanclip.data.readers.parquet._MAX_BYTES", 100_000_000)
    refused = pytest.raises(LeanclipError, match="over 200 times its size")
    with bounded(b"", "bomb.parquet", megabytes=300), refused:
        read_all(DataConfig(format="table", root=str(path)))
