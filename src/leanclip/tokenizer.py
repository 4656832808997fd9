"""CLIP's byte-pair encoding: text -> token ids, exactly as OpenAI's tokeniser gives them.

    text -> repaired, lower case -> chunks (white space) -> words (pattern) -> bytes -> ids

`encode` and `decode` convert one text; `tokenize` makes the (B, L) array a model reads:
start, ids, end, then zeros. The merge table is the one published with CLIP; see
THIRD_PARTY_NOTICES.md.

Two things make it fast. A chunk's ids are kept, and found again without the pattern, which never
crosses white space. And ftfy, the most costly step by far, runs only on text that it may change.

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
from unicodedata import is_normalized

import ftfy
import numpy as np
import regex
import torch
from ftfy.badness import is_bad
from ftfy.fixes import unescape_html

from leanclip.errors import DataError

VOCAB_SIZE = 49408
START, END = 49406, 49407
CONTEXT_LENGTH = 77

_MERGES = 49152 - 256 - 2  # the lines of the published file that CLIP uses
WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)

# ASCII of which neither ftfy nor html changes more than the kind of its white space.
_PLAIN = re.compile(r"[\t\n\f\r -%'-~]*")
# What ftfy replaces one by one, apart from quotes: controls, ligatures, full and half widths, line
# ends, surrogates. The first line end is also where ftfy divides a text.
_REPLACED = re.compile(
    "[\x00-\x08\n-\x1f\x7f-\x9f\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\u2028\u2029"
    "\u206a-\u206f\u3000\ud800-\udfff\ufb00-\ufb06\ufeff\uff01-\uffef\ufff9-\ufffc]"
)
# All that ftfy takes for signs of a wrong encoding has one of these.
_SUSPECT = re.compile("[^\x00-\x7f–—’…]{2}|[\x80-\x9fÂÃÎÐØÙŒœ]")
_SINGLE_QUOTES = re.compile("[\u02bc\u2018-\u201b]")
_DOUBLE_QUOTES = re.compile("[\u201c-\u201f]")
_SEGMENT = 1_000_000  # characters, the most that ftfy repairs in one piece
_LONG, _MOST_ROUNDS = 1000, 20  # characters; see _fix_text
_LONG_NUMBER = re.compile("&#([0-9]{1000,})")

_KEPT_CHUNKS = 1 << 16  # about 10 MB of English, and 30 MB of any text
_KEPT_LENGTH = 32  # characters
_GONE = -1  # in place of an id that was merged into the one at its left


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
                    f"a caption of {len(row) // 2} tokens is over the context of "
                    f"{context_length}: {text[:60]!r}…; shorten it or pass truncate=True"
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

    Takes what `encode` gives, or a row of `tokenize`: start token, end token and padding are
    left out then.
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
    """The ids of all symbols, in the form of the field's vocab.json files."""
    table = _vocabulary()
    return {symbol: i for i, symbol in enumerate(table.symbols[:START])} | table.special


def merges() -> list[str]:
    """The merge rules, the most frequent pair first: "i n"."""
    symbols = _vocabulary().symbols
    return [f"{symbols[left]} {symbols[right]}" for left, right in _vocabulary().merged]


def clean(text: str) -> str:
    """Repaired, unescaped, with single spaces and in lower case: what the tokeniser reads."""
    return " ".join(_chunks(text))


def _packed_ids(text: str) -> bytes:
    return b"".join(map(_ids_of_chunk.__getitem__, _chunks(text)))


def _packed(ids: Sequence[int]) -> bytes:
    """Ids of two bytes each: they join and pad faster than lists."""
    return array("H", ids).tobytes()


def _chunks(text: str) -> list[str]:
    """The clean text at its white space.

    Python's white space is Unicode's and the four separators from \\x1c, which ftfy removes.
    """
    if not _PLAIN.fullmatch(text):
        text = _unescape(_unescape(_repair(text)))
    return text.lower().split()


def _unescape(text: str) -> str:
    """html.unescape, which takes no number of over 4300 digits; its first ones will do."""
    if len(text) > _LONG:
        text = _LONG_NUMBER.sub(lambda found: f"&#{(found[1].lstrip('0') or '0')[:9]}", text)
    return html.unescape(text)


def _repair(text: str) -> str:
    """ftfy.fix_text, whose loop this is, without the steps that would change nothing.

    Entities and quotes are repaired here; where there is more to do, ftfy does it all.
    """
    if len(text) > _SEGMENT:
        return _fix_text(text)
    fixed, before, rounds = text, None, 0
    while fixed != before:
        before, rounds = fixed, rounds + 1
        if rounds > _MOST_ROUNDS:
            return _fix_text(text)
        if "&" in fixed and "<" not in text:  # ftfy takes `<` for a sign of HTML that is meant
            fixed = unescape_html(fixed)
        if _REPLACED.search(fixed) or (_SUSPECT.search(fixed) and is_bad(fixed)):
            return _fix_text(text)
        if not fixed.isascii():
            fixed = _SINGLE_QUOTES.sub("'", _DOUBLE_QUOTES.sub('"', fixed))
            if not is_normalized("NFC", fixed):
                return _fix_text(text)
    return fixed


