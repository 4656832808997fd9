"""What leanclip raises for a user's mistake.

    LeanclipError
    ├── ConfigError    a setting, an option or an argument
    ├── DataError      a data folder, an image or a caption
    │   └── SampleError   one sample of many: skipped and counted, unless there are too many
    └── WeightsError   a file of weights or a checkpoint

A message is one line: what, where, what was found, what to do. The command line prints it
and exits with code 2. Broken invariants of our own are `assert`s, not these.
"""

import errno

# What names in untrusted files may do to a terminal or a log: break lines, move the cursor, reverse
# text; and surrogates, which stand for bytes that are not UTF-8 and cannot be encoded.
_CONTROLS = (*range(32), *range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_CONTROLS += (*range(0xD800, 0xE000),)
_SHOWN = {code: ascii(chr(code))[1:-1] for code in _CONTROLS}
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_SPARE = 1 << 26  # bytes that a machine has that is not short of memory


class LeanclipError(Exception):
    """Any mistake of the user's that leanclip can name; control characters are shown as escapes."""

    def __init__(self, message: str = "") -> None:
        super().__init__(escaped(message))


class ConfigError(LeanclipError):
    """A setting, an option or an argument is wrong."""


class DataError(LeanclipError):
    """A data folder, an image or a caption is missing or cannot be used."""


class SampleError(DataError):
    """One sample cannot be used; `kind` groups such errors where they are counted.

    Kinds are a few words, the same for the same fault: "missing file", "empty caption".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.kind, str(self))  # it crosses from workers


class WeightsError(LeanclipError):
    """A file of weights or a checkpoint is missing, damaged or of another shape."""


def escaped(text: str) -> str:
    """Text for a message or a log: control characters and surrogates as in Python's literals."""
    return text.translate(_SHOWN)


def one_line(error: BaseException) -> str:
    """What another library's error says, in a line that is not too long; else its kind."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def is_shortage(error: BaseException) -> bool:
    """Whether the machine lacks memory or open files: what was being read may be good."""
    if isinstance(error, MemoryError):
        try:
            bytearray(_SPARE)
        except MemoryError:
            return True
        return False  # it is the file that asks for more than there can be
    return isinstance(error, OSError) and error.errno in _SHORTAGES
