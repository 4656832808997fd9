"""The named architectures: published sizes, counted FLOPs, and the command that lists them."""

import contextlib
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY, assert_refused, terminal

from leanclip import CLIP, ConfigError
from leanclip.cli.main import main
from leanclip.config.model import ModelConfig
from leanclip.config.presets import PRESETS, preset
from leanclip.config.sections import parse
from leanclip.model import cost
from leanclip.model.cost import forward_gflops
from leanclip.model.skip_init import meta_device
from leanclip.weights import inspection

PUBLISHED = {  # millions of parameters; open_clip's docs/model_profile.csv
    "ViT-B-32": 151.28,
    "ViT-B-32-256": 151.29,
    "ViT-B-16-plus-240": 208.38,
    "ViT-H-14-378": 986.71,
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
OTHER_FAMILIES = {  # the same, of the whole model
    "ViT-L-14-CLIPA": 414.21,
    "ViT-L-14-CLIPA-336": 414.54,
    "ViT-H-14-CLIPA": 968.24,
    "ViT-H-14-CLIPA-336": 968.64,
    "ViT-bigG-14-CLIPA": 2517.22,
    "ViT-bigG-14-CLIPA-336": 2517.76,
    "ViT-B-16-SigLIP": 203.16,
    "ViT-B-16-SigLIP-256": 203.2,
    "ViT-B-16-SigLIP-i18n-256": 370.63,
    "ViT-B-16-SigLIP-384": 203.45,
    "ViT-B-16-SigLIP-512": 203.79,
    "ViT-L-16-SigLIP-256": 652.15,
    "ViT-SO400M-14-SigLIP": 877.36,
    "ViT-SO400M-14-SigLIP-384": 877.96,
}
COCA = {"coca_ViT-B-32": (89.16, 63.43), "coca_ViT-L-14": (306.72, 123.65)}  # its two towers
PE_CORE = {  # of both towers in billions, in the table of perception_models' README
    "PE-Core-B-16": (0.09, 0.35),
    "PE-Core-L-14-336": (0.32, 0.35),
    "PE-Core-bigG-14-448": (1.88, 0.54),
}


def config_of(name: str) -> ModelConfig:
    return parse(ModelConfig, preset(name), where=name)


def sizes_of(name: str) -> tuple[int, int]:
    """Parameters of the vision tower, and of the rest."""
    with meta_device():
        model = CLIP(**preset(name))
    vision = sum(parameter.numel() for parameter in model.visual.parameters())
    return vision, model.parameter_count() - vision


@pytest.mark.parametrize("name", [*PUBLISHED, *OTHER_FAMILIES])
def test_parameters_are_the_published_number(name: str) -> None:
    published = (PUBLISHED | OTHER_FAMILIES)[name]
    assert round(sum(sizes_of(name)) / 1e6, 2) == published


@pytest.mark.parametrize("name", COCA)
def test_parameters_of_coca_are_those_of_its_two_towers(name: str) -> None:
    vision, text = sizes_of(name)
    assert (round(vision / 1e6, 2), round(text / 1e6, 2)) == COCA[name]


@pytest.mark.parametrize("name", PE_CORE)
def test_parameters_of_pe_core_are_the_published_number(name: str) -> None:
    vision, text = sizes_of(name)
    assert (round(vision / 1e9, 2), round(text / 1e9, 2)) == PE_CORE[name]


def siglip2(width: int, layers: int, heads: int, **vision: Any) -> Any:
    """transformers' model of these sizes."""
    size = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    size |= {"intermediate_size": 4304 if width == 1152 else 4 * width}
    is_naflex = "num_patches" in vision
    text = size | {"vocab_size": 256000, "projection_size": width}
    settings: dict[str, Any] = {"text_config": text, "vision_config": size | vision}
    if is_naflex:
        return transformers.Siglip2Model(transformers.Siglip2Config(**settings))
    return transformers.SiglipModel(transformers.SiglipConfig(**settings))


@pytest.mark.parametrize(
    ("name", "sizes", "vision"),
    [
        ("ViT-B-32-SigLIP2-256", (768, 12, 12), {"image_size": 256, "patch_size": 32}),
        ("ViT-B-16-SigLIP2", (768, 12, 12), {"image_size": 224, "patch_size": 16}),
        ("ViT-L-16-SigLIP2-512", (1024, 24, 16), {"image_size": 512, "patch_size": 16}),
        ("ViT-SO400M-14-SigLIP2", (1152, 27, 16), {"image_size": 224, "patch_size": 14}),
        ("ViT-SO400M-16-SigLIP2-384", (1152, 27, 16), {"image_size": 384, "patch_size": 16}),
        ("ViT-B-16-SigLIP2-naflex", (768, 12, 12), {"num_patches": 256, "patch_size": 16}),
    ],
)
def test_parameters_of_siglip2_are_those_in_transformers(
    name: str, sizes: tuple[int, int, int], vision: dict[str, Any]
) -> None:
    with torch.device("meta"):
        theirs = siglip2(*sizes, **vision)
    assert sum(sizes_of(name)) == sum(p.numel() for p in theirs.parameters())


def test_parameters_of_metaclip2_are_those_in_transformers() -> None:
    text = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    text |= {"intermediate_size": 4096, "vocab_size": 901629}
    vision = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16}
    vision |= {"intermediate_size": 5120, "image_size": 224, "patch_size": 14}
    kind = transformers.MetaClip2Config
    with torch.device("meta"):
        theirs = transformers.MetaClip2Model(
            kind(text_config=text, vision_config=vision, projection_dim=1024)
        )
    count = sum(p.numel() for p in theirs.parameters())
    assert sum(sizes_of("ViT-H-14-worldwide")) == count


