"""Tables of names: both ways, and what they do with what they do not know."""

import pytest
import torch

from leanclip.errors import WeightsError
from leanclip.weights import huggingface
from leanclip.weights.names import Rule, to_ours, to_theirs

RULES = (
    Rule("ln_final.*", "text.norm.*"),
    Rule("proj", "projection.weight", transpose=True),
    Rule("blocks.*.attn.in_proj_*", "layers.*.attn.{q,k,v}.*"),
    Rule("visual.**.running_mean", "visual.**._mean"),
)


def tensors() -> dict[str, torch.Tensor]:
    return {
        "ln_final.bias": torch.randn(2),
        "proj": torch.randn(2, 3),
        "blocks.10.attn.in_proj_weight": torch.randn(6, 2),
        "blocks.10.attn.in_proj_bias": torch.randn(6),
        "visual.layer1.0.bn1.running_mean": torch.randn(4),
    }


def test_names_go_there_and_back() -> None:
    ours = tensors()
    theirs = to_theirs(ours, RULES)
    parts = [f"layers.10.attn.{part}.weight" for part in "qkv"]
    assert torch.equal(torch.cat([theirs[name] for name in parts]), ours[BLOCK])
    assert torch.equal(theirs["projection.weight"], ours["proj"].T)
    assert {"text.norm.bias", "visual.layer1.0.bn1._mean"} <= theirs.keys()
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


def test_a_part_that_is_missing_is_an_error() -> None:
    theirs = to_theirs(tensors(), RULES)
    del theirs["layers.10.attn.k.bias"]
    with pytest.raises(WeightsError, match=r"2 of 3 parts of blocks\.10\.attn\.in_proj_bias"):
        to_ours(theirs, RULES)


def test_patterns_do_not_reach_over_a_dot() -> None:
    name = "vision_model.encoder.layers.0.extra.layer_norm1.weight"
    assert to_ours({name: torch.zeros(1)}, huggingface.RULES).keys() == {name}
