"""What to evaluate: from settings to opened data sets."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from leanclip.config.data import DataConfig
from leanclip.config.evaluation import EvaluationData, NeighbourData, ProbeData
from leanclip.config.schema import Config
from leanclip.data import Dataset, open_dataset, source_configs
from leanclip.data.splits import default_split, find_splits, split_in_use
from leanclip.errors import ConfigError, DataError, one_line
from leanclip.preprocess.images import warn_not_shown

log = logging.getLogger("leanclip")

VALIDATION = ("val", "valid", "validation", "dev")  # where a probe chooses its settings
PROBES = ("linear_probe", "knn")
ORDER = ("retrieval", "zero_shot", *PROBES)  # of tasks in a report
MEASURABLE = {  # what a format's data allows; of the others the data itself says
    "shapes": ("retrieval", "zero_shot"),
    "food101": ("zero_shot",),
    "folder": ("zero_shot",),
    "pairs": ("retrieval",),
}
METRICS = {  # of each task, those of which higher is better
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

    def image(self, index: int) -> Path | bytes:
        """The image of a sample, to be shown; no bytes, with a warning, where it is gone."""
        try:
            return self.dataset[index].image
        except Exception as error:  # of many libraries; the metrics are there, whatever it is
            warn_not_shown(f"{self.dataset.name(index)}: {one_line(error)}")
            return b""


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
        data = data_of(config.data, wanted, name)
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
                f"evaluate.{name}: {data.root} (format {data.format}) has {has}; name a data set "
                f"with {needs}, or set evaluate.{name} to null"
            )
        task = Task(name, data, dataset, wanted.limit, config.evaluate.batch_size)
        tasks.append(_with_parts(task, wanted))
    return tasks


def _with_parts(task: Task, wanted: EvaluationData) -> Task:
    """A probe's task with what it learns from."""
    if not isinstance(wanted, ProbeData | NeighbourData):
        return task
    found, used = find_splits(task.data), split_in_use(task.data)
    split = wanted.train_split
    if split is None and "train" in found and used != "train" and task.data.format != "shapes":
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
    check_classes(f"evaluate.{task.name}", task, data, dataset)
    return Part(data, dataset)


def check_classes(setting: str, task: Task, data: DataConfig, dataset: Dataset) -> None:
    """That another split has the classes of the one that is measured.

    Raises:
        DataError: it has others; the message names some, and what to do.
    """
    here, there = list(task.dataset.classes), list(dataset.classes)
    if here == there:
        return
    where = f"{data.root}, split {split_in_use(task.data)}"
    lacking = [name for name in there if name not in here]
    if not lacking:
        lacking, where = [n for n in here if n not in there], f"{data.root}, split {data.split}"
    if not lacking:
        raise DataError(f"{setting}: {data.root}: the classes of its splits are in other orders")
    advice = (
        "make an empty folder for each" if data.format == "folder" else "leave them out of both"
    )
    raise DataError(
        f"{setting}: {where}: lacks {len(lacking)} of the classes of the other split "
        f"({', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}); {advice}, or name all "
        f"classes in one file, one a line in their order (--classes, or class_names)"
    )


def open_retention(config: Config) -> Task | None:
    """Open the data set that `evaluate.retention` names: zero-shot where it has classes.

    Raises:
        DataError: it is missing or empty.
    """
    wanted = config.evaluate.retention
    if wanted is None:
        return None
    data = _retention_data(config, wanted)
    dataset = open_dataset(data)
    name = "zero_shot" if dataset.classes else "retrieval"
    return Task(name, data, dataset, wanted.limit, config.evaluate.batch_size)


def evaluation_data(config: Config) -> list[DataConfig]:
    """The data sets that `evaluate` names, as `data` sections."""
    settings = config.evaluate
    named = ((name, getattr(settings, name)) for name in ORDER)
    found = [data_of(config.data, wanted, name) for name, wanted in named if wanted]
    return [*found, _retention_data(config, settings.retention)] if settings.retention else found


def data_of(
    data: DataConfig, wanted: EvaluationData, task: str, *, setting: str | None = None
) -> DataConfig:
    """The `data` section with what an evaluation sets of its own; `setting` is its name.

    Raises:
        ConfigError: `data` is a mixture and the evaluation does not say another place.
    """
    format = wanted.format or data.format
    if format == "mixture":
        raise ConfigError(
            f"evaluate.{setting or task}.format: data is a mixture; say a format and a root to "
            f"evaluate on"
        )
    root = wanted.root or data.root
    trained = _trained(data, format, root)
    place = {"format": format, "root": root, "split": wanted.split}
    if wanted.split is None:
        used = [split for split in map(split_in_use, trained) if split is not None]
        here = data.model_copy(update=place | {"sources": ()})
        place["split"] = default_split(here, task, used=used)
    changes = {
        **place,
        "templates": wanted.templates,
        **_columns(wanted, trained[0] if trained else None),
        "sources": (),
        "epoch_size": None,
        "streaming": False,  # it is read in order, by index
    }
    return data.model_copy(update=changes)


def _retention_data(config: Config, wanted: EvaluationData) -> DataConfig:
    """The `data` section of the retention benchmark: where both tasks fit, the zero-shot split."""
    allowed = MEASURABLE.get(wanted.format or config.data.format, ())
    task = "zero_shot" if "zero_shot" in allowed else "retrieval"
    return data_of(config.data, wanted, task, setting="retention")


def _trained(data: DataConfig, format: str, root: str) -> list[DataConfig]:
    """What training reads of a root; of a mixture it may be several splits."""
    sources = (data, *source_configs(data))
    return [one for one in sources if (one.format, one.root) == (format, root)]


def _is_training(data: DataConfig, wanted: EvaluationData, chosen: DataConfig) -> bool:
    """Whether an evaluation that does not say so measures on what training uses."""
    if wanted.split is not None:
        return False
    trained = _trained(data, chosen.format, chosen.root)
    if wanted.root is not None and not data.sources:
        # Of weights without a config, `data` is what shall be measured.
        trained = [one for one in trained if one.split is not None]
    return split_in_use(chosen) in map(split_in_use, trained)


def _columns(wanted: EvaluationData, trained: DataConfig | None) -> dict[str, Any]:
    """What columns and labels mean: as the evaluation says, else as for training's root."""
    names = (
        "class_names",
        "image_column",
        "one_caption_per_line",
        "caption_column",
        "label_column",
    )
    given = {name: getattr(wanted, name) for name in names}
    if trained is None:
        return given | {"one_caption_per_line": given["one_caption_per_line"] is not False}
    says_texts = wanted.caption_column is not None or wanted.label_column is not None
    inherited = names[:3] if says_texts else names
    return given | {name: getattr(trained, name) for name in inherited if given[name] is None}
