"""Metrics against scikit-learn, stable sorts and matrices checked by hand."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ranks_of
from sklearn.metrics import balanced_accuracy_score, confusion_matrix
from torch.nn import functional as F

from leanclip.evaluation import (
    Classification,
    bootstrap,
    calibration_error,
    rank_of,
    retrieval_metrics,
    retrieve,
)
from leanclip.evaluation.classification import classify

NAMES = [f"class {i}" for i in range(7)]


def scores_with_ties(rows: int, columns: int) -> torch.Tensor:
    """Few different values, so that equals are everywhere."""
    return torch.randint(6, (rows, columns)).float()


def stable_places(row: torch.Tensor) -> list[int]:
    """The columns of a row of scores, the highest first, of equals the first."""
    return sorted(range(len(row)), key=lambda j: -row[j].item())


def classification(scores: torch.Tensor, labels: torch.Tensor, block: int = 4) -> Classification:
    return classify(
        iter(scores.split(block)),
        labels,
        classes=NAMES[: scores.shape[1]],
        indices=torch.arange(len(labels)),
        features=torch.zeros(len(labels), 2),
    )


def test_ranks_and_the_highest_are_those_of_a_stable_sort() -> None:
    scores, labels = scores_with_ties(60, 7), torch.randint(7, (60,))
    said = classification(scores, labels)
    for i in range(60):
        places = stable_places(scores[i])
        assert said.ranks[i] == places.index(int(labels[i])) + 1
        assert said.top_classes[i].tolist() == places[:5]
    torch.testing.assert_close(
        said.top_probabilities, scores.softmax(dim=1).gather(1, said.top_classes)
    )


def test_classification_equals_scikit_learn() -> None:
    scores, labels = torch.randn(200, 7), torch.randint(6, (200,))  # no image of the last class
    said = classification(scores, labels)
    best = said.top_classes[:, 0].numpy()
    metrics = said.metrics()
    assert metrics["top1"] == pytest.approx((best == labels.numpy()).mean())
    hits = [labels[i] in scores[i].topk(5).indices for i in range(200)]
    assert metrics["top5"] == pytest.approx(np.mean(hits))
    seen = np.isin(best, range(6))  # of a class without images scikit-learn warns
    expected = confusion_matrix(labels.numpy(), best, labels=range(7))
    assert (said.confusion().numpy() == expected).all()
    by_class = [(best[labels == c] == c).mean() for c in range(6)]
    assert metrics["mean_per_class"] == pytest.approx(np.mean(by_class))
    if seen.all():
        balanced = balanced_accuracy_score(labels.numpy(), best)
        assert metrics["mean_per_class"] == pytest.approx(balanced)
    table = said.per_class()
    assert [row["top1"] for row in table] == [*map(pytest.approx, by_class), None]
    assert [row["images"] for row in table] == expected.sum(axis=1).tolist()
    assert [row["predicted"] for row in table] == expected.sum(axis=0).tolist()


def test_the_most_confused_pairs_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    scores = F.one_hot(torch.tensor([1, 1, 0, 1, 2, 0]), 3).float()
    assert classification(scores, labels).most_confused() == [(0, 1, 2), (1, 2, 1), (2, 0, 1)]


def test_mean_per_class_is_scikit_learns_balanced_accuracy() -> None:
    scores, labels = torch.randn(300, 5), torch.arange(300) % 5
    said = classification(scores, labels)
    expected = balanced_accuracy_score(labels.numpy(), said.top_classes[:, 0].numpy())
    assert said.metrics()["mean_per_class"] == pytest.approx(expected)


def test_calibration_error_by_hand_and_by_a_loop() -> None:
    # Bins of 1/15: 0.5 and 0.52 share one, 0.9 is alone; 1.0 belongs to the last.
    confidences = torch.tensor([0.5, 0.52, 0.9, 1.0])
    hits = torch.tensor([True, False, True, False])
    by_hand = (abs(1 - 1.02) + abs(1 - 0.9) + abs(0 - 1.0)) / 4
    assert calibration_error(confidences, hits) == pytest.approx(by_hand)
    confidences, hits = torch.rand(500).double(), torch.rand(500) < 0.5
    expected = 0.0
    for i in range(15):
        inside = (confidences > i / 15) & (confidences <= (i + 1) / 15)
        if inside.any():
            gap = confidences[inside].mean() - hits[inside].double().mean()
            expected += inside.double().mean().item() * abs(gap.item())
    assert calibration_error(confidences, hits) == pytest.approx(expected)


@pytest.mark.parametrize("block", [1, 50, 400, 10**6])
def test_blocked_retrieval_equals_the_whole_matrix(block: int) -> None:
    images = F.one_hot(torch.randint(5, (23,)), 5).float()  # many the same: ties
    texts = F.one_hot(torch.randint(5, (61,)), 5).float()
    owners = torch.cat([torch.arange(23), torch.randint(23, (38,))])[torch.randperm(61)]
    result = retrieve(
        images, texts, owners,
        captions=["x"] * 61, indices=torch.arange(23), block=block,
    )  # fmt: skip
    scores = images @ texts.T
    for i in range(23):
        place = next(k for k, j in enumerate(stable_places(scores[i])) if owners[j] == i)
        assert result.image_ranks[i] == place + 1
    for j in range(61):
        assert result.caption_ranks[j] == stable_places(scores[:, j]).index(int(owners[j])) + 1
    assert result.metrics() == retrieval_metrics(scores, owners)
    assert result.metrics()["image_to_text_median_rank"] == np.median(result.image_ranks)


def test_retrieval_builds_no_matrix(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        images = torch.randn(2000, 8)
        owners = torch.arange(20_000) % 2000
        texts = torch.randn(20_000, 8)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        retrieve(images, texts, owners, captions=["x"] * 20_000, indices=torch.arange(2000))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    (kilobytes,) = ranks_of(1, work, tmp_path)
    assert kilobytes < 80_000  # the matrix has 160 MB


def test_a_model_that_gives_everything_the_same_score_is_at_chance() -> None:
    metrics = retrieval_metrics(torch.zeros(20, 20), torch.arange(20))
    assert metrics["image_to_text_R@1"] == metrics["text_to_image_R@1"] == 1 / 20
    assert metrics["image_to_text_R@10"] == 0.5
    assert metrics["text_to_image_median_rank"] == 10.5


def test_a_broken_model_finds_nothing() -> None:
    scores = torch.full((4, 6), torch.nan)
    assert (rank_of(scores, torch.tensor([0, 1, 2, 3])) > 6).all()


def test_intervals_are_those_of_the_binomial() -> None:
    hits = np.arange(400) < 300

    def measure(drawn: np.ndarray) -> dict[str, np.ndarray]:
        return {"share": hits[drawn].mean(axis=1)}

    low, high = bootstrap(400, measure, resamples=4000)["share"]
    error = (0.75 * 0.25 / 400) ** 0.5
    assert low == pytest.approx(0.75 - 1.96 * error, abs=0.005)
    assert high == pytest.approx(0.75 + 1.96 * error, abs=0.005)
    assert bootstrap(400, measure, resamples=50) == bootstrap(400, measure, resamples=50)


def test_intervals_of_a_classification_equal_a_plain_loop() -> None:
    scores, labels = torch.randn(30, 5), torch.randint(5, (30,))
    said = classification(scores, labels)
    ranks, drawn = said.ranks.numpy(), np.random.default_rng(0).integers(30, size=(1000, 30))
    top1 = [(ranks[row] == 1).mean() for row in drawn]
    mean_per_class = []
    for row in drawn:
        own, right = labels.numpy()[row], ranks[row] == 1
        mean_per_class.append(np.mean([right[own == c].mean() for c in set(own.tolist())]))
    intervals = said.intervals()
    for name, values in (("top1", top1), ("mean_per_class", mean_per_class)):
        # Draws of another type of integer are other draws: the same up to chance.
        assert intervals[name] == pytest.approx(np.quantile(values, (0.025, 0.975)), abs=0.02)
    assert intervals.keys() == {"top1", "top5", "mean_per_class"}
    for name, (low, high) in intervals.items():
        assert low <= said.metrics()[name] <= high


def test_intervals_of_retrieval_contain_the_metrics() -> None:
    features, texts = torch.randn(2, 40, 4)
    result = retrieve(
        features, texts, torch.arange(40), captions=["x"] * 40, indices=torch.arange(40)
    )
    intervals = result.intervals()
    assert intervals.keys() == result.metrics().keys()
    for name, value in result.metrics().items():
        assert intervals[name][0] <= value <= intervals[name][1]
