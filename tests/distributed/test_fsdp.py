"""FSDP2 over gloo: one rank's numbers, and checkpoints in shards that any number of ranks takes."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, assert_refused, make_config, ranks_of, run_cli
from safetensors.torch import load_file
from test_step import KINDS, PAIRS, batch_of, model_of
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor

from leanclip import CLIP, Preprocess, WeightsError
from leanclip.config.training import OptimizerConfig, TrainConfig
from leanclip.distributed.wrap_model import full_model, wrap_model
from leanclip.model.parameters import local
from leanclip.training import checkpoint
from leanclip.training.optimizer import build_optimizer
from leanclip.training.sharded_checkpoint import read_shards
from leanclip.training.step import StepResult, train_step
from leanclip.weights import load_into, read_weights

Command = Callable[..., subprocess.CompletedProcess[str]]
Written = tuple[Path, dict[str, np.ndarray]]  # a folder of checkpoints, and what the newest holds
CUTS = {1: [0, PAIRS], 2: [0, 3, PAIRS], 3: [0, 3, 3, PAIRS]}  # of three ranks, one has nothing


def full(tensor: torch.Tensor) -> np.ndarray:
    full_model = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full_model.detach().numpy().copy()


class Run:
    """A model under training, on this rank."""

    def __init__(
        self, rank: int, world_size: int, kind: Any = "clip", family: str = "clip", **train: Any
    ) -> None:
        self.settings = TrainConfig.model_validate({"sharding": "fsdp"} | train)
        is_fp16 = self.settings.precision == "fp16"
        self.scaler = GradScaler("cpu", init_scale=1024) if is_fp16 else None
        self.kind, cuts = kind, CUTS[world_size]
        self.batch = batch_of(slice(cuts[rank], cuts[rank + 1]))
        self.model = model_of(kind, 14.3, family)
        self.towers = wrap_model(self.model, self.settings)
        self.optimizer = build_optimizer(self.model, OptimizerConfig(epsilon=1e-3))

    def step(self) -> StepResult:
        return train_step(
            self.model,
            self.optimizer,
            self.batch,
            Preprocess(32),
            rate=1e-2,
            settings=self.settings,
            kind=self.kind,
            max_gradient_norm=0.5,
            towers=self.towers,
            must_measure=True,
            scaler=self.scaler,
        )

    def state(self) -> dict[str, np.ndarray]:
        state = {name: full(tensor) for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                state[f"{name}.{key}"] = full(value)
        return state


CASES: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"micro_batches": n}) for kind in KINDS for n in (1, 4)),
    ("clip", {"micro_batches": 2, "checkpoint_activations": True}),
    ("siglip", {"family": "siglip", "micro_batches": 4}),
    *(("clip", {"family": name}) for name in ("pe-core", "biomed", "xlm-roberta", "coca")),
]


def results_of(rank: int, world_size: int) -> list[tuple[dict[str, float], dict[str, np.ndarray]]]:
    results = []
    for kind, train in CASES:
        run = Run(rank, world_size, kind, **train)
        if world_size > 1:
            sharded = [p for p in run.model.parameters() if isinstance(p, DTensor)]
            held = sum(p.to_local().numel() for p in sharded)
            assert held < 0.7 * run.model.parameter_count()
        run.step()
        result = run.step()
        assert result.is_finite
        figures = {"loss": result.loss.item(), "norm": result.gradient_norm.item()}
        figures |= {name: norm.item() for name, norm in result.norms.items()}
        results.append((figures, run.state()))
    return results


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_shards_train_as_one_rank_does(world_size: int, tmp_path: Path) -> None:
    """Two clipped steps of AdamW: weights, moments, the global norm and the towers' norms."""
    expected = results_of(0, 1)
    for results in ranks_of(world_size, lambda rank: results_of(rank, world_size), tmp_path):
        for case, (figures, state), (one_figures, one_state) in zip(
            CASES, results, expected, strict=True
        ):
            for name, value in one_figures.items():
                assert figures[name] == pytest.approx(value, rel=1e-4), (case, name)
            for name, value in one_state.items():
                error = np.linalg.norm(state[name] - value) / max(np.linalg.norm(value), 1e-12)
                assert error < 2e-5, (case, name, error)


