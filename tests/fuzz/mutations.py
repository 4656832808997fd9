"""Files that are almost right: edits of valid ones, and bounds that whoever reads them must keep.

The tests here make a few dozen examples of each kind, always the same ones. More, and others each
time:

    LEANCLIP_FUZZ=2000 LEANCLIP_FUZZ_KEEP=found pytest tests/fuzz

makes 2000 of each, and keeps the files that something went wrong with in the folder `found`.
"""

import copy
import hashlib
import os
import random
import signal
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from leanclip.errors import LeanclipError

TIMES = int(os.environ.get("LEANCLIP_FUZZ", "0"))
_CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
_CHECKS += [HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture]
_KEEP = os.environ.get("LEANCLIP_FUZZ_KEEP")


def examples(few: int) -> settings:
    """So many examples by default, the same ones each time; more in a long run."""
    return settings(
        max_examples=TIMES or few,
        derandomize=not TIMES,
        database=None,
        deadline=None,  # `bounded` has its own, of each example
        suppress_health_check=_CHECKS,
    )


_NUMBERS = (0, 1, 2, 127, 128, 255, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64)
_KINDS = ("flip", "byte", "number", "number", "cut", "double", "swap", "end", "insert", "digits")
EDITS = st.lists(
    st.tuples(st.sampled_from(_KINDS), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    min_size=1,
    max_size=6,
)
Edits = Sequence[tuple[str, int, int]]


def edited(data: bytes, edits: Edits, marks: Sequence[int] = ()) -> bytes:
    """A file with a few edits, half of them near `marks`, where its structure is."""
    found = bytearray(data)
    for kind, where, what in edits:
        size = len(found)
        if not size:
            return bytes(found)
        at = where % size
        if marks and where % 2:
            at = min(marks[where // 2 % len(marks)] + what % 9, size - 1)
        match kind:
            case "flip":
                found[at] ^= 1 << what % 8
            case "byte":
                found[at] = what % 256
            case "number":  # of 2, 4 or 8 bytes, in either order
                form = ("<H", ">H", "<I", ">I", "<Q", ">Q")[what % 6]
                width = struct.calcsize(form)
                number = _NUMBERS[what // 6 % len(_NUMBERS)] % 2 ** (8 * width)
                found[at : at + width] = struct.pack(form, number)
            case "cut":
                del found[at : at + 1 + what % 64]
            case "double":
                found[at:at] = found[at : at + 1 + what % 512]
            case "swap":
                other, width = what % size, 1 + what % 16
                one, two = found[at : at + width], found[other : other + width]
                found[at : at + width], found[other : other + width] = two, one
            case "end":
                del found[at:]
            case "insert":
                found[at:at] = bytes([what % 256]) * (1 + what // 256 % 300)
            case "digits":  # of a text: a larger number, a longer word
                found[at:at] = (b"9" * 25, b"-1", b"\0", b'"', b"[" * 200, b"\xff\xfe")[what % 6]
    return bytes(found)


ODD = (None, True, -1, 0, 1, 2**31, 10**30, 10**400, 1e308, 0.5, "", "x" * 2000, "\ud800", "../x")
ODD += ([], {}, [None] * 4, [1] * 4, {"a": {}}, [[[[]]]])


def odd_values(facts: Any, edits: Edits) -> Any:
    """Plain values with some of them replaced by odd ones."""
    for kind, where, what in edits:
        place, choose = facts, random.Random(where)
        while isinstance(place, dict | list) and place:
            key = choose.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or not place[key] or choose.random() < 0.2:
                if kind == "cut" and isinstance(place, dict):
                    del place[key]
                else:
                    place[key] = copy.deepcopy(ODD[what % len(ODD)])
                break
            place = place[key]
    return facts


@contextmanager
def bounded(
    data: bytes | str, name: str, *, seconds: int = 20, megabytes: int = 300
) -> Iterator[None]:
    """Whatever is done within with a file of `data` ends soon, takes little memory, and raises
    nothing but LeanclipErrors of one line.
    """

    def late(*_: object) -> None:
        raise TimeoutError(f"over {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts anew
    start = _megabytes("VmRSS")
    try:
        try:
            yield
        except LeanclipError as error:
            check_words(error)
        grown = _megabytes("VmHWM") - start
        assert grown < megabytes, f"it took {grown} MB"
    except BaseException:
        keep(data, name)
        raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_words(error: Exception) -> None:
    """That an error is one line."""
    assert str(error), "an error without words"
    assert "\n" not in str(error), f"an error of several lines: {error}"


def keep(data: bytes | str, name: str) -> None:
    """Put a file aside, in a long run."""
    if _KEEP:
        content = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
        Path(_KEEP).mkdir(exist_ok=True)
        stem, dot, suffix = name.partition(".")
        (
            Path(_KEEP) / f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}{dot}{suffix}"
        ).write_bytes(content)


def _megabytes(what: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(what)).split()[1]) >> 10
