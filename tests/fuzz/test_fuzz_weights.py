"""Weights of every format, edited: read, or refused in one line; never run, slow or large."""

import io
import json
import pickle
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, make_model
from hostile import number
from hypothesis import given
from hypothesis import strategies as st
from mutations import EDITS, Edits, bounded, check_words, edited, examples, odd_values

import leanclip
from leanclip.training.sharded_checkpoint import read_shards, save_shards
from leanclip.weights import read_weights
from leanclip.weights.convert import write_weights
from leanclip.weights.unpickle import interpret, numpy_names, weights_errors

SMALL = {"vocab_size": 64, "vision_width": 64, "transformer_width": 64, "vision_heads": 1}
SMALL |= {"transformer_heads": 1, "vision_layers": 1, "transformer_layers": 1}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model in every form."""
    top = tmp_path_factory.mktemp("seeds")
    model = make_model(top / "leanclip", **SMALL)
    found = {"leanclip": model, "openai": top / "openai.pt", "passl": top / "passl.pdparams"}
    found |= {name: top / name for name in ("open_clip", "hf")}
    for name in ("openai", "passl", "open_clip", "hf"):
        write_weights(read_weights(model), found[name], name)
    tensors = read_weights(model).tensors
    found["legacy"] = top / "legacy.pt"
    torch.save(dict(tensors), found["legacy"], _use_new_zipfile_serialization=False)
    found["script"] = top / "script.pt"
    net = leanclip.CLIP(**TINY | SMALL).eval()
    inputs = {"encode_image": torch.zeros(1, 3, 32, 32)}
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # both are deprecated; what they wrote will be there for long
        torch.jit.save(torch.jit.trace_module(net, inputs), found["script"])
        found["shards"] = top / "shards"
        save_shards(found["shards"], net.state_dict())
    return found


def marks_of(data: bytes) -> list[int]:
    """Where the structure of a file of weights is: its head, and what is small in it."""
    marks = list(range(0, 64, 8))
    for sign in (b"PK\1\2", b"PK\5\6", b"PK\3\4", b"data.pkl", b'"data_offsets"', b"numpy"):
        at = -1
        while (at := data.find(sign, at + 1)) >= 0 and len(marks) < 400:
            marks += [at, at + 10, at + 24, at + 42]
    return marks


@pytest.mark.parametrize("name", ["openai", "passl", "legacy", "script"])
@examples(12)
@given(EDITS)
def test_a_file(seeds: dict[str, Path], tmp_path_factory: Any, name: str, edits: Edits) -> None:
    data = seeds[name].read_bytes()
    path = tmp_path_factory.getbasetemp() / seeds[name].name
    content = edited(data, edits, marks_of(data))
    path.write_bytes(content)
    with bounded(content, path.name):
        read_weights(path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("leanclip", "model.safetensors"),
        ("leanclip", "config.json"),
        ("open_clip", "open_clip_model.safetensors"),
        ("open_clip", "open_clip_config.json"),
        ("hf", "model.safetensors"),
        ("hf", "config.json"),
        ("hf", "preprocessor_config.json"),
    ],
)
@examples(6)
@given(EDITS)
def test_a_folder(
    seeds: dict[str, Path], tmp_path_factory: Any, name: str, file: str, edits: Edits
) -> None:
    folder = tmp_path_factory.getbasetemp() / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(seeds[name], folder)
    data = (folder / file).read_bytes()
    if file.endswith(".json") and len(edits) > 1:
        content = json.dumps(odd_values(json.loads(data), edits)).encode()
    else:
        content = edited(data, edits, marks_of(data))
    (folder / file).write_bytes(content)
    with bounded(content, f"{name}.{file}"):
        leanclip.load(folder, device="cpu")


@examples(12)
@given(EDITS)
def test_shards_of_a_checkpoint(
    seeds: dict[str, Path], tmp_path_factory: Any, edits: Edits
) -> None:
    folder = tmp_path_factory.getbasetemp() / "shards"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(seeds["shards"], folder)
    (file,) = folder.iterdir()
    data = file.read_bytes()
    content = edited(data, edits, marks_of(data))
    file.write_bytes(content)
    with bounded(content, file.name):
        try:
            read_shards(folder)
        except OSError as error:  # as it says; a checkpoint's reader makes a line of it
            check_words(error)


def _number(form: str) -> Callable[[int], bytes]:
    return lambda value: struct.pack(form, value % 2 ** (8 * struct.calcsize(form)))


_SIZES = st.one_of(st.integers(0, 8), st.sampled_from([255, 2**31, 2**32 - 1, 2**40, 2**63]))
_GLOBALS = [
    "numpy.core.multiarray _reconstruct",
    "numpy._core.multiarray scalar",
    "numpy._core.numeric _frombuffer",
    "numpy ndarray",
    "numpy dtype",
    "_codecs encode",
    "collections OrderedDict",
    "builtins tuple",
    "builtins bytes",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch FloatStorage",
    "torch Size",
    "torch device",
    "__torch__ X",
    "os system",
    "builtins eval",
]
_PLAIN = [bytes([code]) for code in b"N)]}(\x88\x89\x85\x86\x87taesuR\x81bQ.\x94\x93o\x92"]
OPERATIONS = st.one_of(
    st.sampled_from(_PLAIN),
    st.sampled_from(_PLAIN),
    st.sampled_from([f"c{name.replace(' ', chr(10))}\n".encode() for name in _GLOBALS]),
    st.sampled_from([b"h\0", b"h\1", b"q\0", b"q\1", b"K\0", b"K\5", b"\x80\4", b"\x80\7"]),
    st.tuples(st.sampled_from([b"X", b"B"]), _SIZES, st.binary(max_size=8)).map(
        lambda one: one[0] + _number("<I")(one[1]) + one[2]
    ),
    st.tuples(st.sampled_from([b"\x8e", b"\x8d", b"\x96", b"\x95"]), _SIZES, st.binary()).map(
        lambda one: one[0] + _number("<Q")(one[1]) + one[2]
    ),
    st.sampled_from(["f4", "O", "u1", "latin1", "storage", "0", "cpu", "hex", "|"]).map(
        lambda text: b"\x8c" + bytes([len(text)]) + text.encode()
    ),
    st.tuples(st.sampled_from([b"r", b"j"]), _SIZES).map(
        lambda one: one[0] + _number("<I")(one[1])
    ),
    st.integers(-(2**70), 2**70).map(number),
    st.binary(max_size=12).map(lambda data: b"C" + bytes([len(data)]) + data),
    st.floats().map(lambda value: b"G" + struct.pack(">d", value)),
)


@examples(150)
@given(st.lists(OPERATIONS, max_size=30))
def test_a_pickle_of_any_instructions(operations: list[bytes]) -> None:
    data = b"\x80\2" + b"".join(operations) + b"."
    with (
        bounded(data, "program.pkl", seconds=5, megabytes=100),
        weights_errors(Path("x"), "pickle"),
    ):
        value = interpret(io.BytesIO(data), len(data), numpy_names())
        assert not callable(value)


@examples(40)
@given(st.lists(OPERATIONS, max_size=20), EDITS)
def test_a_zip_of_any_instructions(
    tmp_path_factory: Any, operations: list[bytes], edits: Edits
) -> None:
    path = tmp_path_factory.getbasetemp() / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\2" + b"".join(operations) + b".")
        archive.writestr("archive/data/0", bytes(24))
    data = path.read_bytes()
    content = edited(data, edits, marks_of(data)) if len(edits) > 2 else data
    path.write_bytes(content)
    with bounded(content, path.name, seconds=5, megabytes=100):
        read_weights(path)


def test_the_seeds_are_read(seeds: dict[str, Path]) -> None:
    for name, path in seeds.items():
        if name == "shards":
            assert "logit_scale" in read_shards(path)
        else:
            assert read_weights(path).tensors, name
    assert pickle.loads(seeds["passl"].read_bytes()).keys()
