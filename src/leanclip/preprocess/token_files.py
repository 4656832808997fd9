"""The libraries that read tokenisers' files: `tokenizers` and `sentencepiece`.

    tokenizer.json -> JsonModel        spiece.model -> PieceModel        text -> ids

A file may come from anyone. Its size is limited, and it is parsed in another process first, which
may take some time and memory and encodes a probe: a crash of C++ code, a panic of Rust code (no
Exception, and printed) and a regular expression that backtracks without end stay there.
"""

import json
import re
import string
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from tempfile import TemporaryFile
from typing import Any, NamedTuple

from leanclip.errors import WeightsError, one_line
from leanclip.io.optional_imports import import_optional

MAX_JSON = 256 << 20  # bytes; Gemma's has 34 MB, that of 900,000 pieces about 60
MAX_PIECES = 64 << 20  # bytes; that of 900,000 pieces has about 18 MB
MAX_SECONDS = 60  # to parse a file and to encode the probe in another process
MAX_MEMORY = 8 << 30  # bytes of that process

UNDERSCORE = "▁"  # sentence-piece's space
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PROBE = f"{'a' * 200} {'!' * 200} {' ' * 200}1{'é' * 200}"
_CHILD = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
content, probe = sys.stdin.buffer.read(), sys.argv[3]
if sys.argv[1] == "sentencepiece":
    from sentencepiece import SentencePieceProcessor
    model = SentencePieceProcessor()
    model.LoadFromSerializedProto(content)
    size = model.get_piece_size()
    [model.id_to_piece(i) for i in range(size)]
    [model.decode(model.encode(text)) for text in ("", "a", probe)]
else:
    from tokenizers import Tokenizer
    model = Tokenizer.from_str(content.decode())
    [model.decode(model.encode(text).ids) for text in ("", "a", probe)]
