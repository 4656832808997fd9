"""Write a model's towers for other runtimes, checked against it before they are there.

    InferenceModel -> towers -> torch.export -> ONNX, or a .pt2 -> run beside the model -> OUT

    OUT/image.onnx, text.onnx     or image.pt2, text.pt2; batch and length of text are free
    OUT/clip.json                 sizes, how images are prepared, how texts are tokenised, checks
    OUT/vocab.json, merges.txt    the tokeniser's tables, in the field's form

Shapes: B batch, L tokens, R resolution, E embedding.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from leanclip.config.sections import to_plain
from leanclip.errors import ConfigError, WeightsError
from leanclip.inference.exported import BACKENDS, FORMAT, INDEX, read_exported
from leanclip.inference.model import InferenceModel
from leanclip.io.optional_imports import need
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.tokenizer import END, START, VOCAB_SIZE, merges, vocabulary

MIN_COSINE = 0.9999  # of features in float32, exported and not
_LARGE = 1 << 30  # bytes of weights from which on they are put beside an .onnx file
_SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}
_INT8_OPERATORS = (  # in ONNX's text form; %d is the version of its operators
    """
<domain: "leanclip", opset_import: ["": %d]>
Product (x, weight, weight_scale) => (y)
{
    last = Constant <value_ints = [-1]> ()
    zero = Constant <value = uint8 {128}> ()
    one = Constant <value_float = 1.0> ()
    largest = Constant <value_float = 127.0> ()
    smallest = Constant <value_float = 1e-20> ()
    high = ReduceMax <keepdims = 1> (x, last)
    low = ReduceMin <keepdims = 1> (x, last)
    negative = Neg (low)
    size = Max (high, negative, smallest)
    scale = Div (size, largest)
    units = Div (x, scale)
    quantized = QuantizeLinear (units, one, zero)
    sums = MatMulInteger (quantized, weight, zero)
    numbers = Cast <to = 1> (sums)
    scaled = Mul (numbers, weight_scale)
    y = Mul (scaled, scale)
}
""",
    """
