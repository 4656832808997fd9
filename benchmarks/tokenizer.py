"""Captions a second: leanclip's tokeniser, one that goes as OpenAI's, and transformers'.

    python benchmarks/tokenizer.py --out benchmarks/tokenizer.json

Captions of 8 to 15 words from a seeded grammar: `plain` ones as COCO's, and `mixed` ones as the
web's alternative texts, with rare words, digits, punctuation, names of files and, in every twelfth,
accents, curly quotes, dashes or entities. Each tokeniser makes the padded arrays of 77 ids, in
batches of 256; they take turns for seven rounds of 10,000 captions that none has seen, after one
that is not counted. So each keeps what it keeps of words, and meets new ones. Processor time
counts, and medians over the rounds. `cold` is leanclip with nothing kept at the start of each
batch. `openai` is tests/reference_tokenizer.py, which keeps words as OpenAI's does; its ids must be
the same.
"""

import os
import random
import runpy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["RAYON_NUM_THREADS"] = "1"  # transformers' tokenisers, one thread as the others

import torch
import transformers

from captions import mixed_caption, plain_caption
from leanclip.preprocess import tokenizer
from leanclip.preprocess.tokenizer import merges, tokenize, vocabulary
from measuring import NotTheSame, chosen, finish, options

CAPTIONS, BATCH = 10_000, 256
REFERENCE = Path(__file__).parent.parent / "tests" / "reference_tokenizer.py"


def main(words: Sequence[str] | None = None) -> None:
    """Measure both kinds of captions."""
    given = chosen(options(__doc__, rounds=7, threads=1), words)
    count = 300 if given.tiny else CAPTIONS
    kinds = {"plain": plain_caption, "mixed": mixed_caption}
    rounds = 2 if given.tiny else given.rounds
    finish({name: measure(caption, count, rounds) for name, caption in kinds.items()}, given)


def measure(caption: Callable[[random.Random], str], count: int, rounds: int) -> dict[str, object]:
    """Captions a second of each tokeniser, and leanclip's over the others'."""
    contenders = tokenizers()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for seed in range(rounds + 1):
        rng = random.Random(seed)
        captions = [caption(rng) for _ in range(count)]
        batches = [captions[i : i + BATCH] for i in range(0, count, BATCH)]
        for name, run in contenders.items():
            start = time.process_time()
            for batch in batches:
                run(batch)
            if seed > 0:
                seconds[name].append(time.process_time() - start)
        for batch in batches:
            if not torch.equal(contenders["leanclip"](batch), contenders["openai"](batch)):
                raise NotTheSame("ids")
    rates = {name: count / statistics.median(runs) for name, runs in seconds.items()}
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
