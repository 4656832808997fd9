"""Metrics on matrices that a reader can check by hand, and evaluation as a whole."""

import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import TINY, configured_tasks, make_pairs, noise_image
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from leanclip import CLIP, ConfigError, Preprocess, build_classifier, recall_at_k
from leanclip.config.schema import Config
from leanclip.config.sections import parse
from leanclip.data import Dataset
from leanclip.errors import DataError
from leanclip.evaluation import evaluate, retrieval_metrics
from leanclip.evaluation.features import encode_images, encode_texts, images_at_once
from leanclip.evaluation.zero_shot import ZeroShotResult
from leanclip.preprocess.decoding import open_image
from leanclip.preprocess.tokenizer import tokenize
from leanclip.report.plots import image_grid, similarity_matrix
from leanclip.report.samples import examples, predictions
from leanclip.report.text import sentences

# 4 images by 8 captions; captions 0 and 1 belong to image 0, 2 and 3 to image 1, and so on.
SCORES = torch.tensor(
    [
        [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],  # own caption first
        [0.9, 0.8, 0.7, 0.1, 0.2, 0.3, 0.4, 0.5],  # own caption third
        [0.1, 0.2, 0.3, 0.4, 0.0, 0.05, 0.6, 0.7],  # own captions last
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8],  # own caption first
    ]
)
OWNERS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])


def test_recall_by_hand() -> None:
    # Text to image at 1: captions 0, 2, 6 and 7 find their image; 1, 3, 4, 5 do not.
    scores = SCORES.clone()
    scores[1, 0] = 0.85
    assert recall_at_k(scores, OWNERS, 1) == (0.5, 0.5)
    assert recall_at_k(scores, OWNERS, 3) == (0.75, 0.5)
    assert recall_at_k(scores, OWNERS, 8) == (1.0, 1.0)
    assert recall_at_k(scores, OWNERS, 100) == (1.0, 1.0)


def test_recall_against_a_plain_loop() -> None:
    scores, owners = torch.randn(9, 20), torch.randint(9, (20,))
    for k in (1, 5, 10):
        images = sum(
            any(owners[j] == i for j in sorted(range(20), key=lambda j: -scores[i, j])[:k])
            for i in range(9)
        )
        texts = sum(
            int(owners[j]) in sorted(range(9), key=lambda i: -scores[i, j])[:k] for j in range(20)
        )
        assert recall_at_k(scores, owners, k) == pytest.approx((images / 9, texts / 20))


def test_retrieval_metrics_have_the_fields_names() -> None:
    metrics = retrieval_metrics(SCORES, OWNERS)
    ways = ("image_to_text", "text_to_image")
    recalls = [f"{way}_R@{k}" for k in (1, 5, 10) for way in ways]
    assert list(metrics) == recalls + [f"{way}_median_rank" for way in ways]


@torch.no_grad()
def test_classifier_is_normalise_average_normalise() -> None:
    model = CLIP(**TINY).eval()
    classes, templates = ["cat", "hot dog", "x"], ["a {}", "a photo of a {}.", "{} {}"]
    classifier = build_classifier(model, classes, templates, batch_size=2)
    for row, name in zip(classifier, classes, strict=True):
        tokens = tokenize([t.replace("{}", name) for t in templates], 24)
        mean = F.normalize(model.encode_text(tokens), dim=-1).mean(dim=0)
        torch.testing.assert_close(row, mean / mean.norm())


def test_distinct_texts_are_encoded_once() -> None:
    model = CLIP(**TINY).eval()
    seen = []
    model.token_embedding.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    features = encode_texts(model, ["a", "b", "a", "a", "b"], batch_size=4)
    assert seen == [2]
    torch.testing.assert_close(features[0], features[3])
    torch.testing.assert_close(
        features, encode_texts(model, ["a", "b", "a", "a", "b"], batch_size=1)
    )


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is computed."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.found = max(self.found, result.numel() * result.element_size())
        return result


