"""Calibrated temperatures against scipy, coverage on fresh draws, and the file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, Command, assert_refused, fork_ranks, make_config, noise_image
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from leanclip import CLIP, ConfigError, DataError, Preprocess
from leanclip.evaluation import calibration_error
from leanclip.evaluation.calibration import Calibration, fit, fit_temperature
from leanclip.weights import fingerprint, save_weights


def draw(count: int, *, classes: int = 8, scale: float = 3.0, seed: int = 0) -> tuple:
    """Logits that are `scale` times too sure, and labels drawn by what they should be."""
    generator = torch.Generator().manual_seed(seed)
    true = 2 * torch.randn(count, classes, generator=generator)
    labels = torch.multinomial(true.softmax(dim=1), 1, generator=generator)[:, 0]
    return scale * true, labels


def fitted(logits: torch.Tensor, labels: torch.Tensor, coverage: float = 0.9) -> Calibration:
    names = [f"class {i}" for i in range(logits.shape[1])]
    return fit(logits, labels, coverage=coverage, weights="0", classes=names, templates=["a {}"])


@pytest.mark.parametrize("scale", [0.2, 1.0, 7.0])
def test_temperature_against_scipy(scale: float) -> None:
    logits, labels = draw(500, scale=scale)
    z, y = logits.double().numpy(), labels.numpy()

    second = np.argsort(z, axis=1)[:, -2]

    def loss(log_temperature: float) -> float:
        logs = log_softmax(z / np.exp(log_temperature), axis=1)
        rows = np.arange(len(y))
        return -logs[rows, y].sum() - logs[rows, second].mean()  # one mistake more

    theirs: Any = minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9})
    assert fit_temperature(logits, labels) == pytest.approx(np.exp(theirs.x), rel=1e-5)


def test_temperature_where_nothing_is_wrong_is_not_zero() -> None:
    for count in (20, 200):
        z = torch.zeros(count, 4)
        z[:, 1] = 5
        probability = (z / fit_temperature(z, torch.ones(count).long())).softmax(dim=1)[0, 1]
        assert probability == pytest.approx(1 - 1 / (count + 1), rel=0.01)
    assert fit_temperature(5 * torch.eye(4), torch.arange(4).roll(1)) == pytest.approx(20)


def test_calibration_makes_probabilities_mean_what_they_say() -> None:
    calibration = fitted(*draw(4000, scale=3.0))
    assert calibration.temperature == pytest.approx(3.0, rel=0.1)
    logits, labels = draw(4000, scale=3.0, seed=1)
    before, after = (
        calibration_error(chances.amax(dim=1), chances.argmax(dim=1) == labels)
        for chances in (logits.softmax(dim=1), calibration.probabilities(logits))
    )
    assert before > 0.1
    assert after < 0.03


@pytest.mark.parametrize("coverage", [0.6, 0.9, 0.95])
def test_coverage_on_fresh_draws(coverage: float) -> None:
    held, refused, sizes = [], [], []
    for seed in range(60):
        calibration = fitted(*draw(200, seed=seed), coverage=coverage)
        logits, labels = draw(500, seed=1000 + seed)
        sets = calibration.prediction_sets(logits)
        held.append(sets.gather(1, labels[:, None]).float().mean().item())
        refused.append(calibration.is_none(logits).float().mean().item())
        sizes.append(sets.sum(dim=1).float().mean().item())
    # Of 60 calibrations with 100 images each the mean strays by about 0.004.
    assert np.mean(held) > coverage - 0.012
    assert np.mean(refused) < 1 - coverage + 0.012
    assert np.mean(refused) > 1 - coverage - 0.025  # it refuses no fewer than it may
    if coverage > 0.8:  # below, the most probable class alone is right more often
        assert np.mean(held) < coverage + 0.025
    assert 1 <= np.mean(sizes) < 6


def test_few_images_still_cover_and_too_few_are_refused() -> None:
    held = []
    for seed in range(300):
        calibration = fitted(*draw(17, seed=seed))
        logits, labels = draw(100, seed=1000 + seed)
        sets = calibration.prediction_sets(logits)
        held.append(sets.gather(1, labels[:, None]).float().mean().item())
    assert np.mean(held) > 0.89
    with pytest.raises(DataError, match=r"16 images are too few .* 0.9, which needs 17"):
        fitted(*draw(16))
    with pytest.raises(DataError, match="logits are not finite"):
        fitted(torch.full((20, 3), torch.nan), torch.zeros(20).long())
    with pytest.raises(ConfigError, match="coverage: 1 is not between 0 and 1"):
        fitted(*draw(16), coverage=1)


def test_a_set_is_never_empty_and_foreign_images_are_none() -> None:
    calibration = fitted(*draw(400), coverage=0.6)
    flat = torch.zeros(3, 8)
    flat[:, 2] = 0.01
    assert calibration.prediction_sets(flat).sum(dim=1).tolist() == [1, 1, 1]
    assert calibration.prediction_sets(flat)[:, 2].all()
    assert calibration.is_none(flat).all()
    assert not calibration.is_none(100 * torch.eye(8)).any()


def test_the_file_gives_back_what_was_saved_and_knows_whose_it_is(tmp_path: Path) -> None:
    model, classes, templates = CLIP(**TINY), ["ant", "bee"], ["a {}"]
    weights = fingerprint(model.state_dict())
    logits, labels = draw(100, classes=2)
    calibration = fit(
        logits, labels, coverage=0.8, weights=weights, classes=classes, templates=templates
    )
    path = calibration.save(tmp_path)
    assert Calibration.load(path) == Calibration.load(tmp_path) == calibration
    calibration.check(model, classes, templates)
    with pytest.raises(ConfigError, match="other classes and templates; fit"):
        calibration.check(model, ["bee", "ant"], ["{}"])
    with torch.no_grad():
        model.get_parameter("ln_final.bias")[0] += 1e-6
    with pytest.raises(ConfigError, match="other weights; fit"):
        calibration.check(model, classes, templates)


def test_what_is_no_calibration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        Calibration.load(tmp_path)
    path = tmp_path / "calibration.json"
    for text in ("no", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"is no calibration\.json"):
            Calibration.load(path)
    fitted(*draw(100)).save(tmp_path)
    good = json.loads(path.read_text())
    for name, value in (("temperature", "1"), ("floor", None), ("images", 0.5), ("classes", "a"),
                        ("temperature", 0), ("threshold", float("nan"))):  # fmt: skip
        path.write_text(json.dumps(good | {name: value}))
        with pytest.raises(ConfigError, match=f"calibration.json: {name}"):
            Calibration.load(path)


def test_two_ranks_calibrate_as_one(command: Command, workplace: Path) -> None:
    make_classes(workplace / "c" / "val", 9)
    make_classes(workplace / "c" / "test", 9, first=50)
    model = CLIP(**TINY)
    (workplace / "m").mkdir()
    save_weights(workplace / "m", model.state_dict(), model.config, Preprocess(32))
    words = ("eval", "--model", "m", "--data", "folder:c", "--split", "test", "--calibrate", "val",
             "--coverage", "0.8", "-c", "small.yaml")  # fmt: skip
    make_config(workplace / "small.yaml", evaluate={"batch_size": 4, "retrieval": None})
    assert command(*words, "--out", "one").returncode == 0
    ranks = fork_ranks(2, *words, "--out", "two", folder=workplace)
    assert [rank.code() for rank in ranks] == [0, 0], ranks[0].output()
    assert Calibration.load(workplace / "one") == Calibration.load(workplace / "two")


def make_classes(root: Path, count: int, first: int = 0) -> None:
    for label, name in enumerate(("ant", "bee", "cow")):
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise_image(first + 100 * label + i).save(root / name / f"{i}.png")


def test_eval_calibrates_on_a_split_or_on_a_share(command: Command, workplace: Path) -> None:
    make_classes(workplace / "c" / "test", 6)
    make_classes(workplace / "c" / "val", 10, first=50)
    model = CLIP(**TINY)
    (workplace / "m").mkdir()
    save_weights(workplace / "m", model.state_dict(), model.config, Preprocess(32))
    make_config(
        workplace / "z.yaml",
        data={"format": "folder", "root": "c", "split": "val"},
        evaluate={"zero_shot": {"templates": ["a {}"], "split": "test"}, "retrieval": None},
    )
    words = ("eval", "--model", "m", "-c", "z.yaml", "--out", "out")
    for held_out, images, measured in (("val", 15, 18), ("0.5", 5, 9)):
        done = command(*words, "--calibrate", held_out, "--coverage", "0.8")
        assert done.returncode == 0, done.stderr
        assert f" of {measured} images (" in done.stdout
        report = json.loads((workplace / "out/report.json").read_text())
        assert report["metrics"]["calibrated_ece"] <= 1
        assert report["metrics"]["calibrated_ece_before"] <= 1
        found = Calibration.load(workplace / "out")
        assert (found.images, found.coverage) == (images, 0.8)
        assert found.weights == report["weights"]["sha256"]
        found.check(model, ["ant", "bee", "cow"], ["a {}"])
    low, high = report["intervals"]["calibrated_coverage"]
    assert low <= report["metrics"]["calibrated_coverage"] <= high

    def refused(*more: str, says: str) -> None:
        assert_refused(command(*words, *more), says)

    refused("--calibrate", "test", says="is the split that is evaluated")
    refused("--calibrate", "nope", says="no folder nope in c")
    refused("--calibrate", "1.5", says="neither a split nor a fraction between 0 and 1")
    refused("--calibrate", "val", "--coverage", "2", says="not between 0 and 1")
    refused("--calibrate", "0.1", says="2 images are too few for a coverage of 0.9")
    refused("--data", "pairs:data", "--calibrate", "val", says="needs zero-shot")
