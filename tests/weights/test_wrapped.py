"""Checkpoints as training programs wrap them: prefixes, dicts in dicts, moving averages, --arch."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Command
from safetensors.torch import save_file

import leanclip
from leanclip import CLIP, ConfigError, WeightsError
from leanclip.weights import read_architecture, read_weights

Tensors = dict[str, torch.Tensor]
LINEAR = {"criterion.weight": torch.zeros(2), "head.bias": torch.ones(3)}


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    torch.manual_seed(1)
    return CLIP(**TINY).state_dict()


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor.clone() for name, tensor in tensors.items()}


def inner(tensors: Tensors) -> Tensors:
    """Towers that are wrapped each for itself, and blocks by FSDP."""
    names = {"visual.": "visual._orig_mod.", "transformer.": "transformer.module."}
    blocks = ("resblocks.0.", "resblocks.0._checkpoint_wrapped_module.")
    found = {}
    for name, tensor in tensors.items():
        for before, after in names.items():
            name = after + name.removeprefix(before) if name.startswith(before) else name
        found[name.replace(*blocks)] = tensor
    return found


def as_text(tensors: Tensors) -> Tensors:
    """CustomTextCLIP's names."""
    return {
        name if name.startswith(("visual", "logit")) else f"text.{name}": tensor
        for name, tensor in tensors.items()
    }


PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.",
    "net.",
    "clip_model.",
    "_orig_mod.module.",
    "module._orig_mod.",
    "model._orig_mod.",
    "module.model.net._orig_mod.clip_model.",
    "_fsdp_wrapped_module.backbone.",
    "student.clip.",
)


@pytest.mark.parametrize("form", ["pt", "ckpt", "safetensors", "shards"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_nesting_of_prefixes(prefix: str, form: str, tensors: Tensors, tmp_path: Path) -> None:
    wrapped, path = under(prefix, tensors) | LINEAR, tmp_path / f"w.{form}"
    match form:
        case "pt":
            torch.save(wrapped, path)
        case "ckpt":
            optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1.0}]}
            rest = {"epoch": 3, "optimizer": optimizer, "loops": {"a": {"b": 1}}}
            torch.save({"state_dict": wrapped} | rest, path)
        case "safetensors":
            save_file(wrapped, path)
        case "shards":
            names = sorted(wrapped)
            parts = {"1.safetensors": names[::2], "2.safetensors": names[1::2]}
            for file, part in parts.items():
                save_file({name: wrapped[name] for name in part}, tmp_path / file)
            path = tmp_path / "model.safetensors.index.json"
            where = {name: file for file, part in parts.items() for name in part}
            path.write_text(json.dumps({"weight_map": where}))
    back = read_weights(path, arch=TINY)
    assert back.tensors.keys() == tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in tensors.items())
    assert {"criterion.*", "head.*"} <= set(back.unexpected)
    if form == "ckpt":
        assert {"epoch", "optimizer", "loops"} <= set(back.unexpected)
    if form == "shards":
        assert read_weights(tmp_path, arch=TINY).tensors.keys() == tensors.keys()


@pytest.mark.parametrize(
    "change",
    [
        inner,
        as_text,
        lambda tensors: under("model.", as_text(tensors)),
        lambda tensors: tensors | LINEAR | {"n_averaged": torch.tensor(5)},
        lambda tensors: under("module.", tensors) | {"n_averaged": torch.tensor(5)},
        lambda tensors: tensors | {"logit_scale": tensors["logit_scale"].reshape(1)},
        lambda tensors: {"model": {"module": {"clip": tensors}}, "args": None},
        lambda tensors: {"app": {"model": tensors, "step": torch.tensor(1)}, "name": "x"},
        lambda tensors: tensors | {"epoch": 3},
        lambda tensors: {"net": tensors, "optimizer": {"momentum": under("", tensors), "step": 1}},
        lambda tensors: under("a.", tensors) | {f"b.{name}": t for name, t in tensors.items()},
    ],
    ids=[
        "inner",
        "text",
        "text in model",
        "beside",
        "averaged",
        "1d",
        "dicts",
        "app",
        "epoch",
        "moments",
        "both",
    ],
)
def test_other_forms(change: Any, tensors: Tensors, tmp_path: Path) -> None:
    wrapped = change(dict(tensors))
    if "b.logit_scale" in wrapped:  # one model under two names, as an attribute twice
        wrapped |= {f"a.{name}": wrapped[f"b.{name}"] for name in tensors}
    torch.save(wrapped, tmp_path / "w.pt")
    clip = leanclip.load(tmp_path / "w.pt", arch=TINY, device="cpu")
    for name, tensor in clip.model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


