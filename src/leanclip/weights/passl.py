"""PASSL's `.pdparams`: a pickle of numpy arrays under PASSL's names.

    loaded pickle -> the state dict -> without tables and tuples, slices joined -> name: array

Paddle's Linear weights are (in, out), so they are transposed; `proj`, `text_projection` and
embeddings are not. The file holds no architecture: QuickGELU is implied, and heads of 64 channels.
"""

import logging
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from leanclip.config.model import ModelConfig
from leanclip.errors import WeightsError
from leanclip.preprocess.images import Preprocess
from leanclip.weights.names import Rule, to_ours, to_theirs
from leanclip.weights.unpickle import check_sharing, read_numpy_pickle, weights_errors
from leanclip.weights.weights import (
    VISION_POSITIONS,
    Weights,
    check_openais,
    infer_architecture,
)

log = logging.getLogger("leanclip")

_BLOCK = (
    ("ln_1.*", "norm1.*", False),
    ("ln_2.*", "norm2.*", False),
    ("attn.in_proj_*", "attn.qkv.*", True),
    ("attn.out_proj.*", "attn.proj.*", True),
    ("mlp.c_fc.*", "mlp.fc1.*", True),
    ("mlp.c_proj.*", "mlp.fc2.*", True),
)
_RULES = (
    *(
        Rule(f"{tower}transformer.resblocks.*.{ours}", f"{blocks}.blocks.*.{theirs}", transpose)
        for tower, blocks in (("visual.", "visual"), ("", "transformer"))
        for ours, theirs, transpose in _BLOCK
    ),
    Rule("visual.ln_pre.*", "visual.norm_pre.*"),
    Rule("visual.ln_post.*", "visual.norm_post.*"),
    Rule("visual.attnpool.c_proj.*", "visual.attnpool.out_proj.*", transpose=True),
    *(
        Rule(f"visual.attnpool.{x}_proj.*", f"visual.attnpool.{x}_proj.*", transpose=True)
        for x in "qkv"
    ),
    Rule("visual.**.running_mean", "visual.**._mean"),
    Rule("visual.**.running_var", "visual.**._variance"),
)
_PATCHES = Rule("visual.conv1.*", "visual.patch_embed.proj.*")  # of a ViT; a ResNet has a conv1 too
_SAME = Rule("**", "**")
_LEADING = {"logit_scale": 1, "visual.class_embedding": 2, "visual.positional_embedding": 1}
_NO_POSITIONS = (
    "PASSL's ResNets have no visual.attnpool.positional_embedding, and attend over the batch: "
    "it is zero here; the trunk's output is PASSL's, the image features are not"
)
_NAME_TABLE = "StructuredToParameterName@@"
_SLICE_TABLE = "UnpackBigParamInfor@@"


def read_file(file: Path, arch: ModelConfig | None) -> Weights:
    """Read a `.pdparams`.

    Raises:
        WeightsError: the file is damaged, holds more than data, or is not CLIP's.
    """
    loaded = read_numpy_pickle(file)
    weights = from_state_dict(file, paddle_arrays(loaded, file), arch)
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        unexpected = tuple(str(key) for key in loaded if key != "state_dict")
        return replace(weights, unexpected=unexpected)
    return weights


def from_state_dict(
    source: Path, arrays: Mapping[str, np.ndarray], model: ModelConfig | None
) -> Weights:
    """Weights of the arrays of `paddle_arrays`; `model` is inferred if not given.

    Raises:
        WeightsError: they are not CLIP's.
    """
    theirs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors = {
        name: tensor.reshape(tensor.shape[_LEADING.get(name, 0) :])
        for name, tensor in to_ours(theirs, (*_RULES, _PATCHES)).items()
    }
    model = model or infer_architecture(tensors, source=source, activation="quick_gelu")
    weights = Weights(source, "passl", tensors, model)
    if "visual.layer1.0.conv1.weight" in tensors and VISION_POSITIONS[1] not in tensors:
        return replace(weights, missing=(VISION_POSITIONS[1],), notes=(_NO_POSITIONS,))
    return weights


