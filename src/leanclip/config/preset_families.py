"""The named architectures of the families after CLIP; `presets.py` lists them with CLIP's.

Sizes are those of open_clip's model_configs and of the code they name: timm's SigLIP and
NaFlex towers, perception_models for PE-Core. Activations are those of that form, one a tower.
"""

from typing import Any

Arch = dict[str, Any]


def _siglip(patch: int, side: int, width: str, vocab: int, activations: str, **more: Any) -> Arch:
    """SigLIP and SigLIP 2 (arXiv 2303.15343, 2502.14786).

    Args:
        patch: side of a patch.
        side: of the image.
        width: of both towers, by its name.
        vocab: number of token ids.
        activations: of the vision and of the text tower, such as "gelu gelu_tanh".
        more: settings that differ.
    """
    vision, text = activations.split()
    return {
        "image_resolution": side,
        "vision_patch_size": patch,
        "vision_class_token": False,
        "vision_pool": "attn",
        "vision_projection": "none",
        "vision_norm_eps": 1e-6,
        "pre_norm": False,
        "patch_bias": True,
        "context_length": 64,
        "vocab_size": vocab,
        "transformer_causal": False,
        "transformer_pool": "last",
        "transformer_pad_id": 0 if vocab == 256_000 else 1,
        "transformer_norm_eps": 1e-6,
        "transformer_projection_bias": True,
        "activation": vision,
        "logit_bias": True,
        **_SIGLIP_WIDTHS[width],
        **({"transformer_activation": text} if text != vision else {}),
        **more,
    }


def _towers(width: int, layers: int, heads: int, **more: Any) -> Arch:
    """Vision and text towers of the same size."""
    return {
        "embed_dim": width,
        "vision_width": width,
        "vision_layers": layers,
        "vision_heads": heads,
        "transformer_width": width,
        "transformer_layers": layers,
        "transformer_heads": heads,
        **more,
    }


_SO400M = _towers(1152, 27, 16, vision_mlp_ratio=3.7362, transformer_mlp_ratio=3.7362)
_GIANT = {"embed_dim": 1536, "vision_width": 1536, "vision_layers": 40, "vision_mlp_ratio": 4.0}
_SIGLIP_WIDTHS: dict[str, Arch] = {
    "B": _towers(768, 12, 12),
    "L": _towers(1024, 24, 16),
    "SO400M": _SO400M,
    "gopt": _SO400M | _GIANT,
}
_V1, _I18N, _V2 = 32_000, 250_000, 256_000  # token ids
_EXACT, _TANH, _MIXED = "gelu gelu", "gelu_tanh gelu_tanh", "gelu gelu_tanh"
_NAFLEX = {"vision_positions": "resized"}  # of a grid of 16 x 16 patches

_SIGLIP: dict[str, Arch] = {
    "ViT-B-16-SigLIP": _siglip(16, 224, "B", _V1, _EXACT),
    "ViT-B-16-SigLIP-256": _siglip(16, 256, "B", _V1, _EXACT),
    "ViT-B-16-SigLIP-i18n-256": _siglip(16, 256, "B", _I18N, _EXACT),
    "ViT-B-16-SigLIP-384": _siglip(16, 384, "B", _V1, _EXACT),
    "ViT-B-16-SigLIP-512": _siglip(16, 512, "B", _V1, _EXACT),
    "ViT-L-16-SigLIP-256": _siglip(16, 256, "L", _V1, _EXACT),
    "ViT-L-16-SigLIP-384": _siglip(16, 384, "L", _V1, _EXACT),
    "ViT-SO400M-14-SigLIP": _siglip(14, 224, "SO400M", _V1, _EXACT, context_length=16),
    "ViT-SO400M-14-SigLIP-384": _siglip(14, 384, "SO400M", _V1, _EXACT),
    "ViT-SO400M-16-SigLIP-i18n-256": _siglip(
        16,
        256,
        "SO400M",
        _I18N,
        "gelu_tanh gelu",
        transformer_projection="none",
        transformer_projection_bias=False,
    ),
    "ViT-B-32-SigLIP2-256": _siglip(32, 256, "B", _V2, _TANH),
    "ViT-B-16-SigLIP2": _siglip(16, 224, "B", _V2, _MIXED),
    "ViT-B-16-SigLIP2-256": _siglip(16, 256, "B", _V2, _MIXED),
    "ViT-B-16-SigLIP2-384": _siglip(16, 384, "B", _V2, _MIXED),
    "ViT-B-16-SigLIP2-512": _siglip(16, 512, "B", _V2, _MIXED),
    "ViT-B-16-SigLIP2-naflex": _siglip(16, 256, "B", _V2, _TANH, **_NAFLEX),
    "ViT-L-16-SigLIP2-256": _siglip(16, 256, "L", _V2, _MIXED),
    "ViT-L-16-SigLIP2-384": _siglip(16, 384, "L", _V2, _MIXED),
    "ViT-L-16-SigLIP2-512": _siglip(16, 512, "L", _V2, _TANH),
    "ViT-SO400M-14-SigLIP2": _siglip(14, 224, "SO400M", _V2, _MIXED),
    "ViT-SO400M-14-SigLIP2-378": _siglip(14, 378, "SO400M", _V2, _MIXED),
    "ViT-SO400M-16-SigLIP2-256": _siglip(16, 256, "SO400M", _V2, _TANH),
    "ViT-SO400M-16-SigLIP2-384": _siglip(16, 384, "SO400M", _V2, _TANH),
    "ViT-SO400M-16-SigLIP2-512": _siglip(16, 512, "SO400M", _V2, _TANH),
    "ViT-SO400M-16-SigLIP2-naflex": _siglip(16, 256, "SO400M", _V2, _TANH, **_NAFLEX),
    "ViT-gopt-16-SigLIP2-256": _siglip(16, 256, "gopt", _V2, _TANH),
    "ViT-gopt-16-SigLIP2-384": _siglip(16, 384, "gopt", _V2, _TANH),
}