AVERAGED = {
    "state_dict_ema": lambda online, ema: {"state_dict": online, "state_dict_ema": ema},
    "model_ema": lambda online, ema: {"model": online, "model_ema": under("module.", ema)},
    "ema": lambda online, ema: {"net": online, "ema": {"decay": 0.9, "module": ema}},
    "model_ema.": lambda online, ema: under("model.", online) | under("model_ema.", ema),
    "ema_model.": lambda online, ema: {
        "state_dict": under("model.", online) | under("ema_model.module.", ema)
    },
}


@pytest.mark.parametrize("name", AVERAGED)
def test_moving_averages_by_choice(name: str, tensors: Tensors, tmp_path: Path) -> None:
    ema = {key: tensor + 1 for key, tensor in tensors.items()}
    path = tmp_path / "w.pt"
    torch.save(AVERAGED[name](tensors, ema), path)

    def scale(source: str) -> torch.Tensor:
        return read_weights(source, arch=TINY).tensors["logit_scale"]

    assert scale(f"{path}") == tensors["logit_scale"]
    assert scale(f"{path}#ema") == ema["logit_scale"]
    assert scale(f"{path}#{name.rstrip('.')}") == ema["logit_scale"]
    with pytest.raises(WeightsError, match=r"no model under #best; there are: .*w\.pt#"):
        scale(f"{path}#best")
    torch.save(ema, f"{path}#ema")  # a file of such a name is that file
    assert scale(f"{path}#ema") == ema["logit_scale"]


def test_an_average_alone_is_taken_and_two_models_are_asked_for(
    tensors: Tensors, tmp_path: Path
) -> None:
    torch.save({"ema_state_dict": tensors, "step": 3}, tmp_path / "w.pt")
    assert len(read_weights(tmp_path / "w.pt").tensors) == len(tensors)
    both = under("student.", tensors) | under("teacher.", tensors)
    save_file(both, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"several models; .*w\.safetensors#teacher"):
        read_weights(tmp_path / "w.safetensors")
    assert len(read_weights(f"{tmp_path}/w.safetensors#teacher").tensors) == len(tensors)
    shared = {name: both[f"student.{name}"] for name in tensors if "visual" not in name}
    torch.save(both | {f"teacher.{name}": t for name, t in shared.items()}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="several models"):  # that share a tower
        read_weights(tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="#teacher chooses among models in one file"):
        read_weights(f"{tmp_path}#teacher")


