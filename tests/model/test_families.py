"""The towers of the families after CLIP: against transformers, packed, dropped, traced.

Features of whole checkpoints are compared in tests/weights/test_huggingface_families.py.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from families import FAMILIES, SIGLIP
from safetensors.torch import load_file
from torch.nn import functional as F

from leanclip import CLIP
from leanclip.config.sections import to_plain
from leanclip.losses import clip_loss, siglip_loss
from leanclip.model.packed import packed_layout
from leanclip.model.transformer import Keys
from leanclip.model.vit import VisionTransformer
from leanclip.preprocess.patches import Patches
from leanclip.preprocess.tokenizer import tokenize
from leanclip.weights import load_into, read_weights, write_weights

TEXTS = [
    "a cat",
    "a photo of a dog",
    "x",
    "a much longer text of a good many words than the others",
]
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 99, "max_position_embeddings": 12,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
THEIRS = {  # class of transformers, vision, text, the whole
    "Siglip": (VISION, TEXT | {"projection_size": 32}, {}),
    "Siglip2": (
        {k: v for k, v in VISION.items() if k != "image_size"} | {"num_patches": 25},
        TEXT | {"projection_size": 32},
        {},
    ),
    "MetaClip2": (VISION, TEXT | {"eos_token_id": 2}, {"projection_dim": 24}),
    "ChineseCLIP": (
        VISION,
        TEXT | {"hidden_size": 64, "num_attention_heads": 1, "type_vocab_size": 2},
        {"projection_dim": 24},
    ),
}


def vit_of(model: CLIP) -> VisionTransformer:
    assert isinstance(model.visual, VisionTransformer)
    return model.visual


def family(name: str, **changes: Any) -> CLIP:
    torch.manual_seed(2)
    model = CLIP(**FAMILIES[name] | changes).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # biases and norms too
            if not key.startswith("logit_"):
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def pixels_of(model: CLIP, images: int = 4) -> torch.Tensor:
    side = model.config.image_resolution
    return torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(3))


def tokens_of(model: CLIP, texts: list[str] = TEXTS) -> torch.Tensor:
    tokens = tokenize(texts, 24)
    return tokens.where(tokens != 0, torch.tensor(model.config.transformer_pad_id))


def write_words(folder: Path) -> None:
    """A tokeniser of words that are numbers, which ends texts with 2 and pads with 0."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {str(i): i for i in range(99)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="3"))
    made.post_processor = tokenizers.processors.TemplateProcessing("$A 2", None, [("2", 2)])
    made.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "0", "eos_token": "2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))


# --- against transformers


@pytest.mark.parametrize("name", THEIRS)
def test_the_loss_and_all_gradients_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Gradients are compared under transformers' names, as the writer of weights maps them."""
    transformers = pytest.importorskip("transformers")
    vision, text, top = THEIRS[name]
    config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config=text, **top)
    torch.manual_seed(3)
    theirs = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        theirs.logit_scale.fill_(2.0)
    theirs.save_pretrained(tmp_path / "theirs")
    write_words(tmp_path / "theirs")
    weights = read_weights(tmp_path / "theirs")
    assert weights.model is not None
    ours = CLIP(**to_plain(weights.model))
    load_into(ours, weights)

    tokens = torch.randint(3, 99, (4, 12))
    tokens[torch.arange(12) > torch.tensor([4, 8, 11, 6])[:, None]] = 0
    tokens[torch.arange(4), torch.tensor([4, 8, 11, 6])] = 2
    inputs: dict[str, Any] = {"input_ids": tokens}
    pixels: Any = torch.randn(4, 3, 32, 32)
    if name == "Siglip2":
        shapes = torch.tensor([[2, 6], [3, 4], [4, 3], [1, 7]])
        pixels = Patches(torch.randn(4, 12, 192), shapes)
        mask = pixels.mask.long()
        inputs |= {"pixel_attention_mask": mask, "spatial_shapes": shapes}
    if name == "ChineseCLIP":
        inputs["attention_mask"] = (tokens != 0).long()
    values = pixels.values if isinstance(pixels, Patches) else pixels
    expected = theirs(pixel_values=values, return_loss=True, **inputs).loss
    expected.backward()

    image, words, scale = ours(pixels, tokens)
    if ours.logit_bias is None:
        loss = clip_loss(image, words, scale)
    else:
        loss = siglip_loss(image, words, scale, ours.logit_bias)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    own = {key: p.grad for key, p in ours.named_parameters() if p.grad is not None}
    assert own.keys() == dict(ours.named_parameters()).keys()
    write_weights(replace(weights, tensors=own), tmp_path / "gradients", "hf")
    mapped = load_file(tmp_path / "gradients" / "model.safetensors")
    total = torch.cat([p.grad.flatten() for p in theirs.parameters() if p.grad is not None]).norm()
    for key, parameter in theirs.named_parameters():
        gradient = parameter.grad
        if gradient is None:  # a pooler that nothing reads
            assert not mapped[key].any() if key in mapped else True
            continue
        error = float((mapped[key] - gradient).norm() / total)
        assert error < 1e-6, (key, error)


