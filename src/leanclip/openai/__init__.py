"""A drop-in for OpenAI's package: `import leanclip.openai as clip`.

Code that imports `clip` itself runs too, after `sys.modules["clip"] = leanclip.openai`. The modules
`clip`, `model` and `simple_tokenizer` have the names that OpenAI's have:

    transforms, network, resnet, bpe    the code
    loading                             load, tokenize, the published models
    clip, model, simple_tokenizer       OpenAI's places for all of it

These three only import: after the line above, `import clip.model` runs `model.py` a second time,
and classes that it defined would exist twice.
"""

from leanclip.openai import clip, model, simple_tokenizer
from leanclip.openai.loading import (
    _MODELS,
    _download,
    _tokenizer,
    available_models,
    load,
    tokenize,
)
from leanclip.openai.network import build_model
from leanclip.openai.transforms import _transform

__all__ = ["available_models", "load", "tokenize"]
