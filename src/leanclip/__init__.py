"""leanclip: train, fine-tune, evaluate and use CLIP.

The public names are loaded when first used, so that `import leanclip` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leanclip.config.schema import Config, load_config
    from leanclip.errors import ConfigError, DataError, LeanclipError, WeightsError
    from leanclip.evaluation import build_classifier, recall_at_k
    from leanclip.inference.load import available, load
    from leanclip.inference.model import InferenceModel
    from leanclip.losses import clip_loss
    from leanclip.model import CLIP
    from leanclip.preprocess.images import Preprocess
    from leanclip.preprocess.tokenizer import decode, encode, tokenize

__version__ = "0.1.0"

_HOMES = {
    "config.schema": ("Config", "load_config"),
    "errors": ("ConfigError", "DataError", "LeanclipError", "WeightsError"),
    "evaluation": ("build_classifier", "recall_at_k"),
    "preprocess.images": ("Preprocess",),
    "inference.load": ("available", "load"),
    "inference.model": ("InferenceModel",),
    "losses": ("clip_loss",),
    "model": ("CLIP",),
    "preprocess.tokenizer": ("decode", "encode", "tokenize"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CLIP",
    "Config",
    "ConfigError",
    "DataError",
    "InferenceModel",
    "LeanclipError",
    "Preprocess",
    "WeightsError",
    "available",
    "build_classifier",
    "clip_loss",
    "decode",
    "encode",
    "load",
    "load_config",
    "recall_at_k",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'leanclip' has no attribute {name!r}")
    return getattr(import_module(f"leanclip.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
