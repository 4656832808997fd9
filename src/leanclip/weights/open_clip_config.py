"""open_clip's `model_cfg` as an architecture, and back.

model_cfg -> its towers: open_clip's own, or of timm and transformers by their names
          -> sizes from the settings, or from the tensors -> ModelConfig
ModelConfig -> the towers that compute the same -> model_cfg, the names of the tensors
"""

import json
from collections.abc import Mapping
from typing import Any

import torch

from leanclip.config.model import ModelConfig
from leanclip.config.sections import parse
from leanclip.errors import ConfigError
from leanclip.weights.files import MALFORMED
from leanclip.weights.open_clip_towers import Tower, hf_tower, refusal, timm_tower
from leanclip.weights.weights import count_blocks, mlp_ratio, square_side

Tensors = Mapping[str, torch.Tensor]

VISION = {  # theirs: ours
    "layers": "vision_layers",
    "width": "vision_width",
    "patch_size": "vision_patch_size",
    "image_size": "image_resolution",
    "mlp_ratio": "vision_mlp_ratio",
    "pool_type": "vision_pool",
    "final_ln_after_pool": "vision_norm_after_pool",
    "ls_init_value": "vision_layer_scale",
}
TEXT = {
    "context_length": "context_length",
    "vocab_size": "vocab_size",
    "width": "transformer_width",
    "heads": "transformer_heads",
    "layers": "transformer_layers",
    "mlp_ratio": "transformer_mlp_ratio",
    "pool_type": "transformer_pool",
    "pad_id": "transformer_pad_id",
    "proj_type": "transformer_projection",
    "proj_bias": "transformer_projection_bias",
    "embed_cls": "transformer_class_token",
}
_DEFAULTS: dict[str, dict[str, Any]] = {  # open_clip's, of what a section leaves out
    "vision_cfg": {
        "layers": 12,
        "width": 768,
        "head_width": 64,
        "patch_size": 16,
        "image_size": 224,
        "no_ln_pre": False,
        "attentional_pool": False,
        "attn_pooler_queries": 256,
        "attn_pooler_heads": 8,
        "act_kwargs": None,
        "norm_kwargs": None,
        "timm_model_name": None,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "timm_proj_bias": False,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 512,
        "heads": 8,
        "layers": 12,
        "no_causal_mask": False,
        "eos_id": 2,
        "act_kwargs": None,
        "norm_kwargs": None,
        "hf_model_name": None,
        "hf_proj_type": "mlp",
        "hf_pooler_type": "mean_pooler",
        "hf_tokenizer_name": None,
        "tokenizer_kwargs": None,
    },
}
_SUPPORTED: dict[str, tuple] = {  # values other than off of fields without an equivalent here
    "pos_embed_type": ("learnable",),
    "tokenizer_mode": ("clip",),
}
_UNUSED = {  # of training, of Python's side, or of a part that is not there
    "vision_cfg": "patch_dropout output_tokens n_queries timm_model_pretrained timm_drop "
    "timm_drop_path",
    "text_cfg": "output_tokens hf_model_pretrained hf_model_config",
    "model_cfg": "embed_dim vision_cfg text_cfg multimodal_cfg quick_gelu custom_text "
    "init_logit_scale init_logit_bias nonscalar_logit_scale cast_dtype output_dict",
}
POOLERS: dict[str, dict[str, Any]] = {  # by hf_pooler_type
    "mean_pooler": {"transformer_pool": "mean"},
    "cls_pooler": {"transformer_pool": "first", "transformer_pooler": True},
    "cls_last_hidden_state_pooler": {"transformer_pool": "first"},
}
TIMM_POOLS = {"token": "tok", "avg": "avg", "map": "attn"}


def is_architecture(values: Any) -> bool:
    """Whether these are open_clip's settings of a model."""
    return isinstance(values, dict) and {"vision_cfg", "text_cfg"} <= values.keys()


def architecture(values: Any, tensors: Tensors | None = None) -> ModelConfig:
    """The architecture of open_clip's settings: embed_dim, vision_cfg, text_cfg, ...

    Args:
        values: the settings.
        tensors: by OpenAI's names; the sizes of a tower of timm or transformers are theirs. None:
            they are those of the published tower of its name.

    Raises:
        ConfigError: they are not such settings, or a field's value is not supported; names it.
    """
    try:
        vision, text = _sections(values)
        trunk, bert = _towers(vision, text)
        _check_fields("model_cfg", values)
        for name in _DEFAULTS:
            _check_fields(name, values[name])
        arch: dict[str, Any] = {"embed_dim": values["embed_dim"]}
        arch |= _timm(vision, trunk, tensors) if trunk else _vision(vision)
        arch |= _bert(text, bert, tensors) if bert else _text(text)
        # A tower of timm or transformers has an activation of its own.
        own = "quick_gelu" if values.get("quick_gelu", False) else None
        first = trunk.settings["activation"] if trunk else own or _activation(vision)
        second = bert.settings["activation"] if bert else own or _activation(text)
        arch |= {"activation": first, "transformer_activation": None if second == first else second}
        arch["logit_bias"] = values.get("init_logit_bias") is not None
        return parse(ModelConfig, arch, where="model")
    except MALFORMED as error:
        raise ConfigError(f"not a supported architecture: {error}") from None


