"""Tar shards: WebDataset's, img2dataset's and our own; local, by URL, damaged and hostile."""

import io
import itertools
import json
import logging
import os
import pickle
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise_image, small_batches
from web import Server, serving

from leanclip.config.data import DataConfig
from leanclip.data import Dataset, open_dataset
from leanclip.data.batch import Position
from leanclip.data.formats.shards import Shards
from leanclip.data.readers import shard_cache
from leanclip.data.readers.shard_cache import shard_index
from leanclip.data.readers.shard_list import expand
from leanclip.data.readers.tar_index import build_index
from leanclip.errors import DataError, SampleError

Members = Iterable[tuple[str, bytes | str | tarfile.TarInfo]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LEANCLIP_CACHE", str(folder))
    return folder


def png(seed: int) -> bytes:
    file = io.BytesIO()
    noise_image(seed, (20, 16)).save(file, "PNG")
    return file.getvalue()


def make_tar(path: Path, members: Members, format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_shards(root: Path, sizes: Sequence[int]) -> Path:
    """Shards with samples `<shard><number>`: an image and a caption that says so."""
    for shard, size in enumerate(sizes):
        make_tar(
            root / f"{shard:05d}.tar",
            (
                member
                for i in range(size)
                for member in (
                    (f"{shard:02d}{i:03d}.png", png(100 * shard + i)),
                    (f"{shard:02d}{i:03d}.txt", f"picture {i} of shard {shard}"),
                )
            ),
        )
    return root


def config(root: Path | str, **more: object) -> DataConfig:
    return DataConfig.model_validate({"format": "shards", "root": str(root), "workers": 0} | more)


def order_of(dataset: Dataset, key: Sequence[int], start: int = 0) -> list[int]:
    return [index for index in dataset.visits(key, start) if isinstance(index, int)]


def ids(dataset: Dataset, visits: Iterable) -> list[str]:
    return [Path(dataset[i].id).name for i in visits]


def stream(settings: DataConfig, count: int, start: Position = Position(), **more: int) -> list:  # noqa: B008
    batches = small_batches(settings, batch_size=6, start=start, **more)
    return list(itertools.islice(batches, count))


def bad_kinds(dataset: Dataset) -> dict[str, str]:
    """The samples that cannot be had, by name."""
    found = {}
    for i in range(len(dataset)):
        try:
            dataset[i]
        except SampleError as error:
            found[dataset.name(i).rpartition("tar/")[2]] = error.kind
    return found


# --- what is in a shard


def test_members_of_one_name_are_one_sample(tmp_path: Path) -> None:
    shard = make_tar(
        tmp_path / "a.tar",
        [
            ("./x/1.JPG", b"one"),
            ("./x/1.txt", "\ufeff a caption \n"),
            ("./x/1.pyd", pickle.dumps(1)),
            ("2.seg.png", b"a mask"),
            ("2.png", b"two"),
            ("2.txt", "first\n\n second \n"),
            ("3.webp", b"three"),
            ("3.json", json.dumps({"caption": "of json"})),
            ("notes", b"no extension"),
            (".hidden.jpg", b"no key"),
            ("__meta__.txt", b"WebDataset's own"),
            ("4.jpeg", b"four"),
            ("4.json", json.dumps({"captions": ["a", " ", "b"], "text": "c"})),
        ],
    )
    dataset = open_dataset(config(shard))
    samples = [dataset[i] for i in range(len(dataset))]
    assert [sample.image for sample in samples] == [b"one", b"two", b"three", b"four"]
    assert [list(sample.captions) for sample in samples] == [
        ["a caption"],
        ["first", "second"],
        ["of json"],
        ["a", "b"],
    ]
    assert [sample.id for sample in samples] == [f"{shard}/{k}" for k in ("./x/1", "2", "3", "4")]
    columns = open_dataset(config(shard, caption_column=("text", "caption")))
    assert columns[2].captions == ["of json"]
    assert columns[3].captions == ["c"]
    with pytest.raises(SampleError, match=r"a\.tar/2: no caption"):
        columns[1]


def pair(stem: str, image: str = ".png", text: str = ".txt") -> list[tuple[str, bytes | str]]:
    return [(f"{stem}{image}", png(1)), (f"{stem}{text}", f"caption of {stem}")]


@pytest.mark.parametrize(
    ("members", "usable", "bad", "remarks"),
    [
        (pair("v1.5 a") + pair("v1.5 b") + pair("v2.0 a"), ["v1.5 a", "v1.5 b", "v2.0 a"], {}, []),
        (pair("x.y/Dr. No.1", ".JPG") + pair("x.y/Dr. No.2"), ["Dr. No.1", "Dr. No.2"], {}, []),
        (
            [*pair("a"), ("b.in.png", png(1)), ("b.out.txt", "text"), ("c.5.png", png(2))],
            ["a"],
            {"b": "unknown extension", "c": "unknown extension"},
            ["members that are not read: 3 (1 .in.png, 1 .out.txt, 1 .5.png)"],
        ),
        (
            [*pair("a"), ("a.npy", "x"), ("a.seg.png", png(2)), *pair("b"), ("b.npy", "y")],
            ["a", "b"],
            {},
            ["members that are not read: 3 (2 .npy, 1 .seg.png)"],
        ),
        (
            [*pair("a", ".heic"), *pair("b", ".png", ".caption"), *pair("c", ".jp2", ".md")],
            [],
            {"a": "missing image", "b": "missing caption", "c": "unknown extension"},
            ["members that are not read: 4 (1 .heic, 1 .caption, 1 .jp2, 1 .md)"],
        ),
        (
            [("README.md", "x"), *pair("a"), ("LICENSE", "y"), ("._a.png", "z"), ("__x__.b", "")],
            ["a"],
            {},
            ["members that are not read: 4 (1 LICENSE, 1 ._a.png, 1 __x__.b, 1 README.md)"],
        ),
        (
            [*(pair(str(i))[0] for i in range(3)), *(pair(str(i))[1] for i in range(3))],
            ["0", "1", "2"],
            {},
            ["samples whose members are not next to each other in the tar: 3 (SHARD/0, SHARD/1, "],
        ),
        (  # both: without sorting, and with dots
            [pair("a.b")[0], *pair("c"), pair("a.b")[1]],
            ["a.b", "c"],
            {},
            ["samples whose members are not next to each other in the tar: 1 (SHARD/a.b)"],
        ),
        (  # two complete samples of one key are two
            [*pair("c"), *pair("b"), *pair("c")],
            ["c", "b", "c"],
            {},
            [],
        ),
        (  # as two unsorted shards put together
            [
                pair("a")[0],
                *pair("b"),
                pair("a")[1],
                *pair("c"),
                pair("a")[0],
                *pair("d"),
                pair("a")[1],
            ],
            ["a", "b", "c", "a", "d"],
            {},
            ["samples whose members are not next to each other in the tar: 2 (SHARD/a, SHARD/a)"],
        ),
        (  # a text more than there are images
            [pair("a")[0], *pair("b"), ("a.txt", "caption of a"), *pair("c"), ("a.txt", "of a")],
            ["b", "c"],
            {"a": "missing image"},
            ["samples whose members are not next to each other in the tar: 1 (SHARD/a)"],
        ),
    ],
)
def test_no_member_is_left_out_silently(
    tmp_path: Path, caplog, members: Members, usable: list[str], bad: dict, remarks: list[str]
) -> None:
    shard = make_tar(tmp_path / "in" / "0.tar", members)
    dataset = open_dataset(config(shard))
    kinds = bad_kinds(dataset)
    assert kinds == bad
    good = [i for i in range(len(dataset)) if dataset.name(i).rpartition("tar/")[2] not in kinds]
    assert [Path(dataset[i].id).name for i in good] == usable
    assert all(dataset[i].captions[0].endswith(dataset[i].id.rpartition("0.tar/")[2]) for i in good)
    found = dataset.data_warnings()
    assert len(found) == len(remarks)
    for line, wanted in zip(found, remarks, strict=True):
        assert line.startswith(wanted.replace("SHARD", str(shard)))
        assert line in caplog.text


def test_what_is_not_read_is_named_where_sizes_are_stated_too(tmp_path: Path, caplog) -> None:
    shard = make_tar(tmp_path / "in" / "0.tar", [*pair("a"), ("a.npy", "x")])
    (tmp_path / "in" / "sizes.json").write_text('{"0.tar": 1}')
    dataset = open_dataset(config(tmp_path / "in"))
    assert dataset[0].captions == ["caption of a"]
    assert f"{shard}: members that are not read: 1 (1 .npy)" in caplog.text


def test_what_is_not_read_takes_no_place_of_those_that_are_stated(tmp_path: Path) -> None:
    make_tar(tmp_path / "0.tar", [("x.heic", "x"), *pair("a"), ("y.heic", "y"), *pair("b")])
    (tmp_path / "0_stats.json").write_text('{"successes": 2}')
    dataset = open_dataset(config(tmp_path))
    assert [list(dataset[i].captions) for i in range(2)] == [["caption of a"], ["caption of b"]]


def test_a_text_with_line_breaks_is_one_caption_where_that_is_known(tmp_path: Path) -> None:
    text, lines = "A title\r\n\r\nand more\n", ["A title", "and more"]
    odd = "one\u2028line\x0cwith\x85odd\x1cseparators"
    members = [("0.png", b"0"), ("0.txt", text), ("1.png", b"1"), ("1.txt", text)]
    members += [("1.json", json.dumps({"TEXT": "A title\n\nand more", "caption": None}))]
    members += [("2.png", b"2"), ("2.txt", text), ("2.json", json.dumps({"caption": "other"}))]
    members += [("3.png", b"3"), ("3.txt", text), ("3.json", "{")]
    members += [("4.png", b"4"), ("4.txt", f"{odd}\rlast")]
    shard = make_tar(tmp_path / "a.tar", members)
    dataset = open_dataset(config(shard))
    whole = ["A title\n\nand more"]
    assert [dataset[i].captions for i in range(4)] == [lines, whole, lines, lines]
    assert dataset[4].captions == [odd, "last"]
    dataset = open_dataset(config(shard, one_caption_per_line=False))
    assert [dataset[i].captions for i in (0, 2, 3)] == [["A title\nand more"]] * 3


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_folders_links_and_devices(tmp_path: Path, format: int) -> None:
    folder, link, device = (tarfile.TarInfo(name) for name in ("d", "4.png", "5.png"))
    folder.type, link.type, device.type = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE
    link.linkname = "/etc/passwd"
    long = "d/" * 40 + "n" * 90 if format == tarfile.USTAR_FORMAT else "d/" * 200 + "n" * 300
    shard = make_tar(
        tmp_path / "a.tar",
        [
            ("d", folder),
            (f"{long}1.png", b"one"),
            (f"{long}1.txt", "caption"),
            ("4.png", link),
            ("4.txt", "of a link"),
            ("5.png", device),
            ("5.txt", "of a device"),
        ],
        format,
    )
    dataset = open_dataset(config(shard))
    assert len(dataset) == 3
    assert (dataset[0].image, list(dataset[0].captions)) == (b"one", ["caption"])
    assert bad_kinds(dataset) == {"4": "missing image", "5": "missing image"}


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    members = [("1.png", b"one"), ("1.txt", "caption")]
    members += [(f"1.{name}", pickle.dumps(Evil())) for name in ("pyd", "pickle", "pth", "npy")]
    dataset = open_dataset(config(make_tar(tmp_path / "a.tar", members)))
    assert list(dataset[0].captions) == ["caption"]
    assert not (tmp_path / "evil").exists()


def test_img2dataset_s_output_works_as_it_is(tmp_path: Path) -> None:
    members = []
    for i in range(3):
        facts = {"caption": f"caption {i}", "url": "http://x/y.jpg", "key": f"00000000{i}"}
        members += [
            (f"00000000{i}.jpg", png(i)),
            (f"00000000{i}.json", json.dumps(facts | {"status": "success", "exif": "{}"})),
            (f"00000000{i}.txt", f"caption {i}"),
        ]
    make_tar(tmp_path / "00000.tar", members)
    (tmp_path / "00000_stats.json").write_text(json.dumps({"count": 5, "successes": 3}))
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    dataset = open_dataset(config(tmp_path))
    assert [list(dataset[i].captions) for i in range(3)] == [[f"caption {i}"] for i in range(3)]
    assert dataset[1].image == png(1)


def test_class_data_has_classes_and_templates(tmp_path: Path) -> None:
    members = [("0.png", b"a"), ("0.cls", "1"), ("1.png", b"b"), ("1.cls", "cat\n")]
    members += [("2.png", b"c"), ("2.cls", "7"), ("3.png", b"d"), ("3.txt", "no label")]
    shard = make_tar(tmp_path / "train" / "0.tar", members)
    with pytest.raises(SampleError, match=r"no caption with this key; its \.cls needs"):
        open_dataset(config(shard))[0]
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    dataset = open_dataset(config(tmp_path, split="train", templates=("a {}", "{}!")))
    assert dataset.classes == ["dog", "cat"]
    assert [dataset[i].label for i in range(2)] == [1, 1]
    assert dataset[0].captions == ["a cat", "cat!"]
    assert bad_kinds(dataset) == {"2": "unknown class", "3": "missing label"}
    names = tmp_path / "names.txt"
    names.write_text("hound\ncat\n")
    assert open_dataset(config(shard, class_names=str(names))).classes == ["hound", "cat"]
    with pytest.raises(DataError, match=r"data\.class_names: no such file"):
        open_dataset(config(shard, class_names="nowhere.txt"))
    (shard.parent / "classes.txt").write_text("a\nb\n")
    assert open_dataset(config(shard)).classes == ["a", "b"]
    assert open_dataset(config(shard, caption_column="caption")).classes == ()


# --- what a root names


def test_roots(tmp_path: Path) -> None:
    root = make_shards(tmp_path / "s", [2, 3, 4])
    assert len(open_dataset(config(root))) == 9
    assert len(open_dataset(config(root / "00001.tar"))) == 3
    assert len(open_dataset(config(root / "{00001..00002}.tar"))) == 7
    assert len(open_dataset(config(f"{root}/{{00000,00002}}.tar"))) == 6
    assert len(open_dataset(config(tmp_path, split="s"))) == 9
    for bad, words in {
        root / "{00000..00003}.tar": r"no such shard: .*00003\.tar",
        tmp_path / "nowhere": "no such folder or shard",
        tmp_path: r"no shards \(\*\.tar\)",
        root / "{}.tar": "is neither",
        f"pipe:curl http://x/{root}.tar": "pipe: is not supported.*runs no commands",
        "s3://bucket/{00..99}.tar": "s3: is not supported",
        "file:///x.tar": "file: is not supported",
        "x.tar.gz": "a compressed tar",
    }.items():
        with pytest.raises(DataError, match=words):
            open_dataset(config(bad))
    with pytest.raises(DataError, match=r"pipe: is not supported"):
        open_dataset(config("{http://x,pipe:touch evil; cat }/0.tar"))
    with pytest.raises(DataError, match=r"data\.split: val: goes with a folder"):
        open_dataset(config(root / "00001.tar", split="val"))


def test_patterns() -> None:
    assert expand("a{08..11}") == ["a08", "a09", "a10", "a11"]
    assert expand("{8..10}") == ["8", "9", "10"]
    assert expand("{a,b}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    for bad in ("{a,{0..1}}", "{0..1", "{3..1}", "{x}", "{0..99999999}", "{0..9999}{0..9999}"):
        with pytest.raises(DataError, match=r"data\.root"):
            expand(bad)


def test_a_pattern_of_billions_is_refused_before_it_is_written_out() -> None:
    with pytest.raises(DataError, match="over 1,000,000 shards"):
        expand("{0..99999999999999}.tar")


def test_sizes_come_from_beside_the_shards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_shards(tmp_path / "s", [2, 3])
    (root / "sizes.json").write_text('{"00000.tar": 2, "00001.tar": 5}')
    dataset = open_dataset(config(root))
    assert len(dataset) == 7
    kinds = bad_kinds(dataset)
    assert kinds == {"sample 3": "missing in shard", "sample 4": "missing in shard"}
    shards = [{"name": f"0000{i}.tar", "samples": 2, "bytes": 1} for i in range(2)]
    index = root / "index.json"
    index.write_text(json.dumps({"format": 1, "shards": shards, "samples": 4}))
    dataset = open_dataset(config(root))
    assert len(dataset) == 4
    assert list(dataset[3].captions) == ["picture 1 of shard 1"]
    assert caplog.text.count("of its 3 samples only the 2 stated") == 1
    index.write_text(
        json.dumps({"format": 1, "shards": [*shards, {"name": "2.tar", "samples": 1}]})
    )
    with pytest.raises(DataError, match=r"lists 2\.tar, which is not there"):
        open_dataset(config(root))
    for text in ("{", '{"format": 2, "shards": []}', '{"format": 1, "shards": [1]}', "[" * 100000):
        index.write_text(text)
        with pytest.raises(DataError, match=r"index\.json: does not hold the sizes"):
            open_dataset(config(root))


# --- the index


def test_a_shard_is_looked_through_once(tmp_path: Path, cache: Path) -> None:
    root = make_shards(tmp_path / "s", [2] * 9)
    assert len(open_dataset(config(root))) == 18
    kept = sorted((cache / "indices").glob("*.npy"))
    assert len(kept) == 9
    times = [path.stat().st_mtime_ns for path in kept]
    assert len(open_dataset(config(root))) == 18
    assert [path.stat().st_mtime_ns for path in kept] == times
    time.sleep(0.01)
    make_tar(root / "00000.tar", [("1.png", b"1"), ("1.txt", "one")])
    assert len(open_dataset(config(root))) == 17


@pytest.mark.parametrize("count", [2, 2000])
@pytest.mark.parametrize("keep", [0, 5, 200])
def test_a_damaged_index_is_made_anew(tmp_path: Path, cache: Path, count: int, keep: int) -> None:
    members = ((f"{i:05d}.{e}", "x") for i in range(count) for e in ("png", "txt"))
    path = make_tar(tmp_path / "a.tar", members)
    assert len(shard_index(path)) == count
    (kept,) = (cache / "indices").glob("*.npy")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:keep])
    assert len(shard_index(path)) == count
    assert kept.read_bytes() == whole


def test_an_index_keeps_no_object_per_sample(tmp_path: Path) -> None:
    make_tar(
        tmp_path / "a.tar", ((f"{i:05d}.{e}", "x") for i in range(2000) for e in ("png", "txt"))
    )
    dataset = open_dataset(config(tmp_path))
    assert isinstance(dataset, Shards)
    assert dataset[1999].image == b"x"
    assert shard_index(tmp_path / "a.tar").nbytes == 2000 * (5 + 1 + 64 + 1 + 4 + 1)
    assert len(pickle.dumps(dataset)) < 2000


# --- order


def test_an_epoch_visits_every_sample_once_and_mixes_shards(tmp_path: Path) -> None:
    make_shards(tmp_path / "s", [5] * 8)
    dataset = open_dataset(config(tmp_path / "s", shuffle_buffer=12))
    order = order_of(dataset, (1, 0))
    assert sorted(order) == list(range(40))
    assert order != order_of(dataset, (1, 1))
    shards = [index // 5 for index in order]
    windows = [shards[:15], shards[15:30], shards[30:]]  # three shards reach a buffer of 12
    assert [len(set(window)) for window in windows] == [3, 3, 2]
    for window in windows:
        assert sum(a != b for a, b in itertools.pairwise(window)) > len(set(window))
    assert set(windows[0]) != {0, 1, 2}
    everything = open_dataset(config(tmp_path / "s", shuffle_buffer=1000))
    assert len({index // 5 for index in order_of(everything, (1, 0))[:15]}) > 4


def test_the_order_starts_anywhere(tmp_path: Path) -> None:
    make_shards(tmp_path / "s", [3, 1, 4, 2, 6])
    for buffer in (1, 5, 100):
        dataset = open_dataset(config(tmp_path / "s", shuffle_buffer=buffer))
        order = order_of(dataset, (7,))
        assert sorted(order) == list(range(16))
        for start in range(17):
            assert order_of(dataset, (7,), start) == order[start:]


def test_the_stream_depends_on_position_alone(tmp_path: Path) -> None:
    make_shards(tmp_path / "s", [7, 5, 8, 6])
    settings = config(tmp_path / "s", shuffle_buffer=10)
    whole = stream(settings, 6)  # two epochs
    for done in range(1, 6):
        rest = stream(settings, 6 - done, whole[done - 1][1])
        for (a, at), (b, there) in zip(rest, whole[done:], strict=True):
            assert (at, a.indices.tolist()) == (there, b.indices.tolist())
            assert torch.equal(a.images, b.images)
    with_workers = stream(config(tmp_path / "s", shuffle_buffer=10, workers=2), 6)
    ranks = [stream(settings, 6, rank=rank, world_size=2) for rank in range(2)]
    for i, (batch, _) in enumerate(whole):
        assert torch.equal(with_workers[i][0].images, batch.images)
        for rank in range(2):
            assert torch.equal(ranks[rank][i][0].images, batch.images[rank::2])
            assert torch.equal(ranks[rank][i][0].tokens[:, :8], batch.tokens[rank::2, :8])


def test_more_shards_than_are_held_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanclip.data.formats.shards._MAX_OPEN", 2)
    make_shards(tmp_path / "s", [2] * 5)
    dataset = open_dataset(config(tmp_path / "s"))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    found = ids(dataset, [9, 0, 5, 1, 9, 3, 7])
    assert found == ["04001", "00000", "02001", "00001", "04001", "01001", "03001"]
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # noqa: PTH208


# --- what is wrong


def test_unsafe_names_are_counted_and_nothing_is_written(tmp_path: Path) -> None:
    members = [("1.png", b"1"), ("1.txt", "one")]
    members += [
        ("../evil.png", b"e"),
        ("../evil.txt", "evil"),
        ("/abs.png", b"a"),
        ("/abs.txt", "a"),
    ]
    members += [("a/../../b.png", b"b"), ("a/../../b.txt", "b"), ("2.png", b"2"), ("2.txt", "two")]
    make_tar(tmp_path / "in" / "a.tar", members)
    dataset = open_dataset(config(tmp_path / "in"))
    assert len(dataset) == 5
    assert bad_kinds(dataset) == dict.fromkeys(
        ("../evil", "/abs", "a/../../b"), "unsafe member name"
    )
    assert [list(dataset[i].captions) for i in (0, 4)] == [["one"], ["two"]]
    assert {path.name for path in tmp_path.iterdir()} == {"in", "cache"}


def test_samples_that_lack_something(tmp_path: Path) -> None:
    members = [("1.png", b"1"), ("2.txt", "two"), ("3.png", b"3"), ("3.txt", b"caf\xe9")]
    members += [("4.png", b"4"), ("4.txt", " \n"), ("5.png", b"5"), ("5.json", "{")]
    members += [("6.png", b"6"), ("6.json", '{"caption": null}'), ("7.png", b"7")]
    members += [("7.txt", "a"), ("7.txt", "b"), ("8.png", b"8"), ("8.txt", "x" * (1 << 21))]
    members += [("9.png", b"9"), ("9.json", "[" * 100_000)]
    dataset = open_dataset(config(make_tar(tmp_path / "a.tar", members)))
    assert bad_kinds(dataset) == {
        "1": "missing caption",
        "2": "missing image",
        "3": "caption not UTF-8",
        "4": "empty caption",
        "5": "damaged JSON",
        "6": "missing caption",
        "7": "duplicate member",
        "8": "oversized txt",
        "9": "damaged JSON",
    }


def test_a_shard_cut_anywhere_keeps_what_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make_shards(tmp_path / "s", [3]) / "00000.tar"
    content = whole.read_bytes()
    index = build_index(whole)
    assert not caplog.text
    ends = [int(row["txt"]) + 512 for row in index]  # the captions are shorter than a block
    for length in range(700, ends[2] + 512, 256):
        cut = tmp_path / "cut.tar"
        cut.write_bytes(content[:length])
        found = build_index(cut)
        complete = sum(int(row["txt"] + row["txt_size"]) <= length for row in index)
        assert [row["problem"] for row in found][:complete] == [0] * complete
        assert len(found) - complete <= 1
        assert set(found["problem"][complete:].tolist()) <= {3}
        assert f"{cut}: " in caplog.text
        caplog.clear()
    dataset = open_dataset(config(make_cut(tmp_path / "last.tar", content, ends[1] + 700)))
    assert bad_kinds(dataset) == {"00002": "truncated shard"}


def make_cut(path: Path, content: bytes, length: int) -> Path:
    path.write_bytes(content[:length])
    return path


def test_damage_in_the_middle_is_not_taken_for_the_end(tmp_path: Path, caplog) -> None:
    whole = make_shards(tmp_path / "s", [4]) / "00000.tar"
    content = bytearray(whole.read_bytes())
    begin = int(build_index(whole)["image"][2]) - 512
    content[begin : begin + 512] = b"\xff" * 512
    whole.write_bytes(content)
    dataset = open_dataset(config(whole))
    assert bad_kinds(dataset) == {f"byte {begin}": "truncated shard"}
    assert "cut or damaged at byte" in caplog.text


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + b"\xff" * 11])
def test_a_header_with_an_absurd_size_ends_the_shard(tmp_path: Path, size: bytes) -> None:
    whole = make_shards(tmp_path / "s", [3]) / "00000.tar"
    content = bytearray(whole.read_bytes())
    begin = int(build_index(whole)["image"][1]) - 512
    header = content[begin : begin + 512]
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[begin : begin + 512] = header
    whole.write_bytes(content)
    dataset = open_dataset(config(whole))
    assert len(dataset) == 2
    assert list(bad_kinds(dataset).values()) == ["truncated shard"]


def test_what_is_no_tar_at_all(tmp_path: Path) -> None:
    root = make_shards(tmp_path / "s", [3])
    for name, content in (("1.tar", b""), ("2.tar", b"<html>" * 500), ("3.tar", b"\x1f\x8b" * 700)):
        (root / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: is not a tar file"):
            open_dataset(config(root / name))
    dataset = open_dataset(config(root))
    assert len(dataset) == 6
    assert dataset.name(3) == f"{root}/1.tar/the whole file"
    for i in range(3, 6):
        with pytest.raises(SampleError, match=r"\d\.tar/the whole file: not a tar file"):
            dataset[i]
    make_tar(tmp_path / "empty" / "0.tar", [])
    with pytest.raises(DataError, match="no samples in 1 shards"):
        open_dataset(config(tmp_path / "empty"))


def test_bad_samples_are_left_out_of_batches_and_named(tmp_path: Path) -> None:
    root = make_shards(tmp_path / "s", [5])
    make_tar(root / "1.tar", [("../x.png", b"x"), ("../x.txt", "x")])
    for workers in (0, 1):
        ((batch, _),) = stream(config(root, workers=workers), 1)
        assert len(batch) == 5
        (bad,) = batch.bad
        assert (bad.id, bad.kind) == (f"{root}/1.tar/../x", "unsafe member name")


# --- URLs


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with serving(make_shards(tmp_path / "served", [4, 3, 5, 4])) as server:
        yield server


def by_url(server: Server, **more: object) -> DataConfig:
    return config(f"{server.url}/{{00000..00003}}.tar", **more)


def state_sizes(server: Server) -> None:
    sizes = {f"{i:05d}.tar": size for i, size in enumerate((4, 3, 5, 4))}
    (server.folder / "sizes.json").write_text(json.dumps(sizes))


def fetched(server: Server) -> list[str]:
    return [path for path, _ in server.asked if path.endswith(".tar")]


def test_shards_by_url_are_fetched_once_and_read_as_local_ones(server: Server) -> None:
    state_sizes(server)
    dataset = open_dataset(by_url(server))
    assert len(dataset) == 16
    assert fetched(server) == []
    local = open_dataset(config(server.folder))
    for index in range(16):
        assert dataset[index].image == local[index].image
        assert dataset[index].captions == local[index].captions
    assert dataset[5].id == f"{server.url}/00001.tar/01001"
    assert len(fetched(server)) == 4
    again = open_dataset(by_url(server))
    assert ids(again, range(16)) == ids(local, range(16))
    assert len(fetched(server)) == 4
    assert list(again.visits((3,))) == list(local.visits((3,)))


def test_without_sizes_every_shard_is_fetched_and_counted_once(
    server: Server, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "leanclip")
    assert len(open_dataset(by_url(server))) == 16
    assert "all are fetched" in caplog.text
    for path in cache.glob("shards-fetched/*/*.tar"):
        path.unlink()
    assert len(open_dataset(by_url(server))) == 16
    assert len(fetched(server)) == 4


def test_img2dataset_s_stats_are_read_by_url(server: Server) -> None:
    for i, size in enumerate((4, 3, 5, 4)):
        (server.folder / f"{i:05d}_stats.json").write_text(json.dumps({"successes": size}))
    assert len(open_dataset(by_url(server))) == 16
    assert fetched(server) == []


def test_a_broken_transfer_of_a_shard_goes_on(server: Server) -> None:
    state_sizes(server)
    dataset = open_dataset(by_url(server))
    server.breaks = 1
    assert list(dataset[0].captions) == ["picture 0 of shard 0"]
    size = (server.folder / "00000.tar").stat().st_size
    assert server.asked[-2:] == [("/00000.tar", None), ("/00000.tar", f"bytes={size // 2}-")]


def test_a_shard_that_cannot_be_fetched_is_bad_samples_and_asked_for_once(server: Server) -> None:
    state_sizes(server)
    (server.folder / "00001.tar").rename(server.folder / "gone")
    dataset = open_dataset(by_url(server))
    kinds = bad_kinds(dataset)
    assert kinds == {f"sample {i}": "shard not fetched" for i in range(3)}
    assert fetched(server).count("/00001.tar") == 1
    (server.folder / "gone").rename(server.folder / "00001.tar")
    assert bad_kinds(open_dataset(by_url(server))) == {}


def test_a_server_that_is_down_is_not_taken_for_one_without_sizes(server: Server) -> None:
    server.statuses = [500] * 20
    with pytest.raises(DataError, match=r"index\.json: cannot be fetched"):
        open_dataset(by_url(server))
    server.statuses = []
    state_sizes(server)
    assert len(open_dataset(by_url(server))) == 16


def test_fetched_shards_stay_within_their_part_of_the_disk(
    server: Server, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_sizes(server)
    sizes = [(server.folder / f"{i:05d}.tar").stat().st_size for i in range(4)]
    dataset = open_dataset(by_url(server, cache_gigabytes=(sizes[0] + sizes[1]) / 1e9))

    def there() -> set[str]:
        return {path.name for path in cache.glob("shards-fetched/*/*.tar")}

    monkeypatch.setattr(shard_cache, "_IN_USE", 0.0)
    assert ids(dataset, [0, 4]) == ["00000", "01000"]
    assert there() == {"00000.tar", "00001.tar"}
    assert not caplog.text
    monkeypatch.setattr(shard_cache, "_IN_USE", 60.0)
    other = open_dataset(by_url(server, cache_gigabytes=(sizes[0] + sizes[1]) / 1e9))
    assert ids(other, [0, 12, 4]) == ["00000", "03000", "01000"]
    assert "less than the shards in use" in caplog.text
    assert len(there()) == 2
    assert ids(dataset, [0, 12, 4, 7]) == ["00000", "03000", "01000", "02000"]
    tiny = open_dataset(by_url(server, cache_gigabytes=1e-9))
    assert ids(tiny, range(16)) == ids(open_dataset(config(server.folder)), range(16))
    assert len(there()) == 1


def test_the_next_window_is_fetched_ahead(server: Server, cache: Path) -> None:
    state_sizes(server)
    visits = open_dataset(by_url(server, shuffle_buffer=1)).visits((1,))
    next(visits)
    limit = time.monotonic() + 20
    while len(list(cache.glob("indices/*.npy"))) < 2 and time.monotonic() < limit:
        pass
    assert len(set(fetched(server))) == 2
    assert len(list(cache.glob("indices/*.npy"))) == 2


def test_workers_share_what_is_fetched(server: Server) -> None:
    state_sizes(server)
    found = stream(by_url(server, workers=2, shuffle_buffer=8), 2)
    local = stream(config(server.folder, shuffle_buffer=8), 2)
    for (batch, _), (other, _) in zip(found, local, strict=True):
        assert torch.equal(batch.images, other.images)
    assert sorted(fetched(server)) == sorted(set(fetched(server)))
    assert np.all(found[0][0].indices.numpy() >= 0)
