"""What to evaluate: from settings or from words on the command line to opened data sets."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanclip.config import Config, DataConfig, EvaluationData, load_config
from leanclip.data import Dataset, open_dataset, source_configs, split_source
from leanclip.data.splits import find_splits
from leanclip.errors import ConfigError
from leanclip.settings import parse, to_plain
from leanclip.weights import read_weights

log = logging.getLogger("leanclip")

EVALUATION_SPLITS = {  # (layout, task) -> the split that is meant for it
    ("shapes", "zero_shot"): "unseen",
    ("shapes", "retrieval"): "val",
    ("food101", "zero_shot"): "test",
}
HELD_OUT = ("val", "valid", "validation", "test", "dev")  # the first there is, of training's root
TASKS: dict[str, tuple[str, ...]] = {  # by their names on the command line
    "zeroshot": ("zero_shot",),
    "retrieval": ("retrieval",),
    "all": ("retrieval", "zero_shot"),
}
MEASURABLE = {  # what a layout's data allows; of the others the data itself says
    "shapes": ("retrieval", "zero_shot"),
    "food101": ("zero_shot",),
    "folder": ("zero_shot",),
    "pairs": ("retrieval",),
}


METRICS = {  # what the figures are called of which more is better
    "retrieval": tuple(
        f"{way}_R@{k}" for k in (1, 5, 10) for way in ("image_to_text", "text_to_image")
    ),
    "zero_shot": ("zeroshot_top1", "zeroshot_top5", "zeroshot_mean_per_class"),
}


@dataclass(frozen=True)
class Task:
    """One thing to evaluate, opened: what to measure, on which data, by which settings."""

    name: str  # "zero_shot" or "retrieval"
    data: DataConfig
    dataset: Dataset
    limit: int | None
    batch_size: int


def open_tasks(config: Config) -> list[Task]:
    """Open the data sets that `evaluate` names.

    Raises:
        DataError: one is missing or empty.
        ConfigError: zero-shot on data without classes, or retrieval on data without captions.
    """
    settings = config.evaluate
    tasks = []
    for name, wanted in (("retrieval", settings.retrieval), ("zero_shot", settings.zero_shot)):
        if wanted is None:
            continue
        data = _evaluation_data(config.data, wanted, name)
        dataset = open_dataset(data)
        if _is_training(config.data, wanted, data):
            log.warning("evaluate.%s: measures on the data that training uses", name)
        if bool(dataset.classes) != (name == "zero_shot"):
            has, needs = (
                ("no classes", "class data (a folder, food101 or shapes, or labels in a table)")
                if name == "zero_shot"
                else ("classes, not captions", "captions (pairs or shapes, or a table's)")
            )
            raise ConfigError(
                f"evaluate.{name}: {data.root} (layout {data.layout}) has {has}; name a data set "
                f"with {needs}, or set evaluate.{name} to null"
            )
        tasks.append(Task(name, data, dataset, wanted.limit, settings.batch_size))
    return tasks


def open_guard(config: Config) -> Task | None:
    """Open the data set that `evaluate.guard` names: zero-shot where it has classes.

    Raises:
        DataError: it is missing or empty.
    """
    wanted = config.evaluate.guard
    if wanted is None:
        return None
    data = _guard_data(config, wanted)
    dataset = open_dataset(data)
    name = "zero_shot" if dataset.classes else "retrieval"
    return Task(name, data, dataset, wanted.limit, config.evaluate.batch_size)


def evaluation_data(config: Config) -> list[DataConfig]:
    """The data sets that `evaluate` names, as `data` sections."""
    settings = config.evaluate
    named = (("retrieval", settings.retrieval), ("zero_shot", settings.zero_shot))
    found = [_evaluation_data(config.data, wanted, name) for name, wanted in named if wanted]
    return [*found, _guard_data(config, settings.guard)] if settings.guard else found


def evaluation_config(
    model: str,
    data_spec: str | None,
    task: str,
    *,
    config: Path | None = None,
    arch: str | None = None,
    overrides: Sequence[str] = (),
    out: str | None = None,
) -> Config:
    """The settings of `leanclip eval`.

    They come from `config`, else from the run that `model` is the folder of, else from what is
    stored with the weights. `data_spec` is LAYOUT:ROOT; without one the settings say what is
    measured. "all" measures what the data allows.

    Raises:
        ConfigError: an unknown task or layout, or nothing says what to evaluate on.
        WeightsError: the weights cannot be read.
    """
    if task not in TASKS:
        raise ConfigError(f"--task {task}: no such task; known: {', '.join(TASKS)}")
    out = out or str(Path("runs") / f"eval-{Path(model).name}")
    run_config = Path(model) / "config.yaml"
    if config is None and run_config.is_file():
        config = run_config
    if config is not None:
        settings = load_config(config, overrides, load=model, load_arch=arch, output_dir=out)
    else:
        if data_spec is None:
            raise ConfigError("--data: say what to evaluate on, as LAYOUT:ROOT, or give -c CONFIG")
        if overrides:
            raise ConfigError("-o: changes the settings of a config; give one with -c CONFIG")
        settings = _stored_config(model, *split_source(data_spec, option="--data"), out, arch)
    evaluate = to_plain(settings.evaluate)
    if data_spec is not None:
        layout, root = split_source(data_spec, option="--data")
        wanted = EvaluationData.model_validate({"layout": layout, "root": root})
        allowed = TASKS[task]
        if task == "all":
            allowed = MEASURABLE.get(layout) or (_task_of(settings.data, wanted),)
        evaluate |= {name: {"layout": layout, "root": root} for name in allowed}
    else:
        allowed = tuple(name for name in TASKS[task] if evaluate[name] is not None)
    if not allowed:
        raise ConfigError(
            f"--task {task}: {config} has no such evaluation; give --data LAYOUT:ROOT"
        )
    evaluate |= {name: None for name in TASKS["all"] if name not in allowed}
    if data_spec is not None or task != "all":
        evaluate["guard"] = None
    values = to_plain(settings) | {"evaluate": evaluate}
    return parse(Config, values, where="leanclip eval")


def _task_of(data: DataConfig, wanted: EvaluationData) -> str:
    """Zero-shot for class data, retrieval for captions."""
    dataset = open_dataset(_evaluation_data(data, wanted, "zero_shot"))
    return "zero_shot" if dataset.classes else "retrieval"


def _evaluation_data(
    data: DataConfig, wanted: EvaluationData, task: str, *, setting: str | None = None
) -> DataConfig:
    """The `data` section with what an evaluation sets of its own."""
    layout = wanted.layout or data.layout
    if layout == "mixture":
        raise ConfigError(
            f"evaluate.{setting or task}.layout: data is a mixture; say a layout and a root to "
            f"evaluate on"
        )
    root = wanted.root or data.root
    trained = _trained(data, layout, root)
    split = wanted.split or EVALUATION_SPLITS.get((layout, task))
    changes = {
        "layout": layout,
        "root": root,
        "split": split or (_held_out(trained) if trained else None),
        "templates": wanted.templates,
        **_columns(wanted, trained),
        "sources": (),
        "epoch_size": None,
        "streaming": False,  # it is read in order, by index
    }
    return data.model_copy(update=changes)


def _guard_data(config: Config, wanted: EvaluationData) -> DataConfig:
    """The `data` section of the guard; of a layout that allows both, the zero-shot split."""
    allowed = MEASURABLE.get(wanted.layout or config.data.layout, ())
    task = "zero_shot" if "zero_shot" in allowed else "retrieval"
    return _evaluation_data(config.data, wanted, task, setting="guard")


def _trained(data: DataConfig, layout: str, root: str) -> DataConfig | None:
    """What training reads of a root, if it does."""
    sources = (data, *source_configs(data))
    return next((one for one in sources if (one.layout, one.root) == (layout, root)), None)


def _held_out(trained: DataConfig) -> str | None:
    """A split of training's root that training does not use; else the one that it uses."""
    used = trained.split or ("train" if trained.layout in ("table", "hub") else None)
    found = () if used is None else find_splits(trained)
    return next((name for name in HELD_OUT if name in found and name != used), trained.split)


