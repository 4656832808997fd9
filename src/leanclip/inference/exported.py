"""Run an exported folder: the towers as ONNX or torch.export programs, in place of a model.

    FOLDER/clip.json -> its towers' files -> `Exported`, with the two encoders of a CLIP

clip.json says what the towers read: how images are prepared, how texts are tokenised.

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
from leanclip.io.optional_imports import need
from leanclip.preprocess.images import Preprocess

INDEX = "clip.json"
FORMAT = "leanclip-export"
BACKENDS = ("onnx", "torch")

Tower = Callable[[torch.Tensor], torch.Tensor]


class Exported(nn.Module):
    """The two encoders, with a CLIP's names; there is nothing to train in it.

    Args:
        facts: what clip.json holds.
        image: normalised pixels (B, 3, R, R) -> (B, E).
        text: token ids (B, L) -> (B, E).
        digest: tells towers apart, as weights would.
    """

    def __init__(self, facts: dict[str, Any], image: Tower, text: Tower, digest: bytes) -> None:
        super().__init__()
        self.config = parse(ModelConfig, facts["model"], where="model")
        self.context_length = self.config.context_length
        self._is_any_length = bool(facts["text"]["dynamic_length"])
        self._image, self._text = image, text
        scale = torch.tensor(math.log(float(facts["logit_scale"])))
        self.logit_scale = nn.Parameter(scale, requires_grad=False)
        self.register_buffer("digest", torch.frombuffer(bytearray(digest), dtype=torch.uint8))

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (B, 3, R, R) -> raw image features (B, E)."""
        return self._image(pixels)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L), L up to the context length -> raw text features (B, E)."""
        if not self._is_any_length:
            tokens = F.pad(tokens, (0, max(0, self.context_length - tokens.shape[1])))
        return self._text(tokens)

    def parameter_count(self) -> int:
        """None is trained."""
        return 0


def is_exported(folder: Path) -> bool:
    """Whether a folder is of `leanclip export`."""
    return (folder / INDEX).is_file()


def read_exported(folder: Path, backend: str | None = None) -> tuple[Exported, Preprocess]:
    """The towers of a folder, ready to run on the CPU, and how their images are prepared.

    Args:
        folder: what `leanclip export` wrote.
        backend: "onnx" or "torch", which must be the folder's; None: onnx, for PyTorch's loader
            of programs runs pickles that are in them.

    Raises:
        WeightsError: a file is missing or damaged.
        ConfigError: it is of another backend, of "torch" and that was not said, or onnxruntime
            is missing.
    """
    try:
        facts = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        assert facts["format"] == FORMAT
        there = facts["backend"]
        if backend not in (None, there):
            raise ConfigError(f"{folder}: was exported to {there}; leave backend={backend!r} out")
        if there == "torch" and backend is None:
            raise ConfigError(
                f"{folder}: holds torch.export programs, which may run code of their author's when "
                f"they are loaded; if you trust it, say backend='torch'"
            )
        files = [folder / facts[tower]["file"] for tower in ("image", "text")]
        digest = hashlib.sha256()
        for path in files:
            for part in (path, _weights_beside(path)):
                digest.update(part.read_bytes() if part.exists() else b"")
        open_tower = _onnx if there == "onnx" else _torch
        image, text = (_File(open_tower, path.resolve()) for path in files)
        model = Exported(facts, image, text, digest.digest())
        preprocess = Preprocess.from_dict(facts["preprocess"])
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise WeightsError(f"{folder}: no exported model: {error!r}") from None
    return model.eval(), preprocess


class _File:
    """An opened tower. It is pickled as its file's path, and opened again where it is unpickled."""

    def __init__(self, open_tower: Callable[[Path], Tower], path: Path) -> None:
        self._arguments = open_tower, path
        self._tower = open_tower(path)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._tower(x)

    def __reduce__(self) -> tuple[Any, ...]:
        return _File, self._arguments

    def __deepcopy__(self, memo: dict[int, Any]) -> "_File":
        return self  # there is no state to share


def _weights_beside(path: Path) -> Path:
    """Where a large model's weights are, outside its file."""
    return path.with_name(f"{path.name}.data")


def _onnx(path: Path) -> Tower:
    onnxruntime = need("onnxruntime", "ONNX", extra="export")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(path) if _weights_beside(path).exists() else path.read_bytes(),
            options,
            providers=["CPUExecutionProvider"],
        )
    except Exception as error:  # onnxruntime's own kinds
        raise ValueError(f"{path.name}: {one_line(error)}") from None
    name = session.get_inputs()[0].name

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {name: x.cpu().numpy()})[0]))

    return run


def _torch(path: Path) -> Tower:
    try:
        program = torch.export.load(path).module()
    except Exception as error:  # of zips, of schemas, of its own
        raise ValueError(f"{path.name}: {one_line(error)}") from None
    return lambda x: program(x.cpu())
