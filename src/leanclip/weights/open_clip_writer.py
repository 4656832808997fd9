"""An architecture as open_clip's `model_cfg`, and the names that its tensors have there.

ModelConfig -> each tower: open_clip's own if it computes the same, else the one of timm or
               transformers that does, nearest in size -> model_cfg, rules of names
"""

from dataclasses import dataclass
from typing import Any

from leanclip.config.model import ModelConfig
from leanclip.weights.names import Rule
from leanclip.weights.open_clip_config import POOLERS, TEXT, TIMM_POOLS, VISION
from leanclip.weights.open_clip_towers import (
    BERT_RULES,
    HEAD_RULES,
    NORM_RULES,
    OWN_TEXT_RULES,
    PROJECTION_RULES,
    TEXT_RULES,
    TIMM_RULES,
    Tower,
    hf_towers,
    timm_towers,
)

_OPTIONAL = {
    "ls_init_value",
    "pad_id",
    "proj_type",
    "proj_bias",
    "embed_cls",
}  # not of old versions
_OWN_VISION: dict[str, tuple[Any, ...]] = {  # what open_clip's own towers can have
    "vision_class_token": (True,),
    "vision_pool": ("tok", "avg", "queries"),
    "vision_positions": ("learned",),
    "vision_projection": ("linear",),
    "vision_projection_bias": (False,),
    "patch_bias": (False,),
}
_OWN_TEXT: dict[str, tuple[Any, ...]] = {
    "transformer_pool": ("argmax", "first", "last", "eos"),
    "transformer_padding_mask": (False,),
    "transformer_post_norm": (False,),
    "transformer_token_types": (0,),
    "transformer_pooler": (False,),
    "transformer_first_position": (0,),
    "transformer_projection": ("linear", "none"),
}
_BERT_TEXT: dict[str, tuple[Any, ...]] = {
    "transformer_pool": ("first", "mean"),
    "transformer_class_token": (False,),
    "transformer_projection_bias": (False,),
}

_SAME = tuple(Rule(name, name) for name in ("visual.**", "logit_scale", "logit_bias"))


@dataclass(frozen=True)
class Form:
    """A model in open_clip's form."""

    model_cfg: dict[str, Any]
    rules: tuple[Rule, ...]  # empty: the names are the same
    notes: tuple[str, ...]


def form_of(model: ModelConfig) -> Form:
    """The form of a model.

    Raises:
        ValueError: open_clip has no towers that compute the same; names a setting.
    """
    is_trunk = isinstance(model.vision_layers, int) and bool(_beyond(model, _OWN_VISION))
    is_bert = bool(_beyond(model, _OWN_TEXT)) or not _has_plain_positions(model)
    trunk = _timm_tower(model) if is_trunk else None
    bert = _hf_tower(model) if is_bert else None
    vision, vision_rules = _timm(model, trunk) if trunk else (_vision(model), ())
    own_rules = (*TEXT_RULES[model.transformer_projection_bias], *OWN_TEXT_RULES)
    text, text_rules = _bert(model, bert) if bert else (_text(model), own_rules)
    own = [a for a, other in zip(model.activations, (trunk, bert), strict=True) if not other]
    if "quick_gelu" in own and len({*own}) > 1:
        raise ValueError(f"open_clip has quick_gelu in both towers or none, this model has {own}")
    is_custom = bool(trunk or bert or model.transformer_class_token)
    is_custom |= model.transformer_projection_bias
    model_cfg: dict[str, Any] = {"embed_dim": model.embed_dim, "quick_gelu": "quick_gelu" in own}
    if is_custom:
        model_cfg["custom_text"] = True
    if model.logit_bias:
        model_cfg["init_logit_bias"] = -10
    notes = tuple(
        f"open_clip builds {tower.name} with its published sizes, which are not this model's; only "
        f"leanclip loads this folder"
        for tower, is_exact in ((trunk, _is_trunks(model, trunk)), (bert, _is_berts(model, bert)))
        if tower and not is_exact
    )
    cfg = model_cfg | {"vision_cfg": vision, "text_cfg": text}
    rules = (*vision_rules, *text_rules, *_SAME) if is_custom else ()
    return Form(cfg, rules, notes)


def _beyond(model: ModelConfig, possible: dict[str, tuple[Any, ...]]) -> list[str]:
    """The settings of a model that are not among those that are possible."""
    return [name for name, values in possible.items() if getattr(model, name) not in values]


