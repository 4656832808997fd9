"""Write weights in any format that can hold them: `leanclip convert SRC DST --to FORMAT`."""

import logging
from dataclasses import replace
from pathlib import Path

from leanclip.errors import WeightsError
from leanclip.preprocess.images import Preprocess
from leanclip.weights import huggingface, native, open_clip, openai, passl
from leanclip.weights.weights import Weights, check_fits

log = logging.getLogger("leanclip")

_WRITERS = {"openai": openai, "open_clip": open_clip, "hf": huggingface, "passl": passl}
WEIGHTS_FORMATS = (native.FORMAT, *_WRITERS)


def write_weights(
    weights: Weights, destination: Path, format: str, *, provenance: str | None = None
) -> None:
    """Write weights bit by bit in another format.

    `openai` and `passl` are files, the others folders: see docs/checkpoints.md. Tensors keep their
    type. leanclip's own format stores a line on where they came from, `provenance`; by default
    the source that was converted.

    Raises:
        WeightsError: the format cannot hold the model, the architecture is not known, or there
            is something at the destination.
    """
    if format not in WEIGHTS_FORMATS:
        raise WeightsError(f"--to {format}: no such format; known: {', '.join(WEIGHTS_FORMATS)}")
    is_file = format in ("openai", "passl")
    if destination.exists() and (is_file or not destination.is_dir() or any(destination.iterdir())):
        raise WeightsError(f"{destination}: already exists; choose another name")
    model, preprocess = weights.model, weights.preprocess
    if model is None or preprocess is None:
        raise WeightsError(
            f"{weights.source}: does not contain its architecture; name it with --arch (a preset's "
            f"name, or a JSON or YAML file)"
        )
    check_fits(weights, model, is_exact=True)
    if is_file and weights.tokenizer is not None and weights.tokenizer.kind != "clip":
        raise WeightsError(
            f"{weights.source}: {format}'s files do not store a tokeniser, and its is not CLIP's; "
            f"convert it to leanclip, hf or open_clip"
        )
    if is_file and not _is_openais(preprocess, model.image_resolution):
        log.warning(
            "%s: %s's files do not store the preprocessing; whoever loads %s must know it: %s",
            weights.source,
            format,
            destination,
            preprocess,
        )
    if format == native.FORMAT:
        native.write(destination, weights, model, preprocess, provenance)
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    _WRITERS[format].write(destination, weights, model, preprocess)


def _is_openais(preprocess: Preprocess, resolution: int) -> bool:
    """Whether this is OpenAI's preprocessing, up to the rounding of the crop's offset."""
    return replace(preprocess, rounding="even") == Preprocess(resolution)
