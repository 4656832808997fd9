"""Read weights of any format, recognised by content: a file, a folder, a run, a name, a hub id.

source -> locate -> folder: its config says the format / file: its bytes, then its names
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from leanclip.config.model import ModelConfig
from leanclip.config.sections import parse
from leanclip.config.strict_yaml import load_yaml
from leanclip.errors import ConfigError, WeightsError, one_line
from leanclip.io.files import LFS_POINTER, is_lfs_file
from leanclip.model.presets import PRESETS, preset
from leanclip.preprocess.images import Preprocess
from leanclip.weights import huggingface, native, open_clip, openai, passl
from leanclip.weights.files import sniff
from leanclip.weights.hub import locate, locate_settings
from leanclip.weights.numpy_pickle import read_numpy_pickle
from leanclip.weights.paddle import paddle_arrays
from leanclip.weights.processor import read_processor
from leanclip.weights.state_dict import (
    INDEX,
    TORCHSCRIPT,
    find_file,
    read_json,
    read_state_dict,
)
from leanclip.weights.weights import Weights

_ODD = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, OSError)
Architecture = ModelConfig | dict[str, Any] | str | Path


def read_weights(source: str | Path, *, arch: Architecture | None = None) -> Weights:
    """Read weights; nothing in the source is ever executed.

    Args:
        source: a file or folder of any format, a run's folder (its newest checkpoint), the name
            of a file that OpenAI publishes ("ViT-B/32"), or a hub id ("hf-hub:owner/name"). Of a
            file that holds several models: FILE#KEY; "FILE#ema" is the moving average.
        arch: the architecture, which wins over what the source says: settings by name, a
            preset's name, or a JSON or YAML file of settings.

    Raises:
        WeightsError: there is no such source, it is damaged, holds more than data, or is of no
            known format.
        ConfigError: `arch` is none.
    """
    given = read_architecture(arch) if arch is not None else None
    name, key = _split_key(str(source))
    path = locate(name)
    if key is not None and path.is_dir():
        raise WeightsError(f"{source}: #{key} chooses among models in one file, this is a folder")
    try:
        if not path.is_dir():
            weights = _read_file(path, given, key)
        else:
            weights = _read_folder(_newest_checkpoint(path) or path, given)
        return _fitted(weights, given is not None)
    except _ODD as error:  # what no reader foresaw in a stranger's file is still its fault
        raise WeightsError(f"{path}: cannot be read: {one_line(error)}") from error


def read_preprocess(source: str | Path) -> Preprocess | None:
    """How a folder of weights prepares images, without reading its tensors; None: it has no word.

    Raises:
        WeightsError: what it has is damaged, or not done here.
    """
    path = locate_settings(source)
    if path is None:
        return None
    folder = _newest_checkpoint(path) or path
    if (folder / open_clip.CONFIG).is_file():
        return open_clip.read_preprocess(folder)
    if not (folder / "config.json").is_file():
        return None
    facts = read_json(folder / "config.json")
    if facts.get("format") == native.FORMAT:
        return native.read_preprocess(folder, facts)
    return read_processor(folder, None)


def _fitted(weights: Weights, is_said: bool) -> Weights:
    """Scalars as such; the preprocessing at the model's resolution, where that was said."""
    scalars = {
        name: tensor.reshape(())  # FSDP makes vectors of them
        for name, tensor in weights.tensors.items()
        if name in ("logit_scale", "logit_bias") and tensor.numel() == 1
    }
    weights = replace(weights, tensors=weights.tensors | scalars)
    model, preprocess = weights.model, weights.preprocess
    if model is None or preprocess is None or preprocess.resolution == model.image_resolution:
        return weights
    if not is_said:
        raise WeightsError(
            f"{weights.source}: prepares images of {preprocess.resolution} pixels a side, the "
            f"model takes {model.image_resolution}"
        )
    return replace(weights, preprocess=preprocess.at(model.image_resolution))


