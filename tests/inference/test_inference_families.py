"""Use of the families after CLIP: probabilities, prompts, heat maps and exports."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, Command, assert_refused
from photographs import photograph
from starlette.testclient import TestClient
from transformers import pipeline

import leanclip
from leanclip import CLIP, ConfigError, DataError
from leanclip.app.server import make_app
from leanclip.app.service import Service
from leanclip.app.worker import Worker
from leanclip.config.model import ModelConfig
from leanclip.config.presets import preset
from leanclip.config.sections import parse
from leanclip.data.prompts import CHINESE_TEMPLATES, SIGLIP_TEMPLATES, TEMPLATES, default_templates
from leanclip.evaluation import Calibration
from leanclip.evaluation.classification import classify
from leanclip.inference.export import export
from leanclip.inference.model import InferenceModel
from leanclip.preprocess.images import Preprocess
from leanclip.weights import Weights, fingerprint, write_weights

MODERN = Path(__file__).parents[1] / "data" / "modern"
LABELS = ["cat", "cup", "rocket"]
PHOTOGRAPHS = ("chelsea", "coffee", "rocket")
BERT = {
    "transformer_post_norm": True,
    "transformer_causal": False,
    "transformer_padding_mask": True,
    "transformer_token_types": 2,
    "transformer_pool": "first",
}


def tiny(**changes: Any) -> InferenceModel:
    return InferenceModel(CLIP(**TINY | changes).eval(), Preprocess(32))


@pytest.fixture(scope="module")
def sigmoid(tmp_path_factory: pytest.TempPathFactory) -> InferenceModel:
    """A model with a trained logit bias, as it is loaded."""
    model = CLIP(**TINY, logit_bias=True)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        assert model.logit_bias is not None
        model.logit_bias.fill_(-1.5)
    weights = Weights(Path("x"), "leanclip", model.state_dict(), model.config, Preprocess(32))
    folder = tmp_path_factory.mktemp("sigmoid") / "model"
    write_weights(weights, folder, "leanclip")
    return leanclip.load(folder, device="cpu")


# --- probabilities


@pytest.mark.parametrize("name", ["hf-siglip", "hf-siglip2", "hf-metaclip2", "hf-chinese-clip"])
def test_probabilities_are_those_of_transformers(name: str) -> None:
    """Its zero-shot-image-classification: a sigmoid for SigLIP, else a softmax."""
    clip = leanclip.load(MODERN / name, device="cpu")
    images = [photograph(photo) for photo in PHOTOGRAPHS]
    template = "{}" if name == "hf-siglip" else "This is a photo of {}."  # 16 tokens
    ours = clip.classify(images, LABELS, template)
    theirs = pipeline("zero-shot-image-classification", model=str(MODERN / name))
    assert theirs.tokenizer is not None
    if "siglip" in name:
        # As published: the model attends to padding.
        theirs.tokenizer.model_input_names = ["input_ids"]
        # It pads to 64; `tokenizer_kwargs` of its call does not arrive.
        theirs._preprocess_params["tokenizer_kwargs"] = {"max_length": clip.model.context_length}
    for image, found in zip(images, ours, strict=True):
        expected: Any = theirs(image, candidate_labels=LABELS, hypothesis_template=template)
        assert [one.label for one in found] == [one["label"] for one in expected]
        scores = [one["score"] for one in expected]
        np.testing.assert_allclose([one.probability for one in found], scores, rtol=1e-5)
        assert ("siglip" in name) == (abs(sum(scores) - 1) > 1e-3)


def test_sigmoids_are_the_formula_and_softmax_is_by_choice(sigmoid: InferenceModel) -> None:
    image, cosines = photograph("coffee"), sigmoid.similarity(photograph("coffee"), LABELS)[:, 0]
    assert sigmoid.logit_bias == -1.5
    logits = torch.from_numpy(sigmoid.logit_scale * cosines - 1.5)
    expected = {
        None: logits.sigmoid(),
        "sigmoid": logits.sigmoid(),
        "softmax": logits.softmax(dim=0),
    }
    for choice, values in expected.items():
        found = {
            one.label: one.probability
            for one in sigmoid.classify(image, LABELS, "{}", probabilities=choice)
        }
        np.testing.assert_allclose([found[label] for label in LABELS], values, rtol=1e-5)
    one, *others = sigmoid.classify(image, ["cup"], "{}")
    assert not others
    assert one.probability == pytest.approx(logits.sigmoid()[1].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("has_bias", "labels", "choice", "error", "words"),
    [
        (False, LABELS, "sigmoid", ConfigError, "needs a model with a logit bias (SigLIP)"),
        (True, LABELS, "odds", ConfigError, "should be sigmoid or softmax, found odds"),
        (True, ["cat"], "softmax", DataError, "give two or more to choose from"),
        (True, [], None, DataError, "found 0; give at least one"),
    ],
)
def test_probabilities_that_a_model_does_not_have_are_refused(
    sigmoid: InferenceModel,
    has_bias: bool,
    labels: list[str],
    choice: str | None,
    error: type[Exception],
    words: str,
) -> None:
    clip = sigmoid if has_bias else tiny()
    with pytest.raises(error) as caught:
        clip.classifier(labels, probabilities=choice)
    assert words in str(caught.value)


def test_a_calibration_is_a_softmax(sigmoid: InferenceModel) -> None:
    labels = ("cat", "cup")
    calibration = Calibration(
        temperature=2.0,
        threshold=0.1,
        floor=-1e9,
        coverage=0.9,
        images=10,
        weights=fingerprint(sigmoid.model.state_dict()),
        classes=labels,
        templates=("{}",),
    )
    with pytest.raises(ConfigError, match="leave either sigmoid or the calibration out"):
        sigmoid.classifier(labels, "{}", calibration=calibration, probabilities="sigmoid")
    image = photograph("coffee")
    cosines = sigmoid.similarity(image, labels)[:, 0]
    expected = torch.from_numpy(sigmoid.logit_scale * cosines / 2).softmax(dim=0)
    found = sigmoid.classify(image, labels, "{}", calibration=calibration)
    values = {one.label: one.probability for one in found}
    np.testing.assert_allclose([values[label] for label in labels], expected, rtol=1e-5)


def test_the_command_line_gives_sigmoids_or_a_softmax(
    command: Command, sigmoid: InferenceModel, tmp_path: Path
) -> None:
    weights = Weights(
        Path("x"), "leanclip", sigmoid.model.state_dict(), sigmoid.model.config, Preprocess(32)
    )
    write_weights(weights, tmp_path / "model", "leanclip")
    photograph("coffee").save(tmp_path / "coffee.png")
    words = ["classify", str(tmp_path / "coffee.png"), "--model", str(tmp_path / "model")]
    for options, choice in (([], "sigmoid"), (["--probabilities", "softmax"], "softmax")):
        done = command(*words, "--labels", ",".join(LABELS), *options)
        assert done.returncode == 0, done.stderr
        found = [one["probability"] for one in json.loads(done.stdout)["labels"]]
        expected = sigmoid.classify(photograph("coffee"), LABELS, probabilities=choice)
        np.testing.assert_allclose(found, [one.probability for one in expected], atol=2e-6)
    assert_refused(command(*words, "--labels", "a,b", "--probabilities", "x"), "found x")


def test_the_page_gives_sigmoids_or_a_softmax(sigmoid: InferenceModel) -> None:
    worker = Worker(lambda: sigmoid)
    worker.start()
    file = io.BytesIO()
    photograph("coffee").save(file, "PNG")
    files = [("image", ("coffee.png", file.getvalue()))]
    with TestClient(make_app(Service(worker, "tiny")), base_url="http://127.0.0.1:8000") as client:
        worker.loaded.result(30)
        assert client.get("/api/about").json()["templates"] == list(SIGLIP_TEMPLATES)
        for data, kind in (({}, "sigmoid"), ({"probabilities": "softmax"}, "softmax")):
            answer = client.post("/api/classify", files=files, data={"labels": LABELS} | data)
            found = answer.json()
            assert found["probabilities"] == kind
            expected = sigmoid.classify(photograph("coffee"), LABELS, probabilities=kind)
            for one, other in zip(found["predictions"], expected, strict=True):
                assert one["probability"] == pytest.approx(other.probability, abs=2e-6)
        one_label = client.post("/api/classify", files=files, data={"labels": ["cat"]})
        assert len(one_label.json()["predictions"]) == 1


def test_reported_probabilities_are_sigmoids_with_a_bias() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    facts: dict[str, Any] = {"classes": LABELS, "indices": torch.arange(2)}
    facts |= {"features": torch.zeros(2, 1)}
    for bias, expected in ((-1.0, (scores - 1).sigmoid()), (None, scores.softmax(dim=1))):
        found = classify(iter([scores]), torch.tensor([0, 2]), logit_bias=bias, **facts)
        torch.testing.assert_close(
            found.top_probabilities, expected.sort(dim=1, descending=True).values
        )
        assert found.ranks.tolist() == [1, 2]


# --- prompts


@pytest.mark.parametrize(
    ("settings", "templates"),
    [
        ({}, TEMPLATES),
        ({"logit_bias": True}, SIGLIP_TEMPLATES),
        (BERT, CHINESE_TEMPLATES),  # Chinese-CLIP
        (BERT | {"transformer_projection": "mlp"}, TEMPLATES),  # BiomedCLIP
        (BERT | {"transformer_pool": "mean", "transformer_projection": "mlp"}, TEMPLATES),  # XLM-R
    ],
)
def test_default_templates_are_of_the_family(
    settings: dict[str, Any], templates: tuple[str, ...]
) -> None:
    assert default_templates(parse(ModelConfig, TINY | settings, where="x")) == templates


@pytest.mark.parametrize(
    ("name", "templates"),
    [
        ("ViT-B-32", TEMPLATES),
        ("ViT-B-16-SigLIP", SIGLIP_TEMPLATES),
        ("ViT-B-16-SigLIP2-naflex", SIGLIP_TEMPLATES),
        ("PE-Core-B-16", TEMPLATES),
        ("ViT-H-14-worldwide", TEMPLATES),
    ],
)
def test_default_templates_of_presets(name: str, templates: tuple[str, ...]) -> None:
    assert default_templates(parse(ModelConfig, preset(name), where=name)) == templates


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("hf-siglip2", "This is a photo of {}."),
        ("hf-chinese-clip", "一张{}的照片"),
        ("hf-metaclip2", "a photo of a {}."),
    ],
)
def test_prompts_of_the_family_are_used_and_can_be_replaced(name: str, template: str) -> None:
    clip = leanclip.load(MODERN / name, device="cpu")
    default, same, other = (
        clip.classifier(LABELS, given).weights for given in (None, template, "{}")
    )
    assert clip.templates == (template,)
    assert torch.equal(default, same)
    assert not torch.allclose(default, other)


# --- heat maps, embeddings and search, exports


def test_the_page_draws_heat_maps_of_attention_pooling() -> None:
    clip = leanclip.load(MODERN / "hf-siglip2", device="cpu")
    worker = Worker(lambda: clip)
    worker.start()
    file = io.BytesIO()
    photograph("chelsea").save(file, "PNG")
    files = [("image", ("chelsea.png", file.getvalue()))]
    with TestClient(make_app(Service(worker, "tiny")), base_url="http://127.0.0.1:8000") as client:
        worker.loaded.result(30)
        drawn = [
            client.post("/api/attention", files=files, data={"texts": texts}).content
            for texts in ([], ["a cat"], ["a photo of a rocket"])
        ]
    assert all(content.startswith(b"\xff\xd8") for content in drawn)
    assert len(set(drawn)) == 3


def test_images_are_found_with_another_family(command: Command, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in PHOTOGRAPHS:
        photograph(name).save(tmp_path / "photos" / f"{name}.png")
    model, photos = str(MODERN / "hf-siglip2"), str(tmp_path / "photos")
    for words in (
        ["embed", photos, "--out", str(tmp_path / "features"), "--model", model],
        ["search", "build", photos, "--out", str(tmp_path / "index"), "--model", model],
    ):
        done = command(*words)
        assert done.returncode == 0, done.stderr
    done = command("search", "find", str(tmp_path / "index"), "a cat", "--model", model)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line)["score"] for line in done.stdout.splitlines()]
    clip = leanclip.load(MODERN / "hf-siglip2", device="cpu")
    expected = clip.similarity([photograph(name) for name in PHOTOGRAPHS], "a cat")[0]
    np.testing.assert_allclose(found, sorted(expected, reverse=True), atol=2e-4)  # of float16


EXPORTED = {
    "SigLIP": {
        "embed_dim": 32,
        "vision_class_token": False,
        "vision_pool": "attn",
        "vision_projection": "none",
        "pre_norm": False,
        "transformer_causal": False,
        "transformer_pool": "last",
        "transformer_projection_bias": True,
        "logit_bias": True,
    },
    "PE-Core and BiomedCLIP": {
        "vision_pool": "attn",
        "vision_positions": "rotary",
        "transformer_projection": "mlp",
        **BERT,
    },
    "CoCa": {
        "vision_pool": "queries",
        "vision_pool_queries": 5,
        "vision_pool_heads": 2,
        "vision_layer_scale": 0.1,
        "transformer_class_token": True,
        "transformer_pool": "last",
    },
    "MetaCLIP 2": {"transformer_pool": "eos", "transformer_eos_id": 49407},
    "XLM-R": BERT
    | {"transformer_pool": "mean", "transformer_first_position": 2, "transformer_pad_id": 1},
}


@pytest.mark.parametrize(
    "family",
    [
        "SigLIP",
        "PE-Core and BiomedCLIP",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("CoCa", "MetaCLIP 2", "XLM-R")),
    ],
)
def test_towers_of_each_family_are_exported_to_onnx(family: str, tmp_path: Path) -> None:
    clip = tiny(**EXPORTED[family])
    written = export(clip, tmp_path / "out", "onnx")
    assert min(written["cosines"].values()) > 0.99999
    loaded = leanclip.load(tmp_path / "out")
    assert (loaded.logit_bias, loaded.templates) == (clip.logit_bias, clip.templates)
    image = photograph("coffee")
    ours, theirs = (one.classify(image, LABELS) for one in (clip, loaded))
    for one, other in zip(ours, theirs, strict=True):
        assert one.label == other.label
        assert one.probability == pytest.approx(other.probability, rel=1e-4)