def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    def work(rank: int) -> bool:
        run = Run(rank, 2)
        run.step()
        before = run.state()
        if rank == 1:
            run.batch.images[:] = 0
        result = train_step(
            run.model,
            run.optimizer,
            run.batch,
            Preprocess(32, std=(0.0, 1.0, 1.0)),
            rate=1e-2,
            towers=run.towers,
        )
        after = run.state()
        return not result.is_finite and all((before[k] == after[k]).all() for k in before)

    assert ranks_of(2, work, tmp_path) == [True, True]


def test_the_whole_model_is_on_every_rank(tmp_path: Path) -> None:
    def work(rank: int) -> list[bool]:
        run = Run(rank, 2)
        state, copy = run.state(), full_model(run.model).state_dict()
        return [bool((copy[k].numpy() == state[k]).all()) for k in copy]

    first, second = ranks_of(2, work, tmp_path)
    assert all(first)
    assert all(second)


# --- checkpoints


@pytest.fixture(scope="module")
def checkpoint_of_two(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A checkpoint of two ranks after two steps, and the state that is in it."""
    tmp_path = tmp_path_factory.mktemp("two")
    root = tmp_path / "c"

    def work(rank: int) -> dict[str, np.ndarray]:
        run = Run(rank, 2)
        run.step()
        run.step()
        progress = checkpoint.Progress(2, 0, 22, 22, [], 1.0)
        checkpoint.save(root, progress, run.model, run.optimizer, Preprocess(32), keep=2)
        torch.distributed.barrier()
        return run.state()

    (tmp_path / "w").mkdir()
    return root, ranks_of(2, work, tmp_path / "w")[0]


def copied(checkpoint_of_two: Written, root: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """The same checkpoint in a folder of a test's own."""
    shutil.copytree(checkpoint_of_two[0], root)
    return root / "step-00000002", checkpoint_of_two[1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shards_come_back_to_the_bit_over_any_number_of_ranks(
    world_size: int, checkpoint_of_two: Written, tmp_path: Path
) -> None:
    folder, expected = copied(checkpoint_of_two, tmp_path / "c")

    def work(rank: int) -> dict[str, np.ndarray]:
        run = Run(rank, world_size)
        progress = checkpoint.restore(folder, run.model, run.optimizer)
        assert progress == checkpoint.Progress(2, 0, 22, 22, [], 1.0)
        return run.state()

    for state in ranks_of(world_size, work, tmp_path):
        assert state.keys() == expected.keys()
        assert all((state[name] == expected[name]).all() for name in expected)


def test_a_merged_checkpoint_is_a_normal_one(checkpoint_of_two: Written, tmp_path: Path) -> None:
    folder, expected = copied(checkpoint_of_two, tmp_path / "run/checkpoints")
    with pytest.raises(WeightsError, match=r"in shards; merge them with: leanclip merge .*step-0"):
        read_weights(tmp_path / "run")
    assert checkpoint.merge(tmp_path / "run", tmp_path / "merged") == folder
    model = CLIP(**TINY)
    load_into(model, read_weights(tmp_path / "merged"))
    assert all((t.numpy() == expected[name]).all() for name, t in model.state_dict().items())
    assert read_weights(tmp_path / "merged").preprocess == Preprocess(32)

    def work(rank: int) -> dict[str, np.ndarray]:  # the merged one goes on too, in shards again
        run = Run(rank, 2)
        checkpoint.restore(tmp_path / "merged", run.model, run.optimizer)
        return run.state()

    for state in ranks_of(2, work, tmp_path):
        assert all((state[name] == expected[name]).all() for name in expected)
    with pytest.raises(WeightsError, match="is not sharded"):
        checkpoint.merge(tmp_path / "merged", tmp_path / "again")
    with pytest.raises(OSError, match="exists already"):
        checkpoint.merge(folder, tmp_path / "merged")


def test_damaged_shards_are_not_taken(checkpoint_of_two: Written, tmp_path: Path) -> None:
    folder, _ = copied(checkpoint_of_two, tmp_path / "c")
    name = "shards/shard-00002-model-00001-of-00001.safetensors"
    assert checkpoint.newest(tmp_path / "c") == (folder, [])
    damaged = bytearray((folder / name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / name).write_bytes(damaged)
    found, skipped = checkpoint.newest(tmp_path / "c")
    assert found is None
    assert skipped == [f"{folder / name}: differs from its checksum"]
    with pytest.raises(WeightsError, match="differs from its checksum"):
        checkpoint.merge(folder, tmp_path / "merged")


def test_shards_that_are_missing_are_an_error(checkpoint_of_two: Written, tmp_path: Path) -> None:
    """Even where the manifest was changed with them."""
    folder, _ = copied(checkpoint_of_two, tmp_path / "c")
    assert "logit_scale" in read_shards(folder / "shards")
    (folder / "shards/shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(OSError, match=r"shards: cannot be read: shards of .* are missing"):
        read_shards(folder / "shards")


def test_a_rank_that_cannot_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file where the folder should be")

    def work(rank: int) -> str:
        run = Run(rank, 2)
        run.step()
        progress = checkpoint.Progress(1, 0, 11, 11, [], 1.0)
        try:
            checkpoint.save(
                tmp_path / "c", progress, run.model, run.optimizer, Preprocess(32), keep=2
            )
        except OSError as error:
            return str(error)
        return "written"

    first, second = ranks_of(2, work, tmp_path)
    assert "cannot be written" in first
    assert "cannot be written" in second


# --- the command


TRAIN = ("train", "-c", "config.yaml", "--num-procs", "2")


def run_in_shards(workplace: Path) -> subprocess.CompletedProcess[str]:
    make_config(
        Path("config.yaml"),
        train={"sharding": "fsdp", "batch_size": 2, "epochs": 1},
        checkpoint={"every_steps": 1, "keep": 9},
    )
    done = run_cli(*TRAIN, cwd=workplace)
    assert done.returncode == 0, done.stderr
    return done


def test_a_run_in_shards_is_evaluated_and_merged(workplace: Path, command: Command) -> None:
    assert "leanclip merge runs/config OUT" in run_in_shards(workplace).stdout
    metrics = json.loads(Path("runs/config/report.json").read_text())["metrics"]
    assert_refused(command("eval", "--model", "runs/config"), "leanclip merge")
    assert_refused(command("merge", "data", "out"), "has no manifest")
    assert command("merge", "runs/config", "merged").returncode == 0
    again = command("eval", "--model", "merged", "-c", "config.yaml", "--out", "again")
    assert again.returncode == 0, again.stderr
    assert json.loads(Path("again/report.json").read_text())["metrics"] == metrics


@pytest.mark.slow
def test_a_run_in_shards_resumes_to_the_same_bits(workplace: Path, command: Command) -> None:
    run_in_shards(workplace)
    assert command("merge", "runs/config", "expected").returncode == 0
    for step in (2, 3):
        shutil.rmtree(f"runs/config/checkpoints/step-{step:08d}")
    done = run_cli(*TRAIN, cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "resuming from runs/config/checkpoints/step-00000001" in done.stderr
    assert command("merge", "runs/config", "found").returncode == 0
    for name in ("model.safetensors", "training.safetensors"):
        expected, found = load_file(Path("expected") / name), load_file(Path("found") / name)
        expected.pop("random.cpu", None)  # a loader that starts anew draws its own seed
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_what_does_not_go_together_is_refused(command: Command) -> None:
    done = command(
        "train", "-c", "config.yaml", "-o", "train.compile=true", "-o", "train.sharding=fsdp"
    )
    assert_refused(done, "train.compile: cannot be combined with train.sharding fsdp")


@pytest.mark.parametrize("sharding", ["fsdp", "ddp"])
def test_an_overflow_of_one_rank_is_every_ranks(sharding: str, tmp_path: Path) -> None:
    """One shard's gradient is not finite: no rank takes the step, and all halve the scale."""
    expected = Run(0, 1, "siglip", precision="fp16").step()

    def work(rank: int) -> list[Any]:
        run = Run(rank, 2, "siglip", precision="fp16", sharding=sharding)
        assert run.scaler is not None
        good = run.step()
        assert good.gradient_norm.item() == pytest.approx(expected.gradient_norm.item(), rel=0.02)
        before, weight, unscale = run.state(), run.model.visual.conv1.weight, run.scaler.unscale_

        def overflow_in_shard(optimizer: torch.optim.Optimizer) -> None:
            assert weight.grad is not None
            local(weight.grad).view(-1)[0] = float("inf")
            unscale(optimizer)

        if rank == 1 and sharding == "fsdp":
            run.scaler.unscale_ = overflow_in_shard
        elif rank == 1:  # before DDP takes the mean over ranks
            weight.register_hook(lambda gradient: gradient * float("inf"))
        result, after = run.step(), run.state()
        is_same = all((before[name] == after[name]).all() for name in before)
        return [bool(result.is_finite), bool(is_same), run.scaler.get_scale()]

    assert ranks_of(2, work, tmp_path) == [[False, True, 512.0]] * 2
