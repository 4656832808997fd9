"""The names of OpenAI's `clip.simple_tokenizer`."""

from leanclip.openai.bpe import *  # noqa: F403
