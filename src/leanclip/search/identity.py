"""Which model an index is of: hashes of weights, preprocessing and tokeniser."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from leanclip.errors import ConfigError
from leanclip.inference.model import InferenceModel
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.tokenizer import merges
from leanclip.weights import fingerprint

PARTS = {
    "weights": "the weights",
    "preprocess": "the preprocessing",
    "tokenizer": "the tokeniser",
}


def identity(clip: InferenceModel) -> dict[str, Any]:
    """What decides a model's features: hashes of weights, preprocessing and tokeniser."""
    words = [merges(), clip.model.context_length]
    return {
        "weights": fingerprint(clip.model.state_dict()),
        "preprocess": _hash(_described(clip.preprocess)),
        "tokenizer": _hash(words),
        "embed_dim": clip.model.config.embed_dim,
    }


def check_model(there: Mapping[str, Any], here: Mapping[str, Any], path: Path) -> None:
    """See that a model is the one that an index is of.

    Raises:
        ConfigError: it is another.
    """
    differing = [words for name, words in PARTS.items() if there[name] != here[name]]
    if differing:
        source = f" ({there['source']})" if there.get("source") else ""
        raise ConfigError(
            f"{path}: is of another model{source}: {', '.join(differing)} differ; give that one, "
            f"or build another index"
        )


def _described(preprocess: Preprocess) -> dict[str, Any]:
    """Its fields; of those that came after the first indexes, what differs from the default."""
    default, always = Preprocess(), ("resolution", "mean", "std")
    return {
        name: value
        for name, value in asdict(preprocess).items()
        if name in always or value != getattr(default, name)
    }


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