<domain: "leanclip", opset_import: ["": %d]>
Embedding (ids, weight, weight_scale) => (y)
{
    rows = Gather (weight, ids)
    scales = Gather (weight_scale, ids)
    numbers = Cast <to = 1> (rows)
    y = Mul (numbers, scales)
}
""",
)


def export(clip: InferenceModel, out: Path, to: str, *, int8: bool = False) -> dict[str, Any]:
    """Write a folder that `leanclip.load` and other runtimes take; gives what clip.json holds.

    Args:
        clip: a model in float32, on the CPU.
        out: a folder that is not there yet.
        to: "onnx" (the extra `export`) or "torch".
        int8: of ONNX: quantise the products' weights to int8, and measure what that costs.

    Raises:
        ConfigError: a setting is wrong, or a library is missing.
        WeightsError: there is something at `out`, or the exported towers fall short of the
            model's by more than rounding; nothing is written then.
    """
    if to not in BACKENDS:
        raise ConfigError(f"--to {to}: no such format; known: {', '.join(BACKENDS)}")
    if int8 and to != "onnx":
        raise ConfigError("--int8: goes with --to onnx")
    if to == "onnx":
        for library in ("onnxruntime", "onnxscript"):
            need(library, "ONNX", extra="export")
    if clip.dtype != torch.float32 or clip.device.type != "cpu":
        raise ConfigError("export: load the model in float32 and on the CPU")
    if out.exists():
        raise WeightsError(f"{out}: is there already; choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name, _quiet():
        part = Path(name) / "written"
        part.mkdir()
        facts = _facts(clip, to)
        _write_towers(clip.model, part, facts)
        _write_facts(part, facts)
        facts["checked"] = _compare(clip, part, to)
        if min(facts["checked"].values()) < MIN_COSINE:
            raise WeightsError(
                f"export: the exported towers' features differ from the model's: least cosines "
                f"{_words(facts['checked'])}, wanted {MIN_COSINE}; nothing was written"
            )
        if int8:
            _quantize(part, facts)
            _write_facts(part, facts)
            facts["int8"] = _compare(clip, part, to)
        _write_facts(part, facts)
        _write_tokenizer(clip, part)
        part.rename(out)
    return facts


def summary(out: Path, facts: dict[str, Any]) -> str:
    """What was written and how near it is, for a person."""
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    said = f"{out}: {size:,.1f} MB; least cosines with the model's features: "
    said += _words(facts["checked"])
    return f"{said}; in int8: {_words(facts['int8'])}" if "int8" in facts else said


class _Tower(nn.Module):
    """One of the encoders, as a module."""

    def __init__(self, model: CLIP, tower: str) -> None:
        super().__init__()
        self.model, self.tower = model, tower

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        encode = self.model.encode_image if self.tower == "image" else self.model.encode_text
        return encode(x)


def _facts(clip: InferenceModel, to: str) -> dict[str, Any]:
    config, preprocess = clip.model.config, clip.preprocess
    is_read_at_end = config.transformer_causal and config.transformer_pool in ("argmax", "eos")
    return {
        "format": FORMAT,
        "backend": to,
        "model": to_plain(config),
        "image": {
            "file": f"image{_SUFFIX[to]}",
            "input": "pixels: float32 (batch, 3, resolution, resolution), prepared as below",
            "output": "features: float32 (batch, embed_dim), not of unit length",
        },
        "text": {
            "file": f"text{_SUFFIX[to]}",
            "input": "tokens: int64 (batch, length), length up to the context",
            "output": "features: float32 (batch, embed_dim), not of unit length",
            "dynamic_length": is_read_at_end,
        },
        "logit_scale": clip.logit_scale,
        "preprocess": {
            **asdict(preprocess),
            "steps": f"to RGB; {_resize_words(preprocess)}; the square in the middle; divided by "
            "255; minus mean, over std; channels first",
        },
        "tokenizer": {
            "kind": "CLIP's byte-pair encoding",
            "vocabulary": "vocab.json",
            "merges": "merges.txt",
            "context_length": config.context_length,
            "start": START,
            "end": END,
            "pad": 0,
            "steps": "ftfy.fix_text; html.unescape twice; white space collapsed, stripped; lower "
            "case; byte-pair encoding; start, ids, end, then pad",
        },
    }


def _resize_words(preprocess: Preprocess) -> str:
    """What is done before the crop, for who prepares images without leanclip."""
    height, width = preprocess.sides
    match preprocess.resize:
        case "none":
            return "not resized"
        case "squash":
            what = f"resized to {width} x {height} (width x height)"
        case "longest":
            what = f"long side to {height}, put on grey {preprocess.fill}"
        case "shortest":
            what = f"short side to {height}"
    return f"{what}, {preprocess.interpolation}, antialiased (Pillow's)"


def _write_towers(model: CLIP, folder: Path, facts: dict[str, Any]) -> None:
    config = model.config
    batch = torch.export.Dim("batch")
    pixels = torch.randn(2, 3, config.image_resolution, config.image_resolution)
    tokens = torch.ones(2, min(9, config.context_length), dtype=torch.int64)
    sizes: dict[int, Any] = {0: batch}
    if facts["text"]["dynamic_length"]:
        sizes[1] = torch.export.Dim("length", max=config.context_length)
    else:
        tokens = torch.ones(2, config.context_length, dtype=torch.int64)
    for tower, x, dynamic in (("image", pixels, {0: batch}), ("text", tokens, sizes)):
        program = torch.export.export(_Tower(model, tower), (x,), dynamic_shapes=(dynamic,))
        path = folder / facts[tower]["file"]
        if facts["backend"] == "torch":
            torch.export.save(program, path)
            continue
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        torch.onnx.export(
            program,
            (x,),
            path,
            input_names=["pixels" if tower == "image" else "tokens"],
            output_names=["features"],
            dynamo=True,
            verbose=False,
            external_data=weights > _LARGE,
        )


@torch.no_grad()
def _compare(clip: InferenceModel, folder: Path, backend: str) -> dict[str, float]:
    """The least cosine of each tower's features, exported and not, over batches of many sizes."""
    exported, _ = read_exported(folder, backend)
    found = {}
    for tower, samples in (("image", _images(clip)), ("text", _texts(clip))):
        name = f"encode_{tower}"
        cosines = [
            F.cosine_similarity(getattr(exported, name)(x), getattr(clip.model, name)(x)).min()
            for x in samples
        ]
        found[tower] = min(float(cosine) for cosine in cosines)
    return found


def _images(clip: InferenceModel) -> list[torch.Tensor]:
    """Normalised pixels with structure at several sizes, in batches of 1, 2 and 5."""
    generator = torch.Generator().manual_seed(0)
    side, batches = clip.preprocess.resolution, []
    for count in (1, 2, 5):
        blocks = torch.randn(count, 3, 2 + 3 * count, 2 + 3 * count, generator=generator)
        batches.append(F.interpolate(1.5 * blocks, (side, side), mode="bilinear"))
    return batches


