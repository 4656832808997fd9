"""Captions a second: leanclip's tokeniser, one that goes as OpenAI's, and transformers'.

    python benchmarks/tokenizer.py        # about a minute

Captions of 8 to 15 words from a seeded grammar: `plain` ones as COCO's, and `mixed` ones as the
web's alternative texts, with rare words, digits, punctuation, names of files and, in every twelfth,
accents, curly quotes, dashes or entities. Each tokeniser makes the padded arrays of 77 ids, in
batches of 256; they take turns for seven rounds of 10,000 captions that none has seen, after one
that is not counted. So each keeps what it keeps of words, and meets new ones. Processor time
counts, and medians over the rounds. `cold` is leanclip with nothing kept at the start of each
batch. `openai` is tests/reference_tokenizer.py, which keeps words as OpenAI's does; its ids must be
the same. Prints JSON.
"""

import json
import os
import platform
import random
import runpy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["RAYON_NUM_THREADS"] = "1"  # transformers' tokenisers, one thread as the others

import ftfy
import torch
import transformers

from leanclip import tokenizer
from leanclip.tokenizer import merges, tokenize, vocabulary

CAPTIONS, BATCH, ROUNDS = 10_000, 256, 7
REFERENCE = Path(__file__).parent.parent / "tests" / "reference_tokenizer.py"

LISTS = {
    "who": "man woman boy girl child dog cat horse bird couple group player rider chef baby cow",
    "what": "umbrella skateboard frisbee sandwich kite laptop surfboard pizza bicycle suitcase "
    "guitar camera phone toothbrush banana cake plate book bottle tie",
    "like": "young old small large brown black white red happy wooden colorful blue empty tall",
    "does": "sitting standing riding holding eating watching walking playing looking sleeping",
    "where": "on in near behind under by above across at beside",
    "place": "street beach kitchen field table park room river window mountain train station",
    "odd": "café naïve façade jalapeño “vintage” ‘retro’ women’s l’été Zürich – — … São 20°C m² ½ "
    "Beyoncé crème brûlée &amp; &quot;new&quot; men&#39;s &nbsp; Dolce&Gabbana ® ™ • piñata ♥",
}
WORDS = {name: words.split(" ") for name, words in LISTS.items()}
RARE = [s[:-4] for s in vocabulary() if s[:-4].isalpha() and s.isascii() and len(s) > 7]


def main() -> None:
    """Measure both kinds of captions."""
    torch.set_num_threads(1)
    results = {
        "machine": f"{platform.processor() or platform.machine()}, 1 thread",
        "python": platform.python_version(),
        "ftfy": ftfy.__version__,
        "transformers": transformers.__version__,
        "plain": measure(plain_caption),
        "mixed": measure(mixed_caption),
    }
    print(json.dumps(results, indent=1))


def plain_caption(rng: random.Random) -> str:
    """A sentence as COCO's: "A young man riding a red bicycle near the old beach."."""
    w = {name: rng.choice(words) for name, words in WORDS.items()}
    sentence = f"A {w['like']} {w['who']} {w['does']} {w['where']} a {w['place']}"
    if rng.random() < 0.7:
        sentence += f" with a {rng.choice(WORDS['like'])} {w['what']}"
    if rng.random() < 0.5:
        sentence += f" and a {rng.choice(WORDS['who'])}"
    return sentence + rng.choice(("", ".", ".", " ."))


def mixed_caption(rng: random.Random) -> str:
    """A text as the web's: "Red Kite Festival 2016 - photo by Sandra | IMG_4053.jpg"."""
    words = plain_caption(rng).split(" ")
    for _ in range(rng.randint(0, 3)):
        words[rng.randrange(len(words))] = RARE[int(len(RARE) ** rng.random())]  # after Zipf
    if rng.random() < 0.3:
        words = [word.title() for word in words]
    if rng.random() < 0.4:
        number = rng.randrange(10_000)
        extra = (
            f"({number})",
            f"${number / 100}",
            "-",
            "|",
            f"IMG_{number}.jpg",
            f"{number % 40},",
        )
        words.insert(rng.randrange(len(words)), rng.choice(extra))
    if rng.random() < 1 / 12:
        words[rng.randrange(len(words))] = rng.choice(WORDS["odd"])
    return " ".join(words[:15])


def measure(caption: Callable[[random.Random], str]) -> dict[str, object]:
    """Captions a second of each tokeniser, and leanclip's over the others'."""
    contenders = tokenizers()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for seed in range(ROUNDS + 1):
        rng = random.Random(seed)
        captions = [caption(rng) for _ in range(CAPTIONS)]
        batches = [captions[i : i + BATCH] for i in range(0, CAPTIONS, BATCH)]
        for name, run in contenders.items():
            start = time.process_time()
            for batch in batches:
                run(batch)
            if seed > 0:
                seconds[name].append(time.process_time() - start)
        for batch in batches:
            assert torch.equal(contenders["leanclip"](batch), contenders["openai"](batch))
    rates = {name: CAPTIONS / statistics.median(runs) for name, runs in seconds.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(runs, seconds["leanclip"], strict=True))
        for name, runs in seconds.items()
        if name != "leanclip"
    }
    return {
        "captions_per_second": {name: round(rate) for name, rate in rates.items()},
        "leanclip_over": {name: round(ratio, 1) for name, ratio in ratios.items()},
    }


def tokenizers() -> dict[str, Callable[[list[str]], torch.Tensor]]:
    """Ways from a batch to its array of ids, with nothing kept yet."""
    pairs: Any = [tuple(rule.split(" ")) for rule in merges()]
    theirs: Any = transformers.CLIPTokenizer(vocab=vocabulary(), merges=pairs, model_max_length=77)
    tokenizer._ids_of_chunk.clear()

    def cold(texts: list[str]) -> torch.Tensor:
        kept, tokenizer._ids_of_chunk = tokenizer._ids_of_chunk, tokenizer._IdsOfChunk()
        tokens = tokenize(texts)
        tokenizer._ids_of_chunk = kept
        return tokens

    def hugging_face(texts: list[str]) -> torch.Tensor:
        made = theirs(texts, padding="max_length", truncation=True, return_tensors="pt")
        return made["input_ids"]

    return {
        "leanclip": tokenize,
        "cold": cold,
        "openai": runpy.run_path(str(REFERENCE))["tokenize"],
        "transformers": hugging_face,
    }


if __name__ == "__main__":
    main()
