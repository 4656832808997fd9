"""The tensors of a CLIP in files of PyTorch's and safetensors, however a program wrapped them.

    file or shards -> values -> every tensor by its path -> the model among them -> its names

A model is found by its token embedding, at any depth of dicts and under any prefix of names
(`module.`, `model._orig_mod.`, ...). Of several models the one that is not a moving average is
taken, unless a key chooses: `FILE#KEY`.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from leanclip.errors import WeightsError
from leanclip.weights.files import INDEX, read_json, read_safetensors, sniff
from leanclip.weights.torch_file import module_tensors, read_torch_legacy, read_torch_zip
from leanclip.weights.unpickle import Module, check_path, check_sharing, weights_errors

log = logging.getLogger("leanclip")

TORCHSCRIPT = ("TorchScript code, which was not read",)
_MAX_DEPTH = 6  # of dicts in dicts
# Modules that wrap others, anywhere in a name; no name of CLIP's has such a part.
_WRAPPER = r"(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)"
_WRAPPERS = re.compile(rf"(?:(?<=^)|(?<=\.)){_WRAPPER}\.")
_MARKS = (  # a model's prefix, and a name that shows it; the surest first
    re.compile(r"((?:.*?\.)??)(?:text\.|text_model\.embeddings\.)?token_embedding\.weight"),
    re.compile(r"((?:.*?\.)??)(?:visual|vision_model)\..*"),
)
_ROOTS = {  # how a model's names begin, in OpenAI's, open_clip's and Hugging Face's form
    *("visual", "transformer", "text", "token_embedding", "positional_embedding", "ln_final"),
    *("text_projection", "logit_scale", "logit_bias", "attn_mask"),
    *("vision_model", "text_model", "visual_projection"),
    *("input_resolution", "context_length", "vocab_size"),
}
_AVERAGE = re.compile(r"(?:^|[._])(?:ema|swa|averaged?|avg|shadow|polyak)(?:$|[._])")
_MOMENTS = re.compile(r"(?:^|[._])optim")  # of an optimiser, by the names of parameters


def read_state_dict(
    path: Path, key: str | None = None
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The tensors of a model in a file or an index of shards, and the names of what else is there.

    Args:
        path: a file of PyTorch's or safetensors, or an index of shards.
        key: which of several models to take; "ema": the moving average.

    Raises:
        WeightsError: a file is damaged, holds more than data, no tensors, or several models.
    """
    loaded = _read_shards(path) if path.name.endswith(INDEX) else _read_file(path)
    if isinstance(loaded, Module):
        with weights_errors(path, "TorchScript"):
            tensors, unexpected = module_tensors(loaded), TORCHSCRIPT
    else:
        tensors, unexpected = _unwrap(loaded, path, key)
    with weights_errors(path, "file of PyTorch's"):
        check_sharing((tensor.data_ptr(), tensor.nbytes) for tensor in tensors.values())
    return tensors, unexpected


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file by name, whether or not they are a model's.

    Raises:
        WeightsError: the file is damaged, or holds more than data, or no tensors.
    """
    loaded = _read_file(path)
    if not isinstance(loaded, dict):
        raise WeightsError(f"{path}: holds a {type(loaded).__name__}, not tensors by name")
    with weights_errors(path, "file of tensors"):
        tensors = dict(_leaves(loaded, "", _MAX_DEPTH, set()))
        check_sharing((tensor.data_ptr(), tensor.nbytes) for tensor in tensors.values())
    return tensors


def named(keys: Sequence[str]) -> str:
    """The first few of many names."""
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return f"{', '.join(keys[:4])}{more}"


def _read_file(path: Path) -> object:
    match sniff(path):
        case "safetensors":
            return read_safetensors(path)
        case "zip":
            return read_torch_zip(path)
    return read_torch_legacy(path)


def _read_shards(index: Path) -> dict[object, object]:
    """All tensors of the files that an index names."""
    values: dict[object, object] = {}
    for name in sorted(set(read_json(index).get("weight_map", {}).values()), key=str):
        if not isinstance(name, str) or Path(name).name != name:
            raise WeightsError(f"{index}: {name!r} is not the name of a file beside it")
        part = _read_file(index.parent / name)
        if not isinstance(part, dict):
            raise WeightsError(
                f"{index.parent / name}: holds a {type(part).__name__}, not a state dict"
            )
        values |= part
    return values


def _unwrap(
    loaded: object, source: Path, key: str | None
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The model's tensors without prefixes, and the names of what is beside them."""
    if not isinstance(loaded, dict):
        raise WeightsError(f"{source}: holds a {type(loaded).__name__}, not a state dict")
    every = {}
    with weights_errors(source, "state dict"):
        for name, tensor in _leaves(loaded, "", _MAX_DEPTH, set()):
            every.setdefault(_WRAPPERS.sub("", name), tensor)
    if not every:
        raise WeightsError(
            f"{source}: holds no state dict; its keys are {', '.join(map(str, loaded))[:100]}"
        )
    prefix = _choose(every, source, key)
    if prefix is None:  # load_into names what is missing
        return every, ()
    tensors = {
        name.removeprefix(prefix): tensor for name, tensor in every.items() if _is_of(name, prefix)
    }
    unused, unexpected = (
        list(dict.fromkeys(names)) for names in _beside(loaded, "", prefix, set())
    )
    if unused:
        log.warning("%s: tensors that are not the model's are not used: %s", source, named(unused))
    return tensors, (*unused, *unexpected)


