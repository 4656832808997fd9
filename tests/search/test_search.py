"""`leanclip search`: an index of pictures built, found in, kept up to date, killed, refused."""

import io
import json
import os
import pty
import random
import shutil
import signal
import tarfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, Command, Forked, assert_refused, noise_image
from photographs import DESCRIPTIONS, write_photographs
from test_inference import save_tiny

import leanclip
from leanclip.data.formats.shapes import draw_dataset
from leanclip.errors import ConfigError, DataError, SampleError
from leanclip.io.files import try_lock
from leanclip.preprocess.images import CLIP_MEAN, Preprocess
from leanclip.search import Index
from leanclip.search.filters import date_range, size_range
from leanclip.weights import save_weights

BUILD = ("search", "build", "photos", "--model", "tiny", "--out", "index", "--device", "cpu")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `tiny`; in `photos` scikit-image's photographs and built-in drawings."""
    root = tmp_path_factory.mktemp("search")
    save_tiny(root / "tiny")
    write_photographs(root / "photos")
    for drawn, _ in draw_dataset(root / "shapes"):
        if drawn == 60:
            break
    shutil.move(root / "shapes/train", root / "photos/shapes")
    shutil.rmtree(root / "shapes")
    return root


@pytest.fixture
def place(workplace: Path, originals: Path) -> Path:
    """The workplace with copies of the originals."""
    shutil.copytree(originals, workplace, dirs_exist_ok=True)
    return workplace


@pytest.fixture
def index(place: Path) -> Iterator[Index]:
    """The index of `photos`, open with its model."""
    index = Index.build("photos", "tiny", "index")
    yield index
    index.close()


def images_of(folder: str) -> list[Path]:
    return sorted(path.absolute() for path in Path(folder).rglob("*.png"))


def assert_holds(index: Index, paths: list[Path]) -> None:
    """The index has these files, each with the features that the model gives it."""
    assert index.clip is not None
    expected = index.clip.embed_images(list(paths)) if paths else np.empty((0, 16))
    found = {
        path: hit
        for hit in index.search(np.ones(16, np.float32), k=max(1, len(index)))
        for path in hit.paths
    }
    assert sorted(found) == sorted(map(str, paths))
    for path, row in zip(paths, expected, strict=True):
        hit = found[str(path)]
        np.testing.assert_allclose(index.vector(hit.number), row, atol=6e-4)  # fp16
        assert index.read(hit.number) == path.read_bytes()


def test_what_is_found_is_what_brute_force_finds(index: Index) -> None:
    paths = images_of("photos")
    assert len(index) == len(paths) == 68
    assert_holds(index, paths)
    assert index.clip is not None
    features = np.stack([index.vector(number) for number in range(68)]).astype(np.float64)
    names = [index.item(number).path for number in range(68)]
    for text in (*DESCRIPTIONS.values(), "a red star"):
        scores = features @ index.clip.embed_texts(text)[0].astype(np.float64)
        order = np.argsort(-scores, kind="stable")[:12]
        hits = index.search(text, k=12)
        np.testing.assert_allclose([hit.score for hit in hits], scores[order], atol=1e-12)
        assert [hit.path for hit in hits] == [names[place] for place in order]
        originals = index.clip.embed_images(paths) @ index.clip.embed_texts(text)[0]  # not of fp16
        best = np.sort(originals)[::-1][:12]
        np.testing.assert_allclose([hit.score for hit in hits], best, atol=1e-3)
    for path in paths[:5]:
        assert index.search(path, k=1)[0].path == str(path)


def test_hits_say_what_is_there(index: Index) -> None:
    hit = index.search(Path("photos/coffee.png"), k=1)[0]
    assert (hit.caption, hit.label) == (DESCRIPTIONS["coffee"], None)
    assert hit.size == Path("photos/coffee.png").stat().st_size
    assert hit.mtime == pytest.approx(Path("photos/coffee.png").stat().st_mtime)
    drawing = images_of("photos/shapes")[0]
    hit = index.search(drawing, k=1)[0]
    assert hit.label == "shapes"
    assert hit.caption == drawing.with_suffix(".txt").read_text().strip()
    assert index.labels() == {"shapes": 60}


