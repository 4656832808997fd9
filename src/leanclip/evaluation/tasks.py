"""What to evaluate: from the sections `data` and `evaluate` to opened data sets."""

import logging
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from leanclip.config.data import DataConfig
from leanclip.config.evaluation import EvaluateConfig, EvaluationData, NeighbourData, ProbeData
from leanclip.data import Dataset, open_dataset, source_configs
from leanclip.data.splits import default_split, find_splits, training_split
from leanclip.errors import ConfigError, DataError

log = logging.getLogger("leanclip")

RETENTION = "retention/"  # prefix of the retention benchmark's metrics, results and data
VALIDATION = ("val", "valid", "validation", "dev")  # where a linear probe chooses its L2 strength
PROBES = ("linear_probe", "knn")
ORDER = ("retrieval", "zero_shot", *PROBES)  # of tasks in a report
MEASURABLE = {  # tasks by data format; for other formats the data decides
    "shapes": ("retrieval", "zero_shot"),
    "food101": ("zero_shot",),
    "folder": ("zero_shot",),
    "pairs": ("retrieval",),
}
METRICS = {  # by task, those for which higher is better
    "retrieval": tuple(
        f"{way}_R@{k}" for k in (1, 5, 10) for way in ("image_to_text", "text_to_image")
    ),
    "zero_shot": ("zeroshot_top1", "zeroshot_top5", "zeroshot_mean_per_class"),
    "linear_probe": ("linear_probe_top1", "linear_probe_top5", "linear_probe_mean_per_class"),
    "knn": ("knn_top1", "knn_top5", "knn_mean_per_class"),
}
HEADLINES = {task: names[0] for task, names in METRICS.items()}  # each task's main metric


class Part(NamedTuple):
    """Another split of a task's data."""

    data: DataConfig
    dataset: Dataset


@dataclass(frozen=True)
class Task:
    """One evaluation: which metrics, on which data."""

    name: str  # one of ORDER
    data: DataConfig
    dataset: Dataset
    limit: int | None
    batch_size: int
    train: Part | None = None  # of a probe; None: half of each class of the data itself
    validation: Part | None = None  # of a linear probe; None: a fifth of each class of `train`
    shots: int | None = None
    k: int = 0
    probabilities: str | None = None  # of zero-shot classification; None: the model's own


def open_tasks(data: DataConfig, settings: EvaluateConfig) -> list[Task]:
    """Open the data sets of `evaluate.zero_shot`, `retrieval`, `linear_probe` and `knn`.

    Raises:
        DataError: one is missing or empty, or a probe's splits have different classes.
        ConfigError: zero-shot on data without classes, or retrieval on data without captions.
    """
    chosen = ((name, getattr(settings, name)) for name in ORDER)
    return [
        _open_task(data, own, name, settings.batch_size) for name, own in chosen if own is not None
    ]


def open_retention(data: DataConfig, settings: EvaluateConfig) -> Task | None:
    """Open the data set of `evaluate.retention`: zero-shot if it has classes, else retrieval.

    Raises:
        DataError: it is missing or empty.
    """
    if settings.retention is None:
        return None
    own = _retention_data(data, settings.retention)
    dataset = open_dataset(own)
    name = "zero_shot" if dataset.classes else "retrieval"
    return Task(name, own, dataset, settings.retention.limit, settings.batch_size)


def other_split(task: Task, split: str, setting: str) -> Part:
    """Open another split of a task's data, which must have the same classes.

    Raises:
        DataError: it does not; the message begins with `setting`.
    """
    data = task.data.model_copy(update={"split": split})
    part = Part(data, open_dataset(data))
    here, there = list(task.dataset.classes), list(part.dataset.classes)
    if here == there:
        return part
    where = f"{data.root}, split {training_split(task.data)}"
    missing = [name for name in there if name not in here]
    if not missing:
        missing, where = [n for n in here if n not in there], f"{data.root}, split {split}"
    if not missing:
        raise DataError(f"{setting}: {data.root}: its splits list their classes in another order")
    advice = "make an empty folder for each" if data.format == "folder" else "remove them from both"
    raise DataError(
        f"{setting}: {where}: {len(missing)} of the classes of the other split are missing "
        f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); {advice}, or name all "
        f"classes in one file, one per line in label order (--classes, or class_names)"
    )


