"""OpenAI's `SimpleTokenizer` over leanclip's tokeniser: the same tables and ids."""

import gzip
import html
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path

import ftfy

from leanclip.errors import ConfigError
from leanclip.preprocess import tokenizer

__all__ = [
    "SimpleTokenizer",
    "basic_clean",
    "bytes_to_unicode",
    "default_bpe",
    "get_pairs",
    "whitespace_clean",
]
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


class SimpleTokenizer:
    """The tokeniser's tables, and its ids without start and end tokens.

    Args:
        bpe_path: a file of CLIP's merge table, the only one supported.

    Raises:
        ConfigError: the file at `bpe_path` is another table.
        OSError: there is no such file.
    """

    def __init__(self, bpe_path: str | Path | None = None) -> None:
        if bpe_path is not None and _read(bpe_path) != _read(default_bpe()):
            raise ConfigError(
                f"bpe_path: {bpe_path} is not CLIP's merge table, the only one that is supported; "
                f"leave it out"
            )
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {character: byte for byte, character in self.byte_encoder.items()}
        self.encoder = tokenizer.vocabulary()  # symbol -> id
        self.decoder = {number: symbol for symbol, number in self.encoder.items()}
        pairs = (tuple(rule.split()) for rule in tokenizer.merges())
        self.bpe_ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.pat = tokenizer.WORDS

    def bpe(self, token: str) -> str:
        """The symbols of a word, separated by spaces; the word has a character for each byte."""
        if token in _SPECIAL:
            return token
        word = bytes(self.byte_decoder[character] for character in token)
        return " ".join(self.decoder[number] for number in tokenizer.ids_of_bytes(word))

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return tokenizer.encode(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ids, with a space after each word; start and end tokens are kept."""
        symbols = "".join(self.decoder[int(token)] for token in tokens)
        text = bytes(self.byte_decoder[character] for character in symbols)
        return text.decode("utf-8", errors="replace").replace("</w>", " ")


def default_bpe() -> str:
    """The path of CLIP's merge table."""
    return str(resources.files("leanclip.preprocess") / "bpe_simple_vocab_16e6.txt.gz")


def bytes_to_unicode() -> dict[int, str]:
    """The printable character of each byte in the symbols."""
    return dict(tokenizer.characters_of_bytes())


def get_pairs(word: Sequence[str]) -> set[tuple[str, str]]:
    """The pairs of neighbouring symbols in a word."""
    return set(pairwise(word))


def basic_clean(text: str) -> str:
    """A text repaired by ftfy, with HTML's entities resolved, stripped."""
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def whitespace_clean(text: str) -> str:
    """A text with one space between words."""
    return re.sub(r"\s+", " ", text).strip()


def _read(path: str | Path) -> bytes:
    with gzip.open(path) as file:
        return file.read()