def _texts(clip: InferenceModel) -> list[torch.Tensor]:
    """Token ids of several lengths, the whole context among them, in batches of 1, 3 and 4."""
    generator = torch.Generator().manual_seed(0)
    config, batches = clip.model.config, []
    for count, length in ((1, 3), (3, 8), (4, config.context_length)):
        length = min(length, config.context_length)
        tokens = torch.randint(1, config.vocab_size - 2, (count, length), generator=generator)
        tokens[:, 0], tokens[:, -1] = config.vocab_size - 2, config.vocab_size - 1
        batches.append(tokens)
    return batches


def _quantize(folder: Path, facts: dict[str, Any]) -> None:
    """Replace the float32 towers by towers in int8."""
    import onnx

    for tower in ("image", "text"):
        path, small = folder / facts[tower]["file"], folder / f"{tower}.int8.onnx"
        model = _to_int8(onnx.load(path))
        onnx.save(
            model,
            small,
            save_as_external_data=model.ByteSize() > _LARGE,
            location=f"{small.name}.data",
        )
        path.unlink()
        (folder / f"{path.name}.data").unlink(missing_ok=True)
        facts[tower]["file"] = small.name


def _to_int8(model: Any) -> Any:
    """An ONNX model with its embeddings and its products with a constant matrix in int8.

    A matrix has one scale per output channel, an embedding one per row, an activation one per
    token. onnxruntime's `quantize_dynamic` has one scale for an activation of the whole batch, so
    that an image's features depend on the other images.
    """
    from onnx import inliner, numpy_helper, parser
    from onnx.helper import get_attribute_value, make_node

    weights = {one.name: one for one in model.graph.initializer}
    int8: dict[str, np.ndarray] = {}
    nodes: list[Any] = []
    for node in model.graph.node:
        is_embedding = node.op_type == "Gather"
        place = 0 if is_embedding else 1  # of the weight among the inputs
        name = node.input[place] if node.op_type in ("MatMul", "Gemm", "Gather") else ""
        if name not in weights or len(weights[name].dims) != 2:
            nodes.append(node)
            continue
        options = {one.name: get_attribute_value(one) for one in node.attribute}
        x, output, values = (
            node.input[1 - place],
            node.output[0],
            numpy_helper.to_array(weights[name]),
        )
        if options.pop("transB", 0):
            name, values = f"{name}.T", values.T
        assert all(
            value == (1 if key in ("alpha", "beta") else 0) for key, value in options.items()
        )
        scale = np.abs(values).max(axis=1 if is_embedding else 0, keepdims=True).clip(1e-20) / 127
        int8[f"{name}.int8"] = np.rint(values / scale).astype(np.int8)
        int8[f"{name}.scale"] = scale.astype(np.float32)
        inputs = [x, f"{name}.int8", f"{name}.scale"]
        bias = node.input[2:]
        product = f"{output}.product" if bias else output
        operator = "Embedding" if is_embedding else "Product"
        nodes.append(make_node(operator, inputs, [product], domain="leanclip"))
        if bias:
            nodes.append(make_node("Add", [product, bias[0]], [output]))
    left = {name for node in nodes for name in node.input}
    tensors = [one for name, one in weights.items() if name in left]
    tensors += [numpy_helper.from_array(values, name) for name, values in int8.items()]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensors)
    (version,) = (one.version for one in model.opset_import if not one.domain)
    model.functions.extend(parser.parse_function(text % version) for text in _INT8_OPERATORS)
    return inliner.inline_local_functions(model)


def _write_facts(folder: Path, facts: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _write_tokenizer(clip: InferenceModel, folder: Path) -> None:
    if clip.model.config.vocab_size != VOCAB_SIZE:
        return  # of no tokeniser that is known
    (folder / "vocab.json").write_text(json.dumps(vocabulary(), ensure_ascii=False))
    lines = "\n".join(["#version: 0.2", *merges()])
    (folder / "merges.txt").write_text(lines + "\n", encoding="utf-8")


def _words(cosines: dict[str, float]) -> str:
    return ", ".join(f"{tower} {cosine:.6f}" for tower, cosine in cosines.items())


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' own words are for their authors."""
    logger = logging.getLogger("torch.onnx")
    others = [logger, logging.getLogger("onnxscript"), logging.getLogger()]
    levels = [one.level for one in others]
    try:
        for one in others:
            one.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(others, levels, strict=True):
            one.setLevel(level)
