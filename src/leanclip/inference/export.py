"""Export the towers of a model for other runtimes, after a comparison with the model.

    InferenceModel -> towers -> torch.export -> ONNX or .pt2 -> compared with the model -> OUT

    OUT/image.onnx, text.onnx     or image.pt2, text.pt2; batch and text length are dynamic
    OUT/clip.json                 sizes, preprocessing, tokeniser, results of the comparison
    OUT/vocab.json, merges.txt    the tables of CLIP's tokeniser, in the usual format; of another
                                  one its own files

Shapes: B batch, L tokens, R resolution, E embedding.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
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
from leanclip.io.optional_imports import import_optional
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.text import Tokenizer
from leanclip.preprocess.tokenizer import END, START, VOCAB_SIZE, merges, vocabulary
from leanclip.weights.tokenizer import write_files

log = logging.getLogger("leanclip")

MIN_COSINE = 0.9999  # between float32 features of the exported towers and of the model
EXTERNAL_BYTES = 1 << 30  # weights of this size are stored beside an .onnx file
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
    """Write a folder for `leanclip.load` and other runtimes; returns the content of clip.json.

    A NaFlex model is written for squares of its resolution, to which images are squashed.

    Args:
        clip: a model in float32 on the CPU.
        out: a new folder.
        to: "onnx" (needs the extra `export`) or "torch".
        int8: quantise the weights of products to int8 (ONNX only), and measure the loss.

    Raises:
        ConfigError: an argument is invalid, or a library is missing.
        WeightsError: `out` exists, or the features of the exported towers differ from those of
            the model by more than rounding; nothing is written then.
    """
    if to not in BACKENDS:
        raise ConfigError(f"--to {to}: unknown format; known: {', '.join(BACKENDS)}")
    if int8 and to != "onnx":
        raise ConfigError("--int8: needs --to onnx")
    if to == "onnx":
        for library in ("onnxruntime", "onnxscript"):
            import_optional(library, "ONNX", extra="export")
    if clip.dtype != torch.float32 or clip.device.type != "cpu":
        raise ConfigError("export: load the model in float32 on the CPU")
    if out.exists():
        raise WeightsError(f"{out}: already exists; choose another name")
    if clip.preprocess.is_naflex:
        clip = replace(clip, preprocess=_squares(clip))
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name, _quiet():
        folder = Path(name) / "written"
        folder.mkdir()
        description = _describe(clip, to)
        _write_towers(clip.model, folder, description)
        _write_description(folder, description)
        write_files(folder, clip.model.tokenizer)
        description["cosines"] = _compare(clip, folder, to)
        if min(description["cosines"].values()) < MIN_COSINE:
            raise WeightsError(
                f"export: the features of the exported towers differ from the model's: lowest "
                f"cosines {_format(description['cosines'])}, required {MIN_COSINE}; nothing was "
                f"written"
            )
        if int8:
            _quantize(folder, description)
            _write_description(folder, description)
            description["int8"] = _compare(clip, folder, to)
        _write_description(folder, description)
        is_clips = clip.model.tokenizer.kind == "clip"
        if is_clips and clip.model.config.vocab_size == VOCAB_SIZE:
            words = json.dumps(vocabulary(), ensure_ascii=False)
            (folder / "vocab.json").write_text(words, encoding="utf-8")
            lines = "\n".join(["#version: 0.2", *merges(), ""])
            (folder / "merges.txt").write_text(lines, encoding="utf-8")
        folder.rename(out)
    return description


def summary(out: Path, description: dict[str, Any]) -> str:
    """The size of an export and its lowest cosines with the model's features, as a line."""
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    line = f"{out}: {size:,.1f} MB; lowest cosines with the model's features: "
    line += _format(description["cosines"])
    return f"{line}; in int8: {_format(description['int8'])}" if "int8" in description else line


class _Tower(nn.Module):
    """One of the encoders, as a module."""

    def __init__(self, model: CLIP, tower: str) -> None:
        super().__init__()
        self.model, self.tower = model, tower

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        encode = self.model.encode_image if self.tower == "image" else self.model.encode_text
        return encode(x)


def _squares(clip: InferenceModel) -> Preprocess:
    """The preprocessing of a NaFlex model's images as squares."""
    side, own = clip.model.config.image_resolution, clip.preprocess
    log.warning(
        "the exported image tower takes squares: images are squashed to %d x %d pixels, and their "
        "features differ from those of the model, which keeps their proportions",
        *(side, side),
    )
    return Preprocess(side, own.mean, own.std, "squash", interpolation=own.interpolation)


