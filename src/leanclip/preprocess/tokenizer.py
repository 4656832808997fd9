"""CLIP's byte-pair encoding: text -> token ids, identical to OpenAI's tokeniser.

    text -> repaired, lower case -> chunks (white space) -> words (pattern) -> bytes -> ids

`encode` and `decode` convert one text; `tokenize` makes the (B, L) array a model reads:
start, ids, end, then zeros. The merge table is the one published with CLIP; see
THIRD_PARTY_NOTICES.md.

For speed, the ids of a chunk are cached (the pattern never matches across white space), and plain
ASCII skips ftfy, by far the slowest step.

Shapes: B texts, L context length.
"""

import gzip
import html
import re
from array import array
from collections.abc import Sequence
from functools import cache
from heapq import heapify, heappop, heappush
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
WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)

# ASCII that ftfy and html leave unchanged, except for the kind of white space.
_PLAIN = re.compile(r"[\t\n\f\r -%'-~]*")
_MAX_REPAIRED = 10_000  # characters; ftfy takes minutes for deeply nested entities
_LONG_NUMBER = re.compile("&#([0-9]{1000,})")

_MAX_CACHED_CHUNKS = 1 << 16  # about 10 MB of English, and 30 MB of any text
_MAX_CACHED_LENGTH = 32  # characters
_MERGED = -1  # in place of an id that was merged into its left neighbour


def tokenize(
    texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH, *, truncate: bool = False
) -> torch.Tensor:
    """Token ids of each text, with start and end tokens, padded with zeros: (B, L) int64.

    Raises:
        DataError: a text needs more than `context_length` tokens and `truncate` is false.
            With `truncate` the ids are cut and the last one is the end token.
    """
    texts = [texts] if isinstance(texts, str) else texts
    start, end, size = _packed([START]), _packed([END]), 2 * context_length
    rows = []
    for text in texts:
        row = start + _packed_ids(text) + end
        if len(row) > size:
            if not truncate:
                raise DataError(
                    f"a caption of {len(row) // 2} tokens exceeds the context length of "
                    f"{context_length}: {text[:60]!r}…; shorten it or truncate it (--truncate, in "
                    f"Python truncate=True)"
                )
            row = row[: size - 2] + end
        rows.append(row.ljust(size, b"\0"))
    tokens = np.frombuffer(b"".join(rows), dtype=np.uint16).reshape(len(rows), context_length)
    return torch.from_numpy(tokens.astype(np.int64))


def encode(text: str) -> list[int]:
    """Token ids of one text, without start and end tokens."""
    return memoryview(_packed_ids(text)).cast("H").tolist()


def decode(ids: Sequence[int] | np.ndarray | torch.Tensor) -> str:
    """The text of token ids: words as the tokeniser split them, with one space between.

    Takes a result of `encode` or a row of `tokenize`, of which start token, end token and
    padding are left out.
    """
    tokens = [int(token) for token in ids]
    if tokens and tokens[0] == START and END in tokens:
        last = len(tokens) - 1 - tokens[::-1].index(END)
        tokens = tokens[1:last]
    symbols = _vocabulary().symbols
    characters = "".join(symbols[token] for token in tokens).replace("</w>", " ")
    table = byte_of_character()
    return bytes(table[c] for c in characters).decode("utf-8", errors="replace").strip()


def vocabulary() -> dict[str, int]:
    """The ids of all symbols, as in vocab.json files."""
    table = _vocabulary()
    return {symbol: i for i, symbol in enumerate(table.symbols[:START])} | table.special


def merges() -> list[str]:
    """The merge rules as in merges.txt files: "i n", the most frequent pair first."""
    symbols = _vocabulary().symbols
    return [f"{symbols[left]} {symbols[right]}" for left, right in _vocabulary().merged]


def clean(text: str) -> str:
    """The text that is encoded: repaired, unescaped, lower-cased, with single spaces."""
    return " ".join(_chunks(text))


def _packed_ids(text: str) -> bytes:
    return b"".join(map(_ids_of_chunk.__getitem__, _chunks(text)))


def _packed(ids: Sequence[int]) -> bytes:
    """Ids as two bytes each, which are joined and padded faster than lists."""
    return array("H", ids).tobytes()


def _chunks(text: str) -> list[str]:
    """The clean text, split at white space.

    Python's white space is Unicode's and the four separators from \\x1c, which ftfy removes.
    """
    return repair(text).lower().split()


def repair(text: str) -> str:
    """The text with broken characters repaired and HTML's entities replaced, twice."""
    return text if _PLAIN.fullmatch(text) else _unescape(_unescape(_repair(text)))


