"""The ResNet tower, and the ViT variants of open_clip's configs.

OpenAI's own outputs are compared in test_weights.py.
"""

import json
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA, TINY, make_config
from torch.nn import functional as F

import leanclip
from leanclip import CLIP, ConfigError
from leanclip.config.model import ModelConfig
from leanclip.config.schema import Config, load_config
from leanclip.config.sections import parse, to_plain
from leanclip.config.strict_yaml import load_yaml
from leanclip.data.batch import trim
from leanclip.model.resnet import AttentionPool2d, Bottleneck, ModifiedResNet
from leanclip.model.transformer import Block, Transformer
from leanclip.model.vit import VisionTransformer
from leanclip.preprocess.text import Tokenizer
from leanclip.preprocess.tokenizer import tokenize
from leanclip.weights import read_weights, save_weights

TINY_RESNET = {
    **{key: value for key, value in TINY.items() if key != "vision_heads"},
    "image_resolution": 64,
    "vision_layers": [1, 2, 1, 1],
    "vision_width": 8,
    "vision_patch_size": None,
}


def resnet_of(model: CLIP) -> ModifiedResNet:
    assert isinstance(model.visual, ModifiedResNet)
    return model.visual


def vit_of(model: CLIP) -> VisionTransformer:
    assert isinstance(model.visual, VisionTransformer)
    return model.visual


def through_all(tower: Transformer, x: torch.Tensor) -> torch.Tensor:
    for block in tower.resblocks:
        x = block(x)
    return x


@torch.no_grad()
def test_the_trunk_is_what_the_attention_pool_reads() -> None:
    model = leanclip.load(DATA / "openai-resnet/torchscript.pt", device="cpu").model
    io = np.load(DATA / "openai-resnet/io.npz")
    visual, pixels = resnet_of(model), torch.from_numpy(io["image"])
    trunk = visual.trunk(pixels)
    assert trunk.shape == (4, 256, 2, 2)
    torch.testing.assert_close(visual.attnpool(trunk), model.encode_image(pixels))


def test_rn50_has_openais_parameters() -> None:
    arch = {
        "embed_dim": 1024,
        "image_resolution": 224,
        "vision_layers": (3, 4, 6, 3),
        "vision_width": 64,
        "transformer_width": 512,
        "transformer_heads": 8,
        "transformer_layers": 12,
    }
    with torch.device("meta"):
        model = CLIP(**arch)
    assert model.parameter_count() == 102_007_137
    state = model.state_dict()
    for name, shape in {
        "visual.conv1.weight": (32, 3, 3, 3),
        "visual.bn1.running_mean": (32,),
        "visual.conv3.weight": (64, 32, 3, 3),
        "visual.layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "visual.layer1.0.downsample.1.running_var": (256,),
        "visual.layer1.0.downsample.1.num_batches_tracked": (),
        "visual.layer3.5.conv2.weight": (256, 256, 3, 3),
        "visual.layer4.2.bn3.weight": (2048,),
        "visual.attnpool.positional_embedding": (50, 2048),
        "visual.attnpool.q_proj.weight": (2048, 2048),
        "visual.attnpool.c_proj.weight": (1024, 2048),
    }.items():
        assert state[name].shape == shape
    assert "visual.layer1.1.downsample.0.weight" not in state
    assert resnet_of(model).attnpool.heads == 32


def test_initialisation_is_openais() -> None:
    visual = resnet_of(CLIP(**TINY_RESNET))
    pool = visual.attnpool
    for projection in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
        assert projection.weight.std().item() == pytest.approx(256**-0.5, rel=0.1)
    assert pool.positional_embedding.std().item() == pytest.approx(256**-0.5, rel=0.15)
    blocks = [module for module in visual.modules() if isinstance(module, Bottleneck)]
    assert len(blocks) == 5
    assert not any(block.bn3.weight.any() for block in blocks)
    assert all(block.bn2.weight.all() for block in blocks)
    assert visual.bn3.weight.all()


@torch.no_grad()
def test_a_new_block_is_its_shortcut() -> None:
    x = torch.rand(2, 32, 8, 8)
    torch.testing.assert_close(Bottleneck(32, 8, stride=1)(x), x)
    assert Bottleneck(32, 16, stride=2)(x).shape == (2, 64, 4, 4)


