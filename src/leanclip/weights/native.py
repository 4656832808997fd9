"""leanclip's own format: a folder with `model.safetensors` and `config.json`.

The tensors have OpenAI's names; config.json holds the architecture with its activation, the
preprocessing, the tokeniser, where the weights came from, and the SHA-256 of the tensors' file.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from leanclip.config.model import ModelConfig
from leanclip.config.sections import parse, to_plain
from leanclip.errors import ConfigError, WeightsError
from leanclip.io.files import digest
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.text import Tokenizer
from leanclip.weights import tokenizer as tokenizers
from leanclip.weights.files import MALFORMED, read_json, read_safetensors
from leanclip.weights.weights import Weights

FORMAT = "leanclip"
SHARDS = "shards"  # in place of model.safetensors, where several ranks hold the weights


def save_weights(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    model: ModelConfig,
    preprocess: Preprocess,
    *,
    tokenizer: Tokenizer | None = None,
    provenance: str = "trained with leanclip",
) -> str:
    """Write `model.safetensors`, `config.json` and the tokeniser's files, by default CLIP's.

    Returns:
        The SHA-256 of the tensors' file.
    """
    file = folder / "model.safetensors"
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"}
    )
    sha256 = digest(file)
    describe_weights(
        folder, model, preprocess, tokenizer=tokenizer, provenance=provenance, sha256=sha256
    )
    return sha256


def describe_weights(
    folder: Path,
    model: ModelConfig,
    preprocess: Preprocess,
    *,
    tokenizer: Tokenizer | None = None,
    provenance: str = "trained with leanclip",
    sha256: str | None = None,
) -> None:
    """As `save_weights`, without the tensors; no SHA-256: they are in shards beside it."""
    tokenizer = tokenizer or Tokenizer(model.context_length)
    values = {
        "format": FORMAT,
        "model": to_plain(model),
        "preprocess": asdict(preprocess),
        "tokenizer": tokenizers.store(folder, tokenizer),
        "provenance": provenance,
        "sha256": sha256,
    }
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n")


def is_folder(folder: Path) -> bool:
    """Whether a folder is in this format."""
    file = folder / "config.json"
    return file.is_file() and read_json(file).get("format") == FORMAT


def read_folder(folder: Path, arch: ModelConfig | None) -> Weights:
    """Read a folder in this format; `arch` takes the place of its architecture.

    Raises:
        WeightsError: a file is missing or damaged, or the weights are in shards.
    """
    if (folder / SHARDS).is_dir():
        raise WeightsError(
            f"{folder}: its weights are in shards; merge them with: leanclip merge {folder} OUT"
        )
    tensors = read_safetensors(folder / "model.safetensors")
    preprocess = read_preprocess(folder)
    file = folder / "config.json"
    try:
        model = arch or parse(ModelConfig, read_json(file)["model"], where="model")
    except (*MALFORMED, ConfigError) as error:
        raise WeightsError(f"{file}: cannot be read: {error!r}") from None
    return Weights(folder, FORMAT, tensors, model, preprocess, read_tokenizer(folder))


def read_preprocess(folder: Path) -> Preprocess:
    """The preprocessing of a folder in this format.

    Raises:
        WeightsError: it is missing or damaged.
    """
    file = folder / "config.json"
    try:
        return Preprocess.from_dict(read_json(file)["preprocess"])
    except MALFORMED as error:
        raise WeightsError(f"{file}: cannot be read: {error!r}") from None


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokeniser of a folder in this format.

    Raises:
        WeightsError: it is missing or damaged.
    """
    file = folder / "config.json"
    values = read_json(file)
    try:
        length = parse(ModelConfig, values["model"], where="model").context_length
    except (*MALFORMED, ConfigError) as error:
        raise WeightsError(f"{file}: cannot be read: {error!r}") from None
    return tokenizers.stored(folder, values.get("tokenizer"), length)


def write(
    folder: Path,
    weights: Weights,
    model: ModelConfig,
    preprocess: Preprocess,
    provenance: str | None = None,
) -> None:
    """A folder in this format; `provenance` is by default the source that was converted."""
    folder.mkdir(parents=True, exist_ok=True)
    origin = provenance or f"converted from {weights.format}: {weights.source.name}"
    save_weights(
        folder,
        weights.tensors,
        model,
        preprocess,
        tokenizer=weights.tokenizer,
        provenance=origin,
    )
