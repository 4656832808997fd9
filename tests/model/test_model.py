"""The model's architecture and initialisation, and the properties of its towers.

OpenAI's own outputs are compared in test_weights.py.
"""

import json
import math
from itertools import pairwise

import pytest
import torch
from conftest import TINY
from families import FAMILIES
from torch.nn import functional as F

from leanclip import CLIP, ConfigError
from leanclip.config.model import ModelConfig
from leanclip.config.schema import load_config
from leanclip.config.sections import parse, to_plain
from leanclip.data.batch import TEXT_LENGTHS, trim
from leanclip.model import MAX_LOGIT_SCALE
from leanclip.model.skip_init import SkipInit, meta_device
from leanclip.model.transformer import Block, Transformer
from leanclip.model.vit import VisionTransformer
from leanclip.preprocess.text import Tokenizer
from leanclip.preprocess.tokenizer import tokenize

PASSL_ARCH = {  # the dict of PASSL's document, "Interacting with CLIP"
    "name": "CLIP",
    "embed_dim": 512,
    "image_resolution": 224,
    "vision_layers": 12,
    "vision_width": 768,
    "vision_patch_size": 32,
    "context_length": 77,
    "vocab_size": 49408,
    "transformer_width": 512,
    "transformer_heads": 8,
    "transformer_layers": 12,
    "qkv_bias": True,
    "proj": True,
    "pre_norm": True,
    "patch_bias": False,
}


def vit_of(model: CLIP) -> VisionTransformer:
    assert isinstance(model.visual, VisionTransformer)
    return model.visual


def blocks_of(tower: Transformer) -> list[Block]:
    return [block for block in tower.resblocks if isinstance(block, Block)]


def test_vit_b_32_from_passl_arch_has_openais_parameters() -> None:
    with torch.device("meta"):
        model = CLIP(**PASSL_ARCH)
    assert model.parameter_count() == 151_277_313
    state = model.state_dict()
    for name, shape in {
        "visual.conv1.weight": (768, 3, 32, 32),
        "visual.class_embedding": (768,),
        "visual.positional_embedding": (50, 768),
        "visual.transformer.resblocks.11.attn.in_proj_weight": (2304, 768),
        "visual.transformer.resblocks.0.mlp.c_fc.weight": (3072, 768),
        "visual.proj": (768, 512),
        "transformer.resblocks.11.ln_2.bias": (512,),
        "token_embedding.weight": (49408, 512),
        "text_projection": (512, 512),
        "logit_scale": (),
    }.items():
        assert state[name].shape == shape
    assert blocks_of(vit_of(model).transformer)[0].attn.heads == 12


def test_passl_model_block_in_yaml(tmp_path) -> None:
    arch = "\n".join(f"    {key}: {json.dumps(value)}" for key, value in PASSL_ARCH.items())
    (tmp_path / "c.yaml").write_text(
        f"model:\n  name: CLIPWrapper\n  architecture:\n{arch}\n  head:\n    name: CLIPHead\n"
        f"data: {{format: pairs, root: x}}\n"
    )
    assert load_config(tmp_path / "c.yaml").model == parse(ModelConfig, PASSL_ARCH, where="x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embed_dims": 3}, "embed_dims: no such setting; did you mean embed_dim"),
        ({"vision_width": 100, "vision_heads": 3}, "vision_width 100 is not a multiple"),
        ({"image_resolution": 7}, "image_resolution 7 is less than vision_patch_size 8"),
        ({"embed_dim": "wide"}, 'embed_dim: should be a valid integer, found "wide"'),
        ({"proj": False}, "proj: False is not supported"),
        ({"activation": "relu"}, "activation: should be 'quick_gelu', 'gelu' or 'gelu_tanh'"),
    ],
)
def test_a_wrong_architecture_is_refused(change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CLIP(**TINY | change)


def test_a_missing_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="embed_dim: is required"):
        CLIP(**{key: value for key, value in TINY.items() if key != "embed_dim"})


def test_initialisation_is_openais() -> None:
    wide = {
        "vision_width": 256,
        "transformer_width": 256,
        "vision_heads": 4,
        "transformer_heads": 4,
    }
    model = CLIP(**TINY | wide | {"transformer_layers": 3})
    width, layers = 256, 3
    block = blocks_of(model.transformer)[1]
    for tensor, std in (
        (model.token_embedding.weight, 0.02),
        (model.positional_embedding, 0.01),
        (model.get_parameter("text_projection"), width**-0.5),
        (block.attn.in_proj_weight, width**-0.5),
        (block.attn.out_proj.weight, width**-0.5 * (2 * layers) ** -0.5),
        (block.mlp.c_fc.weight, (2 * width) ** -0.5),
        (block.mlp.c_proj.weight, width**-0.5 * (2 * layers) ** -0.5),
        (model.get_parameter("visual.class_embedding"), width**-0.5),
        (vit_of(model).positional_embedding, width**-0.5),
        (model.get_parameter("visual.proj"), width**-0.5),
    ):
        assert tensor.std().item() == pytest.approx(std, rel=0.15)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert not block.attn.in_proj_bias.any()


def test_logit_scale_is_kept_within_its_bounds() -> None:
    model = CLIP(**TINY)
    for value, kept in ((9.0, MAX_LOGIT_SCALE), (-1.0, 0.0), (2.0, 2.0)):
        model.logit_scale.data.fill_(value)
        model.clamp_logit_scale()
        assert model.logit_scale.item() == pytest.approx(kept)


