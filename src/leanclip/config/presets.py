"""Named architectures: name -> keys of `ModelConfig`.

The names and sizes are open_clip's. Of CLIP a plain name has exact GELU, as most LAION and DataComp
weights; `-quickgelu` has OpenAI's activation, for a ResNet in the text tower only.
"""

import difflib
from typing import Any

from leanclip.config.preset_families import families
from leanclip.errors import ConfigError


def _vit(
    patch_size: int, width: int, layers: int, embed_dim: int, text_layers: int = 12, **more: Any
) -> dict[str, Any]:
    """A ViT at 224 pixels; the text tower is as wide as the embedding."""
    return {
        "embed_dim": embed_dim,
        "image_resolution": 224,
        "vision_layers": layers,
        "vision_width": width,
        "vision_patch_size": patch_size,
        **_text(embed_dim, text_layers),
        **more,
    }


def _resnet(
    layers: tuple[int, int, int, int], width: int, resolution: int, embed_dim: int, text_width: int
) -> dict[str, Any]:
    """A ResNet by its stages and the width of its stem."""
    return {
        "embed_dim": embed_dim,
        "image_resolution": resolution,
        "vision_layers": layers,
        "vision_width": width,
        **_text(text_width, 12),
    }


def _text(width: int, layers: int) -> dict[str, Any]:
    """The text tower; its heads have 64 channels in every named model."""
    return {
        "transformer_width": width,
        "transformer_heads": width // 64,
        "transformer_layers": layers,
        "activation": "gelu",
    }


_EXACT_GELU: dict[str, dict[str, Any]] = {
    "ViT-B-32": _vit(32, 768, 12, 512),
    "ViT-B-32-256": _vit(32, 768, 12, 512, image_resolution=256),
    "ViT-B-16": _vit(16, 768, 12, 512),
    "ViT-B-16-plus-240": _vit(16, 896, 12, 640, image_resolution=240),
    "ViT-L-14": _vit(14, 1024, 24, 768),
    "ViT-L-14-336": _vit(14, 1024, 24, 768, image_resolution=336),
    "ViT-H-14": _vit(14, 1280, 32, 1024, 24, vision_heads=16),
    "ViT-H-14-378": _vit(14, 1280, 32, 1024, 24, vision_heads=16, image_resolution=378),
    "ViT-g-14": _vit(14, 1408, 40, 1024, 24, vision_heads=16, vision_mlp_ratio=4.3637),
    "ViT-bigG-14": _vit(14, 1664, 48, 1280, 32, vision_heads=16, vision_mlp_ratio=4.9231),
    "RN50": _resnet((3, 4, 6, 3), 64, 224, 1024, 512),
    "RN101": _resnet((3, 4, 23, 3), 64, 224, 512, 512),
    "RN50x4": _resnet((4, 6, 10, 6), 80, 288, 640, 640),
    "RN50x16": _resnet((6, 8, 18, 8), 96, 384, 768, 768),
    "RN50x64": _resnet((3, 15, 36, 10), 128, 448, 1024, 1024),
}

_EXACT_ONLY = ("ViT-B-32-256", "ViT-B-16-plus-240", "ViT-g-14")  # in open_clip
_FAMILIES = families(_EXACT_GELU)

PRESETS: dict[str, dict[str, Any]] = {
    name + ending: arch | {"activation": activation}
    for name, arch in _EXACT_GELU.items()
    for ending, activation in (("", "gelu"), ("-quickgelu", "quick_gelu"))
    if not (ending and name in _EXACT_ONLY)
} | _FAMILIES
PRESETS["ViT-H-14-worldwide-quickgelu"] = _FAMILIES["ViT-H-14-worldwide"] | {
    "activation": "quick_gelu"
}


def preset(name: str) -> dict[str, Any]:
    """The architecture of a named model, as keys of `ModelConfig`.

    Raises:
        ConfigError: there is no model of that name.
    """
    if name not in PRESETS:
        by_lower = {known.lower(): known for known in PRESETS}
        close = difflib.get_close_matches(name.lower().replace("/", "-"), by_lower, n=1, cutoff=0.6)
        meant = f"; did you mean {by_lower[close[0]]}?" if close else ""
        raise ConfigError(f"{name}: no such model{meant} (list them with: leanclip models)")
    return dict(PRESETS[name])
