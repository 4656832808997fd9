"""Tokenisers of every family: the ids of their own systems, of golden data and of transformers."""

import json
import pickle
import random
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import PROJECT

from leanclip.data.batch import trim
from leanclip.errors import DataError
from leanclip.preprocess.text import Tokenizer
from leanclip.weights import huggingface, open_clip

GOLDEN = PROJECT / "tests" / "data" / "modern"
FOLDERS = sorted(path.parent.name for path in GOLDEN.glob("*/tokens.jsonl"))
ODD = (  # pieces of texts that tokenisers treat in particular ways
    *("</s>", "<s>", "<eos>", "<bos>", "<pad>", "<unk>", "<mask>", "[SEP]", "[CLS]", "[PAD]"),
    *(" ", "  ", "\n", "\t", "▁", "▁▁", "a", "photo", "cat", "!", "_", "-", "é", "e\u0301", "İ"),
    *("ΣΑΣ", "ß", "½", "ﬁ", "Ａ", "猫", "中", "한", "ا", "😀", "\u200d", "\u200b", "\xa0", "\x00"),
    *("\x07", "\x1f", "\ufeff", "&amp;", "<", "/s>", "<EOS>", "\ufffd", "##a", "a" * 30, "𝒻"),
)


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (GOLDEN / name / "tokens.jsonl").open(encoding="utf-8")]


@cache
def tokenizer_of(name: str) -> Tokenizer:
    module = huggingface if name.startswith("hf-") else open_clip
    found = module.read_tokenizer(GOLDEN / name)
    assert found is not None
    return found.at(len(rows_of(name)[0]["ids"]))


def odd_texts(count: int) -> list[str]:
    rng = random.Random(1)
    texts = ["".join(rng.choices(ODD, k=rng.randint(0, 12))) for _ in range(count)]
    spans = ((1, 0x7F), (0x80, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF))
    for _ in range(count // 3):
        chosen = (rng.choice(spans) for _ in range(rng.randint(0, 30)))
        texts.append("".join(chr(rng.randint(*span)) for span in chosen))
    return texts


def test_the_golden_folders_are_all_there() -> None:
    assert len(FOLDERS) == 11


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_are_those_of_its_own_system(name: str) -> None:
    rows, tokenizer = rows_of(name), tokenizer_of(name)
    tokens = tokenizer([row["text"] for row in rows], truncate=True)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [row["ids"] for row in rows]


@pytest.mark.parametrize("name", [name for name in FOLDERS if name.startswith("hf-")])
def test_ids_of_odd_texts_are_those_of_transformers(name: str) -> None:
    from transformers import AutoTokenizer

    with warnings.catch_warnings(action="ignore"):
        theirs = AutoTokenizer.from_pretrained(GOLDEN / name)
        ours = tokenizer_of(name).at(20)
        for text in odd_texts(300):
            options = {"padding": "max_length", "truncation": True, "max_length": 20}
            expected = theirs([text], **options).input_ids[0]
            assert ours(text, truncate=True)[0].tolist() == expected, repr(text)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_long_text_is_refused_or_cut_before_its_end_token(name: str) -> None:
    tokenizer = tokenizer_of(name).at(9)
    with pytest.raises(DataError, match="exceeds the context length of 9"):
        tokenizer("a photo of " * 9)
    whole = tokenizer.encode("a photo of " * 9)
    (cut,) = tokenizer("a photo of " * 9, truncate=True).tolist()
    if tokenizer.end_id is None:  # CLIPA's last place had a separator
        assert cut == [*whole[:8], tokenizer.pad_id]
    else:
        assert cut == [*whole[:8], tokenizer.end_id]
        assert tokenizer("")[0].tolist().count(tokenizer.end_id) >= 1


@pytest.mark.parametrize("name", FOLDERS)
def test_columns_cut_off_are_padding(name: str) -> None:
    tokenizer = tokenizer_of(name)
    tokens = tokenizer(["", "a", "a photo of a cat"], truncate=True)
    lengths = tokenizer.lengths(tokens).tolist()
    assert lengths[0] < lengths[-1] < tokens.shape[1]
    for row, length in zip(tokens, lengths, strict=True):
        assert (row[length:] == tokenizer.pad_id).all()
    cut = trim(tokens, tokenizer)
    assert cut.shape[1] in (8, 16, 24)
    missing = tokens.shape[1] - cut.shape[1]
    padded = torch.nn.functional.pad(cut, (0, missing), value=tokenizer.pad_id)
    assert torch.equal(padded, tokens)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_tokeniser_is_a_value(name: str) -> None:
    tokenizer = tokenizer_of(name)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again == tokenizer
    assert hash(again) == hash(tokenizer)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert torch.equal(again("a photo"), tokenizer("a photo"))
    other = tokenizer.at(12)
    assert other != tokenizer
    assert other.fingerprint() != tokenizer.fingerprint()
    assert len(repr(tokenizer)) < 600  # not the file


@pytest.mark.parametrize("name", FOLDERS)
def test_decoding_leaves_special_tokens_out(name: str) -> None:
    tokenizer = tokenizer_of(name)
    (row,) = tokenizer("a photo of a cat")
    assert tokenizer.decode(row).strip() == "a photo of a cat"


def test_clips_tokeniser_is_the_default() -> None:
    tokenizer = Tokenizer(8)
    assert tokenizer("a cat")[0].tolist() == [49406, 320, 2368, 49407, 0, 0, 0, 0]
    assert tokenizer.encode("a cat") == [49406, 320, 2368, 49407]
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.end_id) == (49408, 0, 49407)
    assert tokenizer.to_dict() == {"context_length": 8, "kind": "clip"}
    assert tokenizer.files() == {}


