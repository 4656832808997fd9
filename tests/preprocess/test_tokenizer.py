"""The tokeniser against the ids that OpenAI's gave, and its own promises."""

import gzip
import json
import random

import pytest
import reference_tokenizer
import torch
from conftest import DATA

import leanclip
from leanclip.errors import DataError
from leanclip.preprocess.tokenizer import END, START, VOCAB_SIZE, clean, decode, encode, tokenize

GOLDEN = [
    json.loads(line)
    for line in gzip.decompress((DATA / "tokens.jsonl.gz").read_bytes()).decode().splitlines()
]


def test_there_are_1500_golden_captions() -> None:
    assert len(GOLDEN) == 1500


def test_golden_ids() -> None:
    for case in GOLDEN:
        ids = tokenize(case["text"], truncate=True)[0].tolist()
        assert ids == case["ids"] + [0] * (77 - len(case["ids"])), case["text"]
        assert len(encode(case["text"])) + 2 == case["untruncated_length"], case["text"]


def test_the_reference_gives_the_golden_ids_too() -> None:
    for case in GOLDEN:
        ids = reference_tokenizer.tokenize([case["text"]])[0].tolist()
        assert ids == case["ids"] + [0] * (77 - len(case["ids"])), case["text"]


def test_decoding_golden_ids_gives_the_cleaned_text() -> None:
    for case in GOLDEN:
        # Ids do not hold white space: decode puts one space after each word.
        cleaned = "".join(clean(case["text"]).split())
        assert "".join(decode(encode(case["text"])).split()) == cleaned, case["text"]


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a photo of a cat", "a photo of a cat"),
        ("  A  Photo\n\tof A CAT ", "a photo of a cat"),
        ("fish &amp;amp; chips", "fish & chips"),
        ("naïve café", "naïve café"),
    ],
)
def test_decode_of_words_is_the_cleaned_text(text: str, cleaned: str) -> None:
    assert decode(encode(text)) == cleaned
    assert decode(tokenize(text)[0]) == cleaned


def test_tokenize_pads_between_start_and_end() -> None:
    tokens = leanclip.tokenize(["a cat", "dog"], context_length=8)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [
        [START, 320, 2368, END, 0, 0, 0, 0],
        [START, 1929, END, 0, 0, 0, 0, 0],
    ]


def test_a_single_text_and_no_text() -> None:
    assert torch.equal(tokenize("a cat"), tokenize(["a cat"]))
    assert tokenize([]).shape == (0, 77)


def test_a_long_caption_is_refused_with_its_length() -> None:
    text = "cat " * 76
    with pytest.raises(DataError, match=r"78 tokens.*context length of 77.*truncate=True"):
        tokenize(text)
    assert tokenize("cat " * 75)[0, -1] == END


def test_truncation_keeps_the_end_token_last() -> None:
    tokens = tokenize("cat " * 100, context_length=5, truncate=True)[0].tolist()
    assert tokens == [START, 2368, 2368, 2368, END]


def test_special_tokens_written_in_a_text() -> None:
    assert encode("<|startoftext|>cat<|endoftext|>") == [START, 2368, END]


def test_any_text_gives_ids_and_comes_back() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(
            chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xD800)))) for _ in "12345678"
        )
        ids = encode(text)
        assert all(0 <= token < VOCAB_SIZE for token in ids)
        assert "".join(decode(ids).split()) == "".join(clean(text).split()), text


def test_plain_texts_skip_the_repair_without_a_difference() -> None:
    import ftfy

    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(chr(rng.randrange(32, 127)) for _ in range(20)).replace("&", "")
        assert ftfy.fix_text(text) == text
