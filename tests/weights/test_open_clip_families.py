"""open_clip's families: random models of other shapes, CoCa, PE-Core, Long-CLIP, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, TINY
from safetensors.torch import load_file, save_file

from leanclip import CLIP, WeightsError
from leanclip.config.sections import to_plain
from leanclip.preprocess.images import Preprocess
from leanclip.weights import Weights, load_into, read_weights, write_weights

MODERN = PROJECT / "tests" / "data" / "modern"
CONFIG, FILE = "open_clip_config.json", "open_clip_model.safetensors"


def difference(ours: torch.Tensor, theirs: Any) -> float:
    """The largest relative difference of rows."""
    theirs = torch.as_tensor(theirs)
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


def are_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) and tensor.dtype == other[name].dtype
        for name, tensor in one.items()
    )


def random_weights(folder: Path, **changes: Any) -> Weights:
    torch.manual_seed(4)
    model = CLIP(**TINY | changes)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter.add_(torch.randn_like(parameter) * 0.1)
    side = model.config.image_resolution
    return Weights(folder, "leanclip", model.state_dict(), model.config, Preprocess(side))


# --- random models of other shapes

TRUNK = {"vision_norm_eps": 1e-6, "patch_bias": True, "pre_norm": False, "activation": "gelu"}
SIGLIP = TRUNK | {"vision_class_token": False, "vision_pool": "attn"}
BERT = {
    "transformer_post_norm": True,
    "transformer_padding_mask": True,
    "transformer_causal": False,
    "transformer_token_types": 2,
    "transformer_norm_eps": 1e-12,
    "transformer_pool": "first",
    "transformer_positions": 40,
    "transformer_activation": "gelu",
}
ROBERTA = BERT | {
    "transformer_token_types": 1,
    "transformer_norm_eps": 1e-5,
    "transformer_pad_id": 1,
    "transformer_first_position": 2,
    "transformer_pool": "mean",
}
SHAPES: dict[str, dict[str, Any]] = {
    "clip": {},
    "two activations": {"activation": "gelu_tanh", "transformer_activation": "gelu"},
    "layer scale, eps": {"vision_layer_scale": 1e-4, "vision_norm_eps": 1e-3},
    "average": {"vision_pool": "avg", "vision_norm_after_pool": True, "pre_norm": False},
    "eos": {"transformer_pool": "eos", "transformer_eos_id": 7, "transformer_pad_id": 1},
    "no projection of texts": {"transformer_projection": "none", "embed_dim": 32},
    "coca": {
        "vision_pool": "queries",
        "vision_pool_queries": 5,
        "vision_pool_heads": 4,
        "transformer_class_token": True,
        "transformer_pool": "last",
    },
    "siglip": SIGLIP
    | {
        "vision_projection": "none",
        "embed_dim": 32,
        "transformer_projection_bias": True,
        "transformer_causal": False,
        "transformer_pool": "last",
        "logit_bias": True,
        "image_resolution": 35,
    },
    "siglip, three heads": SIGLIP | {"vision_width": 48, "vision_heads": 3},
    "siglip, average": SIGLIP | {"vision_pool": "avg"},
    "siglip, bias": SIGLIP | {"vision_projection_bias": True},
    "timm, average": TRUNK | {"vision_pool": "avg"},
    "timm, average with a bias": TRUNK
    | {"vision_pool": "avg", "vision_norm_after_pool": True, "vision_projection_bias": True},
    "timm, quick gelu": {
        "patch_bias": False,
        "vision_projection_bias": True,
        "activation": "quick_gelu",
        "transformer_activation": "gelu_tanh",
    },
    "pe-core": {
        "vision_pool": "attn",
        "vision_pool_heads": 8,
        "vision_pool_mlp_ratio": 3.0,
        "vision_positions": "rotary",
        "vision_rotary_grid": 24,
        "activation": "gelu",
    },
    "pe-core, the largest": {
        "vision_class_token": False,
        "vision_pool": "attn",
        "vision_pool_heads": 8,
        "vision_positions": "rotary",
        "vision_rotary_grid": 32,
        "vision_projection_bias": True,
        "activation": "gelu",
    },
    "bert, its pooler": BERT | {"transformer_pooler": True},
    "bert, mlp": BERT | {"transformer_projection": "mlp", "activation": "quick_gelu"},
    "bert, no projection": BERT | {"transformer_projection": "none", "embed_dim": 32},
    "roberta": ROBERTA | {"transformer_projection": "mlp"},
    "roberta with siglip's vision": SIGLIP | ROBERTA | {"vision_projection_bias": True},
}


@pytest.mark.parametrize("name", SHAPES)
def test_random_models_there_and_back(name: str, tmp_path: Path) -> None:
    weights = random_weights(tmp_path, **SHAPES[name])
    write_weights(weights, tmp_path / "w", "open_clip")
    again = read_weights(tmp_path / "w")
    assert are_same(weights.tensors, again.tensors)
    assert resolved(again) == resolved(weights)


def resolved(weights: Weights) -> dict[str, Any]:
    """The architecture, with what the absence of a setting means."""
    model = weights.model
    assert model is not None
    return to_plain(model) | {
        "activation": model.activations,
        "vision_activation": None,
        "transformer_activation": None,
        "vision_heads": model.attention_heads,
        "vision_pool_heads": model.pool_heads,
        "vision_rotary_grid": model.vision_rotary_grid or 4,
        "transformer_positions": model.text_positions,
    }


@torch.no_grad()
@pytest.mark.parametrize("pooler", ["cls_pooler", "cls_last_hidden_state_pooler", "mean_pooler"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_text_towers_of_transformers(kind: str, pooler: str, tmp_path: Path) -> None:
    """Against transformers' own, in a folder as open_clip writes it."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 200, "vocab_size": 99, "max_position_embeddings": 30}
    torch.manual_seed(5)
    if kind == "bert":
        theirs = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    else:
        config = transformers.RobertaConfig(**sizes, type_vocab_size=1, layer_norm_eps=1e-5)
        theirs = transformers.RobertaModel(config).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    projection = torch.randn(16, 128)
    tensors = {
        name: one for name, one in random_weights(tmp_path).tensors.items() if "visual" in name
    }
    tensors |= {f"text.transformer.{name}": one for name, one in theirs.state_dict().items()}
    tensors["text.transformer.embeddings.position_ids"] = torch.arange(30)[None]
    tensors |= {"text.proj.weight": projection, "logit_scale": torch.tensor(1.0)}
    (tmp_path / "w").mkdir()
    save_file(tensors, tmp_path / "w" / FILE)
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"hf_model_name": f"someone/{kind}", "hf_pooler_type": pooler, "context_length": 9}
    text["hf_proj_type"] = "linear"
    cfg = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "w" / CONFIG).write_text(json.dumps({"model_cfg": cfg}))
    weights = read_weights(tmp_path / "w")
    assert weights.model is not None
    assert any("pooler" in one for one in weights.unexpected) == (pooler != "cls_pooler")
    model = CLIP(**to_plain(weights.model)).eval()
    load_into(model, weights)
    tokens = torch.randint(3, 99, (4, 9))
    pad = 0 if kind == "bert" else 1
    tokens[1, 4:] = tokens[2, 8:] = tokens[3, 1:] = pad
    mask = (tokens != pad).long()
    output = theirs(input_ids=tokens, attention_mask=mask)
    states = output.last_hidden_state
    pooled = {
        "cls_pooler": output.pooler_output,
        "cls_last_hidden_state_pooler": states[:, 0],
        "mean_pooler": (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
    }[pooler]
    assert difference(model.encode_text(tokens), pooled @ projection.T) < 1e-5


@torch.no_grad()
def test_towers_of_coca_without_its_decoder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Against its pooler and its masks, written out."""
    weights = random_weights(tmp_path, **SHAPES["coca"])
    write_weights(weights, tmp_path / "w", "open_clip")
    tensors = load_file(tmp_path / "w" / FILE)
    decoder = {"text_decoder.resblocks.0.ln_1.weight": torch.ones(32)}
    save_file(tensors | decoder, tmp_path / "w" / FILE)
    values = json.loads((tmp_path / "w" / CONFIG).read_text())
    values["model_cfg"]["multimodal_cfg"] = {"width": 32, "heads": 2, "layers": 1}
    (tmp_path / "w" / CONFIG).write_text(json.dumps(values))
    again = read_weights(tmp_path / "w")
    assert are_same(again.tensors, weights.tensors)
    assert "text_decoder" in caplog.text
    assert again.model is not None
    model: Any = CLIP(**to_plain(again.model)).eval()
    load_into(model, again)
    pixels, tokens = torch.randn(3, 3, 32, 32), torch.randint(1, 49408, (3, 24))
    tokens[1, 5:] = tokens[2, 12:] = 0
    assert difference(model.encode_image(pixels), coca_image(model.visual, pixels)) < 1e-5
    assert difference(model.encode_text(tokens), coca_text(model, tokens)) < 1e-5


def coca_image(visual: Any, pixels: torch.Tensor) -> torch.Tensor:
    x, _ = visual._embed(pixels)
    x = visual.transformer(visual.ln_pre(x))
    pool = torch.nn.MultiheadAttention(16, 4, kdim=32, vdim=32, batch_first=True)
    pool.load_state_dict(visual.attn_pool.attn.state_dict())
    queries = visual.attn_pool.ln_q(visual.attn_pool.query).expand(3, -1, -1)
    keys = visual.attn_pool.ln_k(x)
    return visual.ln_post(pool(queries, keys, keys)[0])[:, 0] @ visual.proj


def coca_text(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    x = torch.cat([model.token_embedding(tokens), model.cls_emb.expand(3, 1, -1)], 1)
    x = x + model.positional_embedding
    valid = torch.cat([torch.ones(3, 1, dtype=torch.bool), tokens != 0], 1)
    mask = valid[:, None] & torch.ones(25, 25, dtype=torch.bool).tril()
    for block in model.transformer.resblocks:
        attention = torch.nn.MultiheadAttention(32, 2, batch_first=True)
        attention.load_state_dict(block.attn.state_dict())
        normed = block.ln_1(x)
        blocked = (~mask).repeat_interleave(2, 0)
        x = x + attention(normed, normed, normed, attn_mask=blocked)[0]
        x = x + block.mlp(block.ln_2(x))
    return model.ln_final(x[:, -1]) @ model.text_projection


# --- PE-Core's and Long-CLIP's own files


def test_pe_cores_file_there_and_back(tmp_path: Path) -> None:
    weights = read_weights(MODERN / "pe-core-pt" / "model.pt")
    write_weights(weights, tmp_path / "native", "leanclip")
    write_weights(read_weights(tmp_path / "native"), tmp_path / "w.pt", "openai")
    before, after = (torch.load(f) for f in (MODERN / "pe-core-pt" / "model.pt", tmp_path / "w.pt"))
    assert are_same(before, after)
    assert read_weights(tmp_path / "w.pt").model == weights.model
    with pytest.raises(WeightsError, match="PE-Core's format implies vision_heads 1, this model"):
        write_weights(read_weights(MODERN / "oc-pe-core"), tmp_path / "v.pt", "openai")
    with pytest.raises(WeightsError, match=r"vision_rotary_grid 4; the nearest, vit_pe_core"):
        write_weights(weights, tmp_path / "oc", "open_clip")


def test_the_largest_pe_core_has_wider_heads(tmp_path: Path) -> None:
    sizes = {"vision_width": 1536, "vision_heads": 16, "vision_layers": 1, "vocab_size": 50}
    changes = SHAPES["pe-core"] | sizes | {"vision_class_token": False, "vision_rotary_grid": None}
    text = {"transformer_width": 64, "transformer_heads": 1}
    weights = random_weights(tmp_path, **changes | text)
    torch.save(weights.tensors, tmp_path / "w.pt")
    again = read_weights(tmp_path / "w.pt").model
    assert again is not None
    assert again.attention_heads == 16
    assert again.vision_pool_mlp_ratio == 3.0
    assert not again.vision_class_token


@torch.no_grad()
def test_long_clip_adds_its_tables_of_positions(tmp_path: Path) -> None:
    wide = {"vision_width": 64, "transformer_width": 64, "transformer_heads": 1}
    weights = random_weights(tmp_path, context_length=40, **wide | {"vision_heads": 1})
    other = torch.randn(40, 64)
    torch.save(weights.tensors | {"positional_embedding_res": other}, tmp_path / "w.pt")
    again = read_weights(tmp_path / "w.pt")
    mask = (torch.arange(40) < 20)[:, None].float()
    expected = weights.tensors["positional_embedding"] * mask + other * (1 - mask)
    assert torch.equal(again.tensors["positional_embedding"], expected)
    assert again.model is not None
    assert again.model.context_length == 40
    assert again.model.activation == "quick_gelu"
    torch.save(weights.tensors | {"positional_embedding_res": other[:9]}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"not Long-CLIP's tensors: .* \(9, 64\)"):
        read_weights(tmp_path / "w.pt")


# --- refused by name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_positions": "resized"} | SIGLIP, "vision_positions resized; the nearest"),
        (SIGLIP | {"activation": "quick_gelu"}, "vision_activation quick_gelu; the nearest"),
        (SIGLIP | {"pre_norm": True}, "pre_norm True; the nearest, vit_"),
        (SIGLIP | {"vision_norm_eps": 1e-3}, "vision_norm_eps 0.001; the nearest, vit_"),
        (
            SIGLIP | {"activation": "gelu_tanh", "vision_width": 768, "vision_layers": 12}
            | {"vision_patch_size": 16},
            "vision_activation gelu_tanh; the nearest, vit_base_patch16_siglip_224, has gelu$",
        ),
        ({"transformer_activation": "gelu"}, "quick_gelu in both towers or none"),
        (BERT | {"transformer_pool": "last"}, "of transformers with transformer_pool last"),
        (BERT | {"transformer_norm_eps": 1e-6}, "bert-base-uncased, has transformer_norm_eps"),
        (ROBERTA | {"transformer_pooler": True}, "of transformers with transformer_pooler True"),
        (
            {"vision_pool": "queries", "vision_pool_queries": 3, "vision_norm_eps": 1e-6},
            "vision_pool queries with vision_norm_eps 1e-05 only",
        ),
    ],
)  # fmt: skip
def test_models_that_open_clip_cannot_hold(changes: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=words):
        write_weights(random_weights(tmp_path, **changes), tmp_path / "w", "open_clip")
    assert not (tmp_path / "w").exists()
