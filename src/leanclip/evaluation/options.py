"""What to evaluate, by words on the command line: from those and stored settings to a `Config`.

--model, --data, --task and more -> evaluation_config -> Config -> `open_tasks`
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanclip.config.data import DataConfig
from leanclip.config.evaluation import EvaluationData
from leanclip.config.schema import Config, apply_override, load_config
from leanclip.config.sections import parse, to_plain
from leanclip.data import open_dataset, split_source
from leanclip.data.dataset import read_class_names, read_templates
from leanclip.data.splits import find_splits
from leanclip.errors import ConfigError
from leanclip.evaluation.tasks import MEASURABLE, ORDER, PROBES, data_of
from leanclip.weights import read_weights

log = logging.getLogger("leanclip")

TASKS: dict[str, tuple[str, ...]] = {  # by their names on the command line
    "zeroshot": ("zero_shot",),
    "retrieval": ("retrieval",),
    "linear-probe": ("linear_probe",),
    "knn": ("knn",),
    "all": ORDER,
}


@dataclass(frozen=True)
class EvalOptions:
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
    wishes: EvalOptions = EvalOptions(),
) -> Config:
    """The settings of `leanclip eval`.

    They come from `config`, else from the run that `model` is the folder of, else from what is
    stored with the weights. `data_spec` is FORMAT:ROOT; without one the settings say what is
    measured. "all" measures what the data allows; no task, what of it needs no labels to learn
    from.

    Raises:
        ConfigError: an unknown task or format, or nothing says what to evaluate on.
        DataError: a file that `wishes` names cannot be used.
        WeightsError: the weights cannot be read.
    """
    if task is not None and task not in TASKS:
        raise ConfigError(f"--task {task}: no such task; known: {', '.join(TASKS)}")
    out = out or str(Path("runs") / f"eval-{Path(model).name}")
    settings = _settings(model, data_spec, config, arch, overrides, out)
    evaluate = to_plain(settings.evaluate)
    if data_spec is not None:
        format, root = split_source(data_spec, option="--data")
        place = {"format": format, "root": root}
        place |= {} if wishes.split is None else {"split": wishes.split}
        every = _overridden(overrides, TASKS[task] if task else ORDER)
        common = {key: value for one in every.values() for key, value in one.items()}
        common = {key: common[key] for key in EvaluationData.model_fields if key in common}
        wanted = parse(EvaluationData, common | place, where="-o")
        names = _allowed(settings.data, format, task, wanted)
        changes, own = wishes.settings(names), _overridden(overrides, names)
        evaluate |= {name: own[name] | place | changes[name] for name in names}
    else:
        names = tuple(name for name in TASKS[task or "all"] if evaluate[name] is not None)
        if not names:
            raise ConfigError(
                f"--task {task or 'all'}: {config or model} has no such evaluation; give --data "
                f"FORMAT:ROOT"
            )
        changes = wishes.settings(names)
        evaluate |= {name: evaluate[name] | changes[name] for name in names}
    evaluate |= {name: None for name in ORDER if name not in names}
    if data_spec is not None or task not in (None, "all"):
        evaluate["retention"] = None
    values = to_plain(settings) | {"evaluate": evaluate}
    return parse(Config, values, where="leanclip eval")


def _overridden(overrides: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What overrides set for data that is named apart from the config, by task.

    `data.KEY` is meant for all of them, `evaluate.TASK.KEY` for one. Of the tasks that are not in
    `names` nothing may be set.

    Raises:
        ConfigError: something is.
    """
    values: dict[str, Any] = {"data": {}, "evaluate": {}}
    for override in overrides:
        apply_override(values, override)
    data, tasks = values["data"] or {}, values["evaluate"] or {}
    for name in ORDER:
        if tasks.get(name) and name not in names:
            raise ConfigError(
                f"-o evaluate.{name}: is of no use, only {', '.join(names)} is measured; leave it "
                f"out"
            )
    shared = {key: data[key] for key in EvaluationData.model_fields if key in data}
    return {name: shared | (tasks.get(name) or {}) for name in names}


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
        raise ConfigError("--data: say what to evaluate on, as FORMAT:ROOT, or give -c CONFIG")
    source = split_source(data_spec, option="--data")
    return _stored_config(model, *source, out, arch, overrides)


def _allowed(
    data: DataConfig, format: str, task: str | None, wanted: EvaluationData
) -> tuple[str, ...]:
    """The tasks that are meant, of those that the data allows."""
    if task not in (None, "all"):
        return TASKS[task]
    allowed = MEASURABLE.get(format) or (_task_of(data, wanted),)
    if task == "all" and "zero_shot" in allowed:
        there = data_of(data, wanted, "zero_shot")
        if "train" in find_splits(there) and format != "shapes":
            return (*allowed, *PROBES)
        log.info(
            "%s: no split to learn from, so no probes (with --task knn: of a half)", there.root
        )
    return allowed


def _task_of(data: DataConfig, wanted: EvaluationData) -> str:
    """Zero-shot for class data, retrieval for captions."""
    dataset = open_dataset(data_of(data, wanted, "zero_shot"))
    return "zero_shot" if dataset.classes else "retrieval"


def _stored_config(
    model: str, format: str, root: str, out: str, arch: str | None, overrides: Sequence[str]
) -> Config:
    """Settings for weights that carry their architecture with them, or have it named."""
    weights = read_weights(model, arch=arch)
    if weights.model is None or weights.preprocess is None:
        raise ConfigError(
            f"--model {model}: does not say its architecture; say it with --arch, or give the "
            f"config it was trained with: -c"
        )
    data: dict[str, Any] = {"format": format, "root": root}
    data |= {"mean": weights.preprocess.mean, "std": weights.preprocess.std}
    values = {"model": to_plain(weights.model), "data": data, "load": model}
    values |= {"load_arch": arch, "output_dir": out}
    for override in overrides:
        apply_override(values, override)
    return parse(Config, values, where="leanclip eval")
