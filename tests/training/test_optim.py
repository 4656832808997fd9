"""Parameter groups and rates."""

import math
import re

import pytest
import torch
from conftest import TINY
from families import FAMILIES

from leanclip import CLIP
from leanclip.config.training import OptimizerConfig
from leanclip.training.optimizer import (
    build_optimizer,
    learning_rate,
    parameter_groups,
    scaled_learning_rate,
)


def test_vectors_and_positions_do_not_decay() -> None:
    model = CLIP(**TINY)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = parameter_groups(model, 0.2)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.2, 0.0)
    decayed_names = {names[id(p)] for p in decayed["params"]}
    kept_names = {names[id(p)] for p in kept["params"]}
    assert decayed_names | kept_names == set(names.values())
    assert decayed_names.isdisjoint(kept_names)
    assert {
        "logit_scale",
        "positional_embedding",
        "visual.positional_embedding",
        "visual.class_embedding",
        "ln_final.weight",
        "transformer.resblocks.0.attn.in_proj_bias",
    } <= kept_names
    assert {"token_embedding.weight", "visual.proj", "visual.conv1.weight"} <= decayed_names
    assert all(model.get_parameter(name).ndim >= 2 for name in decayed_names)


def test_the_families_vectors_and_positions_do_not_decay() -> None:
    decayed = set()
    for arch in FAMILIES.values():
        model = CLIP(**arch)
        names = {id(p): name for name, p in model.named_parameters()}
        decayed |= {names[id(p)] for p in parameter_groups(model, 0.2)[0]["params"]}
    assert {re.sub(r"resblocks\.\d", "resblocks", name) for name in decayed} == {
        "token_embedding.weight", "token_type_embedding", "pooler.weight",
        "text_projection", "text_projection_hidden",
        "visual.conv1.weight", "visual.proj", "visual.attn_pool.query",
        *(f"visual.attn_pool.attn.{name}_proj_weight" for name in ("q", "k", "v", "in")),
        "visual.attn_pool.attn.out_proj.weight",
        *(f"visual.attn_pool.mlp.{name}.weight" for name in ("c_fc", "c_proj")),
        *(
            f"{tower}transformer.resblocks.{name}"
            for tower in ("", "visual.")
            for name in (
                "attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight",
                "mlp.c_proj.weight",
            )
        ),
    }  # fmt: skip


def test_frozen_parameters_are_left_out() -> None:
    model = CLIP(**TINY)
    model.visual.requires_grad_(False)
    groups = parameter_groups(model, 0.2)
    frozen = {id(p) for p in model.visual.parameters()}
    assert all(id(p) not in frozen for group in groups for p in group["params"])


def test_adamw_has_the_settings() -> None:
    optimizer = build_optimizer(CLIP(**TINY), OptimizerConfig(beta2=0.9, epsilon=1e-7))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.9, 0.9)
    assert optimizer.defaults["eps"] == 1e-7


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine() -> None:
    rates = [learning_rate(step, peak=2.0, warmup=10, steps=110) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0)
    assert rates[35] == pytest.approx(1 + math.cos(math.pi / 4))
    assert rates[110] == 0.0
    assert learning_rate(0, peak=2.0, warmup=0, steps=5) == 2.0


def test_the_rate_follows_the_global_batch() -> None:
    config = OptimizerConfig(learning_rate=1e-4, reference_batch=1024)
    assert scaled_learning_rate(config, 128) == pytest.approx(1.25e-5)
    assert scaled_learning_rate(config, 2048) == pytest.approx(2e-4)
    assert scaled_learning_rate(OptimizerConfig(learning_rate=1e-4), 128) == 1e-4
