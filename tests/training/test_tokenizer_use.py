"""A model with a sentence-piece model: trained, resumed, used, cached, sharded and exported."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROJECT, TINY, Command, assert_refused, make_config, run_cli

import leanclip
import leanclip.openai
from leanclip.inference.export import export
from leanclip.io.files import read_metrics
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess
from leanclip.weights import read_weights, save_weights
from leanclip.weights.tokenizer import read_files

GOLDEN = PROJECT / "tests" / "data" / "modern"
TEXTS = ["", "a photo of a cat", "A CAT!", "naïve café", "猫の写真", "[SEP] </s> <eos> x"]
SIGLIP = {  # a text tower that attends to padding and is read at the last place
    "vocab_size": 500,
    "context_length": 16,
    "transformer_causal": False,
    "transformer_pool": "last",
    "transformer_pad_id": 1,
}


def siglip_model(folder: Path, **changes: Any) -> Path:
    """A tiny model with SigLIP's sentence-piece model, in leanclip's form."""
    torch.manual_seed(1)
    model = CLIP(**TINY | SIGLIP | changes)
    folder.mkdir(parents=True)
    tokenizer = read_files(GOLDEN / "hf-siglip", 16)
    save_weights(folder, model.state_dict(), model.config, Preprocess(32), tokenizer=tokenizer)
    return folder


def test_training_loading_and_use(workplace: Path, command: Command) -> None:
    """The commands with a sentence-piece model: train with workers, resume, and use the run."""
    start = siglip_model(workplace / "start")
    sections = {"data": {"workers": 2}, "train": {"epochs": 1}, "model": SIGLIP}
    config = make_config(workplace / "siglip.yaml", **sections)
    done = command("train", "-c", str(config), "--load", "start", "--output-dir", "run")
    assert done.returncode == 0, done.stderr
    (step,) = Path("run/checkpoints").glob("step-*")
    assert (step / "spiece.model").read_bytes() == (start / "spiece.model").read_bytes()
    expected = read_weights(start).tokenizer
    assert read_weights("run").tokenizer == expected
    clip = leanclip.load("run", device="cpu")
    assert clip.tokenize("a photo of a cat!").tolist()[0][:6] == [5, 9, 8, 5, 30, 1]
    for words in (
        ("train", "-c", str(config), "--load", "start", "--output-dir", "run"),  # finished
        ("similarity", "--images", "data/000.png", "--texts", "a cat", "--model", "run"),
        ("classify", "data/000.png", "--labels", "cat,dog", "--model", "run"),
        ("search", "build", "data", "--out", "index", "--model", "run"),
        ("search", "find", "index", "a cat"),
    ):
        done = command(*words)
        assert done.returncode == 0, (words, done.stderr)


def test_an_export_carries_the_tokeniser(tmp_path: Path) -> None:
    clip = leanclip.load(siglip_model(tmp_path / "tiny"), device="cpu")
    facts = export(clip, tmp_path / "exported", "torch")
    assert facts["tokenizer"]["files"] == ["spiece.model", "tokenizer_config.json"]
    again = leanclip.load(tmp_path / "exported", backend="torch")
    assert again.model.tokenizer == clip.model.tokenizer
    np.testing.assert_allclose(again.embed_texts(TEXTS), clip.embed_texts(TEXTS), atol=1e-5)


def test_openais_package_has_clips_tokeniser_only(tmp_path: Path) -> None:
    folder = siglip_model(tmp_path / "tiny")
    with pytest.raises(RuntimeError, match="its tokeniser is not CLIP's; load it with leanclip"):
        leanclip.openai.load(folder, device="cpu")


def test_a_small_vocabulary_without_a_tokeniser_is_refused(
    workplace: Path, command: Command
) -> None:
    config = make_config(workplace / "small.yaml", model={"vocab_size": 500})
    done = command("train", "-c", str(config), "--output-dir", "run")
    assert_refused(done, "model.vocab_size: 500 is less than the 49408 ids of the tokeniser")


@pytest.mark.parametrize("pool", ["last", "first"])
def test_a_locked_text_tower_is_cached_by_its_own_tokens(
    workplace: Path, command: Command, pool: str
) -> None:
    siglip_model(workplace / "start", transformer_pool=pool)
    sections = {"data": {"augment": False}, "finetune": {"lock_text": "all"}}
    model = SIGLIP | {"transformer_pool": pool}
    config = make_config(workplace / "locked.yaml", model=model, **sections)
    for run, is_used in (("with", "true"), ("without", "false")):
        words = ("--output-dir", run, "-o", f"finetune.cache_features={is_used}")
        done = command("train", "-c", str(config), "--load", "start", *words)
        assert done.returncode == 0, done.stderr
    found, expected = (
        [line["train/loss"] for line in read_metrics(Path(run)) if "train/loss" in line]
        for run in ("with", "without")
    )
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(found) > 1


@pytest.mark.slow
def test_shards_carry_the_tokeniser(workplace: Path, command: Command) -> None:
    start = siglip_model(workplace / "start")
    train = {"sharding": "fsdp", "batch_size": 2, "epochs": 1}
    make_config(workplace / "config.yaml", model=SIGLIP, train=train)
    words = ("--load", "start", "--output-dir", "run", "--num-procs", "2")
    done = run_cli("train", "-c", "config.yaml", *words, cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert command("merge", "run", "merged").returncode == 0
    assert read_weights("merged").tokenizer == read_weights(start).tokenizer
