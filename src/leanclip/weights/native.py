"""leanclip's own weights: a folder with `model.safetensors` and `config.json`.

The tensors have OpenAI's names; config.json holds the architecture with its activation, and the
preprocessing. A bare `.safetensors` file of such tensors is read too, into a model whose
architecture is known from elsewhere.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from leanclip.config import ModelConfig, parse, to_plain
from leanclip.errors import ConfigError, WeightsError
from leanclip.images import Preprocess
from leanclip.model import CLIP


@dataclass(frozen=True)
class Weights:
    """Tensors by OpenAI's names and, where the source says so, what they belong to."""

    source: Path
    tensors: dict[str, torch.Tensor]
    model: ModelConfig | None = None
    preprocess: Preprocess | None = None


def save_weights(folder: Path, model: CLIP, preprocess: Preprocess) -> None:
    """Write `model.safetensors` and `config.json` into an existing folder."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    facts = {
        "format": "leanclip",
        "model": to_plain(model.config),
        "preprocess": asdict(preprocess),
    }
    (folder / "config.json").write_text(json.dumps(facts, indent=1) + "\n")


def read_weights(source: str | Path) -> Weights:
    """Read a run's folder (its newest checkpoint), a folder of weights, or a safetensors file.

    Raises:
        WeightsError: there is no such file, it is damaged, or of no known format.
    """
    source = Path(source)
    folder, file = source, source
    if source.is_dir():
        checkpoints = sorted((source / "checkpoints").glob("step-*"))
        folder = checkpoints[-1] if checkpoints else source
        file = folder / "model.safetensors"
    if not file.exists():
        what = (
            "no model.safetensors and no checkpoints in it" if source.is_dir() else "no such file"
        )
        raise WeightsError(f"{source}: {what}")
    if file.suffix != ".safetensors":
        raise WeightsError(
            f"{source}: not a format that leanclip reads yet; it reads .safetensors files with "
            f"OpenAI's parameter names, and the folders that leanclip writes"
        )
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file}: cannot be read: {error}") from None
    config = folder / "config.json"
    if not (source.is_dir() and config.is_file()):
        return Weights(file, tensors)
    try:
        facts = json.loads(config.read_text(encoding="utf-8"))
        model = parse(ModelConfig, facts["model"], where=str(config))
        return Weights(file, tensors, model, _preprocess(facts["preprocess"]))
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise WeightsError(f"{config}: cannot be read: {error!r}") from None


def load_into(model: CLIP, weights: Weights) -> None:
    """Copy the tensors into a model, each to its parameter's type.

    Raises:
        WeightsError: keys are missing or left over, a shape differs, or the weights were made
            with another activation; names the keys.
    """
    if weights.model is not None and weights.model.activation != model.config.activation:
        raise WeightsError(
            f"{weights.source}: made with activation {weights.model.activation}, the model has "
            f"{model.config.activation}; set model.activation={weights.model.activation}"
        )
    own = model.state_dict()
    given = weights.tensors
    differing = [
        f"{name} {tuple(given[name].shape)} there, {tuple(own[name].shape)} in the model"
        for name in own.keys() & given.keys()
        if own[name].shape != given[name].shape
    ]
    for what, keys in (
        ("shapes differ", sorted(differing)),
        ("keys are missing", sorted(own.keys() - given.keys())),
        ("keys are left over", sorted(given.keys() - own.keys())),
    ):
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            raise WeightsError(f"{weights.source}: {what}: {', '.join(keys[:4])}{more}")
    model.load_state_dict(given)


def _preprocess(facts: dict) -> Preprocess:
    return Preprocess(int(facts["resolution"]), _triple(facts["mean"]), _triple(facts["std"]))


def _triple(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