def write(file: Path, weights: Weights, model: ModelConfig, preprocess: Preprocess) -> None:
    """Write a checkpoint of PASSL's form: `{"state_dict": arrays}`, under CLIPWrapper's names.

    PASSL's loaders and its document must be given the architecture.

    Raises:
        WeightsError: PASSL's model has no equivalent of something in the architecture.
    """
    check_openais(weights, model, "PASSL's format")
    known = {"activation": "quick_gelu", "vision_pool": "tok", "transformer_pool": "argmax"}
    for name, value in (known | {"transformer_causal": True}).items():
        if getattr(model, name) != value:
            raise WeightsError(
                f"{weights.source}: PASSL has {name} {value}, this model {getattr(model, name)}"
            )
    heads = model.model_copy(update={"vision_heads": None}).attention_heads
    if model.attention_heads != heads:
        raise WeightsError(
            f"{weights.source}: PASSL has {heads} vision heads at this width, this model "
            f"{model.attention_heads}"
        )
    if model.transformer_heads != model.transformer_width // 64:
        log.warning(
            "%s: PASSL's files do not store the number of text heads: load %s with "
            "transformer_heads: %d",
            weights.source,
            file,
            model.transformer_heads,
        )
    patches = (_PATCHES,) if isinstance(model.vision_layers, int) else ()
    tensors = {
        name: tensor.reshape((1,) * _LEADING.get(name, 0) + tuple(tensor.shape))
        for name, tensor in weights.tensors.items()
    }
    theirs = to_theirs(tensors, (*_RULES, *patches, _SAME))
    arrays = {f"model.{name}": _to_array(tensor) for name, tensor in theirs.items()}
    with file.open("wb") as out:
        pickle.dump({"state_dict": arrays}, out, protocol=4)


def paddle_arrays(loaded: object, source: Path) -> dict[str, np.ndarray]:
    """The parameters by name, in Paddle's own shapes.

    Reads the forms of paddle.save, bare or under `state_dict` in a training checkpoint of either
    generation of PASSL: values that are (name, array), arrays over 1 GiB in slices, and bfloat16
    as the bits in a uint16, which becomes float32. The prefix `model.` is stripped where all
    names have it.

    Args:
        loaded: the value of `read_numpy_pickle`.
        source: the file that errors name.

    Raises:
        WeightsError: the values have another form.
    """
    with weights_errors(source, "file of PaddlePaddle's"):
        if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
            loaded = loaded["state_dict"]
        if not isinstance(loaded, dict):
            raise WeightsError(f"holds a {type(loaded).__name__}, not a dict of parameters")
        arrays = {
            name: _array(name, value)
            for name, value in loaded.items()
            if name not in (_NAME_TABLE, _SLICE_TABLE)
        }
        check_sharing((a.__array_interface__["data"][0], a.nbytes) for a in arrays.values())
        for name, slices in loaded.get(_SLICE_TABLE, {}).items():
            parts = [arrays.pop(part).ravel() for part in slices["slices"]]
            arrays[name] = np.concatenate(parts).reshape(slices["OriginShape"])
        if not arrays:
            raise WeightsError("holds no parameters")
        arrays = {name: _from_bfloat16(array) for name, array in arrays.items()}
        if all(name.startswith("model.") for name in arrays):
            arrays = {name.removeprefix("model."): array for name, array in arrays.items()}
        return arrays


def _array(name: object, value: object) -> np.ndarray:
    if type(value) is tuple and len(value) == 2 and type(value[0]) is str:
        value = value[1]
    if type(name) is not str or not isinstance(value, np.ndarray):
        raise WeightsError(f"{str(name)[:100]!r} holds a {type(value).__name__}, not an array")
    return value


def _from_bfloat16(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint16:
        return array
    # Not astype(...) << 16 on the array itself: a 0-d one would turn into a scalar.
    bits = np.left_shift(array, 16, dtype=np.uint32)
    return np.asarray(bits).view(np.float32)


def _to_array(tensor: torch.Tensor) -> np.ndarray:
    """An array; of bfloat16, which numpy does not have, the bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
