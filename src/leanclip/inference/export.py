"""Write a model's towers for other runtimes, checked against it before they are there.

    Clip -> towers -> torch.export -> ONNX, or a .pt2 -> run beside the model -> OUT

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

import torch
from torch import nn
from torch.nn import functional as F

from leanclip.config.sections import to_plain
from leanclip.errors import ConfigError, WeightsError
from leanclip.inference.exported import BACKENDS, FORMAT, INDEX, read_exported
from leanclip.inference.model import Clip
from leanclip.io.optional_imports import need
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.tokenizer import END, START, VOCAB_SIZE, merges, vocabulary

LEAST_COSINE = 0.9999  # of features in float32, exported and not
_LARGE = 1 << 30  # bytes of weights from which on they are put beside an .onnx file
_SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}


def export(clip: Clip, out: Path, to: str, *, int8: bool = False) -> dict[str, Any]:
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
        if min(facts["checked"].values()) < LEAST_COSINE:
            raise WeightsError(
                f"export: the exported towers' features differ from the model's: least cosines "
                f"{_words(facts['checked'])}, wanted {LEAST_COSINE}; nothing was written"
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


def _facts(clip: Clip, to: str) -> dict[str, Any]:
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
def _compare(clip: Clip, folder: Path, backend: str) -> dict[str, float]:
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


def _images(clip: Clip) -> list[torch.Tensor]:
    """Normalised pixels with structure at several sizes, in batches of 1, 2 and 5."""
    generator = torch.Generator().manual_seed(0)
    side, batches = clip.preprocess.resolution, []
    for count in (1, 2, 5):
        blocks = torch.randn(count, 3, 2 + 3 * count, 2 + 3 * count, generator=generator)
        batches.append(F.interpolate(1.5 * blocks, (side, side), mode="bilinear"))
    return batches


def _texts(clip: Clip) -> list[torch.Tensor]:
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
    """Put towers with int8 weights in the place of those in float32."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for tower in ("image", "text"):
        path, small = folder / facts[tower]["file"], folder / f"{tower}.int8.onnx"
        quantize_dynamic(
            path,
            small,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
        path.unlink()
        (folder / f"{path.name}.data").unlink(missing_ok=True)
        facts[tower]["file"] = small.name


def _write_facts(folder: Path, facts: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _write_tokenizer(clip: Clip, folder: Path) -> None:
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
