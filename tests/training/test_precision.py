"""bf16 and fp16: close to float32, with float32 where it matters, and a loss scale that resumes."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_config, ranks_of
from safetensors.torch import load_file
from test_step import Recording, batch_of, model_of
from torch.amp import GradScaler
from torch.nn import functional as F

from leanclip import CLIP, Preprocess
from leanclip.config.training import OptimizerConfig, TrainConfig
from leanclip.distributed.wrap_model import wrap_ddp
from leanclip.io.files import read_metrics
from leanclip.training.optimizer import build_optimizer
from leanclip.training.step import train_step

Command = Callable[..., subprocess.CompletedProcess[str]]


def gradients_of(rank: int, world_size: int, precision: str, micro_batches: int) -> torch.Tensor:
    rows = slice(0, 4) if rank == 0 else slice(4, None)
    model = model_of("clip", 20.0)
    optimizer = Recording(model.parameters(), lr=0.1, fused=True)
    settings = TrainConfig.model_validate({"precision": precision, "micro_batches": micro_batches})
    result = train_step(
        model,
        optimizer,
        batch_of(rows if world_size == 2 else slice(None)),
        Preprocess(32),
        rate=0.1,
        settings=settings,
        towers=wrap_ddp(model),
        scaler=GradScaler("cpu", init_scale=1024) if precision == "fp16" else None,
    )
    assert result.is_finite
    assert result.loss.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in optimizer.gradients)
    return torch.cat([g.reshape(-1) for g in optimizer.gradients])


@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.99), ("fp16", 0.999)])
def test_half_precision_points_where_float32_does(
    precision: str, least: float, tmp_path: Path
) -> None:
    expected = gradients_of(0, 1, "fp32", 1)
    one = gradients_of(0, 1, precision, 1)
    parts = gradients_of(0, 1, precision, 3)
    ranks = ranks_of(2, lambda rank: gradients_of(rank, 2, precision, 2).numpy(), tmp_path)
    for found in (one, parts, *map(torch.from_numpy, ranks)):
        assert F.cosine_similarity(found, expected, dim=0) > least
        assert float(found.norm() / expected.norm()) == pytest.approx(1, abs=0.02)
    assert (ranks[0] == ranks[1]).all()


def scale_and_steps(scaler: GradScaler) -> tuple[float, int]:
    state = scaler.state_dict()
    return state["scale"], state["_growth_tracker"]


def test_an_overflow_changes_nothing_but_the_scale() -> None:
    model = model_of("clip", 20.0)
    optimizer = build_optimizer(model, OptimizerConfig())
    before = {name: p.clone() for name, p in model.state_dict().items()}
    scaler = GradScaler("cpu", init_scale=2.0**40)
    settings = TrainConfig(precision="fp16")

    def step() -> bool:
        result = train_step(
            model,
            optimizer,
            batch_of(),
            Preprocess(32),
            rate=1e-3,
            settings=settings,
            scaler=scaler,
        )
        return bool(result.is_finite)

    assert not step()
    assert scale_and_steps(scaler) == (2.0**39, 0)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    steps = 1
    while not step():
        steps += 1
    assert scale_and_steps(scaler) == (2.0 ** (40 - steps), 1)
    assert not torch.equal(before["text_projection"], model.get_parameter("text_projection"))


def test_a_run_in_fp16_goes_on_with_its_scale(command: Command) -> None:
    make_config(
        Path("config.yaml"),
        train={"precision": "fp16", "epochs": 2},
        checkpoint={"every_steps": 1, "keep": 9},
    )
    assert command("train", "-c", "config.yaml").returncode == 0
    run = Path("runs/config")
    last = run / "checkpoints/step-00000006"
    states = [
        json.loads((run / f"checkpoints/step-{step:08d}/state.json").read_text())["loss_scale"]
        for step in (4, 6)
    ]
    assert states[1]["scale"] == states[0]["scale"]
    # what a fresh scaler would not have
    assert states[1]["_growth_tracker"] == states[0]["_growth_tracker"] + 2
    assert "train/loss_scale" in read_metrics(run)[0]
    shutil.copytree(last, "expected")
    for step in (5, 6):
        shutil.rmtree(run / f"checkpoints/step-{step:08d}")
    assert command("train", "-c", "config.yaml").returncode == 0
    assert json.loads((last / "state.json").read_text())["loss_scale"] == states[1]
    for name in ("model.safetensors", "training.safetensors"):
        found, expected = load_file(last / name), load_file(Path("expected") / name)
        found.pop("random.cpu", None)  # a loader that starts anew draws its own seed
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


@pytest.mark.slow
def test_the_loss_of_bf16_stays_within_a_band(command: Command) -> None:
    """Of a tiny model that learns twelve pairs; benchmarks/precision.py has the quickstart's."""
    curves = {}
    for precision in ("fp32", "bf16"):
        make_config(
            Path("config.yaml"),
            train={"precision": precision, "epochs": 40},
            optimizer={"learning_rate": 3e-4},
        )
        done = command("train", "-c", "config.yaml", "--output-dir", precision)
        assert done.returncode == 0, done.stderr
        losses = [
            line["train/loss"] for line in read_metrics(Path(precision)) if "train/loss" in line
        ]
        assert len(losses) == 120
        curves[precision] = torch.tensor(losses).view(10, 12).mean(dim=1)
    assert curves["fp32"][0] - curves["fp32"][-1] > 0.5
    assert not torch.equal(curves["bf16"], curves["fp32"])  # it was computed in bf16
    assert (curves["bf16"] - curves["fp32"]).abs().max() < 0.05


def test_the_temperature_stays_float32() -> None:
    model = CLIP(**model_of("clip", 20.0).config.model_dump())
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            features = model(torch.randn(2, 3, 32, 32), torch.ones(2, 5, dtype=torch.int64))
        assert [x.dtype for x in features] == [torch.float32] * 3
