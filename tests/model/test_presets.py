"""The named architectures: published sizes, counted FLOPs, and the command that lists them."""

import contextlib
import json

import pytest
import torch
from conftest import TINY, terminal

from leanclip import CLIP, ConfigError
from leanclip.cli.main import main
from leanclip.config.model import ModelConfig
from leanclip.config.presets import PRESETS, preset
from leanclip.config.sections import parse
from leanclip.model import cost
from leanclip.model.cost import forward_gflops

PUBLISHED = {  # millions of parameters; open_clip's docs/model_profile.csv
    "ViT-B-32": 151.28,
    "ViT-B-16": 149.62,
    "ViT-L-14": 427.62,
    "ViT-L-14-336": 427.94,
    "ViT-H-14": 986.11,
    "ViT-g-14": 1366.68,
    "ViT-bigG-14": 2539.57,
    "RN50": 102.01,
    "RN101": 119.69,
    "RN50x4": 178.3,
    "RN50x16": 290.98,
    "RN50x64": 623.26,
}


def config_of(name: str) -> ModelConfig:
    return parse(ModelConfig, preset(name), where=name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_number(name: str) -> None:
    with torch.device("meta"):
        model = CLIP(**preset(name))
    assert round(model.parameter_count() / 1e6, 2) == PUBLISHED[name]


def test_vit_b_32_to_the_last_parameter() -> None:
    with torch.device("meta"):
        assert CLIP(**preset("ViT-B-32")).parameter_count() == 151_277_313


def test_every_published_model_and_its_quickgelu_form_is_there() -> None:
    forms = {f"{name}-quickgelu" for name in PUBLISHED} - {"ViT-g-14-quickgelu"}
    assert PRESETS.keys() == PUBLISHED.keys() | forms


def test_the_quickgelu_form_differs_in_the_activation_alone() -> None:
    for name, arch in PRESETS.items():
        is_quick = name.endswith("-quickgelu")
        assert config_of(name).activation == ("quick_gelu" if is_quick else "gelu")
        plain = PRESETS[name.removesuffix("-quickgelu")]
        assert arch | {"activation": "gelu"} == plain


@pytest.mark.parametrize(
    ("name", "heads", "hidden"),
    [
        ("ViT-B-32", 12, 3072),
        ("ViT-L-14", 16, 4096),
        ("ViT-H-14", 16, 5120),
        ("ViT-g-14", 16, 6144),
        ("ViT-bigG-14", 16, 8192),
        ("RN50", 32, None),
        ("RN50x64", 64, None),
    ],
)
def test_vision_heads_and_hidden_widths(name: str, heads: int, hidden: int | None) -> None:
    config = config_of(name)
    assert config.attention_heads == heads
    if hidden:
        assert int(config.vision_width * config.vision_mlp_ratio) == hidden


def test_a_preset_is_a_copy() -> None:
    preset("RN50")["embed_dim"] = 1
    assert preset("RN50")["embed_dim"] == 1024


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ViT-B32", "ViT-B32: no such model; did you mean ViT-B-32?"),
        ("ViT-L/14@336px", "did you mean ViT-L-14-336?"),
        ("rn50", "rn50: no such model; did you mean RN50?"),
        ("resnet", "resnet: no such model (list them with: leanclip models)"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        preset(name)
    assert words in str(caught.value)


def test_gflops_by_hand() -> None:
    """Two products of a multiply-add each, written out for the tiny ViT."""

    def tower(tokens: int, width: int = 32, embed_dim: int = 16) -> int:
        block = 12 * tokens * width**2 + 2 * tokens**2 * width  # linear layers, attention
        # the last block: keys and values of all; query, output and perceptron of one token
        last = (2 * tokens + 10) * width**2 + 2 * tokens * width
        return block + last + width * embed_dim

    patches, context = 16, 24
    multiply_adds = patches * 3 * 8**2 * 32 + tower(patches + 1) + tower(context)
    config = parse(ModelConfig, TINY, where="x")
    assert forward_gflops(config) == pytest.approx(2 * multiply_adds / 1e9, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "published"), [("ViT-B-32", 14.78), ("ViT-B-16", 41.09), ("RN50", 18.18)]
)
def test_gflops_are_a_little_under_the_published(name: str, published: float) -> None:
    """open_clip's model_profile.csv; its last blocks compute every token, ours the one read."""
    assert 0.92 * published < forward_gflops(config_of(name)) < published


@pytest.mark.slow
def test_models_prints_a_json_line_each_when_piped(command) -> None:
    done = command("models")
    assert done.returncode == 0
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["name"] for line in lines] == list(PRESETS)
    assert all(line["forward_gflops"] > 10 for line in lines)
    by_name = {line["name"]: line for line in lines}
    assert by_name["RN50x4"]["parameters_millions"] == 178.3
    assert by_name["RN50x4"]["image_resolution"] == 288
    assert by_name["ViT-L-14-336-quickgelu"] == by_name["ViT-L-14-336"] | {
        "name": "ViT-L-14-336-quickgelu",
        "activation": "quick_gelu",
    }


def test_models_draws_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "PRESETS", {"ViT-B-32": PRESETS["ViT-B-32"]})
    monkeypatch.setenv("TERM", "xterm")
    with terminal() as shown, contextlib.suppress(SystemExit):
        main(["models"])
    for word in ("model", "parameters (M)", "forward GFLOPs", "ViT-B-32", "151.28", "224", "gelu"):
        assert word in shown()
    assert "{" not in shown()


def test_models_help_shows_an_example(command) -> None:
    assert "Example: leanclip models" in command("models", "--help").stdout