@pytest.mark.parametrize(
    "arch",
    [
        {"image_resolution": 224, "vision_patch_size": 16, "vision_width": 768, "vision_heads": 12},
        {"image_resolution": 224, "vision_patch_size": 32, "vision_width": 768, "vision_heads": 12},
        {"vision_layers": [1, 1, 1, 1], "vision_width": 64, "vision_patch_size": None}
        | {"image_resolution": 224, "vision_heads": None},
        {},
    ],
)
def test_as_many_images_at_once_as_malloc_keeps_memory_for(arch: dict) -> None:
    model = CLIP(**TINY | arch).eval()
    side = model.config.image_resolution
    pixels = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    most = images_at_once(model, pixels)
    with Largest() as largest:
        encode_images(model, pixels, Preprocess(side))
    one = largest.found / 2
    assert most * one < 1.02 * 2**25  # the class token, which is not counted, is of over 32 tokens
    assert most == 32 or (most + 1) * one > 2**25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_are_encoded_in_parts(dtype: torch.dtype) -> None:
    model, preprocess = CLIP(**TINY).eval().to(dtype), Preprocess(32)
    seen = []
    model.visual.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    pixels = torch.randint(0, 256, (70, 3, 32, 32), dtype=torch.uint8)
    features = encode_images(model, pixels, preprocess)
    assert seen == [32, 32, 6]
    assert features.dtype == torch.float32
    ones = torch.cat([encode_images(model, one[None], preprocess) for one in pixels])
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(features, ones, atol=bound, rtol=0)
    assert encode_images(model, pixels[:0], preprocess).shape == (0, 16)


def settings(root: Path, format: str = "pairs", **evaluation: dict) -> Config:
    values = {
        "model": TINY,
        "data": {"format": format, "root": str(root), "workers": 0, "max_bad_fraction": 0.5},
        "evaluate": {"batch_size": 5, **evaluation},
    }
    return parse(Config, values, where="test")


def make_classes(root: Path, count: int = 3) -> Path:
    for label, name in enumerate(("ant", "bee", "cow")):
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise_image(10 * label + i).save(root / name / f"{i}.png")
    return root


@torch.no_grad()
def test_evaluation_equals_the_plain_path(tmp_path: Path) -> None:
    root = make_classes(tmp_path / "c", 4)
    tasks = configured_tasks(settings(root, "folder", zero_shot={"templates": ["a {}"]}))
    model = CLIP(**TINY).eval()
    report = evaluate(model, tasks, Preprocess(32))
    paths = sorted(root.rglob("*.png"))
    pixels = torch.stack([Preprocess(32)(path) for path in paths])
    texts = tokenize(["a ant", "a bee", "a cow"], 24)
    scores = F.normalize(model.encode_image(pixels)) @ F.normalize(model.encode_text(texts)).T
    said = scores.argmax(dim=1).tolist()
    correct = [s == "abc".index(p.parent.name[0]) for s, p in zip(said, paths, strict=True)]
    assert report.metrics["zeroshot_top1"] == pytest.approx(sum(correct) / 12)
    shown = predictions(report)
    assert len(shown) == 12
    assert [target for _, _, target in shown] == ["ant"] * 4 + ["bee"] * 4 + ["cow"] * 4


@torch.no_grad()
@pytest.mark.parametrize(
    ("has_bias", "choice", "is_sigmoid"),
    [
        (True, None, True),
        (True, "sigmoid", True),
        (True, "softmax", False),
        (False, None, False),
        (False, "softmax", False),
    ],
)
def test_reports_have_sigmoids_where_the_model_has_a_bias(
    tmp_path: Path, has_bias: bool, choice: str | None, is_sigmoid: bool
) -> None:
    root = make_classes(tmp_path / "c", 2)
    wanted = {"templates": ["a {}"], "probabilities": choice}
    tasks = configured_tasks(settings(root, "folder", zero_shot=wanted))
    model = CLIP(**TINY | {"logit_bias": has_bias}).eval()
    if model.logit_bias is not None:
        model.logit_bias.fill_(-0.5)
    result = evaluate(model, tasks, Preprocess(32)).results["zero_shot"]
    assert isinstance(result, ZeroShotResult)
    logits = result.features @ result.classifier.T * model.logit_scale.exp()
    expected = (logits - 0.5).sigmoid() if is_sigmoid else logits.softmax(dim=1)
    torch.testing.assert_close(
        result.top_probabilities, expected.sort(dim=1, descending=True).values
    )


