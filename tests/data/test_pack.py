"""`leanclip data pack`: what the shards hold, the same however they came about."""

import hashlib
import io
import json
import os
import signal
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_refused, make_pairs, noise_image
from PIL import Image
from skimage import data as photographs

from leanclip.config.data import DataConfig
from leanclip.config.strict_yaml import load_yaml
from leanclip.data import parse_source
from leanclip.data.scaled_decode import open_header, open_scaled
from leanclip.data.tools.pack import pack, packed_image
from leanclip.data.tools.parallel import Note, in_processes
from leanclip.errors import DataError, SampleError
from leanclip.preprocess.decoding import open_image

Command = Callable[..., subprocess.CompletedProcess[str]]
LIMIT = 10**8  # pixels


def members(folder: Path) -> dict[str, bytes]:
    """Everything in the shards of a folder, in order."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    return found


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def pairs_of(root: Path) -> DataConfig:
    return parse_source(f"pairs:{root}")


def test_every_sample_is_packed_once_with_its_captions(command: Command) -> None:
    Path("data/003.txt").write_text("only one\n")
    done = command("data", "pack", "pairs:data", "packed", "--side", "20", "--shard-size", "5")
    assert done.returncode == 0, done.stderr
    found = members(Path("packed"))
    assert sorted(name for name in found if name.endswith(".jpg")) == [
        f"{i:09d}.jpg" for i in range(12)
    ]
    captions = [
        text.decode() if name.endswith(".txt") else json.loads(text)["captions"][0]
        for name, text in found.items()
        if not name.endswith(".jpg")
    ]
    expected = [f"picture number {i}" if i != 3 else "only one" for i in range(12)]
    assert sorted(captions) == sorted(expected)
    assert captions != expected  # shuffled
    for name, data in found.items():
        if name.endswith(".jpg"):
            image = Image.open(io.BytesIO(data))
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (24, 20))
    index = json.loads(Path("packed/index.json").read_text())
    assert [shard["samples"] for shard in index["shards"]] == [5, 5, 2]
    assert index["samples"] == 12
    assert sorted(path.name for path in Path("packed").iterdir()) == [
        *(f"0000{i}.tar" for i in range(3)),
        "index.json",
    ]
    settings = load_yaml(done.stdout.split("\n\n")[1], where="stdout")
    assert settings == {"data": {"format": "shards", "root": "packed"}}


def test_class_data_keeps_labels_and_names(tmp_path: Path) -> None:
    for label, name in enumerate(("cat", "dog")):
        for i in range(3):
            path = tmp_path / "pets" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (255 * label, 0, 0)).save(path)
    pack(parse_source(f"folder:{tmp_path / 'pets'}"), tmp_path / "packed", workers=0)
    found = members(tmp_path / "packed")
    assert (tmp_path / "packed/classes.txt").read_text() == "cat\ndog\n"
    for i in range(6):
        label = int(found[f"{i:09d}.cls"])
        assert found[f"{i:09d}.txt"].decode() == ("cat", "dog")[label]
        pixels = np.asarray(Image.open(io.BytesIO(found[f"{i:09d}.jpg"])))
        assert abs(int(pixels[0, 0, 0]) - 255 * label) < 10


def test_names_of_classes_are_packed_on_one_line(tmp_path: Path) -> None:
    noise_image(0).save(tmp_path / "0.png")
    path = tmp_path / "a.csv"
    path.write_text('image,label\n0.png,"red\n fox"\n0.png,cat\n')
    source = DataConfig(format="table", root=str(path), workers=0)
    pack(source, tmp_path / "packed")
    assert (tmp_path / "packed" / "classes.txt").read_text() == "cat\nred fox\n"
    assert {b"cat", b"red fox"} <= set(members(tmp_path / "packed").values())
    path.write_text('image,label\n0.png," "\n0.png,cat\n')
    with pytest.raises(DataError, match="a class has no name"):
        pack(source, tmp_path / "again")


def test_templates_are_in_the_settings_that_are_printed(command: Command) -> None:
    (Path("pets") / "cat").mkdir(parents=True)
    noise_image(0).save("pets/cat/0.png")
    done = command("data", "pack", "folder:pets", "packed", "-o", 'templates=["my {}"]')
    assert done.returncode == 0, done.stderr
    settings = load_yaml(done.stdout.split("\n\n")[1], where="stdout")
    assert settings["data"] == {"format": "shards", "root": "packed", "templates": ["my {}"]}


def test_only_what_needs_it_is_encoded_again(tmp_path: Path) -> None:
    noise_image(0, (80, 60)).save(tmp_path / "a.jpg", quality=70)
    data = (tmp_path / "a.jpg").read_bytes()
    assert packed_image(data, 60, 90, max_pixels=LIMIT) == data
    assert packed_image(data, 59, 90, max_pixels=LIMIT) != data
    grey, turned, png = io.BytesIO(), io.BytesIO(), io.BytesIO()
    noise_image(0, (80, 60)).convert("L").save(grey, "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise_image(0, (80, 60)).save(turned, "JPEG", exif=exif)
    noise_image(0, (80, 60)).save(png, "PNG")
    for file in (grey, turned, png):
        packed = packed_image(file.getvalue(), 60, 90, max_pixels=LIMIT)
        image = Image.open(io.BytesIO(packed))
        assert packed != file.getvalue()
        assert (image.mode, image.getexif().get(0x0112)) == ("RGB", None)
        difference = np.asarray(open_image(packed), int) - np.asarray(open_image(file.getvalue()))
        assert np.abs(difference).mean() < 6


@pytest.mark.parametrize("size", [(1000, 700), (700, 1000), (130, 131), (512, 512)])
def test_images_are_resized_as_if_decoded_whole(size: tuple[int, int]) -> None:
    file = io.BytesIO()
    Image.fromarray(photographs.coffee()).resize(size).save(file, "JPEG", quality=95)
    packed = Image.open(io.BytesIO(packed_image(file.getvalue(), 64, 95, max_pixels=LIMIT)))
    assert min(packed.size) == 64
    assert abs(packed.width / packed.height - size[0] / size[1]) < 0.02
    header = open_header(file.getvalue(), max_pixels=LIMIT)
    small = open_scaled(header, 64, max_pixels=LIMIT)
    assert 2 * 64 <= min(small.size) < 4 * 64 + 1
    whole = open_image(file.getvalue()).resize(packed.size, Image.Resampling.BICUBIC)
    small = small.resize(packed.size, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(whole, int) - np.asarray(small)).mean() < 1.2


def test_images_that_cannot_be_packed(tmp_path: Path) -> None:
    file = io.BytesIO()
    noise_image(0, (800, 600)).save(file, "JPEG")
    data = file.getvalue()
    for broken, kind in (
        (b"", "empty file"),
        (b"no image", "not an image"),
        (data[: len(data) // 2], "damaged image"),
    ):
        with pytest.raises(SampleError) as caught:
            packed_image(broken, 64, 90, max_pixels=LIMIT)
        assert caught.value.kind == kind
    with pytest.raises(SampleError) as caught:
        packed_image(data, 64, 90, max_pixels=800 * 600 - 1)
    assert caught.value.kind == "too many pixels"
    long = io.BytesIO()
    Image.new("RGB", (70_000, 2)).save(long, "PNG")
    with pytest.raises(SampleError) as caught:
        packed_image(long.getvalue(), 64, 90, max_pixels=LIMIT)
    assert caught.value.kind == "too long image"


def test_bytes_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    source = pairs_of(make_pairs(tmp_path / "data", 20))
    for workers in (0, 1, 3):
        pack(source, tmp_path / f"{workers}", side=20, shard_size=3, workers=workers)
    assert digests(tmp_path / "0") == digests(tmp_path / "1") == digests(tmp_path / "3")
    pack(source, tmp_path / "other", side=20, shard_size=3, workers=0, seed=1)
    assert digests(tmp_path / "other") != digests(tmp_path / "0")


def test_a_finished_pack_is_left_alone(tmp_path: Path) -> None:
    source = pairs_of(make_pairs(tmp_path / "data"))
    first = pack(source, tmp_path / "packed", workers=0)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "packed").iterdir()}
    assert pack(source, tmp_path / "packed", workers=0) == first
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "packed").iterdir()}


def test_bad_samples_are_skipped_up_to_a_share(tmp_path: Path) -> None:
    make_pairs(tmp_path / "data", 20)
    (tmp_path / "data/007.png").write_bytes(b"broken")
    allowed = parse_source(f"pairs:{tmp_path / 'data'}", ["max_bad_fraction=0.05"])
    for workers in (0, 2):
        folder = tmp_path / f"packed{workers}"
        index = pack(allowed, folder, shard_size=4, workers=workers)
        assert (index["samples"], index["skipped"]) == (19, 1)
        (line,) = (folder / "skipped.jsonl").read_text().splitlines()
        assert "007.png" in json.loads(line)["reason"]
        assert len([name for name in members(folder) if name.endswith(".jpg")]) == 19
    assert digests(tmp_path / "packed0") == digests(tmp_path / "packed2")


def test_too_many_bad_samples_stop_it_until_they_are_mended(tmp_path: Path) -> None:
    make_pairs(tmp_path / "data", 20)
    whole = (tmp_path / "data/007.png").read_bytes()
    (tmp_path / "data/007.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"007\.png.*1 bad of 20.*max_bad_fraction"):
        pack(pairs_of(tmp_path / "data"), tmp_path / "packed", shard_size=4, workers=2)
    assert not (tmp_path / "packed/index.json").exists()
    assert not list((tmp_path / "packed").glob("*.part"))
    (tmp_path / "data/007.png").write_bytes(whole)
    index = pack(pairs_of(tmp_path / "data"), tmp_path / "packed", shard_size=4, workers=2)
    assert (index["samples"], index["skipped"]) == (20, 0)
    assert not (tmp_path / "packed/skipped.jsonl").exists()


def test_a_mixture_is_packed_whole(tmp_path: Path) -> None:
    sources = [{"format": "pairs", "root": str(make_pairs(tmp_path / n, 4))} for n in "ab"]
    config = DataConfig.model_validate_json(
        json.dumps({"format": "mixture", "sources": sources, "epoch_size": 3})
    )
    assert pack(config, tmp_path / "packed", workers=0)["samples"] == 8


def test_mistakes_are_refused(command: Command) -> None:
    assert_refused(command("data", "pack", "data", "packed"), "SRC data", "FORMAT:ROOT", "pairs")
    assert_refused(command("data", "pack", "pairs:nowhere", "packed"), "no such folder: nowhere")
    assert not Path("packed").exists()
    assert_refused(command("data", "pack", "pairs:data", "data"), "data", "not an empty folder")
    assert_refused(
        command("data", "pack", "pairs:data", "packed", "-o", "rot=1"), "rot", "no such setting"
    )
    assert command("data", "pack", "pairs:data", "packed", "--side", "20").returncode == 0
    again = command("data", "pack", "pairs:data", "packed", "--side", "24")
    assert_refused(again, "packed", "side 20", "24")


def test_a_config_file_names_the_source(command: Command) -> None:
    done = command("data", "pack", "config.yaml", "packed", "-o", "max_bad_fraction=0.5")
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("packed/index.json").read_text())["source"] == {
        "format": "pairs",
        "root": "data",
    }


def deadly(index: int, note: Note) -> int:
    note(index)
    if index == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return index


def test_the_sample_that_kills_a_process_is_named() -> None:
    done = in_processes(deadly, range(9), 1, name="sample-{}".format, progress=lambda _: None)
    with pytest.raises(DataError, match="sample-3: the process that was reading it died"):
        list(done)


def test_results_are_in_order_and_samples_are_counted() -> None:
    counts: list[int] = []
    done = in_processes(
        deadly, [5, 4, 9, 1, 0, 8], 2, name="sample-{}".format, progress=counts.append
    )
    assert list(done) == [5, 4, 9, 1, 0, 8]
    assert counts[-1] == 6
    assert counts == sorted(counts)