def _split_key(source: str) -> tuple[str, str | None]:
    """FILE and KEY of FILE#KEY."""
    name, mark, key = source.rpartition("#")
    return (name, key) if mark and key and not Path(source).exists() else (source, None)


def _newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of a run's folder that `latest` names, or the one of the most steps."""
    folder = run / "checkpoints"
    found = sorted(folder.glob("step-*"))
    latest = folder / "latest"
    named = [path for path in found if latest.is_file() and path.name == latest.read_text().strip()]
    return [*found, *named][-1] if found else None


def read_architecture(arch: Architecture) -> ModelConfig:
    """Settings of a model, ours or open_clip's, from a dict, a file, or a preset's name.

    Raises:
        ConfigError: a setting is wrong, or there is neither such a preset nor such a file.
    """
    if isinstance(arch, ModelConfig):
        return arch
    if isinstance(arch, dict):
        return _parse_architecture(arch, "arch")
    name, path = str(arch), Path(arch)
    if name in PRESETS or not (path.suffix or path.exists()):
        return parse(ModelConfig, preset(name), where=name)
    if is_lfs_file(path):
        raise ConfigError(f"{name}: {LFS_POINTER}")
    try:
        values = load_yaml(path.read_text(encoding="utf-8"), where=name)  # JSON is YAML
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: cannot be read: {error}") from None
    for key in ("model", "model_cfg"):  # a whole config, ours or open_clip's
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: holds no settings of a model")
    return _parse_architecture(values, name)


def _parse_architecture(values: dict[str, Any], name: str) -> ModelConfig:
    if not open_clip.is_architecture(values):
        return parse(ModelConfig, values, where=name)
    try:
        return open_clip.architecture(values)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _read_folder(folder: Path, arch: ModelConfig | None) -> Weights:
    if (folder / open_clip.CONFIG).is_file():
        return open_clip.read_folder(folder, arch)
    if not (folder / "config.json").is_file():
        file = find_file(folder, (*huggingface.FILES, *open_clip.FILES))
        if file is not None and arch is not None:
            return _read_file(file, arch, None)
        raise WeightsError(
            f"{folder}: no config.json, {open_clip.CONFIG} or checkpoints in it; name a file, "
            f"or say with --arch what is in it"
        )
    facts = read_json(folder / "config.json")
    if facts.get("format") == native.FORMAT:
        return native.read_folder(folder, facts, arch)
    if facts.get("model_type") == "clip":
        return huggingface.read_folder(folder, facts, arch)
    raise WeightsError(
        f"{folder / 'config.json'}: neither leanclip's nor Hugging Face's CLIPModel "
        f"(model_type: {facts.get('model_type')})"
    )


def _read_file(path: Path, arch: ModelConfig | None, key: str | None) -> Weights:
    kind = "shards" if path.name.endswith(INDEX) else sniff(path)
    if kind == "pickle":
        loaded = read_numpy_pickle(path)
        return passl.from_arrays(path, paddle_arrays(loaded, path), arch, _others(loaded))
    tensors, unexpected = read_state_dict(path, kind, key)
    if unexpected == TORCHSCRIPT or openai.MARKS[0] in tensors:
        weights = openai.from_tensors(path, tensors, arch)
        return replace(weights, unexpected=unexpected)
    # These do not say their activation: whoever uses them must know the architecture.
    if any(name.startswith("vision_model.") for name in tensors):
        return Weights(
            path, "hf", huggingface.to_openai(path, tensors), arch, unexpected=unexpected
        )
    return Weights(path, "state dict", open_clip.flat_text(tensors), arch, unexpected=unexpected)


def _others(loaded: object) -> tuple[str, ...]:
    """What a PASSL checkpoint holds beside its weights."""
    if not isinstance(loaded, dict) or not isinstance(loaded.get("state_dict"), dict):
        return ()
    return tuple(str(key) for key in loaded if key != "state_dict")