def test_sigmoids_of_a_model_without_a_bias_are_refused(tmp_path: Path) -> None:
    root = make_classes(tmp_path / "c", 2)
    tasks = configured_tasks(settings(root, "folder", zero_shot={"probabilities": "sigmoid"}))
    with pytest.raises(ConfigError, match="sigmoid needs a model with a logit bias"):
        evaluate(CLIP(**TINY).eval(), tasks, Preprocess(32))


def test_the_size_of_batches_does_not_matter_and_limit_counts(tmp_path: Path) -> None:
    config = settings(make_pairs(tmp_path / "p", 13), retrieval={})
    model = CLIP(**TINY).eval()
    reports = [
        evaluate(model, configured_tasks(config.model_copy(update={"evaluate": e})), Preprocess(32))
        for e in (config.evaluate, config.evaluate.model_copy(update={"batch_size": 100}))
    ]
    assert reports[0].metrics == reports[1].metrics
    assert "13 images" in sentences(reports[0])[0]
    found = examples(reports[0])
    assert found is not None
    assert found.similarity.shape == (8, 8)
    limited = configured_tasks(settings(tmp_path / "p", retrieval={"limit": 7}))
    assert "7 images" in sentences(evaluate(model, limited, Preprocess(32)))[0]


def test_unreadable_images_are_counted(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "p", 6)
    (root / "002.png").write_bytes(b"no")
    tasks = configured_tasks(settings(root, retrieval={}))
    report = evaluate(CLIP(**TINY).eval(), tasks, Preprocess(32))
    assert list(report.bad) == [str(root / "002.png")]
    assert "5 images" in sentences(report)[0]
    for path in root.glob("*.png"):
        path.write_bytes(b"no")
    with pytest.raises(DataError, match="bad of 6 samples"):
        evaluate(CLIP(**TINY).eval(), tasks, Preprocess(32))


