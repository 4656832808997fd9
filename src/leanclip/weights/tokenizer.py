"""The tokeniser of weights: read from their folder, checked, and written beside them.

    tokenizer_config.json, tokenizer.json | spiece.model | vocab.txt -> Tokenizer
    open_clip's text_cfg -> the same, of its folder or of the repository that it names

What a file does depends on the class that tokenizer_config.json names, as in transformers.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

from leanclip.config.model import ModelConfig
from leanclip.errors import WeightsError
from leanclip.io.files import LFS_POINTER, is_lfs_file
from leanclip.preprocess.text import CONFIG, FILES, Clean, Tokenizer, json_model
from leanclip.preprocess.token_files import MAX_JSON, Added, piece_count
from leanclip.preprocess.tokenizer import VOCAB_SIZE, vocabulary
from leanclip.weights.bert_vocabulary import json_of_vocabulary, with_bert_options
from leanclip.weights.files import MALFORMED, read_json
from leanclip.weights.hub import locate_settings

log = logging.getLogger("leanclip")

JSON, WORDS = "tokenizer.json", "vocab.txt"
PIECES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
_CLIPS = (None, "CLIPTokenizer", "PreTrainedTokenizer", "TokenizersBackend")
_GEMMAS = ("Siglip2Tokenizer", "GemmaTokenizer")
_PADS = {  # the default of each class that has one
    "SiglipTokenizer": "</s>",
    "BertTokenizer": "[PAD]",
    "CLIPTokenizer": "<|endoftext|>",
    **dict.fromkeys((*_GEMMAS, "T5Tokenizer", "XLMRobertaTokenizer", "RobertaTokenizer"), "<pad>"),
}
_RENAMED = {  # on the hub
    "bert-base-uncased": "google-bert/bert-base-uncased",
    "roberta-base": "FacebookAI/roberta-base",
    "xlm-roberta-base": "FacebookAI/xlm-roberta-base",
    "xlm-roberta-large": "FacebookAI/xlm-roberta-large",
}


def has_files(folder: Path) -> bool:
    """Whether a folder has the files of a tokeniser."""
    names = (JSON, WORDS, "vocab.json", *PIECES)
    return any((folder / name).is_file() for name in names)


def read_files(
    folder: Path,
    context_length: int,
    *,
    model_type: str = "",
    clean: Clean = "none",
    strip_sep_token: bool = False,
    pads_left: bool | None = None,
) -> Tokenizer:
    """The tokeniser of a folder with the files of Hugging Face's form.

    Args:
        folder: with a tokenizer.json, a sentence-piece model or a vocab.txt, and mostly a
            tokenizer_config.json.
        context_length: of the model.
        model_type: of config.json; texts of SigLIP 2 are lower-cased whatever its class.
        clean: open_clip's option.
        strip_sep_token: open_clip's option: separators become padding.
        pads_left: in place of `padding_side`.

    Raises:
        WeightsError: a file is missing or damaged, or something in it is not supported.
    """
    config = _config_of(folder)
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast") or None
    _check_supported(folder, config)
    if pads_left is None:
        default = "left" if name in _GEMMAS else "right"
        pads_left = config.get("padding_side", default) == "left"
    shared: dict[str, Any] = {
        "context_length": context_length,
        "clean": clean,
        "pads_left": pads_left,
        "config": json.dumps(config, indent=1) if config else "",
    }
    try:
        if name == "SiglipTokenizer" or not any((folder / one).is_file() for one in (JSON, WORDS)):
            if strip_sep_token:
                raise WeightsError("strip_sep_token is not supported for sentence-piece models")
            return _of_pieces(folder, name, config, shared)
        return _of_json(folder, name, config, shared, model_type, strip_sep_token)
    except MALFORMED as error:
        raise WeightsError(f"{folder / CONFIG}: cannot be read: {error!r}") from None
    except WeightsError as error:
        where = "" if str(error).startswith(str(folder)) else f"{folder}: "
        raise WeightsError(f"{where}{error}") from None


def read_open_clip(folder: Path, text: dict[str, Any]) -> Tokenizer | None:
    """The tokeniser of open_clip's `text_cfg`: of the folder, or of the repository it names.

    None: CLIP's.

    Raises:
        WeightsError: it is missing, or something in it is not supported.
    """
    options = dict(text.get("tokenizer_kwargs") or {})
    length = text.get("context_length", 77)
    name, source = text.get("hf_tokenizer_name"), folder
    for field in ("tokenizer_type", "tokenizer_mode"):
        if text.get(field) not in (None, "", "clip"):
            raise WeightsError(f"{folder}: text_cfg.{field}: {text[field]!r} is not supported")
    known = {"clean", "strip_sep_token"} if name else {"clean"}
    more = [key for key in options.keys() - known if options[key]]
    if more or (not name and options.get("clean", "lower") != "lower"):
        raise WeightsError(f"{folder}: text_cfg.tokenizer_kwargs: {options} is not supported")
    if not name or re.match(r"openai/clip-", str(name)):
        return None
    if not has_files(folder):
        if not isinstance(name, str) or not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", name):
            raise WeightsError(_missing(folder))
        try:
            found = locate_settings(f"hf-hub:{_RENAMED.get(name, name)}")
        except WeightsError as error:
            raise WeightsError(f"{_missing(folder)}; hf_tokenizer_name: {error}") from None
        assert found is not None
        source = found
    return read_files(
        source,
        length,
        clean=options.get("clean", "whitespace"),
        strip_sep_token=bool(options.get("strip_sep_token")),
        pads_left=False,
    )


def open_clip_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields of `text_cfg` for a tokeniser whose files are in the same folder.

    open_clip cleans all texts: a tokeniser whose texts are not cleaned gets the least of it, and a
    warning is logged.
    """
    if tokenizer.kind == "clip":
        return {}
    options: dict[str, Any] = {"clean": tokenizer.clean}
    if tokenizer.clean == "none":
        options["clean"] = "lower" if tokenizer.normalize == "lower" else "whitespace"
        log.warning(
            "open_clip cleans texts before they are encoded (%s): ids of texts with broken "
            "characters, HTML entities or several spaces differ",
            options["clean"],
        )
    if tokenizer.strip_id is not None:
        options["strip_sep_token"] = True
    return {"hf_tokenizer_name": ".", "tokenizer_kwargs": options}


