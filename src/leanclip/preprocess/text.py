"""The tokeniser of a model, as data: texts -> the token ids (B, L) that its text tower reads.

    texts -> cleaned -> ids with special tokens -> cut or refused -> padded to the context

CLIP's own byte-pair encoding (tokenizer.py) is the default. A tokeniser is compared, hashed and
pickled by its content, so that it goes to data workers and other ranks, and into checkpoints.

Shapes: B texts, L context length.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from leanclip.errors import DataError
from leanclip.preprocess import tokenizer as clip_bpe
from leanclip.preprocess.tokenizer import CONTEXT_LENGTH, END, START, VOCAB_SIZE


@dataclass(frozen=True)
class Tokenizer:
    """CLIP's byte-pair encoding at a context length."""

    context_length: int = CONTEXT_LENGTH

    def __call__(self, texts: str | Sequence[str], truncate: bool = False) -> torch.Tensor:
        """Token ids of each text, with special tokens and padding: (B, L) int64.

        Raises:
            DataError: a text needs more than L tokens, and `truncate` is false.
        """
        return clip_bpe.tokenize(texts, self.context_length, truncate=truncate)

    @property
    def vocab_size(self) -> int:
        """The number of ids that a model needs: the highest one and 1."""
        return VOCAB_SIZE

    @property
    def pad_id(self) -> int:
        """The id of padding."""
        return 0

    @property
    def end_id(self) -> int | None:
        """The id that ends every text; None: texts have none."""
        return END

    @property
    def blank_id(self) -> int:
        """The token of a text that is computed but not counted."""
        return self.pad_id if self.end_id is None else self.end_id

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, with special tokens, of any length."""
        return [START, *clip_bpe.encode(text), END]

    def decode(self, ids: Sequence[int] | np.ndarray | torch.Tensor) -> str:
        """The text of token ids, without special tokens."""
        return clip_bpe.decode(ids)

    def lengths(self, tokens: torch.Tensor) -> torch.Tensor:
        """The columns (B,) that the rows of tokens (B, L) have before padding only."""
        return (tokens == END).int().argmax(dim=1) + 1

    def at(self, context_length: int) -> "Tokenizer":
        """This tokeniser at another context length."""
        return replace(self, context_length=context_length)

    def fingerprint(self) -> str:
        """SHA-256 of everything that the ids follow from."""
        facts = [clip_bpe.merges(), self.context_length]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The settings that are stored with weights, beside `files`."""
        return {"kind": "clip", "context_length": self.context_length}

    def files(self) -> dict[str, bytes]:
        """The files that are stored with weights, by name."""
        return {}


def too_long(text: str, length: int, context_length: int) -> DataError:
    """The error for a text of more tokens than the context."""
    return DataError(
        f"a caption of {length} tokens exceeds the context length of {context_length}: "
        f"{text[:60]!r}…; shorten it or truncate it (--truncate, in Python truncate=True)"
    )
