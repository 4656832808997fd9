"""Training through the command line: its folder, its resumption, its refusals."""

import contextlib
import io
import json
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    PROJECT,
    TINY,
    Command,
    Forked,
    assert_refused,
    make_config,
    make_pairs,
    noise_image,
    weights_hash,
)
from torch.nn import functional as F

from leanclip import CLIP, Preprocess
from leanclip.config.schema import load_config
from leanclip.config.strict_yaml import load_yaml
from leanclip.config.training import OptimizerConfig, TrainConfig
from leanclip.data.batch import Batch
from leanclip.evaluation import retrieval_metrics
from leanclip.io.files import read_metrics
from leanclip.preprocess.images import normalize
from leanclip.preprocess.tokenizer import tokenize
from leanclip.training.optimizer import build_optimizer
from leanclip.training.plan import default_precision, make_plan, memory_estimate
from leanclip.training.step import train_step


def batch_of(n: int = 6) -> Batch:
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)
    tokens = tokenize([f"number {i}" for i in range(n)], 24)
    return Batch(images, tokens, torch.arange(n), torch.full((n,), -1))


# --- one step


def test_a_step_is_adamw_on_the_loss_written_out() -> None:
    model, plain = CLIP(**TINY), CLIP(**TINY)
    plain.load_state_dict(model.state_dict())
    settings = OptimizerConfig(weight_decay=0.1)
    batch, preprocess = batch_of(), Preprocess(32)
    loss = train_step(model, build_optimizer(model, settings), batch, preprocess, rate=0.01).loss

    pixels = normalize(batch.images, preprocess.mean, preprocess.std)
    image = F.normalize(plain.encode_image(pixels), dim=-1)
    text = F.normalize(plain.encode_text(batch.tokens), dim=-1)
    logits = plain.logit_scale.exp() * image @ text.T
    target = torch.arange(6)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        # The first step of Adam is the sign of the gradient, as far as epsilon lets it.
        decay = 0.1 if ours.ndim > 1 and "positional" not in name else 0.0
        assert theirs.grad is not None
        change = theirs.grad / (theirs.grad.abs() + 1e-6)
        after = theirs * (1 - 0.01 * decay) - 0.01 * change
        after = after.clamp(0, 4.6052) if name == "logit_scale" else after
        large = theirs.grad.abs() > 1e-5  # where rounding of the gradient does not decide
        torch.testing.assert_close(ours[large], after[large], rtol=1e-4, atol=1e-4)


def test_bf16_keeps_weights_and_loss_in_float32() -> None:
    model = CLIP(**TINY)
    optimizer = build_optimizer(model, OptimizerConfig())
    batch = batch_of()
    losses = [
        train_step(
            model,
            optimizer,
            batch,
            Preprocess(32),
            rate=0.0,
            settings=TrainConfig(precision=precision),
        ).loss
        for precision in ("fp32", "bf16")
    ]
    assert losses[1].dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0.02)