def _fix_text(text: str) -> str:
    """ftfy.fix_text, in a bounded number of rounds where a line is long.

    ftfy goes over a line as long as it changes, and each level of entities within entities
    (`&amp;amp;amp;lt;`) is a round: a hundred kilobytes would take half a minute. A line of over
    _LONG characters that still changes after _MOST_ROUNDS is left as it is then; no other differs.
    """
    if len(text) <= _LONG:
        return ftfy.fix_text(text)
    fixed, unescapes = [], True
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        for start in range(0, len(line), _SEGMENT):
            piece = line[start : start + _SEGMENT]
            unescapes = unescapes and "<" not in piece  # from there on, as ftfy has it
            fixed.append(_fix_piece(piece, unescapes))
    return "".join(fixed)


def _fix_piece(piece: str, unescapes: bool) -> str:
    """What ftfy repairs at once."""
    if not unescapes:
        return ftfy.fix_text(piece, unescape_html=False)
    if len(piece) <= _LONG:
        return ftfy.fix_text(piece)
    fixed = piece
    for _ in range(_MOST_ROUNDS):
        before, fixed = fixed, ftfy.fix_text(unescape_html(fixed), unescape_html=False)
        if fixed == before:
            return ftfy.fix_text(piece)
    return fixed


class _IdsOfChunk(dict[str, bytes]):
    """The ids of chunks and words, packed; those not seen yet are computed when asked for."""

    def __missing__(self, chunk: str) -> bytes:
        letters = chunk.isascii() and chunk.isalpha()
        words = [chunk] if letters else WORDS.findall(chunk)
        if words == [chunk]:
            ids = _packed(_ids_of_word(chunk))
        else:
            ids = b"".join(map(self.__getitem__, words))
        if len(chunk) <= _KEPT_LENGTH:
            if len(self) >= _KEPT_CHUNKS:
                self.clear()
            self[chunk] = ids
        return ids


_ids_of_chunk = _IdsOfChunk()


def _ids_of_word(word: str) -> list[int]:
    vocabulary = _vocabulary()
    if word in vocabulary.special:
        return [vocabulary.special[word]]
    if word.isascii() and (token := vocabulary.ids.get(word + "</w>")) is not None:
        return [token]  # every symbol is what its own letters merge into
    return ids_of_bytes(word.encode("utf-8"))


def ids_of_bytes(word: bytes) -> list[int]:
    """Token ids of one word, which the pattern found."""
    vocabulary = _vocabulary()
    ids = [vocabulary.byte_ids[byte] for byte in word]
    ids[-1] += 256  # the same byte at the end of a word
    return _merge(ids, vocabulary.merged)


def _merge(ids: list[int], merged: dict[tuple[int, int], int]) -> list[int]:
    """The pairs merged one by one, first those learned first, from left to right.

    A queue and links to the neighbours keep long words from taking quadratic time. No merge
    gives rise to one that was learned before it, so the queue's order is that of whole sweeps.
    """
    left, right = list(range(-1, len(ids))), list(range(1, len(ids) + 1))
    queue = [(merged[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in merged]
    heapify(queue)
    ids.append(_GONE)  # beyond both ends, as ids[-1] is also left of the first
    while queue:
        token, i = heappop(queue)
        j = right[i]
        if merged.get((ids[i], ids[j])) != token:
            continue  # one of the two was merged since
        ids[i], ids[j] = token, _GONE
        right[i] = right[j]
        left[right[i]] = i
        for a, b in ((left[i], i), (i, right[i])):
            new = merged.get((ids[a], ids[b]))
            if new is not None:
                heappush(queue, (new, a))
    return [token for token in ids if token != _GONE]


class _Vocabulary:
    """The merge table: `symbols` of ids and back, `merged` ids of pairs in the order learned."""

    def __init__(self) -> None:
        packed = resources.files("leanclip").joinpath("bpe_simple_vocab_16e6.txt.gz").read_bytes()
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
        self.symbols += [f"{text}</w>" for text in self.special]  # so that decode spaces them
        assert len(self.symbols) == VOCAB_SIZE


@cache
def _vocabulary() -> _Vocabulary:
    return _Vocabulary()


@cache
def characters_of_bytes() -> dict[int, str]:
    """A printable character for each byte, in the order that fixes the first 256 ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    table = {byte: chr(byte) for byte in printable}
    rest = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + i) for i, byte in enumerate(rest)}


@cache
def byte_of_character() -> dict[str, int]:
    """The bytes that the characters of symbols stand for."""
    return {c: byte for byte, c in characters_of_bytes().items()} | {" ": ord(" ")}
