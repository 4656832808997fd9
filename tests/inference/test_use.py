"""`leanclip classify` and `leanclip similarity`; pictures and maps of what a model says."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, assert_refused, noise_image, terminal
from PIL import Image
from sklearn.decomposition import PCA
from test_inference import save_tiny
from torch import nn
from torch.nn import functional as F
from web import serving

import leanclip
from leanclip.cli.main import main
from leanclip.evaluation.classification import Prediction
from leanclip.inference.attention_maps import gradient_map, rollout
from leanclip.model.lora import add_low_rank
from leanclip.report.charts import classification, heat_maps, plane, scatter

RESNET = {"vision_layers": [1, 1, 1, 1], "vision_width": 8, "vision_heads": 4}
RESNET |= {"vision_patch_size": None, "image_resolution": 64}


@pytest.fixture
def photos(workplace: Path) -> Path:
    """The workplace with a model in `tiny`, and a few images."""
    save_tiny(workplace / "tiny")
    (workplace / "photos").mkdir()
    for i in range(3):
        noise_image(i).save(workplace / f"photos/{i}.png")
    return workplace


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_classify_prints_json_lines_where_it_is_piped(photos: Path, command: Command) -> None:
    done = command(
        *("classify", "photos/1.png", "photos", "--labels", "cat, dog, red fox"),
        *("--model", "tiny", "--top", "2", "--plot", "bars.png"),
    )
    assert done.returncode == 0, done.stderr
    found = lines_of(done.stdout)
    assert [line["image"] for line in found] == [
        "photos/1.png",
        *(f"photos/{i}.png" for i in "012"),
    ]
    expected = leanclip.load("tiny").classify("photos/1.png", ["cat", "dog", "red fox"], top=2)
    for line, prediction in zip(found[0]["labels"], expected, strict=True):
        assert line["label"] == prediction.label
        assert line["probability"] == pytest.approx(prediction.probability, abs=1e-5)
        assert line["similarity"] == pytest.approx(prediction.similarity, abs=1e-5)
    assert [one["label"] for one in found[2]["labels"]] == [
        prediction.label for prediction in expected
    ]
    assert Image.open("bars.png").width > 300
    (photos / "labels.txt").write_text("cat\ndog\nred fox\n")
    again = command("classify", "photos/1.png", "--labels", "labels.txt", "--model", "tiny")
    assert [one["label"] for one in lines_of(again.stdout)[0]["labels"]][:2] == [
        prediction.label for prediction in expected
    ]


def test_similarity_of_every_image_with_every_text(photos: Path, command: Command) -> None:
    (photos / "texts.txt").write_text("a cat\na dog\n")
    done = command(
        *("similarity", "--images", "photos/0.png", "photos/1.png", "--model", "tiny"),
        *("--texts", "texts.txt", "a fox, running", "--plot", "out.png"),
    )
    assert done.returncode == 0, done.stderr
    texts = ["a cat", "a dog", "a fox, running"]
    images = ["photos/0.png", "photos/1.png"]
    found = lines_of(done.stdout)
    assert [(one["text"], one["image"]) for one in found] == [(t, i) for t in texts for i in images]
    expected = leanclip.load("tiny").similarity(images, texts).ravel()
    assert [one["similarity"] for one in found] == pytest.approx(list(expected), abs=1e-5)
    assert Image.open("out.png").width > 300


def test_standard_input_is_an_image_or_paths_or_words(
    photos: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(content: bytes, *words: str) -> list[dict]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        done = command(*words, "--model", "tiny")
        assert done.returncode == 0, done.stderr
        return lines_of(done.stdout)

    words = ("classify", "photos/1.png", "--labels", "cat, dog")
    expected = lines_of(command(*words, "--model", "tiny").stdout)
    image = (photos / "photos/1.png").read_bytes()
    assert given(b"photos/1.png\n", "classify", "-", "--labels", "cat, dog") == expected
    (found,) = given(image, "classify", "-", "--labels", "cat, dog")
    assert found == {"image": "-", "labels": expected[0]["labels"]}
    assert given(b"cat\ndog\n", "classify", "photos/1.png", "--labels", "-") == expected
    found = given(b"a cat\na dog\n", "similarity", "--images", "photos/1.png", "--texts", "-")
    assert [one["text"] for one in found] == ["a cat", "a dog"]


def test_urls_are_fetched_when_named_as_arguments_and_not_from_standard_input(
    photos: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(photos / "photos") as server:
        url = f"{server.url}/1.png"
        words = ("--labels", "cat, dog", "--model", "tiny")
        (expected,) = lines_of(command("classify", "photos/1.png", *words).stdout)
        done = command("classify", url, *words, "--plot", "bars.png")
        assert lines_of(done.stdout) == [expected | {"image": url}]
        done = command(
            *("similarity", "--images", url, "--texts", "a", "--model", "tiny"),
            *("--plot", "matrix.png"),
        )
        assert [one["image"] for one in lines_of(done.stdout)] == [url]
        assert server.asked == [("/1.png", None)] * 2  # once by each, drawings included
        for line in (url, "s3://bucket/1.png"):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line.encode())))
            done = command("classify", "-", *words)
            assert_refused(done, f"standard input: {line} is a URL", "img2dataset", "argument")
        assert len(server.asked) == 2


def test_a_terminal_gets_a_table_and_a_bar(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with terminal() as shown, contextlib.suppress(SystemExit):
        leanclip.load("tiny").embed_images(["photos/0.png"] * 40, batch_size=1)
        main(["classify", "photos/0.png", "--labels", "[cat], dog", "--model", "tiny"])
    for word in ("embedding", "/40", "probability", "[cat]", "%"):
        assert word in shown()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("classify none.jpg --labels cat,dog", ["none.jpg", "no such image"]),
        ("classify config.yaml --labels cat,dog", ["config.yaml", "cannot be read as an image"]),
        ("classify photos --labels cat", ["give two or more"]),
        ("classify photos --labels cat,,dog", ["label 1 is empty"]),
        ("classify - --labels -", ["read only once"]),
        ("classify ftp://x/a.png --labels a,b", ["ftp://x/a.png", "not an http or https address"]),
        ("similarity --images photos --texts " + "word-" * 20, ["tokens", "truncate"]),
    ],
)
def test_mistakes_are_one_line(
    photos: Path, command: Command, words: str, expected: list[str]
) -> None:
    assert_refused(command(*words.split(), "--model", "tiny"), *expected)


def test_without_a_model_it_says_what_to_give(photos: Path, command: Command) -> None:
    done = command("classify", "photos", "--labels", "cat, dog")
    assert_refused(done, "--model", "a run folder", "runs/quickstart")


def reference_rollout(model: leanclip.CLIP, pixels: torch.Tensor) -> torch.Tensor:
    """The paper's equations over torch's own nn.MultiheadAttention."""
    visual: Any = model.visual
    x = visual.conv1(pixels).flatten(2).transpose(1, 2)
    first = visual.class_embedding.expand(len(x), 1, -1)
    x = visual.ln_pre(torch.cat([first, x], dim=1) + visual.positional_embedding)
    joint = torch.eye(x.shape[1]).expand(len(x), -1, -1)
    for block in visual.transformer.resblocks:
        reference = nn.MultiheadAttention(x.shape[-1], block.attn.heads, batch_first=True)
        reference.load_state_dict(block.attn.state_dict())
        given = block.ln_1(x)
        _, weights = reference(given, given, given, need_weights=True, average_attn_weights=True)
        joint = (0.5 * weights + 0.5 * torch.eye(x.shape[1])) @ joint
        x = block(x)
    return joint[:, 0, 1:]


def test_rollout_is_the_papers(tmp_path: Path) -> None:
    clip = leanclip.load(save_tiny(tmp_path / "tiny"), device="cpu")
    pixels = torch.stack([clip.preprocess(noise_image(i)) for i in range(3)])
    found = rollout(clip.model, pixels)
    assert found.shape == (3, 4, 4)
    with torch.no_grad():
        expected = reference_rollout(clip.model, pixels)
    expected = expected / expected.sum(dim=1, keepdim=True)
    torch.testing.assert_close(found.flatten(1), expected)


def test_rollout_of_a_resnet(tmp_path: Path) -> None:
    clip = leanclip.load(save_tiny(tmp_path / "resnet", **RESNET), device="cpu")
    pixels = torch.stack([clip.preprocess(noise_image(i)) for i in range(2)])
    found = rollout(clip.model, pixels)
    assert found.shape == (2, 2, 2)
    torch.testing.assert_close(found.sum(dim=(1, 2)), torch.ones(2))


def attended(
    layer: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (B, H, Q, L), in the graph, and its products with the values (B, Q, D)."""
    q, k, v = (one.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for one in (q, k, v))
    attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
    return attention, (attention @ v).transpose(1, 2).flatten(2)


