"""Read weights of any format, recognised by content: a file, a folder, a run, a name, a hub id.

    source -> locate -> folder: of an adapter: its base model, read likewise -> merged
                     -> folder: the format whose is_folder is true -> its read_folder
                     -> file: the format whose is_state_dict is true -> its from_state_dict

To add a format, write a module with these functions and `write`, and list it here and in
convert.py; where only names differ, a table of rules (names.py) is most of it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from leanclip.config.model import ModelConfig
from leanclip.config.presets import PRESETS, preset
from leanclip.config.sections import parse, to_plain
from leanclip.config.strict_yaml import load_yaml
from leanclip.errors import ConfigError, WeightsError, one_line
from leanclip.io.files import LFS_POINTER, is_lfs_file
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.text import Tokenizer
from leanclip.weights import (
    adapter,
    huggingface,
    native,
    open_clip,
    open_clip_config,
    openai,
    passl,
    pe_core,
)
from leanclip.weights.files import INDEX, find_file, read_json, sniff
from leanclip.weights.hub import locate, locate_settings
from leanclip.weights.state_dict import TORCHSCRIPT, read_state_dict
from leanclip.weights.tokenizer import check_fits_model
from leanclip.weights.weights import Weights

_FOLDERS = (open_clip, native, huggingface)
_STATE_DICTS = (pe_core, openai, huggingface, open_clip)  # the last takes any names
_ODD = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, OSError)
Architecture = ModelConfig | dict[str, Any] | str | Path


def read_weights(source: str | Path, *, arch: Architecture | None = None) -> Weights:
    """Read weights; nothing in the source is ever executed.

    Args:
        source: a file or folder of any format, a run's folder (its newest checkpoint), the name
            of a file that OpenAI publishes ("ViT-B/32"), or a hub id ("hf-hub:owner/name"). In a
            file with several models FILE#KEY names one; "FILE#ema" is the moving average. Of a
            LoRA adapter FOLDER#BASE names the base model.
        arch: the architecture, in place of the source's own: settings by name, a preset's name,
            or a JSON or YAML file of settings.

    Raises:
        WeightsError: there is no such source, it is damaged, holds more than data, or has an
            unknown format.
        ConfigError: `arch` is not an architecture.
    """
    given = read_architecture(arch) if arch is not None else None
    name, key = _split_key(str(source))
    path = locate(name)
    try:
        return _normalized(_read(path, given, key), given is not None)
    except _ODD as error:  # unforeseen values in an untrusted file
        raise WeightsError(f"{path}: cannot be read: {one_line(error)}") from error


def stored_architecture(source: str, arch: Architecture | None = None) -> dict[str, Any]:
    """The settings of the architecture of weights, for a configuration without its own.

    Raises:
        WeightsError: they cannot be read.
        ConfigError: they do not determine their architecture.
    """
    model = read_weights(source, arch=arch).model
    if model is None:
        raise ConfigError(
            f"--load {source}: does not include its architecture; give --arch, or a config with "
            f"the section model"
        )
    return to_plain(model)


def read_preprocess(source: str | Path) -> Preprocess | None:
    """The preprocessing of a folder of weights, without reading its tensors; None: it has none.

    Raises:
        WeightsError: it is damaged, or not supported.
    """
    known, folder = _settings(source)
    return known.read_preprocess(folder) if known else None


def read_tokenizer(source: str | Path) -> Tokenizer | None:
    """The tokeniser of a folder of weights, as `read_preprocess`; None: CLIP's.

    Raises:
        WeightsError: it is damaged, or not supported.
    """
    known, folder = _settings(source)
    return known.read_tokenizer(folder) if known else None


def _settings(source: str | Path) -> tuple[Any, Path]:
    """The format and the folder of a source's settings; no format: it has none."""
    name, key = _split_key(str(source))
    path = locate_settings(name)
    if path is None:
        return None, Path(source)
    if adapter.is_folder(path):
        path = adapter.base_of(path, key)
    folder = _newest_checkpoint(path) or path
    return next((one for one in _FOLDERS if one.is_folder(folder)), None), folder