@torch.no_grad()
def test_cutting_text_after_the_end_token_changes_nothing() -> None:
    model = CLIP(**TINY | {"context_length": 77}).eval()
    tokens = tokenize(["a cat", "a photo of a dog in the snow", "x"])
    cut = trim(tokens, Tokenizer())
    assert cut.shape[1] in TEXT_LENGTHS
    torch.testing.assert_close(model.encode_text(cut), model.encode_text(tokens))


@torch.no_grad()
def test_padding_is_not_looked_at() -> None:
    model = CLIP(**TINY).eval()
    tokens = tokenize("a cat", 24)
    other = tokens.clone()
    other[0, 5:] = 17
    assert torch.equal(model.encode_text(tokens), model.encode_text(other))


@torch.no_grad()
@pytest.mark.parametrize("is_text", [True, False])
def test_reading_one_token_equals_reading_all(is_text: bool) -> None:
    model = CLIP(**TINY).eval()
    tower = model.transformer if is_text else vit_of(model).transformer
    x = torch.randn(6, 9, 32)
    position = torch.tensor([0, 8, 3, 4, 1, 7])
    every = x
    for block in blocks_of(tower):
        every = block(every)  # (6, 9, 32)
    torch.testing.assert_close(tower(x, position), every[torch.arange(6), position])


def test_gradients_of_reading_one_token_equal_reading_all() -> None:
    model = CLIP(**TINY)
    x, position = torch.randn(6, 9, 32), torch.tensor([0, 8, 3, 4, 1, 7])
    grads = []
    for read_all in (False, True):
        model.zero_grad()
        y = x
        if read_all:
            for block in blocks_of(model.transformer):
                y = block(y)
            y = y[torch.arange(6), position]
        else:
            y = model.transformer(x, position)
        (y * torch.arange(32)).sum().backward()
        grads.append([p.grad.clone() for p in model.transformer.parameters() if p.grad is not None])
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_permuting_the_pairs_permutes_the_features() -> None:
    model = CLIP(**TINY).eval()
    pixels, tokens = torch.randn(5, 3, 32, 32), tokenize([f"number {i}" for i in range(5)], 24)
    order = torch.tensor([3, 1, 4, 0, 2])
    image, text, _ = model(pixels, tokens)
    image_, text_, _ = model(pixels[order], tokens[order])
    torch.testing.assert_close(image_, image[order])
    torch.testing.assert_close(text_, text[order])


@torch.no_grad()
def test_activation_and_passl_options_are_honoured() -> None:
    pixels = torch.randn(2, 3, 32, 32)
    base = CLIP(**TINY)
    exact = CLIP(**TINY, activation="gelu")
    exact.load_state_dict(base.state_dict())
    assert not torch.allclose(base.encode_image(pixels), exact.encode_image(pixels))
    assert "visual.ln_pre.weight" not in CLIP(**TINY, pre_norm=False).state_dict()
    assert vit_of(CLIP(**TINY, patch_bias=True)).conv1.bias is not None


@torch.no_grad()
def test_the_tower_equals_its_formula_written_out() -> None:
    """A second implementation of the vision tower, with torch's own attention module."""
    model = CLIP(**TINY).eval()
    v, state = vit_of(model), model.state_dict()
    pixels = torch.randn(3, 3, 32, 32)
    patches = F.unfold(pixels, 8, stride=8).transpose(1, 2) @ v.conv1.weight.flatten(1).T
    x = (
        torch.cat([v.get_parameter("class_embedding").expand(3, 1, -1), patches], 1)
        + v.positional_embedding
    )
    x = F.layer_norm(x, (32,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"], 1e-5)
    for i in range(2):
        prefix = f"visual.transformer.resblocks.{i}."
        names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        attention = torch.nn.MultiheadAttention(32, 2, batch_first=True)
        attention.load_state_dict({name: state[f"{prefix}attn.{name}"] for name in names})
        block = blocks_of(v.transformer)[i]
        y = block.ln_1(x)
        x = x + attention(y, y, y, need_weights=False)[0]
        y = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(y * torch.sigmoid(1.702 * y))
    expected = v.ln_post(x[:, 0]) @ v.proj
    torch.testing.assert_close(model.encode_image(pixels), expected, rtol=1e-4, atol=1e-5)


def test_config_survives_its_plain_form() -> None:
    config = CLIP(**TINY).config
    assert parse(ModelConfig, to_plain(config), where="x") == config
    assert all(a < b for a, b in pairwise(TEXT_LENGTHS))


NORM = "transformer.resblocks.0.ln_1.weight"
RESNET = {"vision_layers": [1, 2, 1, 1], "vision_patch_size": None, "vision_heads": None}


@pytest.mark.parametrize("change", [{}, RESNET, *FAMILIES.values()])
def test_nothing_is_drawn_where_values_will_be_replaced(change: dict) -> None:
    drawn = CLIP(**TINY | change)
    before = torch.get_rng_state()
    with SkipInit():
        undrawn = CLIP(**TINY | change)
    with meta_device():
        shapes = CLIP(**TINY | change)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in drawn.state_dict().items():
        zeros, shape = undrawn.state_dict()[name], shapes.state_dict()[name]
        is_constant = bool((value == value.reshape(-1)[0]).all())  # of a normalisation, a bias
        assert torch.equal(zeros, value if is_constant else torch.zeros_like(value)), name
        assert shape.is_meta
        assert (shape.shape, shape.dtype) == (value.shape, value.dtype)
    own = dict(undrawn.named_parameters())
    assert all(own[name].requires_grad for name, _ in drawn.named_parameters())
    assert torch.equal(CLIP(**TINY | change).get_parameter(NORM), torch.ones(32))
