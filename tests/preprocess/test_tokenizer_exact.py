"""The fast tokeniser against the plain one of reference_tokenizer.py, on anything at all."""

import random
import string
import sys
from collections.abc import Callable, Sequence

import pytest
import reference_tokenizer as reference

from leanclip.preprocess import tokenizer
from leanclip.preprocess.tokenizer import clean, decode, encode, tokenize, vocabulary

WORDS = (  # separated by spaces, as are the next two
    "photo of a cat, don't café l’été “quoted” naïve Straße İstanbul ΟΔΟΣ ΣΑΣ ſ 'ſ K fiancé(e) "
    "猫が 4K 100% $5.99 #tag @name www.a.b/c?d=1 … – — • ® ™ ½ m² 20°C 👍🏽 👨\u200d👩\u200d👧 "
    "e\u0301 o\u0308\u0323 ﬁn ĳs Ǆ ＡＢＣ ﾊﾟ ﷺ AT&T R&B & && &;"
)
ENTITIES = (
    "&amp; &amp;amp; &lt; &lt;b&gt; &quot; &#39; &#x27; &nbsp; &eacute; &EACUTE; &copy &hellip; "
    "&ldquo; &#8217; &#128; &#28; &#0; &#xD83D; &#10; &notit; &amp;eacute; &amp;lt; &#1114112; "
    "&oelig; &Atilde; &amp;amp;amp;amp;lt;"
)
MOJIBAKE = (
    "â€™ Ã© Â© â€œ Ã la Â ’ é” œ, ØªØ Ð¿Ñ€ ‚Äî √± вЂ™ ã‚ï¼ ðŸ˜€ Â£5 Ã¢â‚¬â„¢ Å“ â€� Ãƒ Ø’ Ù– Ð— Î…"
)
SPECIAL = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|STARTOFTEXT|>",
    "<|",
    "<|endoftext|>x",
    "'s",
    "'LL",
)
SPACES = " \t\n\r\f\v\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000\u200b\ufeff"
CONTROLS = "\x00\x07\x1b[31m\x7f\x80\x93\x9f\xad\u200d\u200f\u206a\ufff9\ufffc\ufffd\uffff\ue000"
RANGES = {  # of code points
    "ascii": (0x20, 0x7F),
    "latin": (0x80, 0x250),
    "marks": (0x300, 0x370),
    "greek and cyrillic": (0x370, 0x530),
    "signs": (0x2000, 0x2700),
    "cjk": (0x3000, 0xA000),
    "forms": (0xF900, 0x10000),
    "surrogates": (0xD800, 0xE000),
    "emoji": (0x1F300, 0x1FA00),
    "any": (0, 0x110000),
}


def parts(rng: random.Random) -> dict[str, Callable[[], str]]:
    """Ways to write a piece of a text."""

    def characters(first: int, last: int) -> Callable[[], str]:
        return lambda: "".join(
            chr(rng.randrange(first, last)) for _ in range(rng.choice((1, 1, 2, 4)))
        )

    def one_of(pieces: Sequence[str]) -> Callable[[], str]:
        return lambda: rng.choice(pieces)

    ways: dict[str, Callable[[], str]] = {k: characters(*v) for k, v in RANGES.items()}
    for name, pieces in (
        ("words", WORDS.split(" ")),
        ("letters", string.ascii_letters),
        ("entities", ENTITIES.split(" ")),
        ("mojibake", MOJIBAKE.split(" ")),
        ("special", SPECIAL),
        ("spaces", SPACES),
        ("controls", CONTROLS),
    ):
        ways[name] = one_of(pieces)
    return ways


def random_texts(count: int, seed: int) -> list[str]:
    """Each text of a few kinds of pieces, so that some need no repair and others much."""
    rng = random.Random(seed)
    ways = parts(rng)
    names = list(ways)
    texts = []
    for _ in range(count):
        kinds = rng.choices(names, k=rng.randint(1, 3))
        glue = rng.choice(("", "", " "))
        texts.append(glue.join(ways[rng.choice(kinds)]() for _ in range(rng.randint(1, 6))))
    return texts


@pytest.mark.parametrize("seed", range(2))
def test_random_texts_give_the_reference_ids(seed: int) -> None:
    texts = random_texts(5_000, seed)
    for text in texts:
        assert encode(text) == reference.encode(text), ascii(text)


def test_every_control_and_common_sign_inside_a_word() -> None:
    for code_point in (*range(0x250), *range(0x2000, 0x2100)):
        text = f"a{chr(code_point)}b"
        assert encode(text) == reference.encode(text), ascii(text)


def test_random_texts_are_cleaned_as_the_reference_does() -> None:
    for text in random_texts(2000, seed=10):
        assert clean(text) == reference.clean(text), ascii(text)


def test_the_array_is_the_reference_array() -> None:
    texts = random_texts(2000, seed=11)
    for length in (77, 8):
        expected = reference.tokenize(texts, length).tolist()
        assert tokenize(texts, length, truncate=True).tolist() == expected


def test_white_space_is_that_of_the_pattern_and_separators() -> None:
    python = {chr(c) for c in range(sys.maxunicode + 1) if chr(c).isspace()}
    pattern = {chr(c) for c in range(sys.maxunicode + 1) if reference.SPACES.match(chr(c))}
    assert python == pattern | set("\x1c\x1d\x1e\x1f")
    assert not pattern & set("\x1c\x1d\x1e\x1f")


def test_long_words_are_merged_in_sweeps() -> None:
    rng = random.Random(0)
    for letters in ("ab", "aeinorst", string.ascii_lowercase, "é", "!?", "猫"):
        for length in (50, 400):
            word = "".join(rng.choice(letters) for _ in range(length))
            assert encode(word) == reference.encode(word)


def test_no_merge_gives_rise_to_one_learned_before_it() -> None:
    # What the order of the queue in _merge stands on.
    made = {token: pair for pair, token in tokenizer._vocabulary().merged.items()}
    assert len(made) == 48894
    assert all(part < token for token, pair in made.items() for part in pair)
    assert len({tokenizer._vocabulary().symbols[token] for token in made}) == len(made)


def test_every_symbol_is_what_its_own_letters_merge_into() -> None:
    # So that a word that is one symbol needs no merging.
    known = vocabulary()
    symbols = [symbol for symbol in known if symbol not in SPECIAL]
    assert len(symbols) == 49406
    for symbol in symbols:
        ids = [known[c] for c in symbol.removesuffix("</w>")]
        ids[-1] += 256 * symbol.endswith("</w>")
        assert tokenizer._merge(ids, tokenizer._vocabulary().merged) == [known[symbol]]


def test_a_word_of_a_hundred_thousand_letters() -> None:
    word = "".join(random.Random(0).choices(string.ascii_lowercase, k=100_000))
    assert decode(encode(word)) == word


def test_the_kept_chunks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tokenizer._IdsOfChunk()
    monkeypatch.setattr(tokenizer, "_MAX_CACHED_CHUNKS", 100)
    monkeypatch.setattr(tokenizer, "_ids_of_chunk", kept)
    for number in range(500):
        word = f"w{number}, " + "x" * (number + 1)
        assert encode(word) == reference.encode(word)
        assert len(kept) <= 100
    assert max(map(len, kept)) <= 32