def _read(path: Path, arch: ModelConfig | None, key: str | None) -> Weights:
    """Weights of a file or folder, before what all formats have in common."""
    if not path.is_dir():
        return _read_file(path, arch, key)
    if adapter.is_folder(path):
        base = adapter.base_of(path, key)
        is_own = base == path
        weights = _read_folder(path, arch) if is_own else _read(base, arch, None)
        return adapter.read_folder(path, weights)
    if key is not None:
        raise WeightsError(f"{path}: #{key} chooses among models in one file, this is a folder")
    return _read_folder(_newest_checkpoint(path) or path, arch)


def _normalized(weights: Weights, has_arch: bool) -> Weights:
    """Scalars without dimensions; the preprocessing at the resolution of a given architecture."""
    scalars = {
        name: tensor.reshape(())  # FSDP makes vectors of them
        for name, tensor in weights.tensors.items()
        if name in ("logit_scale", "logit_bias") and tensor.numel() == 1
    }
    weights = replace(weights, tensors=weights.tensors | scalars)
    model, preprocess = weights.model, weights.preprocess
    if model is not None and weights.tokenizer is not None:
        check_fits_model(weights.source, weights.tokenizer, model)
        weights = replace(weights, tokenizer=weights.tokenizer.at(model.context_length))
    if model is None or preprocess is None or preprocess.resolution == model.image_resolution:
        return weights
    if not has_arch:
        raise WeightsError(
            f"{weights.source}: its preprocessing gives {preprocess.resolution} pixels a side, the "
            f"model takes {model.image_resolution}"
        )
    return replace(weights, preprocess=preprocess.at(model.image_resolution))


def _split_key(source: str) -> tuple[str, str | None]:
    """FILE and KEY of FILE#KEY."""
    name, mark, key = source.rpartition("#")
    return (name, key) if mark and key and not Path(source).exists() else (source, None)


def _newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint that a run's `latest` names, or the one with the most steps."""
    folder = run / "checkpoints"
    found = sorted(folder.glob("step-*"))
    latest = folder / "latest"
    named = [path for path in found if latest.is_file() and path.name == latest.read_text().strip()]
    return [*found, *named][-1] if found else None


def read_architecture(arch: Architecture) -> ModelConfig:
    """The architecture in leanclip's or open_clip's settings: a dict, a file, or a preset's name.

    Raises:
        ConfigError: a setting is wrong, or there is no such preset or file.
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
        raise ConfigError(f"{name}: contains no settings of a model")
    return _parse_architecture(values, name)


def _parse_architecture(values: dict[str, Any], name: str) -> ModelConfig:
    if not open_clip_config.is_architecture(values):
        return parse(ModelConfig, values, where=name)
    try:
        return open_clip_config.architecture(values)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _read_folder(folder: Path, arch: ModelConfig | None) -> Weights:
    for known in _FOLDERS:
        if known.is_folder(folder):
            weights = known.read_folder(folder, arch)
            return replace(weights, tokenizer=weights.tokenizer or known.read_tokenizer(folder))
    if (folder / "config.json").is_file():
        kind = read_json(folder / "config.json").get("model_type")
        raise WeightsError(
            f"{folder / 'config.json'}: neither leanclip's nor Hugging Face's CLIPModel "
            f"(model_type: {kind})"
        )
    file = find_file(folder, (*huggingface.FILES, *open_clip.FILES))
    alone = list(folder.glob("*.pt"))
    if file is None and len(alone) == 1:  # as OpenAI's and PE-Core's are published
        return _read_file(alone[0], arch, None)
    if file is None or arch is None:
        raise WeightsError(
            f"{folder}: no config.json, {open_clip.CONFIG} or checkpoints in it; name a file, "
            f"or name the architecture with --arch"
        )
    return _read_file(file, arch, None)


def _read_file(path: Path, arch: ModelConfig | None, key: str | None) -> Weights:
    if not path.name.endswith(INDEX) and sniff(path) == "pickle":
        return passl.read_file(path, arch)
    tensors, unexpected = read_state_dict(path, key)
    known = next(one for one in _STATE_DICTS if one.is_state_dict(tensors))
    if unexpected == TORCHSCRIPT:  # OpenAI's published form
        known = openai
    return replace(known.from_state_dict(path, tensors, arch), unexpected=unexpected)