def _has_plain_positions(model: ModelConfig) -> bool:
    return model.text_positions == model.context_length + model.transformer_class_token


def _vision(model: ModelConfig) -> dict[str, Any]:
    """`vision_cfg` of open_clip's own towers."""
    section = _fields(model, VISION)
    if not isinstance(model.vision_layers, int):
        section = {name: section[name] for name in ("layers", "width", "image_size")}
        head_width = 32 * model.vision_width // model.attention_heads
        return section | {"patch_size": None, "head_width": head_width}
    section["head_width"] = model.vision_width // model.attention_heads
    section["no_ln_pre"] = not model.pre_norm
    section |= _options(model.activations[0], model.vision_norm_eps)
    if model.vision_pool == "queries":
        if model.vision_norm_eps != 1e-5:
            raise ValueError("open_clip has vision_pool queries with vision_norm_eps 1e-05 only")
        section |= {
            "pool_type": "tok",
            "attentional_pool": True,
            "attn_pooler_queries": model.vision_pool_queries,
            "attn_pooler_heads": model.pool_heads,
        }
    return section


def _text(model: ModelConfig) -> dict[str, Any]:
    """`text_cfg` of open_clip's own tower."""
    section = _fields(model, TEXT) | {"no_causal_mask": not model.transformer_causal}
    if model.transformer_eos_id is not None:
        section["eos_id"] = model.transformer_eos_id
    return section | _options(model.activations[1], model.transformer_norm_eps)


def _fields(model: ModelConfig, table: dict[str, str]) -> dict[str, Any]:
    defaults = {name: field.default for name, field in type(model).model_fields.items()}
    return {
        theirs: getattr(model, ours)
        for theirs, ours in table.items()
        if getattr(model, ours) is not None
        and not (theirs in _OPTIONAL and getattr(model, ours) == defaults[ours])
    }


def _options(activation: str, eps: float) -> dict[str, Any]:
    found: dict[str, Any] = {} if eps == 1e-5 else {"norm_kwargs": {"eps": eps}}
    return found | ({"act_kwargs": {"approximate": "tanh"}} if activation == "gelu_tanh" else {})


def _timm(model: ModelConfig, tower: Tower) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """`vision_cfg` of a tower of timm, and the names of its tensors."""
    projection = _timm_projection(model)
    pools = {ours: theirs for theirs, ours in TIMM_POOLS.items()}
    section = {
        "image_size": model.image_resolution,
        "timm_model_name": tower.name,
        "timm_model_pretrained": False,
        "timm_pool": pools[model.vision_pool],
        "timm_proj": projection or None,
    }
    if model.vision_width != tower.width:  # open_clip ignores them
        section["width"] = model.vision_width
        section["head_width"] = model.vision_width // model.attention_heads
    norm = NORM_RULES[model.vision_norm_after_pool]
    return section, (*TIMM_RULES, norm, *HEAD_RULES[projection])


def _timm_projection(model: ModelConfig) -> str:
    """timm_proj: linear has no bias, that of the tower's own head has one."""
    if model.vision_projection == "none":
        return "none"
    return "" if model.vision_projection_bias else "linear"


def _timm_tower(model: ModelConfig) -> Tower:
    """The tower of timm that computes the same, nearest in size.

    Raises:
        ValueError: there is none; names a setting.
    """
    found = [(_timm_differences(model, tower), tower) for tower in timm_towers()]
    fewest, nearest = min(found, key=lambda one: len(one[0]))
    exact = [one for one in found if _is_trunks(model, one[1], any_side=True)]
    if exact and fewest == []:  # towers of these sizes are published with one activation
        fewest, nearest = min(exact, key=lambda one: len(one[0]))
        if fewest:
            found = exact
    if fewest:
        name, there, here = fewest[0]
        raise ValueError(
            f"open_clip has no vision tower of timm with {name} {here}; the nearest, "
            f"{nearest.name}, has {there}"
        )
    return min(
        (tower for differing, tower in found if not differing),
        key=lambda tower: (
            not _is_trunks(model, tower),
            not _is_trunks(model, tower, any_side=True),
            tower.settings["vision_patch_size"] != model.vision_patch_size,
        ),
    )


