"""Weights by name: OpenAI's published files, and repositories on Hugging Face's hub.

    name -> a path that exists, or published.py -> OpenAI's file, or a repository -> a folder

Of a repository with the same weights in several forms, the files of one are fetched. What was
fetched before is taken from the cache.
"""

import difflib
import os
import re
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from leanclip.config import published
from leanclip.errors import DataError, WeightsError, one_line
from leanclip.io.download import cache_folder, fetch
from leanclip.io.files import digest
from leanclip.io.optional_imports import import_optional
from leanclip.io.progress import ProgressBar

# openai/CLIP, clip/clip.py: the SHA-256 of each file is a part of its address.
OPENAI_URL = "https://openaipublic.azureedge.net/clip/models"
OPENAI_FILES = {
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599/RN101.pt",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd/RN50x4.pt",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa/RN50x16.pt",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c/RN50x64.pt",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/"
    "ViT-L-14-336px.pt",
}
_HUB_ID = re.compile(r"(hf-hub:)?([\w.-]+/[\w.-]+)")
_FILE = re.compile(r".*\.(pt|pth|bin|ckpt|safetensors|pdparams|npz|onnx|json|ya?ml|zip|tar)", re.I)


class _Form(NamedTuple):
    """The files of weights in one form, all at the top of a repository."""

    files: tuple[str, ...]  # patterns; the first one that is there, with its shards
    config: str = ""  # that goes with them, and only with them


_OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
_ADAPTER = _Form(("adapter_model.safetensors", "adapter_model.bin"), "adapter_config.json")
_FORMS = (  # in order of preference; pickles only where there are no other weights
    _Form(_OPEN_CLIP, _OPEN_CLIP_CONFIG),
    _Form(("model.safetensors",), "config.json"),
    _Form(("open_clip_pytorch_model.bin",), _OPEN_CLIP_CONFIG),
    _Form(("pytorch_model.bin",), "config.json"),
    _ADAPTER,
    _Form(("*.pt",)),
)
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_SETTINGS = ("config.json", "adapter_config.json", _OPEN_CLIP_CONFIG, *_PROCESSORS)
_SETTINGS += ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
_SETTINGS += ("added_tokens.json", "special_tokens_map.json", "*.model")


def locate(source: str | Path) -> Path:
    """The file or folder of a source: a path, a published name, or a hub id.

    Raises:
        WeightsError: there is no such file or model, several have this name, or it cannot be
            fetched.
    """
    path = Path(source)
    if path.exists():
        return path
    openai, repository = _resolve(str(source))
    if openai is not None:
        return fetch_openai(openai)
    if repository is not None:
        return _fetch_hub(repository)
    raise WeightsError(f"{source}: no such file{_suggestion(str(source))}")


def locate_settings(source: str | Path) -> Path | None:
    """The folder of a source's JSON files, of a hub id fetched without its weights; None: a file.

    Raises:
        WeightsError: they cannot be fetched, or several models have this name.
    """
    path = Path(source)
    if path.exists():
        return path if path.is_dir() else None
    _, repository = _resolve(str(source))
    folder = None if repository is None else _fetch_hub(repository, weights=False)
    return folder if folder and folder.is_dir() else None


def _resolve(name: str) -> tuple[str | None, str | None]:
    """OpenAI's file, or the repository, that a name stands for.

    Raises:
        WeightsError: it stands for several models, or for one that cannot be read.
    """
    if name in OPENAI_FILES:
        return OPENAI_FILES[name], None
    found = published.find(name)
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise WeightsError(f"{name}: an architecture with several published weights; use {names}")
    if found and not found[0].repository:
        return _openai_file(found[0].architecture), None
    if found:
        return None, found[0].repository
    match = _HUB_ID.fullmatch(name)
    if match and (match[1] or not _FILE.fullmatch(name)):
        return None, match[2]
    if what := published.why_not_read(name):
        raise WeightsError(f"{name}: {what}, which leanclip does not read; see leanclip models")
    return None, None


def _openai_file(architecture: str) -> str:
    """OpenAI's file of an architecture by open_clip's name."""
    names = (f"{architecture}.pt", f"{architecture}px.pt")
    return next(file for file in OPENAI_FILES.values() if file.endswith(names))


def _suggestion(name: str) -> str:
    """The published name that is nearest to a wrong one, as the end of a message."""
    wrong = name.lower()
    by_lower = {known.lower(): known for known in (*OPENAI_FILES, *published.names())}
    near = difflib.get_close_matches(wrong, by_lower, n=9, cutoff=0.75)
    if wrong in near and by_lower[wrong] == name:  # it is right: something else has failed
        return ""
    if not near:
        return (
            "" if _FILE.fullmatch(name) else ", and no published model (list them: leanclip models)"
        )

    def closeness(known: str) -> float:  # of equal ratios the one that begins alike
        matcher = difflib.SequenceMatcher(a=wrong, b=known)
        return matcher.ratio() * matcher.get_matching_blocks()[0].size

    best = max(near, key=closeness)
    return f"; did you mean {by_lower[best]}?"