def test_a_task_that_the_data_does_not_allow(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.zero_shot: .* has no classes"):
        configured_tasks(settings(make_pairs(tmp_path / "p"), zero_shot={}))
    with pytest.raises(ConfigError, match=r"evaluate\.retrieval: .* has classes, not captions"):
        configured_tasks(settings(make_classes(tmp_path / "c"), "folder", retrieval={}))


def test_columns_of_training_bind_only_evaluations_on_its_root(tmp_path: Path) -> None:
    noise_image(0).save(tmp_path / "0.png")
    (tmp_path / "a.csv").write_text("file,words,kind,note\n0.png,a fox,fox,a note\n")
    (tmp_path / "b.csv").write_text("image,caption,class\n0.png,a cow,cow\n")
    data = {"format": "table", "root": str(tmp_path / "a.csv")}
    data |= {"image_column": "file", "caption_column": "words"}
    names = tmp_path / "names.txt"
    names.write_text("cow\n")

    def opened(name: str, **wanted: str | bool) -> Dataset:
        values = {"model": TINY, "data": data, "evaluate": {name: wanted}}
        (task,) = configured_tasks(parse(Config, values, where="test"))
        return task.dataset

    other = str(tmp_path / "b.csv")
    assert opened("retrieval")[0].captions == ["a fox"]
    assert opened("retrieval", caption_column="note")[0].captions == ["a note"]
    assert opened("zero_shot", label_column="kind").classes == ["fox"]
    assert opened("retrieval", root=other)[0].captions == ["a cow"]
    assert opened("zero_shot", root=other, label_column="class").classes == ["cow"]
    for name in ("p", "q"):
        make_pairs(tmp_path / name, 2)
        (tmp_path / name / "000.txt").write_text("one\ntwo\n")
    data = {"format": "pairs", "root": str(tmp_path / "p"), "one_caption_per_line": False}
    assert opened("retrieval")[0].captions == ["one\ntwo"]
    assert opened("retrieval", format="table", root=other)[0].captions == ["a cow"]
    assert opened("retrieval", root=str(tmp_path / "q"))[0].captions == ["one", "two"]
    whole = opened("retrieval", root=str(tmp_path / "q"), one_caption_per_line=False)
    assert whole[0].captions == ["one\ntwo"]
    data = {"format": "folder", "root": str(make_classes(tmp_path / "c"))}
    data |= {"class_names": str(names)}  # of other classes than the table's
    names.write_text("Ant\nBee\nCow\n")
    assert opened("zero_shot").classes == ["Ant", "Bee", "Cow"]
    values = {"format": "table", "root": other, "label_column": "class"}
    assert opened("zero_shot", **values).classes == ["cow"]


@pytest.mark.parametrize("format", ["pairs", "folder", "table", "shards", "hub"])
def test_evaluation_takes_a_split_that_training_does_not(
    format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEANCLIP_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "d"
    for split, count in (("train", 3), ("test", 2)):
        make_split(root, format, split, count)
    task = "zero_shot" if format == "folder" else "retrieval"
    data = {"format": format, "root": str(root), "split": "train", "workers": 0}

    def size() -> int:
        values = {"model": TINY, "data": data, "evaluate": {task: {}}}
        (opened,) = configured_tasks(parse(Config, values, where="test"))
        return len(opened.dataset)

    assert (size(), caplog.messages) == (2, [])
    if format in ("table", "hub"):
        data["split"] = None  # is train
        assert (size(), caplog.messages) == (2, [])
    data |= {"root": str(root := tmp_path / "only"), "split": "train"}
    make_split(root, format, "train", 3)
    assert size() == 3
    assert caplog.messages == [f"evaluate.{task}: uses the training data"]


def make_split(root: Path, format: str, split: str, count: int) -> None:
    folder = root / split
    if format == "pairs":
        make_pairs(folder, count)
    elif format == "folder":
        (folder / "ant").mkdir(parents=True)
        for i in range(count):
            noise_image(i).save(folder / "ant" / f"{i}.png")
    elif format == "table":
        root.mkdir(exist_ok=True)
        (root / f"{split}.csv").write_text("image,caption\n" + "x.png,a\n" * count)
    elif format == "shards":
        pairs = make_pairs(root / f"{split}-pairs", count)
        folder.mkdir()
        with tarfile.open(folder / "0.tar", "w") as tar:
            for path in sorted(pairs.iterdir()):
                tar.add(path, path.name)
    else:
        rows = datasets.Dataset.from_dict({"image": ["x.png"] * count, "text": ["a"] * count})
        rows.save_to_disk(folder)
        splits = sorted(path.name for path in root.iterdir() if path.is_dir())
        (root / "dataset_dict.json").write_text(json.dumps({"splits": splits}))


def test_pictures_of_a_report(tmp_path: Path) -> None:
    from leanclip.report.plots import run_pictures

    tasks = configured_tasks(settings(make_pairs(tmp_path / "p"), retrieval={}))
    tasks += configured_tasks(settings(make_classes(tmp_path / "c"), "folder", zero_shot={}))
    report = evaluate(CLIP(**TINY).eval(), tasks, Preprocess(32))
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "train/loss": 2.0, "train/lr": 0.1, "train/logit_scale": 14}\n'
        '{"step": 2, "train/loss": 1.0, "train/lr": 0.1, "train/logit_scale": 15}\n'
        '{"step": 2, "val/zeroshot_top1": 0.5}\n{"step": 3, "train/l'
    )
    pictures = run_pictures(tmp_path, report)
    assert [p.name for p in pictures] == ["similarity.png", "predictions.png", "curves.png"]
    for path in pictures:
        image = open_image(path)
        assert min(image.size) > 200
        assert len(image.resize((60, 60)).getcolors(3600) or ()) > 50


def test_a_caption_is_drawn_as_it_stands(tmp_path: Path) -> None:
    captions = ["it costs $5 \\frac and $x_{ more", "from $5 to $10", "a\x00b \ud800 \n c"]
    image_grid([noise_image(i) for i in range(3)], captions, tmp_path / "grid.png")
    similarity_matrix([noise_image(0)], captions, np.eye(3)[:, :1], tmp_path / "matrix.png")
    assert (tmp_path / "grid.png").stat().st_size > 1000