def test_every_preset_is_a_model_that_inspect_names() -> None:
    assert len(PRESETS) > 60
    for name in PRESETS:
        assert inspection._name(config_of(name)) in _equal_presets(name)


def _equal_presets(name: str) -> list[str]:
    """The presets with the same settings: a ResNet's activation is in its text tower alone."""
    return [other for other in PRESETS if config_of(other) == config_of(name)]


def test_vit_b_32_to_the_last_parameter() -> None:
    with torch.device("meta"):
        assert CLIP(**preset("ViT-B-32")).parameter_count() == 151_277_313


def test_every_published_model_and_its_quickgelu_form_is_there() -> None:
    only_exact = {"ViT-g-14", "ViT-B-32-256", "ViT-B-16-plus-240"}
    forms = {f"{name}-quickgelu" for name in PUBLISHED.keys() - only_exact}
    forms.add("ViT-H-14-worldwide-quickgelu")
    assert PRESETS.keys() >= PUBLISHED.keys() | forms | OTHER_FAMILIES.keys()
    assert {name for name in PRESETS if name.endswith("-quickgelu")} == forms


def test_the_quickgelu_form_differs_in_the_activation_alone() -> None:
    for name in PRESETS:
        if name.endswith("-quickgelu"):
            plain = PRESETS[name.removesuffix("-quickgelu")]
            assert plain["activation"] == "gelu"
            assert PRESETS[name] == plain | {"activation": "quick_gelu"}


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


def test_models_lists_what_can_be_had_without_torch(command) -> None:
    done = command("models")
    assert done.returncode == 0
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    sources = {line["name"]: line["source"] for line in lines}
    assert len(sources) == len(lines) > 200
    assert sources.keys() >= PRESETS.keys()
    assert sources["ViT-B-32"] == ""
    assert sources["ViT-B-32::openai"] == "OpenAI"
    assert sources["ViT-B-16-SigLIP2::webli"] == "timm/ViT-B-16-SigLIP2"
    assert {"CLIP", "SigLIP", "SigLIP 2", "MetaCLIP 2", "PE-Core", "Chinese-CLIP"} <= {
        line["family"] for line in lines
    }
    code = "import sys; sys.argv = ['leanclip', 'models', 'siglip2']\n" \
        "from leanclip.cli.main import main\n" \
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = [json.loads(line)["name"] for line in done.stdout.splitlines()]
    assert len(names) > 20
    assert {"ViT-B-16-SigLIP2", "siglip2-base-patch16-naflex"} <= {*names}


def test_models_counts_what_an_architecture_costs(command) -> None:
    done = command("models", "rn50", "--cost")
    assert done.returncode == 0
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    by_name = {line["name"]: line for line in lines}
    assert list(by_name) == [name for name in PRESETS if "RN50" in name]
    assert all(line["forward_gflops"] > 10 for line in lines)
    assert by_name["RN50x4"]["parameters_millions"] == 178.3
    assert by_name["RN50x4"]["image_resolution"] == 288
    assert by_name["RN50x4-quickgelu"] == by_name["RN50x4"] | {
        "name": "RN50x4-quickgelu",
        "activation": "quick_gelu",
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["models", "ViT-B-32", "--cost"],
            "model|parameters (M)|forward GFLOPs|ViT-B-32|151.28|224|gelu",
        ),
        (["models", "naflex"], "family|name|source|SigLIP 2|ViT-B-16-SigLIP2-naflex|google/"),
    ],
)
def test_models_draws_a_table_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.setattr(cost, "PRESETS", {"ViT-B-32": PRESETS["ViT-B-32"]})
    monkeypatch.setenv("TERM", "xterm")
    with terminal(140) as shown, contextlib.suppress(SystemExit):
        main(arguments)
    for word in words.split("|"):
        assert word in shown()
    assert "{" not in shown()


@pytest.mark.parametrize(
    ("arguments", "found"), [(["sigllip"], "did you mean SigLIP?"), (["nothing"], "nothing")]
)
@pytest.mark.parametrize("cost", [[], ["--cost"]])
def test_models_refuses_a_word_that_no_name_has(
    command, arguments: list[str], found: str, cost: list[str]
) -> None:
    done = command("models", *arguments, *cost)
    assert_refused(done, "no name has", found)
    assert done.stdout == ""


def test_models_help_shows_an_example(command) -> None:
    assert "Example: leanclip models" in command("models", "--help").stdout
