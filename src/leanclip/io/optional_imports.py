"""Optional dependencies, imported when they are needed."""

from importlib import import_module
from typing import Any

from leanclip.errors import ConfigError, LeanclipError


def import_optional(
    library: str, what: str, *, extra: str, error: type[LeanclipError] = ConfigError
) -> Any:
    """Import a module of an optional dependency.

    Args:
        library: the module's name.
        what: the feature that needs it.
        extra: leanclip's extra that installs it.
        error: raised if it is missing.

    Raises:
        LeanclipError: it is missing; the message tells how to install it.
    """
    try:
        return import_module(library)
    except ImportError:
        name = library.partition(".")[0]
        raise error(
            f"{what} needs {name}: pip install -c constraints.txt -e '.[{extra}]'"
        ) from None
