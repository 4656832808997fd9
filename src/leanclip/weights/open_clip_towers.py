"""The towers that open_clip takes from timm and transformers, as data: their names and settings.

A name determines what no tensor shows (activation, eps, heads), and the sizes of the published
tower. open_clip builds those sizes; weights of other sizes are read all the same.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from leanclip.weights.names import Rule, bert_rules

_BLOCKS = (  # timm's
    ("ln_1.*", "norm1.*"),
    ("ln_2.*", "norm2.*"),
    ("attn.in_proj_*", "attn.qkv.*"),
    ("attn.out_proj.*", "attn.proj.*"),
    ("mlp.c_fc.*", "mlp.fc1.*"),
    ("mlp.c_proj.*", "mlp.fc2.*"),
)
_TRUNK, _POOL, _BERT = "visual.trunk", "visual.trunk.attn_pool", "text.transformer"
TIMM_RULES = (
    Rule("visual.conv1.*", f"{_TRUNK}.patch_embed.proj.*"),
    Rule("visual.class_embedding", f"{_TRUNK}.cls_token", leading=2),
    Rule("visual.positional_embedding", f"{_TRUNK}.pos_embed", leading=1),
    Rule("visual.ln_pre.*", f"{_TRUNK}.norm_pre.*"),
    *(Rule(f"visual.transformer.resblocks.*.{a}", f"{_TRUNK}.blocks.*.{b}") for a, b in _BLOCKS),
    Rule("visual.attn_pool.probe", f"{_POOL}.latent"),
    Rule("visual.attn_pool.attn.in_proj_*", _POOL + ".{q,kv}.*"),
    Rule("visual.attn_pool.attn.out_proj.*", f"{_POOL}.proj.*"),
    Rule("visual.attn_pool.layernorm.*", f"{_POOL}.norm.*"),
    Rule("visual.attn_pool.mlp.c_fc.*", f"{_POOL}.mlp.fc1.*"),
    Rule("visual.attn_pool.mlp.c_proj.*", f"{_POOL}.mlp.fc2.*"),
)
NORM_RULES = (  # the last LayerNorm, by vision_norm_after_pool
    Rule("visual.ln_post.*", f"{_TRUNK}.norm.*"),
    Rule("visual.ln_post.*", f"{_TRUNK}.fc_norm.*"),
)
HEAD_RULES = {  # the projection, by timm_proj
    "linear": (
        Rule("visual.proj", "visual.head.proj.weight", transpose=True),
        Rule("visual.proj_bias", "visual.head.proj.bias"),
    ),
    "": (
        Rule("visual.proj", f"{_TRUNK}.head.weight", transpose=True),
        Rule("visual.proj_bias", f"{_TRUNK}.head.bias"),
    ),
    "none": (),
}
BERT_RULES = (*bert_rules(_BERT), Rule("pooler.*", f"{_BERT}.pooler.dense.*"))
PROJECTION_RULES = {  # of a text tower of transformers, by hf_proj_type
    "mlp": (
        Rule("text_projection_hidden", "text.proj.0.weight", transpose=True),
        Rule("text_projection", "text.proj.2.weight", transpose=True),
    ),
    "linear": (Rule("text_projection", "text.proj.weight", transpose=True),),
    "none": (),
}
TEXT_RULES = {  # of open_clip's own text tower in a CustomTextCLIP, by proj_bias
    True: (
        Rule("text_projection", "text.text_projection.weight", transpose=True),
        Rule("text_projection_bias", "text.text_projection.bias"),
    ),
    False: (Rule("text_projection", "text.text_projection"),),
}
OWN_TEXT_RULES = tuple(
    Rule(name, f"text.{name}")
    for name in (
        *("token_embedding.weight", "positional_embedding", "cls_emb", "ln_final.*"),
        "transformer.resblocks.**",
    )
)
READ_RULES = (  # of all towers: their names differ
    *TIMM_RULES,
    *NORM_RULES,
    *(rule for rules in HEAD_RULES.values() for rule in rules),
    *BERT_RULES,
    *(rule for rules in PROJECTION_RULES.values() for rule in rules),
    *(rule for rules in TEXT_RULES.values() for rule in rules),
    *OWN_TEXT_RULES,
)


@dataclass(frozen=True)
class Tower:
    """What a name determines, in the keys of ModelConfig without the tower's prefix."""

    name: str
    width: int
    layers: int
    heads: int
    hidden: int
    settings: Mapping[str, Any] = field(default_factory=dict)  # in ModelConfig's keys

    def heads_at(self, width: int) -> int:
        """Heads of a tower of this name at any width, which no tensor shows.

        Those of the published width; else of 64 channels, and at least two where the pooling is
        attention's, as in small models of these towers.
        """
        if width == self.width:
            return self.heads
        return max(2 if self.settings.get("vision_pool") == "attn" else 1, width // 64)


_SIZES = {  # width, blocks, heads, hidden width of the MLPs
    "tiny": (192, 12, 3, 768),
    "xsmall": (256, 10, 4, 1024),
    "small": (384, 12, 6, 1536),
    "medium": (512, 12, 8, 2048),
    "betwixt": (640, 12, 10, 2560),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
    "giantopt": (1536, 40, 16, 6144),
    "gigantic": (1664, 48, 16, 8192),
    "pe_core_tiny": (192, 12, 3, 768),
    "pe_core_small": (384, 12, 6, 1536),
    "pe_core_base": (768, 12, 12, 3072),
    "pe_core_large": (1024, 24, 16, 4096),
    "pe_core_gigantic": (1536, 50, 16, 8960),
}
_PLAIN = {"pre_norm": False, "patch_bias": True, "vision_norm_eps": 1e-6, "activation": "gelu"}
_SIGLIP = _PLAIN | {"vision_class_token": False, "vision_pool": "attn"}
_CLIP = {"pre_norm": True, "patch_bias": False, "vision_norm_eps": 1e-5, "activation": "gelu"}
_PE_CORE = _CLIP | {"vision_pool": "attn", "vision_pool_heads": 8, "vision_positions": "rotary"}
_KINDS: dict[str, dict[str, Any]] = {
    "": _PLAIN,
    "clip_": _CLIP,
    "clip_quickgelu_": _CLIP | {"activation": "quick_gelu"},
    "siglip_": _SIGLIP,
    "siglip_gap_": _SIGLIP | {"vision_pool": "avg"},
}
_TANH = re.compile(r"base_patch32|large_patch16_.*512|so400m_patch16|giantopt")  # of SigLIP's
_NAME = re.compile(rf"vit_({'|'.join(_SIZES)})_patch(\d+)_({'|'.join(_KINDS)})(\d+)")
_WRITTEN = """
    vit_base_patch32_224 vit_base_patch16_224 vit_large_patch16_224 vit_large_patch32_224
    vit_small_patch16_224 vit_tiny_patch16_224 vit_base_patch8_224 vit_base_patch16_384
    vit_base_patch32_384 vit_large_patch16_384 vit_small_patch32_224 vit_huge_patch14_224
    vit_base_patch32_clip_224 vit_base_patch16_clip_224 vit_large_patch14_clip_224
    vit_large_patch14_clip_336 vit_huge_patch14_clip_224 vit_gigantic_patch14_clip_224
    vit_base_patch32_clip_quickgelu_224 vit_base_patch16_clip_quickgelu_224
    vit_large_patch14_clip_quickgelu_224 vit_large_patch14_clip_quickgelu_336
    vit_huge_patch14_clip_quickgelu_224 vit_huge_patch14_clip_quickgelu_378
    vit_base_patch16_siglip_224 vit_base_patch16_siglip_256 vit_base_patch16_siglip_384
    vit_base_patch16_siglip_512 vit_base_patch32_siglip_256 vit_large_patch16_siglip_256
    vit_large_patch16_siglip_384 vit_large_patch16_siglip_512 vit_so400m_patch14_siglip_224
    vit_so400m_patch14_siglip_378 vit_so400m_patch14_siglip_384 vit_so400m_patch16_siglip_256
    vit_so400m_patch16_siglip_384 vit_so400m_patch16_siglip_512 vit_giantopt_patch16_siglip_256
    vit_giantopt_patch16_siglip_384
    vit_base_patch16_siglip_gap_224 vit_base_patch16_siglip_gap_256
    vit_base_patch16_siglip_gap_384 vit_base_patch16_siglip_gap_512
    vit_base_patch32_siglip_gap_256 vit_large_patch16_siglip_gap_256
    vit_large_patch16_siglip_gap_384 vit_large_patch16_siglip_gap_512
    vit_so400m_patch14_siglip_gap_224 vit_so400m_patch14_siglip_gap_378
    vit_so400m_patch16_siglip_gap_256 vit_so400m_patch16_siglip_gap_384
    vit_giantopt_patch16_siglip_gap_256 vit_giantopt_patch16_siglip_gap_384
    vit_pe_core_tiny_patch16_384 vit_pe_core_small_patch16_384 vit_pe_core_base_patch16_224
    vit_pe_core_large_patch14_336 vit_pe_core_gigantic_patch14_448
"""  # timm's names that models are written with; others of the pattern are read
_HF_COMMON = {
    "transformer_post_norm": True,
    "transformer_padding_mask": True,
    "transformer_causal": False,
    "activation": "gelu",
}
_BERT_KIND = _HF_COMMON | {
    "transformer_norm_eps": 1e-12,
    "transformer_pad_id": 0,
    "transformer_token_types": 2,
    "transformer_first_position": 0,
}
_ROBERTA_KIND = _HF_COMMON | {
    "transformer_norm_eps": 1e-5,
    "transformer_pad_id": 1,
    "transformer_token_types": 1,
    "transformer_first_position": 2,
}
_HF_KINDS = (  # the first pattern that a name has, in lower case
    (re.compile(r"roberta-xl|distil|deberta|albert|mobilebert|squeezebert|modernbert|nomic"), None),
    (re.compile(r"roberta|camembert"), _ROBERTA_KIND),
    (re.compile(r"bert"), _BERT_KIND),
)
_HF_SIZES = {  # width, blocks, ids, positions
    "bert-base-uncased": (768, 12, 30522, 512),
    "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract": (768, 12, 30522, 512),
    "bert-large-uncased": (1024, 24, 30522, 512),
    "roberta-base": (768, 12, 50265, 514),
    "roberta-large": (1024, 24, 50265, 514),
    "xlm-roberta-base": (768, 12, 250002, 514),
    "xlm-roberta-large": (1024, 24, 250002, 514),
}
_REFUSED = (  # what a name begins with or has: what that is, what to use instead
    ("eva", "EVA-CLIP", "SigLIP 2, DFN or PE-Core of its size"),
    ("convnext", "ConvNeXt", "a ViT of the same data, such as ViT-B-16 or ViT-L-14"),
    ("vitamin", "ViTamin", "ViT-L-14 of DataComp, or SigLIP 2"),
    ("swin", "Swin", "ViT-B-16"),
    ("fastvit", "MobileCLIP's FastViT", "MobileCLIP2-L-14, ViT-B-32 or PE-Core-T-16-384"),
    ("vit_base_mci", "MobileCLIP's ViT with a convolutional stem", "MobileCLIP2-L-14 or ViT-B-16"),
    ("naflex", "NaFlex in timm's form", "Hugging Face's, google/siglip2-base-patch16-naflex"),
    ("nllb", "NLLB", "a multilingual SigLIP 2 or MetaCLIP 2"),
    ("mt5", "mT5", "xlm-roberta-base-ViT-B-32, a multilingual SigLIP 2 or MetaCLIP 2"),
    ("modernbert", "ModernBERT", "roberta-ViT-B-32, or a text tower of open_clip's own"),
)


def timm_tower(name: str) -> Tower | None:
    """The vision tower of a timm name, with or without a tag of weights; None: not supported."""
    match = _NAME.fullmatch(name.partition(".")[0])
    if match is None:
        return None
    size, patch, kind, side = match.groups()
    settings = {"vision_patch_size": int(patch), "image_resolution": int(side)} | _KINDS[kind]
    if kind.startswith("siglip") and _TANH.search(name):
        settings["activation"] = "gelu_tanh"
    if size.startswith("pe_core"):
        settings |= _PE_CORE | {"vision_rotary_grid": int(side) // int(patch)}
        if size.endswith("gigantic"):
            settings |= {"vision_class_token": False, "vision_pool_mlp_ratio": 4.0}
    return Tower(name, *_SIZES[size], settings)


def timm_towers() -> list[Tower]:
    """The vision towers that models are written with."""
    return [tower for name in _WRITTEN.split() if (tower := timm_tower(name))]


def hf_tower(name: str) -> Tower | None:
    """The text tower of a name on Hugging Face's hub; its sizes are 0 where they are not known."""
    kind = next((kind for pattern, kind in _HF_KINDS if pattern.search(name.lower())), None)
    if kind is None:
        return None
    width, layers, ids, positions = _HF_SIZES.get(name.removeprefix("FacebookAI/"), (0, 0, 0, 0))
    sizes = {"vocab_size": ids, "transformer_positions": positions}
    return Tower(name, width, layers, width // 64, 4 * width, {**kind, **sizes})


def hf_towers() -> list[Tower]:
    """The text towers that models are written with."""
    return [tower for name in _HF_SIZES if (tower := hf_tower(name))]


def refusal(fieldname: str, name: str) -> str:
    """The message on a tower that is not supported."""
    for mark, what, instead in _REFUSED:
        if mark in name.lower():
            return f"{fieldname}: {name!r} ({what}) is not supported; use instead: {instead}"
    return (
        f"{fieldname}: {name!r} is not supported; use instead: a model with open_clip's own towers"
    )