def json_of(vocabulary: dict[str, int], **parts: object) -> bytes:
    values = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "?"},
    }
    return json.dumps(values | parts).encode()


def test_ids_may_be_wider_than_16_bits() -> None:
    file = json_of({"?": 0, "cat": 901_628})
    tokenizer = Tokenizer(4, kind="tokenizers", file=file)
    assert tokenizer("cat dog")[0].tolist() == [901_628, 0, 0, 0]
    assert tokenizer.vocab_size == 901_629
    assert tokenizer.end_id is None


def test_padding_may_be_on_the_left() -> None:
    file = json_of({"?": 0, "cat": 1, "pad": 2})
    tokenizer = Tokenizer(4, kind="tokenizers", pad_id=2, pads_left=True, file=file)
    tokens = tokenizer(["cat", "cat cat"])
    assert tokens.tolist() == [[2, 2, 2, 1], [2, 2, 1, 1]]
    assert tokenizer.lengths(tokens).tolist() == [4, 4]
    assert trim(tokens, tokenizer).shape == (2, 4)


@pytest.mark.parametrize(
    ("clean", "expected"),
    [
        ("none", " A_B  &amp;lt; café! "),
        ("whitespace", "A_B < café!"),
        ("whitespace_underscore", "A B < café!"),
        ("lower", "a_b < café!"),
        ("canonicalize", "a b café"),
    ],
)
def test_texts_are_cleaned_as_by_open_clip(clean: str, expected: str) -> None:
    from leanclip.preprocess import text

    cleaned = text._CLEAN[clean]  # pyright: ignore[reportPrivateUsage]
    assert cleaned(" A_B  &amp;lt; café! ") == expected


@pytest.mark.parametrize("name", FOLDERS)
def test_halves_of_surrogate_pairs_are_encoded(name: str) -> None:
    tokenizer = tokenizer_of(name)
    assert tokenizer.encode("a \ud800 cat") == tokenizer.encode("a \ufffd cat")


def test_every_process_reads_the_file_for_itself(tmp_path: Path) -> None:
    state = tokenizer_of("hf-siglip").__getstate__()
    assert set(state) >= {"file", "kind", "context_length"}
    assert not {"model", "vocab_size", "end_id"} & set(state)