def check_fits_model(source: Path, tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Check that a model can read what its tokeniser gives; CLIP's is checked where it is used.

    Raises:
        WeightsError: it has fewer ids, or is read at an end token that texts do not have.
    """
    if tokenizer.kind == "clip":
        return
    if tokenizer.vocab_size > model.vocab_size:
        raise WeightsError(
            f"{source}: its tokeniser has {tokenizer.vocab_size} ids, its token embedding "
            f"{model.vocab_size}; they do not belong together"
        )
    eos = model.transformer_eos_id
    if model.transformer_pool == "eos" and tokenizer.end_id != eos:
        ends = "without an end token" if tokenizer.end_id is None else f"with {tokenizer.end_id}"
        raise WeightsError(
            f"{source}: its texts are read at the token {eos}, its tokeniser ends them {ends}; "
            f"they do not belong together"
        )


def write_files(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the files of a tokeniser into a folder; CLIP's has none."""
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)


def store(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """As `write_files`; returns the settings to store beside them."""
    write_files(folder, tokenizer)
    return tokenizer.to_dict()


def stored(folder: Path, values: Any, context_length: int) -> Tokenizer:
    """The tokeniser that `store` has written, at a context length.

    Raises:
        WeightsError: a file is missing or damaged, or a setting is wrong.
    """
    if values is None or isinstance(values, str):  # CLIP's, of which once the name was stored
        return Tokenizer(context_length)
    try:
        settings: dict[str, Any] = dict(values) | {"context_length": context_length}
        if settings["kind"] == "clip":
            return Tokenizer(**settings)
        for name in ("prefix", "suffix"):
            settings[name] = tuple(settings.get(name, ()))
        settings["added"] = tuple(Added(*one) for one in settings.get("added", ()))
        name = PIECES[1] if settings.get("offset") else FILES[settings["kind"]]
        content = _read(folder / name)
        has_config = (folder / CONFIG).is_file()
        config = (folder / CONFIG).read_text(encoding="utf-8") if has_config else ""
        return Tokenizer(**settings, file=content, config=config)
    except MALFORMED as error:
        raise WeightsError(f"{folder}: tokenizer: {values!r}: {error!r}") from None
    except WeightsError as error:
        where = "" if str(error).startswith(str(folder)) else f"{folder}: "
        raise WeightsError(f"{where}{error}") from None


def _of_json(
    folder: Path,
    name: str | None,
    config: dict[str, Any],
    shared: dict[str, Any],
    model_type: str,
    strip_sep_token: bool,
) -> Tokenizer:
    """A tokenizer.json, or a vocab.txt as one."""
    if (folder / JSON).is_file():
        content = _read(folder / JSON)
    elif name in (None, "BertTokenizer"):
        content = json_of_vocabulary(_read(folder / WORDS), config)
    else:
        raise WeightsError(f"has no {JSON}, and its {WORDS} is not read for a {name}")
    lower = name == "Siglip2Tokenizer" or (name in _GEMMAS and model_type.startswith("siglip"))
    model = json_model(content, lower)  # checks it, before its parts are looked at
    if name in _CLIPS and model.vocab_size == VOCAB_SIZE:
        if json.loads(content)["model"].get("vocab") == vocabulary():
            return Tokenizer(shared["context_length"])
    elif name == "BertTokenizer":
        content = with_bert_options(content, config)
    pad = _token(config, "pad_token") or _PADS.get(name or "")
    pad_id = model.id_of(pad) if pad else (json.loads(content).get("padding") or {}).get("pad_id")
    if type(pad_id) is not int:
        raise WeightsError(f"{CONFIG}: pad_token: {pad!r} is none of its tokens")
    strip_id = None
    if strip_sep_token:
        strip_id = model.id_of(_token(config, "sep_token") or "[SEP]")
    return Tokenizer(
        **shared,
        kind="tokenizers",
        normalize="lower" if lower else "none",
        pad_id=pad_id,
        strip_id=strip_id,
        file=content,
    )


def _of_pieces(
    folder: Path, name: str | None, config: dict[str, Any], shared: dict[str, Any]
) -> Tokenizer:
    """A sentence-piece model, with the special tokens that the class adds."""
    path = next((folder / one for one in PIECES if (folder / one).is_file()), None)
    if path is None:
        needs = f"; {name} needs {PIECES[0]}" if name == "SiglipTokenizer" else ""
        raise WeightsError(_missing(folder) + needs)
    shared |= {"kind": "sentencepiece", "file": _read(path)}
    if name == "SiglipTokenizer":
        if config.get("do_lower_case", True) is not True:
            raise WeightsError(f"{CONFIG}: do_lower_case: false of {name} is not supported")
        added = _added(config) or (Added("</s>", 1, True, True), Added("<unk>", 2, True, True))
        ids = {one.text: one.id for one in added}
        end, pad = (_token(config, key) or "</s>" for key in ("eos_token", "pad_token"))
        return Tokenizer(
            **shared, normalize="siglip", suffix=(ids[end],), pad_id=ids[pad], added=added
        )
    if name == "T5Tokenizer":
        added = _added(config) or _numbered("<pad>", "</s>", "<unk>")
        return Tokenizer(**shared, suffix=(1,), pad_id=0, added=added)
    if name == "XLMRobertaTokenizer":  # fairseq's tokens: four before the pieces, one after them
        mask = Added("<mask>", 1 + piece_count(shared["file"]), lstrip=True)
        added = (*_numbered("<s>", "<pad>", "</s>", "<unk>"), mask)
        return Tokenizer(
            **shared, prefix=(0,), suffix=(2,), pad_id=1, added=added, offset=1, unknown=3
        )
    raise WeightsError(f"has no {JSON}, and its {path.name} is not read for a {name}")


def _numbered(*names: str) -> tuple[Added, ...]:
    return tuple(Added(name, i) for i, name in enumerate(names))


def _config_of(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; what it leaves out from special_tokens_map.json."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", CONFIG):
        if (folder / name).is_file():
            found |= read_json(folder / name)
    return {key: value for key, value in found.items() if key != "auto_map"}  # code to execute


def _check_supported(folder: Path, config: dict[str, Any]) -> None:
    for key, value in (("truncation_side", "right"), ("split_special_tokens", False)):
        if config.get(key, value) != value:
            raise WeightsError(f"{folder / CONFIG}: {key}: {config[key]!r} is not supported")


def _added(config: dict[str, Any]) -> tuple[Added, ...]:
    """The special tokens of `added_tokens_decoder`."""
    found = []
    for number, one in (config.get("added_tokens_decoder") or {}).items():
        if one.get("single_word"):
            raise WeightsError(f"{CONFIG}: single_word of {one['content']!r} is not supported")
        strips = bool(one.get("lstrip")), bool(one.get("rstrip"))
        found.append(Added(str(one["content"]), int(number), *strips))
    return tuple(found)


def _token(config: dict[str, Any], key: str) -> str | None:
    """A special token, given as a string or an object."""
    value = config.get(key)
    return value.get("content") if isinstance(value, dict) else value


def _missing(folder: Path) -> str:
    return (
        f"{folder}: has none of the files of a tokeniser: {JSON}, {', '.join(PIECES)}, {WORDS}; "
        f"copy those of the model into it"
    )


def _read(path: Path) -> bytes:
    if is_lfs_file(path):
        raise WeightsError(f"{path}: {LFS_POINTER}")
    try:
        if path.stat().st_size > MAX_JSON:
            raise WeightsError(f"{path}: is larger than a tokeniser's file may be")
        return path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error}") from None
