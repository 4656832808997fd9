"""`train.deterministic`: the same bits again, or a refusal in words; and `tf32`."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Command, assert_refused, make_model, report_of, run_cli, weights_hash
from torch.nn.modules.module import register_module_forward_hook

import leanclip
from leanclip.config.strict_yaml import load_yaml
from leanclip.training.determinism import only_deterministic

OPTIONS = ("train.deterministic=true", "train.loss=multi-positive", "train.micro_batches=2")
WORDS = ("train", "-c", "config.yaml", *(word for one in OPTIONS for word in ("-o", one)))


def test_two_runs_are_equal_to_the_bit(command: Command, workplace: Path) -> None:
    """In two processes, with a loss and micro-batches that scatter and add."""
    seen = set()
    hook = register_module_forward_hook(
        lambda *_: seen.add(torch.are_deterministic_algorithms_enabled())
    )
    try:
        done = command(*WORDS, "--output-dir", "a")
        assert done.returncode == 0, done.stderr
        assert seen == {True}  # in training and in evaluating
        assert not torch.are_deterministic_algorithms_enabled()
        command("train", "-c", "config.yaml", "--output-dir", "c")
        assert seen == {True, False}
    finally:
        hook.remove()
    done = run_cli(*WORDS, "--output-dir", "b", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert weights_hash(workplace / "a") == weights_hash(workplace / "b")
    assert report_of(workplace / "a")["metrics"] == report_of(workplace / "b")["metrics"]


def test_an_operation_without_such_a_form_is_refused(command: Command, workplace: Path) -> None:
    def put(*_: object) -> None:  # on the CPU nothing that a model does is of that kind
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))

    hook = register_module_forward_hook(put)
    try:
        assert_refused(command(*WORDS), "train.deterministic", "put_", "false")
        status = load_yaml((workplace / "runs/config/status.json").read_text(), where="status")
        assert status["state"] == "failed"
        assert command("train", "-c", "config.yaml", "--output-dir", "b").returncode == 0
    finally:
        hook.remove()
    assert not torch.are_deterministic_algorithms_enabled()


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"), only_deterministic(True):
        torch.zeros(2).add_(torch.zeros(3))


# --- TF32


@pytest.fixture
def switches() -> Iterator[None]:
    """PyTorch's own defaults before and after."""

    def reset() -> None:
        torch.backends.fp32_precision = "none"  # pyright: ignore[reportAttributeAccessIssue]
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = True

    reset()
    yield
    reset()


def is_tf32() -> tuple[bool, bool]:
    """What products, and convolutions, may use, by both of PyTorch's interfaces."""
    backends = torch.backends
    old = bool(backends.cuda.matmul.allow_tf32), bool(backends.cudnn.allow_tf32)
    convolutions = backends.cudnn.conv.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
    assert old == (backends.cuda.matmul.fp32_precision == "tf32", convolutions == "tf32")
    return old


def use_new_interface() -> None:
    torch.backends.fp32_precision = "tf32"  # pyright: ignore[reportAttributeAccessIssue]


def use_old_interface() -> None:
    torch.set_float32_matmul_precision("high")


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("before", [lambda: None, use_new_interface, use_old_interface])
@pytest.mark.parametrize("tf32", [False, True])
def test_loading_sets_tf32(workplace: Path, before: Callable[[], None], tf32: bool) -> None:
    assert is_tf32() == (False, True)  # PyTorch's default: convolutions alone
    make_model(workplace / "model")
    before()
    leanclip.load(workplace / "model", tf32=tf32)
    assert is_tf32() == (tf32, tf32)
    leanclip.load(workplace / "model")
    assert is_tf32() == (False, False)


@pytest.mark.usefixtures("switches")
def test_training_and_evaluation_follow_the_setting(command: Command, workplace: Path) -> None:
    seen: set[tuple[bool, bool]] = set()
    hook = register_module_forward_hook(lambda *_: seen.add(is_tf32()))
    data = ("--data", "pairs:data")
    try:
        for words, expected in (
            (("train", "-c", "config.yaml"), False),
            (("train", "-c", "config.yaml", "-o", "tf32=true", "--output-dir", "b"), True),
            (("train", "-c", "config.yaml", "--evaluate-only"), False),
            (("eval", "--model", "runs/config"), False),
            (("eval", "--model", "b"), True),  # as it was trained
            (("eval", "--model", "runs/config", "--tf32"), True),
            (("eval", "--model", "runs/config/checkpoints/step-00000006", *data), False),
            (("compare", "runs/config", "b", *data, "--tf32"), True),
            (("compare", "runs/config", "b", *data), False),
            (("similarity", "--images", "data/000.png", "--texts", "a", "--model", "b"), False),
        ):
            seen.clear()
            done = command(*words)
            assert done.returncode == 0, done.stderr
            assert seen == {(expected, expected)}, words
    finally:
        hook.remove()
    assert_refused(
        command("train", "-c", "config.yaml", "-o", "tf32=true"), "tf32: False there, True here"
    )
    assert_refused(
        command("train", "-c", "config.yaml", "-o", "train.tf32=true"), "did you mean tf32?"
    )
