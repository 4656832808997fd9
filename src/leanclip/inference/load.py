"""Load a model for inference, from weights of any format or from an exported folder.

source -> read_weights -> CLIP -> InferenceModel(model, preprocess)
"""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import torch

from leanclip.config.model import ModelConfig
from leanclip.config.published import published
from leanclip.config.sections import to_plain
from leanclip.distributed.collectives import choose_device
from leanclip.errors import ConfigError, WeightsError
from leanclip.inference.exported import is_exported, read_exported
from leanclip.inference.model import InferenceModel
from leanclip.model import CLIP
from leanclip.model.skip_init import SkipInit
from leanclip.preprocess.images import Preprocess
from leanclip.training.determinism import allow_tf32
from leanclip.weights import load_into, read_weights
from leanclip.weights.hub import OPENAI_FILES
from leanclip.weights.read import Architecture
from leanclip.weights.weights import check_shapes

MAX_RESOLUTION = 8192  # pixels per side, of untrusted preprocessing
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def available() -> list[str]:
    """The published models that `load` downloads by name into the cache; also hub ids."""
    return [*OPENAI_FILES, *(one.name for one in published())]


def load(
    source: str | Path,
    *,
    arch: Architecture | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    partial: bool = False,
    backend: str | None = None,
    tf32: bool = False,
) -> InferenceModel:
    """Load weights of any format, in evaluation mode, or the output of `leanclip export`.

    Args:
        source: a file, a folder, a training run, the name of a published model or a hub id.
        arch: the architecture, if the source does not have it or has a wrong one.
        device: "auto" (CUDA if available), "cpu", "cuda", or any other device of torch.
        dtype: of the weights and of the computation: "float32", "bfloat16" or "float16".
        partial: ignore unexpected keys, and initialise missing ones.
        backend: of an exported folder, which runs on the CPU: "onnx" (None), or "torch" for
            programs that you trust, because PyTorch executes pickles in them.
        tf32: allow TF32 in float32 products and convolutions on a GPU, which is faster. It is set
            for the whole process; false also disables it in convolutions, where PyTorch allows it
            by default.

    Raises:
        WeightsError: the weights cannot be read, do not fit, or have no architecture.
        ConfigError: `arch`, `device`, `dtype` or `backend` is invalid.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype: should be one of {', '.join(DTYPES)}, found {name}")
    if is_exported(Path(source)):
        if arch is not None:
            raise ConfigError(f"{source}: an exported folder has its architecture; leave arch out")
        model, preprocess = read_exported(Path(source), backend)
        return InferenceModel(cast(CLIP, model), preprocess)
    if backend is not None:
        raise ConfigError(f"{source}: backend={backend!r} is for exported folders")
    allow_tf32(tf32)
    weights = read_weights(source, arch=arch)
    if weights.model is None or weights.preprocess is None:
        raise WeightsError(
            f"{weights.source}: a {weights.format} without its architecture (the activation does "
            f"not follow from the tensors); set arch= (--arch), for example arch='ViT-B-32' (exact "
            f"GELU) or arch='ViT-B-32-quickgelu' (OpenAI's)"
        )
    check_shapes(weights, weights.model)
    # With a given architecture or `partial`, some values may not be in the file.
    with SkipInit() if arch is None and not partial else nullcontext():
        model = CLIP(**to_plain(weights.model))
    model = model.to(_device(device))
    load_into(model, weights, partial=partial)
    preprocess = weights.preprocess
    _check_patches(weights.source, weights.model, preprocess)
    most = max(preprocess.resolution, *preprocess.sides)
    if preprocess.patch_size is not None and preprocess.max_patches is not None:
        most = max(most, preprocess.patch_size * math.isqrt(preprocess.max_patches))
    if most > MAX_RESOLUTION:
        raise WeightsError(
            f"{weights.source}: images of {most} pixels per side; the maximum is {MAX_RESOLUTION}"
        )
    return InferenceModel(model.to(DTYPES[name]).eval(), preprocess)


def _check_patches(source: str | Path, model: ModelConfig, preprocess: Preprocess) -> None:
    """Check that a model takes the patches that its preprocessing makes."""
    if not preprocess.is_naflex:
        return
    if model.vision_positions != "resized":
        raise WeightsError(
            f"{source}: its images are resized by naflex, which needs vision_positions resized, "
            f"found {model.vision_positions}"
        )
    if model.vision_patch_size != preprocess.patch_size:
        raise WeightsError(
            f"{source}: its images have patches of {preprocess.patch_size} pixels, the model takes "
            f"{model.vision_patch_size}"
        )


def _device(name: str | torch.device) -> torch.device:
    if name in ("auto", "cpu", "cuda"):
        return choose_device(str(name))
    try:
        return torch.device(name)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device: should be auto, cpu, cuda or cuda:1, found {name}") from None
