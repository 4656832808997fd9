"""Configuration: YAML's traps, overrides, suggestions, and what is kept in a run's folder."""

from pathlib import Path

import pytest
from conftest import PROJECT, TINY, make_config

from leanclip.config.schema import Config, load_config
from leanclip.config.sections import differences, parse, to_plain
from leanclip.config.strict_yaml import dump_yaml, load_yaml
from leanclip.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return make_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("012", 12),
        ("-3", -3),
        (".inf", float("inf")),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("2026-11-24", "2026-11-24"),
        ("true", True),
        ("~", None),
        ("", None),
        ("'5e-4'", "5e-4"),
        ("[1, 2e0, x]", [1, 2.0, "x"]),
    ],
)
def test_scalars_by_the_core_rules(text: str, value: object) -> None:
    loaded = load_yaml(text, where="x")
    assert loaded == value
    assert type(loaded) is type(value)


def test_what_is_written_reads_back_the_same() -> None:
    values = {
        "numbers": [1, -2, 5e-4, 1e22, 0.1, 1e-300],
        "words": ["5e-4", "no", "12:30", "true", "~", "", "01", "1_0", "é: #x", "- a\nb", "0x1"],
        "rest": [None, True, [], {}],
    }
    assert load_yaml(dump_yaml(values), where="x") == values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: a: set twice"),
        ("a: {b: 1, b: 2}", "line 1: b: set twice"),
        ("a: &x [1]\nb: *x", "line 2: aliases are not supported"),
        ("a: !!python/object:os.system x", "line 1: tags are not supported"),
        ("a: 1\nb: !!bool x", "line 2: tags are not supported"),
        (r'a: "\UFFFFFFFF"', "too large"),
        ("a: [1, 2", "line 1"),
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("[" * 30 + "]" * 30, "line 1: nested over 20 levels"),
        ("? [a, b]\n: 1", "line 1: a key must be a string"),
        ("a: \x00", "special characters are not allowed"),
    ],
)
def test_bad_yaml_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"file.yaml.*{words}"):
        load_yaml(text, where="file.yaml")


def test_a_file_becomes_a_config(file: Path) -> None:
    config = load_config(file)
    assert config.model.vision_width == TINY["vision_width"]
    assert config.output_dir == "runs/run"
    assert config.optimizer.weight_decay == 0.2


def test_overrides_are_yaml_and_last_wins(file: Path) -> None:
    config = load_config(
        file,
        [
            "optimizer.learning_rate=5e-4",
            "train.epochs=3",
            "train.epochs=4",
            'data.templates=["a {}", "b {}"]',
            "evaluate.retrieval=null",
            "checkpoint.every_steps=7",
            "output_dir=here=there",
        ],
    )
    assert config.optimizer.learning_rate == 5e-4
    assert config.train.epochs == 4
    assert config.data.templates == ("a {}", "b {}")
    assert config.evaluate.retrieval is None
    assert config.checkpoint.every_steps == 7
    assert config.output_dir == "here=there"


def test_settings_win_over_the_file_unless_none(file: Path) -> None:
    assert load_config(file, ["output_dir=a"], output_dir="b", load=None).output_dir == "b"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.learning_rat=1", "optimizer.learning_rat: no such setting; did you mean "
         "optimizer.learning_rate?"),
        ("lr=1", "lr: no such setting"),
        ("batch_size=8", "batch_size: no such setting; did you mean train.batch_size?"),
        ("train.epochs=ten", 'train.epochs: should be a valid integer, found "ten"'),
        ("train.epochs=2.5", "train.epochs: should be a valid integer, found 2.5"),
        ("train.epochs=0", "train.epochs: should be greater than 0, found 0"),
        ("train.batch_size='8'", 'train.batch_size: should be a valid integer, found "8"'),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate"),
        ("train.precision=fp8", "train.precision: should be 'auto', 'fp32', 'bf16' or 'fp16'"),
        ("data.format=parquet", "data.format: should be 'shapes'"),
        ("data=null", "data: should be .*found null"),
        ("data.crop_ratio=[0, 1.3]", "data.crop_ratio.0: should be greater than 0, found 0"),
        ("data.crop_ratio=[-1.5, -0.5]", "data.crop_ratio.0: should be greater than 0"),
        ("data.crop_ratio=[1.3, 0.75]", "data.crop_ratio: should be in ascending order, "
         "found .1.3, 0.75."),
        ("data.crop_scale=[1, 0.5]", "data.crop_scale: should be in ascending order"),
        ("data.crop_scale=[0, 1]", "data.crop_scale.0: should be greater than 0, found 0"),
        ("data.crop_scale=[0.5, 1.5]", "data.crop_scale.1: should be less than or equal to 1"),
        ("data.std=[0.2, 0, 0.2]", "data.std.1: should be greater than 0, found 0"),
        ("data.mean=[123.7, 116.3, 103.5]", "data.mean.0: should be less than or equal to 1"),
        ("optimizer.beta1=1", "optimizer.beta1: should be less than 1, found 1"),
        ("optimizer.beta2=1.0", "optimizer.beta2: should be less than 1, found 1.0"),
        ("optimizer.beta2=-0.1", "optimizer.beta2: should be greater than or equal to 0"),
        ("seed=9223372036854775808", "seed: should be less than 9223372036854775808"),
        ("data.mean=[0.1, 0.2]", "data.mean.2: is required and not set"),
        ("model.vision_width=33", "model: vision_width 33 is not a multiple of vision_heads 2"),
        ("train.epochs.x=1", "-o train.epochs.x=1: train.epochs is 2"),
        ("train", "-o train: not of the form key.path=value"),
        ("=3", "-o =3: not of the form key.path=value"),
        ("train.epochs=[1", "-o train.epochs=.1 line 1"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(file: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(file, [override])


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such config file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="not a mapping of settings, found a list"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(ConfigError, match=r"latin\.yaml: cannot be read"):
        load_config(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_a_config_is_frozen_and_survives_yaml(file: Path) -> None:
    config = load_config(file)
    again = parse(Config, load_yaml(dump_yaml(to_plain(config)), where="x"), where="x")
    assert again == config
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_differences_are_named(file: Path) -> None:
    old, new = load_config(file), load_config(file, ["seed=1", "train.epochs=9", "data.workers=3"])
    assert differences(old, new, ignore=["data.workers"]) == [
        "seed: 0 there, 1 here",
        "train.epochs: 2 there, 9 here",
    ]
    assert differences(old, new, ignore=["data", "train", "seed"]) == []
    assert differences(old, new, ignore=["see", "tr", "data.w"]) != []


def test_every_setting_is_described() -> None:
    def walk(section: type) -> None:
        for name, field in section.model_fields.items():
            kind = field.annotation
            if hasattr(kind, "model_fields"):
                walk(kind)
            else:
                assert field.description, f"{section.__name__}.{name}"

    walk(Config)


@pytest.mark.parametrize(
    "path", sorted((PROJECT / "configs").rglob("*.yaml")), ids=lambda p: p.name
)
def test_the_configs_of_the_project_are_valid(path: Path) -> None:
    load_config(path)
    header = path.read_text().splitlines()[0]
    assert header.startswith("# ")
    assert str(path.relative_to(PROJECT)) in header
