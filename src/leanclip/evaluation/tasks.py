"""What to evaluate: from settings to opened data sets."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from leanclip.config.schema import Config, DataConfig, EvaluationData, NeighbourData, ProbeData
from leanclip.data import Dataset, open_dataset, source_configs
from leanclip.data.splits import find_splits
from leanclip.errors import ConfigError, DataError, one_line
from leanclip.preprocess.images import warn_not_shown

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
    found = [data_of(config.data, wanted, name) for name, wanted in named if wanted]
    return [*found, _guard_data(config, settings.guard)] if settings.guard else found


def data_of(
    data: DataConfig, wanted: EvaluationData, task: str, *, setting: str | None = None
) -> DataConfig:
    """The `data` section with what an evaluation sets of its own; `setting` is its name.

    Raises:
        ConfigError: `data` is a mixture and the evaluation does not say another place.
    """
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
    return data_of(config.data, wanted, task, setting="guard")


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