def _timm_differences(model: ModelConfig, tower: Tower) -> list[tuple[str, Any, Any]]:
    """The settings in which a model differs from what timm computes by a name: there and here."""
    side, patch = model.image_resolution, model.vision_patch_size or 1
    there = {
        "vision_class_token": True,
        "vision_pool": "tok",
        "vision_positions": "learned",
        "vision_layer_scale": None,
        **tower.settings,
    }
    is_stated = tower.width != model.vision_width
    heads = model.attention_heads if is_stated else tower.heads
    there |= {"vision_heads": heads, "vision_pool_heads": there.get("vision_pool_heads") or heads}
    here = {name: getattr(model, name) for name in there}
    here |= {
        "activation": model.activations[0],
        "vision_heads": model.attention_heads,
        "vision_pool_heads": model.pool_heads,
        "vision_rotary_grid": model.vision_rotary_grid or side // patch,
    }
    if there["vision_pool"] != "attn":
        del there["vision_pool_heads"]
        if here["vision_pool"] == "avg":  # timm_pool
            there["vision_pool"] = "avg"
            is_moved = _timm_projection(model) != "linear" and "_gap_" not in tower.name
            there["vision_norm_after_pool"] = is_moved
            here["vision_norm_after_pool"] = model.vision_norm_after_pool
    for size in ("image_resolution", "vision_patch_size", "vision_pool_mlp_ratio"):
        there.pop(size, None)
    labels = {"activation": "vision_activation"}
    return [(labels.get(n, n), there[n], here[n]) for n in there if there[n] != here[n]]


def _is_trunks(model: ModelConfig, tower: Tower | None, *, any_side: bool = False) -> bool:
    """Whether a model's vision tower has the sizes of the published one."""
    if tower is None:
        return False
    width = model.vision_width
    here = (width, model.vision_layers, int(width * model.vision_mlp_ratio))
    there = (tower.width, tower.layers, tower.hidden)
    names = ("vision_patch_size", *(() if any_side else ("image_resolution",)))
    return here == there and all(getattr(model, n) == tower.settings[n] for n in names)


def _bert(model: ModelConfig, tower: Tower) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """`text_cfg` of a tower of transformers, and the names of its tensors."""
    pool: dict[str, Any] = {"transformer_pool": model.transformer_pool}
    if model.transformer_pooler:
        pool["transformer_pooler"] = True
    projection = model.transformer_projection
    section = {
        "context_length": model.context_length,
        "vocab_size": model.vocab_size,
        "hf_model_name": tower.name,
        "hf_model_pretrained": False,
        "hf_proj_type": None if projection == "none" else projection,
        "hf_pooler_type": next(name for name, one in POOLERS.items() if one == pool),
    }
    if model.transformer_width != tower.width:  # open_clip ignores them
        section["width"], section["heads"] = model.transformer_width, model.transformer_heads
    return section, (*BERT_RULES, *PROJECTION_RULES[projection])


def _hf_tower(model: ModelConfig) -> Tower:
    """The tower of transformers that computes the same, nearest in size.

    Raises:
        ValueError: there is none; names a setting.
    """
    beyond = _beyond(model, _BERT_TEXT)
    if beyond or (model.transformer_pooler and model.transformer_pool != "first"):
        name = beyond[0] if beyond else "transformer_pooler"
        here = getattr(model, name)
        raise ValueError(f"open_clip has no text tower of transformers with {name} {here}")
    found = []
    for tower in hf_towers():
        there = {n: v for n, v in tower.settings.items() if n not in _SIZES}
        if tower.width == model.transformer_width:  # else they are stated
            there["transformer_heads"] = tower.heads
        here = {name: getattr(model, name) for name in there} | {"activation": model.activations[1]}
        found.append(([n for n in there if there[n] != here[n]], there, tower))
    differing, there, tower = min(
        found, key=lambda one: (len(one[0]), not _is_berts(model, one[2]))
    )
    if differing:
        name = differing[0].replace("activation", "transformer_activation")
        raise ValueError(
            f"open_clip has no text tower of transformers with these settings; the nearest, "
            f"{tower.name}, has {name} {there[differing[0]]}"
        )
    return tower


_SIZES = ("vocab_size", "transformer_positions")


def _is_berts(model: ModelConfig, tower: Tower | None) -> bool:
    """Whether a model's text tower has the sizes of the published one."""
    if tower is None:
        return False
    width = model.transformer_width
    here = (width, model.transformer_layers, int(width * model.transformer_mlp_ratio))
    here = (*here, model.vocab_size, model.text_positions)
    there = (tower.width, tower.layers, tower.hidden)
    return here == (*there, *(tower.settings[name] for name in _SIZES))
