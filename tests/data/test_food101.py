"""Getting Food-101: from a server, from a file, and not at all when something is wrong."""

import hashlib
import io
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import assert_refused, noise_image
from web import Server, serving, tags_of

from leanclip.config.data import DataConfig
from leanclip.data import open_dataset
from leanclip.data.readers import food101_archive
from leanclip.data.readers.food101_archive import get_food101
from leanclip.errors import DataError

Run = Callable[..., subprocess.CompletedProcess[str]]


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    noise_image(seed, (200, 160)).save(file, "JPEG")
    return file.getvalue()


def files() -> dict[str, bytes]:
    found = {
        "meta/classes.txt": b"apple_pie\nfrench_fries\n",
        "meta/labels.txt": b"Apple pie\nFrench fries\n",
        "meta/train.txt": b"apple_pie/1\nfrench_fries/2\n",
        "meta/test.txt": b"apple_pie/3\n",
    }
    names = ("apple_pie/1", "french_fries/2", "apple_pie/3")
    return found | {f"images/{name}.jpg": jpeg(i) for i, name in enumerate(names)}


def make_archive(path: Path, *extra: tarfile.TarInfo, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
        for name, content in files().items():
            info = tarfile.TarInfo(f"food-101/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in extra:
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    return path


def member(name: str, type: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = type, link, 3 if type == tarfile.REGTYPE else 0
    return info


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def assert_whole(root: Path) -> None:
    found = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert found == files()
    assert sorted(p.name for p in root.parent.glob(".*")) == []


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    (tmp_path / "served").mkdir()
    return make_archive(tmp_path / "served" / "food-101.tar.gz")


@pytest.fixture
def server(archive: Path) -> Iterator[Server]:
    with serving(archive.parent) as server:
        yield server


def test_the_command_downloads_unpacks_and_then_leaves_alone(
    server: Server, archive: Path, command: Run, workplace: Path
) -> None:
    server.breaks = 1
    words = ("data", "food101", "--url", f"{server.url}/food-101.tar.gz")
    done = command(*words, "--checksum", md5(archive))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "data/food-101: Food-101 is ready\n"
    assert [wanted for _, wanted in server.asked] == [None, f"bytes={archive.stat().st_size // 2}-"]
    assert_whole(workplace / "data" / "food-101")
    assert not (workplace / "data" / "food-101.tar.gz").exists()
    dataset = open_dataset(DataConfig(format="food101", root="data/food-101"))
    assert (len(dataset), dataset.classes) == (2, ["apple pie", "french fries"])
    done = command(*words)
    assert done.stdout == "data/food-101: Food-101 exists already\n"
    assert len(server.asked) == 2


def test_an_interrupted_download_goes_on(server: Server, archive: Path, tmp_path: Path) -> None:
    content = archive.read_bytes()
    (tmp_path / "food-101.tar.gz.part").write_bytes(content[:100])
    (tmp_path / "food-101.tar.gz.part.tag").write_text(tags_of(content)["ETag"])
    url = f"{server.url}/food-101.tar.gz"
    told: list[tuple[str, int, int]] = []
    get_food101(
        tmp_path / "food",
        url=url,
        checksum=md5(archive),
        keep_archive=True,
        progress=lambda *facts: told.append(facts),
    )
    assert server.asked == [("/food-101.tar.gz", "bytes=100-")]
    assert_whole(tmp_path / "food")
    assert (tmp_path / "food-101.tar.gz").read_bytes() == content
    assert {what for what, _, _ in told} == {"downloading", "unpacking"}
    assert all(done <= total == len(content) for _, done, total in told)
    shutil.rmtree(tmp_path / "food")
    get_food101(tmp_path / "food", url=url, checksum=md5(archive))
    assert len(server.asked) == 1  # it was there
    assert_whole(tmp_path / "food")


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_a_local_archive_is_kept(tmp_path: Path, command: Run, mode: str) -> None:
    path = make_archive(tmp_path / "a.tar", mode=mode)
    done = command("data", "food101", "food", "--archive", str(path), "--checksum", "none")
    assert done.returncode == 0, done.stderr
    assert_whole(tmp_path / "food")
    assert path.is_file()


def test_another_archive_is_refused(archive: Path, command: Run, workplace: Path) -> None:
    done = command("data", "food101", "food", "--archive", str(archive))
    assert_refused(done, md5(archive), food101_archive.MD5, "give another --archive, or")
    done = command("data", "food101", "food", "--archive", "nowhere.tar.gz")
    assert_refused(done, "--archive: no such file: nowhere.tar.gz")
    done = command("data", "food101", "data", "--archive", str(archive))
    assert_refused(done, "data: holds something other than Food-101")
    assert not (workplace / "food").exists()


HOSTILE = {
    "up": member("../evil"),
    "up inside": member("food-101/../../evil"),
    "absolute": member("/tmp/leanclip-evil"),
    "elsewhere": member("evil"),
    "symlink": member("food-101/evil", tarfile.SYMTYPE, "/etc"),
    "symlink up": member("food-101/evil", tarfile.SYMTYPE, "../.."),
    "hard link": member("food-101/evil", tarfile.LNKTYPE, "../../etc/passwd"),
    "device": member("food-101/evil", tarfile.CHRTYPE),
    "fifo": member("food-101/evil", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_write_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    path = make_archive(tmp_path / "in" / "a.tar.gz", HOSTILE[name])
    with pytest.raises(DataError, match=r"a\.tar\.gz: is not safe to unpack: '.*evil' is a"):
        get_food101(tmp_path / "in" / "food", archive=path, checksum=None)
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "a.tar.gz"]
    assert not Path("/tmp/leanclip-evil").exists()


def test_damaged_archives_say_what_to_do(archive: Path, tmp_path: Path) -> None:
    content = archive.read_bytes()
    plain = make_archive(tmp_path / "plain.tar", mode="w").read_bytes()
    header = plain.index(b"food-101/images/apple_pie/3.jpg")
    damaged = {
        "half": content[: len(content) // 2],
        "all but the end": content[:-4],
        "another checksum": content[:-8] + b"\0\0\0\0" + content[-4:],
        "in the middle": content[:3000] + bytes(100) + content[3100:],
        "a header": plain[:header] + b"\xff" * 512 + plain[header + 512 :],
        "no archive": b"<html>" * 1000,
        "empty": b"",
    }
    for name, what in damaged.items():
        path = tmp_path / "a.tar.gz"
        path.write_bytes(what)
        with pytest.raises(DataError, match=r"a\.tar\.gz: is cut short .*; give another --arch"):
            get_food101(tmp_path / "food", archive=path, checksum=None)
        assert not (tmp_path / "food").exists(), name
        assert not list(tmp_path.glob(".*")), name


def test_a_fetched_archive_that_is_damaged_is_to_be_removed(tmp_path: Path) -> None:
    (tmp_path / "food-101.tar.gz").write_bytes(b"<html>")  # of an earlier download
    with pytest.raises(DataError, match=r"is cut short .*; remove it and run this again"):
        get_food101(tmp_path / "food", checksum=None)
    with pytest.raises(DataError, match="another archive; remove it and run this again"):
        get_food101(tmp_path / "food")


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.addfile(member("food-101/readme"), io.BytesIO(b"abc"))
    with pytest.raises(DataError, match=r"has no food-101/meta/train\.txt"):
        get_food101(tmp_path / "food", archive=tmp_path / "a.tar.gz", checksum=None)


def test_what_is_left_of_an_interrupted_unpacking_is_removed(archive: Path, tmp_path: Path) -> None:
    left = tmp_path / ".food.unpacking" / "food-101" / "images"
    left.mkdir(parents=True)
    (left / "half.jpg").write_bytes(b"half")
    get_food101(tmp_path / "food", archive=archive, checksum=None)
    assert_whole(tmp_path / "food")


def test_a_missing_folder_says_how_to_get_it(workplace: Path) -> None:
    for root, words in (("data/food-101", ""), ("elsewhere", " elsewhere")):
        wanted = rf"no such folder: {root} \(get it with: leanclip data food101{words}\)$"
        with pytest.raises(DataError, match=wanted):
            open_dataset(DataConfig(format="food101", root=root))