def test_filters(index: Index) -> None:
    query = np.ones(16, np.float32)
    everything = {hit.path: hit for hit in index.search(query, k=100)}

    def found(**settings: Any) -> set[str]:
        hits = index.search(query, k=100, **settings)
        assert all(hit == everything[hit.path] for hit in hits)
        return {hit.path for hit in hits}

    drawings = {str(path) for path in images_of("photos/shapes")}
    assert found(label="shapes") == found(label=["none", "shapes"]) == drawings
    assert found(label="none") == set()
    assert found(label=[]) == set(everything)
    below = {str(path) for path in images_of("photos/shapes/00")}
    assert found(folder="photos/shapes/00") == below
    assert found(folder=Path("photos").absolute()) == set(everything)
    assert found(folder="photos/shap") == set()
    assert found(folder="/") == set(everything)
    sizes = {path: Path(path).stat().st_size for path in everything}
    middle = sorted(sizes.values())[60]
    assert found(size=(middle, None)) == {path for path in sizes if sizes[path] >= middle}
    assert found(size=(None, middle), label="shapes") == {
        path for path in drawings if sizes[path] < middle
    }
    best = sorted(everything.values(), key=lambda hit: -hit.score)
    assert found(minimum=best[4].score) == {hit.path for hit in best[:5]}
    for path in list(everything)[:7]:
        os.utime(path, (1.5e9, 1.5e9))
    index.update()
    everything = {hit.path: hit for hit in index.search(query, k=100)}
    assert found(date=(1.5e9, 1.5e9 + 1)) == found(date=(None, datetime(2018, 1, 1)))
    assert len(found(date=(1.5e9, 1.5e9 + 1))) == 7
    assert found(date=(1.5e9 + 1, 1.6e9)) == set()


def test_ranges_as_words() -> None:
    assert size_range("100k..2M") == (100_000, 2_000_000)
    assert size_range("..1.5G") == (None, 1.5e9)
    assert size_range("7..") == (7, None)
    day = datetime
    assert date_range("2024") == (day(2024, 1, 1), day(2025, 1, 1))
    assert date_range("2023-11..2024-02-28") == (day(2023, 11, 1), day(2024, 2, 29))
    assert date_range("..2024-12") == (None, day(2025, 1, 1))
    assert date_range("2024-12-31..") == (day(2024, 12, 31), None)
    for wrong in ("x", "2024-13", "2024-02-30", "2024-1-1-1"):
        with pytest.raises(ConfigError, match=f"--date {wrong}: use 2024"):
            date_range(wrong)
    for wrong in ("2M", "a..b", "1T.."):
        with pytest.raises(ConfigError, match="use 100k"):
            size_range(wrong)


def test_several_with_weights_and_what_is_not_wanted(index: Index) -> None:
    assert index.clip is not None
    cat, dog, people = index.clip.embed_texts(["a cat", "a dog", "people"])
    picture = index.clip.embed_images(Path("photos/horse.png"))[0]
    vector = index.query(["a cat", "a dog"], [Path("photos/horse.png")], ["people"], [2, 1, 0.5])
    expected = (2 * cat + dog + 0.5 * picture) / 3.5 - people
    np.testing.assert_allclose(vector, expected, atol=1e-6)
    np.testing.assert_allclose(index.query(["a cat"]), cat, atol=1e-6)
    for weights in ([1], [1, -1], [0, 1], [float("nan"), 1]):
        with pytest.raises(ConfigError, match="weights: should be 1 positive number, found"):
            index.query(["a star"], weights=[0])
        with pytest.raises(ConfigError, match="weights: should be 2 positive numbers"):
            index.query(["a cat", "a dog"], weights=weights)
    with pytest.raises(ConfigError, match="give a text, or an image"):
        index.query(without=["people"])
    with pytest.raises(DataError, match=r"found shape \(1, 3\); this index needs \(Q, 16\)"):
        index.search(np.ones(3))
    with pytest.raises(DataError, match="values are not finite"):
        index.search(np.full(16, np.nan))


def test_many_queries_are_one_by_one_the_same(index: Index) -> None:
    queries = np.stack([index.vector(number) for number in range(68)])
    together = index.search_many(queries, k=4)
    assert [hits[0].number for hits in together] == list(range(68))
    assert together[7] == index.search(queries[7], k=4)