def test_the_attention_pool_equals_torchs_own_attention() -> None:
    pool = AttentionPool2d(3, 64, 4, 16)
    x = torch.randn(5, 64, 3, 3)
    y = x.flatten(2).permute(2, 0, 1)  # (9, 5, 64)
    y = torch.cat([y.mean(0, keepdim=True), y]) + pool.positional_embedding[:, None]
    expected, _ = F.multi_head_attention_forward(
        query=y[:1],
        key=y,
        value=y,
        embed_dim_to_check=64,
        num_heads=4,
        in_proj_weight=None,
        in_proj_bias=torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=pool.c_proj.weight,
        out_proj_bias=pool.c_proj.bias,
        use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight,
        need_weights=False,
    )
    torch.testing.assert_close(pool(x), expected[0])
    grads = [
        torch.autograd.grad(features.square().sum(), list(pool.parameters()))
        for features in (pool(x), expected[0])
    ]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_every_parameter_of_a_resnet_learns() -> None:
    model = CLIP(**TINY_RESNET)
    for module in model.modules():
        if isinstance(module, Bottleneck):  # zero stops the gradient of what stands before it
            torch.nn.init.ones_(module.bn3.weight)
    image, text, scale = model(torch.randn(3, 3, 64, 64), tokenize(["a", "b b", "c"], 24))
    F.cross_entropy(scale * image @ text.T, torch.arange(3)).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent in ([], ["visual.attnpool.k_proj.bias"])  # softmax does not see that bias


@torch.no_grad()
def test_batch_norm_statistics_are_saved_with_the_weights(tmp_path) -> None:
    from leanclip.preprocess.images import Preprocess

    model = CLIP(**TINY_RESNET)
    model.encode_image(3 + torch.randn(8, 3, 64, 64))  # in training mode: moves the statistics
    save_weights(tmp_path, model.state_dict(), model.config, Preprocess(64))
    weights = read_weights(tmp_path)
    assert weights.model == model.config
    other = CLIP(**to_plain(model.config))
    other.load_state_dict(weights.tensors)
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval().encode_image(pixels), other.eval().encode_image(pixels))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_layers": [3, 4, 6]}, r"vision_layers: should be one number .* found \[3, 4, 6\]"),
        ({"vision_layers": [1]}, "vision_layers: should be one number"),
        ({"vision_layers": [3, 4, 0, 3]}, "vision_layers: should be one number"),
        ({"vision_layers": [3, 4, 6.0, 3]}, "vision_layers: should be one number"),
        ({"vision_layers": [3, 4, True, 3]}, "vision_layers: should be one number"),
        ({"vision_layers": "3"}, 'vision_layers: should be one number .* found "3"'),
        ({"vision_layers": 0}, "vision_layers: should be one number .* found 0"),
        ({"vision_layers": 2}, "vision_patch_size is required with a ViT"),
        ({"vision_layers": 2, "vision_patch_size": 0}, "vision_patch_size: should be greater"),
        ({"vision_patch_size": 32}, "vision_patch_size 32 does not go with a ResNet"),
        ({"pre_norm": False}, "pre_norm False does not go with a ResNet"),
        ({"patch_bias": True}, "patch_bias True does not go with a ResNet"),
        ({"vision_pool": "avg"}, "vision_pool avg does not go with a ResNet"),
        ({"vision_norm_after_pool": True}, "vision_norm_after_pool True does not go"),
        ({"vision_mlp_ratio": 2}, r"vision_mlp_ratio 2\.0 does not go with a ResNet"),
        ({"image_resolution": 50}, "image_resolution 50 is not a multiple of a ResNet's 32"),
        ({"vision_width": 5}, "vision_width 5 is not a multiple of a ResNet's 2"),
        ({"vision_heads": 3}, r"32 \* vision_width 256 is not a multiple of vision_heads 3"),
    ],
)
def test_a_wrong_resnet_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CLIP(**TINY_RESNET | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_mlp_ratio": 0}, "vision_mlp_ratio: should be greater than 0"),
        ({"vision_mlp_ratio": 1e308}, "vision_mlp_ratio: should be less than or equal to 100"),
        ({"vision_mlp_ratio": 0.01}, r"vision_mlp_ratio 0\.01 of 32 leaves no hidden width"),
        ({"transformer_mlp_ratio": 0.01}, r"transformer_mlp_ratio 0\.01 of 32 leaves no hidden"),
        ({"vision_pool": "max"}, "vision_pool: should be 'tok', 'avg', 'attn' or 'queries'"),
        (
            {"transformer_pool": "end"},
            "transformer_pool: should be 'argmax', 'first', 'last', 'eos' or",
        ),
        ({"transformer_pool": "eos"}, "transformer_eos_id goes with transformer_pool eos"),
        ({"transformer_causal": 1}, "transformer_causal: should be a valid boolean"),
        ({"vision_head": 2}, "vision_head: no such setting; did you mean vision_heads"),
    ],
)
def test_a_wrong_variant_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CLIP(**TINY | change)


def test_passl_writes_zero_for_the_patch_size_of_a_resnet() -> None:
    config = parse(ModelConfig, TINY_RESNET | {"vision_patch_size": 0, "name": "CLIP"}, where="x")
    assert config == parse(ModelConfig, TINY_RESNET, where="x")
    assert parse(ModelConfig, to_plain(config), where="x") == config
    assert config.attention_heads == 4


