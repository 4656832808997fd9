"""What eval, compare and interpolate evaluate: from options and stored settings to a `Config`.

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
from leanclip.weights import read_weights, stored_architecture

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
    """The options of `leanclip eval` about its data; None: not given."""

    split: str | None = None
    classes: str | None = None  # a file
    templates: str | None = None  # a file
    train_split: str | None = None
    shots: int | None = None
    k: int | None = None

    def settings(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The settings that they change, by task of `names`.

        Raises:
            ConfigError: an option that applies to none of these tasks.
            DataError: a file of names or templates is missing or invalid.
        """
        class_data = ("zero_shot", *PROBES)
        templates = None
        if self.classes is not None:
            read_class_names(Path(self.classes), option="--classes")
        if self.templates is not None:
            templates = read_templates(Path(self.templates), option="--templates")
        given = {
            ("split", "split"): (self.split, ORDER),
            ("classes", "class_names"): (self.classes, class_data),
            ("templates", "templates"): (templates, ("zero_shot",)),
            ("train-split", "train_split"): (self.train_split, PROBES),
            ("shots", "shots"): (self.shots, ("linear_probe",)),
            ("k", "k"): (self.k, ("knn",)),
        }
        changes: dict[str, dict[str, Any]] = {name: {} for name in names}
        for (option, setting), (value, tasks) in given.items():
            tasks = [name for name in tasks if name in names]
            if value is not None and not tasks:
                raise ConfigError(f"--{option}: does not apply to {', '.join(names)}; leave it out")
            for name in tasks if value is not None else ():
                changes[name][setting] = value
        return changes


def evaluation_config(
    model: str,
    data_spec: str | None,
    task: str | None = None,
    *,
    config: Path | None = None,
    arch: str | None = None,
    overrides: Sequence[str] = (),
    out: str | None = None,
    options: EvalOptions = EvalOptions(),
) -> Config:
    """The settings of an evaluation.

    They come from `config`, else from the run in the folder `model`, else from the weights.
    `data_spec` is FORMAT:ROOT; without one, the settings name the data. The task "all" stands for
    all that the data allows, None for those that need no labels to learn from.

    Raises:
        ConfigError: an unknown task or format, or no data is named.
        DataError: a file that `options` name cannot be used.
        WeightsError: the weights cannot be read.
    """
    if task is not None and task not in TASKS:
        raise ConfigError(f"--task {task}: no such task; known: {', '.join(TASKS)}")
    out = out or str(Path("runs") / f"eval-{Path(model).name}".replace("::", "-"))
    settings = _settings(model, data_spec, config, arch, overrides, out)
    evaluate = to_plain(settings.evaluate)
    if data_spec is not None:
        format, root = split_source(data_spec, option="--data")
        place = {"format": format, "root": root}
        place |= {} if options.split is None else {"split": options.split}
        every = _overridden(overrides, TASKS[task] if task else ORDER)
        common = {key: value for one in every.values() for key, value in one.items()}
        common = {key: common[key] for key in EvaluationData.model_fields if key in common}
        wanted = parse(EvaluationData, common | place, where="-o")
        names = _allowed(settings.data, format, task, wanted)
        changes, own = options.settings(names), _overridden(overrides, names)
        evaluate |= {name: own[name] | place | changes[name] for name in names}
    else:
        names = tuple(name for name in TASKS[task or "all"] if evaluate[name] is not None)
        if not names:
            raise ConfigError(
                f"--task {task or 'all'}: {config or model} has no such evaluation; give --data "
                f"FORMAT:ROOT"
            )
        changes = options.settings(names)
        evaluate |= {name: evaluate[name] | changes[name] for name in names}
    evaluate |= {name: None for name in ORDER if name not in names}
    if data_spec is not None or task not in (None, "all"):
        evaluate["retention"] = None
    return parse(Config, to_plain(settings) | {"evaluate": evaluate}, where="leanclip eval")


def _overridden(overrides: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The overrides that apply to the data of `--data`, by task of `names`.

    `data.KEY` applies to all tasks, `evaluate.TASK.KEY` to one.

    Raises:
        ConfigError: one applies to a task that is not in `names`.
    """
    values: dict[str, Any] = {"data": {}, "evaluate": {}}
    for override in overrides:
        apply_override(values, override)
    data, tasks = values["data"] or {}, values["evaluate"] or {}
    for name in ORDER:
        if tasks.get(name) and name not in names:
            raise ConfigError(
                f"-o evaluate.{name}: has no effect, only {', '.join(names)} is evaluated; leave "
                f"it out"
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
    """The settings of a config file, of the run's folder, or stored with the weights."""
    run_config = Path(model) / "config.yaml"
    if config is None and run_config.is_file():
        config = run_config
    if config is not None:
        return load_config(
            config,
            overrides,
            architecture_of=stored_architecture,
            load=model,
            load_arch=arch,
            output_dir=out,
        )
    if data_spec is None:
        raise ConfigError("--data: missing; give FORMAT:ROOT, or a config with -c CONFIG")
    format, root = split_source(data_spec, option="--data")
    weights = read_weights(model, arch=arch)
    if weights.model is None or weights.preprocess is None:
        raise ConfigError(
            f"--model {model}: does not include its architecture; give --arch, or the config it "
            f"was trained with: -c"
        )
    data: dict[str, Any] = {"format": format, "root": root}
    data |= {"mean": weights.preprocess.mean, "std": weights.preprocess.std}
    values = {"model": to_plain(weights.model), "data": data, "load": model}
    values |= {"load_arch": arch, "output_dir": out}
    for override in overrides:
        apply_override(values, override)
    return parse(Config, values, where="leanclip eval")


def _allowed(
    data: DataConfig, format: str, task: str | None, wanted: EvaluationData
) -> tuple[str, ...]:
    """The tasks that are asked for and that the data allows."""
    if task not in (None, "all"):
        return TASKS[task]
    allowed = MEASURABLE.get(format)
    if allowed is None:
        dataset = open_dataset(data_of(data, wanted, "zero_shot"))
        allowed = ("zero_shot" if dataset.classes else "retrieval",)
    if task == "all" and "zero_shot" in allowed:
        there = data_of(data, wanted, "zero_shot")
        if "train" in find_splits(there) and format != "shapes":
            return (*allowed, *PROBES)
        log.info("%s: no train split, so no probes (--task knn uses half of it)", there.root)
    return allowed
