"""The best checkpoint, the end of a run that gains no more, and the retention benchmark."""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, assert_refused, make_pairs, noise_image, ranks_of

import leanclip
from leanclip import CLIP, Preprocess
from leanclip.api import train
from leanclip.config.schema import load_config
from leanclip.evaluation import METRICS, retrieval_metrics
from leanclip.evaluation.results import Report
from leanclip.io.files import read_metrics
from leanclip.report.text import retention_sentence
from leanclip.training import checkpoint
from leanclip.training.checkpoint import Best
from leanclip.training.plan import Plan, make_plan
from leanclip.training.schedule import (
    improved,
    is_due,
    learning_rate_at,
    should_stop,
    update_best,
)
from leanclip.weights import save_weights

Command = Callable[..., subprocess.CompletedProcess[str]]
R1 = "image_to_text_R@1"
EARLY = [
    "train", "-c", "config.yaml", "-o", "evaluate.every_epochs=1", "-o", "train.epochs=12",
    "-o", f"checkpoint.best_metric={R1}", "-o", "evaluate.patience=3",
    "-o", "optimizer.learning_rate=1e-9", "-o", "checkpoint.every_epochs=null",
]  # fmt: skip


def write_base(folder: Path) -> None:
    folder.mkdir()
    torch.manual_seed(11)
    model = CLIP(**TINY)
    save_weights(folder, model.state_dict(), model.config, Preprocess(32))


def make_classes(root: Path) -> None:
    for label, name in enumerate(("ant", "bee", "cow")):
        (root / name).mkdir(parents=True)
        for i in range(3):
            noise_image(10 * label + i).save(root / name / f"{i}.png")


def plan_of(*overrides: str) -> Plan:
    return make_plan(load_config("config.yaml", overrides), torch.device("cpu"))


def checkpoints_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def test_metrics_have_the_names_that_settings_may_use() -> None:
    names = [n for n in retrieval_metrics(torch.eye(2), torch.arange(2)) if "rank" not in n]
    assert METRICS["retrieval"] == tuple(names)
    names = ("top1", "top5", "mean_per_class")
    assert METRICS["zero_shot"] == tuple(f"zeroshot_{name}" for name in names)


def test_the_best_is_the_first_of_equals_and_counts_what_came_after(workplace: Path) -> None:
    plan = plan_of(f"checkpoint.best_metric={R1}", "evaluate.patience=2", "evaluate.every_epochs=1")
    best, ends = None, []
    for step, value in enumerate((0.2, 0.5, 0.4, 0.6, 0.6, 0.1), start=1):
        best = update_best(plan, best, {R1: value}, step)
        ends.append((improved(plan, best), should_stop(plan, best)))
    assert best == Best(R1, 0.6, 4, 2)
    assert [news for news, _ in ends] == [True, True, False, True, False, True]
    assert [end for _, end in ends] == [False] * 5 + [True]
    other = Best("zeroshot_top1", 0.9, 6, 8)  # of a run that went by another metric
    assert not should_stop(plan, other)
    assert update_best(plan, other, {R1: 0.1}, 7) == Best(R1, 0.1, 7, 0)
    assert update_best(plan_of(), None, {R1: 0.1}, 7) is None


def test_what_is_due_follows_the_data_after_a_change_of_the_batch_size(workplace: Path) -> None:
    plan = replace(plan_of("train.epochs=4"), offset=5)  # five steps more than at this batch size
    size, last = plan.steps_per_epoch, plan.last_step
    assert last == 4 * size + 5
    every_two_epochs = [step for step in range(5, last + 1) if is_due(step, plan, 2)]
    assert every_two_epochs == [5, 5 + 2 * size, last]
    assert [step for step in range(1, 9) if is_due(step, plan, None, 4)] == [4, 8]
    assert not is_due(last - 1, plan, None)
    assert is_due(last, plan, None)
    unchanged = replace(plan, offset=0)
    rates = [learning_rate_at(unchanged, step) for step in range(4 * size)]
    assert [learning_rate_at(plan, step + 5) for step in range(4 * size)] == rates
    assert len(set(rates)) > 1


def test_a_run_without_gain_ends_and_keeps_its_best(command: Command, workplace: Path) -> None:
    done = command(*EARLY)
    assert done.returncode == 0, done.stderr
    run = workplace / "runs/config"
    # Nothing moves at this rate: the first evaluation is the best, and three follow.
    assert checkpoints_of(run) == ["step-00000003", "step-00000012"]
    assert (run / "checkpoints/best").read_text() == "step-00000003\n"
    assert (run / "checkpoints/latest").read_text() == "step-00000012\n"
    assert "stopped early at step 12: no improvement" in done.stderr
    assert "Best:     runs/config/checkpoints/step-00000003" in done.stdout
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    leanclip.load(run / "checkpoints/step-00000003")
    again = command(*EARLY)  # it has ended, and stays so
    assert again.returncode == 0, again.stderr
    assert checkpoints_of(run) == ["step-00000003", "step-00000012"]
    assert max(line["step"] for line in read_metrics(run)) == 12


def test_a_run_that_goes_on_goes_on_counting(command: Command, workplace: Path) -> None:
    command(*EARLY, "-o", "train.epochs=3", "--output-dir", "a")
    progress = checkpoint.last_progress(workplace / "a/checkpoints")
    assert progress is not None
    assert progress.best is not None
    assert (progress.step, progress.best.step, progress.best.since) == (9, 3, 2)
    more = [*EARLY, "--output-dir", "b"]
    command(*more, "-o", "checkpoint.every_epochs=1")
    shutil.rmtree(workplace / "b/checkpoints/step-00000012")
    again = command(*more, "-o", "checkpoint.every_epochs=1")
    assert "resuming from b/checkpoints/step-00000009" in again.stderr
    assert "stopped early at step 12: no improvement" in again.stderr