def test_updating_adds_changes_and_drops(index: Index, place: Path) -> None:
    reader = Index.open("index")
    assert index.update().unchanged == 68
    assert index.clip is not None
    numbers = {path: index.search(path, k=1)[0].number for path in images_of("photos")}
    noise_image(1).save(place / "photos/new.png")
    noise_image(2).save(place / "photos/shapes/new.png")
    noise_image(3).save(place / "photos/camera.png")  # another picture in an old file
    (place / "photos/chelsea.png").unlink()
    (place / "photos/horse.png").rename(place / "photos/moved.png")
    (place / "photos/coffee.txt").write_text("espresso\n")
    changes = index.update()
    assert (changes.added, changes.changed, changes.dropped) == (3, 1, 2)
    assert (changes.files, changes.pictures) == (69, 69)
    assert_holds(index, images_of("photos"))
    assert len(reader) == 69  # open meanwhile, it sees all
    assert reader.search(index.vector(numbers[place / "photos/page.png"]), k=1)[0].caption
    assert index.search(place / "photos/coffee.png", k=1)[0].caption == "espresso"
    assert (
        index.search(place / "photos/moved.png", k=1)[0].number
        == numbers[place / "photos/horse.png"]
    )  # it was not embedded again
    with pytest.raises(DataError, match="no image has the number"):
        index.item(numbers[place / "photos/chelsea.png"])
    for seed in range(4, 8):  # the numbers of what went are not used again
        for old in sorted(place.glob("photos/new*.png")):
            old.unlink()
        noise_image(seed).save(place / "photos/new.png")
        index.update()
    assert_holds(index, images_of("photos"))
    assert index.search(place / "photos/new.png", k=1)[0].number == 68 + 3 + 3
    reader.close()


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_files_that_swap_their_contents_keep_their_features(
    index: Index, place: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    monkeypatch.setattr("leanclip.search.update.COMMIT_EVERY", 1)
    numbers = {path: index.search(path, k=1)[0].number for path in images_of("photos")}
    first, *_, last = numbers
    first.rename(place / "swap.png")
    last.rename(first)
    (place / "swap.png").rename(last)
    for path in (first, last):
        os.utime(path, (1.5e9, 1.5e9))
    assert index.update(batch_size=batch_size).changed == 2
    assert_holds(index, images_of("photos"))
    assert index.search(last, k=1)[0].number in (numbers[first], len(numbers))


def test_equal_files_are_one_picture_with_all_their_paths(index: Index, place: Path) -> None:
    (place / "photos/more").mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(place / "photos/coffee.png", place / "photos/more" / name)
    assert index.update().pictures == 68
    first, second = index.search(place / "photos/coffee.png", k=2)
    names = ["coffee.png", "more/a.png", "more/b.png"]
    assert first.paths == tuple(str(place / "photos" / name) for name in names)
    assert second.score < first.score
    only = index.search(place / "photos/coffee.png", k=1, label="more")[0]
    assert only.paths == first.paths[1:]
    (place / "photos/coffee.png").unlink()
    index.update()
    assert index.search(place / "photos/more/a.png", k=1)[0].number == first.number
    assert len(index) == 68


def test_killed_at_random_it_goes_on(place: Path) -> None:
    words = (*BUILD, "--batch-size", "4")
    environment = {"LEANCLIP_CACHE": str(place / "cache")}
    rng = random.Random(5)
    kills, found, numbers = 0, 0, {}

    def eager() -> None:  # a commit after every batch, so that kills meet some
        from leanclip.search import update

        update.COMMIT_EVERY = 1

    for _ in range(30):
        if kills == 6:
            break
        run = Forked(*words, folder=place, environment=environment, before=eager)
        file = place / "index/features.f16"
        before = file.stat().st_size if file.exists() else 0
        run.until(
            lambda file=file, before=before: (
                file.exists() and (file.stat().st_size > before or file.stat().st_size == 68 * 32)
            )
        )
        time.sleep(rng.random() * 0.02)
        run.send(signal.SIGKILL)
        code = run.code()
        if code == 0:  # too late: it had finished
            shutil.rmtree("index")
            numbers = {}
            continue
        assert code == -signal.SIGKILL, run.output()
        kills += 1
        with_some = Index.open("index", "tiny")  # what is in it is whole
        hits = with_some.search(np.ones(16, np.float32), k=100)
        assert len(hits) == len(with_some)
        found += len(hits)
        assert_holds(with_some, [Path(hit.path) for hit in hits])
        assert numbers.items() <= (numbers := {hit.path: hit.number for hit in hits}).items()
        with_some.close()
    assert kills == 6
    assert found > 0
    run = Forked(*words, folder=place, environment=environment)
    assert run.code() == 0, run.output()
    index = Index.open("index", "tiny")
    assert_holds(index, images_of("photos"))
    assert index.update().unchanged == 68
    index.close()


def test_another_model_is_refused(index: Index, place: Path, command: Command) -> None:
    import torch

    torch.manual_seed(2)
    other = leanclip.load("tiny")
    model = leanclip.CLIP(**TINY)
    (place / "other").mkdir()
    (place / "grey").mkdir()
    save_weights(
        place / "other",
        model.state_dict(),
        model.config,
        Preprocess(32),
        provenance="a test",
    )
    mean = (0.5, *CLIP_MEAN[1:])
    save_weights(
        place / "grey",
        other.model.state_dict(),
        other.model.config,
        Preprocess(32, mean=mean),
        provenance="a test",
    )
    for name, words in (("other", "different weights"), ("grey", "different preprocessing")):
        with pytest.raises(ConfigError, match=words):
            Index.open("index", name)
        assert_refused(command("search", "find", "index", "x", "--model", name), words, "tiny")
        assert_refused(command("search", "update", "index", "--model", name), words)
        assert_refused(command(*BUILD[:3], "--model", name, "--out", "index"), words)
    index.items.set_metadata("model", index.model | {"tokeniser": "of another vocabulary"})
    with pytest.raises(ConfigError, match="different tokeniser"):
        Index.open("index", "tiny")
    without = Index.open("index")
    with pytest.raises(ConfigError, match="opened without a model"):
        without.search("a cat")


def test_what_is_no_index_is_refused(place: Path, command: Command) -> None:
    for name, content in (("odd", b"nothing at all"), ("empty", b"")):
        (place / name).mkdir()
        (place / name / "items.sqlite").write_bytes(content)
        assert_refused(command("search", "find", name, "x"), f"{name}", "not an index")


def test_on_the_command_line(place: Path, command: Command) -> None:
    done = command(*BUILD)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["added"], said["files"], said["pictures"], said["skipped"]) == (68, 68, 68, 0)
    done = command("search", "find", "index", "a cat", "--not", "a dog", "-k", "3")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    index = Index.open("index", "tiny")
    hits = index.search(index.query(["a cat"], without=["a dog"]), k=3)
    assert [line["path"] for line in lines] == [hit.path for hit in hits]
    assert lines[0]["score"] == pytest.approx(hits[0].score, abs=1e-6)
    assert datetime.fromisoformat(lines[0]["date"]).timestamp() == pytest.approx(
        hits[0].mtime, abs=1
    )
    words = ("--image", "photos/horse.png", "--size", "..1M", "--date", "2000..", "--grid", "g.png")
    done = command("search", "find", "index", *words)
    assert json.loads(done.stdout.splitlines()[0])["path"].endswith("horse.png"), done.stderr
    assert (place / "g.png").stat().st_size > 1000
    shutil.rmtree(place / "photos/shapes")
    done = command("search", "update", "index")
    assert json.loads(done.stdout)["dropped"] == 60, done.stderr
    assert not command("search", "find", "index", "a cat", "--minimum", "1.1").stdout
    assert_refused(command("search", "find", "index"), "give a text, or an image")
    assert_refused(command("search", "find", "nowhere", "x"), "nowhere: no index", "search build")
    assert_refused(command(*BUILD[:6], "photos"), "photos: contains other files")
    assert_refused(command("search", "build", "none", *BUILD[3:]), "none: no such folder")
    index.close()


