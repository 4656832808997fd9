"""The whole configuration: all sections, read from YAML and overrides.

YAML file -> strict loader -> -o key.path=value -> Config -> YAML in the run's folder
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from leanclip.config.data import DataConfig
from leanclip.config.evaluation import EvaluateConfig
from leanclip.config.model import ModelConfig
from leanclip.config.sections import Section, kind, parse
from leanclip.config.strict_yaml import load_yaml
from leanclip.config.training import CheckpointConfig, FinetuneConfig, OptimizerConfig, TrainConfig
from leanclip.errors import ConfigError
from leanclip.io.files import LFS_POINTER, is_lfs_file

_WEIGHTS_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".pdparams"}
_COMMON_NAMES = {"model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model"}


class Config(Section):
    """One run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = Field(
        default=0, description="random seed of initial weights, data order and crops"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: cuda if available"
    )
    tf32: bool = Field(
        default=False,
        description="on a GPU: float32 matrix products and convolutions in TF32 (10 bits of "
        "mantissa instead of 23), in training and evaluation; faster",
    )
    load: str | None = Field(
        default=None, description="weights to start from, with a fresh optimiser"
    )
    load_arch: str | None = Field(
        default=None, description="with load: the weights' architecture, a preset's name or a file"
    )
    load_partial: bool = Field(
        default=False, description="with load: allow missing and unexpected keys, which are logged"
    )
    output_dir: str = Field(default="runs/run", description="the run's folder")

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.evaluate.patience is not None:
            if self.checkpoint.best_metric is None:
                raise ValueError("evaluate.patience goes with checkpoint.best_metric; set it too")
            if self.evaluate.every_epochs is None:
                raise ValueError("evaluate.patience goes with evaluate.every_epochs; set it too")
        return self


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    architecture_of: Callable[[str, str | None], dict[str, Any]] | None = None,
    **settings: Any,
) -> Config:
    """Read a YAML file, apply `key.path=value` overrides, then `settings` that are not None.

    Without a section `model` in the file, the architecture is that of the weights to load:
    `architecture_of` is called with the settings `load` and `load_arch`.

    The default `output_dir` is `runs/` and the file's name, followed by the weights' name where
    `load` is not from the file: a run from weights must not share a folder with one from scratch.

    Raises:
        ConfigError: the file or an override cannot be read, or a setting is wrong.
    """
    path = Path(path)
    if is_lfs_file(path):
        raise ConfigError(f"{path}: {LFS_POINTER}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    values = load_yaml(text, where=str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a mapping of settings, found {kind(values)}")
    load, has_model = values.get("load"), "model" in values
    for override in overrides:
        apply_override(values, override)
    values |= {key: value for key, value in settings.items() if value is not None}
    if not has_model and architecture_of is not None and isinstance(values.get("load"), str):
        own = architecture_of(values["load"], values.get("load_arch"))
        values["model"] = own | (values.get("model") or {})
    name = path.stem
    if isinstance(values.get("load"), str) and values["load"] != load:
        name += f"-{weights_name(values['load'])}"
    values.setdefault("output_dir", f"runs/{name}")
    return parse(Config, values, where=str(path))


def weights_name(source: str) -> str:
    """A folder name for weights.

    The name of a file or folder, a published name (ViT-B-32), the last part of a hub id; of a
    run's checkpoint the run's name and the step.
    """
    if re.fullmatch(r"ViT-\w+/\d+(@\d+px)?", source):
        return source.replace("/", "-")
    source = source.replace("::", "-")  # open_clip's pairs
    path = PurePosixPath(source.removeprefix("hf-hub:"))
    if path.suffix in _WEIGHTS_SUFFIXES:
        path = path.with_suffix("")
    if path.name in _COMMON_NAMES and path.parent.name:
        path = path.parent
    name = path.name
    if path.parent.name == "checkpoints":
        name = f"{path.parent.parent.name}-{name}"
    return re.sub(r"[^\w.@-]+", "-", name).strip("-.") or "weights"


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `key.path=value` in nested plain values; the value is read as YAML.

    Raises:
        ConfigError: it is not of that form, or not YAML.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"-o {override}: not of the form key.path=value")
    for depth, key in enumerate(keys[:-1]):
        inner = values.setdefault(key, {})
        if inner is None:
            inner = values[key] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"-o {override}: {'.'.join(keys[: depth + 1])} is {kind(inner)}")
        values = inner
    values[keys[-1]] = load_yaml(text, where=f"-o {override}")