def test_what_is_missing_and_left_over_is_in_one_message(tensors: Tensors, tmp_path: Path) -> None:
    wrapped = under("net.", tensors) | LINEAR | {"net.visual.extra": torch.zeros(1)}
    del wrapped["net.ln_final.bias"]
    torch.save({"state_dict": wrapped, "epoch": 1}, tmp_path / "w.pt")
    words = r"missing keys: ln_final.bias; unexpected keys: visual.extra; besides.*criterion"
    with pytest.raises(WeightsError, match=words):
        leanclip.load(tmp_path / "w.pt", arch=TINY, device="cpu")
    clip = leanclip.load(tmp_path / "w.pt", arch=TINY, device="cpu", partial=True)
    assert torch.equal(clip.model.logit_scale, tensors["logit_scale"])


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ("model.{}", "model.norm"),
        ("model._orig_mod.{}", "model.norm"),
        ("{}", "norm"),
    ],
)
def test_what_is_left_over_within_the_model_is_named_in_full(
    names: str, shown: str, tensors: Tensors, tmp_path: Path
) -> None:
    """A module that another trainer calls otherwise: both names are in the message."""
    renamed = {name.replace("ln_final", "norm"): tensor for name, tensor in tensors.items()}
    wrapped = {names.format(name): tensor for name, tensor in renamed.items()}
    for values in (wrapped, {"state_dict": wrapped}, {"app": {"module": wrapped}}):
        torch.save(values, tmp_path / "w.pt")
        words = rf"missing keys: ln_final\.bias, ln_final\.weight; besides .*: {shown}\.\*$"
        with pytest.raises(WeightsError, match=words):
            leanclip.load(tmp_path / "w.pt", arch=TINY, device="cpu")


def test_dicts_without_end_are_no_trap(tensors: Tensors, tmp_path: Path) -> None:
    nested: dict[str, Any] = {"weight": torch.zeros(1)}
    for _ in range(40):  # 2^40 paths
        nested = {"a": nested, "b": nested}
    torch.save(nested, tmp_path / "w.pt")
    with pytest.raises(WeightsError):
        leanclip.load(tmp_path / "w.pt", arch=TINY, device="cpu")
    wrapped: dict[str, Any] = {"epoch": 1}
    for _ in range(40):
        wrapped = {"module": wrapped, "_orig_mod": wrapped}
    itself: dict[str, Any] = dict(tensors)
    itself["module"] = itself
    for endless in (tensors | wrapped, itself):
        torch.save(endless, tmp_path / "w.pt")
        assert read_weights(tmp_path / "w.pt", arch=TINY).tensors.keys() == tensors.keys()


# --- architectures in open_clip's form

OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "width": 32, "heads": 2, "layers": 2},
    "quick_gelu": True,
}
WRITTEN_OUT: dict[str, dict[str, Any]] = {  # as open_clip's dataclasses have them
    "vision_cfg": {
        "mlp_ratio": 4.0,
        "ls_init_value": None,
        "patch_dropout": 0.0,
        "attentional_pool": False,
        "attn_pooler_queries": 256,
        "attn_pooler_heads": 8,
        "no_ln_pre": False,
        "pos_embed_type": "learnable",
        "final_ln_after_pool": False,
        "pool_type": "tok",
        "output_tokens": False,
        "act_kwargs": None,
        "norm_kwargs": None,
        "block_type": None,
        "qk_norm": False,
        "timm_model_name": None,
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "timm_proj_bias": False,
        "timm_drop": 0.0,
        "timm_drop_path": None,
        "image_size": [32, 32],
    },
    "text_cfg": {
        "vocab_size": 49408,
        "mlp_ratio": 4.0,
        "ls_init_value": None,
        "embed_cls": False,
        "pad_id": 0,
        "eos_id": 2,
        "no_causal_mask": False,
        "final_ln_after_pool": False,
        "pool_type": "argmax",
        "proj_bias": False,
        "proj_type": "linear",
        "output_tokens": False,
        "act_kwargs": {},
        "norm_kwargs": {},
        "hf_model_name": None,
        "hf_tokenizer_name": None,
        "tokenizer_kwargs": None,
        "hf_model_pretrained": True,
        "hf_proj_type": "mlp",
        "hf_pooler_type": "mean_pooler",
    },
}


def written_out() -> dict[str, Any]:
    more = {name: OPEN_CLIP[name] | WRITTEN_OUT[name] for name in WRITTEN_OUT}
    top = {"custom_text": False, "init_logit_scale": 2.6592, "init_logit_bias": None}
    return OPEN_CLIP | more | top | {"nonscalar_logit_scale": False, "output_dict": True}


