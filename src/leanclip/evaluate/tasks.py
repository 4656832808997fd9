"""What to evaluate: from settings or from words on the command line to opened data sets."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from leanclip.config import (
    Config,
    DataConfig,
    EvaluationData,
    NeighbourData,
    ProbeData,
    SourceConfig,
    load_config,
)
from leanclip.data import Dataset, open_dataset, source_configs, split_source
from leanclip.data.samples import read_class_names, read_templates
from leanclip.data.splits import find_splits
from leanclip.errors import ConfigError, DataError
from leanclip.settings import parse, to_plain
from leanclip.weights import read_weights

log = logging.getLogger("leanclip")

EVALUATION_SPLITS = {  # (layout, task) -> the split that is meant for it
    ("shapes", "zero_shot"): "unseen",
    ("shapes", "linear_probe"): "unseen",
    ("shapes", "knn"): "unseen",
    ("shapes", "retrieval"): "val",
    ("food101", "zero_shot"): "test",
    ("food101", "linear_probe"): "test",
    ("food101", "knn"): "test",
    ("wds", "zero_shot"): "test",
    ("wds", "retrieval"): "test",
    ("wds", "linear_probe"): "test",
    ("wds", "knn"): "test",
}
HELD_OUT = ("val", "valid", "validation", "test", "dev")  # the first there is, of training's root
VALIDATION = ("val", "valid", "validation", "dev")  # where a probe chooses its settings
PROBES = ("linear_probe", "knn")
ORDER = ("retrieval", "zero_shot", *PROBES)  # of tasks in a report
TASKS: dict[str, tuple[str, ...]] = {  # by their names on the command line
    "zeroshot": ("zero_shot",),
    "retrieval": ("retrieval",),
    "linear-probe": ("linear_probe",),
    "knn": ("knn",),
    "all": ORDER,
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
    "linear_probe": ("linear_probe_top1", "linear_probe_top5", "linear_probe_mean_per_class"),
    "knn": ("knn_top1", "knn_top5", "knn_mean_per_class"),
}


class Part(NamedTuple):
    """A split that a probe learns from."""

    data: DataConfig
    dataset: Dataset


@dataclass(frozen=True)
class Task:
    """One thing to evaluate, opened: what to measure, on which data, by which settings."""

    name: str  # one of ORDER
    data: DataConfig
    dataset: Dataset
    limit: int | None
    batch_size: int
    train: Part | None = None  # of a probe; None: a half of each class of the data itself
    validation: Part | None = None  # of a linear probe; None: a fifth of each class of `train`
    shots: int | None = None
    k: int = 0


def open_tasks(config: Config) -> list[Task]:
    """Open the data sets that `evaluate` names.

    Raises:
        DataError: one is missing or empty, or a probe's has other classes to learn from.
        ConfigError: zero-shot on data without classes, or retrieval on data without captions.
    """
    tasks = []
    for name in ORDER:
        wanted: EvaluationData | None = getattr(config.evaluate, name)
        if wanted is None:
            continue
        data = _evaluation_data(config.data, wanted, name)
        dataset = open_dataset(data)
        if _is_training(config.data, wanted, data):
            log.warning("evaluate.%s: measures on the data that training uses", name)
        if bool(dataset.classes) != (name != "retrieval"):
            has, needs = (
                ("no classes", "class data (a folder, food101 or shapes, or labels in a table)")
                if name != "retrieval"
                else ("classes, not captions", "captions (pairs or shapes, or a table's)")
            )
            raise ConfigError(
                f"evaluate.{name}: {data.root} (layout {data.layout}) has {has}; name a data set "
                f"with {needs}, or set evaluate.{name} to null"
            )
        task = Task(name, data, dataset, wanted.limit, config.evaluate.batch_size)
        tasks.append(_with_parts(task, wanted))
    return tasks


def _with_parts(task: Task, wanted: EvaluationData) -> Task:
    """A probe's task with what it learns from."""
    if not isinstance(wanted, ProbeData | NeighbourData):
        return task
    found, used = find_splits(task.data), _split_in_use(task.data)
    split = wanted.train_split
    if split is None and "train" in found and used != "train" and task.data.layout != "shapes":
        split = "train"
    shots = wanted.shots if isinstance(wanted, ProbeData) else None
    k = wanted.k if isinstance(wanted, NeighbourData) else 0
    if split is None:
        return replace(task, shots=shots, k=k)
    held = next((name for name in VALIDATION if name in found and name not in (used, split)), None)
    if isinstance(wanted, NeighbourData):
        held = None
    train, validation = (name and _part(task, name) for name in (split, held))
    return replace(task, train=train or None, validation=validation or None, shots=shots, k=k)


def _part(task: Task, split: str) -> Part:
    """Another split of a task's data.

    Raises:
        DataError: it has other classes.
    """
    data = task.data.model_copy(update={"split": split})
    dataset = open_dataset(data)
    if list(dataset.classes) != list(task.dataset.classes):
        raise DataError(
            f"evaluate.{task.name}: {data.root} has {len(dataset.classes)} classes in {split} and "
            f"{len(task.dataset.classes)} where it is measured, or not the same ones; give their "
            f"names in one file (--classes, or class_names)"
        )
    return Part(data, dataset)


def _split_in_use(data: DataConfig) -> str | None:
    """The split that is read, also where a layout has one of its own."""
    return data.split or ("train" if data.layout in ("table", "hub") else None)


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
    named = ((name, getattr(settings, name)) for name in ORDER)
    found = [_evaluation_data(config.data, wanted, name) for name, wanted in named if wanted]
    return [*found, _guard_data(config, settings.guard)] if settings.guard else found