def _unescape(text: str) -> str:
    """html.unescape; numbers, of which it takes at most 4300 digits, are cut to nine."""
    if len(text) > 1000:
        text = _LONG_NUMBER.sub(lambda found: f"&#{(found[1].lstrip('0') or '0')[:9]}", text)
    return html.unescape(text)


def _repair(text: str) -> str:
    """ftfy.fix_text on the first characters."""
    return ftfy.fix_text(text[:_MAX_REPAIRED]) + text[_MAX_REPAIRED:]


class _IdsOfChunk(dict[str, bytes]):
    """A cache of the packed ids of chunks and words."""

    def __missing__(self, chunk: str) -> bytes:
        letters = chunk.isascii() and chunk.isalpha()
        words = [chunk] if letters else WORDS.findall(chunk)
        if words == [chunk]:
            ids = _packed(_ids_of_word(chunk))
        else:
            ids = b"".join(map(self.__getitem__, words))
        if len(chunk) <= _MAX_CACHED_LENGTH:
            if len(self) >= _MAX_CACHED_CHUNKS:
                self.clear()
            self[chunk] = ids
        return ids


_ids_of_chunk = _IdsOfChunk()


def _ids_of_word(word: str) -> list[int]:
    vocabulary = _vocabulary()
    if word in vocabulary.special:
        return [vocabulary.special[word]]
    if word.isascii() and (token := vocabulary.ids.get(word + "</w>")) is not None:
        return [token]  # its letters merge into it
    return ids_of_bytes(word.encode("utf-8"))


def ids_of_bytes(word: bytes) -> list[int]:
    """Token ids of one match of the pattern, as UTF-8."""
    vocabulary = _vocabulary()
    ids = [vocabulary.byte_ids[byte] for byte in word]
    ids[-1] += 256  # the same byte at the end of a word
    return _merge(ids, vocabulary.merged)


def _merge(ids: list[int], merged: dict[tuple[int, int], int]) -> list[int]:
    """Merge pairs in the order in which they were learned, then from left to right.

    A heap and a linked list avoid quadratic time for long words. No merge creates a pair that was
    learned before it, so that the order is that of repeated sweeps over the word.
    """
    left, right = list(range(-1, len(ids))), list(range(1, len(ids) + 1))
    queue = [(merged[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in merged]
    heapify(queue)
    ids.append(_MERGED)  # right of the last; as ids[-1] also left of the first
    while queue:
        token, i = heappop(queue)
        j = right[i]
        if merged.get((ids[i], ids[j])) != token:
            continue  # one of the two has been merged
        ids[i], ids[j] = token, _MERGED
        right[i] = right[j]
        left[right[i]] = i
        for a, b in ((left[i], i), (i, right[i])):
            new = merged.get((ids[a], ids[b]))
            if new is not None:
                heappush(queue, (new, a))
    return [token for token in ids if token != _MERGED]


class _Vocabulary:
    """The merge table: `symbols` by id, `ids` by symbol, `merged` ids of pairs in order."""

    def __init__(self) -> None:
        packed = (
            resources.files("leanclip.preprocess")
            .joinpath("bpe_simple_vocab_16e6.txt.gz")
            .read_bytes()
        )
        lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : _MERGES + 1]
        letters = characters_of_bytes()
        self.byte_ids = {byte: i for i, byte in enumerate(letters)}
        self.symbols = [*letters.values(), *(c + "</w>" for c in letters.values())]
        first = len(self.symbols)
        self.symbols += [line.replace(" ", "") for line in lines]
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        pairs = [line.split() for line in lines]
        self.merged = {
            (self.ids[a], self.ids[b]): first + rank for rank, (a, b) in enumerate(pairs)
        }
        self.special = {"<|startoftext|>": START, "<|endoftext|>": END}
        self.symbols += [f"{text}</w>" for text in self.special]  # decode puts spaces after them
        assert len(self.symbols) == VOCAB_SIZE


@cache
def _vocabulary() -> _Vocabulary:
    return _Vocabulary()


@cache
def characters_of_bytes() -> dict[int, str]:
    """A printable character for each byte, in the order of the first 256 ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    table = {byte: chr(byte) for byte in printable}
    rest = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + i) for i, byte in enumerate(rest)}


@cache
def byte_of_character() -> dict[str, int]:
    """The byte of each character of a symbol."""
    return {c: byte for byte, c in characters_of_bytes().items()} | {" ": ord(" ")}
