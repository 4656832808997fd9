"""`leanclip.openai` as public projects use OpenAI's package: what they reach into is there.

Shapes: B batch, L tokens, P patches, D width.
"""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA
from photographs import photograph
from test_inference import save_tiny
from test_openai import ARCHITECTURES, NAMES, RESNET, VIT, inputs
from torch import nn
from torch.nn import functional as F

import leanclip
import leanclip.openai as clip
from leanclip.openai.network import CLIP, convert_weights

VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"activation": "gelu"},
    {"activation": "gelu_tanh"},
    {"vision_pool": "avg"},
    {"vision_pool": "avg", "vision_norm_after_pool": True},
    {"vision_mlp_ratio": 2.0, "transformer_mlp_ratio": 3.0},
    {"pre_norm": False},
    {"patch_bias": True},
    {"transformer_causal": False},
    {"transformer_causal": False, "transformer_pool": "first"},
    {"transformer_pool": "last"},
    {"transformer_pool": "eos", "transformer_eos_id": 49407},
    {"logit_bias": True},
    {"vision_layers": (1, 1, 2, 1), "vision_patch_size": None, "vision_heads": 4},
)


def make(architecture: tuple[Any, ...]) -> Any:
    """A random model, in evaluation mode."""
    torch.manual_seed(2)
    return CLIP(*architecture).eval()


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_features_are_those_of_leanclip(changes: dict[str, Any], tmp_path: Path) -> None:
    weights = save_tiny(tmp_path / "tiny", **changes)
    expected = leanclip.load(weights, device="cpu").model
    model, _ = clip.load(weights, device="cpu")
    assert {*model.state_dict()} == {*expected.state_dict()}
    image, text = torch.randn(2, 3, 32, 32), clip.tokenize(["a dog", "x"], context_length=24)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(image), expected.encode_image(image))
        for tokens in (text, text[:, :6]):  # a shorter context reads the same
            torch.testing.assert_close(model.encode_text(tokens), expected.encode_text(tokens))
        features, (logits, _) = expected(image, text), model(image, text)
    wanted = features.scale * features.image @ features.text.T
    wanted = wanted if expected.logit_bias is None else wanted + expected.logit_bias
    torch.testing.assert_close(logits, wanted)


@pytest.mark.parametrize("name", ["openai-vit", "openai-resnet"])
def test_the_forward_pass_is_openais(name: str) -> None:
    model, _ = clip.load(str(DATA / name / "torchscript.pt"), device="cpu")
    golden = np.load(DATA / name / "io.npz")
    image, text = torch.from_numpy(golden["image"]), torch.from_numpy(golden["text"])
    with torch.no_grad():
        per_image, per_text = model(image, text)
    np.testing.assert_allclose(per_image, golden["logits_per_image"], atol=1e-4)
    assert torch.equal(per_image.T, per_text)
    assert model.visual.input_resolution == 64
    assert model.dtype == torch.float32
    assert (model.context_length, model.vocab_size) == (77, 320)
    assert not model.training


def test_the_first_snippet_of_openais_readme(tmp_path: Path) -> None:
    weights = save_tiny(tmp_path / "tiny", context_length=77)
    image_path = tmp_path / "CLIP.png"
    photograph("coffee").save(image_path)
    # From here as there, but for the names of the files.
    from PIL import Image

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, preprocess = clip.load(str(weights), device=device)

    image = preprocess(Image.open(image_path)).unsqueeze(0).to(device)
    text = clip.tokenize(["a diagram", "a dog", "a cat"]).to(device)

    with torch.no_grad():
        image_features = model.encode_image(image)
        text_features = model.encode_text(text)

        logits_per_image, _ = model(image, text)
        probs = logits_per_image.softmax(dim=-1).cpu().numpy()
    assert probs.shape == (1, 3)
    assert probs.sum() == pytest.approx(1)

    # The zero-shot prediction, whose 100.0 is a trained model's scale.
    scale = model.logit_scale.exp().item()
    image_features /= image_features.norm(dim=-1, keepdim=True)
    text_features /= text_features.norm(dim=-1, keepdim=True)
    similarity = (scale * image_features @ text_features.T).softmax(dim=-1)
    values, indices = similarity[0].topk(2)
    np.testing.assert_allclose(values, np.sort(probs[0])[:0:-1], rtol=1e-5)
    assert indices[0] == probs[0].argmax()


