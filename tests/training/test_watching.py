"""What a run shows of itself while it trains, and that looking changes nothing."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_refused, make_config, run_cli
from test_step import batch_of

from leanclip import CLIP, Preprocess
from leanclip.config.model import ModelConfig
from leanclip.config.presets import preset
from leanclip.config.schema import load_config
from leanclip.config.sections import parse
from leanclip.config.training import OptimizerConfig
from leanclip.io.files import read_metrics
from leanclip.model.cost import forward_gflops
from leanclip.training.monitor import peak_memory, write_status
from leanclip.training.optimizer import build_optimizer
from leanclip.training.plan import make_plan
from leanclip.training.step import train_step
from leanclip.training.utilisation import Utilisation, peak_teraflops

Command = Callable[..., subprocess.CompletedProcess[str]]


def stepped(*, must_measure: bool) -> tuple[CLIP, dict[str, torch.Tensor]]:
    torch.manual_seed(5)
    model = CLIP(**TINY)
    optimizer = build_optimizer(model, OptimizerConfig())
    norms = {}
    for _ in range(2):
        result = train_step(
            model,
            optimizer,
            batch_of(),
            Preprocess(32),
            rate=1e-2,
            max_gradient_norm=0.5,
            must_measure=must_measure,
        )
        norms = result.norms
    return model, norms


def test_measuring_norms_does_not_change_the_weights_by_a_bit() -> None:
    measured, norms = stepped(must_measure=True)
    plain, none = stepped(must_measure=False)
    assert none == {}
    assert len(norms) == 6
    for name, value in plain.state_dict().items():
        assert torch.equal(measured.state_dict()[name], value), name


def test_norms_by_tower_are_those_of_the_tensors() -> None:
    model = CLIP(**TINY)
    optimizer = build_optimizer(model, OptimizerConfig())
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    result = train_step(model, optimizer, batch_of(), Preprocess(32), rate=1e-2, must_measure=True)
    after = {name: p.detach().double() for name, p in model.named_parameters()}

    def norm(tensors: dict[str, torch.Tensor], is_image: bool) -> float:
        return math.sqrt(
            sum(
                float(t.square().sum())
                for name, t in tensors.items()
                if not name.startswith("logit_") and name.startswith("visual.") == is_image
            )
        )

    changes = {name: after[name] - before[name] for name in after}
    for tower, is_image in (("image", True), ("text", False)):
        assert float(result.norms[f"parameter_norm/{tower}"]) == pytest.approx(
            norm(after, is_image), rel=1e-4
        )
        assert float(result.norms[f"update_norm/{tower}"]) == pytest.approx(
            norm(changes, is_image), rel=1e-4
        )
    both = [float(result.norms[f"gradient_norm/{tower}"]) for tower in ("image", "text")]
    assert math.hypot(*both) == pytest.approx(float(result.gradient_norm), rel=1e-2)
    assert all(norm > 0 for norm in both)


def test_a_line_of_metrics_has_everything(command: Command) -> None:
    assert command("train", "-c", "config.yaml").returncode == 0
    line = next(line for line in read_metrics(Path("runs/config")) if "train/loss" in line)
    for tower in ("image", "text"):
        for what in ("gradient", "parameter", "update"):
            assert line[f"train/{what}_norm/{tower}"] > 0
    # A process that has imported torch holds more than 0.1 GB, and less than 100.
    assert 0.1 < line["train/peak_memory_gb"] < 100
    assert "train/flop_utilisation" not in line  # of a CPU nobody knows the peak


def test_a_log_without_a_terminal_shows_life(workplace: Path) -> None:
    done = run_cli("train", "-c", "config.yaml", cwd=workplace)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert lines[0].startswith("step 1 of 6, loss ")
    for words in ("images/s", "% waiting for data", " left"):
        assert words in lines[0]
    assert len(lines) < 6  # not one a step


def test_peak_memory_is_in_gigabytes() -> None:
    code = (
        "import torch; from leanclip.training.monitor import peak_memory as peak\n"
        "d = torch.device('cpu')\n"
        "before = peak(d); x = torch.ones(2**27); del x; print(peak(d) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.4 < float(done.stdout) < 0.7  # 2^27 float32 are 0.54e9 bytes
    assert peak_memory(torch.device("cpu")) > 0


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA H100 80GB HBM3", "fp32", 67.0),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H200", "fp16", 989.0),
        ("Tesla V100-SXM2-16GB", "bf16", None),  # it has no bfloat16
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA L40", "bf16", None),  # not in the table: not taken for an L4
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("", "fp32", None),
    ],
)
def test_peaks_are_found_by_the_name_of_the_device(
    name: str, precision: str, expected: float | None
) -> None:
    assert peak_teraflops(name, precision) == expected


def test_the_peak_of_float32_follows_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, exact, tf32 in (
        ("NVIDIA A100-SXM4-80GB", 19.5, 156.0),
        ("NVIDIA H200", 67.0, 494.5),
        ("Tesla T4", 8.1, 8.1),  # it has no TF32
    ):
        assert peak_teraflops(name, "fp32") == exact
        assert peak_teraflops(name, "fp32", tf32=True) == tf32
        assert peak_teraflops(name, "fp16", tf32=True) == peak_teraflops(name, "fp16")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    config = parse(ModelConfig, preset("ViT-B-32"), where="ViT-B-32")
    shares = []
    for tf32 in (False, True):
        work = Utilisation(config, torch.device("cuda"), "fp32", tf32=tf32)
        work.add(8, 77)
        shares.append(work.fraction(1.0)["train/flop_utilisation"])
    assert shares[0] / shares[1] == pytest.approx(494.5 / 67.0)


def test_shorter_texts_are_less_work() -> None:
    config = parse(ModelConfig, preset("ViT-B-32"), where="ViT-B-32")
    whole, half = forward_gflops(config), forward_gflops(config, 39)
    assert forward_gflops(config, 77) == whole
    text = 12 * 24 * 512**2 / 1e9  # 10^9 FLOPs a token: 12 blocks of 12 D^2 weights, twice
    assert whole - half == pytest.approx(38 * text, rel=0.1)


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_one_line(command: Command, tracker: str) -> None:
    if find_spec(tracker) is not None:
        pytest.skip(f"{tracker} is installed")
    done = command("train", "-c", "config.yaml", "-o", f"train.report_to={tracker}")
    assert_refused(done, f"train.report_to: {tracker} is not installed", f"pip install {tracker}")
    assert not Path("runs").exists()


def test_no_tracker_leaves_metrics_alone(command: Command) -> None:
    make_config(Path("config.yaml"), train={"report_to": None, "epochs": 1})
    assert command("train", "-c", "config.yaml").returncode == 0
    assert not Path("runs/config/tensorboard").exists()
    assert read_metrics(Path("runs/config"))


@pytest.mark.parametrize(
    ("where", "error", "reason"),
    [
        ("training.loop.train_step", MemoryError(), "MemoryError"),
        ("training.loop.train_step", RuntimeError("a bug\nof two lines"), "a bug of two lines"),
        ("training.checkpoint.save", OSError(28, "No space left on device"), "No space left"),
        ("training.loop.build_feature_cache", OSError("no features"), "no features"),
        ("training.loop.CLIP", MemoryError(), "MemoryError"),
        ("training.loop.MetricsLog", OSError("no metrics"), "no metrics"),
        ("api.finish", OSError("no report"), "no report"),
    ],
)
def test_a_run_that_ends_by_an_error_says_so(
    command: Command,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: Exception,
    reason: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    (workplace / "run").mkdir()
    status = workplace / "run/status.json"
    status.write_text('{"state": "running"}')  # of a start that was killed
    monkeypatch.setattr(f"leanclip.{where}", fail)
    with suppress(RuntimeError):
        done = command("train", "-c", "config.yaml", "--output-dir", "run")
        assert done.returncode == 2
    facts = json.loads(status.read_text())
    assert facts["state"] == "failed"
    assert reason in facts["reason"]
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    assert command("train", "-c", "config.yaml", "--output-dir", "run").returncode == 0
    assert json.loads(status.read_text())["state"] == "done"


def test_a_refused_start_leaves_the_status_of_the_run(command: Command, workplace: Path) -> None:
    assert command("train", "-c", "config.yaml").returncode == 0
    before = Path("runs/config/status.json").read_text()
    assert_refused(command("train", "-c", "config.yaml", "-o", "seed=3"), "another configuration")
    assert Path("runs/config/status.json").read_text() == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train.batch_size=1"], ["the batch is one pair, which has no negatives"]),
        (["train.batch_size=1", "train.loss=siglip", "model.logit_bias=true"], ["no negatives"]),
        (["train.batch_size=7"], ["batches of 7 leave out 5 of 12 samples in each epoch (42%)"]),
        (["train.batch_size=11"], ["batches of 11 leave out 1 of 12 samples in each epoch (8%)"]),
        (["train.batch_size=5"], ["batches of 5 leave out 2 of 12 samples in each epoch (17%)"]),
        (["train.batch_size=6"], []),
        (["train.batch_size=12"], []),
        (["train.batch_size=100"], []),
    ],
)
def test_batches_that_lose_something_are_warned_of(
    command: Command, settings: list[str], words: list[str]
) -> None:
    options = [word for one in (*settings, "train.epochs=1") for word in ("-o", one)]
    shown = command("train", "-c", "config.yaml", *options, "--dry-run").stdout
    logged = command("train", "-c", "config.yaml", *options).stderr
    assert shown.count("# warning: ") == len(words)
    for one in words:
        assert one in shown
        (line,) = [line for line in logged.splitlines() if one in line]
        assert line.startswith("warning: ")
    assert bool(words) == ("leave out" in logged or "one pair" in logged)


def test_a_lost_step_names_three_samples(command: Command) -> None:
    make_config(Path("config.yaml"), train={"batch_size": 12, "epochs": 30})
    done = command("train", "-c", "config.yaml", "-o", "optimizer.learning_rate=1e30")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "skipped: its loss" in line]
    assert lines
    for line in lines:
        names = line.split("its samples: ")[1]
        assert names.count("data/") == 3
        assert names.endswith(" and 9 more")


def test_the_status_is_written_where_there_is_no_room_for_another_file(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    plan = make_plan(load_config("config.yaml", output_dir="."), torch.device("cpu"))
    write_status(plan, "running", more="words " * 20)
    monkeypatch.setattr("leanclip.training.monitor.write_text", fail)
    write_status(plan, "failed", reason="no room")
    facts = json.loads(Path("status.json").read_text())
    assert (facts["state"], facts["reason"]) == ("failed", "no room")
