"""Rows that show the same image, samples of images, and one data set in many forms."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from conftest import TINY, Command, configured_tasks, fork_ranks, make_model, noise_image, report_of
from pyarrow import parquet

from leanclip import CLIP, Preprocess
from leanclip.cli.evaluation_config import evaluation_config
from leanclip.config.schema import Config
from leanclip.config.sections import parse
from leanclip.config.strict_yaml import dump_yaml
from leanclip.data import Dataset, Sample
from leanclip.errors import ConfigError, DataError
from leanclip.evaluation import RetrievalResult, evaluate
from leanclip.evaluation.distinct import distinct_images
from leanclip.evaluation.statistics import mcnemar, mean_by_group, median_by_group
from leanclip.report.text import sentences
from leanclip.weights import save_weights

Picture = tuple[bytes, list[str]]


def encoded_image(seed: int) -> bytes:
    file = io.BytesIO()
    noise_image(seed).save(file, "PNG")
    return file.getvalue()


def pictures(count: int = 30) -> list[Picture]:
    """Images with one to four captions, some of which are those of other images too."""
    found = []
    for i in range(count):
        captions = [f"picture {i}", "a drawing", f"one of {i // 3}", f"it shows {i}"]
        found.append((encoded_image(i), captions[: 1 + i % 4]))
    twin = io.BytesIO()  # other bytes, the same pixels: all its scores are those of image 3
    noise_image(3).save(twin, "BMP")
    return [*found, (twin.getvalue(), ["a drawing", "picture 3"])]


def write_pairs(root: Path, data: list[Picture]) -> str:
    root.mkdir()
    for i, (image, captions) in enumerate(data):
        (root / f"{i:03d}.png").write_bytes(image)
        (root / f"{i:03d}.txt").write_text("\n".join(captions) + "\n")
    return f"pairs:{root}"


def rows_of(data: list[Picture]) -> list[tuple[int, str]]:
    """A row per caption, in no order."""
    rows = [(i, caption) for i, (_, captions) in enumerate(data) for caption in captions]
    return [rows[i] for i in np.random.default_rng(5).permutation(len(rows))]


def write_csv(root: Path, data: list[Picture]) -> str:
    root.mkdir()
    for i, (image, _) in enumerate(data):
        (root / f"z{99 - i}.png").write_bytes(image)
    with (root / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows([(f"z{99 - i}.png", caption) for i, caption in rows_of(data)])
    return f"table:{root}/captions.csv"


def write_copies(root: Path, data: list[Picture]) -> str:
    """A file per caption: the same bytes under several names."""
    rows = rows_of(data)
    return write_csv(root, [(data[i][0], [caption]) for i, caption in rows])


def write_parquet(root: Path, data: list[Picture]) -> str:
    root.mkdir()
    rows = rows_of(data)[::-1]
    columns = {"image": [data[i][0] for i, _ in rows], "caption": [words for _, words in rows]}
    parquet.write_table(pyarrow.table(columns), root / "rows.parquet")
    return f"table:{root}/rows.parquet"


def write_hub(root: Path, data: list[Picture]) -> str:
    rows = rows_of(data)[::2] + rows_of(data)[1::2]
    columns = {"image": [{"bytes": data[i][0], "path": None} for i, _ in rows]}
    columns |= {"caption": [words for _, words in rows]}
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(root)
    return f"hub:{root}"


def write_shards(root: Path, data: list[Picture], rows: bool = False) -> str:
    root.mkdir()
    samples = [(data[i][0], [words]) for i, words in rows_of(data)] if rows else data[::-1]
    for shard in range(2):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for i, (image, captions) in list(enumerate(samples))[shard::2]:
                text = json.dumps({"caption": captions}).encode()
                for suffix, content in (("png", image), ("json", text)):
                    member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return f"shards:{root}"


def write_shards_of_rows(root: Path, data: list[Picture]) -> str:
    return write_shards(root, data, rows=True)


FORMS: dict[str, Callable[[Path, list[Picture]], str]] = {
    "csv": write_csv,
    "copies": write_copies,
    "parquet": write_parquet,
    "hub": write_hub,
    "shards": write_shards,
    "shards of rows": write_shards_of_rows,
}


def tasks_of(spec: str, task: str = "retrieval", **evaluation: Any) -> Any:
    format, root = spec.split(":", 1)
    values = {
        "model": TINY,
        "data": {"format": format, "root": root, "workers": 0},
        "evaluate": {"batch_size": 7, task: evaluation},
    }
    return configured_tasks(parse(Config, values, where="test"))


def measured(spec: str, task: str = "retrieval", **evaluation: Any) -> Any:
    torch.manual_seed(1)
    return evaluate(CLIP(**TINY).eval(), tasks_of(spec, task, **evaluation), Preprocess(32))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANCLIP_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("limit", [None, 12])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_metrics(form: str, limit: int | None, tmp_path: Path) -> None:
    expected = measured(write_pairs(tmp_path / "pairs", pictures()), limit=limit)
    found = measured(FORMS[form](tmp_path / "other", pictures()), limit=limit)
    assert found.metrics == expected.metrics
    assert found.intervals == expected.intervals
    for name in ("samples", "available", "sha256"):
        assert found.data["retrieval"][name] == expected.data["retrieval"][name]
    assert found.data["retrieval"]["samples"] == (limit or 31)
    assert 0 < found.metrics["image_to_text_R@5"] < 1


def test_two_ranks_give_the_same_as_one(command: Command, workplace: Path) -> None:
    """Through the command line, with other formats on each side."""
    make_model(workplace / "m")
    specs = [write_pairs(workplace / "p", pictures()), write_csv(workplace / "t", pictures())]
    for limit in ([], ["-o", "evaluate.retrieval.limit=9"]):
        config = {
            "model": TINY,
            "data": {"format": "pairs", "root": str(workplace / "p"), "workers": 0},
            "evaluate": {"retrieval": {}, "batch_size": 4, "pictures": False},
        }
        reports = []
        for number, spec in enumerate(specs):
            format, root = spec.split(":")
            data = {"format": format, "root": root, "workers": number}
            (workplace / "c.yaml").write_text(dump_yaml(config | {"data": data}))
            words = ["eval", "--model", "m", "-c", "c.yaml", *limit, "--out", f"out-{number}"]
            if number:
                ranks = fork_ranks(2, *words, folder=workplace)
                assert [rank.code() for rank in ranks] == [0, 0], ranks[0].output()
            else:
                done = command(*words)
                assert done.returncode == 0, done.stderr
                assert ("sample of 9 of the 31 images" in done.stdout) == bool(limit)
            page = (workplace / f"out-{number}/report.html").read_text()
            assert ("sample of 9 of the 31 images" in page) == bool(limit)
            reports.append(report_of(workplace / f"out-{number}"))
        for name in ("metrics", "intervals"):
            assert reports[0][name] == reports[1][name]
        facts = [report["data"]["retrieval"] for report in reports]
        assert facts[0]["sha256"] == facts[1]["sha256"]
        assert facts[0]["samples"] == (9 if limit else 31)


@pytest.mark.parametrize("form", FORMS)
def test_limit_of_data_that_the_command_line_names(form: str, tmp_path: Path) -> None:
    """Weights without a config, `--data`, and settings by `-o`: those of `evaluate` and `data`."""
    model = make_model(tmp_path / "m")
    spec = FORMS[form](tmp_path / "other", pictures())
    for overrides, limit in (((), None), (("evaluate.retrieval.limit=9",), 9)):
        [task] = configured_tasks(evaluation_config(str(model), spec, overrides=overrides))
        assert (task.name, task.limit) == ("retrieval", limit)


def test_settings_for_data_that_the_command_line_names(tmp_path: Path) -> None:
    """With a run's config too, whose own data has no such columns."""
    model = make_model(tmp_path / "m")
    (tmp_path / "a.png").write_bytes(encoded_image(0))
    (tmp_path / "c.csv").write_text("image,comment,kind\na.png,a cat,cat\na.png,a dog,dog\n")
    config = {"model": TINY, "data": {"format": "shapes", "root": "s"}}
    (tmp_path / "c.yaml").write_text(dump_yaml(config))
    spec = f"table:{tmp_path / 'c.csv'}"
    for path in (None, tmp_path / "c.yaml"):
        for section in ("data", "evaluate.retrieval"):
            overrides = [f"{section}.caption_column=comment"]
            settings = evaluation_config(str(model), spec, config=path, overrides=overrides)
            [task] = configured_tasks(settings)
            assert task.dataset[0].captions == ["a cat"]
        wrong = ["data.label_column=kind", "evaluate.retrieval.limit=3"]
        with pytest.raises(ConfigError, match=r"evaluate\.retrieval: .* only zero_shot"):
            evaluation_config(str(model), spec, config=path, overrides=wrong)
        overrides.append("evaluate.retrieval.limt=3")
        with pytest.raises(ConfigError, match=r"did you mean evaluate\.retrieval\.limit"):
            evaluation_config(str(model), spec, config=path, overrides=overrides)


