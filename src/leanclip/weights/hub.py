"""Weights by name: OpenAI's published files, and repositories on Hugging Face's hub.

Only names are fetched; a file that was fetched before is taken from the cache.
"""

import os
import re
from pathlib import Path

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
# At the top of a repository; pickles only where there are no other weights.
_SETTINGS = ("config.json", "processor_config.json", "preprocessor_config.json")
_SETTINGS += ("open_clip_config.json", "tokenizer_config.json", "vocab.json")
_SETTINGS += ("adapter_config.json", "tokenizer.json", "added_tokens.json", "vocab.txt", "*.model")
_SAFE = ("adapter_model.safetensors", "model*.safetensors*", "open_clip_model.safetensors")
_PICKLED = ("adapter_model.bin", "pytorch_model*.bin*", "open_clip_pytorch_model.bin")


def locate(source: str | Path) -> Path:
    """The file or folder of a source: a path, a published name, or a hub id.

    Raises:
        WeightsError: there is no such file, or it cannot be fetched.
    """
    path, name = Path(source), str(source)
    if path.exists():
        return path
    if name in OPENAI_FILES:
        return fetch_openai(OPENAI_FILES[name])
    if (repository := _repository(name)) is not None:
        return _fetch_hub(repository)
    raise WeightsError(f"{source}: no such file")


def locate_settings(source: str | Path) -> Path | None:
    """The folder of a source's JSON files, of a hub id fetched without its weights; None: a file.

    Raises:
        WeightsError: they cannot be fetched.
    """
    path, repository = Path(source), _repository(str(source))
    if path.exists() or str(source) in OPENAI_FILES or repository is None:
        return path if path.is_dir() else None
    return _fetch_hub(repository, weights=False)


def _repository(name: str) -> str | None:
    """The repository that a hub id names."""
    match = _HUB_ID.fullmatch(name)
    return match[2] if match and (match[1] or not Path(name).suffix) else None


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
    """A snapshot of a repository; huggingface_hub's cache and offline mode apply."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when it is imported
    what = f"{repository}: no such file, and fetching it from the hub"
    hub = import_optional("huggingface_hub", what, extra="hub", error=WeightsError)
    try:
        patterns = _SETTINGS + (_SAFE if weights else ())
        folder = Path(hub.snapshot_download(repository, allow_patterns=list(patterns)))
        if weights and not any(folder.glob("*.safetensors")):
            folder = Path(hub.snapshot_download(repository, allow_patterns=list(_PICKLED)))
        return folder
    except Exception as error:  # it raises errors of its own, of requests and of the file system
        raise WeightsError(
            f"{repository}: no such file, and the hub failed: {one_line(error)}"
        ) from None
