"""`train.deterministic`: the same bits again, or a refusal in words."""

from pathlib import Path

import pytest
import torch
from conftest import Command, assert_refused, report_of, run_cli, weights_hash
from torch.nn.modules.module import register_module_forward_hook

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
