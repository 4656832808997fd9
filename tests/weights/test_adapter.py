"""LoRA adapters of PEFT's folders: merged by the formula, or refused by name."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, Command
from safetensors.torch import load_file, save_file

import leanclip
from leanclip import WeightsError
from leanclip.weights import read_preprocess, read_weights, write_weights

BASE = PROJECT / "tests" / "data" / "modern" / "hf-siglip"
NAFLEX = PROJECT / "tests" / "data" / "modern" / "hf-siglip2-naflex"
PREFIX = "base_model.model."
QUERY = "vision_model.encoder.layers.0.self_attn.q_proj"
FC = "text_model.encoder.layers.1.mlp.fc1"
WORDS = "text_model.embeddings.token_embedding"
PATCHES = "vision_model.embeddings.patch_embedding"
HEAD = "text_model.head"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 12,
    "lora_dropout": 0.1,
    "bias": "none",
    "target_modules": ["q_proj", "fc1"],
    "init_lora_weights": True,
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "loftq_config": {},
    "qalora_group_size": 16,
    "task_type": "FEATURE_EXTRACTION",
    "some_new_setting": None,
}


def factors(layer: str, outputs: int, inputs: int, rank: int = 4) -> dict[str, torch.Tensor]:
    a, b = torch.randn(rank, inputs), torch.randn(outputs, rank)
    return {f"{PREFIX}{layer}.lora_A.weight": a, f"{PREFIX}{layer}.lora_B.weight": b}


def adapter(
    folder: Path, tensors: dict[str, torch.Tensor], base: Path | None = BASE, **changes: Any
) -> Path:
    folder.mkdir()
    config = CONFIG | {"base_model_name_or_path": str(base) if base else None} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged(folder: Path, source: Path | str, out: Path) -> dict[str, torch.Tensor]:
    """The tensors of a merged model by Hugging Face's names."""
    write_weights(read_weights(source), out, "hf")
    return load_file(out / "model.safetensors")


SCALES: dict[str, tuple[dict[str, Any], float, int]] = {
    "alpha over r": ({}, 12 / 4, 4),
    "rank-stabilised": ({"use_rslora": True}, 12 / math.sqrt(4), 4),
    "a pattern of alpha": ({"alpha_pattern": {"q_proj": 5}}, 5 / 4, 4),
    "patterns": (
        {"alpha_pattern": {QUERY: 5}, "rank_pattern": {"0.self_attn.q_proj": 3}},
        5 / 3,
        3,
    ),
    "anchored": ({"alpha_pattern": {f"^{QUERY}": 7, "q_proj": 5}}, 7 / 4, 4),
    "of another layer": ({"alpha_pattern": {"fc1": 5, "other_q_proj": 3}}, 12 / 4, 4),
    "no effect on linear layers": ({"fan_in_fan_out": True}, 12 / 4, 4),
}


@pytest.mark.parametrize("name", SCALES)
def test_the_formula(name: str, tmp_path: Path) -> None:
    changes, scale, rank = SCALES[name]
    tensors = factors(QUERY, 64, 64, rank)
    folder = adapter(tmp_path / "lora", tensors, **changes)
    before = load_file(BASE / "model.safetensors")
    after = merged(folder, folder, tmp_path / "out")
    a, b = tensors.values()
    expected = before[f"{QUERY}.weight"] + scale * (b @ a)
    torch.testing.assert_close(after[f"{QUERY}.weight"], expected, rtol=1e-6, atol=1e-6)
    others = before.keys() - {f"{QUERY}.weight"}
    assert all(torch.equal(before[key], after[key]) for key in others)


def test_every_kind_of_layer_and_modules_saved_whole(tmp_path: Path) -> None:
    words = {
        f"{PREFIX}{WORDS}.lora_embedding_A": torch.randn(4, 500),
        f"{PREFIX}{WORDS}.lora_embedding_B": torch.randn(64, 4),
    }
    patches = {
        f"{PREFIX}{PATCHES}.lora_A.weight": torch.randn(4, 3, 14, 14),
        f"{PREFIX}{PATCHES}.lora_B.weight": torch.randn(64, 4, 1, 1),
    }
    whole = {
        f"{PREFIX}{HEAD}.weight": torch.randn(64, 64),
        f"{PREFIX}{HEAD}.modules_to_save.default.bias": torch.randn(64),
        f"{PREFIX}{FC}.base_layer.bias": torch.randn(160),
        f"{PREFIX}logit_scale": torch.tensor([1.5]),
    }
    tensors = words | patches | whole | factors(FC, 160, 64)
    folder = adapter(tmp_path / "lora", tensors, modules_to_save=["head"], bias="lora_only")
    before = load_file(BASE / "model.safetensors")
    after = merged(folder, folder, tmp_path / "out")
    a, b = words.values()
    changed = {f"{WORDS}.weight": before[f"{WORDS}.weight"] + 3 * (b @ a).T}
    a, b = patches.values()
    product = torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a)
    changed[f"{PATCHES}.weight"] = before[f"{PATCHES}.weight"] + 3 * product
    a, b = (tensors[f"{PREFIX}{FC}.lora_{x}.weight"] for x in "AB")
    changed[f"{FC}.weight"] = before[f"{FC}.weight"] + 3 * (b @ a)
    weight, bias, other, scale = whole.values()
    changed |= {f"{HEAD}.weight": weight, f"{HEAD}.bias": bias, f"{FC}.bias": other}
    changed["logit_scale"] = scale
    for key, tensor in (before | changed).items():
        torch.testing.assert_close(after[key], tensor, rtol=1e-5, atol=1e-5)


