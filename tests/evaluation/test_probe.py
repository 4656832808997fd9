"""Linear and k-NN probes against scikit-learn, and through the command line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, make_config, make_model, noise_image, report_of
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from leanclip.errors import DataError
from leanclip.evaluation.probe import (
    Labelled,
    choose_strength,
    draw_per_class,
    linear_probe,
    logistic_regression,
    neighbour_votes,
    scores_of,
)


def clouds(count: int, classes: int, spread: float = 0.8) -> Labelled:
    """Unit features around a point for each class."""
    centres = torch.randn(classes, 8, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(count) % classes
    return Labelled(F.normalize(centres[labels] + spread * torch.randn(count, 8), dim=-1), labels)


@pytest.mark.parametrize("classes", [2, 5])
def test_it_finds_scikit_learns_minimum(classes: int) -> None:
    train = clouds(120, classes)
    for strength in (1e-2, 1.0, 1e2):
        share = 2 if classes == 2 else 1  # scikit-learn has one row of weights for two classes
        fit = LogisticRegression(C=share / strength, max_iter=10_000, tol=1e-8)
        fit.fit(train.features.double().numpy(), train.labels.numpy())
        expected = fit.predict_proba(train.features.numpy())
        (scores,) = scores_of(logistic_regression(train, classes, strength), train.features)
        assert scores.softmax(dim=1).numpy() == pytest.approx(expected, abs=2e-3)


def test_a_class_without_images_gets_no_score() -> None:
    train = clouds(40, 3)
    some = Labelled(train.features[train.labels != 1], train.labels[train.labels != 1])
    one = Labelled(train.features[train.labels == 2], train.labels[train.labels == 2])
    (scores,) = scores_of(logistic_regression(some, 3, 1.0), train.features)
    assert (scores[:, 1] == -torch.inf).all()
    assert scores[:, [0, 2]].isfinite().all()
    (scores,) = scores_of(logistic_regression(one, 3, 1.0), train.features)
    assert (scores.argmax(dim=1) == 2).all()


def test_the_sweep_is_that_of_clips_paper() -> None:
    train, validation = clouds(60, 4, 1.5), clouds(200, 4, 1.5)
    strength, tried = choose_strength(train, validation, 4)
    eighths = sorted(round(8 * np.log10(one)) for one in tried)
    assert set(eighths) >= set(range(-48, 49, 16))
    assert len(tried) <= 7 + 2 * 4
    assert min(eighths) >= -48
    assert max(eighths) <= 48
    best = max(tried.values())
    assert tried[strength] == best
    assert strength == max(one for one, accuracy in tried.items() if accuracy == best)
    place = round(8 * np.log10(strength))
    around = {place - 1, place + 1} & set(range(-48, 49))
    assert around & set(eighths)  # an eighth of a decade apart
    fit = LogisticRegression(C=1 / strength, max_iter=1000)
    fit.fit(train.features.numpy(), train.labels.numpy())
    accuracy = fit.score(validation.features.numpy(), validation.labels.numpy())
    assert accuracy == pytest.approx(best)


def test_neighbours_vote_as_scikit_learns() -> None:
    train, there = clouds(90, 4, 1.2), clouds(50, 4, 1.2)
    weights: Any = lambda distances: np.exp((1 - distances) / 0.07)  # noqa: E731
    knn = KNeighborsClassifier(7, metric="cosine", algorithm="brute", weights=weights)
    knn.fit(train.features.numpy(), train.labels.numpy())
    (votes,) = neighbour_votes(train, there.features, 4, 7)
    expected = knn.predict_proba(there.features.numpy())
    assert votes.softmax(dim=1).numpy() == pytest.approx(expected, abs=1e-3)
    (all_of_them,) = neighbour_votes(train, there.features, 4, 10**6)
    assert all_of_them.isfinite().all()


def test_draws_are_by_class_and_the_same_again() -> None:
    labels = torch.tensor([0] * 10 + [1] * 3 + [2])
    drawn, rest = draw_per_class(labels, 0.2)
    assert torch.bincount(labels[drawn], minlength=3).tolist() == [2, 1, 0]
    assert sorted([*drawn.tolist(), *rest.tolist()]) == list(range(14))
    few, _ = draw_per_class(labels, 2)
    assert torch.bincount(labels[few]).tolist() == [2, 2, 1]
    assert torch.equal(few, draw_per_class(labels, 2)[0])
    assert not torch.equal(few, draw_per_class(labels, 2, seed=1)[0])


def test_few_shots_learn_from_no_more() -> None:
    train = clouds(100, 5)
    assert linear_probe(train, None, 5).learned == 100
    assert linear_probe(train, clouds(20, 5), 5).learned == 120
    assert linear_probe(train, None, 5, shots=3).learned == 15
    assert linear_probe(train, clouds(20, 5), 5, shots=1).learned == 5
    with pytest.raises(DataError, match="fewer --shots"):
        linear_probe(train, None, 5, shots=20)


def make_splits(root: Path, **counts: int) -> Path:
    """Class folders of noise around a colour for each class."""
    for split, count in counts.items():
        for label, name in enumerate(("ant", "bee", "cow")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = noise_image(1000 * label + i + sum(split.encode())).convert("RGB")
                tint = tuple(255 * (label == channel) for channel in range(3))
                pixels = np.asarray(image) // 4 + np.array(tint) * 3 // 4
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def test_probes_through_the_command_line(command: Command, workplace: Path) -> None:
    make_model(workplace / "m")
    make_splits(workplace / "c", train=6, test=4)
    options = ("eval", "--model", "m", "--data", "folder:c", "--out", "e")
    done = command(*options, "--task", "all")
    assert done.returncode == 0, done.stderr
    report = report_of(workplace / "e")
    for probe in ("linear_probe", "knn"):
        assert report["metrics"][f"{probe}_top1"] == 1.0  # the colours tell
        assert report["data"][probe]["split"] == "test"
        assert len(report["classes"][probe]["per_class"]) == 3
    assert "zeroshot_top1" in report["metrics"]
    assert "Linear probe on 12 images of 3 classes: top-1 100.0% (chance 33.3%)." in done.stdout
    assert "Trained on 18 labelled images of c, split train; L2 strength " in done.stdout
    assert "k-NN (k = 18) on 12 images of 3 classes: top-1 100.0% (chance 33.3%)." in done.stdout
    done = command(*options, "--task", "linear-probe", "--shots", "2")
    assert "6 labelled images of c, split train, 2 images per class; " in done.stdout
    done = command(*options, "--task", "knn", "--k", "1")
    assert "k-NN (k = 1) on " in done.stdout
    done = command(*options, "--task", "knn", "--split", "train", "--train-split", "test")
    assert "Neighbours from 12 labelled images of c, split test." in done.stdout
    assert "on 18 images of 3 classes" in done.stdout
    done = command(*options)
    assert report_of(workplace / "e")["metrics"].keys() == {
        f"zeroshot_{name}" for name in ("top1", "top5", "mean_per_class", "ece")
    }


def test_without_a_split_a_half_is_learned_from(command: Command, workplace: Path) -> None:
    make_model(workplace / "m")
    make_splits(workplace / "c", test=4)
    options = ("eval", "--model", "m", "--data", "folder:c/test")
    done = command(*options, "--task", "linear-probe")
    assert done.returncode == 0, done.stderr
    assert (
        "6 labelled images of c/test, half of each class, tested on the other half" in done.stdout
    )
    assert "on 6 images of 3 classes" in done.stdout
    done = command(*options, "--task", "all")
    assert "c/test: no train split, so no probes" in done.stderr


def test_probes_are_measured_during_training(command: Command, workplace: Path) -> None:
    make_splits(workplace / "c", train=4, test=4)
    data = {"format": "folder", "root": "c", "split": "test"}
    make_config(
        workplace / "config.yaml",
        data={"format": "folder", "root": "c", "split": "train"},
        train={"epochs": 1},
        evaluate={"retrieval": None, "linear_probe": data, "knn": {"k": 3} | data},
        checkpoint={"best_metric": "knn_top1"},
    )
    done = command("train", "-c", "config.yaml")
    assert done.returncode == 0, done.stderr
    metrics = report_of(workplace / "runs/config")["metrics"]
    assert metrics["linear_probe_top1"] == metrics["knn_top1"] == 1.0
    again = command("eval", "--model", "runs/config", "--task", "knn", "--out", "e")
    assert "k-NN (k = 3) on 12 images of 3 classes: top-1 100.0% (chance 33.3%)." in again.stdout
    assert "Neighbours from 12 labelled images of c, split train." in again.stdout
