"""BERT's tokeniser from a vocab.txt, as a tokenizer.json."""

import json
from typing import Any

from leanclip.errors import WeightsError

# The fields of the normaliser, and the options of BertTokenizer that set them.
_OPTIONS = {
    "lowercase": ("do_lower_case", True),
    "strip_accents": ("strip_accents", None),
    "handle_chinese_chars": ("tokenize_chinese_chars", True),
}


def json_of_vocabulary(content: bytes, config: dict[str, Any]) -> bytes:
    """A tokenizer.json for a vocab.txt, one word per line, and tokenizer_config.json.

    Raises:
        WeightsError: it is not text, or one of BERT's special tokens is missing.
    """
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise WeightsError(f"vocab.txt: not text: {error}") from None
    words = {word.removesuffix("\r"): i for i, word in enumerate(lines) if word or lines[i + 1 :]}
    names = {
        key: str(value.get("content") if isinstance(value, dict) else value)
        for key, value in _special_tokens(config).items()
    }
    if missing := [name for name in names.values() if name not in words]:
        raise WeightsError(f"vocab.txt: has no {missing[0]}; it is not BERT's")
    start, end = names["cls_token"], names["sep_token"]
    around = [_special(start, 0), _sequence("A", 0), _special(end, 0)]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": words[name], "content": name, **plain, "special": True}
            for name in sorted(names.values(), key=words.__getitem__)
        ],
        "normalizer": {"type": "BertNormalizer", "clean_text": True, **_options(config)},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": around,
            "pair": [*around, _sequence("B", 1), _special(end, 1)],
            "special_tokens": {
                name: {"id": name, "ids": [words[name]], "tokens": [name]} for name in (start, end)
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": names["unk_token"],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": words,
        },
    }
    return json.dumps(values, ensure_ascii=False).encode()


def with_bert_options(content: bytes, config: dict[str, Any]) -> bytes:
    """A tokenizer.json with the options of tokenizer_config.json, which have precedence."""
    values = json.loads(content)
    normalizer = values.get("normalizer") or {}
    given = {field: config[option] for field, (option, _) in _OPTIONS.items() if option in config}
    is_berts = normalizer.get("type") == "BertNormalizer"
    if not is_berts or all(normalizer.get(field) == value for field, value in given.items()):
        return content
    return json.dumps(values | {"normalizer": normalizer | given}, ensure_ascii=False).encode()


def _special_tokens(config: dict[str, Any]) -> dict[str, Any]:
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return {name: config.get(name) or f"[{name[:-6].upper()}]" for name in names}


def _options(config: dict[str, Any]) -> dict[str, Any]:
    return {field: config.get(option, default) for field, (option, default) in _OPTIONS.items()}


def _special(name: str, kind: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": name, "type_id": kind}}


def _sequence(name: str, kind: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": kind}}
