"""Hugging Face's folders of dual encoders: config.json, safetensors or bin, processor, tokeniser.

config.json -> its family (huggingface_families.py) -> architecture, names of the tensors
architecture -> the family that has it -> config.json, names of the tensors
"""

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from leanclip.config.model import ModelConfig
from leanclip.errors import ConfigError, WeightsError
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.text import Tokenizer
from leanclip.preprocess.tokenizer import END, START, merges, vocabulary
from leanclip.weights import huggingface_config
from leanclip.weights import tokenizer as tokenizers
from leanclip.weights.files import MALFORMED, find_file, read_json
from leanclip.weights.huggingface_families import (
    CHINESE_CLIP,
    CLIP,
    FAMILIES,
    NAFLEX,
    SIGLIP,
    Family,
)
from leanclip.weights.names import to_ours, to_theirs
from leanclip.weights.processor import default_preprocess, read_processor, to_values
from leanclip.weights.state_dict import read_state_dict
from leanclip.weights.weights import Weights

log = logging.getLogger("leanclip")

# Cleaning that the classes which normalise texts do as well, but for HTML's entities.
_CLEANED_BY = {
    "lower": ("none", "whitespace", "lower"),
    "siglip": ("none", "whitespace", "lower", "canonicalize"),
}
_SIGLIP_2 = 256000  # ids of the second generation's tokeniser; its images are resized bilinearly

FILES = ("model.safetensors", "pytorch_model.bin")  # or an index of shards of such a name