def test_gradients_are_clipped() -> None:
    model = CLIP(**TINY)
    norms = []
    optimizer = torch.optim.SGD(model.parameters(), fused=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train_step(model, optimizer, batch_of(), Preprocess(32), rate=1.0, max_gradient_norm=0.01)
    for name, parameter in model.named_parameters():
        norms.append((parameter - before[name]).norm())
    assert torch.stack(norms).norm().item() == pytest.approx(0.01, rel=1e-3)


# --- a run


def test_a_run_leaves_its_folder(command: Command, workplace: Path) -> None:
    words = ("evaluate.every_epochs=1", "evaluate.pictures=true")
    done = command("train", "-c", "config.yaml", "-o", words[0], "-o", words[1])
    assert done.returncode == 0, done.stderr
    run = workplace / "runs" / "config"
    for word in ("runs/config", "similarity.png", "leanclip eval --model runs/config"):
        assert word in done.stdout
    assert "Retrieval (12 images, 24 captions): R@1" in done.stdout
    assert "\x1b" not in done.stderr  # no progress bar without a terminal
    whole = (*words, "train.precision=fp32")
    assert load_config(run / "config.yaml") == load_config("config.yaml", whole)
    lines = read_metrics(run)
    steps = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for name in ("train/lr", "train/logit_scale", "train/samples_per_second"):
        assert name in steps[0]
    evaluations = [line for line in lines if "val/image_to_text_R@1" in line]
    assert [line["step"] for line in evaluations] == [3, 6]
    assert evaluations[-1].keys() >= {f"val/{name}" for name in retrieval_metrics(
        torch.eye(2), torch.arange(2))}  # fmt: skip
    metrics = json.loads((run / "report.json").read_text())["metrics"]
    assert metrics["image_to_text_R@1"] == evaluations[-1]["val/image_to_text_R@1"]
    assert [p.name for p in sorted((run / "checkpoints").glob("step-*"))] == [
        "step-00000003",
        "step-00000006",
    ]
    assert list((run / "tensorboard").glob("events.*"))


def test_the_same_command_again_only_evaluates(command: Command, workplace: Path) -> None:
    first = command("train", "-c", "config.yaml")
    before = weights_hash(workplace / "runs/config")
    checkpoints = workplace / "runs/config/checkpoints"
    whole = sorted(checkpoints.rglob("*"))
    (checkpoints / ".latest.part").touch()  # as a run leaves that is killed
    (checkpoints / ".step-00000009.tmp").mkdir()
    again = command("train", "-c", "config.yaml", "-o", "data.max_bad_fraction=0.5")
    assert again.returncode == 0, again.stderr
    assert sorted(checkpoints.rglob("*")) == whole
    assert "resuming from" in again.stderr
    assert weights_hash(workplace / "runs/config") == before
    wanted = [line for line in first.stdout.splitlines() if line.startswith("Retrieval")]
    assert wanted[0] in again.stdout


def test_the_seed_makes_the_run(command: Command, workplace: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        command("train", "-c", "config.yaml", "--output-dir", name, "-o", f"seed={seed}")
    hashes = [weights_hash(workplace / name) for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


def test_ctrl_c_says_how_to_go_on(workplace: Path) -> None:
    options = ("-o", "train.epochs=100000", "-o", "data.workers=1")
    process = Forked("train", "-c", "config.yaml", *options, folder=workplace)
    process.until((workplace / "runs/config/checkpoints").is_dir)
    process.send_all(signal.SIGINT)  # as a terminal does: the workers get it too
    assert process.code() == 130
    errors = process.output()
    assert "interrupted; run the same command again to continue" in errors
    assert "Traceback" not in errors


def test_resume_options(command: Command, workplace: Path) -> None:
    assert_refused(
        command("train", "-c", "config.yaml", "--resume"), "--resume: no checkpoint in runs/config"
    )
    assert_refused(
        command("train", "--resume", "a", "--output-dir", "b"), "--resume a: resumes in that folder"
    )
    assert_refused(command("train", "--resume", "nowhere"), "nowhere/config.yaml", "no such config")
    command("train", "-c", "config.yaml", "--output-dir", "a")
    done = command("train", "--resume", "a")
    assert done.returncode == 0, done.stderr
    assert "resuming from a/checkpoints/step-00000006, step 6 of 6" in done.stderr
    assert "a: already finished, at step 6 after " in done.stdout


def test_another_configurations_folder_is_refused(command: Command) -> None:
    command("train", "-c", "config.yaml")
    assert_refused(
        command("train", "-c", "config.yaml", "-o", "optimizer.learning_rate=0.5"),
        "runs/config: holds a run of another configuration",
        "optimizer.learning_rate: 0.001 there, 0.5 here",
        "--output-dir",
    )


def test_load_starts_from_weights_with_a_fresh_optimiser(command: Command, workplace: Path) -> None:
    command("train", "-c", "config.yaml", "--output-dir", "a")
    done = command(
        "train", "-c", "config.yaml", "--output-dir", "b", "--load", "a",
        "-o", "optimizer.learning_rate=1e-12",
    )  # fmt: skip
    assert "starting from the weights of a" in done.stderr
    first, second = (
        json.loads((workplace / run / "report.json").read_text())["metrics"] for run in "ab"
    )
    assert first == second  # a rate of nearly nothing leaves the weights as they were
    assert_refused(
        command("train", "-c", "config.yaml", "--output-dir", "c", "--load", "a",
                "-o", "model.embed_dim=8"),
        "shapes differ", "text_projection (32, 16) there, (32, 8) in the model",
    )  # fmt: skip
    assert_refused(
        command("train", "-c", "config.yaml", "--output-dir", "d", "--load", "none"), "no such file"
    )


def test_evaluate_only_and_eval_agree_with_the_run(command: Command, workplace: Path) -> None:
    first = command("train", "-c", "config.yaml")
    (sentence,) = [line for line in first.stdout.splitlines() if line.startswith("Retrieval")]
    for arguments in (
        ("train", "-c", "config.yaml", "--evaluate-only"),
        ("eval", "--model", "runs/config"),
        ("eval", "--model", "runs/config", "--task", "retrieval", "--out", "e"),
        ("eval", "--model", "runs/config", "--data", "pairs:data"),
        ("eval", "--model", "runs/config/checkpoints/step-00000006", "--data", "pairs:data"),
        ("eval", "--model", "runs/config/checkpoints/step-00000006/model.safetensors",
         "-c", "config.yaml"),
    ):  # fmt: skip
        done = command(*arguments)
        assert done.returncode == 0, done.stderr
        assert sentence in done.stdout, arguments
    assert (workplace / "e" / "report.json").is_file()


def test_evaluate_only_measures_the_run_and_not_what_it_started_from(
    command: Command, workplace: Path
) -> None:
    command("train", "-c", "config.yaml", "--output-dir", "a")
    command("train", "-c", "config.yaml", "--output-dir", "b", "--load", "a",
            "-o", "train.epochs=4")  # fmt: skip
    trained = json.loads((workplace / "b/report.json").read_text())["metrics"]
    command("train", "--resume", "b", "--evaluate-only")
    assert json.loads((workplace / "b/report.json").read_text())["metrics"] == trained
    command("train", "--resume", "b", "--evaluate-only", "--load", "a")
    base = json.loads((workplace / "a/report.json").read_text())["metrics"]
    assert json.loads((workplace / "b/report.json").read_text())["metrics"] == base
    assert base != trained


def test_a_folder_that_cannot_be_written_is_one_line(command: Command, workplace: Path) -> None:
    (workplace / "file").write_text("")
    assert_refused(command("train", "-c", "config.yaml", "--output-dir", "file"), "file")


def test_dry_run_shows_and_writes_nothing(command: Command, workplace: Path) -> None:
    done = command("train", "-c", "config.yaml", "--dry-run", "-o", "optimizer.reference_batch=8")
    assert done.returncode == 0, done.stderr
    assert load_yaml(done.stdout, where="stdout")["model"]["vision_width"] == 32
    count = CLIP(**TINY).parameter_count()
    for words in (f"{count:,} parameters", "steps: 6 = 2 epochs x 3 batches of 4", "memory: about"):
        assert words in done.stdout
    assert "learning rate: peak 0.0005, " in done.stdout
    assert "(0.001 x batch 4 / reference batch 8)" in done.stdout
    assert not (workplace / "runs").exists()


def test_memory_estimate_counts_what_autograd_keeps(workplace: Path) -> None:
    plan = make_plan(load_config("config.yaml"), torch.device("cpu"))
    weights, activations = memory_estimate(plan)
    model = CLIP(**TINY)
    assert weights == 16 * model.parameter_count()
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        model(torch.randn(4, 3, 32, 32), tokenize(["a"] * 4, 24))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    measured = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in own)
    assert 0.8 < activations / measured < 1.3


def test_memory_is_estimated_for_one_rank(workplace: Path) -> None:
    def estimate(ranks: int, *overrides: str) -> tuple[int, int]:
        config = load_config("config.yaml", ["train.batch_size=4", *overrides])
        return memory_estimate(make_plan(config, torch.device("cpu"), ranks=ranks))

    weights, activations = estimate(1)
    of_two = estimate(2)
    assert of_two[0] == weights
    assert activations <= of_two[1] < 1.1 * activations  # the features of the others
    assert 0.25 < estimate(1, "train.micro_batches=4")[1] / activations < 0.35
    assert estimate(2, "train.sharding=fsdp")[0] == weights // 2


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "data.root=nowhere"], ["data.root: no such folder: nowhere"]),
        (["-o", "trian.epochs=1"], ["trian: no such setting; did you mean train?"]),
        (["-o", "train.epochs=many"], ['train.epochs: should be a valid integer, found "many"']),
        (["--num-gpus", "999"], ["999 GPU(s) requested, this machine has"]),
        (["-o", "model.vocab_size=100"], ["model.vocab_size: 100 is less than"]),
        (["-o", "evaluate.zero_shot={}"], ["evaluate.zero_shot", "has no classes"]),
        (["--evaluate-only"], ["runs/config: no such file"]),
        (["--evaluate-only", "-o", "evaluate.retrieval=null"], ["nothing to evaluate"]),
        (["-o", "optimizer.learning_rate=1e30"], ["not finite", "lower optimizer.learning_rate"]),
    ],
)
def test_a_mistake_is_one_line(command: Command, arguments: list[str], words: list[str]) -> None:
    assert_refused(command("train", "-c", "config.yaml", *arguments), *words)


