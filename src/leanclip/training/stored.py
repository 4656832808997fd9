"""What is stored with weights besides them: how the model's images and texts are prepared.

settings, the newest checkpoint or the weights to load -> Preprocess, Tokenizer
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from leanclip.config.schema import Config
from leanclip.distributed.collectives import from_first
from leanclip.errors import ConfigError, WeightsError
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.text import Tokenizer
from leanclip.weights import read_preprocess, read_tokenizer, read_weights

T = TypeVar("T")


def model_preprocess(config: Config, source: str | None = None) -> Preprocess:
    """The evaluation transform of the model that a configuration describes.

    What `data` leaves out of mean, std, resize and interpolation is as stored with the weights:
    those of `source`, else of the run that is resumed, else of `load`; else as OpenAI's. Every rank
    calls this, and the first one reads, because only it may have the run's folder.
    """
    data, resolution = config.data, config.model.image_resolution
    stored = from_first(
        lambda: (
            _stored(config, read_preprocess) or _loaded_file(config)
            if source is None
            else read_preprocess(source)
        )
    )
    base = own = Preprocess(resolution) if stored is None else stored.at(resolution)
    if (data.resize or base.resize) == "naflex":
        base = _naflex(config, base)
    elif data.patches is not None:
        raise ConfigError(
            f"data.patches: goes with data.resize naflex, found {data.resize or base.resize}; set "
            f"data.resize: naflex, or leave it out"
        )
    elif data.resize is not None and data.resize != base.resize:
        base = Preprocess(resolution, interpolation=base.interpolation, resize=data.resize)
    return replace(
        base,
        mean=data.mean or own.mean,
        std=data.std or own.std,
        interpolation=data.interpolation or base.interpolation,
    )


def _naflex(config: Config, stored: Preprocess) -> Preprocess:
    """The transform of a model that takes images as patches.

    Raises:
        ConfigError: the model does not, or only of another size.
    """
    model, resolution = config.model, config.model.image_resolution
    if model.vision_positions != "resized":
        raise ConfigError(
            f"data.resize: naflex needs a model with vision_positions resized, found "
            f"{model.vision_positions}; set another data.resize, or model.vision_positions: "
            f"resized, vision_class_token: false and vision_pool: attn"
        )
    patch_size = model.vision_patch_size
    assert patch_size is not None
    if stored.patch_size not in (None, patch_size):
        raise ConfigError(
            f"model.vision_patch_size: {patch_size}, the loaded weights take patches of "
            f"{stored.patch_size} pixels; set it to {stored.patch_size}"
        )
    most = stored.max_patches or (resolution // patch_size) ** 2
    return Preprocess(
        resolution,
        interpolation=stored.interpolation,
        resize="naflex",
        patch_size=patch_size,
        max_patches=max(config.data.patches or (most,)),
    )


def _stored(config: Config, read: Callable[[str | Path], T | None]) -> T | None:
    """What `read` finds with the newest intact checkpoint, else with the weights to load."""
    for path in sorted(Path(config.output_dir).glob("checkpoints/step-*"), reverse=True):
        with suppress(WeightsError):  # a damaged one is not resumed from either
            return read(path)
    return None if config.load is None else read(config.load)


def _loaded_file(config: Config) -> Preprocess | None:
    """What the format of a single file implies (PE-Core's), for a run that starts from it."""
    if config.load is None:
        return None
    return read_weights(config.load, arch=config.load_arch).preprocess


def model_tokenizer(config: Config, source: str | None = None) -> Tokenizer:
    """The tokeniser of the model that a configuration describes.

    As stored with the weights, as `model_preprocess`; else CLIP's. Every rank calls this.
    """
    stored = from_first(
        lambda: _stored(config, read_tokenizer) if source is None else read_tokenizer(source)
    )
    return (stored or Tokenizer()).at(config.model.context_length)
