"""Files that once did harm, read again: those in tests/golden/corpus, and some made here."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA, make_model
from hostile import arguments, name, text
from mutations import bounded, check_words
from test_fuzz_images import everything
from test_fuzz_tables import read_all
from test_fuzz_weights import SMALL

import leanclip
from leanclip.config.data import DataConfig
from leanclip.config.schema import load_config
from leanclip.config.strict_yaml import load_yaml
from leanclip.errors import LeanclipError, WeightsError
from leanclip.preprocess.tokenizer import tokenize
from leanclip.weights import read_weights

CORPUS = DATA / "corpus"
FILES = sorted(path for path in CORPUS.iterdir() if path.name != "README.md")


def _table(path: Path) -> None:
    for label in (None, "label"):
        try:
            read_all(DataConfig(format="table", root=str(path), label_column=label))
        except LeanclipError as error:
            check_words(error)


READERS: dict[str, Callable[[Path], Any]] = {
    "weights": read_weights,
    "image": lambda path: everything(path.read_bytes()),
    "table": _table,
    "tar": lambda path: read_all(DataConfig(format="shards", root=str(path))),
    "yaml": lambda path: load_yaml(path.read_text("utf-8", "surrogateescape"), where="x"),
    "config": load_config,
    "caption": lambda path: tokenize(path.read_text("utf-8", "surrogatepass"), truncate=True),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_of_the_corpus(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANCLIP_CACHE", str(tmp_path / "cache"))
    with bounded(b"", path.name):
        READERS[path.name.partition("-")[0]](path)


def test_every_file_of_the_corpus_is_described() -> None:
    words = (CORPUS / "README.md").read_text()
    assert [path.name for path in FILES if f"`{path.name}`" not in words] == []
    assert sum(path.stat().st_size for path in FILES) < 200_000


def test_few_values_under_many_names(tmp_path: Path) -> None:
    """Each name's values become values of their own: 4 MB, by 600 names, twice as wide."""
    values = np.zeros(2_000_000, np.uint16)
    many: dict[str, Any] = {f"a{i}": values for i in range(600)}
    parts = {"OriginShape": (2_000_000 * 600,), "slices": list(many)}
    for found in (many, many | {"UnpackBigParamInfor@@": {"whole": parts}}):
        path = tmp_path / "x.pdparams"
        path.write_bytes(pickle.dumps(found, 4))
        with bounded(b"", path.name, megabytes=100), pytest.raises(WeightsError, match="share"):
            read_weights(path)
    tensor = torch.zeros(2_000_000)
    for zipped in (True, False):
        path = tmp_path / "x.pt"
        tensors = {f"a{i}": tensor for i in range(600)}
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
        with bounded(b"", path.name, megabytes=100), pytest.raises(WeightsError, match="share"):
            read_weights(path)
    some = {f"a{i}": values[:9] for i in range(600)}  # small ones may
    (tmp_path / "x.pdparams").write_bytes(pickle.dumps(some, 4))
    with pytest.raises(WeightsError, match="not CLIP's tensors"):
        read_weights(tmp_path / "x.pdparams")


@pytest.mark.parametrize("changes", [{"image_resolution": 8_000_000}, {"context_length": 10**8}])
def test_an_architecture_without_its_tensors(tmp_path: Path, changes: dict[str, int]) -> None:
    folder = make_model(tmp_path / "model", **SMALL)
    facts = json.loads((folder / "config.json").read_text())
    facts["model"] |= changes
    (folder / "config.json").write_text(json.dumps(facts))
    with bounded(b"", "architecture.json", megabytes=100), pytest.raises(WeightsError):
        leanclip.load(folder, device="cpu")


def old_torch_file(path: Path, program: bytes, *storages: bytes) -> Path:
    """As torch.save wrote files before 1.6."""
    torch.save({}, path, _use_new_zipfile_serialization=False)
    with path.open("rb") as file:
        for _ in range(3):
            pickle.load(file)
        head = path.read_bytes()[: file.tell()]
    path.write_bytes(head + program + b"".join(storages))
    return path


def test_an_old_file_of_torchs_that_calls_harmless_functions(tmp_path: Path) -> None:
    """PyTorch's own safe loader lets a pickle encode bytes in hexadecimal: a hundred bytes, thirty
    times, are a hundred gigabytes. Its `bytearray` makes as many as it is asked for."""
    encode = name("_codecs", "encode")
    value = encode + arguments(text("A" * 100), text("latin1")) + b"R"
    for _ in range(30):
        value = encode + arguments(value, text("hex")) + b"R"
    size = b"\x8a\x05" + (4 * 10**9).to_bytes(5, "little")
    for program in (value, name("builtins", "bytearray") + arguments(size) + b"R"):
        path = old_torch_file(tmp_path / "x.pt", b"\x80\2}" + text("a") + program + b"s.")
        with bounded(b"", path.name, megabytes=50), pytest.raises(WeightsError):
            read_weights(path)


def test_old_files_of_torchs_that_lie(tmp_path: Path) -> None:
    def program(count: int, view: bytes = b"N") -> bytes:
        number = b"\x8a\x06" + count.to_bytes(6, "little")
        identity = arguments(
            text("storage"), name("torch", "FloatStorage"), text("7"), text("cpu"), number, view
        )
        shape = arguments(b"K\2"), arguments(b"K\1")
        parts = identity + b"Q", b"K\0", *shape, b"\x89", b"N"
        tensor = name("torch._utils", "_rebuild_tensor_v2") + arguments(*parts) + b"R"
        return b"\x80\2}" + text("a") + tensor + b"s."

    keys, values = pickle.dumps(["7"], 2), struct.pack("<q2f", 2, 1.5, 2.5)
    good = old_torch_file(tmp_path / "x.pt", program(2), keys, values)
    assert read_weights(good).tensors["a"].tolist() == [1.5, 2.5]
    for words, parts in {
        "larger than what is left": (program(10**12), keys, values),
        "fewer than 8 bytes": (program(2), keys, values[:-1]),
        "8 bytes": (program(2), keys, struct.pack("<q2f", 3, 1.5, 2.5)),
        "not that of its tensors": (program(2), pickle.dumps(["8"], 2), values),
        "its list of storages is not of texts": (program(2), pickle.dumps("7", 2), values),
        "a view": (program(2, b"K\1"), keys, values),
        "EOFError": (program(2),),
    }.items():
        path = old_torch_file(tmp_path / "x.pt", *parts)
        with bounded(b"", path.name, megabytes=50), pytest.raises(WeightsError, match=words):
            read_weights(path)
    assert os.path.getsize(good) < 1000  # noqa: PTH202


def test_names_do_nothing_to_a_terminal() -> None:
    """Errors name what strangers called their files and columns."""
    assert str(WeightsError("a\x1b[31m\nb\u202eé")) == "a\\x1b[31m\\nb\\u202eé"