def reference_relevance(visual: Any, pixels: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Equations 5 and 6 of arXiv 2103.15679: (B, P), not scaled."""
    if hasattr(visual, "attnpool"):
        pool = visual.attnpool
        x = visual.trunk(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + pool.positional_embedding
        attention, x = attended(pool, pool.q_proj(x[:, :1]), pool.k_proj(x), pool.v_proj(x))
        attentions, features = [attention], pool.c_proj(x[:, 0])
    else:
        attentions = []
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)
        if visual.class_embedding is not None:
            x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = visual.ln_pre(x + visual.positional_embedding)
        for block in visual.transformer.resblocks:
            layer = block.attn
            qkv = F.linear(block.ln_1(x), layer.in_proj_weight, layer.in_proj_bias)
            attention, products = attended(layer, *qkv.chunk(3, dim=-1))
            attentions.append(attention)
            x = x + layer.out_proj(products)
            x = x + block.mlp(block.ln_2(x))
        if visual.config.vision_pool == "tok":
            x = visual.ln_post(x[:, 0])
        elif visual.config.vision_pool == "attn":
            pool, x = visual.attn_pool, visual.ln_post(x)
            parts = zip(
                *(one.chunk(3) for one in (pool.attn.in_proj_weight, pool.attn.in_proj_bias)),
                strict=True,
            )
            inputs = (pool.probe.expand(len(x), 1, -1), x, x)
            qkv = [F.linear(one, *part) for one, part in zip(inputs, parts, strict=True)]
            attention, products = attended(pool.attn, *qkv)
            attentions.append(attention)
            x = pool.attn.out_proj(products)[:, 0]
            x = x + pool.mlp(pool.layernorm(x))
        elif visual.config.vision_norm_after_pool:
            x = visual.ln_post(x[:, 1:].mean(dim=1))
        else:
            x = visual.ln_post(x)[:, 1:].mean(dim=1)
        features = x @ visual.proj
    cosine = (F.normalize(features, dim=-1) * text).sum()
    gradients = torch.autograd.grad(cosine, attentions)
    eye = torch.eye(attentions[0].shape[-1])
    relevance = step = before = eye
    for attention, gradient in zip(attentions, gradients, strict=True):
        step = (attention * gradient).clamp(min=0).mean(dim=1)
        before = relevance
        relevance = relevance[..., : step.shape[1], :] + step @ relevance
    config = getattr(visual, "config", None)
    if config and config.vision_pool == "avg":
        return (relevance - eye)[:, 1:, 1:].mean(dim=1)
    if config and config.vision_pool == "attn":  # the query is no token
        relevance = step @ before
        return relevance[:, 0, 1:] if config.vision_class_token else relevance[:, 0]
    return relevance[:, 0, 1:]


@pytest.mark.parametrize(
    ("changes", "side"),
    [
        ({"vision_layers": 3}, 4),
        ({"vision_layers": 3, "vision_pool": "avg"}, 4),
        ({"vision_pool": "avg", "vision_norm_after_pool": True}, 4),
        ({"vision_pool": "attn", "vision_class_token": False}, 4),
        ({"vision_pool": "attn", "vision_pool_heads": 1}, 4),
        (RESNET, 2),
    ],
    ids=[
        "class token",
        "average",
        "norm after average",
        "attention",
        "attention of one head",
        "resnet",
    ],
)
def test_the_gradient_map_is_the_papers(tmp_path: Path, changes: dict[str, Any], side: int) -> None:
    clip = leanclip.load(save_tiny(tmp_path / "tiny", **changes), device="cpu")
    pixels = torch.stack([clip.preprocess(noise_image(i)) for i in range(3)])
    text = clip.embed_texts(["a cat", "a dog", "x"], as_torch=True)
    expected = reference_relevance(clip.model.visual, pixels, text).detach()
    expected = expected - expected.amin(dim=1, keepdim=True)
    expected = expected / expected.amax(dim=1, keepdim=True)
    found = gradient_map(clip.model, pixels, text)
    assert found.shape == (3, side, side)
    torch.testing.assert_close(found.flatten(1), expected, atol=1e-3, rtol=1e-3)
    assert all(parameter.grad is None for parameter in clip.model.parameters())
    first = gradient_map(clip.model, pixels[:1], text[0])  # one text, and a batch of one
    torch.testing.assert_close(first, found[:1], atol=1e-3, rtol=1e-3)
    clip.model.requires_grad_(False)  # locked, and called where gradients are off
    with torch.no_grad():
        torch.testing.assert_close(gradient_map(clip.model, pixels, text), found)
    add_low_rank(clip.model.requires_grad_(True), 2, 2.0)  # zero at the start
    torch.testing.assert_close(gradient_map(clip.model, pixels, text), found)


def test_the_plane_is_that_of_principal_components() -> None:
    features = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    points, shares = plane(features)
    reference = PCA(2).fit(features)
    expected = reference.transform(features)
    signs = np.sign((points * expected).sum(axis=0))
    np.testing.assert_allclose(points, expected * signs, atol=1e-5)
    np.testing.assert_allclose(shares, reference.explained_variance_ratio_, atol=1e-6)
    for few in (features[:1], features[:2]):
        assert np.isfinite(plane(few)[0]).all()


def test_pictures_are_drawn(tmp_path: Path) -> None:
    images = [noise_image(i, (60, 40)) for i in range(2)]
    predictions = [[Prediction("a $cat$ [1]", 0.9, 0.3), Prediction("dog", 0.1, 0.1)]] * 2
    figures = {
        "bars.png": classification(images, predictions, tmp_path / "bars.png"),
        "heat.png": heat_maps(
            images, np.eye(4)[None].repeat(2, 0), ["a", "b"], tmp_path / "heat.png"
        ),
        "plane.png": scatter(
            np.eye(4), list("abcd"), tmp_path / "plane.png", groups=["image", "text"] * 2
        ),
    }
    for name in figures:
        assert Image.open(tmp_path / name).width > 300
    heat = figures["heat.png"].axes[0].images[1].get_array()
    np.testing.assert_array_equal(heat, np.eye(4))
