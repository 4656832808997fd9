"""Load weights of any format as a model to use.

read_weights(source) -> CLIP with its values -> InferenceModel(model, preprocess)
"""

from contextlib import nullcontext
from pathlib import Path
from typing import cast

import torch

from leanclip.config.sections import to_plain
from leanclip.distributed.collectives import choose_device
from leanclip.errors import ConfigError, WeightsError
from leanclip.inference.exported import is_exported, read_exported
from leanclip.inference.model import InferenceModel
from leanclip.model import CLIP
from leanclip.model.skip_init import SkipInit
from leanclip.training.determinism import allow_tf32
from leanclip.weights import load_into, read_weights
from leanclip.weights.hub import OPENAI_FILES
from leanclip.weights.read import Architecture
from leanclip.weights.weights import check_shapes

MAX_RESOLUTION = 8192  # pixels a side that a stranger's preprocessing may ask for
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def available() -> list[str]:
    """The published weights that `load` takes by name, and fetches once into the cache."""
    return list(OPENAI_FILES)


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
    """Load weights of any dialect, in evaluation mode, or what `leanclip export` wrote.

    Args:
        source: a file, a folder, a run's folder, a published name or a hub id.
        arch: the architecture, where the source does not say it or says it wrongly.
        device: "auto" (CUDA where there is one), "cpu", "cuda", or another of torch's.
        dtype: what the towers compute in: "float32", "bfloat16" or "float16".
        partial: keep a new model's values for missing keys; drop left-over ones.
        backend: of an exported folder, which runs on the CPU: "onnx", or "torch", whose programs
            are to be trusted: PyTorch runs pickles that are in them; None: onnx.
        tf32: let a GPU round the factors of float32 products and convolutions to TF32, which is
            faster. It is set for the whole process; false turns it off in convolutions too, where
            PyTorch has it on by default.

    Raises:
        WeightsError: the weights cannot be read, do not fit, or do not say their architecture.
        ConfigError: `arch`, `device` or `dtype` is none.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype {name}: is not one of {', '.join(DTYPES)}")
    if is_exported(Path(source)):
        if arch is not None:
            raise ConfigError(f"{source}: was exported with its architecture; leave arch out")
        model, preprocess = read_exported(Path(source), backend)
        return InferenceModel(cast(CLIP, model), preprocess)
    if backend is not None:
        raise ConfigError(f"{source}: backend={backend!r} is for a folder that was exported")
    allow_tf32(tf32)
    weights = read_weights(source, arch=arch)
    if weights.model is None or weights.preprocess is None:
        raise WeightsError(
            f"{weights.source}: a {weights.dialect} without its architecture (the tensors do not "
            f"tell the activation); say it with arch= (--arch), for example arch='ViT-B-32' (exact "
            f"GELU) or arch='ViT-B-32-quickgelu' (OpenAI's)"
        )
    check_shapes(weights, weights.model)
    # Where all values come from the file; of an architecture that was said some may be the model's.
    with SkipInit() if arch is None and not partial else nullcontext():
        model = CLIP(**to_plain(weights.model))
    model = model.to(_device(device))
    load_into(model, weights, partial=partial)
    most = max(weights.preprocess.resolution, *weights.preprocess.sides)
    if most > MAX_RESOLUTION:
        raise WeightsError(
            f"{weights.source}: images of {most} pixels a side, at most {MAX_RESOLUTION} are made"
        )
    return InferenceModel(model.to(DTYPES[name]).eval(), weights.preprocess)


def _device(name: str | torch.device) -> torch.device:
    if name in ("auto", "cpu", "cuda"):
        return choose_device(str(name))
    try:
        return torch.device(name)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device {name}: is none; give auto, cpu, cuda or cuda:1") from None
