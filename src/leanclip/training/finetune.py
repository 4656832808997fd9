"""Fine-tuning: locked groups, learning rate factors, low-rank updates, averaged weights.

    loaded model, FinetuneConfig -> Tuning -> factors (optimiser), after_step, weights (to write)

A tower's groups, from the input up: the stem with its embeddings, each block (of a ResNet: each
bottleneck), and the last norm with the pool and the projection. The loss's scalars are in no group.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from leanclip.config.model import ModelConfig
from leanclip.config.training import FinetuneConfig
from leanclip.errors import ConfigError
from leanclip.model import CLIP
from leanclip.model.lora import add_low_rank, merged_state
from leanclip.model.vit import VisionTransformer

log = logging.getLogger("leanclip")


class Group(NamedTuple):
    """A parameter's group."""

    tower: str  # "image" or "text"
    level: int  # 0 is next to the input
    last: int  # the level of the tower's last group


class Tuning:
    """A model prepared for fine-tuning, and its moving average.

    Args:
        model: with its weights loaded; changed in place.
        config: the settings.
        new: names of parameters that the loaded weights did not have.

    Raises:
        ConfigError: a setting does not fit the model, or nothing is left to train.
    """

    def __init__(self, model: CLIP, config: FinetuneConfig, new: Sequence[str] = ()) -> None:
        self.model, self.config = model, config
        _lock(model, config)
        if config.patch_dropout:
            if not isinstance(model.visual, VisionTransformer):
                raise ConfigError("finetune.patch_dropout: a ResNet has no patches; set it to 0")
            model.visual.patch_dropout = config.patch_dropout
        if config.lora_rank is not None:
            add_low_rank(model, config.lora_rank, config.lora_alpha or config.lora_rank)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not any(group_of(name, model.config) for name, _ in trained):
            raise ConfigError("finetune: nothing is left to train; lock fewer groups of a tower")
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and not _is_trained(module):
                module.eval()  # it goes on with the statistics that it was loaded with
        self.factors = {name: _factor(name, model.config, config, new) for name, _ in trained}
        self.average: dict[str, torch.Tensor] = {}
        if config.ema_decay is not None:
            self.average = {name: parameter.detach().clone() for name, parameter in trained}
        _log_trained(model)

    @torch.no_grad()
    def after_step(self, is_finite: torch.Tensor) -> None:
        """Set average = decay * average + (1 - decay) * weights, unless the step was skipped.

        `is_finite` () is the step's flag, which stays on the device.
        """
        if self.config.ema_decay is not None:
            weight = is_finite.float() * (1 - self.config.ema_decay)
            for name, average in self.average.items():
                average.lerp_(self.model.get_parameter(name), weight)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the model its averaged weights within the block, if there are any.

        A BatchNorm's statistics are averages already, and stay.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights to publish: the average if there is one, low-rank updates merged."""
        if not self.average:
            return merged_state(self.model)
        with self.averaged():
            return {name: tensor.clone() for name, tensor in merged_state(self.model).items()}

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors that resuming needs beside `weights`; empty if there are none."""
        if not self.average and self.config.lora_rank is None:
            return {}
        own = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        return own | {f"average.{name}": tensor for name, tensor in self.average.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Load `state`; False if `tensors` has none."""
        own = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        if not own:
            return False
        self.model.load_state_dict(own)
        for name, average in self.average.items():
            average.copy_(tensors[f"average.{name}"])
        return True

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self.average.items():
            parameter = self.model.get_parameter(name)
            current = parameter.clone()
            parameter.copy_(average)
            average.copy_(current)


def group_of(name: str, model: ModelConfig) -> Group | None:
    """The group of a parameter, by name; None for the loss's scalars."""
    if name.startswith("logit_"):
        return None
    if not name.startswith("visual."):
        last = model.transformer_layers + 1
        block = re.match(r"transformer\.resblocks\.(\d+)\.", name)
        is_last = name.startswith(("ln_final", "pooler", "text_projection"))
        return Group("text", last if is_last else 1 + int(block[1]) if block else 0, last)
    layers = model.vision_layers
    last = 1 + (layers if isinstance(layers, int) else sum(layers))
    if name.startswith(("visual.ln_post", "visual.proj", "visual.attnpool", "visual.attn_pool")):
        return Group("image", last, last)
    if block := re.match(r"visual\.transformer\.resblocks\.(\d+)\.", name):
        return Group("image", 1 + int(block[1]), last)
    if (block := re.match(r"visual\.layer(\d)\.(\d+)\.", name)) and not isinstance(layers, int):
        return Group("image", 1 + sum(layers[: int(block[1]) - 1]) + int(block[2]), last)
    return Group("image", 0, last)


def _lock(model: CLIP, config: FinetuneConfig) -> None:
    wanted = {"image": config.lock_image, "text": config.lock_text}
    for name, parameter in model.named_parameters():
        group = group_of(name, model.config)
        count = wanted[group.tower] if group else None
        if group is None or count is None:
            continue
        groups = group.last + 1
        if isinstance(count, int) and count > groups:
            raise ConfigError(
                f"finetune.lock_{group.tower}: {count} groups, but the {group.tower} tower has "
                f"{groups}; lock fewer, or all"
            )
        if not isinstance(count, int) or group.level < count:
            parameter.requires_grad_(False)


def _factor(name: str, model: ModelConfig, config: FinetuneConfig, new: Sequence[str]) -> float:
    """The factor of a parameter's learning rate."""
    group, factor = group_of(name, model), 1.0
    if group is not None and config.layer_decay is not None:
        factor = config.layer_decay ** (group.last - group.level)
    return factor * config.new_learning_rate_factor if name in new else factor


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _log_trained(model: CLIP) -> None:
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(count for count, is_trained in counts if is_trained)
    everything = sum(count for count, _ in counts)
    if trained < everything:
        log.info("training %s of %s parameters", f"{trained:,}", f"{everything:,}")