def test_defaults_that_are_written_out_are_defaults() -> None:
    plain, full = read_architecture(OPEN_CLIP), read_architecture(written_out())
    assert plain == full
    assert plain == CLIP(**TINY).config
    resnet = {"layers": [3, 4, 6, 3], "width": 64, "patch_size": None}
    for name, vision, heads in (("RN50", resnet, 32), ("ViT-B-16", {}, 12)):
        known = read_architecture(name).model_copy(update={"vision_heads": heads})
        values = {"embed_dim": known.embed_dim, "vision_cfg": vision, "text_cfg": {}}
        assert read_architecture(values) == known


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("text_cfg", "ls_init_value", 1e-4),
        ("vision_cfg", "attentional_pool", "parallel"),
        ("vision_cfg", "timm_model_name", "vit_base"),
        ("vision_cfg", "image_size", [32, 48]),
        ("vision_cfg", "no_causal_mask", True),
        ("text_cfg", "final_ln_after_pool", True),
        ("text_cfg", "norm_kwargs", {"eps": 1e-6, "elementwise_affine": False}),
        ("text_cfg", "qk_norm", True),
    ],
)
def test_what_open_clip_has_alone_is_refused_by_name(
    section: str, field: str, value: object, tmp_path: Path
) -> None:
    values = OPEN_CLIP | {section: OPEN_CLIP[section] | {field: value}}
    (tmp_path / "arch.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=rf"arch\.json: .*{field}.* supported"):
        read_architecture(tmp_path / "arch.json")


def test_every_command_takes_an_architecture(
    command: Command, tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": under("module.", tensors)}, tmp_path / "w.pt")
    (tmp_path / "arch.json").write_text(json.dumps({"model_cfg": written_out()}))
    from PIL import Image

    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photos" / "a.png")

    def run(*words: str, arch: str | None = "arch.json") -> subprocess.CompletedProcess[str]:
        given = ("--arch", arch) if arch else ()
        return command(*words, *given)

    for words in (
        ("inspect", "w.pt"),
        ("convert", "w.pt", "hf", "--to", "hf"),
        ("export", "w.pt", "exported", "--to", "torch"),
        ("classify", "photos", "--labels", "red, blue", "--model", "w.pt"),
        ("similarity", "--images", "photos", "--texts", "red", "--model", "w.pt"),
        ("embed", "photos", "--out", "embedded", "--model", "w.pt"),
        ("search", "build", "photos", "--out", "index", "--model", "w.pt"),
        ("search", "update", "index"),
        ("search", "find", "index", "red"),
    ):
        done = run(*words)
        assert done.returncode == 0, (words, done.stderr)
    refused = run("classify", "photos", "--labels", "red, blue", "--model", "w.pt", arch=None)
    assert refused.returncode == 2
    assert "--arch" in refused.stderr
    refused = run("classify", "photos", "--labels", "red, blue", "--model", "exported")
    assert refused.returncode == 2
    assert "leave arch out" in refused.stderr
    refused = run("inspect", "w.pt", arch="ViT-B-32")
    assert refused.returncode == 2
    assert "shapes differ" in refused.stderr
    deeper = OPEN_CLIP | {"text_cfg": OPEN_CLIP["text_cfg"] | {"layers": 3}}
    (tmp_path / "deeper.json").write_text(json.dumps(deeper))
    refused = run("inspect", "w.pt", arch="deeper.json")
    assert refused.returncode == 2
    assert "missing keys: transformer.resblocks.2" in refused.stderr
    larger = OPEN_CLIP | {"vision_cfg": OPEN_CLIP["vision_cfg"] | {"image_size": 64}}
    (tmp_path / "larger.json").write_text(json.dumps(larger))
    assert run("inspect", "w.pt", arch="larger.json").returncode == 0  # positions can be fitted
    refused = run("convert", "w.pt", "larger", "--to", "leanclip", arch="larger.json")
    assert refused.returncode == 2
    assert "shapes differ: visual.positional_embedding (17, 32) there" in refused.stderr