def _describe(clip: InferenceModel, to: str) -> dict[str, Any]:
    """The content of clip.json."""
    config, preprocess = clip.model.config, clip.preprocess
    output = "features: float32 (batch, embed_dim), not of unit length"
    return {
        "format": FORMAT,
        "backend": to,
        "model": to_plain(config),
        "image": {
            "file": f"image{_SUFFIX[to]}",
            "input": "pixels: float32 (batch, 3, resolution, resolution), preprocessed as below",
            "output": output,
        },
        "text": {
            "file": f"text{_SUFFIX[to]}",
            "input": "tokens: int64 (batch, length), length up to the context length",
            "output": output,
            # Padding after the end token is not seen if the tower is causal and pools there.
            "dynamic_length": config.transformer_causal
            and config.transformer_pool in ("argmax", "eos"),
        },
        "logit_scale": clip.logit_scale,
        "logit_bias": clip.logit_bias,
        "preprocess": {
            **asdict(preprocess),
            "steps": f"RGB; {_describe_resize(preprocess)}; centre crop; divide by 255; subtract "
            "mean, divide by std; channels first",
        },
        "tokenizer": _describe_tokenizer(clip.model.tokenizer),
    }


def _describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokeniser for clip.json; its tables are in files beside it."""
    if tokenizer.kind != "clip":
        steps = f"clean the text ({tokenizer.clean}); encode it between special tokens "
        steps += f"({tokenizer.normalize}); cut, pad {'left' if tokenizer.pads_left else 'right'}"
        return {
            "kind": f"a file of the library {tokenizer.kind}",
            "files": list(tokenizer.files()),
            "settings": tokenizer.to_dict(),
            "context_length": tokenizer.context_length,
            "end": tokenizer.end_id,
            "pad": tokenizer.pad_id,
            "steps": steps,
        }
    return {
        "kind": "CLIP's byte-pair encoding",
        "vocabulary": "vocab.json",
        "merges": "merges.txt",
        "context_length": tokenizer.context_length,
        "start": START,
        "end": END,
        "pad": 0,
        "steps": "ftfy.fix_text; html.unescape twice; collapse and strip white space; lower "
        "case; byte-pair encoding; start, ids, end, then pad",
    }


def _describe_resize(preprocess: Preprocess) -> str:
    """The resize before the crop, for implementations of the preprocessing elsewhere."""
    height, width = preprocess.sides
    match preprocess.resize:
        case "none":
            return "no resize"
        case "squash":
            what = f"resize to {width} x {height} (width x height)"
        case "longest":
            what = f"resize the long side to {height}, pad with grey {preprocess.fill}"
        case _:  # shortest; NaFlex models are exported for squares
            what = f"resize the short side to {height}"
    return f"{what}, {preprocess.interpolation}, antialiased (as Pillow)"


def _write_towers(model: CLIP, folder: Path, description: dict[str, Any]) -> None:
    config = model.config
    sizes: dict[int, Any] = {0: torch.export.Dim("batch")}
    is_dynamic = description["text"]["dynamic_length"]
    length = torch.export.Dim("length", max=config.context_length)
    inputs = {
        "image": (torch.randn(2, 3, config.image_resolution, config.image_resolution), sizes),
        "text": (
            torch.ones(
                2,
                min(9, config.context_length) if is_dynamic else config.context_length,
                dtype=torch.int64,
            ),
            sizes | ({1: length} if is_dynamic else {}),
        ),
    }
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for tower, (x, dynamic) in inputs.items():
        program = torch.export.export(_Tower(model, tower), (x,), dynamic_shapes=(dynamic,))
        path = folder / description[tower]["file"]
        if description["backend"] == "torch":
            torch.export.save(program, path)
            continue
        torch.onnx.export(
            program,
            (x,),
            path,
            input_names=["pixels" if tower == "image" else "tokens"],
            output_names=["features"],
            dynamo=True,
            verbose=False,
            external_data=weights > EXTERNAL_BYTES,
        )


@torch.no_grad()
def _compare(clip: InferenceModel, folder: Path, backend: str) -> dict[str, float]:
    """The lowest cosine between exported and original features of each tower, over all samples."""
    exported, _ = read_exported(folder, backend)
    cosines = {}
    for tower, samples in (("image", _sample_pixels(clip)), ("text", _sample_tokens(clip))):
        ours, theirs = (getattr(one, f"encode_{tower}") for one in (clip.model, exported))
        cosines[tower] = min(float(F.cosine_similarity(theirs(x), ours(x)).min()) for x in samples)
    return cosines


def _sample_pixels(clip: InferenceModel) -> list[torch.Tensor]:
    """Normalised pixels with structure at several sizes, in batches of 1, 2 and 5."""
    generator = torch.Generator().manual_seed(0)
    side, batches = clip.preprocess.resolution, []
    for count in (1, 2, 5):
        blocks = torch.randn(count, 3, 2 + 3 * count, 2 + 3 * count, generator=generator)
        batches.append(F.interpolate(1.5 * blocks, (side, side), mode="bilinear"))
    return batches


def _sample_tokens(clip: InferenceModel) -> list[torch.Tensor]:
    """Token ids of several lengths up to the context length, in batches of 1, 3 and 4."""
    generator = torch.Generator().manual_seed(0)
    config, batches = clip.model.config, []
    for count, length in ((1, 3), (3, 8), (4, config.context_length)):
        length = min(length, config.context_length)
        tokens = torch.randint(1, config.vocab_size - 2, (count, length), generator=generator)
        tokens[:, 0], tokens[:, -1] = config.vocab_size - 2, config.vocab_size - 1
        if config.transformer_eos_id is not None:
            tokens[:, -1] = config.transformer_eos_id
        batches.append(tokens)
    return batches


def _quantize(folder: Path, description: dict[str, Any]) -> None:
    """Replace the float32 towers by int8 towers."""
    import onnx

    for tower in ("image", "text"):
        path, quantized = folder / description[tower]["file"], folder / f"{tower}.int8.onnx"
        model = _to_int8(onnx.load(path))
        onnx.save(
            model,
            quantized,
            save_as_external_data=model.ByteSize() > EXTERNAL_BYTES,
            location=f"{quantized.name}.data",
        )
        path.unlink()
        (folder / f"{path.name}.data").unlink(missing_ok=True)
        description[tower]["file"] = quantized.name


def _to_int8(model: Any) -> Any:
    """An ONNX model whose embeddings and products with a constant matrix are in int8.

    A matrix has one scale per output channel, an embedding one per row, an activation one per
    token. In onnxruntime's `quantize_dynamic` an activation has one scale for the whole batch, so
    that the features of an image depend on the other images.
    """
    from onnx import inliner, numpy_helper, parser
    from onnx.helper import get_attribute_value, make_node

    weights = {one.name: one for one in model.graph.initializer}
    int8: dict[str, np.ndarray] = {}
    nodes: list[Any] = []
    for node in model.graph.node:
        is_embedding = node.op_type == "Gather"
        position = 0 if is_embedding else 1  # of the weight among the inputs
        name = node.input[position] if node.op_type in ("MatMul", "Gemm", "Gather") else ""
        if name not in weights or len(weights[name].dims) != 2:
            nodes.append(node)
            continue
        options = {one.name: get_attribute_value(one) for one in node.attribute}
        values = numpy_helper.to_array(weights[name])
        if options.pop("transB", 0):
            name, values = f"{name}.T", values.T
        assert all(
            value == (1 if key in ("alpha", "beta") else 0) for key, value in options.items()
        )
        scale = np.abs(values).max(axis=1 if is_embedding else 0, keepdims=True).clip(1e-20) / 127
        int8[f"{name}.int8"] = np.rint(values / scale).astype(np.int8)
        int8[f"{name}.scale"] = scale.astype(np.float32)
        inputs = [node.input[1 - position], f"{name}.int8", f"{name}.scale"]
        output, bias = node.output[0], node.input[2:]
        product = f"{output}.product" if bias else output
        operator = "Embedding" if is_embedding else "Product"
        nodes.append(make_node(operator, inputs, [product], domain="leanclip"))
        if bias:
            nodes.append(make_node("Add", [product, bias[0]], [output]))
    used = {name for node in nodes for name in node.input}
    tensors = [one for name, one in weights.items() if name in used]
    tensors += [numpy_helper.from_array(values, name) for name, values in int8.items()]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensors)
    (version,) = (one.version for one in model.opset_import if not one.domain)
    model.functions.extend(parser.parse_function(text % version) for text in _INT8_OPERATORS)
    return inliner.inline_local_functions(model)


def _write_description(folder: Path, description: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def _format(cosines: dict[str, float]) -> str:
    return ", ".join(f"{tower} {cosine:.6f}" for tower, cosine in cosines.items())


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporters' logs and warnings, which are for their developers."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)
