"""The cost of a model: parameters and FLOPs of a forward pass."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from leanclip.config.model import ModelConfig
from leanclip.config.presets import PRESETS
from leanclip.config.sections import parse, to_plain
from leanclip.model.clip import CLIP
from leanclip.model.skip_init import meta_device
from leanclip.preprocess.patches import Patches


def forward_gflops(
    config: ModelConfig, length: int | None = None, patches: int | None = None
) -> float:
    """10⁹ FLOPs of a forward pass of one image of `patches` and one caption of `length` tokens.

    None: a square of the model's resolution; the context length. Matrix products, convolutions and
    attention are counted, a multiply-add as two, on the meta device. The last block computes only
    the token that is read; published counts include the others.
    """
    return _cost(config, length, patches)[1]


def summaries(word: str = "") -> Iterator[dict[str, Any]]:
    """Parameters, GFLOPs, resolution and activation of the presets whose name contains a word.

    All of them take seconds.
    """
    costs: dict[str, tuple[int, float]] = {}  # by the plain name: activations are not counted
    for name, arch in PRESETS.items():
        if word.lower() not in name.lower():
            continue
        config, plain = parse(ModelConfig, arch, where=name), name.removesuffix("-quickgelu")
        if plain not in costs:
            costs[plain] = _cost(config)
        parameters, gflops = costs[plain]
        yield {
            "name": name,
            "parameters_millions": round(parameters / 1e6, 2),
            "forward_gflops": round(gflops, 2),
            "image_resolution": config.image_resolution,
            "activation": config.activation,
        }


def _cost(
    config: ModelConfig, length: int | None = None, patches: int | None = None
) -> tuple[int, float]:
    """The number of parameters, and the GFLOPs of a forward pass."""
    with meta_device():
        model = CLIP(**to_plain(config)).eval()
        pixels = torch.empty(1, 3, config.image_resolution, config.image_resolution)
        if patches is not None:
            assert config.vision_patch_size is not None
            values = torch.empty(1, patches, 3 * config.vision_patch_size**2)
            pixels = Patches(values, torch.tensor([[1, patches]], device="cpu"))
        tokens = torch.empty(1, length or config.context_length, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixels, tokens)
    return model.parameter_count(), counter.get_total_flops() / 1e9
