"""Models, captions and batches of the benchmarks; the same weights for leanclip and its peers."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from captions import plain_caption
from leanclip.config.presets import preset
from leanclip.config.schema import load_config
from leanclip.config.sections import to_plain
from leanclip.data.batch import Batch, trim
from leanclip.data.prompts import PROMPTS
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.text import Tokenizer
from leanclip.preprocess.tokenizer import END, START, tokenize
from leanclip.weights import Weights, save_weights, write_weights

ROOT = Path(__file__).parent.parent
QUICKSTART = "quickstart"
FOODS = PROMPTS["food101"].classes
_ADJECTIVES = ("good", "bad", "bright", "dark", "blurry", "clean", "dirty", "low resolution")
_KINDS = (
    "a {adjective} photo of a {{}}.",
    "a {adjective} photo of the {{}}.",
    "a photo of a {adjective} {{}}.",
    "a photo of the {adjective} {{}}.",
    "a {adjective} picture of one {{}}.",
    "a {adjective} drawing of a {{}}.",
    "a {adjective} close-up photo of the {{}}.",
    "a {adjective} sculpture of a {{}}.",
    "itap of a {adjective} {{}}.",
    "a {adjective} {{}} in a video game.",
)
MANY_TEMPLATES = tuple(kind.format(adjective=word) for kind in _KINDS for word in _ADJECTIVES)
TINY = {
    "embed_dim": 16,
    "image_resolution": 32,
    "vision_layers": 2,
    "vision_width": 64,
    "vision_patch_size": 16,
    "context_length": 77,
    "vocab_size": 49408,
    "transformer_width": 32,
    "transformer_heads": 2,
    "transformer_layers": 2,
    "activation": "quick_gelu",
}
_SIGLIP = {  # what SigLIP's towers have in common
    "vision_class_token": False,
    "vision_pool": "attn",
    "vision_projection": "none",
    "vision_norm_eps": 1e-6,
    "pre_norm": False,
    "patch_bias": True,
    "context_length": 64,
    "transformer_causal": False,
    "transformer_pool": "last",
    "transformer_norm_eps": 1e-6,
    "transformer_projection_bias": True,
    "activation": "gelu_tanh",
    "logit_bias": True,
}
SIGLIP = {  # with CLIP's vocabulary
    "siglip-B-16": preset("ViT-B-16")
    | {"embed_dim": 768, "transformer_width": 768, "transformer_heads": 12, **_SIGLIP},
    "siglip-tiny": TINY | {"embed_dim": 64, "transformer_width": 64, **_SIGLIP},
}


def architecture(name: str) -> dict[str, Any]:
    """Of a preset, of a quickstart's config, of SigLIP, or "tiny"."""
    if name == "tiny":
        return dict(TINY)
    if name in SIGLIP:
        return dict(SIGLIP[name])
    if name.endswith(QUICKSTART):
        model = load_config(str(ROOT / f"configs/{name}.yaml")).model
        assert model is not None
        return to_plain(model)
    return preset(name)


def random_model(name: str) -> CLIP:
    """With the same random weights every time."""
    torch.manual_seed(0)
    return CLIP(**architecture(name))


def write_model(name: str, folder: Path, format: str = "leanclip") -> Path:
    """The random model's weights on disk."""
    model = random_model(name)
    state = {key: value.detach() for key, value in model.state_dict().items()}
    preprocess = Preprocess(model.config.image_resolution)
    if format == "leanclip":
        folder.mkdir(parents=True)
        save_weights(folder, state, model.config, preprocess, provenance="a benchmark")
    else:
        write_weights(Weights(folder, "leanclip", state, model.config, preprocess), folder, format)
    return folder


def realistic_captions(count: int, seed: int = 0) -> list[str]:
    """Sentences as COCO's, from the grammar of captions.py."""
    rng = random.Random(seed)
    return [plain_caption(rng) for _ in range(count)]


def tokens_of(captions: str, count: int, context: int = 77) -> torch.Tensor:
    """Ids (count, context): "realistic", or "full": as long as the context."""
    if captions == "realistic":
        return tokenize(realistic_captions(count), context)
    ids = torch.randint(1000, 40000, (count, context), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = START, END
    return ids


def lengths_of(tokens: torch.Tensor) -> torch.Tensor:
    """(B,) tokens of each caption, with the start and the end."""
    return (tokens == END).int().argmax(dim=1) + 1


def training_batch(side: int, tokens: torch.Tensor) -> Batch:
    """Random pixels, and captions as the loader gives them."""
    size = len(tokens)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    return Batch(pixels, trim(tokens, Tokenizer()), torch.arange(size), torch.full((size,), -1))


def from_transformers(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of CLIPModel or SiglipModel, their gradients for example, by our names."""
    from leanclip.weights.huggingface import from_state_dict

    return from_state_dict(Path("transformers"), tensors, None).tensors


def open_clip_model(arch: dict[str, Any]) -> Callable[[], torch.nn.Module] | None:
    """A maker of open_clip's model of that architecture; None where it cannot be imported."""
    try:
        from open_clip.model import CLIP as Theirs  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    vision = {
        "image_size": arch["image_resolution"],
        "layers": arch["vision_layers"],
        "width": arch["vision_width"],
        "patch_size": arch["vision_patch_size"],
        "head_width": arch["vision_width"]
        // (arch.get("vision_heads") or arch["vision_width"] // 64),
    }
    text = {
        "context_length": arch.get("context_length", 77),
        "vocab_size": arch.get("vocab_size", 49408),
        "width": arch["transformer_width"],
        "heads": arch["transformer_heads"],
        "layers": arch["transformer_layers"],
    }
    is_quick = arch.get("activation", "quick_gelu") == "quick_gelu"
    return lambda: Theirs(arch["embed_dim"], vision, text, quick_gelu=is_quick)
