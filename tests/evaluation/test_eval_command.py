"""`leanclip eval`: one process and three, what it writes, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    CLASSES,
    TINY,
    Command,
    configured_tasks,
    fork_ranks,
    make_config,
    make_model,
    make_table,
    ranks_of,
    report_of,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from leanclip import CLIP, Preprocess
from leanclip.config.schema import Config
from leanclip.config.sections import parse
from leanclip.evaluation import encode_texts, evaluate


def test_three_ranks_give_the_metrics_of_one(command: Command, workplace: Path) -> None:
    make_model(workplace / "m")
    make_table(workplace / "t", 1003)
    (workplace / "t" / "7.bmp").write_bytes(b"no image")
    for name, task in (("caption", "retrieval"), ("label", "zeroshot"), ("label", "knn")):
        options = ("eval", "--model", "m", "--data", f"table:t/{name}.csv", "--task", task)
        one = command(*options, "--out", f"one-{task}")
        assert one.returncode == 0, one.stderr
        assert ("1,002 images" in one.stdout) == (task != "knn")  # which learns from a half
        assert one.stderr.count("skipped: t/7.bmp") == 1
        ranks = fork_ranks(3, *options, "--out", f"three-{task}", folder=workplace)
        assert [rank.code() for rank in ranks] == [0, 0, 0], ranks[0].output()
        assert [rank.output() for rank in ranks[1:]] == ["", ""]
        assert ranks[0].output().count("skipped: t/7.bmp") == 1
        reports = [report_of(workplace / f"{which}-{task}") for which in ("one", "three")]
        for part in ("metrics", "intervals", "sentences", "weights", "data", "classes", "bad"):
            assert reports[0][part] == reports[1][part], part


@pytest.mark.slow
def test_ranks_are_started_by_an_option(command: Command, workplace: Path) -> None:
    make_model(workplace / "m")
    options = ("eval", "--model", "m", "--data", "pairs:data")
    one = command(*options, "--out", "one")
    two = command(*options, "--num-procs", "2", "--out", "two")
    assert one.returncode == two.returncode == 0, two.stderr
    assert report_of(workplace / "one")["metrics"] == report_of(workplace / "two")["metrics"]


def test_metrics_during_training_are_shared_too(command: Command, workplace: Path) -> None:
    """Three ranks of a ResNet, whose BatchNorms' statistics differ by rank."""
    make_config(
        workplace / "config.yaml",
        model={"vision_layers": [1, 1, 1, 1], "vision_width": 8, "vision_heads": 2,
               "vision_patch_size": None},
        train={"epochs": 1},
        evaluate={"batch_size": 5},
    )  # fmt: skip
    ranks = fork_ranks(3, "train", "-c", "config.yaml", folder=workplace)
    assert [rank.code() for rank in ranks] == [0, 0, 0], ranks[0].output()
    done = command("eval", "--model", "runs/config", "--out", "again")
    assert done.returncode == 0, done.stderr
    run, again = report_of(workplace / "runs/config"), report_of(workplace / "again")
    for part in ("metrics", "intervals", "data"):
        assert run[part] == again[part]
    assert run["weights"]["sha256"] == again["weights"]["sha256"]
    assert run["command"] == "leanclip eval --model runs/config"


def test_unreadable_data_ends_all_ranks(workplace: Path) -> None:
    make_model(workplace / "m")
    for path in (workplace / "data").glob("*.png"):
        path.write_bytes(b"no image")
    options = ("eval", "--model", "m", "--data", "pairs:data")
    ranks = fork_ranks(2, *options, folder=workplace)
    assert [rank.code() for rank in ranks] == [2, 2]
    assert "bad of 12 samples" in ranks[0].output()


def test_texts_are_encoded_once_each_without_padding(tmp_path: Path) -> None:
    model = CLIP(**TINY).eval()
    texts = [f"{'word ' * (i % 4)}{i % 9}" for i in range(40)]
    seen: list[torch.Tensor] = []
    model.token_embedding.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    features = encode_texts(model, texts, batch_size=3)
    assert sum(len(tokens) for tokens in seen) == len(set(texts))
    assert all((tokens != 0).all() for tokens in seen)
    with torch.no_grad():
        for text, row in zip(texts, features, strict=True):
            torch.testing.assert_close(row[None], encode_texts(model, [text]))

    def work(rank: int) -> list[list[float]]:
        return encode_texts(model, texts, batch_size=3, shared=True).tolist()

    assert ranks_of(3, work, tmp_path) == [features.tolist()] * 3


def test_the_report_says_what_was_measured(command: Command, workplace: Path) -> None:
    make_model(workplace / "m")
    make_table(workplace / "t", 40)
    words = ("eval", "--model", "m", "--data", "table:t/label.csv", "--task", "zeroshot")
    assert command(*words, "--out", "e").returncode == 0
    report = report_of(workplace / "e")
    metrics, intervals = report["metrics"], report["intervals"]
    assert intervals.keys() == {f"zeroshot_{n}" for n in ("top1", "top5", "mean_per_class")}
    assert all(low <= metrics[name] <= high for name, (low, high) in intervals.items())
    assert metrics.keys() - intervals.keys() == {"zeroshot_ece"}
    (classes,) = report["classes"].values()
    assert [row["name"] for row in classes["per_class"]] == list(CLASSES)
    assert sum(images for _, _, images in classes["confusion"]) == 40
    right = sum(images for label, said, images in classes["confusion"] if label == said)
    assert right / 40 == pytest.approx(metrics["zeroshot_top1"])
    assert report["command"] == f"leanclip {' '.join(words)} --out e"
    assert len(report["weights"]["sha256"]) == len(report["data"]["zero_shot"]["sha256"]) == 64
    assert report["versions"].keys() >= {"leanclip", "torch", "python"}


def test_hashes_follow_content_and_not_place(tmp_path: Path) -> None:
    def report(root: Path, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        values = {"model": TINY, "data": {"format": "table", "root": str(root), "workers": 0}}
        values |= {"evaluate": {"zero_shot": {}}}
        tasks = configured_tasks(parse(Config, values, where="test"))
        return evaluate(CLIP(**TINY).eval(), tasks, Preprocess(32))

    first = report(make_table(tmp_path / "a", 20) / "label.csv")
    there = make_table(tmp_path / "b", 20)
    second = report(there / "label.csv")
    assert first.data["zero_shot"]["sha256"] == second.data["zero_shot"]["sha256"]
    assert first.weights == second.weights
    assert report(there / "label.csv", seed=1).weights != first.weights
    Image.new("RGB", (8, 8), (9, 9, 9)).save(there / "3.bmp")
    changed = report(there / "label.csv")
    assert changed.data["zero_shot"]["sha256"] != first.data["zero_shot"]["sha256"]


def test_a_broken_model_is_reported_as_one(command: Command, workplace: Path) -> None:
    make_model(workplace / "m")
    make_table(workplace / "t", 10)
    weights = load_file(workplace / "m/model.safetensors")
    weights["visual.proj"].fill_(torch.nan)
    save_file(weights, workplace / "m/model.safetensors")
    done = command("eval", "--model", "m", "--data", "table:t/label.csv", "--out", "e")
    assert done.returncode == 0, done.stderr
    text = (workplace / "e/report.json").read_text()
    metrics = json.loads(text, parse_constant=lambda word: pytest.fail(word))["metrics"]
    assert metrics["zeroshot_top1"] == 0
    assert metrics["zeroshot_ece"] is None