def test_the_best_outlives_newer_ones(tmp_path: Path) -> None:
    model = CLIP(**TINY)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(1, 6):
        best = Best("m", 0.5, 2 if step > 1 else 1, max(0, step - 2))
        progress = checkpoint.Progress(step, 0, step, step, [], 1.0, best=best)
        checkpoint.save(tmp_path, progress, model, optimizer, Preprocess(32), keep=2)
    names = sorted(path.name for path in tmp_path.glob("step-*"))
    assert names == ["step-00000002", "step-00000004", "step-00000005"]
    assert (tmp_path / "best").read_text() == "step-00000002\n"


def test_ranks_end_together(workplace: Path) -> None:
    overrides = [word for word in EARLY[3:] if word != "-o"]
    overrides += ["train.batch_size=2", "output_dir=ranks"]

    def work(rank: int) -> Any:
        outcome = train(plan_of(*overrides))
        return None if outcome is None else list(outcome.report.metrics)

    results = ranks_of(2, work, workplace)
    assert R1 in results[0]
    assert results[1] is None
    assert checkpoints_of(workplace / "ranks") == ["step-00000003", "step-00000012"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["checkpoint.best_metric=zeroshot_top1"], ["zeroshot_top1 is not evaluated", R1]),
        (["checkpoint.best_metric=x", "evaluate.retrieval=null"], ["nothing is evaluated"]),
        (["evaluate.patience=2"], ["evaluate.patience goes with checkpoint.best_metric"]),
        (["evaluate.patience=2", f"checkpoint.best_metric={R1}"], ["evaluate.every_epochs"]),
    ],
)
def test_settings_that_do_not_go_together(
    command: Command, settings: list[str], words: list[str]
) -> None:
    options = [word for setting in settings for word in ("-o", setting)]
    assert_refused(command("train", "-c", "config.yaml", *options), *words)


# --- the retention benchmark


def test_the_sentence_on_retention(workplace: Path) -> None:
    make_classes(workplace / "classes")
    plan = plan_of("evaluate.retention={format: folder, root: classes}")
    assert plan.retention is not None
    before = {"retention/zeroshot_top1": 0.612, R1: 0.5}
    after = {"retention/zeroshot_top1": 0.589, R1: 0.75}
    retention = {"retention/zero_shot": plan.retention}
    tasks = {task.name: task for task in plan.tasks} | retention

    def sentence(metrics: dict[str, float], before: dict[str, float], tasks: dict) -> str:
        return retention_sentence(Report(metrics=metrics, baseline=before, tasks=tasks))

    assert sentence(after, before, tasks) == (
        "Retention (classes): zero-shot top-1 61.2% before, 58.9% after (-2.3 points); "
        "image→text R@1 on data 50.0% before, 75.0% after (+25.0 points)."
    )
    unchanged = sentence(before | {R1: 1.0}, before, retention)
    assert unchanged == "Retention (classes): zero-shot top-1 unchanged at 61.2%."
    assert sentence(after, {}, tasks) == "Retention (classes): zero-shot top-1 58.9%."


def test_retention_is_measured_before_and_after(command: Command, workplace: Path) -> None:
    write_base(workplace / "base")
    make_classes(workplace / "classes")
    options = [
        "train", "-c", "config.yaml", "--load", "base", "-o", "evaluate.every_epochs=1",
        "-o", "evaluate.retention={format: folder, root: classes}",
        "-o", "finetune.ema_decay=0.5", "-o", "optimizer.learning_rate=0.01",
    ]  # fmt: skip
    done = command(*options, "--output-dir", "a")
    assert done.returncode == 0, done.stderr
    lines = [line for line in read_metrics(workplace / "a") if "retention/zeroshot_top1" in line]
    assert [line["step"] for line in lines] == [0, 3, 6]
    alone = command("eval", "--model", "base", "--data", "folder:classes", "--out", "e")
    assert alone.returncode == 0, alone.stderr
    base = json.loads((workplace / "e/report.json").read_text())["metrics"]
    assert lines[0]["retention/zeroshot_top1"] == base["zeroshot_top1"]
    report = json.loads((workplace / "a/report.json").read_text())
    then, now = lines[0]["retention/zeroshot_top1"], lines[-1]["retention/zeroshot_top1"]
    assert report["metrics"]["retention/zeroshot_top1"] == now
    assert report["baseline"]["retention/zeroshot_top1"] == then
    sentence = report["sentences"][-1]
    assert sentence.startswith("Retention (classes): zero-shot top-1 ")
    assert (now == then) == (f"unchanged at {now:.1%}; " in sentence)
    assert sentence in done.stdout
    # Known again when the run is taken up, and when it is only measured.
    for again in (
        command(*options, "--output-dir", "a"),
        command("train", "--resume", "a", "--evaluate-only"),
    ):
        assert sentence in again.stdout, again.stderr
        assert json.loads((workplace / "a/report.json").read_text()) == report
    assert [line["step"] for line in read_metrics(workplace / "a")].count(0) == 1


def test_retention_may_be_pairs_and_may_choose_the_best(command: Command, workplace: Path) -> None:
    make_pairs(workplace / "others", 5)
    done = command(
        "train", "-c", "config.yaml", "-o", "evaluate.retention={root: others, limit: 4}",
        "-o", "evaluate.retrieval=null", "-o", f"checkpoint.best_metric=retention/{R1}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Retention (others): image→text R@1 " in done.stdout
    assert "; " not in next(line for line in done.stdout.splitlines() if "Retention" in line)
    assert f"(retention/{R1} " in done.stdout
    assert_refused(
        command("train", "-c", "config.yaml", "-o", "evaluate.retention.root=none"),
        "data.root: no such folder: none",
    )
