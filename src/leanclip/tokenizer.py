"""CLIP's byte-pair encoding: text -> token ids, exactly as OpenAI's tokeniser gives them.

    text -> clean -> words (pattern) -> bytes as characters -> merged symbols -> ids

`encode` and `decode` convert one text; `tokenize` makes the (B, L) array a model reads:
start, ids, end, then zeros. The merge table is the one published with CLIP; see
THIRD_PARTY_NOTICES.md.

Shapes: B texts, L context length.
"""

import gzip
import html
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib import resources
from itertools import pairwise

import ftfy
import numpy as np
import regex
import torch

from leanclip.errors import DataError

VOCAB_SIZE = 49408
START, END = 49406, 49407
CONTEXT_LENGTH = 77

_MERGES = 49152 - 256 - 2  # the lines of the published file that CLIP uses
_WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
_SPACES = regex.compile(r"\s+")
_PLAIN = regex.compile(r"[ -%'-~]*")  # printable ASCII but `&`: neither ftfy nor html changes it


def tokenize(
    texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH, *, truncate: bool = False
) -> torch.Tensor:
    """Token ids of each text, with start and end tokens, padded with zeros: (B, L) int64.

    Raises:
        DataError: a text needs more than `context_length` tokens and `truncate` is false.
            With `truncate` the ids are cut and the last one is the end token.
    """
    texts = [texts] if isinstance(texts, str) else texts
    tokens = np.zeros((len(texts), context_length), dtype=np.int64)
    for row, text in zip(tokens, texts, strict=True):
        ids = [START, *encode(text), END]
        if len(ids) > context_length:
            if not truncate:
                raise DataError(
                    f"a caption of {len(ids)} tokens is over the context of {context_length}: "
                    f"{text[:60]!r}…; shorten it or pass truncate=True"
                )
            ids = [*ids[: context_length - 1], END]
        row[: len(ids)] = ids
    return torch.from_numpy(tokens)


def encode(text: str) -> list[int]:
    """Token ids of one text, without start and end tokens."""
    return [token for word in _WORDS.findall(clean(text)) for token in _word_ids(word)]


def decode(ids: Sequence[int] | np.ndarray | torch.Tensor) -> str:
    """The text of token ids: words as the tokeniser split them, with one space between.

    Takes what `encode` gives, or a row of `tokenize`: start token, end token and padding are
    left out then.
    """
    tokens = [int(token) for token in ids]
    if tokens and tokens[0] == START and END in tokens:
        last = len(tokens) - 1 - tokens[::-1].index(END)
        tokens = tokens[1:last]
    symbols = _vocabulary().symbols
    characters = "".join(symbols[token] for token in tokens).replace("</w>", " ")
    table = _byte_of_character()
    return bytes(table[c] for c in characters).decode("utf-8", errors="replace").strip()


def vocabulary() -> dict[str, int]:
    """The ids of all symbols, in the form of the field's vocab.json files."""
    table = _vocabulary()
    return {symbol: token for symbol, token in table.ids.items() if token < START} | table.special


def merges() -> list[str]:
    """The merge rules, the most frequent pair first: "i n"."""
    return [" ".join(pair) for pair in _vocabulary().ranks]


def clean(text: str) -> str:
    """Repaired, unescaped, with single spaces and in lower case: what the tokeniser reads."""
    if not _PLAIN.fullmatch(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _SPACES.sub(" ", text.strip()).strip().lower()


@lru_cache(maxsize=1 << 16)
def _word_ids(word: str) -> tuple[int, ...]:
    """Ids of one word: its bytes, merged pair by pair in the order the table learned them."""
    vocabulary = _vocabulary()
    if word in vocabulary.special:
        return (vocabulary.special[word],)
    letters = _characters_of_bytes()
    symbols = [letters[byte] for byte in word.encode("utf-8")]
    symbols[-1] += "</w>"
    while len(symbols) > 1:
        best = min(pairwise(symbols), key=vocabulary.rank)
        if best not in vocabulary.ranks:
            break
        symbols = _merge(symbols, best)
    return tuple(vocabulary.ids[symbol] for symbol in symbols)


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged, i = [], 0
    while i < len(symbols):
        if (symbols[i], symbols[i + 1] if i + 1 < len(symbols) else None) == pair:
            merged.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return merged


class _Vocabulary:
    """The merge table: `ranks` of pairs, `ids` of symbols, and `symbols` of ids."""

    def __init__(self) -> None:
        packed = resources.files("leanclip").joinpath("bpe_simple_vocab_16e6.txt.gz").read_bytes()
        lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : _MERGES + 1]
        pairs = [tuple(line.split()) for line in lines]
        letters = list(_characters_of_bytes().values())
        self.symbols = [*letters, *(c + "</w>" for c in letters), *("".join(p) for p in pairs)]
        self.special = {"<|startoftext|>": START, "<|endoftext|>": END}
        self.symbols += [f"{text}</w>" for text in self.special]  # so that decode spaces them
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        assert len(self.symbols) == VOCAB_SIZE

    def rank(self, pair: tuple[str, str]) -> int:
        return self.ranks.get(pair, VOCAB_SIZE)


@cache
def _vocabulary() -> _Vocabulary:
    return _Vocabulary()


@cache
def _characters_of_bytes() -> dict[int, str]:
    """A printable character for each byte, in the order that fixes the first 256 ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    table = {byte: chr(byte) for byte in printable}
    rest = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + i) for i, byte in enumerate(rest)}


@cache
def _byte_of_character() -> dict[str, int]:
    return {c: byte for byte, c in _characters_of_bytes().items()} | {" ": ord(" ")}
