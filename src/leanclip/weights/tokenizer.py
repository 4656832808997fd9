"""The tokeniser of weights: read from their folder, and written beside them."""

from pathlib import Path
from typing import Any

from leanclip.errors import WeightsError
from leanclip.preprocess.text import Tokenizer


def store(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write the files of a tokeniser into a folder; the settings to store beside them."""
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    return tokenizer.to_dict()


def stored(folder: Path, values: Any, context_length: int) -> Tokenizer:
    """The tokeniser that `store` has written, at a context length.

    Raises:
        WeightsError: a file is missing or damaged, or a setting is wrong.
    """
    if values is None or isinstance(values, str):  # CLIP's, of which once the name was stored
        return Tokenizer(context_length)
    if not isinstance(values, dict) or values.get("kind") != "clip":
        raise WeightsError(f"{folder}: tokenizer: {values!r} is not a tokeniser")
    return Tokenizer(context_length)
