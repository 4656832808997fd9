"""The tokeniser of weights: read from folders, refused where it is wrong, kept with checkpoints."""

import io
import json
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, TINY
from test_tokenizer_use import TEXTS, siglip_model

from leanclip.config.model import ModelConfig
from leanclip.config.sections import parse
from leanclip.errors import WeightsError
from leanclip.io import optional_imports
from leanclip.model import CLIP
from leanclip.preprocess import token_files
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.text import Tokenizer
from leanclip.weights import read_tokenizer, read_weights, save_weights, write_weights
from leanclip.weights.read import check_fits_model
from leanclip.weights.tokenizer import (
    open_clip_settings,
    read_files,
    read_open_clip,
    write_files,
)

GOLDEN = PROJECT / "tests" / "data" / "modern"


def tokenizer_files(name: str, folder: Path, *files: str, **config: Any) -> Path:
    """A folder with some files of a golden folder and this tokenizer_config.json."""
    folder.mkdir()
    for file in files:
        shutil.copyfile(GOLDEN / name / file, folder / file)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def same(ours: Tokenizer, folder: Path, texts: list[str]) -> None:
    """Compare ids with those of the class that transformers finds for a folder."""
    from transformers import AutoTokenizer

    with warnings.catch_warnings(action="ignore"):
        theirs = AutoTokenizer.from_pretrained(folder)
        length = ours.context_length
        options = {"padding": "max_length", "truncation": True, "max_length": length}
        for text in texts:
            expected = theirs([text], **options).input_ids[0]
            assert ours(text, truncate=True)[0].tolist() == expected, repr(text)


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize(
    "options",
    [{}, {"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}],
    ids=["default", "case", "accents", "chinese"],
)
def test_berts_options_are_those_of_transformers(
    tmp_path: Path, file: str, options: dict[str, bool]
) -> None:
    config = {"tokenizer_class": "BertTokenizer"} | options
    folder = tokenizer_files("hf-chinese-clip", tmp_path / "bert", file, **config)
    same(read_files(folder, 20), folder, TEXTS)


@pytest.mark.parametrize(
    ("name", "file", "options"),
    [
        ("XLMRobertaTokenizer", "sentencepiece.bpe.model", {}),
        ("T5Tokenizer", "spiece.model", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
    ],
)
def test_sentence_pieces_without_a_tokenizer_json(
    tmp_path: Path, name: str, file: str, options: dict[str, int]
) -> None:
    import sentencepiece

    rows = (GOLDEN / "hf-siglip" / "tokens.jsonl").read_text("utf-8").splitlines()
    corpus = [text for text in (json.loads(row)["text"] for row in rows) if text.strip()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(3 * corpus),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=3,
        **options,  # pyright: ignore[reportArgumentType]
    )
    folder = tokenizer_files("hf-siglip", tmp_path / "pieces", tokenizer_class=name)
    (folder / file).write_bytes(model.getvalue())
    same(read_files(folder, 20), folder, [*TEXTS, "a <mask>", "</s> a", "a<pad>b"])


def test_siglip_2_is_lower_cased_whatever_its_class(tmp_path: Path) -> None:
    values = json.loads((GOLDEN / "hf-siglip2" / "tokenizer.json").read_text())
    values["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    config = {"tokenizer_class": "GemmaTokenizer", "padding_side": "right", "pad_token": "<pad>"}
    folder = tokenizer_files("hf-siglip2", tmp_path / "gemma", **config)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    expected = read_files(GOLDEN / "hf-siglip2", 24)
    lower = read_files(folder, 24, model_type="siglip")
    assert lower(TEXTS, truncate=True).equal(expected(TEXTS, truncate=True))
    assert not read_files(folder, 24)("A CAT!").equal(expected("A CAT!"))
    assert lower.encode("<EOS>") != lower.encode("<eos>")  # special tokens are found before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({}, None),
        ({"hf_tokenizer_name": None, "tokenizer_kwargs": {"clean": "lower"}}, None),
        ({"hf_tokenizer_name": "openai/clip-vit-base-patch32"}, None),
        ({"hf_tokenizer_name": "."}, {"clean": "whitespace"}),
        (
            {"hf_tokenizer_name": "x/y", "tokenizer_kwargs": {"clean": "canonicalize"}},
            {"clean": "canonicalize"},
        ),
        (
            {"hf_tokenizer_name": ".", "tokenizer_kwargs": {"strip_sep_token": True}},
            {"clean": "whitespace", "strip_sep_token": True},
        ),
    ],
)
def test_open_clips_settings(text: dict[str, Any], expected: dict[str, Any] | None) -> None:
    found = read_open_clip(GOLDEN / "oc-clipa", text)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert open_clip_settings(found) == {"hf_tokenizer_name": ".", "tokenizer_kwargs": expected}


@pytest.mark.parametrize(
    ("name", "clean"),
    [("hf-siglip", "whitespace"), ("hf-siglip2", "lower"), ("hf-metaclip2", "whitespace")],
)
def test_open_clip_cleans_what_hugging_face_does_not(
    tmp_path: Path, name: str, clean: str, caplog: pytest.LogCaptureFixture
) -> None:
    ours = read_files(GOLDEN / name, 24)
    settings = open_clip_settings(ours)
    assert settings["tokenizer_kwargs"] == {"clean": clean}
    assert "open_clip cleans texts" in caplog.text
    write_files(tmp_path, ours)
    theirs = read_open_clip(tmp_path, settings)
    assert theirs is not None
    texts = ["a photo of a cat.", "A CAT, and a dog!", "naïve café", "猫の写真"]
    assert theirs(texts, truncate=True).equal(ours.at(77)(texts, truncate=True))


def test_a_repository_is_fetched_where_the_folder_has_no_tokeniser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leanclip.weights import tokenizer

    asked = []

    def located(name: str) -> Path:
        asked.append(name)
        return GOLDEN / "oc-biomed"

    monkeypatch.setattr(tokenizer, "locate_settings", located)
    assert read_open_clip(tmp_path, {"hf_tokenizer_name": "bert-base-uncased"}) is not None
    assert read_open_clip(tmp_path, {"hf_tokenizer_name": "facebook/xlm-v-base"}) is not None
    assert asked == ["hf-hub:google-bert/bert-base-uncased", "hf-hub:facebook/xlm-v-base"]


def test_a_tokeniser_that_cannot_be_fetched_names_the_folder_and_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leanclip.weights import tokenizer

    def located(name: str) -> Path:
        raise WeightsError("timm/x: no such file, and the hub failed")

    monkeypatch.setattr(tokenizer, "locate_settings", located)
    words = "has none of the files of a tokeniser: .*; hf_tokenizer_name: timm/x: no such file"
    with pytest.raises(WeightsError, match=words) as error:
        read_open_clip(tmp_path, {"hf_tokenizer_name": "timm/x"})
    assert str(error.value).startswith(str(tmp_path))


def nested(depth: int) -> bytes:
    inner = b'{"type":"Sequence","normalizers":[' * depth + b"]}" * depth
    return b'{"model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"},"normalizer":%s}' % inner


def json_with(**parts: Any) -> bytes:
    values = json.loads((GOLDEN / "hf-metaclip2" / "tokenizer.json").read_text())
    return json.dumps(values | parts).encode()


def ending_with(name: str) -> dict[str, Any]:
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": name, "type_id": 0}}]
    parts = {"single": single, "pair": single, "special_tokens": {}}
    return {"type": "TemplateProcessing"} | parts


PIECES = (GOLDEN / "hf-siglip" / "spiece.model").read_bytes
BAD_JSON: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "not JSON"),
    "text": (lambda: b"<html>", "not JSON"),
    "list": (lambda: b"[]", "it has no model"),
    "no model": (lambda: b"{}", "it has no model"),
    "git lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid", "git lfs"),
    "deep": (lambda: nested(100_000), "nested too deeply|recursion limit"),
    "deep, but not for Python": (lambda: nested(200), "recursion limit"),
    "another type": (lambda: json_with(model={"type": "Python"}), "tokenizers fails on it"),
    "a panic": (lambda: json_with(post_processor=ending_with("<no>")), "tokenizers fails on it"),
    "no pad token": (lambda: json_with(added_tokens=[], model=WORDS), "pad_token"),
}
WORDS = {"type": "WordLevel", "vocab": {"a": 0, "<s>": 1, "</s>": 2}, "unk_token": "a"}
BAD_PIECES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "sentencepiece fails on it|not a sentence-piece model"),
    "text": (lambda: b"<html>" * 99, "sentencepiece fails on it"),
    "cut": (lambda: PIECES()[:9999], "sentencepiece fails on it"),
    "a length": (lambda: struct.pack("<BQ", 10, 2**62) + PIECES(), "sentencepiece fails on it"),
    "git lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid", "git lfs"),
}