def _leaves(
    values: dict, path: str, depth: int, seen: set[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor in nested dicts by its path; of a dict in two places only the first."""
    seen.add(id(values))
    for name, value in values.items():
        if not isinstance(name, str):
            continue
        if isinstance(value, torch.Tensor):
            yield check_path(path + name), value
        elif isinstance(value, dict) and depth and id(value) not in seen:
            yield from _leaves(value, check_path(f"{path}{name}."), depth - 1, seen)


def _choose(every: dict[str, torch.Tensor], source: Path, key: str | None) -> str | None:
    """The prefix of the model to take; None if there is no model."""
    found: list[str] = []
    for mark in _MARKS:
        matches = [match[1] for name in every if (match := mark.fullmatch(name))]
        found = [prefix for prefix in dict.fromkeys(matches) if not _MOMENTS.search(prefix)]
        if found:
            break
    if key is not None:
        wanted = [
            prefix
            for prefix in found
            if f".{key}." in f".{prefix}" or (key == "ema" and _AVERAGE.search(prefix))
        ]
    else:
        wanted = [prefix for prefix in found if not _AVERAGE.search(prefix)] or found
    # The same tensors under several prefixes are one model: the shortest is taken.
    same = {_places(every, prefix): prefix for prefix in sorted(wanted, key=len, reverse=True)}
    names = ", ".join(f"{source.name}#{prefix.rstrip('.')}" for prefix in found if prefix)
    if key is not None and len(same) != 1:
        several = "several models" if same else "no model"
        raise WeightsError(f"{source}: {several} under #{key}; there are: {names or 'none'}")
    if len(same) > 1:
        raise WeightsError(f"{source}: holds several models; choose one of: {names}")
    return next(iter(same.values()), None)


def _places(every: dict[str, torch.Tensor], prefix: str) -> tuple[int, ...]:
    """The addresses of a model's values."""
    return tuple(sorted(t.data_ptr() for name, t in every.items() if _is_of(name, prefix)))


def _is_of(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and name[len(prefix) :].partition(".")[0] in _ROOTS


def _beside(values: dict, path: str, prefix: str, seen: set[int]) -> tuple[list[str], list[str]]:
    """Names of what is beside the model in the dicts that lead to it: tensors, and all else."""
    seen.add(id(values))
    tensors: list[str] = []
    unexpected: list[str] = []
    for name, value in values.items():
        here = _WRAPPERS.sub("", f"{path}{name}")
        if isinstance(value, torch.Tensor):
            dicts = _WRAPPERS.sub("", path)
            inside = prefix.removeprefix(dicts) if here.startswith(prefix) else ""
            first, _, rest = here.removeprefix(dicts + inside).partition(".")
            name = f"{inside}{first}.*" if rest else inside + first
            tensors += [] if _is_of(here, prefix) else [name]
        elif not isinstance(value, dict):
            unexpected.append(str(name))
        elif id(value) not in seen and prefix.startswith(_WRAPPERS.sub("", f"{path}{name}.")):
            inner = _beside(value, f"{path}{name}.", prefix, seen)
            tensors, unexpected = tensors + inner[0], unexpected + inner[1]
        else:
            unexpected.append(str(name))
    return tensors, unexpected