def test_a_resnet_in_a_config_file_and_by_override(tmp_path) -> None:
    model = {key: value for key, value in TINY_RESNET.items() if value is not None}
    (tmp_path / "c.yaml").write_text(
        f"model: {json.dumps(model)}\ndata: {{format: pairs, root: x}}\n"
    )
    config = load_config(tmp_path / "c.yaml", ["model.vision_layers=[2, 1, 1, 1]"])
    assert config.model.vision_layers == (2, 1, 1, 1)
    assert parse(Config, load_yaml(json.dumps(to_plain(config)), where="x"), where="x") == config


def test_a_dry_run_of_a_resnet_whose_last_stage_is_one_pixel(command, workplace) -> None:
    make_config(workplace / "resnet.yaml", model=TINY_RESNET | {"image_resolution": 32})
    config = load_config(workplace / "resnet.yaml").model  # make_config merges into TINY
    assert config.vision_layers == (1, 2, 1, 1)
    done = command("train", "-c", "resnet.yaml", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "memory: about" in done.stdout


def test_mlp_ratios_set_the_hidden_widths() -> None:
    model = CLIP(**TINY, vision_mlp_ratio=4.9231, transformer_mlp_ratio=2)
    hidden = []
    for tower in (vit_of(model).transformer, model.transformer):
        block = tower.resblocks[0]
        assert isinstance(block, Block)
        hidden.append(block.mlp.c_fc.out_features)
    assert hidden == [157, 64]  # int(32 * 4.9231), int(32 * 2)


@torch.no_grad()
def test_gelu_tanh_is_its_formula() -> None:
    x = torch.linspace(-4, 4, 101)
    block = CLIP(**TINY, activation="gelu_tanh").transformer.resblocks[0]
    assert isinstance(block, Block)
    expected = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    torch.testing.assert_close(block.mlp.activation(x), expected)


@torch.no_grad()
def test_average_pool_reads_the_patches_before_or_after_the_norm() -> None:
    """open_clip's `_global_pool` and `final_ln_after_pool`, written out."""
    first = CLIP(**TINY, vision_pool="avg").eval()
    after = CLIP(**TINY, vision_pool="avg", vision_norm_after_pool=True).eval()
    after.load_state_dict(first.state_dict())
    v, pixels = vit_of(first), torch.randn(3, 3, 32, 32)
    torch.nn.init.normal_(v.ln_post.weight)
    vit_of(after).ln_post.load_state_dict(v.ln_post.state_dict())
    x = v.conv1(pixels).flatten(2).transpose(1, 2)  # (3, 16, 32)
    x = (
        torch.cat([v.get_parameter("class_embedding").expand(3, 1, -1), x], 1)
        + v.positional_embedding
    )
    x = through_all(v.transformer, v.ln_pre(x))[:, 1:]
    torch.testing.assert_close(first.encode_image(pixels), v.ln_post(x).mean(1) @ v.proj)
    torch.testing.assert_close(after.encode_image(pixels), v.ln_post(x.mean(1)) @ v.proj)
    assert not torch.allclose(first.encode_image(pixels), after.encode_image(pixels))


@torch.no_grad()
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pool", ["argmax", "first", "last"])
def test_text_pools_with_and_without_a_causal_mask(pool: str, is_causal: bool) -> None:
    """open_clip's `text_global_pool` and `no_causal_mask`, with torch's own attention."""
    model = CLIP(**TINY, transformer_pool=pool, transformer_causal=is_causal).eval()
    state, tokens = model.state_dict(), tokenize(["a cat", "a photo of a dog", "x"], 24)
    mask = torch.full((24, 24), -torch.inf).triu(1) if is_causal else None
    x = model.token_embedding(tokens) + model.positional_embedding
    for i, block in enumerate(model.transformer.resblocks):
        assert isinstance(block, Block)
        prefix = f"transformer.resblocks.{i}.attn."
        attention = torch.nn.MultiheadAttention(32, 2, batch_first=True).eval()
        attention.load_state_dict({name: state[prefix + name] for name in attention.state_dict()})
        y = block.ln_1(x)
        x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        x = x + block.mlp(block.ln_2(x))
    row = torch.arange(3)
    place = {"argmax": tokens.argmax(-1), "first": 0 * row, "last": 0 * row + 23}[pool]
    expected = model.ln_final(x)[row, place] @ model.text_projection
    torch.testing.assert_close(model.encode_text(tokens), expected, rtol=1e-4, atol=1e-5)
    cut = trim(tokens, Tokenizer())
    assert cut.shape[1] < 24
    torch.testing.assert_close(model.encode_text(cut), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError):  # over the context: never cut in silence
        model.encode_text(torch.ones(1, 25, dtype=torch.int64))
