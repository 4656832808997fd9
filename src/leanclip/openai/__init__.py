"""A drop-in for OpenAI's package: `import leanclip.openai as clip`.

Code that imports `clip` itself runs too, after `sys.modules["clip"] = leanclip.openai`:

    transforms, network, resnet, bpe    the code
    loading                             load, tokenize, the published models
    clip, model, simple_tokenizer       OpenAI's modules, which only import names of those

They define nothing: `import clip.model` runs `model.py` once more, and its classes would exist
twice.
"""

from leanclip.openai import clip, model, simple_tokenizer
from leanclip.openai.clip import _MODELS, _download, _tokenizer, _transform, build_model
from leanclip.openai.loading import available_models, load, tokenize

__all__ = ["available_models", "load", "tokenize"]