def test_spoilt_data_is_named(command: Command, workplace: Path) -> None:
    (workplace / "data" / "003.txt").write_text("")
    assert_refused(command("train", "-c", "config.yaml"), "data/003.txt: an empty caption file")
    for path in (workplace / "data").iterdir():
        path.unlink()
    assert_refused(command("train", "-c", "config.yaml"), "data: no images found")


def test_an_unreadable_image_is_skipped_and_named_once(command: Command, workplace: Path) -> None:
    (workplace / "data" / "003.png").write_bytes(b"no image")
    refused = command("train", "-c", "config.yaml")
    assert_refused(refused, "data/003.png: cannot be read as an image", "max_bad_fraction=0.01")
    done = command(
        "train", "-c", "config.yaml", "-o", "data.max_bad_fraction=0.1",
        "-o", "evaluate.retrieval=null", "-o", "train.epochs=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("skipped: data/003.png") == 1
    done = command(
        "train", "-c", "config.yaml", "-o", "data.max_bad_fraction=0.1", "--output-dir", "b",
        "-o", "evaluate.every_epochs=1", "-o", "train.epochs=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("skipped: data/003.png") == 2  # of training, of four evaluations


def test_no_config_and_unknown_options(command: Command) -> None:
    assert_refused(command("train"), "-c: give a config file")
    done = command("train", "--bogus")
    assert done.returncode == 2
    assert "No such option" in done.stderr
    assert_refused(command("train", "-c", "none.yaml"), "none.yaml: no such config file")
    assert_refused(command("eval", "--model", "runs/config"), "--data: missing; give FORMAT:ROOT")
    assert_refused(
        command("eval", "--model", "x", "--data", "zip:x"), "--data zip:x: not of the form"
    )
    assert_refused(command("eval", "--model", "x", "--task", "fun"), "--task fun: no such task")


def test_debug_shows_the_traceback(command: Command) -> None:
    done = command("train", "--debug", "-c", "none.yaml")
    assert "Traceback" in done.stderr


# --- PASSL's command


def test_tools_train_on_a_food101_shaped_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = ("apple_pie", "beef_tartare", "french_fries", "pad_thai", "sushi", "waffles")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/classes.txt").write_text("\n".join(classes))
    (tmp_path / "meta/labels.txt").write_text("\n".join(c.replace("_", " ") for c in classes))
    for split, numbers in (("train", range(5)), ("test", range(5, 7))):
        lines = [f"{name}/{n}" for name in classes for n in numbers]
        (tmp_path / f"meta/{split}.txt").write_text("\n".join(lines))
        for line in lines:
            path = tmp_path / "images" / f"{line}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise_image(classes.index(line.split("/")[0])).save(path)
    small = [f"-omodel.{key}={value}" for key, value in TINY.items()]
    words = (
        "tools/train.py", "-c", "configs/clip/vit-b-32.yaml", *small,
        "-o", f"data.root={tmp_path}", "-o", "data.workers=0", "-o", "train.batch_size=6",
        "-o", "train.epochs=20", "-o", "optimizer.learning_rate=3e-3",
        "-o", "optimizer.reference_batch=null", "-o", "data.crop_scale=[0.9, 1]",
        "--output-dir", str(tmp_path / "run"),
    )  # fmt: skip
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(sys, "argv", list(words))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(words[0], run_name="__main__")
    metrics = json.loads((tmp_path / "run/report.json").read_text())["metrics"]
    assert metrics["zeroshot_top1"] == 1.0  # every class is one picture here
    assert "Zero-shot on 12 images of 6 classes: top-1" in out.getvalue()


def test_tools_train_with_more_gpus_than_there_are() -> None:
    done = subprocess.run(
        [sys.executable, "tools/train.py", "-c", "configs/clip/vit-b-32.yaml", "--num-gpus", "800"],
        cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert_refused(done, "800 GPU(s) requested, this machine has")


def test_a_data_set_smaller_than_a_batch_is_one_batch(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_pairs(tmp_path / "data", 3)
    path = make_config(tmp_path / "c.yaml", train={"batch_size": 64})
    plan = make_plan(load_config(path), torch.device("cpu"))
    assert (plan.batch_size, plan.steps_per_epoch, plan.steps) == (3, 1, 2)


def test_the_default_precision_follows_the_device(workplace: Path) -> None:
    for overrides, found in (([], "fp32"), (["train.precision=bf16"], "bf16")):
        plan = make_plan(load_config("config.yaml", overrides), torch.device("cpu"))
        assert plan.config.train.precision == found
    on_gpu = default_precision(torch.device("cuda"))
    assert on_gpu == ("bf16" if torch.cuda.is_available() else "fp32")


def test_data_of_nothing_usable_ends_the_run_whatever_the_epoch(
    command: Command, workplace: Path
) -> None:
    for path in (workplace / "data").glob("*.png"):
        path.write_bytes(b"no image")
    done = command("train", "-c", "config.yaml", "-o", "data.epoch_size=2000")
    assert_refused(done, "not an image", "bad of 12 samples")
    anyway = ("-o", "data.max_bad_fraction=1", "-o", "evaluate.retrieval=null")
    done = command("train", "-c", "config.yaml", *anyway)
    assert_refused(done, "no sample could be used", "12 not an image")


def test_other_data_than_before_is_said(command: Command, workplace: Path) -> None:
    limited = ("-o", "checkpoint.every_steps=1", "-o", "checkpoint.keep=9")
    assert command("train", "-c", "config.yaml", *limited).returncode == 0
    for folder in sorted((workplace / "runs/config/checkpoints").glob("step-*"))[2:]:
        shutil.rmtree(folder)
    make_pairs(workplace / "data/more", 8)
    done = command("train", "-c", "config.yaml", *limited)
    assert done.returncode == 0
    assert "the data has 20 samples per epoch, and had 12" in done.stderr
