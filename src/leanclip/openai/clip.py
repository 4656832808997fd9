"""The names of OpenAI's `clip.clip`."""

from leanclip.openai.bpe import SimpleTokenizer as _Tokenizer
from leanclip.openai.loading import (
    _MODELS,
    _download,
    _tokenizer,
    available_models,
    load,
    tokenize,
)
from leanclip.openai.network import build_model
from leanclip.openai.transforms import *  # noqa: F403
from leanclip.openai.transforms import _convert_image_to_rgb, _transform

__all__ = ["available_models", "load", "tokenize"]