# --- numbers do not change


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_learns(name: str) -> None:
    model = family(name).train()
    image, text, scale = model(pixels_of(model), tokens_of(model))
    siglip_loss(image, text, scale, model.logit_bias or torch.zeros(())).backward()
    without = {key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == set()


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_texts_cut_after_their_end_and_packed_ones_are_the_same(name: str) -> None:
    model = family(name)
    tokens = tokens_of(model)
    expected, short = model.encode_text(tokens), tokens[:2]
    cut = short[:, : int((short == 49407).int().argmax(1).max()) + 1]
    for found, wanted in (
        (model.encode_text(cut), expected[:2]),
        (model.encode_packed(tokens), expected),
        (model.encode_packed(cut), expected[:2]),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_only_towers_that_end_at_an_end_token_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = set()
    for name in FAMILIES:
        model = family(name)
        monkeypatch.setattr(
            "leanclip.model.clip.packed_layout",
            lambda *inputs, name=name: packed.add(name) or packed_layout(*inputs),
        )
        model.encode_packed(tokens_of(model))
    assert packed == {"metaclip2", "pe-core"}


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(name: str, dtype: torch.dtype) -> None:
    model = family(name)
    pixels, tokens = pixels_of(model), tokens_of(model)
    exact, half = model(pixels, tokens), model.to(dtype)(pixels.to(dtype), tokens)
    for one, other in ((exact.image, half.image), (exact.text, half.text)):
        assert F.cosine_similarity(one, other).min() > 0.999
    with torch.autocast("cpu", torch.bfloat16):
        mixed = family(name)(pixels, tokens)
    assert F.cosine_similarity(exact.image, mixed.image).min() > 0.999
    assert F.cosine_similarity(exact.text, mixed.text).min() > 0.999


# --- patch dropout


@pytest.mark.parametrize("name", [*FAMILIES, "clip"])
def test_without_dropped_patches_training_is_evaluation(name: str) -> None:
    """A fraction that drops none gathers all patches in another order: the features stay."""
    torch.manual_seed(2)
    model = CLIP(**FAMILIES.get(name, TINY)).eval()
    pixels = pixels_of(model)
    with torch.no_grad():
        expected = model.encode_image(pixels)
        vit_of(model).patch_dropout = 1e-6
        found = model.train().encode_image(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*FAMILIES, "clip"])
def test_dropped_patches_are_a_fraction(name: str) -> None:
    torch.manual_seed(2)
    model = CLIP(**FAMILIES.get(name, TINY)).train()
    vit_of(model).patch_dropout = 0.75
    lengths = []
    model.get_submodule("visual.transformer").register_forward_hook(
        lambda _, args, __: lengths.append(args[0].shape[1])
    )
    model.encode_image(pixels_of(model))
    assert lengths == [4 + model.config.vision_class_token]  # of 16 patches


def test_each_image_keeps_its_fraction_of_patches() -> None:
    model = CLIP(**FAMILIES["naflex"]).train()
    visual = vit_of(model)
    visual.patch_dropout = 0.5
    shapes = torch.tensor([[4, 4], [2, 3], [1, 1]])
    mask = Patches(torch.zeros(3, 16, 192), shapes).mask
    marked = torch.arange(16.0).expand(3, 16)[..., None].expand(3, 16, 32)  # each patch its number
    x, keys = visual._drop_patches(marked, Keys(mask))
    assert keys.mask is not None
    assert keys.mask.sum(1).tolist() == [8, 3, 1]
    for row, kept, count in zip(x[..., 0], keys.mask, (16, 6, 1), strict=True):
        numbers = row[kept].tolist()
        assert len({*numbers}) == len(numbers)
        assert max(numbers) < count  # no padding


# --- traced


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "naflex"])
def test_the_towers_compile_and_export_as_one_graph(name: str) -> None:
    model = family(name)
    pixels, tokens = pixels_of(model), tokens_of(model)
    expected = model.encode_image(pixels), model.encode_text(tokens)
    found = compiled(model.encode_image)(pixels), compiled(model.encode_text)(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(model, (pixels, tokens)).module()
    image, text, _ = exported(pixels, tokens)
    torch.testing.assert_close(image, F.normalize(expected[0], dim=-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text, F.normalize(expected[1], dim=-1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_compiled_tower_of_resized_positions_breaks_its_graph_and_agrees() -> None:
    torch._dynamo.reset()
    model = family("naflex")
    patches = Patches(torch.randn(3, 16, 192), torch.tensor([[4, 4], [2, 3], [1, 1]]))
    found = torch.compile(model.encode_image, backend="aot_eager")(patches)
    torch.testing.assert_close(found, model.encode_image(patches), rtol=1e-4, atol=1e-5)


# --- SigLIP's own


def test_the_scale_of_a_model_with_a_bias_is_free() -> None:
    model = CLIP(**SIGLIP)
    for value in (4.77, -0.5):  # published weights have exp(4.77) = 118
        torch.nn.init.constant_(model.logit_scale, value)
        model.clamp_logit_scale()
        assert model.logit_scale.item() == pytest.approx(value)
