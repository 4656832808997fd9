"""OpenAI's `load` and `tokenize`.

    name -> download_root or leanclip's cache -> weights -> network.CLIP and its transform

As there, errors are RuntimeErrors. TorchScript is not supported: with `jit=True` a warning is given
and an ordinary module loaded.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from leanclip.config.model import ModelConfig
from leanclip.config.sections import to_plain
from leanclip.errors import DataError, LeanclipError, WeightsError
from leanclip.inference import load as inference
from leanclip.inference.model import InferenceModel
from leanclip.model import CLIP as LeanCLIP
from leanclip.model.skip_init import meta_device
from leanclip.openai.bpe import SimpleTokenizer
from leanclip.openai.network import CLIP, convert_weights, openais_settings
from leanclip.openai.transforms import Compose, steps_of
from leanclip.preprocess import tokenizer
from leanclip.weights import read_weights
from leanclip.weights.hub import OPENAI_FILES, OPENAI_URL, fetch_openai
from leanclip.weights.weights import infer_architecture

_MODELS = {name: f"{OPENAI_URL}/{file}" for name, file in OPENAI_FILES.items()}
_tokenizer = SimpleTokenizer()


def available_models() -> list[str]:
    """The names of the models that OpenAI publishes."""
    return list(_MODELS)


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    jit: bool = False,
    download_root: str | Path | None = None,
) -> tuple[CLIP, Compose]:
    """A model in evaluation mode, and the transform from a PIL image to its input.

    Weights are float32 on the CPU, elsewhere float16 by `convert_weights`.

    Args:
        name: one of `available_models()`, downloaded once; or a file or folder of weights in any
            format that leanclip reads.
        device: by default CUDA where there is one.
        jit: not supported; see above.
        download_root: the folder that published models are downloaded to; by default leanclip's
            cache.

    Raises:
        RuntimeError: there is no such model, or it cannot be downloaded or read.
    """
    if jit:
        words = "jit=True: TorchScript is not supported; a plain module is loaded instead"
        warnings.warn(words, stacklevel=2)
    try:
        clip = _read(name, "auto" if device is None else device, download_root)
    except LeanclipError as error:
        raise RuntimeError(str(error)) from None
    if clip.model.tokenizer.kind != "clip":
        raise RuntimeError(f"{name}: its tokeniser is not CLIP's; load it with leanclip.load")
    with meta_device():
        model = CLIP(**openais_settings(clip.model.config))
    model.load_state_dict(clip.model.state_dict(), assign=True)
    if clip.device.type != "cpu":
        convert_weights(model)
    return model.eval(), steps_of(clip.preprocess)


def tokenize(
    texts: str | Sequence[str], context_length: int = 77, truncate: bool = False
) -> torch.Tensor:
    """Token ids of each text, (B, context_length) int32.

    Raises:
        RuntimeError: a text is longer than the context, and `truncate` is false.
    """
    try:
        return tokenizer.tokenize(texts, context_length, truncate=truncate).int()
    except DataError as error:
        words = f"Input is too long for context length {context_length}: {error}"
        raise RuntimeError(words) from None


def _read(
    name: str | Path, device: str | torch.device, download_root: str | Path | None
) -> InferenceModel:
    """The model of a name."""
    if str(name) in _MODELS:
        root = None if download_root is None else Path(download_root)
        name = fetch_openai(OPENAI_FILES[str(name)], root)
    elif not str(name).startswith("hf-hub:") and not Path(name).exists():
        raise RuntimeError(f"Model {name} not found; available models = {available_models()}")
    try:
        clip = inference.load(name, device=device)
    except WeightsError:
        if (arch := _implied(name)) is None:
            raise
        clip = inference.load(name, device=device, arch=to_plain(arch))
    if not isinstance(clip.model, LeanCLIP):
        raise RuntimeError(f"{name}: is an exported model; name the weights that it was made from")
    if beyond := clip.model.config.extensions:
        raise RuntimeError(
            f"{name}: OpenAI's model has no {beyond[0]}; load it with leanclip.load instead"
        )
    return clip


def _implied(name: str | Path) -> ModelConfig | None:
    """The architecture that OpenAI's code infers from a bare state dict.

    None where the weights contain theirs, or heads of 64 channels do not fit.
    """
    weights = read_weights(name)
    if weights.model is not None:
        return None
    arch = infer_architecture(weights.tensors, source=weights.source, activation="quick_gelu")
    words = f"{name}: its activation is unknown; QuickGELU is used, as in OpenAI's package"
    warnings.warn(words, stacklevel=4)
    return arch


def _download(url: str, root: str | Path | None = None) -> str:
    """The file of one of the URLs in `_MODELS`, downloaded to `root` once.

    Raises:
        RuntimeError: it cannot be downloaded, or its SHA-256 is not the one in the URL.
    """
    base, checksum, file = url.rsplit("/", 2)
    folder = None if root is None else Path(root)
    try:
        return str(fetch_openai(f"{checksum}/{file}", folder, None if base == OPENAI_URL else base))
    except LeanclipError as error:
        raise RuntimeError(str(error)) from None