@pytest.fixture(scope="module", params=["vit", "resnet"])
def model(request: pytest.FixtureRequest) -> Any:
    return make(ARCHITECTURES[request.param])


def test_a_model_is_pickled_saved_and_copied(model: Any, tmp_path: Path) -> None:
    image, text = inputs()
    model = copy.deepcopy(model)
    model(image, text)[0].sum().backward()  # after use, too
    torch.save(model, tmp_path / "model.pt")
    copies = [
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    for other in copies:
        assert torch.equal(other(image, text)[0], model(image, text)[0])


def test_half_double_and_autocast(model: Any) -> None:
    image, text = inputs()
    with torch.no_grad():
        expected = model.encode_image(image), model.encode_text(text)
        for kind, tolerance in (
            (torch.float16, 0.02),
            (torch.bfloat16, 0.15),
            (torch.float64, 1e-4),
        ):
            other = copy.deepcopy(model).to(kind)
            features = other.encode_image(image), other.encode_text(text)
            assert features[0].dtype == features[1].dtype == other.dtype == kind
            torch.testing.assert_close(features[0].float(), expected[0], atol=tolerance, rtol=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(image, text)[0].float(), model(image, text)[0].float())


def test_without_projections_features_have_the_towers_width() -> None:
    model = make(VIT)
    assert (model.visual.output_dim, model.transformer.width, model.transformer.layers) == (
        32,
        128,
        3,
    )
    model.visual.proj = None
    model.text_projection = None
    image, text = inputs()
    assert model.encode_image(image).shape == model.encode_text(text).shape == (3, 128)
    model.initialize_parameters()
    convert_weights(model)
    assert model.encode_image(image).dtype == torch.float16


def test_masks_of_attention() -> None:
    model = make(VIT)
    mask = model.build_attention_mask()
    assert torch.equal(mask, torch.full((77, 77), -torch.inf).triu(1))
    text_block, image_block = model.transformer.resblocks[1], model.visual.transformer.resblocks[1]
    assert torch.equal(text_block.attn_mask, mask)
    assert image_block.attn_mask is None
    assert not [name for name in model.state_dict() if "mask" in name]
    # A mask of one's own: the patches of the upper half do not see those of the lower.
    own = torch.zeros(17, 17)
    own[1:9, 9:] = -torch.inf
    x = torch.randn(17, 2, 128)
    changed = x.clone()
    changed[9:] = torch.randn(8, 2, 128)
    for block in model.visual.transformer.resblocks:
        block.attn_mask = own
    one, other = image_block(x), image_block(changed)
    torch.testing.assert_close(one[1:9], other[1:9])
    assert not torch.allclose(one[0], other[0])


def test_attention_maps_and_values_of_the_last_block() -> None:
    """As projects for dense features and explanations do, layer by layer and length-first."""
    model = make(VIT)
    visual, (image, _) = model.visual, inputs()
    x = visual.conv1(image.type(model.dtype))
    x = x.reshape(*x.shape[:2], -1).permute(0, 2, 1)
    x = torch.cat([visual.class_embedding + torch.zeros(3, 1, 128), x], dim=1)
    x = visual.ln_pre(x + visual.positional_embedding).permute(1, 0, 2)  # (P+1, B, D)
    for block in visual.transformer.resblocks[:-1]:
        x = block(x)
    last = visual.transformer.resblocks[-1]
    given = last.ln_1(x)
    attended, weights = last.attn(given, given, given, need_weights=True)
    assert weights.shape == (3, 17, 17)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 17))
    torch.testing.assert_close(attended, last.attention(given))
    y = x + attended
    y = (y + last.mlp.c_proj(last.mlp.gelu(last.mlp.c_fc(last.ln_2(y))))).permute(1, 0, 2)
    torch.testing.assert_close(visual.ln_post(y[:, 0]) @ visual.proj, model.encode_image(image))
    # Values of each patch in place of attention: MaskCLIP's dense features.
    weight, bias = last.attn.in_proj_weight[-128:], last.attn.in_proj_bias[-128:]
    values = last.attn.out_proj(F.linear(given, weight, bias))
    assert (visual.ln_post(values) @ visual.proj).shape == (17, 3, 32)


