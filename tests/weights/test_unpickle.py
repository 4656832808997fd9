"""Foreign pickles, zips and safetensors: read exactly, refused in one line, never run."""

import contextlib
import copyreg
import json
import pickle
import random
import struct
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA
from hostile import arguments, name, number, pickled, programs, tensor_program, text, torch_zip
from safetensors.torch import save_file

from leanclip.errors import WeightsError
from leanclip.weights.files import read_safetensors, sniff
from leanclip.weights.passl import paddle_arrays
from leanclip.weights.state_dict import read_state_dict
from leanclip.weights.torch_file import module_tensors, read_torch_legacy, read_torch_zip
from leanclip.weights.unpickle import read_numpy_pickle

PASSL = DATA / "passl-formats"
PROGRAMS = sorted(programs(Path("mark")))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


@pytest.fixture(autouse=True)
def _extension() -> Iterator[None]:
    copyreg.add_extension("os", "system", 240)
    yield
    copyreg.remove_extension("os", "system", 240)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def refused(read: Callable[[Path], object], path: Path, *words: str) -> str:
    """One line that names the file and holds the words."""
    with pytest.raises(WeightsError) as caught:
        read(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert len(line) < len(str(path)) + 330
    for word in words:
        assert word in line
    return line


def same(ours: object, theirs: object) -> bool:
    """Equal in type, shape and value, all the way down; an OrderedDict equals a dict."""
    match theirs:
        case dict():
            return (
                type(ours) is dict
                and list(ours) == list(theirs)
                and all(same(ours[key], theirs[key]) for key in theirs)
            )
        case list() | tuple():
            return type(ours) is type(theirs) and all(map(same, ours, theirs))
        case np.ndarray():
            return (
                isinstance(ours, np.ndarray)
                and (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
                and ours.tobytes() == theirs.tobytes()
            )
        case torch.Tensor():
            return (
                isinstance(ours, torch.Tensor)
                and (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
                and torch.equal(ours, theirs)
            )
    return type(ours) is type(theirs) and ours == theirs


# What honest files hold.

EXPECTED = {key.removeprefix("model."): v for key, v in np.load(PASSL / "expected.npz").items()}
VALID = sorted(path for path in PASSL.glob("*.pdparams") if path.name.startswith(("p2_", "p3_")))
VALID.remove(PASSL / "p2_lodtensor_eval.pdparams")

VALUES = {
    "float": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.ones((5,), np.float16),
    "large": np.arange(100_000.0),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
    "turned": np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(1, 0, 2),
    "empty": np.zeros((0, 3), np.float32),
    "zero-dimensional": np.array(3.0, np.float32),
    "bool": np.array([True, False]),
    "bits": np.arange(300, dtype=np.uint16),
    "scalars": [np.float64(0.25), np.float32(3), np.int64(-7), np.bool_(True)],
    "plain": [None, True, False, 0, -1, 255, 65536, -(2**40), 2**70, 1.5, "text — ü", (), {}],
    "nested": OrderedDict(a=(1, ("b", [2.5])), c={3: {"d": "e"}}),
    "bytes": [b"", b"\x00\xff"],
}


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_every_form_of_paddle_gives_its_arrays(path: Path) -> None:
    assert sniff(path) == "pickle"
    arrays = paddle_arrays(read_numpy_pickle(path), path)
    assert same({key: arrays[key] for key in EXPECTED}, EXPECTED)
    assert arrays.keys() == EXPECTED.keys()


def test_paddles_hostile_and_broken_files_are_refused() -> None:
    refused(read_numpy_pickle, PASSL / "hostile_os_system.pdparams", "posix.system")
    refused(read_numpy_pickle, PASSL / "p2_lodtensor_eval.pdparams", "builtins.eval")
    refused(read_numpy_pickle, PASSL / "truncated.pdparams", "truncated")


@pytest.mark.parametrize("protocol", range(2, 6))
def test_numpy_pickles_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    path = write(tmp_path / "a.pkl", pickled(VALUES, protocol))
    read = read_numpy_pickle(path)
    assert same(read, VALUES)
    assert isinstance(read, dict)
    assert all(array.flags.writeable for array in read.values() if isinstance(array, np.ndarray))
    assert read["fortran"].flags.f_contiguous
    assert read["large"].flags.aligned
    assert sniff(path) == "pickle"


def test_shared_values_stay_shared_and_old_core_names_are_known(tmp_path: Path) -> None:
    array = np.ones(3)
    data = pickled({"a": array, "b": array}, 2).replace(b"numpy._core", b"numpy.core")
    read = read_numpy_pickle(write(tmp_path / "a.pkl", data))
    assert isinstance(read, dict)
    assert read["a"] is read["b"]


def test_writing_to_a_short_array_leaves_pythons_bytes_alone(tmp_path: Path) -> None:
    read = read_numpy_pickle(write(tmp_path / "a.pkl", pickled(np.array([97], np.uint8), 4)))
    assert isinstance(read, np.ndarray)
    read[0] = 98
    assert bytes([97]) == b"a" != bytes(read)


def test_paddle_bfloat16_and_refusals() -> None:
    bits = np.array([0x3F80, 0xC000], np.uint16)
    expected = {"w": np.array([1, -2], np.float32), "z": np.array(1, np.float32)}
    file = Path("file.pdparams")
    assert same(paddle_arrays({"w": bits, "z": np.array(0x3F80, np.uint16)}, file), expected)
    array = np.ones(4, np.float32)
    table = {"w": {"OriginShape": (2, 2), "slices": ["w@@.0", "w@@.1"]}}
    for wrong, words in (
        ([array], "list"),
        ({}, "no parameters"),
        ({"w": "text"}, "str"),
        ({"w": [array]}, "list"),
        ({1: array}, "'1'"),
        ({"w@@.0": array, "UnpackBigParamInfor@@": table}, "damaged.*w@@.1"),
        ({"w@@.0": array, "w@@.1": array, "UnpackBigParamInfor@@": table}, "damaged.*reshape"),
        ({"w": array, "UnpackBigParamInfor@@": {"v": 3}}, "damaged"),
        ({"w": array, "UnpackBigParamInfor@@": [3]}, "damaged"),
    ):
        with pytest.raises(WeightsError, match=words) as caught:
            paddle_arrays(wrong, file)
        assert str(caught.value).startswith("file.pdparams: ")


TENSORS = {
    **{
        str(dtype): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (
            *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool),
            *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
        )
    },
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "slice": torch.arange(60.0).reshape(6, 10)[2:4, ::3],
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


def test_torch_save_comes_back(tmp_path: Path) -> None:
    saved = {
        "state_dict": OrderedDict(TENSORS),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 3,
        "args": {"name": "ViT-B-32", "best": np.float64(0.5), "size": torch.Size([2, 3])},
        "dtype": torch.float16,
        "device": torch.device("cuda", 1),
    }
    path = tmp_path / "a.pt"
    torch.save(saved, path)
    assert sniff(path) == "zip"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = read_torch_zip(path)
    args = saved["args"] | {"size": (2, 3)}
    plain = {"args": args, "device": ("cuda", 1), "parameter": torch.ones(2)}
    assert same(read, saved | plain)
    assert isinstance(read, dict)
    before = path.read_bytes()
    read["parameter"].zero_()  # memory, not the file
    assert path.read_bytes() == before


def test_a_module_and_its_state_dict_metadata(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert same(read_torch_zip(tmp_path / "a.pt"), dict(model.state_dict()))
    torch.save(model, tmp_path / "b.pt")
    refused(read_torch_zip, tmp_path / "b.pt", "torch.nn.modules.container.Sequential")


def test_unknown_objects_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "args": Namespace(lr=1)}, tmp_path / "a.pt")
    refused(read_torch_zip, tmp_path / "a.pt", "argparse.Namespace")


def test_legacy_torch_files(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    assert sniff(path) == "torch-legacy"
    assert same(read_torch_legacy(path), TENSORS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_without_running_it(tmp_path: Path) -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)
            self.norm = torch.nn.BatchNorm1d(4)
            self.scale = torch.nn.Parameter(torch.tensor(2.0))
            self.register_buffer("context_length", torch.tensor(77))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.linear(x)) * self.scale

    model = torch.nn.Sequential(Block(), Block()).half().eval()
    path = tmp_path / "a.pt"
    torch.jit.save(torch.jit.trace(model, torch.zeros(2, 4).half()), path)
    theirs = torch.jit.load(path).state_dict()
    assert "1.norm.num_batches_tracked" in theirs
    ours = module_tensors(read_torch_zip(path))
    assert same({key: ours[key] for key in theirs}, dict(theirs))
    assert ours.keys() == theirs.keys()
    with pytest.raises(WeightsError, match="not an object of TorchScript"):
        module_tensors({})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openais_torchscript() -> None:
    path = DATA / "openai-vit" / "torchscript.pt"
    ours, theirs = module_tensors(read_torch_zip(path)), torch.jit.load(path).state_dict()
    assert same({key: ours[key] for key in theirs}, dict(theirs))
    assert ours.keys() == theirs.keys()


def test_safetensors(tmp_path: Path) -> None:
    tensors = {key: tensor.contiguous() for key, tensor in TENSORS.items()}
    save_file(tensors, tmp_path / "a", metadata={"format": "pt"})
    assert sniff(tmp_path / "a") == "safetensors"
    read = read_safetensors(tmp_path / "a")
    assert same({key: read[key] for key in tensors}, tensors)
    assert read.keys() == tensors.keys()


# What hostile files try.


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("what", PROGRAMS)
def test_nothing_runs(tmp_path: Path, mark: Path, what: str) -> None:
    data = programs(mark)[what]
    with contextlib.suppress(TypeError):  # after the deed
        pickle.loads(data)  # the test could fail: this does leave the mark
    marks = [path for path in tmp_path.iterdir() if path.name.startswith("mark")]
    assert len(marks) == 1
    marks[0].unlink()

    refused(read_numpy_pickle, write(tmp_path / "a.pkl", data))
    facts = pickled({"little_endian": True}, 2)
    header = pickled(0x1950A86A20F9469CFC6C, 2) + pickled(1001, 2) + facts
    refused(read_torch_legacy, write(tmp_path / "a.pth", header + data))
    refused(read_torch_zip, torch_zip(tmp_path / "a.pt", data))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("mark")]


@pytest.mark.parametrize("what", ["REDUCE os.system", "STACK_GLOBAL", "BUILD __setstate__"])
def test_the_zips_would_have_run(tmp_path: Path, mark: Path, what: str) -> None:
    path = torch_zip(tmp_path / "a.pt", programs(mark)[what])
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_a_poisoned_torchscript_zip(tmp_path: Path, mark: Path) -> None:
    module = name("__torch__.evil", "Module") + b")\x81"
    for program in (
        # An attribute, a state, a class of TorchScript's made to stand for a function.
        module + b"}" + text("a") + programs(mark)["REDUCE os.system"][2:-1] + b"sb.",
        module + name("os", "system") + b"b.",
        module + arguments(b"N", b"}" + text("__class__") + b"Ns") + b"b.",
        name("__torch__.os", "system") + arguments(text(f"touch {mark}")) + b"R.",
    ):
        path = torch_zip(tmp_path / "a.pt", b"\x80\2" + program)
        refused(read_torch_zip, path)
        assert not mark.exists()


def array_program(state: bytes, kind: bytes = b"") -> bytes:
    kind = kind or name("numpy", "ndarray")
    reconstruct = name("numpy.core.multiarray", "_reconstruct")
    return reconstruct + arguments(kind, b"(K\0t", b"C\1b") + b"R" + state + b"b"


def dtype_program(code: str, state: bytes = b"") -> bytes:
    return name("numpy", "dtype") + arguments(text(code), b"\x89\x88") + b"R" + state


ORDER = [b"K\3", text("<"), b"N", b"N", b"N", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\xff", b"K\0"]


def state_program(dtype: bytes, shape: bytes = b"(K\1t", data: bytes = b"C\4\0\0\0@") -> bytes:
    return array_program(arguments(b"K\1", shape, dtype, b"\x89", data))


def with_order(at: int, value: bytes) -> bytes:
    return dtype_program("f4", arguments(*ORDER[:at], value, *ORDER[at + 1 :]) + b"b")


SCALAR = name("numpy.core.multiarray", "scalar")
REFUSED = {
    "object dtype": (state_program(dtype_program("O8")), "Python objects"),
    "text dtype": (state_program(dtype_program("U1")), "dtype 'U1'"),
    "record dtype": (state_program(dtype_program("V4")), "dtype 'V4'"),
    "fields by code": (state_program(dtype_program("f4,O")), "dtype"),
    "subarray": (
        state_program(with_order(2, arguments(dtype_program("f4"), b"K\1"))),
        "structured",
    ),
    "fields": (state_program(with_order(4, b"}")), "structured"),
    "big-endian": (state_program(with_order(1, text(">"))), "big-endian"),
    "dtype's state": (dtype_program("f4", b"}b"), "unknown form"),
    "no dtype": (state_program(text("f4")), "dtype is a str"),
    "too few bytes": (state_program(dtype_program("f4"), shape=b"(K\2t"), "4 bytes given"),
    "too many bytes": (state_program(dtype_program("f4"), shape=b")", data=b"C\5abcde"), "5 bytes"),
    "huge shape": (state_program(dtype_program("f4"), b"(" + number(2**62) * 2 + b"t"), "4 bytes"),
    "negative shape": (state_program(dtype_program("f4"), b"(" + number(-1) + b"t"), "shape"),
    "huge empty shape": (
        state_program(dtype_program("f4"), b"(K\0" + number(2**80) + b"t", b"C\0"),
        "damaged",
    ),
    "shape of floats": (state_program(dtype_program("f4"), b"(G" + bytes(8) + b"t"), "shape"),
    "100 dimensions": (state_program(dtype_program("f4"), b"(" + b"K\1" * 100 + b"t"), "shape"),
    "list of objects": (state_program(dtype_program("f4"), data=b"]"), "list, not bytes"),
    "other array type": (array_program(b"", name("numpy", "dtype"))[:-1], "not numpy.ndarray"),
    "array built again": (
        state_program(dtype_program("f4"))
        + arguments(b"K\1", b"(K\1t", dtype_program("f4"), b"\x89", b"C\4\0\0\0@")
        + b"b",
        "unknown form",
    ),
    "array's state": (array_program(b"}"), "unknown form"),
    "scalar of objects": (SCALAR + arguments(dtype_program("O8"), b"N") + b"R", "Python objects"),
    "scalar's size": (SCALAR + arguments(dtype_program("f8"), b"C\1a") + b"R", "1 bytes given"),
    "encode": (name("_codecs", "encode") + arguments(text("a"), text("rot13")) + b"R", "latin1"),
    "tuple": (
        name("builtins", "tuple") + arguments(b"(" + b"N" * 65 + b"t") + b"R",
        "a few values",
    ),
    "ndarray called": (name("numpy", "ndarray") + b")R", "calls numpy.ndarray"),
    "text called": (text("os.system") + b")R", "calls a str"),
    "number built": (b"K\1}b", "state of a int"),
    "name built": (name("numpy", "dtype") + b"N}\x86b", "state of a Name"),
    "a name's state": (name("numpy", "ndarray") + b"}b", "state of a Name"),
    "persistent id": (text("x") + b"Q", "outside the pickle"),
    "persistent id, protocol 0": (b"Px\n", "instruction"),
    "set": (b"\x8f", "instruction"),
    "out-of-band buffer": (b"\x97", "instruction"),
    "append to a dict": (b"}Na", "appends to a dict"),
    "item of a list": (b"]NNs", "items of a list"),
    "odd items": (b"}(Nu", "items of a dict"),
    "array as a key": (b"}" + state_program(dtype_program("f4")) + b"Ns", "key is a ndarray"),
    "name with a line": (text("os\n\x1b[2J") + text("a") + b"\x93", "names 'os\\n"),
    "name is a number": (b"K\1K\1\x93", "not text"),
    "itself": (b"]\x94h\0a", None),
    # Bombs: each would take gigabytes or crash if believed.
    "memo bomb": (b"Nr\xff\xff\xff\x7f", None),
    "deep tuple as a key": (b"})" + b"\x85" * 100_000 + b"Ns", "key is a tuple"),
    "doubled tuple as a key": (b"})" + b"q\0h\0\x86" * 200 + b"Ns", "key is a tuple"),
    "doubled tuples": (b")" + b"q\0h\0\x86" * 90, None),
    "deep nesting": (b"]" * 100_000 + b"a" * 99_999, None),
    "deep tuples": (b")" + b"\x85" * 100_000, None),
    "BINBYTES8": (b"\x8e" + struct.pack("<Q", 2**62), "truncated"),
    "BYTEARRAY8": (b"\x96" + struct.pack("<Q", 2**40), "truncated"),
    "BINUNICODE8": (b"\x8d" + struct.pack("<Q", 2**62), "truncated"),
    "BINBYTES": (b"B\xff\xff\xff\xff", "truncated"),
    "FRAME": (b"\x95" + struct.pack("<Q", 2**63), "truncated"),
    "LONG4": (b"\x8b\xff\xff\xff\x7f", "instruction"),
    "decimal": (b"I" + b"9" * 5000 + b"\n", "instruction"),
    "long name": (b"c" + b"9" * 5000 + b"\nx\n", "without an end"),
    "broken text": (b"X\2\0\0\0\xff\xfe", "UnicodeDecodeError"),
    "empty stack": (b"Q", "damaged"),
    "no memo": (b"h\0", "damaged"),
    "short stack": (b"N\x87", "damaged"),
    "too many arguments": (name("collections", "OrderedDict") + b"(NNtR", "damaged"),
    "no end": (b"N" * 100, None),
}


@pytest.mark.parametrize("what", REFUSED)
def test_wrong_pickles_are_refused(tmp_path: Path, what: str) -> None:
    program, words = REFUSED[what]
    path = write(tmp_path / "a.pkl", b"\x80\4" + program + b".")
    if words is None:
        either(read_numpy_pickle, path)
    else:
        refused(read_numpy_pickle, path, words)


def either(read: Callable[[Path], object], path: Path) -> None:
    """A value or one line; anything else fails."""
    line = f"{path}: "
    try:
        read(path)
    except WeightsError as error:
        line = str(error)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line


def test_one_string_encoded_often_takes_memory_once(tmp_path: Path) -> None:
    encoded = name("_codecs", "encode") + arguments(b"h\0", text("latin1")) + b"R"
    array = state_program(dtype_program("u1"), arguments(number(60_000)), encoded)
    program = b"\x80\4]" + text("a" * 60_000) + b"\x94a" + (array + b"a") * 3 + b"."
    read = read_numpy_pickle(write(tmp_path / "a.pkl", program))
    assert isinstance(read, list)
    assert read[1].tobytes() == b"a" * 60_000
    assert np.shares_memory(read[1], read[3])


TENSOR_REFUSED = {
    "poisoned storage type": (tensor_program(name("os", "system")), "os.system"),
    "storage type of another kind": (tensor_program(name("numpy", "dtype")), "unknown form"),
    "storage smaller than its tensor": (tensor_program(size=(3, 3)), "outside its storage"),
    "storage of other size": (tensor_program(count=7), "has 24 bytes, not 7"),
    "huge storage": (tensor_program(count=2**62), "has 24 bytes"),
    "negative storage": (tensor_program(count=-6), "unknown form"),
    "no such storage": (tensor_program(key="7"), "has no member"),
    "storage elsewhere": (tensor_program(key="../byteorder"), "has no member"),
    "offset": (tensor_program(offset=1), "outside its storage"),
    "negative offset": (tensor_program(offset=-1), "not matching counts"),
    "negative stride": (tensor_program(stride=(-3, 1)), "not matching counts"),
    "negative size": (tensor_program(size=(-2, 3)), "not matching counts"),
    "huge stride": (tensor_program(stride=(2**62, 1)), "outside its storage"),
    "huge size of stride 0": (tensor_program(size=(2**50,), stride=(0,)), "outside its storage"),
    "huge empty size": (tensor_program(size=(0, 2**63), stride=(1, 1)), "damaged"),
    "unequal size and stride": (tensor_program(stride=(3, 1, 1)), "not matching counts"),
    "no storage": (
        b"\x80\2" + name("torch._utils", "_rebuild_tensor_v2") + b"(NNNNNNtR.",
        "storage is a NoneType",
    ),
    "a tensor's state": (tensor_program()[:-1] + b"}b.", "state of a Tensor"),
    "torch.load": (
        b"\x80\2" + name("torch", "load") + arguments(text("x")) + b"R.",
        "names torch.load",
    ),
    "torch.jit.load": (b"\x80\2" + name("torch.jit", "load") + b".", "names torch.jit.load"),
    "a module's name": (
        b"\x80\2" + name("__torch__", "X") + b")\x81N}\x86b.",
        "state of a Module",
    ),
}


def test_the_tensor_of_these_tests_is_read(tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "a.pt", tensor_program())
    assert same(read_torch_zip(path), torch.zeros(2, 3))


@pytest.mark.parametrize("what", TENSOR_REFUSED)
def test_wrong_tensors_are_refused(tmp_path: Path, what: str) -> None:
    program, words = TENSOR_REFUSED[what]
    refused(read_torch_zip, torch_zip(tmp_path / "a.pt", program), words)


def test_modules_shared_without_end(tmp_path: Path) -> None:
    module = name("__torch__", "X") + b")\x81"
    program = module + b"q\0"
    for _ in range(45):  # 2**45 names
        program += module + b"}(" + text("a") + b"h\0" + text("b") + b"h\0ubq\0"
    itself = module + b"q\0}" + text("a") + b"h\0sb"
    for endless, words in ((program, "modules"), (itself, "over 500 characters")):
        root = read_torch_zip(torch_zip(tmp_path / "a.pt", b"\x80\2" + endless + b"."))
        with pytest.raises(WeightsError, match=words):
            module_tensors(root)


def test_one_long_name_before_many(tmp_path: Path) -> None:
    """A name of 100 kB before 2,000 short ones would be 200 MB of names."""
    many = b"".join(text(f"{i:05}") + b"h\0" for i in range(2000))
    tensor = tensor_program()[2:-1] + b"q\0"
    nested = b"}" + text("k" * 100_000) + b"}(" + text("a") + tensor + many + b"us"
    module = name("__torch__", "X") + b")\x81"
    modules = module + b"}" + text("k" * 100_000) + module + b"}(" + text("a") + tensor + many
    for program in (nested, modules + b"ubsb"):
        path = torch_zip(tmp_path / "a.pt", b"\x80\2" + program + b".")
        refused(read_state_dict, path, "over 500 characters")


def test_storages_that_lie_over_each_other(tmp_path: Path) -> None:
    """Were each copied, for it is not aligned, a short file would fill the memory."""
    count = 20
    tensors = [tensor_program(key=str(i), count=2500)[2:-1] for i in range(count)]
    program = b"\x80\2](" + b"".join(tensors) + b"e."
    values = {f"archive/data/{i}": bytes(10_000 if i == 0 else 1) for i in range(count)}
    data = bytearray(torch_zip(tmp_path / "a.pt", program, values).read_bytes())
    first = place = 0
    while (place := data.find(b"PK\1\2", place + 1)) >= 0:
        length = int.from_bytes(data[place + 28 : place + 30], "little")
        if b"/data/" in data[place + 46 : place + 46 + length]:
            first = first or place  # the directory's entry of the storage that is there
            data[place + 20 : place + 28] = data[first + 20 : first + 28]
            data[place + 42 : place + 46] = data[first + 42 : first + 46]
    refused(read_torch_zip, write(tmp_path / "a.pt", bytes(data)), "overlap")


def test_lists_of_storages_are_not_compared_deeply(tmp_path: Path) -> None:
    """Two lists that hold one list twice, and so on: comparing them takes 2^60 steps."""
    path = tmp_path / "a.pt"
    torch.save({}, path, _use_new_zipfile_serialization=False)
    shared = b"]" + b"q\0](h\0h\0eq\0" * 60
    program = b"\x80\2](" + shared + shared + b"e."
    data = path.read_bytes()
    assert data.endswith(b"\x80\2]q\0.")
    write(path, data[: -len(b"\x80\2]q\0.")] + program)
    refused(read_torch_legacy, path, "not of texts")


def test_wrong_zips_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    good = tensor_program()
    storage = {"archive/data/0": bytes(24)}
    refused(read_torch_zip, torch_zip(path, good, storage | {"other/data.pkl": good}), "2 stored")
    refused(read_torch_zip, torch_zip(path, good, compression=zipfile.ZIP_DEFLATED), "0 stored")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", good)
        archive.writestr("archive/byteorder", "big")
    refused(read_torch_zip, path, "big-endian")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("picture.txt", "x")
    refused(read_torch_zip, path, "0 stored")

    torch_zip(path, good)
    data = path.read_bytes()
    entry = data.index(b"PK\1\2")  # the directory's first: of data.pkl
    second = data.index(b"PK\1\2", entry + 1)
    third = data.index(b"PK\1\2", second + 1)  # of the storage
    for where, at, value, words in (
        (entry, 20, b"\xff\xff\xff\x7f" * 2, None),  # larger than the file: it ends with STOP
        (entry, 24, b"\1\0\0\0", "truncated"),
        (entry, 42, b"\5\0\0\0", "damaged"),  # no header at its place
        (entry, 42, b"\xff\xff\xff\xff", "damaged"),
        (third, 20, b"\xff\xff\xff\x7f" * 2, "not 6 of"),
        (third, 42, bytes(4), None),  # over data.pkl
    ):
        changed = write(path, data[: where + at] + value + data[where + at + len(value) :])
        if words is None:
            either(read_torch_zip, changed)
        else:
            refused(read_torch_zip, changed, words)


def test_members_that_are_never_unpacked_do_no_harm(tmp_path: Path) -> None:
    """Paths that lead elsewhere, and a member that unpacks to much more than the file."""
    names = ("/etc/passwd", "archive/../../x", "archive\\x", "c:/x", "archive/code.py")
    odd = {"archive/data/0": bytes(24)} | dict.fromkeys(names, bytes(1000))
    path = torch_zip(tmp_path / "a.pt", tensor_program(), odd)
    before = sorted(tmp_path.iterdir())
    assert same(read_torch_zip(path), torch.zeros(2, 3))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/bomb", bytes(5_000_000))
    assert same(read_torch_zip(path), torch.zeros(2, 3))
    assert sorted(tmp_path.iterdir()) == before


def safetensors_bytes(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, end: int, count: int) -> dict:
    return {"dtype": "F32", "shape": [count], "data_offsets": [start, end]}


def test_wrong_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    good = safetensors_bytes({"a": entry(0, 8, 2), "b": entry(8, 16, 2)}, bytes(16))
    assert len(read_safetensors(write(path, good))) == 2
    for wrong in (
        safetensors_bytes({"a": entry(0, 8, 2), "b": entry(4, 12, 2)}, bytes(12)),  # overlap
        safetensors_bytes({"a": entry(0, 8, 2), "b": entry(0, 8, 2)}, bytes(8)),
        safetensors_bytes({"a": entry(0, 80, 20)}, bytes(8)),  # outside
        safetensors_bytes({"a": entry(8, 16, 2)}, bytes(16)),  # a gap
        safetensors_bytes({"a": entry(0, 8, 3)}, bytes(8)),  # size
        safetensors_bytes({"a": entry(-8, 0, 2)}, bytes(8)),
        safetensors_bytes({"a": entry(0, 8, 2)}, bytes(9)),  # left over
        safetensors_bytes({"a": entry(0, 8, 2) | {"dtype": "X"}}, bytes(8)),
        b"\xff" * 8 + good[8:],
        struct.pack("<Q", 10**12) + good[8:],
        good[:7],
        b"",
    ):
        refused(read_safetensors, write(path, wrong), "damaged safetensors file")


# Damage anywhere.


@pytest.fixture(scope="module")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("small")
    values = {key: VALUES[key] for key in ("float", "bool", "scalars", "plain", "nested")}
    tensors = {key: TENSORS[key] for key in ("torch.float32", "torch.bool", "transposed")}
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    for protocol in (2, 4, 5):
        write(folder / f"pickle-{protocol}", pickled(values, protocol))
    torch.save({"state_dict": tensors, "epoch": 3}, folder / "zip")
    torch.save(tensors, folder / "legacy", _use_new_zipfile_serialization=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; its files remain
        torch.jit.save(torch.jit.trace(module, torch.zeros(1, 2)), folder / "script")
    save_file({"a": torch.ones(3, 2), "b": torch.ones(2).half()}, folder / "safetensors")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_script(path: Path) -> object:
    root = read_torch_zip(path)
    try:
        return module_tensors(root)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None


READERS = {
    "zip": read_torch_zip,
    "script": read_script,
    "legacy": read_torch_legacy,
    "safetensors": read_safetensors,
}
FORMATS = ["pickle-2", "pickle-4", "pickle-5", "zip", "script", "legacy", "safetensors"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_files_are_refused(
    small_files: dict[str, bytes], tmp_path: Path, kind: str
) -> None:
    read = READERS.get(kind, read_numpy_pickle)
    data = small_files[kind]
    for length in {*range(0, len(data) - 1, max(1, len(data) // 80)), len(data) - 1}:
        refused(read, write(tmp_path / "cut", data[:length]))
        either(sniff, tmp_path / "cut")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", FORMATS)
def test_flipped_bytes_give_a_value_or_one_line(
    small_files: dict[str, bytes], tmp_path: Path, kind: str
) -> None:
    read = READERS.get(kind, read_numpy_pickle)
    good, chance = small_files[kind], random.Random(kind)
    for _ in range(200):
        data = bytearray(good)
        for _ in range(chance.choice((1, 1, 2, 8))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        either(read, write(tmp_path / "flipped", bytes(data)))
        either(sniff, tmp_path / "flipped")


def test_sniff_says_what_else_a_file_is(tmp_path: Path) -> None:
    for data, words in (
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n\n<html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b'{"weight_map": {}}', "JSON"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"hello, this is text", "b'hello, t'"),
        (b"\x80\x63", "b'\\x80c'"),
        (b"\x80", "b'\\x80'"),
    ):
        refused(sniff, write(tmp_path / "a", data), words)
    for read in (sniff, read_numpy_pickle, read_torch_zip, read_torch_legacy, read_safetensors):
        refused(read, tmp_path / "missing", "no such file")
    for read in (sniff, read_numpy_pickle, read_torch_zip, read_torch_legacy):
        refused(read, tmp_path, "no such file")