@dataclass(frozen=True)
class Wishes:
    """What the command line says of an evaluation's data, by its options; None: not said."""

    split: str | None = None
    classes: str | None = None  # a file
    templates: str | None = None  # a file
    train_split: str | None = None
    shots: int | None = None
    k: int | None = None

    def settings(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The settings of each task of `names` that they change.

        Raises:
            ConfigError: an option that no task has a use for.
            DataError: a file of names or templates is not there, or not one.
        """
        class_data = ("zero_shot", *PROBES)
        given = {
            ("split", "split"): (self.split, ORDER),
            ("classes", "class_names"): (self._checked_classes(), class_data),
            ("templates", "templates"): (self._read_templates(), ("zero_shot",)),
            ("train-split", "train_split"): (self.train_split, PROBES),
            ("shots", "shots"): (self.shots, ("linear_probe",)),
            ("k", "k"): (self.k, ("knn",)),
        }
        changes: dict[str, dict[str, Any]] = {name: {} for name in names}
        for (option, setting), (value, takers) in given.items():
            takers = [name for name in takers if name in names]
            if value is not None and not takers:
                raise ConfigError(f"--{option}: is of no use for {', '.join(names)}; leave it out")
            for name in takers if value is not None else ():
                changes[name][setting] = value
        return changes

    def _checked_classes(self) -> str | None:
        if self.classes is not None:
            read_class_names(Path(self.classes), option="--classes")
        return self.classes

    def _read_templates(self) -> list[str] | None:
        if self.templates is None:
            return None
        return read_templates(Path(self.templates), option="--templates")


def evaluation_config(
    model: str,
    data_spec: str | None,
    task: str | None = None,
    *,
    config: Path | None = None,
    arch: str | None = None,
    overrides: Sequence[str] = (),
    out: str | None = None,
    wishes: Wishes = Wishes(),
) -> Config:
    """The settings of `leanclip eval`.

    They come from `config`, else from the run that `model` is the folder of, else from what is
    stored with the weights. `data_spec` is LAYOUT:ROOT; without one the settings say what is
    measured. "all" measures what the data allows; no task, what of it needs no labels to learn
    from.

    Raises:
        ConfigError: an unknown task or layout, or nothing says what to evaluate on.
        DataError: a file that `wishes` names cannot be used.
        WeightsError: the weights cannot be read.
    """
    if task is not None and task not in TASKS:
        raise ConfigError(f"--task {task}: no such task; known: {', '.join(TASKS)}")
    out = out or str(Path("runs") / f"eval-{Path(model).name}")
    settings = _settings(model, data_spec, config, arch, overrides, out)
    evaluate = to_plain(settings.evaluate)
    if data_spec is not None:
        layout, root = split_source(data_spec, option="--data")
        split = wishes.split or _default_split(layout, root)
        wanted = {"layout": layout, "root": root, "split": split}
        names = _allowed(settings.data, layout, task, EvaluationData.model_validate(wanted))
        changes = wishes.settings(names)
        evaluate |= {name: wanted | changes[name] for name in names}
    else:
        names = tuple(name for name in TASKS[task or "all"] if evaluate[name] is not None)
        if not names:
            raise ConfigError(
                f"--task {task or 'all'}: {config or model} has no such evaluation; give --data "
                f"LAYOUT:ROOT"
            )
        changes = wishes.settings(names)
        evaluate |= {name: evaluate[name] | changes[name] for name in names}
    evaluate |= {name: None for name in ORDER if name not in names}
    if data_spec is not None or task not in (None, "all"):
        evaluate["guard"] = None
    values = to_plain(settings) | {"evaluate": evaluate}
    return parse(Config, values, where="leanclip eval")


def _default_split(layout: str, root: str) -> str | None:
    """A split to measure on, where the root has folders of splits and none is named."""
    if layout not in ("folder", "pairs", "shards"):
        return None
    found = find_splits(parse(SourceConfig, {"layout": layout, "root": root}, where="--data"))
    if "train" not in found:
        return None
    return next((name for name in HELD_OUT if name in found), None)


def _settings(
    model: str,
    data_spec: str | None,
    config: Path | None,
    arch: str | None,
    overrides: Sequence[str],
    out: str,
) -> Config:
    """Of a config file, of the run's folder, or those that are stored with the weights."""
    run_config = Path(model) / "config.yaml"
    if config is None and run_config.is_file():
        config = run_config
    if config is not None:
        return load_config(config, overrides, load=model, load_arch=arch, output_dir=out)
    if data_spec is None:
        raise ConfigError("--data: say what to evaluate on, as LAYOUT:ROOT, or give -c CONFIG")
    if overrides:
        raise ConfigError("-o: changes the settings of a config; give one with -c CONFIG")
    return _stored_config(model, *split_source(data_spec, option="--data"), out, arch)


def _allowed(
    data: DataConfig, layout: str, task: str | None, wanted: EvaluationData
) -> tuple[str, ...]:
    """The tasks that are meant, of those that the data allows."""
    if task not in (None, "all"):
        return TASKS[task]
    allowed = MEASURABLE.get(layout) or (_task_of(data, wanted),)
    if task == "all" and "zero_shot" in allowed:
        there = _evaluation_data(data, wanted, "zero_shot")
        if "train" in find_splits(there) and layout != "shapes":
            return (*allowed, *PROBES)
        log.info(
            "%s: no split to learn from, so no probes (with --task knn: of a half)", there.root
        )
    return allowed


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
    used = _split_in_use(trained)
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
