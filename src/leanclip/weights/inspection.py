"""A summary of a weights file."""

from collections import Counter

from leanclip.config.model import ModelConfig
from leanclip.config.presets import PRESETS
from leanclip.config.sections import parse, to_plain
from leanclip.weights.weights import Weights


def inspection(weights: Weights) -> str:
    """A line each on format, architecture, activation, parameters, types, temperature and more."""
    tensors, model = weights.tensors, weights.model
    types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    scale = tensors.get("logit_scale")
    lines = {
        "source": str(weights.source),
        "format": weights.format,
        "architecture": _name(model) if model else "unknown; name it with --arch",
        "activation": " and ".join(dict.fromkeys(model.activations)) if model else "unknown",
        "parameters": f"{sum(t.numel() for n, t in tensors.items() if 'running_' not in n):,}",
        "tensors": f"{len(tensors)} of " + ", ".join(f"{k} ({n})" for k, n in types.items()),
        "temperature": "none" if scale is None else f"cosines x {scale.float().exp().mean():.2f}",
        "preprocessing": str(weights.preprocess or "unknown"),
        "besides tensors": ", ".join(weights.unexpected) or "nothing",
    }
    lines |= {f"note {i}": note for i, note in enumerate(weights.notes, 1)}
    if model:
        lines["settings"] = ", ".join(f"{k}={v}" for k, v in to_plain(model).items())
    return "\n".join(f"{name:16} {text}" for name, text in lines.items())


def _name(model: ModelConfig) -> str:
    """The name of an architecture's preset, or a short description."""
    for name, arch in PRESETS.items():
        known = parse(ModelConfig, arch, where=name)
        same = {"vision_heads": known.vision_heads}
        for tower in ("vision", "transformer"):  # a ratio read from tensors is rounded
            width, key = getattr(known, f"{tower}_width"), f"{tower}_mlp_ratio"
            if int(width * getattr(model, key)) == int(width * getattr(known, key)):
                same[key] = getattr(known, key)
        if (
            known.attention_heads == model.attention_heads
            and model.model_copy(update=same) == known
        ):
            return name
    kind = "ResNet" if isinstance(model.vision_layers, tuple) else f"ViT /{model.vision_patch_size}"
    return f"{kind}, {model.image_resolution} px, width {model.vision_width}"