def test_a_terminal_gets_a_table_with_links(
    index: Index, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from leanclip.cli.main import main

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", terminal)
        with pytest.raises(SystemExit):
            main(["search", "find", "index", "--image", "photos/horse.png", "-k", "2"])
    shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    link = f"\x1b]8;id=[0-9]+;{(Path.cwd() / 'photos/horse.png').as_uri()}"
    import re

    assert re.search(link, shown), shown
    assert "photos/horse.png" in shown
    assert DESCRIPTIONS["horse"] in shown


def test_what_cannot_be_read_is_left_out(index: Index, place: Path, command: Command) -> None:
    (place / "photos/camera.png").write_bytes(b"nothing")
    os.mkfifo(place / "photos/pipe.jpg")  # it would be waited for
    done = command("search", "update", "index")
    assert json.loads(done.stdout)["skipped"] == 2
    assert "camera.png" in done.stderr
    assert len(index) == 67
    for number in range(20):
        (place / f"photos/{number}.jpg").write_bytes(b"<html>")
    done = command("search", "update", "index")
    assert_refused(done, "bad of 89 samples", "over --max-bad-fraction=0.1")
    assert len(index) == 67
    page = index.search(place / "photos/page.png", k=1)[0]
    (place / "photos/page.png").unlink()
    with pytest.raises(SampleError, match=r"page\.png: no such image"):
        index.read(page.number)


def test_a_source_that_is_gone_drops_nothing(index: Index, place: Path) -> None:
    shutil.move(place / "photos", place / "elsewhere")
    with pytest.raises(DataError, match="the source is gone"):
        index.update()
    (place / "photos").mkdir()  # a disk that is not mounted
    with pytest.raises(DataError, match="no images found"):
        index.update()
    assert len(index) == 68
    changes = index.update(["elsewhere"])
    assert (changes.added, changes.dropped, changes.pictures) == (68, 68, 68)
    assert_holds(index, images_of("elsewhere"))


def test_two_at_once_are_refused_and_searches_go_on(index: Index, place: Path) -> None:
    ready, done = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:  # another process holds the lock
        with try_lock(place / "index/lock") as is_acquired:
            os.write(ready[1], b"1" if is_acquired else b"0")
            os.read(done[0], 1)
        os._exit(0)
    assert os.read(ready[0], 1) == b"1"
    with pytest.raises(ConfigError, match="another process is building or updating it"):
        index.update()
    assert index.search("a cat")
    os.write(done[1], b"1")
    os.waitpid(child, 0)
    failures: list[BaseException] = []

    def look() -> None:
        try:
            for _ in range(30):
                assert len(index.search(np.ones(16, np.float32), k=20)) == 20
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for seed in range(5):
        noise_image(seed).save(place / "photos" / f"{seed}.png")
        index.update()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_from_embeddings(place: Path, command: Command, format: str) -> None:
    words = ("--model", "tiny", "--shard-size", "30", "--format", format)
    assert command("embed", "photos", *words, "--out", "embeddings").returncode == 0
    done = command("search", "build", "embeddings", *BUILD[3:], "--root", "photos")
    assert json.loads(done.stdout)["added"] == 68, done.stderr
    index = Index.open("index", "tiny")
    assert_holds(index, images_of("photos"))
    noise_image(1).save(place / "photos/camera.png")  # not what was embedded any more
    (place / "photos/page.png").unlink()
    changes = index.update()
    assert (changes.changed, changes.dropped + changes.skipped) == (1, 2)
    assert_holds(index, images_of("photos"))
    index.close()
    shutil.rmtree(place / "photos")  # features are enough to search, if not to show
    lone = Index.build("embeddings", "tiny", "lone", root="photos")
    assert len(lone) == 68
    assert lone.search("a cat", k=1)[0].size == 0
    save_tiny(place / "small", embed_dim=8)
    refused = command("search", "build", "embeddings", "--model", "small", "--out", "new")
    assert_refused(refused, "embeddings: these embeddings were computed with other weights")
    assert_refused(
        command(*BUILD[:2], "tiny", *BUILD[3:], "--root", "x"), "tiny: --root is for embeddings"
    )
    lone.close()


def test_from_shards(place: Path) -> None:
    root = place / "shards"
    root.mkdir()
    (root / "classes.txt").write_text("cat\ndog\n")
    with tarfile.open(root / "0.tar", "w") as tar:
        for number in range(6):
            image = io.BytesIO()
            noise_image(number).save(image, "PNG")
            parts = {"png": image.getvalue(), "txt": b"a thing\n", "cls": b"%d" % (number % 2)}
            for part, content in parts.items():
                info = tarfile.TarInfo(f"in/{number}.{part}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    noise_image(1).save(root / "same.png")
    index = Index.build(root, "tiny", "index")
    assert (len(index), index.labels()) == (6, {"cat": 3, "dog": 3})
    hit = index.search(noise_image(2), k=1)[0]
    assert (hit.path, hit.caption, hit.label) == (f"{root}/0.tar/in/2", "a thing", "cat")
    assert hit.score > 0.999
    image = io.BytesIO()
    noise_image(2).save(image, "PNG")
    assert index.read(hit.number) == image.getvalue()
    assert len(index.search(noise_image(1), k=1)[0].paths) == 2
    assert index.update().unchanged == 7
    index.close()


def test_names_that_are_not_unicode(place: Path, command: Command) -> None:
    odd = os.fsencode(place / "photos") + b"/\xff \x1b[31m.png"
    noise_image(0).save(place / "t.png")
    (place / "t.png").rename(os.fsdecode(odd))
    assert command(*BUILD).returncode == 0
    done = command("search", "find", "index", "--image", os.fsdecode(odd), "-k", "1")
    assert os.fsencode(json.loads(done.stdout)["path"]) == odd
    index = Index.open("index")
    assert index.item(json.loads(done.stdout)["number"]).path == os.fsdecode(odd)
    index.close()
