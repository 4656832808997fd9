"""Folders of Hugging Face's CLIPModel as they are found: older configs, end tokens, tokenisers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, Command
from PIL import Image

import leanclip
from leanclip import CLIP, ConfigError, Preprocess, WeightsError
from leanclip.preprocess.tokenizer import END, START, merges, vocabulary
from leanclip.weights import Weights, read_weights, write_weights
from leanclip.weights.huggingface import _architecture

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "projection_dim": 16,
}
VISION = {**TEXT, "image_size": 32, "patch_size": 8}
del VISION["max_position_embeddings"]


def weights(**changes: object) -> Weights:
    torch.manual_seed(2)
    model = CLIP(**TINY | changes)
    return Weights(Path("tiny"), "leanclip", model.state_dict(), model.config, Preprocess(32))


def edit(path: Path, change: Any) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def theirs(values: dict[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPConfig(**values)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"text_config": None, "vision_config": None},
        {"text_config_dict": None, "vision_config_dict": None},
        {"vision_config_dict": VISION | {"num_hidden_layers": 5}},
        {
            "vision_config_dict": VISION | {"hidden_act": "gelu"},
            "text_config_dict": TEXT | {"hidden_act": "gelu"},
        },
        {"text_config_dict": TEXT | {"num_attention_heads": 4, "eos_token_id": 2}},
        {"text_config_dict": {"hidden_size": 64}},  # the rest are defaults, not text_config's
        {"text_config_dict": {}},
        {"text_config": {"eos_token_id": 7, "vocab_size": 9}},
    ],
    ids=str,
)
def test_older_sections_win_as_in_transformers(change: dict[str, Any]) -> None:
    values = {"projection_dim": 16, "text_config": TEXT, "vision_config": VISION} | change
    known = theirs(json.loads(json.dumps(values)))
    ours = _architecture(Path("w/config.json"), values)
    text, vision = known.text_config, known.vision_config
    assert ours.vision_layers == vision.num_hidden_layers
    assert ours.vision_heads == vision.num_attention_heads
    assert ours.vision_width == vision.hidden_size
    assert ours.image_resolution == vision.image_size
    assert ours.vision_patch_size == vision.patch_size
    assert ours.transformer_layers == text.num_hidden_layers
    assert ours.transformer_heads == text.num_attention_heads
    assert ours.transformer_width == text.hidden_size
    assert int(ours.transformer_width * ours.transformer_mlp_ratio) == text.intermediate_size
    assert ours.vocab_size == text.vocab_size
    assert ours.context_length == text.max_position_embeddings
    assert ours.activation == text.hidden_act
    is_highest = text.eos_token_id in (2, text.vocab_size - 1)
    assert ours.transformer_eos_id == (None if is_highest else text.eos_token_id)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("vision_config", "image_size", [32, 48]),
        ("vision_config", "patch_size", [8, 16]),
        ("vision_config", "num_channels", 1),
        ("vision_config", "layer_norm_eps", 0),
        ("text_config", "hidden_act", "gelu_new"),
        ("text_config", "eos_token_id", [2, 3]),
        ("text_config", "eos_token_id", None),
    ],
)
def test_what_clip_model_has_alone_is_refused_by_name(
    section: str, field: str, value: object
) -> None:
    values: dict[str, Any] = {"projection_dim": 16, "text_config": TEXT, "vision_config": VISION}
    values[section] = values[section] | {field: value}
    with pytest.raises(WeightsError, match=f"config.json.*{field}"):
        _architecture(Path("w/config.json"), values)


@torch.no_grad()
@pytest.mark.parametrize("format", ["hf", "open_clip", "leanclip"])
@pytest.mark.parametrize("end", [2, END, END + 1, 5])
def test_texts_are_read_where_eos_token_id_says(end: int, format: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_weights(weights(vocab_size=49412), tmp_path / "w", "hf")
    edit(tmp_path / "w/config.json", lambda v: v["text_config"].update(eos_token_id=end))
    model = transformers.CLIPModel.from_pretrained(tmp_path / "w").eval()
    if format != "hf":
        write_weights(read_weights(tmp_path / "w"), tmp_path / format, format)
    clip = leanclip.load(tmp_path / ("w" if format == "hf" else format), device="cpu")
    tokens = torch.tensor(
        [
            [START, 320, 5, END, 7, 49411, 3, 0],
            [START, END + 1, 320, END, END, 0, 0, 0],
            [START, 320, 900, END, 0, 0, 0, 0],
        ]
    )
    expected = model.get_text_features(input_ids=tokens)
    expected = expected if isinstance(expected, torch.Tensor) else expected.pooler_output
    for encode in (clip.model.encode_text, clip.model.encode_packed):
        torch.testing.assert_close(encode(tokens), expected, rtol=1e-4, atol=1e-5)
    theirs_of_text = model.get_text_features(input_ids=leanclip.tokenize(["a red cat"])[:, :24])
    if not isinstance(theirs_of_text, torch.Tensor):
        theirs_of_text = theirs_of_text.pooler_output
    unit = torch.nn.functional.normalize(theirs_of_text, dim=-1)
    ours = clip.embed_texts(["a red cat"], as_torch=True)
    torch.testing.assert_close(ours, unit, rtol=1e-4, atol=1e-5)


def test_an_end_token_that_no_text_has_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_weights(weights(), tmp_path / "w", "hf")
    edit(tmp_path / "w/config.json", lambda v: v["text_config"].update(eos_token_id=5))
    leanclip.load(tmp_path / "w", device="cpu")
    assert "eos_token_id is 5" in caplog.text


@torch.no_grad()
def test_a_larger_vocabulary_is_read_at_the_highest_id_after_conversion(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    own = weights(vocab_size=49412)
    write_weights(own, tmp_path / "w", "hf")
    model = transformers.CLIPModel.from_pretrained(tmp_path / "w").eval()
    tokens = leanclip.tokenize(["a cat"], 24)
    features = model.get_text_features(input_ids=tokens)
    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    ours = CLIP(**TINY | {"vocab_size": 49412}).eval()
    ours.load_state_dict(own.tensors)
    torch.testing.assert_close(ours.encode_text(tokens), features, rtol=1e-4, atol=1e-5)


# --- tokenisers


def fast(vocab: dict[str, int], *added: str) -> dict[str, Any]:
    words = [{"content": word, "id": len(vocab) + i} for i, word in enumerate(added)]
    pairs = [pair.split() for pair in merges()]
    return {"model": {"type": "BPE", "vocab": vocab, "merges": pairs}, "added_tokens": words}


SHUFFLED = dict(zip(vocabulary(), reversed(vocabulary().values()), strict=True))
OTHER_TOKENIZERS: dict[str, tuple[str, Any]] = {
    "a class": ("tokenizer_config.json", {"tokenizer_class": "XLMRobertaTokenizer"}),
    "any backend": ("tokenizer_config.json", {"tokenizer_class": "TokenizersBackend"}),
    "fewer words": ("vocab.json", {"a": 0, "b": 1}),
    "another order": ("vocab.json", SHUFFLED),
    "word pieces": ("vocab.txt", "[PAD]\n[UNK]\n"),
    "sentence pieces": ("spiece.model", "x"),
    "a fast one": ("tokenizer.json", fast({"a": 0})),
    "unigrams": ("tokenizer.json", {"model": {"type": "Unigram", "vocab": [["a", -1.0]]}}),
    "other merges": ("merges.txt", "\n".join(("#version: 0.2", *merges()[::-1]))),
    "fast, other merges": (
        "tokenizer.json",
        {"model": {"type": "BPE", "vocab": vocabulary(), "merges": merges()[1:]}},
    ),
    "a word more": ("tokenizer.json", fast(vocabulary(), "<sks>")),
    "a word more, older": ("added_tokens.json", {"<sks>": 49408}),
}


@pytest.mark.parametrize("name", OTHER_TOKENIZERS)
def test_another_tokeniser_is_refused_by_the_files_name(
    name: str, tmp_path: Path, command: Command
) -> None:
    write_weights(weights(), tmp_path / "w", "hf")
    file, content = OTHER_TOKENIZERS[name]
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "w" / file).write_text(text)
    with pytest.raises(WeightsError, match=rf"{file}: .* is not CLIP's"):
        leanclip.load(tmp_path / "w", device="cpu")
    if name == "a class":
        Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
        picture, model = str(tmp_path / "a.png"), str(tmp_path / "w")
        done = command("classify", picture, "--labels", "cat, dog", "--model", model)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert "XLMRobertaTokenizer" in done.stderr


def test_clips_own_tokeniser_in_all_its_forms(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_weights(weights(), tmp_path / "w", "hf")
    (tmp_path / "merges.txt").write_text("\n".join(("#version: 0.2", *merges())) + "\n")
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary()))
    files = (str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    transformers.CLIPTokenizer(*files).save_pretrained(tmp_path / "w")
    assert (tmp_path / "w" / "tokenizer.json").is_file()
    assert leanclip.load(tmp_path / "w", device="cpu").embed_texts("a cat").shape == (1, 16)


def test_texts_of_a_model_with_fewer_ids_are_refused(tmp_path: Path, command: Command) -> None:
    write_weights(weights(vocab_size=320), tmp_path / "w", "leanclip")
    clip = leanclip.load(tmp_path / "w", device="cpu")
    picture = np.zeros((8, 8, 3), np.uint8)
    assert clip.embed_images(picture).shape == (1, 16)
    for use in (
        lambda: clip.tokenize("a cat"),
        lambda: clip.embed_texts("a cat"),
        lambda: clip.classify(picture, ["a", "b"]),
        lambda: clip.rank(picture, ["a", "b"]),
    ):
        with pytest.raises(ConfigError, match="320 token ids, CLIP's tokeniser 49408"):
            use()
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    words = ("classify", str(tmp_path / "a.png"), "--labels", "cat, dog")
    done = command(*words, "--model", str(tmp_path / "w"))
    assert done.returncode == 2
    assert "320 token ids" in done.stderr
