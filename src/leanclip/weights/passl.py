"""PASSL's `.pdparams` between its names and OpenAI's.

Paddle's Linear weights are (in, out) and are transposed; `proj`, `text_projection` and
embeddings are not. The file holds no architecture: QuickGELU is implied, and heads of 64 channels.
"""

import logging
import pickle
import re
from pathlib import Path

import numpy as np
import torch

from leanclip.config.model import ModelConfig
from leanclip.errors import WeightsError
from leanclip.weights.weights import VISION_POSITIONS, Weights, infer_architecture

log = logging.getLogger("leanclip")

_RENAMES = (  # a piece of a name: OpenAI's, PASSL's
    ("visual.transformer.resblocks.", "visual.blocks."),
    ("transformer.resblocks.", "transformer.blocks."),
    ("visual.ln_pre.", "visual.norm_pre."),
    ("visual.ln_post.", "visual.norm_post."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".attn.in_proj_", ".attn.qkv."),
    (".attn.out_proj.", ".attn.proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    ("visual.attnpool.c_proj.", "visual.attnpool.out_proj."),
    (".running_mean", "._mean"),
    (".running_var", "._variance"),
)
_PATCHES = ("visual.conv1.", "visual.patch_embed.proj.")  # of a ViT; a ResNet has a conv1 too
_LINEAR = re.compile(r".*\.(attn\.(qkv|proj)|mlp\.fc[12]|attnpool\.\w+_proj)\.weight")
_LEADING = {"logit_scale": 1, "visual.class_embedding": 2, "visual.positional_embedding": 1}
_NO_POSITIONS = (
    "PASSL's ResNets have no visual.attnpool.positional_embedding, and attend over the batch: "
    "zeros stand for it here; the trunk's output is PASSL's, the image features are not"
)


def from_arrays(
    source: Path,
    arrays: dict[str, np.ndarray],
    arch: ModelConfig | None,
    unexpected: tuple[str, ...] = (),
) -> Weights:
    """Tensors by OpenAI's names.

    Raises:
        WeightsError: they are not CLIP's.
    """
    tensors = {}
    for theirs, array in arrays.items():
        name, tensor = _rename(theirs, inverse=True), torch.from_numpy(array)
        if _LINEAR.fullmatch(theirs):
            tensor = tensor.T  # a view: the file is not held twice
        tensors[name] = tensor.reshape(tensor.shape[_LEADING.get(name, 0) :])
    model = arch or infer_architecture(tensors, source=source, activation="quick_gelu")
    is_resnet = "visual.layer1.0.conv1.weight" in tensors
    lacks = is_resnet and VISION_POSITIONS[1] not in tensors
    return Weights(
        source,
        "passl",
        tensors,
        model,
        missing=(VISION_POSITIONS[1],) if lacks else (),
        notes=(_NO_POSITIONS,) if lacks else (),
        unexpected=unexpected,
    )


def write(file: Path, weights: Weights, model: ModelConfig) -> None:
    """A checkpoint in the form of PASSL's: `{"state_dict": arrays}`, under CLIPWrapper's names.

    PASSL's loaders and its document take it from there; they must know the architecture.

    Raises:
        WeightsError: PASSL's model has no place for something in the architecture.
    """
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
    arrays = {}
    for name, tensor in weights.tensors.items():
        theirs = _rename(name, is_vit=isinstance(model.vision_layers, int))
        tensor = tensor.T if _LINEAR.fullmatch(theirs) else tensor
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.contiguous().view(torch.uint16)  # Paddle keeps the bits so
        tensor = tensor.reshape((1,) * _LEADING.get(name, 0) + tuple(tensor.shape))
        arrays[f"model.{theirs}"] = np.ascontiguousarray(tensor.numpy()).reshape(tensor.shape)
    with file.open("wb") as out:
        pickle.dump({"state_dict": arrays}, out, protocol=4)


def _rename(name: str, *, inverse: bool = False, is_vit: bool = True) -> str:
    for pair in (*_RENAMES, *((_PATCHES,) if is_vit or inverse else ())):
        ours, theirs = reversed(pair) if inverse else pair
        name = name.replace(ours, theirs)
    return name