def test_the_base_is_named_by_its_user_and_may_have_any_form(tmp_path: Path) -> None:
    write_weights(read_weights(BASE), tmp_path / "native", "leanclip")
    tensors = factors(QUERY, 64, 64)
    folder = adapter(tmp_path / "lora", tensors, base=None)
    source = f"{folder}#{tmp_path / 'native'}"
    named = adapter(tmp_path / "named", tensors)
    first, second = (merged(folder, s, tmp_path / f"{i}") for i, s in enumerate((source, named)))
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert read_preprocess(source) == read_preprocess(BASE)
    assert leanclip.load(source, device="cpu").preprocess == read_preprocess(BASE)


def test_an_adapter_beside_its_base(tmp_path: Path) -> None:
    tensors = factors(QUERY, 64, 64)
    folder = adapter(tmp_path / "lora", tensors, base=Path("no/such"))
    for file in BASE.iterdir():
        if file.name != "io.npz":
            (folder / file.name).write_bytes(file.read_bytes())
    elsewhere = adapter(tmp_path / "other", tensors)
    first, second = (merged(f, f, tmp_path / f"{f.name}-out") for f in (folder, elsewhere))
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_a_linear_patch_embedding_and_half_precision(tmp_path: Path) -> None:
    base = read_weights(NAFLEX)
    half = {name: tensor.bfloat16() for name, tensor in base.tensors.items()}
    write_weights(leanclip.weights.Weights(NAFLEX, "hf", half, base.model, base.preprocess),
                  tmp_path / "base", "hf")  # fmt: skip
    tensors = factors(PATCHES, 64, 192)
    folder = adapter(tmp_path / "lora", tensors, base=tmp_path / "base")
    before = load_file(tmp_path / "base" / "model.safetensors")[f"{PATCHES}.weight"]
    after = merged(folder, folder, tmp_path / "out")[f"{PATCHES}.weight"]
    a, b = tensors.values()
    assert torch.equal(after, (before.float() + 3 * (b @ a)).bfloat16())


GOOD = factors(QUERY, 64, 64)
HALF = dict(list(GOOD.items())[:1])
BAD: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], str]] = {
    "dora": ({"use_dora": True}, GOOD, "use_dora: True is not supported"),
    "another kind": ({"peft_type": "LOHA"}, GOOD, "peft_type: LOHA is not supported"),
    "biases": ({"lora_bias": True}, GOOD, "lora_bias: True"),
    "parameters": ({"target_parameters": ["probe"]}, GOOD, "target_parameters"),
    "new rows": ({"trainable_token_indices": [3]}, GOOD, "trainable_token_indices"),
    "pissa": ({"init_lora_weights": "pissa"}, GOOD, "init_lora_weights: 'pissa' changes the base"),
    "unknown": ({"some_new_setting": 3}, GOOD, "some_new_setting: 3 is not supported"),
    "a regex": ({"rank_pattern": {"(a+)+$": 3}}, GOOD, "rank_pattern: .* is not the name"),
    "rank": ({"r": 8}, GOOD, "r: 8, the adapter has rank 4"),
    "no rank": ({"r": 0}, GOOD, "r: 0"),
    "no number": ({"r": "4"}, GOOD, "r: '4'"),
    "no alpha": ({"lora_alpha": None}, GOOD, "lora_alpha: None"),
    "no patterns": ({"alpha_pattern": 3}, GOOD, "alpha_pattern: 3 does not name layers"),
    "half": ({}, HALF, f"{QUERY} is not a layer of the base model's, or a half"),
    "no base": ({"base_model_name_or_path": None}, GOOD, "None is no model; name .*lora#BASE"),
    "gone": ({"base_model_name_or_path": "no/such/base"}, GOOD, "no/such/base'.*lora#BASE"),
    "another model": ({}, factors("model.layers.0.q_proj", 8, 8), "model.layers.0.q_proj is not"),
    "another size": ({}, factors(QUERY, 96, 64), "q_proj does not fit"),
    "a magnitude": ({}, {f"{PREFIX}{QUERY}.lora_magnitude_vector": torch.ones(64)}, "magnitude"),
    "a bias of another size": ({}, {f"{PREFIX}{QUERY}.bias": torch.ones(3)}, r"bias \(3,\) is not"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_understood_is_refused_by_name(name: str, tmp_path: Path) -> None:
    changes, tensors, words = BAD[name]
    folder = adapter(tmp_path / "lora", tensors, **changes)
    with pytest.raises(WeightsError, match=words) as error:
        read_weights(folder)
    assert "\n" not in str(error.value)
    assert "adapter_config.json" in str(error.value)


def test_adapters_on_adapters_and_missing_files(tmp_path: Path, command: Command) -> None:
    folder = adapter(tmp_path / "lora", GOOD)
    with pytest.raises(WeightsError, match="is an adapter itself"):
        read_weights(adapter(tmp_path / "second", GOOD, base=folder))
    loop = adapter(tmp_path / "loop", GOOD, base=tmp_path / "loop")
    with pytest.raises(WeightsError, match="is an adapter itself"):
        read_weights(loop)
    for file in ("config.json", "spiece.model", "tokenizer_config.json"):
        (folder / file).write_bytes((BASE / file).read_bytes())
    with pytest.raises(WeightsError, match=r"none of model\.safetensors"):  # nothing to merge into
        read_weights(folder)
    (folder / "config.json").unlink()
    (folder / "adapter_model.safetensors").unlink()
    done = command("inspect", str(folder))
    assert done.returncode == 2
    assert "adapter_model.safetensors" in done.stderr