@pytest.mark.parametrize(
    ("name", "file", "content", "words"),
    [
        *(("hf-metaclip2", "tokenizer.json", *case) for case in BAD_JSON.values()),
        *(("hf-siglip", "spiece.model", *case) for case in BAD_PIECES.values()),
    ],
    ids=[*BAD_JSON, *(f"pieces: {name}" for name in BAD_PIECES)],
)
def test_what_is_no_tokeniser_is_refused_in_one_line(
    tmp_path: Path,
    name: str,
    file: str,
    content: Callable[[], bytes],
    words: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = json.loads((GOLDEN / name / "tokenizer_config.json").read_text())
    folder = tokenizer_files(name, tmp_path / "bad", **config)
    (folder / file).write_bytes(content())
    with pytest.raises(WeightsError, match=f"(?i){words}") as caught:
        read_files(folder, 16)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    assert len(message) < 600
    assert capfd.readouterr().err == ""  # a panic prints a backtrace


@pytest.mark.parametrize(
    ("files", "config", "words"),
    [
        ((), {}, "has none of the files of a tokeniser: tokenizer.json, spiece.model"),
        ((), {"tokenizer_class": "SiglipTokenizer"}, "SiglipTokenizer needs spiece.model"),
        (("spiece.model",), {"tokenizer_class": "LlamaTokenizer"}, "is not read for a Llama"),
        (("spiece.model",), {"truncation_side": "left"}, "truncation_side: 'left' is not supp"),
        (
            ("spiece.model",),
            {"tokenizer_class": "SiglipTokenizer", "do_lower_case": False},
            "do_lower_case: false of SiglipTokenizer is not supported",
        ),
        (
            ("spiece.model",),
            {"tokenizer_class": "SiglipTokenizer", "eos_token": "<end>"},
            "cannot be read: KeyError",
        ),
    ],
)
def test_a_folder_without_what_its_class_needs(
    tmp_path: Path, files: tuple[str, ...], config: dict[str, Any], words: str
) -> None:
    folder = tokenizer_files("hf-siglip", tmp_path / "bad", *files, **config)
    with pytest.raises(WeightsError, match=words):
        read_files(folder, 16)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"[PAD]\n[UNK]\n[CLS]\n", r"has no \[SEP\]; it is not BERT's"), (b"\xff\n", "not text")],
)
def test_a_vocabulary_that_is_not_berts(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(WeightsError, match=words):
        read_files(tmp_path, 16)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"hf_tokenizer_name": "."}, "has none of the files of a tokeniser"),
        ({"hf_tokenizer_name": "../x/y"}, "has none of the files of a tokeniser"),
        ({"tokenizer_type": "tiktoken"}, "text_cfg.tokenizer_type: 'tiktoken' is not supported"),
        ({"tokenizer_kwargs": {"clean": "canonicalize"}}, "tokenizer_kwargs: .* not supported"),
        ({"tokenizer_kwargs": {"reduction_mask": "syntax"}}, "tokenizer_kwargs: .* not supported"),
    ],
)
def test_what_open_clip_has_and_leanclip_has_not(
    tmp_path: Path, text: dict[str, Any], words: str
) -> None:
    with pytest.raises(WeightsError, match=words):
        read_open_clip(tmp_path, text)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"vocab_size": 2975}, "its tokeniser has 2976 ids, its token embedding 2975"),
        (
            {"transformer_pool": "eos", "transformer_eos_id": 7},
            "its texts are read at the token 7, its tokeniser ends them with 2",
        ),
        ({"transformer_pool": "eos", "transformer_eos_id": 2}, ""),
    ],
)
def test_the_model_must_belong_to_the_tokeniser(changes: dict[str, Any], words: str) -> None:
    model = parse(ModelConfig, TINY | {"vocab_size": 2976} | changes, where="x")
    tokenizer = read_files(GOLDEN / "hf-metaclip2", 24)
    if not words:
        check_fits_model(Path("x"), tokenizer, model)
        return
    with pytest.raises(WeightsError, match=f"^x: {words}"):
        check_fits_model(Path("x"), tokenizer, model)


