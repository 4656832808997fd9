"""Formats of images by suffix and content: read, or skipped by name; and Git LFS's pointers."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, assert_refused, make_config, make_model, make_pairs, noise_image
from PIL import Image

from leanclip.config.data import DataConfig
from leanclip.data import open_dataset
from leanclip.data.readers.image_files import list_images
from leanclip.errors import LeanclipError, SampleError
from leanclip.evaluation import Calibration
from leanclip.preprocess.decoding import is_image, open_image
from leanclip.preprocess.image_formats import SUFFIXES
from leanclip.weights import read_weights

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(64)


def encoded(suffix: str) -> bytes:
    file = io.BytesIO()
    noise_image(1).save(file, Image.registered_extensions()[f".{suffix}"])
    return file.getvalue()


OTHERS = {
    "a.heic": (HEIC, "HEIC"),
    "a.jxl": (b"\xff\x0a" + bytes(64), "JPEG XL"),
    "a.jp2": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64), "JPEG 2000"),
    "a.psd": (b"8BPS\0\1" + bytes(64), "Photoshop"),
    "a.svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "a.jpg": (HEIC, "HEIC"),  # as phones' uploads are misnamed
}


@pytest.mark.parametrize(
    ("suffix", "format", "mode"),
    [
        (".jfif", "JPEG", "RGB"),
        (".JPE", "JPEG", "L"),
        (".ppm", "PPM", "RGB"),
        (".pgm", "PPM", "L"),
        (".pbm", "PPM", "1"),
        (".apng", "PNG", "RGB"),
        pytest.param(
            ".avif", "AVIF", "RGB",
            marks=pytest.mark.skipif(".avif" not in SUFFIXES, reason="Pillow without AVIF"),
        ),
    ],
)  # fmt: skip
def test_less_usual_suffixes_are_read(tmp_path: Path, suffix: str, format: str, mode: str) -> None:
    path = tmp_path / f"x{suffix}"
    image = noise_image(1).convert(mode)
    image.save(path, format=format)
    assert list_images(tmp_path) == [path]
    pixels = np.asarray(open_image(path)).astype(int)
    close = 20 if format in ("JPEG", "AVIF") else 0
    assert np.abs(pixels - np.asarray(image.convert("RGB"))).mean() <= close
    assert is_image(path.read_bytes())


def test_sixteen_bits_of_a_pgm_are_those_of_a_png(tmp_path: Path) -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 257
    (tmp_path / "a.pgm").write_bytes(b"P5 8 8 65535\n" + values.byteswap().tobytes())
    Image.fromarray(values).save(tmp_path / "a.png")
    found, expected = (np.asarray(open_image(tmp_path / name)) for name in ("a.pgm", "a.png"))
    assert (found == expected).all()
    assert found.max() == 63  # not stretched to white


OTHERS |= {  # what Pillow itself writes
    f"b.{suffix}": (encoded(suffix), what)
    for suffix, what in (
        ("tga", "TGA"), ("dds", "DDS"), ("pcx", "PCX"), ("qoi", "QOI"), ("ico", "an icon"),
        ("dib", "a bitmap"), ("icns", "an icon"), ("eps", "PostScript"),
    )
    if f".{suffix}" in Image.registered_extensions()
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_named(tmp_path: Path, name: str) -> None:
    content, what = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path / name, content):
        with pytest.raises(SampleError, match=rf"but {what}.*; convert it to JPEG or PNG") as told:
            open_image(source)
        assert told.value.kind == "unsupported format"
    assert list_images(tmp_path) == [tmp_path / name]


def test_a_cameras_own_format_is_not_taken_for_the_preview_in_it(tmp_path: Path) -> None:
    noise_image(1).save(tmp_path / "a.nef", "TIFF")
    with pytest.raises(SampleError, match=r"a\.nef: .*\.nef is a raw format"):
        open_image(tmp_path / "a.nef")
    noise_image(1).save(tmp_path / "b.heic", "JPEG")  # what it is counts elsewhere
    assert open_image(tmp_path / "b.heic").size == (48, 40)


def test_they_are_counted_as_skipped(command: Command, workplace: Path) -> None:
    for name in ("000.heic", "x.heic", "y.nef"):  # 000 is a copy of 000.png
        Path("data", name).write_bytes(HEIC)
    for name in ("x", "y"):
        Path("data", f"{name}.txt").write_text("a caption\n")
    Path("data/notes.md").write_text("no image")
    make_model(workplace / "m")
    words = ("--model", "m", "--max-bad-fraction", "0.5")
    done = command("embed", "data", *words, "--out", "e")
    assert (json.loads(done.stdout)["images"], json.loads(done.stdout)["skipped"]) == (14, 2)
    assert json.loads(Path("e/_00000.skipped.json").read_text()).keys() == {"x.heic", "y.nef"}
    done = command("search", "build", "data", *words, "--out", "i")
    assert json.loads(done.stdout)["skipped"] == 2
    assert "data/x.heic" in done.stderr
    done = command("data", "check", "pairs:data", "--json", "--out", "c")
    part = json.loads(done.stdout)["parts"]["all"]
    assert part["unusable"] == {"unsupported format": 2}
    make_config(
        Path("config.yaml"),
        data={"max_bad_fraction": 0.2},
        train={"epochs": 1, "batch_size": 14},
        evaluate={"retrieval": None},
    )
    done = command("train", "-c", "config.yaml", "--output-dir", "run")
    kinds = [
        json.loads(line)["kind"] for line in Path("run/skipped.jsonl").read_text().splitlines()
    ]
    assert kinds == ["unsupported format"] * 2, done.stderr
    done = command("classify", "data", "--labels", "a,b", "--model", "m")
    assert len(done.stdout.splitlines()) == 12
    assert "skipped 2 images in unsupported formats: data/x.heic, data/y.nef" in done.stderr


def spoil_weights(folder: Path, name: str) -> Path:
    make_model(folder / "m")
    (folder / "m" / name).write_bytes(POINTER)
    return folder / "m"


def dataset_of(root: Path, format: str, **more: object) -> object:
    values = {"format": format, "root": str(root), "workers": 0, "max_bad_fraction": 1.0}
    dataset = open_dataset(DataConfig.model_validate(values | more))
    return open_image(dataset[0].image)


def write(path: Path, content: bytes = POINTER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "read",
    [
        lambda p: open_image(write(p / "a.jpg")),
        lambda p: open_image(POINTER),
        lambda p: dataset_of(write(p / "a.csv"), "table"),
        lambda p: dataset_of(write(p / "a.jsonl"), "table"),
        lambda p: dataset_of(write(p / "a.parquet"), "table"),
        lambda p: dataset_of(write(p / "d/train-00001-of-00002.parquet").parent, "table"),
        lambda p: dataset_of(write(p / "a.tar"), "shards"),
        lambda p: dataset_of(write(p / "d/test/0.tar").parent.parent, "wds"),
        lambda p: dataset_of(write(p / "a.parquet"), "hub"),
        lambda p: dataset_of(write(p / "d/data/train-00000-of-00001.parquet").parent, "hub"),
        lambda p: dataset_of(make_pairs(p / "c/ant").parent, "folder",
                             class_names=str(write(p / "names.txt"))),
        lambda p: dataset_of(write(make_pairs(p / "c/ant").parent / "templates.txt").parent,
                             "folder"),
        lambda p: read_weights(spoil_weights(p, "model.safetensors")),
        lambda p: read_weights(spoil_weights(p, "config.json")),
        lambda p: read_weights(write(p / "a.pt")),
        lambda p: read_weights(write(p / "a.pdparams")),
        lambda p: read_weights(p, arch=write(p / "a.json")),
        lambda p: Calibration.load(write(p / "calibration.json").parent),
    ],
)  # fmt: skip
def test_a_git_lfs_pointer_is_named(tmp_path: Path, read) -> None:
    with pytest.raises(LeanclipError, match=r"Git LFS pointer.*git lfs pull"):
        read(tmp_path)


def test_pointers_on_the_command_line(
    command: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(workplace / "m")
    words = ("--labels", "a,b", "--model", "m")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(POINTER)))
    assert_refused(command("classify", "-", *words), "git lfs pull")
    write(Path("names.txt"))
    done = command("classify", "data/000.png", "--labels", "names.txt", "--model", "m")
    assert_refused(done, "names.txt", "git lfs pull")
    write(Path("c.yaml"))
    assert_refused(command("train", "-c", "c.yaml"), "c.yaml", "git lfs pull")
    write(Path("data/000.txt"))
    done = command("data", "check", "pairs:data", "--json", "--out", "c")
    assert json.loads(done.stdout)["parts"]["all"]["unusable"] == {"git-lfs pointer": 1}
