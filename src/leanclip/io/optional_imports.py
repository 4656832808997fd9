"""Libraries that leanclip can do without: imported where they are needed, or how to get them."""

from importlib import import_module
from typing import Any

from leanclip.errors import ConfigError, LeanclipError


def need(library: str, what: str, *, extra: str, error: type[LeanclipError] = ConfigError) -> Any:
    """The library's module.

    Args:
        library: its name, or that of a module in it.
        what: needs it.
        extra: of leanclip, that brings it.
        error: what is raised.

    Raises:
        LeanclipError: it is missing; says how to get it.
    """
    try:
        return import_module(library)
    except ImportError:
        name = library.partition(".")[0]
        raise error(
            f"{what} needs {name}: pip install -c constraints.txt -e '.[{extra}]'"
        ) from None