def test_special_tokens_must_fit_the_context() -> None:
    with pytest.raises(WeightsError, match="do not fit the context length of 2"):
        read_files(GOLDEN / "hf-metaclip2", 2)


@pytest.mark.parametrize("name", ["hf-siglip", "hf-siglip2"])
def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def missing(library: str) -> None:
        raise ImportError(library)

    token_files._processor.cache_clear()  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(optional_imports, "import_module", missing)
    from leanclip.preprocess import text

    text.json_model.cache_clear()
    text.piece_model.cache_clear()
    library = "sentencepiece" if name == "hf-siglip" else "tokenizers"
    with pytest.raises(WeightsError, match=rf"needs {library}: pip install .*\[tokenizers\]"):
        read_files(GOLDEN / name, 16)


def test_a_file_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(token_files, "_CHILD", "while True: pass")
    with pytest.raises(WeightsError, match="takes more than"):
        token_files.JsonModel((GOLDEN / "hf-siglip2" / "tokenizer.json").read_bytes())


@pytest.mark.parametrize("name", ["hf-siglip", "hf-siglip2", "oc-clipa", "oc-xlm-roberta"])
def test_leanclips_form_keeps_the_tokeniser(tmp_path: Path, name: str) -> None:
    from test_text import tokenizer_of

    tokenizer = tokenizer_of(name).at(24)
    model = CLIP(**TINY | {"vocab_size": 3000})
    save_weights(tmp_path, model.state_dict(), model.config, Preprocess(32), tokenizer=tokenizer)
    again = read_weights(tmp_path).tokenizer
    assert again is not None
    assert again == tokenizer == read_tokenizer(tmp_path)
    assert again.config == tokenizer.config
    assert again.fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "python"}, "'python'"),
        ({"kind": "sentencepiece", "clean": "wash"}, "clean: 'wash' is not supported"),
        ({"kind": "sentencepiece", "pad_id": 900}, "pad_id: 900 is not one of its ids"),
        ({"kind": "sentencepiece", "size": 3}, "size"),
        ({"kind": "tokenizers"}, "tokenizer.json: cannot be read"),
    ],
)
def test_damaged_settings_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = siglip_model(tmp_path / "tiny")
    values = json.loads((folder / "config.json").read_text())
    values["tokenizer"] |= change
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=words):
        read_weights(folder)


@pytest.mark.parametrize("format", ["openai", "passl"])
def test_files_without_a_tokeniser_are_refused(tmp_path: Path, format: str) -> None:
    weights = read_weights(siglip_model(tmp_path / "tiny"))
    with pytest.raises(WeightsError, match=r"do not store a tokeniser|cannot hold"):
        write_weights(weights, tmp_path / "out", format)