_TOKENIZER_CLASSES = (None, "CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast")
_OTHER_TOKENIZERS = ("vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
# Counters from 0 that old versions stored, and BERT's pooler, which no class here uses.
_UNUSED = (".position_ids", ".token_type_ids", "text_model.pooler.dense.weight")
_UNUSED += ("text_model.pooler.dense.bias",)


def is_folder(folder: Path) -> bool:
    """Whether a folder is in this format."""
    file = folder / "config.json"
    return file.is_file() and str(read_json(file).get("model_type")) in FAMILIES


def is_state_dict(names: Collection[str]) -> bool:
    """Whether tensors have this format's names."""
    return any(name.startswith("vision_model.") for name in names)


def from_state_dict(
    source: Path, tensors: Mapping[str, torch.Tensor], model: ModelConfig | None
) -> Weights:
    """Weights of tensors alone.

    CLIP's and MetaCLIP 2's do not determine their activation. The others have that of their family,
    and their published widths determine the rest; but their tokeniser is not among tensors.

    Raises:
        WeightsError: some of a block's queries, keys and values are missing, or other tensors.
    """
    family = _family_of_names(tensors)
    ours = _to_ours(tensors, family)
    if model is not None or family is CLIP:
        return Weights(source, "hf", ours, model)
    try:
        model = huggingface_config.infer(family, ours)
    except (*MALFORMED, ConfigError) as error:
        raise WeightsError(f"{source}: not {family.model}'s: {error} is missing or odd") from None
    if model is None:
        return Weights(source, "hf", ours)
    patch = model.vision_patch_size if family is NAFLEX else None
    preprocess = default_preprocess(family.image_processor, model.image_resolution, patch)
    if model.vocab_size == _SIGLIP_2:
        preprocess = replace(preprocess, interpolation="bilinear")
    notes = (
        "tensors alone: the architecture is that of the published model of these sizes, the "
        "tokeniser CLIP's, which is not its own: load its folder to encode texts",
    )
    return Weights(source, "hf", ours, model, preprocess, notes=notes)


def read_folder(folder: Path, arch: ModelConfig | None) -> Weights:
    """Read a folder in this format; `arch` takes the place of its config.json.

    Raises:
        WeightsError: a file is missing or damaged, or the architecture is not its family's.
    """
    file = find_file(folder, FILES)
    if file is None:
        raise WeightsError(f"{folder}: has config.json, but none of {', '.join(FILES)}")
    tensors, unexpected = read_state_dict(file)
    values = read_json(folder / "config.json")
    family = FAMILIES[values["model_type"]]
    tokenizer = read_tokenizer(folder)
    model = arch or _with_tokenizer(
        _architecture(folder / "config.json", values), family, tokenizer
    )
    notes = ()
    if tokenizer is None and model.transformer_eos_id not in (None, END):
        notes = (
            f"its eos_token_id is {model.transformer_eos_id}, CLIP's tokeniser ends texts with "
            f"{END}: they are all read at their first token, as in transformers",
        )
    preprocess = _preprocess(folder, family, model, is_exact=arch is None)
    ours = _to_ours(tensors, family)
    more: dict[str, Any] = {"notes": notes, "unexpected": unexpected}
    return Weights(folder, "hf", ours, model, preprocess, tokenizer, **more)


def read_preprocess(folder: Path) -> Preprocess | None:
    """The preprocessing of a folder in this format; None: CLIP's.

    Raises:
        WeightsError: it is damaged, or not supported.
    """
    values = read_json(folder / "config.json")
    family = FAMILIES[values["model_type"]]
    if family is CLIP:
        return read_processor(folder, None)
    return _preprocess(folder, family, _architecture(folder / "config.json", values))


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokeniser of a folder in this format; None: CLIP's.

    Raises:
        WeightsError: it is damaged, or not supported.
    """
    values = read_json(folder / "config.json")
    family = FAMILIES[values["model_type"]]
    if _is_clips_tokenizer(folder, family):
        check_tokenizer(folder)
        return None
    length = _architecture(folder / "config.json", values).context_length
    file = folder / tokenizers.CONFIG
    own = read_json(file).get("model_max_length") if file.is_file() else None
    if family is CHINESE_CLIP and type(own) is int and 0 < own < length:
        length = own
    return tokenizers.read_files(folder, length, model_type=family.model_type)


def write(folder: Path, weights: Weights, model: ModelConfig, preprocess: Preprocess) -> None:
    """Write a folder for the class of transformers that computes the same, and its processor.

    Raises:
        WeightsError: no class has an equivalent of something in the architecture.
    """
    try:
        family = huggingface_config.family_of(model)
    except ValueError as error:
        raise WeightsError(f"{weights.source}: {error}") from None
    try:
        processor = to_values(preprocess, family.image_processor, family.processor)
    except ValueError as error:
        raise WeightsError(f"{weights.source}: {family.image_processor} has no {error}") from None
    try:
        tensors = to_theirs(weights.tensors, family.rules)
    except KeyError as error:
        raise WeightsError(f"{weights.source}: {family.model} has no place for {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    files = {
        "config.json": huggingface_config.config(family, model, dtype),
        "processor_config.json": {
            "image_processor": processor,
            "processor_class": family.processor,
        },
        "preprocessor_config.json": processor,  # for transformers before 5
    }
    for name, values in files.items():
        _write_json(folder / name, values)
    _write_tokenizer(folder, weights, model, family)


def _is_clips_tokenizer(folder: Path, family: Family) -> bool:
    """Whether a folder's tokeniser must be CLIP's: by its merges, or as CLIPModel has no other."""
    if _are_clips(_merges(folder)):
        return True
    if family is not CLIP or not (folder / tokenizers.JSON).is_file():
        return family is CLIP
    model = read_json(folder / tokenizers.JSON).get("model")
    return isinstance(model, dict) and model.get("vocab") == vocabulary()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")


def _write_tokenizer(folder: Path, weights: Weights, model: ModelConfig, family: Family) -> None:
    tokenizer = weights.tokenizer or Tokenizer(model.context_length)
    if tokenizer.kind == "clip":
        special = _special_tokens()
        if family is not CLIP:  # its towers attend to padding, which is the id 0 here
            special["pad_token"] = next(word for word, id_ in vocabulary().items() if not id_)
        config: dict[str, Any] = special | {"tokenizer_class": "CLIPTokenizer"}
        config["do_lower_case"] = True
        _write_json(folder / "vocab.json", vocabulary())
        _write_json(folder / "special_tokens_map.json", special)
        (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *merges())) + "\n")
    else:
        tokenizers.write_files(folder, tokenizer)
        config = json.loads(tokenizer.config or "{}")
        if tokenizer.clean not in _CLEANED_BY.get(tokenizer.normalize, ("none", "whitespace")):
            log.warning(
                "%s: its texts are cleaned (%s), which Hugging Face's tokenisers do not do: clean "
                "them before the tokeniser of %s",
                *(weights.source, tokenizer.clean, folder),
            )
    config["model_max_length"] = tokenizer.context_length
    if not (model.transformer_causal or model.transformer_padding_mask):
        config["model_input_names"] = ["input_ids"]  # padding is attended: no mask
    _write_json(folder / tokenizers.CONFIG, config)


def _with_tokenizer(model: ModelConfig, family: Family, tokenizer: Tokenizer | None) -> ModelConfig:
    """An architecture with the padding and the context of its tokeniser, which decides on both."""
    changes: dict[str, Any] = {"transformer_pad_id": tokenizer.pad_id if tokenizer else 0}
    if family is CHINESE_CLIP and tokenizer is not None:
        changes["context_length"] = tokenizer.context_length
        rows = model.text_positions
        changes["transformer_positions"] = None if rows == tokenizer.context_length else rows
    return model.model_copy(update=changes)


def _preprocess(
    folder: Path, family: Family, model: ModelConfig, *, is_exact: bool = True
) -> Preprocess:
    """Of the processor in a folder, or its class's defaults; exact: it must suit the model."""
    side = model.image_resolution
    patch = model.vision_patch_size if model.vision_positions == "resized" else None
    kind = family.image_processor
    found = read_processor(folder, side if is_exact else None, patch, kind)
    return found or default_preprocess(kind, side, patch)


def _to_ours(tensors: Mapping[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    theirs = {name: tensor for name, tensor in tensors.items() if not name.endswith(_UNUSED)}
    return to_ours(theirs, family.rules)


def _family_of_names(tensors: Mapping[str, torch.Tensor]) -> Family:
    """The family that tensors alone belong to; MetaCLIP 2's have CLIP's names."""
    if "text_model.embeddings.word_embeddings.weight" in tensors:
        return CHINESE_CLIP
    if "vision_model.head.probe" not in tensors:
        return CLIP
    patches = tensors.get("vision_model.embeddings.patch_embedding.weight")
    return NAFLEX if patches is not None and patches.ndim == 2 else SIGLIP


def check_tokenizer(folder: Path) -> None:
    """Check that a folder's tokeniser, if it has one, is CLIP's.

    Raises:
        WeightsError: it is another one, with other ids; names the file.
    """

    def values_of(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).is_file() else {}

    def check(name: str, what: str, is_clips: bool) -> None:
        if not is_clips:
            raise WeightsError(
                f"{folder / name}: {what} is not CLIP's; others are read from a tokenizer.json"
            )

    for name in _OTHER_TOKENIZERS:
        check(name, "this tokeniser", not (folder / name).is_file())
    kind = values_of("tokenizer_config.json").get("tokenizer_class")
    check("tokenizer_config.json", f"tokenizer_class {kind}", kind in _TOKENIZER_CLASSES)
    known = vocabulary()
    check("vocab.json", "this vocabulary", values_of("vocab.json") in ({}, known))
    if (folder / "merges.txt").is_file():
        check("merges.txt", "the tokeniser of these merges", _are_clips(_merges(folder)))
    if fast := values_of("tokenizer.json"):
        model = fast.get("model") or {}
        check("tokenizer.json", "this vocabulary", model.get("vocab") == known)
        pairs = [" ".join(m) if isinstance(m, list) else m for m in model.get("merges") or ()]
        check("tokenizer.json", "the tokeniser of these merges", _are_clips(pairs))
    added = {one.get("content"): one.get("id") for one in fast.get("added_tokens") or ()}
    for name, ids in (
        ("tokenizer.json", added),
        ("added_tokens.json", values_of("added_tokens.json")),
    ):
        more = [word for word, id_ in ids.items() if known.get(word) != id_]
        check(name, f"the tokeniser, to which it adds {', '.join(map(repr, more[:3]))},", not more)


def _merges(folder: Path) -> list[str]:
    """The lines of merges.txt after its version; none without it."""
    file = folder / "merges.txt"
    return file.read_text(encoding="utf-8").split("\n")[1:] if file.is_file() else []


def _are_clips(found: list[str]) -> bool:
    """Whether merges begin with CLIP's; its vocabulary cannot use others."""
    return found[: len(merges())] == merges()


def _architecture(where: Path, values: dict[str, Any]) -> ModelConfig:
    family = FAMILIES[values.get("model_type", CLIP.model_type)]
    try:
        return huggingface_config.architecture(family, values)
    except (*MALFORMED, ConfigError) as error:
        raise WeightsError(f"{where}: not {family.model}'s: {error}") from None


def _special_tokens() -> dict[str, str]:
    words = {id_: word for word, id_ in vocabulary().items() if id_ in (START, END)}
    end = words[END]
    return {"bos_token": words[START], "eos_token": end, "unk_token": end, "pad_token": end}