def _is_training(data: DataConfig, wanted: EvaluationData, chosen: DataConfig) -> bool:
    """Whether an evaluation that does not say so measures on what training uses."""
    trained = _trained(data, chosen.layout, chosen.root)
    if trained is None or trained.split != chosen.split or wanted.split is not None:
        return False
    # Of weights without a config, `data` is what shall be measured.
    return wanted.root is None or trained.split is not None


def _columns(wanted: EvaluationData, trained: DataConfig | None) -> dict[str, Any]:
    """What columns and labels mean: as the evaluation says, else as for training's root."""
    names = ("class_names", "image_column", "caption_column", "label_column")
    given = {name: getattr(wanted, name) for name in names}
    if trained is None:
        return given
    says_texts = wanted.caption_column is not None or wanted.label_column is not None
    inherited = names[:2] if says_texts else names
    return given | {name: getattr(trained, name) for name in inherited if given[name] is None}


def _stored_config(model: str, layout: str, root: str, out: str, arch: str | None) -> Config:
    """Settings for weights that carry their architecture with them, or have it named."""
    weights = read_weights(model, arch=arch)
    if weights.model is None or weights.preprocess is None:
        raise ConfigError(
            f"--model {model}: does not say its architecture; say it with --arch, or give the "
            f"config it was trained with: -c"
        )
    data: dict[str, Any] = {"layout": layout, "root": root}
    data |= {"mean": weights.preprocess.mean, "std": weights.preprocess.std}
    values = {"model": to_plain(weights.model), "data": data, "load": model}
    values |= {"load_arch": arch, "output_dir": out}
    return parse(Config, values, where="leanclip eval")