def check_towers(values: Any) -> None:
    """Check the names of timm's and transformers' towers alone, before tensors are read.

    Raises:
        ConfigError: one is not supported; names it, and what to use instead.
    """
    try:
        _towers(*_sections(values))
    except MALFORMED as error:
        raise ConfigError(f"not a supported architecture: {error}") from None


def _sections(values: Any) -> list[dict[str, Any]]:
    """`vision_cfg` and `text_cfg`, with open_clip's defaults."""
    if missing := [name for name in _DEFAULTS if name not in values]:
        is_audio = " (models of audio are not supported)" if "audio_cfg" in values else ""
        raise ValueError(f"it has no {missing[0]}{is_audio}")
    return [default | dict(values[name]) for name, default in _DEFAULTS.items()]


def _towers(vision: dict[str, Any], text: dict[str, Any]) -> tuple[Tower | None, Tower | None]:
    """The towers of timm and of transformers that settings name.

    Raises:
        ValueError: one is not supported; names it, and what to use instead.
    """
    found: list[Tower | None] = []
    for section, key, tower_of in (
        (vision, "timm_model_name", timm_tower),
        (text, "hf_model_name", hf_tower),
    ):
        name = section[key]
        found.append(tower_of(str(name)) if name else None)
        if name and found[-1] is None:
            raise ValueError(refusal(key, str(name)))
    return found[0], found[1]


def _check_fields(name: str, values: Any) -> None:
    """Check a section's fields; others than leanclip has must be off: null, false, 0 or empty.

    Raises:
        ValueError: a field has a value that is not supported.
    """
    used = {"vision_cfg": VISION, "text_cfg": TEXT}.get(name, {})
    known = {*used, *_DEFAULTS.get(name, ()), *_UNUSED[name].split()}
    for field, value in dict(values).items():
        if field not in known and value and value not in _SUPPORTED.get(field, ()):
            raise ValueError(f"{name}.{field}: {str(value)[:60]!r} is not supported")


def _vision(vision: dict[str, Any]) -> dict[str, Any]:
    """The settings of open_clip's own vision towers."""
    arch = {ours: vision[theirs] for theirs, ours in VISION.items() if theirs in vision}
    arch["image_resolution"] = square_side("image_size", vision["image_size"])
    is_resnet = isinstance(vision["layers"], list | tuple)
    width = arch["vision_width"] * (32 if is_resnet else 1)
    if type(vision["head_width"]) is not int or vision["head_width"] < 1:
        raise ValueError(f"vision_cfg.head_width: {vision['head_width']!r} is not a width")
    arch["vision_heads"] = width // vision["head_width"]
    if is_resnet:
        return arch | {"vision_patch_size": None}
    arch["vision_patch_size"] = square_side("patch_size", vision["patch_size"])
    arch["pre_norm"] = not vision["no_ln_pre"]
    arch |= _eps("vision", vision)
    if not vision["attentional_pool"]:
        return arch
    if vision["attentional_pool"] is not True or arch.get("vision_pool", "tok") != "tok":
        found = f"{vision['attentional_pool']!r} with pool_type {arch.get('vision_pool', 'tok')}"
        raise ValueError(f"vision_cfg.attentional_pool: {found} is not supported")
    if arch.get("vision_norm_eps", 1e-5) != 1e-5:  # the pool's own LayerNorms keep the default
        raise ValueError("vision_cfg.norm_kwargs: with attentional_pool it is not supported")
    return arch | {
        "vision_pool": "queries",
        "vision_norm_after_pool": False,
        "vision_pool_queries": vision["attn_pooler_queries"],
        "vision_pool_heads": vision["attn_pooler_heads"],
    }


def _text(text: dict[str, Any]) -> dict[str, Any]:
    """The settings of open_clip's own text tower."""
    arch = {ours: text[theirs] for theirs, ours in TEXT.items() if theirs in text}
    arch["transformer_causal"] = not text["no_causal_mask"]
    if arch.get("transformer_class_token"):
        arch["transformer_pool"] = "last"  # whatever pool_type is
    arch["transformer_eos_id"] = text["eos_id"] if arch.get("transformer_pool") == "eos" else None
    return arch | _eps("transformer", text)


def _eps(tower: str, section: dict[str, Any]) -> dict[str, Any]:
    options = section["norm_kwargs"] or {}
    if set(options) - {"eps"}:
        raise ValueError(f"norm_kwargs: {options!r} is not supported, only eps")
    return {f"{tower}_norm_eps": value for value in options.values()}