def test_tokens_are_put_before_the_patches() -> None:
    """Visual prompts between blocks, by hooks that change what a block is given."""
    model = make(VIT).requires_grad_(False)
    prompt = nn.Parameter(torch.randn(2, 1, 128))

    def insert(_: nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (torch.cat([given[0], prompt.expand(-1, given[0].shape[1], -1)]),)

    model.visual.transformer.register_forward_pre_hook(insert)
    seen = []
    model.visual.transformer.resblocks[-1].register_forward_hook(lambda *a: seen.append(a[2].shape))
    model.encode_image(inputs()[0]).sum().backward()
    assert seen == [(19, 3, 128)]
    assert prompt.grad is not None


def test_a_larger_grid_of_positions() -> None:
    model = make(VIT)
    first, grid = model.visual.positional_embedding[:1], model.visual.positional_embedding[1:]
    grid = grid.reshape(1, 4, 4, 128).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (7, 7), mode="bicubic").permute(0, 2, 3, 1).reshape(49, 128)
    model.visual.positional_embedding = nn.Parameter(torch.cat([first, grid]))
    model.visual.conv1.stride = (8, 8)  # patches that overlap
    assert model.encode_image(inputs()[0]).shape == (3, 32)


def test_a_resnet_is_run_by_its_parts() -> None:
    model = make(RESNET)
    visual, (image, _) = model.visual, inputs()
    x = image
    for i in (1, 2, 3):
        x = getattr(visual, f"relu{i}")(getattr(visual, f"bn{i}")(getattr(visual, f"conv{i}")(x)))
    trunk = nn.Sequential(
        visual.avgpool, visual.layer1, visual.layer2, visual.layer3, visual.layer4
    )
    x = trunk(x)
    assert x.shape == (3, 512, 2, 2)
    torch.testing.assert_close(visual.attnpool(x), model.encode_image(image))
    pool = visual.attnpool
    assert (pool.num_heads, pool.positional_embedding.shape) == (8, (5, 512))
    dense = pool.c_proj(pool.v_proj(x.permute(0, 2, 3, 1)))
    assert dense.shape == (3, 2, 2, 32)
    visual.attnpool = nn.Identity()
    torch.testing.assert_close(model.encode_image(image), x)
    model.initialize_parameters()


def test_a_class_of_ones_own_over_openais() -> None:
    """A subclass that passes the arguments by place, and puts in towers of its own."""

    class Longer(CLIP):
        def __init__(self, *arguments: Any, scale: float) -> None:
            super().__init__(*arguments)
            self.scale = scale
            self.transformer = clip.model.Transformer(
                width=128, layers=2, heads=2, attn_mask=self.build_attention_mask()
            )
            self.initialize_parameters()

        def encode_image(self, image: torch.Tensor) -> torch.Tensor:
            return super().encode_image(image) * self.scale

    model = Longer(*VIT, scale=2.0)
    assert model(*inputs())[0].shape == (3, 3)
    block = clip.model.ResidualAttentionBlock(64, 4)
    assert block(torch.randn(5, 2, 64)).shape == (5, 2, 64)
    assert clip.model.AttentionPool2d(3, 64, 4)(torch.randn(2, 64, 3, 3)).shape == (2, 64)


def test_a_cache_of_features_as_in_tip_adapter() -> None:
    """A zero-shot classifier and a key-value cache, in the model's own type."""
    model = make(VIT)
    convert_weights(model)
    image, _ = inputs()
    with torch.no_grad():
        columns = []
        for name in NAMES:
            tokens = clip.tokenize([t.format(name) for t in ("a photo of a {}.", "itap of a {}.")])
            embeddings = model.encode_text(tokens)
            embeddings /= embeddings.norm(dim=-1, keepdim=True)
            mean = embeddings.mean(dim=0)
            columns.append(mean / mean.norm())
        classifier = torch.stack(columns, dim=1)
        keys = model.encode_image(image)
        keys /= keys.norm(dim=-1, keepdim=True)
        values = F.one_hot(torch.arange(3)).half()
        affinity = ((-1) * (5.5 - 5.5 * keys @ keys.t())).exp() @ values
        logits = 100.0 * keys @ classifier + affinity
    assert logits.dtype == torch.float16
    assert torch.equal(affinity.argmax(dim=-1), torch.arange(3))
