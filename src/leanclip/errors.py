"""Exceptions for users' mistakes.

    LeanclipError
    ├── ConfigError    a setting, an option or an argument
    ├── DataError      a data folder, an image or a caption
    │   └── SampleError   one sample of many: skipped and counted, unless there are too many
    └── WeightsError   a file of weights or a checkpoint

A message is one line: what, where, what was found, what to do. The command line prints it and
exits with code 2. Internal invariants are `assert`s.
"""

import errno

# In untrusted names these break lines, move the cursor or reverse text in a terminal or a log.
# Surrogates stand for bytes that are not UTF-8, and cannot be encoded.
_CONTROLS = (*range(32), *range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_CONTROLS += (*range(0xD800, 0xE000),)
_ESCAPES = {code: ascii(chr(code))[1:-1] for code in _CONTROLS}
_RESOURCE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_SMALL_ALLOCATION = 1 << 26  # bytes


class LeanclipError(Exception):
    """A user's mistake; control characters in the message are escaped."""

    def __init__(self, message: str = "") -> None:
        super().__init__(escaped(message))


class ConfigError(LeanclipError):
    """A setting, an option or an argument is invalid."""


class DataError(LeanclipError):
    """A data folder, an image or a caption is missing or invalid."""


class SampleError(DataError):
    """One sample is invalid.

    Attributes:
        kind: for counting: the same short text for the same fault, such as "missing file".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.kind, str(self))  # pickled in data workers


class WeightsError(LeanclipError):
    """A file of weights or a checkpoint is missing, damaged or does not fit the model."""


def escaped(text: str) -> str:
    """Escape control characters and surrogates as in Python's literals."""
    return text.translate(_ESCAPES)


def one_line(error: BaseException) -> str:
    """The message of any exception in one line of at most 200 characters, or its type."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def is_shortage(error: BaseException) -> bool:
    """Whether the machine is short of memory or open files, and the data may be valid."""
    if isinstance(error, MemoryError):
        try:
            bytearray(_SMALL_ALLOCATION)
        except MemoryError:
            return True
        return False  # the data asks for more than any machine has
    return isinstance(error, OSError) and error.errno in _RESOURCE_ERRORS
