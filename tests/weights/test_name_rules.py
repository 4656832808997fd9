"""Tables of names: both ways, and what they do with what they do not know."""

import pytest
import torch

from leanclip.errors import WeightsError
from leanclip.weights.huggingface_families import FAMILIES
from leanclip.weights.names import Rule, to_ours, to_theirs

RULES = (
    Rule("ln_final.*", "text.norm.*"),
    Rule("proj", "projection.weight", transpose=True),
    Rule("blocks.*.attn.in_proj_*", "layers.*.attn.{q,k,v}.*"),
    Rule("visual.**.running_mean", "visual.**._mean"),
    Rule("conv1.weight", "patches.weight", patches=True),
    Rule("positions", "embeddings", leading=1),
    Rule("scale", "scale", leading=1),
    Rule("layers.*.bias", "encoder.*.self.{query,key,value}.bias"),
)


def tensors() -> dict[str, torch.Tensor]:
    return {
        "ln_final.bias": torch.randn(2),
        "proj": torch.randn(2, 3),
        "blocks.10.attn.in_proj_weight": torch.randn(6, 2),
        "blocks.10.attn.in_proj_bias": torch.randn(6),
        "visual.layer1.0.bn1.running_mean": torch.randn(4),
        "conv1.weight": torch.randn(4, 3, 2, 2),
        "positions": torch.randn(5, 2),
        "scale": torch.tensor(2.0),
        "layers.0.bias": torch.randn(6),
    }


def test_names_go_there_and_back() -> None:
    ours = tensors()
    theirs = to_theirs(ours, RULES)
    parts = [f"layers.10.attn.{part}.weight" for part in "qkv"]
    assert torch.equal(torch.cat([theirs[name] for name in parts]), ours[BLOCK])
    assert torch.equal(theirs["projection.weight"], ours["proj"].T)
    assert {"text.norm.bias", "visual.layer1.0.bn1._mean"} <= theirs.keys()
    assert theirs["embeddings"].shape == (1, 5, 2)
    assert theirs["scale"].shape == (1,)
    assert torch.equal(theirs["encoder.0.self.value.bias"], ours["layers.0.bias"][4:])
    pixels = torch.randn(3, 2, 2)  # one patch: its convolution, and its product by row and column
    by_rows = theirs["patches.weight"] @ pixels.permute(1, 2, 0).flatten()
    torch.testing.assert_close(by_rows, (ours["conv1.weight"] * pixels).sum((1, 2, 3)))
    shuffled = dict(sorted(theirs.items(), reverse=True))  # v before q
    back = to_ours(shuffled, RULES)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())


BLOCK = "blocks.10.attn.in_proj_weight"


def test_unknown_names_are_kept_or_named() -> None:
    extra = {"something.else": torch.zeros(1)}
    assert to_ours(extra, RULES) == extra  # load_into names it as unexpected
    with pytest.raises(KeyError, match=r"something\.else"):
        to_theirs(extra, RULES)


def test_a_matrix_that_is_no_patches_keeps_its_shape() -> None:
    odd = torch.randn(4, 13)
    assert to_ours({"patches.weight": odd}, RULES)["conv1.weight"] is odd


def test_a_part_that_is_missing_is_an_error() -> None:
    theirs = to_theirs(tensors(), RULES)
    del theirs["layers.10.attn.k.bias"]
    with pytest.raises(WeightsError, match=r"2 of 3 parts of blocks\.10\.attn\.in_proj_bias"):
        to_ours(theirs, RULES)


def test_patterns_do_not_reach_over_a_dot() -> None:
    name = "vision_model.encoder.layers.0.extra.layer_norm1.weight"
    assert to_ours({name: torch.zeros(1)}, FAMILIES["clip"].rules).keys() == {name}