"""


class Added(NamedTuple):
    """A special token that is found in texts before anything else is done with them."""

    text: str
    id: int
    lstrip: bool = False  # takes the white space before it
    rstrip: bool = False  # and after it


class JsonModel:
    """A `tokenizer.json`.

    Args:
        content: of the file.
        lower: lower-case texts first, between special tokens.

    Raises:
        WeightsError: it is too large, damaged, or not a tokeniser; or the library is missing.
    """

    def __init__(self, content: bytes, lower: bool = False) -> None:
        library = import_optional(
            "tokenizers", "its tokenizer.json", extra="tokenizers", error=WeightsError
        )
        if len(content) > MAX_JSON:
            raise WeightsError(_too_large(len(content), MAX_JSON))
        with _tried_elsewhere("tokenizers", content):
            values = _json_of(content)
        with _library_errors("not a tokeniser of the library tokenizers"):
            model = library.Tokenizer.from_str(content.decode("utf-8"))
            model.no_padding()
            model.no_truncation()
            if lower and '"Lowercase"' not in json.dumps(values.get("normalizer")):
                steps = [library.normalizers.Lowercase()]
                steps += [] if model.normalizer is None else [model.normalizer]
                model.normalizer = library.normalizers.Sequence(steps)
            self._model, self._specials = model, model.num_special_tokens_to_add(False)
            self.vocab_size = 1 + max(model.get_vocab(True).values(), default=-1)

    def encode(self, text: str, length: int | None = None) -> list[int]:
        """Ids with special tokens, of which texts keep all when they are cut to a length."""
        with _library_errors(f"its tokeniser cannot encode {text[:60]!r}"):
            encoding = self._model.encode(text, add_special_tokens=False)
            if length is not None:
                encoding.truncate(max(0, length - self._specials))
            return self._model.post_process(encoding).ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        with _library_errors("its tokeniser cannot decode these ids"):
            return self._model.decode(ids, skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        """The id of a token; None: there is none."""
        return self._model.token_to_id(token)


class PieceModel:
    """A `spiece.model`, `sentencepiece.bpe.model` or `tokenizer.model`.

    Args:
        content: of the file.
        added: special tokens inside texts.
        suffix: ids that end every text; not repeated where the text has them.
        prefix: ids that begin every text.
        offset: added to the ids of pieces.
        siglip: clean texts as transformers' SiglipTokenizer, between special tokens.
        unknown: the id of what has no piece; None: as in the file.

    Raises:
        WeightsError: it is too large, damaged, or not a sentence-piece model; or the library is
            missing.
    """

    def __init__(
        self,
        content: bytes,
        added: tuple[Added, ...],
        prefix: tuple[int, ...],
        suffix: tuple[int, ...],
        offset: int,
        siglip: bool,
        unknown: int | None,
    ) -> None:
        self._model = _processor(content)
        self.added = {one.text: one for one in added}
        self._prefix, self._suffix, self._offset = list(prefix), list(suffix), offset
        self._siglip, self._unknown = siglip, unknown
        names = sorted(map(re.escape, self.added), key=len, reverse=True)  # the longest first
        self._pattern = re.compile(f"({'|'.join(names)})") if names else None
        self._unk = self._model.unk_id()
        self._unk_piece = self._model.id_to_piece(self._unk) if self._unk >= 0 else ""
        self._unk_length = len(self._model.encode(self._unk_piece))
        ids = [self._model.get_piece_size() - 1 + offset, *(one.id for one in added)]
        self.vocab_size = 1 + max([*ids, *prefix, *suffix])

    def encode(self, text: str, length: int | None = None) -> list[int]:
        """As `JsonModel.encode`."""
        with _library_errors(f"its tokeniser cannot encode {text[:60]!r}"):
            ids = self._encode(text)
        if length is not None:
            ids = ids[: max(0, length - len(self._prefix) - len(self._suffix))]
        end = [] if self._siglip and ids[-1:] == self._suffix else self._suffix
        return self._prefix + ids + end

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        special = {*self._prefix, *self._suffix, *(one.id for one in self.added.values())}
        size = self._model.get_piece_size()
        pieces = [i - self._offset for i in ids if i not in special]
        with _library_errors("its tokeniser cannot decode these ids"):
            return self._model.decode([i for i in pieces if 0 <= i < size])

    def _encode(self, text: str) -> list[int]:
        if not self._siglip:
            return [i for part in self._parts(text) for i in self._ids(part, self._model.encode)]
        parts = self._parts(UNDERSCORE + text.replace(UNDERSCORE, " "))
        found = [self._ids(part, self._siglip_ids) for part in parts]
        # A space before a special token at the beginning of a text is none.
        if (
            found[0] == [self._model.piece_to_id(UNDERSCORE)]
            and parts[1:2]
            and (parts[1] in self.added)
        ):
            del found[0]
        return [i for ids in found for i in ids]

    def _parts(self, text: str) -> list[str]:
        """The text, split at special tokens, with the white space that they take removed."""
        if self._pattern is None:
            return [text]
        parts = self._pattern.split(text)  # every second one is a special token
        for i in range(1, len(parts), 2):
            one = self.added[parts[i]]
            parts[i - 1] = parts[i - 1].rstrip() if one.lstrip else parts[i - 1]
            parts[i + 1] = parts[i + 1].lstrip() if one.rstrip else parts[i + 1]
        return [part for part in parts if part]

    def _ids(self, part: str, encode: Any) -> list[int]:
        if part in self.added:
            return [self.added[part].id]
        return [
            self._unknown if i == self._unk and self._unknown is not None else i + self._offset
            for i in encode(part)
        ]

    def _siglip_ids(self, part: str) -> list[int]:
        """Pieces of a text in lower case without punctuation, of which the first has no space.

        As in transformers: the model adds a space before a text, so that the text is encoded
        behind the unknown token, whose own pieces are dropped.
        """
        part = " ".join(part.lower().translate(_PUNCTUATION).split())
        ids = self._model.encode(self._unk_piece + part)
        return ids[self._unk_length :] if len(ids) >= self._unk_length else ids


def piece_count(content: bytes) -> int:
    """The number of pieces of a sentence-piece model.

    Raises:
        WeightsError: as `PieceModel`.
    """
    return _processor(content).get_piece_size()


@lru_cache(4)
def _processor(content: bytes) -> Any:
    library = import_optional(
        "sentencepiece", "its sentence-piece model", extra="tokenizers", error=WeightsError
    )
    if len(content) > MAX_PIECES:
        raise WeightsError(_too_large(len(content), MAX_PIECES))
    with _tried_elsewhere("sentencepiece", content):
        pass
    with _library_errors("not a sentence-piece model"):
        model = library.SentencePieceProcessor()
        model.LoadFromSerializedProto(content)
    return model


def _json_of(content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except RecursionError:
        raise WeightsError("not a tokeniser: nested too deeply") from None
    except ValueError as error:
        raise WeightsError(f"not JSON: {one_line(error)}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise WeightsError("not a tokeniser: it has no model")
    return values


def _too_large(size: int, most: int) -> str:
    return f"{size:,} bytes are more than a tokeniser's file may have, {most:,}"


@contextmanager
def _tried_elsewhere(library: str, content: bytes) -> Iterator[None]:
    """Parse a file in another process, with limits of time and memory, while the block runs.

    Raises:
        WeightsError: that process failed.
    """
    with TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        command = [sys.executable, "-c", _CHILD, library, str(MAX_MEMORY), _PROBE]
        with subprocess.Popen(command, stdin=file, stderr=subprocess.PIPE) as process:
            try:
                yield
                errors = process.communicate(timeout=MAX_SECONDS)[1]
            except subprocess.TimeoutExpired:
                raise WeightsError(
                    f"not a tokeniser: reading it takes more than {MAX_SECONDS} seconds"
                ) from None
            finally:
                process.kill()
    if process.returncode:
        lines = errors.decode("utf-8", "replace").strip().splitlines()
        reason = lines[-1] if lines and process.returncode > 0 else ""
        reason = reason or f"signal {-process.returncode}"
        raise WeightsError(f"not a tokeniser: {library} fails on it: {reason[:200]}")


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Raise a library's errors as a WeightsError; panics of Rust derive from BaseException."""
    try:
        yield
    except (WeightsError, MemoryError):
        raise
    except Exception as error:
        raise WeightsError(f"{what}: {one_line(error)}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise WeightsError(f"{what}: {one_line(error)}") from None
