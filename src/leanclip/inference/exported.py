"""Run an exported folder: the towers as ONNX or torch.export programs instead of a model.

    FOLDER/clip.json -> the files of the towers -> `Exported`, with the two encoders of a CLIP

clip.json describes the inputs of the towers: preprocessing and tokeniser.

Shapes: B batch, L tokens, R resolution, E embedding.
"""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from leanclip.config.model import ModelConfig
from leanclip.config.sections import parse
from leanclip.errors import ConfigError, WeightsError, one_line
from leanclip.io.optional_imports import import_optional
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.text import Tokenizer
from leanclip.weights.tokenizer import stored

INDEX = "clip.json"
FORMAT = "leanclip-export"
BACKENDS = ("onnx", "torch")

Tower = Callable[[torch.Tensor], torch.Tensor]


class Exported(nn.Module):
    """The two encoders, under the names that a CLIP has; for inference only.

    Args:
        description: the content of clip.json.
        image: normalised pixels (B, 3, R, R) -> (B, E).
        text: token ids (B, L) -> (B, E).
        tokenizer: of the texts.
        digest: identifies the towers, as weights identify a model.
    """

    def __init__(
        self,
        description: dict[str, Any],
        image: Tower,
        text: Tower,
        tokenizer: Tokenizer,
        digest: bytes,
    ) -> None:
        super().__init__()
        self.config = parse(ModelConfig, description["model"], where="model")
        self.context_length = self.config.context_length
        self.tokenizer = tokenizer
        self._is_any_length = bool(description["text"]["dynamic_length"])
        self._image, self._text = image, text
        scale = torch.tensor(math.log(float(description["logit_scale"])))
        self.logit_scale = nn.Parameter(scale, requires_grad=False)
        self.register_buffer("digest", torch.frombuffer(bytearray(digest), dtype=torch.uint8))

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (B, 3, R, R) -> image features (B, E), not of unit length."""
        return self._image(pixels)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L), L up to the context length -> text features (B, E)."""
        if not self._is_any_length:
            missing = max(0, self.context_length - tokens.shape[1])
            tokens = F.pad(tokens, (0, missing), value=self.config.transformer_pad_id)
        return self._text(tokens)

    def parameter_count(self) -> int:
        """0: nothing is trainable."""
        return 0


def is_exported(folder: Path) -> bool:
    """Whether a folder is the output of `leanclip export`."""
    return (folder / INDEX).is_file()


def read_exported(folder: Path, backend: str | None = None) -> tuple[Exported, Preprocess]:
    """The towers of a folder, on the CPU, and their preprocessing.

    Args:
        folder: the output of `leanclip export`.
        backend: "onnx" or "torch", which must be that of the folder; None: onnx, because PyTorch's
            loader of programs executes pickles in them.

    Raises:
        WeightsError: a file is missing or damaged.
        ConfigError: the folder has another backend, "torch" was not set explicitly, or
            onnxruntime is missing.
    """
    try:
        description = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise ValueError(f"format {description['format']!r}")
        found = description["backend"]
        if backend not in (None, found):
            raise ConfigError(f"{folder}: exported to {found}; leave backend={backend!r} out")
        if found == "torch" and backend is None:
            raise ConfigError(
                f"{folder}: torch.export programs may execute code of their author when they are "
                f"loaded; if you trust this folder, set backend='torch'"
            )
        paths = [(folder / description[tower]["file"]).resolve() for tower in ("image", "text")]
        digest = hashlib.sha256()
        for path in paths:
            for part in (path, _external_weights(path)):
                digest.update(part.read_bytes() if part.exists() else b"")
        image, text = (_File(_onnx if found == "onnx" else _torch, path) for path in paths)
        tokenizer = _tokenizer(folder, description)
        model = Exported(description, image, text, tokenizer, digest.digest())
        preprocess = Preprocess.from_dict(description["preprocess"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{folder}: not an exported model: {error!r}") from None
    return model.eval(), preprocess


def _tokenizer(folder: Path, description: dict[str, Any]) -> Tokenizer:
    """The tokeniser of clip.json; without settings CLIP's."""
    settings = description["tokenizer"].get("settings")
    return stored(folder, settings, description["model"]["context_length"])


class _File:
    """A tower that is pickled as the path of its file, which is opened again by unpickling."""

    def __init__(self, open_tower: Callable[[Path], Tower], path: Path) -> None:
        self._arguments = open_tower, path
        self._tower = open_tower(path)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._tower(x)

    def __reduce__(self) -> tuple[Any, ...]:
        return _File, self._arguments

    def __deepcopy__(self, memo: dict[int, Any]) -> "_File":
        return self  # it has no state


def _external_weights(path: Path) -> Path:
    """The file beside an .onnx file that has the weights of a large model."""
    return path.with_name(f"{path.name}.data")


def _onnx(path: Path) -> Tower:
    onnxruntime = import_optional("onnxruntime", "ONNX", extra="export")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(path) if _external_weights(path).exists() else path.read_bytes(),
            options,
            providers=["CPUExecutionProvider"],
        )
    except Exception as error:  # onnxruntime's own classes
        raise ValueError(f"{path.name}: {one_line(error)}") from None
    name = session.get_inputs()[0].name

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {name: x.cpu().numpy()})[0]))

    return run


def _torch(path: Path) -> Tower:
    try:
        program = torch.export.load(path).module()
    except Exception as error:  # errors of zip files, schemas and its own
        raise ValueError(f"{path.name}: {one_line(error)}") from None
    return lambda x: program(x.cpu())