def fetch_openai(file: str, folder: Path | None = None, base: str | None = None) -> Path:
    """A published file, fetched into a folder if it is not there; its SHA-256 is checked.

    Args:
        file: one of `OPENAI_FILES`.
        folder: by default the cache.
        base: the address that `file` is under; by default LEANCLIP_OPENAI_URL, or OpenAI's.

    Raises:
        WeightsError: it cannot be fetched, or is another file.
    """
    base = base or os.environ.get("LEANCLIP_OPENAI_URL", OPENAI_URL)
    checksum, _, name = file.partition("/")
    path = (folder or cache_folder()) / name
    if path.is_file() and digest(path) == checksum:
        return path
    with ProgressBar(f"fetching {name}", 1) as bar:
        try:
            return fetch(
                f"{base}/{file}",
                path,
                checksum=checksum,
                progress=lambda done, total: bar.update(done, total=total),
            )
        except (DataError, OSError) as error:
            raise WeightsError(f"{name}: {error}") from None


def _fetch_hub(repository: str, *, weights: bool = True) -> Path:
    """A snapshot of a repository, or its only file; huggingface_hub's cache and offline mode apply.

    Raises:
        WeightsError: it cannot be fetched.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when it is imported
    what = f"{repository}: no such file, and fetching it from the hub"
    hub = import_optional("huggingface_hub", what, extra="hub", error=WeightsError)
    try:
        folder = _snapshot(hub, repository, weights)
    except Exception as error:  # it raises errors of its own, of requests and of the file system
        raise WeightsError(
            f"{repository}: no such file, and the hub failed: {one_line(error)}"
            f"{_suggestion(repository)}"
        ) from None
    if not weights:
        return folder
    form, files = _form_of([path.name for path in folder.glob("*")])
    if form is None:
        raise WeightsError(f"{repository}: has no weights of a known form")
    return folder / files[0] if form is _FORMS[-1] else folder


def _snapshot(hub: Any, repository: str, weights: bool) -> Path:
    """A snapshot with the files of one form; without a network, what the cache has of it."""
    try:
        listed = [one.rfilename for one in hub.HfApi().model_info(repository).siblings]
    except Exception as error:
        if (folder := _cached(hub, repository, weights)) is not None:
            return folder
        raise error from None
    wanted = wanted_files(listed, weights=weights)
    return Path(hub.snapshot_download(repository, allow_patterns=wanted))


def _cached(hub: Any, repository: str, weights: bool) -> Path | None:
    """The snapshot in the cache, if it has the files of any form."""
    for form in _FORMS:
        settings = [name for name in _SETTINGS if name != _OPEN_CLIP_CONFIG or name == form.config]
        for file in form.files:
            stem, _, suffix = file.rpartition(".")
            tensors = [file, f"{file}.index.json", f"{stem}-*-of-*.{suffix}"] if weights else []
            try:  # it raises where files that match are missing
                folder = hub.snapshot_download(
                    repository, allow_patterns=[*settings, *tensors], local_files_only=True
                )
            except Exception:
                continue
            if not weights or _form_of([path.name for path in Path(folder).glob("*")])[0]:
                return Path(folder)
    return None


def wanted_files(listed: Collection[str], *, weights: bool = True) -> list[str]:
    """Of the files of a repository: settings, tokeniser, and the weights of one form."""
    top = [name for name in listed if "/" not in name]
    form, files = _form_of(top)
    if form is not _ADAPTER:  # which may be beside its base model
        files = [*files, *_files_of(_ADAPTER, top)]
    names = [name for name in top if any(fnmatch(name, pattern) for pattern in _SETTINGS)]
    if form is not None and form.config != _OPEN_CLIP_CONFIG:
        names = [name for name in names if name != _OPEN_CLIP_CONFIG]  # or it would be read
    return [*names, *(files if weights else [])]


def _form_of(names: Collection[str]) -> tuple[_Form | None, list[str]]:
    """The preferred form of the weights among files, and its files."""
    found = ((form, _files_of(form, names)) for form in _FORMS)
    return next(((form, files) for form, files in found if files), (None, []))


def _files_of(form: _Form, names: Collection[str]) -> list[str]:
    """The files of weights of a form: one, or an index and its shards; none: it is not there."""
    if form.config and form.config not in names:
        return []
    is_timm = _OPEN_CLIP_CONFIG in names and not any(name in names for name in _PROCESSORS)
    if form.config == "config.json" and is_timm:  # its image tower, beside open_clip's two
        return []
    for pattern in form.files:
        if len(found := [name for name in names if fnmatch(name, pattern)]) == 1:
            return found
        if (index := f"{pattern}.index.json") in names:
            stem, _, suffix = pattern.rpartition(".")
            shards = [name for name in names if fnmatch(name, f"{stem}-*-of-*.{suffix}")]
            return [index, *sorted(shards)]
    return []
