"""CLIP's tokeniser written out plainly, step by step as OpenAI's goes: what ours is held against.

Words are kept once they were merged, as OpenAI's keeps them; there is no other shortcut. Only the
merge table is shared with leanclip.
"""

import html
from functools import cache
from itertools import pairwise

import ftfy
import regex
import torch

from leanclip.preprocess.tokenizer import merges, vocabulary

START, END = 49406, 49407
WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
SPACES = regex.compile(r"\s+")
IDS = vocabulary()
RANKS = {tuple(rule.split()): rank for rank, rule in enumerate(merges())}


def character_of_each_byte() -> dict[int, str]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


CHARACTERS = character_of_each_byte()


def clean(text: str) -> str:
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return SPACES.sub(" ", text).strip().lower()


def encode(text: str) -> list[int]:
    ids: list[int] = []
    for word in WORDS.findall(clean(text)):
        characters = "".join(CHARACTERS[byte] for byte in word.encode("utf-8"))
        ids.extend(IDS[symbol] for symbol in symbols_of(characters))
    return ids


@cache
def symbols_of(word: str) -> list[str]:
    """The pair learned first is merged wherever it stands, until no pair is in the table."""
    if word in ("<|startoftext|>", "<|endoftext|>"):
        return [word]
    symbols = [*word[:-1], word[-1] + "</w>"]
    while True:
        pairs = {pair for pair in pairwise(symbols) if pair in RANKS}
        if not pairs:
            return symbols
        first = min(pairs, key=lambda pair: RANKS[pair])
        merged, i = [], 0
        while i < len(symbols):
            if tuple(symbols[i : i + 2]) == first:
                merged.append("".join(first))
                i += 2
            else:
                merged.append(symbols[i])
                i += 1
        symbols = merged


def tokenize(texts: list[str], context_length: int = 77) -> torch.Tensor:
    tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        ids = [START, *encode(text), END]
        if len(ids) > context_length:
            ids = [*ids[: context_length - 1], END]
        row[: len(ids)] = torch.tensor(ids)
    return tokens