def test_a_sample_does_not_depend_on_the_seed_or_the_order(tmp_path: Path) -> None:
    root = tmp_path / "c"
    for label, name in enumerate(("ant", "bee", "cow", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(25):
            (root / name / f"{i}.png").write_bytes(encoded_image(100 * label + i))
    found = []
    for seed in (0, 1):
        values = {"model": TINY, "data": {"format": "folder", "root": str(root), "workers": 0}}
        values |= {"seed": seed, "evaluate": {"zero_shot": {"limit": 40}}}
        torch.manual_seed(seed)
        tasks = configured_tasks(parse(Config, values, where="test"))
        report = evaluate(CLIP(**TINY).eval(), tasks, Preprocess(32))
        result = report.results["zero_shot"]
        assert "sample of 40 of the 100 images" in sentences(report)[1]
        found.append(sorted(result.indices.tolist()))
    assert found[0] == found[1]
    assert len(found[0]) == 40
    assert all(np.bincount(np.array(found[0]) // 25, minlength=4) > 3)  # of every class
    fewer = measured(f"folder:{root}", "zero_shot", limit=10)
    assert set(fewer.results["zero_shot"].indices.tolist()) < set(found[0])


def test_all_equal_scores_are_at_chance(tmp_path: Path) -> None:
    specs = [write_pairs(tmp_path / "p", pictures()), write_csv(tmp_path / "t", pictures())]
    metrics = []
    for spec in specs:
        model = CLIP(**TINY).eval()
        torch.nn.init.zeros_(model.get_parameter("text_projection"))
        metrics.append(evaluate(model, tasks_of(spec), Preprocess(32)).metrics)
    assert metrics[0] == metrics[1]
    assert metrics[0]["image_to_text_R@1"] == 1 / 31


def garbage(count: int) -> list[bytes]:
    """Files that are no images; their digests are so low that any sample has them."""

    def digest(content: bytes) -> int:
        return int.from_bytes(blake2b(content, digest_size=8).digest(), signed=True)

    return sorted((b"no image %d" % i for i in range(5000)), key=digest)[:count]


@pytest.mark.parametrize("write", [write_pairs, write_csv, write_parquet, write_shards])
@pytest.mark.parametrize(
    ("broken", "share", "limit", "is_refused"),
    [
        (10, 0.2, None, True),
        (10, 0.3, None, False),
        (4, 0.2, 8, True),  # half of the sample, a tenth of all
        (4, 0.5, 8, False),
    ],
)
def test_bad_images_are_a_share_of_those_tried(
    write: Callable[[Path, list[Picture]], str],
    broken: int,
    share: float,
    limit: int | None,
    is_refused: bool,
    tmp_path: Path,
) -> None:
    images = garbage(broken) + [encoded_image(i) for i in range(40 - broken)]
    spec = write(tmp_path / "d", [(image, [f"a {i}", f"b {i}"]) for i, image in enumerate(images)])
    (task,) = tasks_of(spec, limit=limit)
    task = replace(task, data=task.data.model_copy(update={"max_bad_fraction": share}))
    model = CLIP(**TINY).eval()
    if is_refused:
        with pytest.raises(DataError, match=r"bad of (8|16|40|80) samples"):
            evaluate(model, [task], Preprocess(32))
    else:
        report = evaluate(model, [task], Preprocess(32))
        assert len(report.bad) == broken * (2 if write is write_parquet else 1)
        assert report.data["retrieval"]["samples"] == (limit or 40) - broken


def test_files_of_the_same_garbage_are_all_counted(tmp_path: Path) -> None:
    data = pictures(20)
    for i in (3, 5, 8):
        data[i] = (b"<html>not found</html>", data[i][1])
    data[12] = data[13] = (b"", ["empty"])
    spec = write_pairs(tmp_path / "p", data)
    (task,) = tasks_of(spec)
    with pytest.raises(DataError, match="of 21 samples"):
        evaluate(CLIP(**TINY).eval(), [task], Preprocess(32))
    task = replace(task, data=task.data.model_copy(update={"max_bad_fraction": 0.3}))
    report = evaluate(CLIP(**TINY).eval(), [task], Preprocess(32))
    names = [f"{tmp_path}/p/{i:03d}.png" for i in (3, 5, 8, 12, 13)]
    assert sorted(report.bad) == names
    assert all(report.bad[name].startswith(name) for name in names)


def test_a_row_without_a_caption_takes_nothing_from_its_image(tmp_path: Path) -> None:
    whole = measured(write_csv(tmp_path / "a", pictures()))
    spec = write_csv(tmp_path / "b", pictures())
    with (tmp_path / "b/captions.csv").open("a") as file:
        file.write("z99.png,\nz98.png,  \nz98.png,\n")
    (task,) = tasks_of(spec)
    task = replace(task, data=task.data.model_copy(update={"max_bad_fraction": 0.2}))
    torch.manual_seed(1)
    report = evaluate(CLIP(**TINY).eval(), [task], Preprocess(32))
    assert report.data["retrieval"]["samples"] == 31
    assert report.metrics == whole.metrics
    assert len(report.bad) == 3


class Slow(Dataset):
    """A data set that is read fast only in its own order; it notes what is read."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset, self.asked = dataset, []

    @property
    def has_random_access(self) -> bool:
        return False

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        self.asked.append(index)
        return self._dataset[index]


def test_shards_that_must_be_fetched_are_read_in_their_order(tmp_path: Path) -> None:
    spec = write_csv(tmp_path / "t", pictures())
    for limit in (None, 12):
        expected = measured(spec, limit=limit)
        (task,) = tasks_of(spec, limit=limit)
        slow = Slow(task.dataset)
        torch.manual_seed(1)
        found = evaluate(CLIP(**TINY).eval(), [replace(task, dataset=slow)], Preprocess(32))
        assert found.data["retrieval"] == expected.data["retrieval"]
        images = distinct_images(slow, limit)
        assert (np.diff(images.first_rows) > 0).all()
        assert slow.asked[: len(slow)] == list(range(len(slow)))
        rows = np.setdiff1d(slow.asked[len(slow) :], [])
        assert len(rows) == sum(len(images[i].captions) for i in range(len(images)))


# --- intervals and tests over images


def test_captions_of_an_image_are_drawn_together() -> None:
    """Against plain resampling, with np.median."""
    rng = np.random.default_rng(1)
    groups = np.sort(np.append(np.arange(9), rng.integers(9, size=20)))
    values = rng.integers(1, 30, 29)
    drawn = rng.integers(9, size=(50, 9))
    for row in drawn:
        chosen = np.concatenate([values[groups == group] for group in row])
        assert mean_by_group(values, groups, row[None])[0] == pytest.approx(chosen.mean())
        assert median_by_group(values, groups, row[None])[0] == np.median(chosen)
    assert len(median_by_group(values, groups, drawn)) == 50


def retrieval_result(image_ranks: list[int], caption_ranks: list[int], times: int) -> Any:
    """A result in which each image has its captions so many times."""
    captions = torch.tensor(caption_ranks).repeat_interleave(times)
    owners = torch.arange(len(image_ranks)).repeat_interleave(times)
    nothing = torch.empty(0)
    return RetrievalResult(
        torch.arange(len(image_ranks)), nothing, [""] * len(owners), owners, nothing,
        torch.tensor(image_ranks), captions, nothing, nothing,
    )  # fmt: skip


def test_copies_of_captions_make_no_interval_narrower() -> None:
    ranks = np.random.default_rng(0).integers(1, 12, 40).tolist()
    once, often = (retrieval_result(ranks, ranks, times).intervals() for times in (1, 5))
    assert once == often
    for k in ("R@1", "R@5", "R@10", "median_rank"):
        assert once[f"text_to_image_{k}"] == once[f"image_to_text_{k}"]
    low, high = once["text_to_image_R@5"]
    assert low < np.mean(np.array(ranks) <= 5) < high


@pytest.mark.parametrize(("better", "worse"), [(3, 0), (9, 2), (4, 4), (20, 30), (40, 15)])
def test_copies_of_captions_make_no_difference_surer(better: int, worse: int) -> None:
    first = torch.tensor([False] * better + [True] * worse + [True] * 5)
    second = torch.tensor([True] * better + [False] * worse + [True] * 5)
    once = mcnemar(first, second)
    groups = torch.arange(len(first)).repeat_interleave(4)
    often = mcnemar(first.repeat_interleave(4), second.repeat_interleave(4), groups)
    assert often.p == pytest.approx(once.p)
    assert (often.better, often.worse) == (4 * better, 4 * worse)
    assert often.method.endswith("by images")
    single = mcnemar(first, second, torch.arange(len(first)))
    assert (single.p, single.method) == (once.p, once.method)


@pytest.mark.parametrize("images", [12, 60])
def test_changes_by_image_against_all_signs(images: int) -> None:
    """The p-value against random signs of each image's difference, drawn by another hand."""
    rng = np.random.default_rng(images)
    owners = np.repeat(np.arange(images), 3)
    first, second = (torch.from_numpy(rng.random(3 * images) < share) for share in (0.5, 0.65))
    found = mcnemar(first, second, torch.from_numpy(owners))
    changes = np.bincount(owners, second.numpy() * 1.0 - first.numpy() * 1.0)
    signs = rng.choice([-1, 1], (40_000, images))
    p = (abs(signs @ changes) >= abs(changes.sum())).mean()
    assert found.p == pytest.approx(p, abs=0.02)


def test_a_comparison_by_images_in_two_forms(command: Command, workplace: Path) -> None:
    make_model(workplace / "a")
    torch.manual_seed(7)
    make_other(workplace / "b")
    found = []
    for number, spec in enumerate(
        (write_pairs(workplace / "p", pictures()), write_parquet(workplace / "t", pictures()))
    ):
        done = command("compare", "a", "b", "--data", spec, "--out", f"out-{number}")
        assert done.returncode == 0, done.stderr
        found.append(json.loads((workplace / f"out-{number}/compare.json").read_text()))
    assert found[0]["differences"] == found[1]["differences"]
    assert found[0]["mcnemar"] == found[1]["mcnemar"]
    assert found[0]["mcnemar"]["text_to_image_R@1"]["method"].endswith("by images")


def make_other(folder: Path) -> None:
    model = CLIP(**TINY)
    folder.mkdir()
    save_weights(folder, model.state_dict(), model.config, Preprocess(32))