def _activation(section: dict[str, Any]) -> str:
    known = {'{"approximate": "tanh"}': "gelu_tanh", '{"approximate": "none"}': "gelu"}
    options = json.dumps(section["act_kwargs"] or None, sort_keys=True)
    found = (known | {"null": "gelu"}).get(options)
    if found is None:
        raise ValueError(f"act_kwargs: {options} is not supported")
    return found


def _timm(vision: dict[str, Any], tower: Tower, tensors: Tensors | None) -> dict[str, Any]:
    """The settings of a vision tower of timm."""
    arch: dict[str, Any] = {"vision_pool": "tok"} | dict(tower.settings)
    arch |= {"vision_width": tower.width, "vision_layers": tower.layers}
    hidden = pool_hidden = tower.hidden
    if tensors is not None:
        arch["vision_width"], _, arch["vision_patch_size"], _ = _shape(
            tensors, "visual.conv1.weight"
        )
        arch["vision_layers"] = count_blocks(tensors, "visual.transformer")
        hidden = _shape(tensors, "visual.transformer.resblocks.0.mlp.c_fc.weight")[0]
        if arch["vision_pool"] == "attn":
            pool_hidden = _shape(tensors, "visual.attn_pool.mlp.c_fc.weight")[0]
            arch["vision_pool_mlp_ratio"] = None
            if pool_hidden != hidden:
                arch["vision_pool_mlp_ratio"] = mlp_ratio(arch["vision_width"], pool_hidden)
    arch["vision_mlp_ratio"] = mlp_ratio(arch["vision_width"], hidden)
    width = arch["vision_width"]
    arch["vision_heads"] = tower.heads_at(width)
    if _is_stated(vision, width, tower):
        arch["vision_heads"] = width // vision["head_width"]
    arch["image_resolution"] = square_side("image_size", vision["image_size"])
    grid = arch["image_resolution"] // arch["vision_patch_size"]
    if arch.get("vision_rotary_grid") == grid:  # else positions are scaled to it
        arch["vision_rotary_grid"] = None
    projection = vision["timm_proj"] or ""
    if projection not in ("", "linear", "none"):
        raise ValueError(f"vision_cfg.timm_proj: {projection!r} is not supported")
    pool = vision["timm_pool"]
    if pool or projection != "linear":  # else it is the tower's default
        found = TIMM_POOLS.get(pool)
        if found is None or (found == "attn") != (arch["vision_pool"] == "attn"):
            raise ValueError(f"vision_cfg.timm_pool: {pool!r} with {tower.name} is not supported")
        is_gap = "_gap_" in tower.name  # timm moves the last LayerNorm only where pool is given
        arch["vision_norm_after_pool"] = pool == "avg" and projection != "linear" and not is_gap
        arch["vision_pool"] = found
    arch["vision_projection"] = "none" if projection == "none" else "linear"
    biases = {"": True, "linear": bool(vision["timm_proj_bias"]), "none": False}
    return arch | {"vision_projection_bias": biases[projection]}


def _bert(text: dict[str, Any], tower: Tower, tensors: Tensors | None) -> dict[str, Any]:
    """The settings of a text tower of transformers."""
    arch = dict(tower.settings) | {"context_length": text["context_length"]}
    width, layers, hidden = tower.width, tower.layers, tower.hidden
    if tensors is not None:
        arch["vocab_size"], width = _shape(tensors, "token_embedding.weight")
        arch["transformer_positions"] = _shape(tensors, "positional_embedding")[0]
        arch["transformer_token_types"] = _shape(tensors, "token_type_embedding")[0]
        layers = count_blocks(tensors, "transformer")
        hidden = _shape(tensors, "transformer.resblocks.0.mlp.c_fc.weight")[0]
    if not width:
        raise ValueError(f"text_cfg.hf_model_name: the sizes of {tower.name!r} are not known")
    pooler, projection = text["hf_pooler_type"], text["hf_proj_type"] or "none"
    if pooler not in POOLERS:
        raise ValueError(f"text_cfg.hf_pooler_type: {pooler!r} is not supported")
    if projection not in ("mlp", "linear", "none"):
        raise ValueError(f"text_cfg.hf_proj_type: {projection!r} is not supported")
    return arch | {
        "transformer_width": width,
        "transformer_heads": text["heads"] if _is_stated(text, width, tower) else width // 64,
        "transformer_layers": layers,
        "transformer_mlp_ratio": mlp_ratio(width, hidden),
        "transformer_projection": projection,
        **POOLERS[pooler],
    }


def _is_stated(section: dict[str, Any], width: int, tower: Tower) -> bool:
    """Whether a section states the heads of a tower whose sizes are not the published ones.

    leanclip writes them so; open_clip ignores them.
    """
    return width not in (tower.width, 0) and section["width"] == width


def _shape(tensors: Tensors, name: str) -> torch.Size:
    if name not in tensors:
        raise ValueError(f"its tensors have no {name}")
    return tensors[name].shape