def _text(width: int, layers: int) -> Arch:
    return {
        "transformer_width": width,
        "transformer_heads": width // 64,
        "transformer_layers": layers,
    }


def _pe_core(patch: int, side: int, width: int, layers: int, heads: int, **text: int) -> Arch:
    """Perception Encoder's core models (arXiv 2504.13181)."""
    return {
        "embed_dim": text["transformer_width"],
        "image_resolution": side,
        "vision_patch_size": patch,
        "vision_width": width,
        "vision_layers": layers,
        "vision_heads": heads,
        "vision_pool": "attn",
        "vision_pool_heads": 8,
        "vision_positions": "rotary",
        "context_length": 32,
        "activation": "gelu",
        **text,
    }


_PE_CORE: dict[str, Arch] = {
    "PE-Core-T-16-384": _pe_core(16, 384, 192, 12, 3, **_text(512, 12)),
    "PE-Core-S-16-384": _pe_core(16, 384, 384, 12, 6, **_text(512, 12)),
    "PE-Core-B-16": _pe_core(16, 224, 768, 12, 12, **_text(1024, 24)),
    "PE-Core-L-14-336": _pe_core(14, 336, 1024, 24, 16, **_text(1024, 24)),
    "PE-Core-bigG-14-448": _pe_core(14, 448, 1536, 50, 16, **_text(1280, 24))
    | {
        "vision_class_token": False,
        "vision_mlp_ratio": 8960 / 1536,
        "vision_pool_mlp_ratio": 4.0,
        "context_length": 72,
    },
}


def changed(
    clip: dict[str, Arch], endings: dict[str, dict[str, Any]], *names: str
) -> dict[str, Arch]:
    """Architectures of CLIP with other settings: NAME + ending, for each ending."""
    return {
        name + ending: clip[name] | settings
        for name in names
        for ending, settings in endings.items()
    }


def families(clip: dict[str, Arch]) -> dict[str, Arch]:
    """The architectures, of which some are CLIP's (by name) with other settings."""
    worldwide = {"vocab_size": 901_629, "transformer_pool": "eos", "transformer_eos_id": 2}
    worldwide |= {"transformer_pad_id": 1}
    clipa = {"pre_norm": False, "vision_pool": "avg", "vision_norm_after_pool": True}
    clipa |= {"context_length": 32, "vocab_size": 32_000}
    clipa |= {"transformer_causal": False, "transformer_pool": "last"}
    coca = {"vision_pool": "queries", "vision_pool_queries": 256, "vision_pool_heads": 8}
    coca |= {"context_length": 76, "transformer_class_token": True, "transformer_pool": "last"}
    at_336, at_378 = {"image_resolution": 336}, {"image_resolution": 378}
    return {
        **changed(
            clip,
            {"-CLIPA": clipa, "-CLIPA-336": clipa | at_336},
            *("ViT-L-14", "ViT-H-14", "ViT-bigG-14"),
        ),
        **{f"coca_{name}": clip[name] | coca for name in ("ViT-B-32", "ViT-L-14")},
        **_SIGLIP,
        **_PE_CORE,
        **changed(
            clip,
            {"-worldwide": worldwide, "-worldwide-378": worldwide | at_378},
            *("ViT-H-14", "ViT-bigG-14"),
        ),
    }
