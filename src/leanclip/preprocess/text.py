"""The tokeniser of a model, as data: texts -> the token ids (B, L) that its text tower reads.

    texts -> cleaned -> ids with special tokens -> cut or refused -> padded to the context

CLIP's own byte-pair encoding (tokenizer.py) is the default. The others have a file, which one of
two libraries reads (token_files.py). A tokeniser is compared, hashed and pickled by its content, so
that it goes to data workers and other ranks, and into checkpoints.

Shapes: B texts, L context length.
"""

import hashlib
import json
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch

from leanclip.errors import DataError, WeightsError
from leanclip.preprocess import tokenizer as clip_bpe
from leanclip.preprocess.token_files import Added, JsonModel, PieceModel
from leanclip.preprocess.tokenizer import CONTEXT_LENGTH, END, START, VOCAB_SIZE, repair

Kind = Literal["clip", "tokenizers", "sentencepiece"]
Clean = Literal["none", "whitespace", "whitespace_underscore", "lower", "canonicalize"]
Normalize = Literal["none", "lower", "siglip"]

FILES = {"tokenizers": "tokenizer.json", "sentencepiece": "spiece.model"}
CONFIG = "tokenizer_config.json"

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Tokenizer:
    """A tokeniser at a context length; by default CLIP's byte-pair encoding.

    Raises:
        WeightsError: a setting or the file is wrong, or the library that reads it is missing.
    """

    context_length: int = CONTEXT_LENGTH
    kind: Kind = "clip"
    clean: Clean = "none"  # of whole texts, as open_clip's option of that name
    normalize: Normalize = "none"  # between special tokens: Siglip2's lower case, SigLIP's cleaning
    pad_id: int = 0
    pads_left: bool = False
    strip_id: int | None = None  # becomes padding (CLIPA's `strip_sep_token`)
    # Only of sentence-piece models: their files name no special tokens.
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    added: tuple[Added, ...] = ()
    offset: int = 0
    unknown: int | None = None
    file: bytes = field(default=b"", repr=False)
    config: str = field(default="", repr=False, compare=False)  # tokenizer_config.json

    def __post_init__(self) -> None:
        for name, known in (("kind", Kind), ("clean", Clean), ("normalize", Normalize)):
            if getattr(self, name) not in get_args(known):
                raise WeightsError(f"tokenizer: {name}: {getattr(self, name)!r} is not supported")
        if self.kind == "clip":
            if any(getattr(self, one.name) != one.default for one in fields(self)[2:]):
                raise WeightsError("tokenizer: CLIP's byte-pair encoding has no other settings")
            return
        ends = [self.model.encode(text) for text in ("", "a")]
        if max(map(len, ends)) - 1 >= self.context_length:
            raise WeightsError(
                f"tokenizer: its special tokens do not fit the context length of "
                f"{self.context_length}"
            )
        if not 0 <= self.pad_id < self.vocab_size:
            raise WeightsError(f"tokenizer: pad_id: {self.pad_id} is not one of its ids")

    def __call__(self, texts: str | Sequence[str], truncate: bool = False) -> torch.Tensor:
        """Token ids of each text, with special tokens and padding: (B, L) int64.

        Raises:
            DataError: a text needs more than L tokens, and `truncate` is false.
        """
        if self.kind == "clip":
            return clip_bpe.tokenize(texts, self.context_length, truncate=truncate)
        texts = [texts] if isinstance(texts, str) else texts
        tokens = np.full((len(texts), self.context_length), self.pad_id, np.int64)
        for row, text in zip(tokens, texts, strict=True):
            ids = self._encode(text, self.context_length if truncate else None)
            if len(ids) > len(row):
                raise DataError(
                    f"a caption of {len(ids)} tokens exceeds the context length of {len(row)}: "
                    f"{text[:60]!r}…; shorten it or truncate it (--truncate, in Python "
                    f"truncate=True)"
                )
            row[len(row) - len(ids) if self.pads_left else 0 :][: len(ids)] = ids
        return torch.from_numpy(tokens)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, with special tokens, of any length."""
        if self.kind == "clip":
            return [START, *clip_bpe.encode(text), END]
        return self._encode(text, None)

    def decode(self, ids: Sequence[int] | np.ndarray | torch.Tensor) -> str:
        """The text of token ids, without special tokens."""
        if self.kind == "clip":
            return clip_bpe.decode(ids)
        return self.model.decode([int(i) for i in ids])

    def lengths(self, tokens: torch.Tensor) -> torch.Tensor:
        """The columns (B,) that the rows of tokens (B, L) have before padding only."""
        if self.kind == "clip":
            return (tokens == END).int().argmax(dim=1) + 1
        columns = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)  # (L,)
        if self.pads_left:
            return columns[-1:].expand(len(tokens))
        return ((tokens != self.pad_id) * columns).amax(dim=1).clamp(min=1)

    @cached_property
    def vocab_size(self) -> int:
        """The number of ids that a model needs: the highest one and 1."""
        return VOCAB_SIZE if self.kind == "clip" else self.model.vocab_size

    @cached_property
    def end_id(self) -> int | None:
        """The id that ends every text; None: texts have none."""
        if self.kind == "clip":
            return END
        last = {(self.model.encode(text) or [None])[-1] for text in ("", "a", "b")}
        end = last.pop()
        return None if last or end == self.strip_id else end

    @property
    def blank_id(self) -> int:
        """The token of a text that is computed but not counted."""
        return self.pad_id if self.end_id is None else self.end_id

    @property
    def name(self) -> str:
        """The name for messages."""
        return "CLIP's tokeniser" if self.kind == "clip" else "its tokeniser"

    def at(self, context_length: int) -> "Tokenizer":
        """This tokeniser at another context length."""
        if context_length == self.context_length:
            return self
        return replace(self, context_length=context_length)

    def fingerprint(self) -> str:
        """SHA-256 of everything that the ids follow from."""
        if self.kind == "clip":
            facts: list[Any] = [clip_bpe.merges(), self.context_length]
        else:
            facts = [self.to_dict(), hashlib.sha256(self.file).hexdigest()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The settings that are stored with weights, beside `files`."""
        always = ("context_length", "kind")
        values = {one.name: (getattr(self, one.name), one.default) for one in fields(self)[:-2]}
        return {n: v for n, (v, default) in values.items() if n in always or v != default}

    @property
    def file_name(self) -> str:
        """The name of the file, by which transformers' class finds it."""
        return "sentencepiece.bpe.model" if self.offset else FILES[self.kind]

    def files(self) -> dict[str, bytes]:
        """The files that are stored with weights, by name."""
        if self.kind == "clip":
            return {}
        own = {self.file_name: self.file}
        return own | ({CONFIG: self.config.encode()} if self.config else {})

    def __getstate__(self) -> dict[str, Any]:
        """The settings and the file: what a library made of it is made again."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def __hash__(self) -> int:
        return hash((self.kind, self.context_length, self.clean, self.normalize, self.file))

    @cached_property
    def model(self) -> JsonModel | PieceModel:
        """The file as its library reads it."""
        if self.kind == "tokenizers":
            return json_model(self.file, self.normalize == "lower")
        return piece_model(
            self.file,
            self.added,
            self.prefix,
            self.suffix,
            self.offset,
            self.normalize == "siglip",
            self.unknown,
        )

    def _encode(self, text: str, length: int | None) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:  # halves of a surrogate pair, which are no characters
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self.model.encode(_CLEAN[self.clean](text), length)
        if self.strip_id is None:
            return ids
        return [self.pad_id if i == self.strip_id else i for i in ids]


# At other lengths, and in other models, a file is not read again.
json_model, piece_model = lru_cache(4)(JsonModel), lru_cache(4)(PieceModel)


def _whitespace(text: str) -> str:
    return " ".join(repair(text).split())


def _canonicalize(text: str) -> str:
    text = repair(text).replace("_", " ").translate(_PUNCTUATION).lower()
    return " ".join(text.split())


_CLEAN: dict[str, Callable[[str], str]] = {
    "none": str,
    "whitespace": _whitespace,
    "whitespace_underscore": lambda text: " ".join(repair(text).replace("_", " ").split()),
    "lower": lambda text: _whitespace(text).lower(),
    "canonicalize": _canonicalize,
}