def evaluation_data(data: DataConfig, settings: EvaluateConfig) -> list[DataConfig]:
    """The data sets of the section `evaluate`, as `data` sections."""
    chosen = ((name, getattr(settings, name)) for name in ORDER)
    found = [data_of(data, own, name) for name, own in chosen if own is not None]
    return [*found, _retention_data(data, settings.retention)] if settings.retention else found


def data_of(
    data: DataConfig, settings: EvaluationData, task: str, *, setting: str | None = None
) -> DataConfig:
    """The `data` section with the values of an evaluation; `setting` is the evaluation's key.

    Raises:
        ConfigError: `data` is a mixture and the evaluation does not name a format.
    """
    format = settings.format or data.format
    if format == "mixture":
        raise ConfigError(
            f"evaluate.{setting or task}.format: data is a mixture; give a format and a root to "
            f"evaluate on"
        )
    root = settings.root or data.root
    trained = _trained(data, format, root)
    place = {"format": format, "root": root, "split": settings.split}
    if settings.split is None:
        used = [split for split in map(training_split, trained) if split is not None]
        here = data.model_copy(update=place | {"sources": ()})
        place["split"] = default_split(here, task, used=used)
    changes = {
        **place,
        "templates": settings.templates,
        **_columns(settings, trained[0] if trained else None),
        "sources": (),
        "epoch_size": None,
        "streaming": False,  # it is read in order, by index
    }
    return data.model_copy(update=changes)


def _open_task(data: DataConfig, settings: EvaluationData, name: str, batch_size: int) -> Task:
    own = data_of(data, settings, name)
    dataset = open_dataset(own)
    if _is_training(data, settings, own):
        log.warning("evaluate.%s: uses the training data", name)
    if bool(dataset.classes) != (name != "retrieval"):
        has, needs = (
            ("no classes", "class data (a folder, food101 or shapes, or labels in a table)")
            if name != "retrieval"
            else ("classes, not captions", "captions (pairs or shapes, or a table's)")
        )
        raise ConfigError(
            f"evaluate.{name}: {own.root} (format {own.format}) has {has}; name a data set with "
            f"{needs}, or set evaluate.{name} to null"
        )
    task = Task(
        name, own, dataset, settings.limit, batch_size, probabilities=settings.probabilities
    )
    if isinstance(settings, ProbeData):
        task = replace(task, shots=settings.shots)
    elif isinstance(settings, NeighbourData):
        task = replace(task, k=settings.k)
    else:
        return task
    found, used, split = find_splits(own), training_split(own), settings.train_split
    if split is None and "train" in found and used != "train" and own.format != "shapes":
        split = "train"
    if split is None:
        return task
    task = replace(task, train=other_split(task, split, f"evaluate.{name}"))
    validation = next((one for one in VALIDATION if one in found and one not in (used, split)), "")
    if validation and name == "linear_probe":
        part = other_split(task, validation, f"evaluate.{name}")
        task = replace(task, validation=part)
    return task


def _retention_data(data: DataConfig, settings: EvaluationData) -> DataConfig:
    """The `data` section of the retention benchmark; of `shapes` the zero-shot split."""
    allowed = MEASURABLE.get(settings.format or data.format, ())
    task = "zero_shot" if "zero_shot" in allowed else "retrieval"
    return data_of(data, settings, task, setting="retention")


def _trained(data: DataConfig, format: str, root: str) -> list[DataConfig]:
    """The parts of the training data that are read from a root."""
    sources = (data, *source_configs(data))
    return [one for one in sources if (one.format, one.root) == (format, root)]


def _is_training(data: DataConfig, settings: EvaluationData, chosen: DataConfig) -> bool:
    """Whether an evaluation without a split of its own uses the training data."""
    if settings.split is not None:
        return False
    trained = _trained(data, chosen.format, chosen.root)
    if settings.root is not None and not data.sources:
        # For weights without a config, `data` is the data to evaluate on.
        trained = [one for one in trained if one.split is not None]
    return training_split(chosen) in map(training_split, trained)


def _columns(settings: EvaluationData, trained: DataConfig | None) -> dict[str, Any]:
    """The settings of columns and labels: the evaluation's own, else training's for the root."""
    names = (
        "class_names",
        "image_column",
        "one_caption_per_line",
        "caption_column",
        "label_column",
    )
    given = {name: getattr(settings, name) for name in names}
    if trained is None:
        return given | {"one_caption_per_line": given["one_caption_per_line"] is not False}
    sets_texts = settings.caption_column is not None or settings.label_column is not None
    inherited = names[:3] if sets_texts else names
    return given | {name: getattr(trained, name) for name in inherited if given[name] is None}
