"""NaFlex: training on patches of drawn lengths, split, resumed, refused; use of the model."""

import io
import itertools
import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, Forked, fork_ranks, make_config, make_pairs, noise_image, ranks_of
from families import FAMILIES
from PIL import Image
from test_app import serving, upload
from test_step import Recording, batch_of

import leanclip
from leanclip import CLIP
from leanclip.config.schema import Config, load_config
from leanclip.config.training import TrainConfig
from leanclip.data.batch import Batch, Position
from leanclip.distributed.wrap_model import wrap_ddp
from leanclip.errors import ConfigError, LeanclipError, WeightsError
from leanclip.inference.attention_maps import gradient_map, rollout
from leanclip.inference.embeddings import Source, embed, read_embeddings
from leanclip.inference.export import export
from leanclip.io.files import read_metrics
from leanclip.losses import Kind, clip_loss, siglip_loss
from leanclip.preprocess.images import Preprocess, normalize
from leanclip.preprocess.patches import Patches
from leanclip.training.plan import headline, make_plan, memory_estimate
from leanclip.training.step import train_step
from leanclip.weights import save_weights

NAFLEX = FAMILIES["naflex"]  # patches of 8 pixels
MODEL = {k: v for k, v in NAFLEX.items() if k != "logit_bias"}
LENGTHS = [4, 9, 16]
PREPROCESS = Preprocess(32, resize="naflex", patch_size=8, max_patches=16)
CPU = torch.device("cpu")
CASES: list[tuple[Kind, int]] = list(itertools.product(("clip", "siglip"), (1, 4)))  # pyright: ignore
WEIGHT = 1.75


@pytest.fixture
def naflex(workplace: Path) -> Path:
    """As `workplace`, with 40 pairs of different proportions and a NaFlex configuration."""
    make_pairs(workplace / "more", 40)
    for number in range(40):
        size = (20 + 9 * (number % 7), 20 + 11 * (number % 5))
        noise_image(number, size).save(workplace / f"more/{number:03d}.png")
    make_config(
        workplace / "config.yaml",
        model=MODEL | {"logit_bias": False},
        data={"root": "more", "resize": "naflex", "patches": LENGTHS},
        train={"batch_size": 4},
    )
    return workplace


def patches_of(rows: slice = slice(None)) -> Batch:
    """The pairs of test_step, their images of different shapes."""
    batch = batch_of()
    generator = torch.Generator().manual_seed(9)
    shapes = torch.randint(1, 4, (len(batch), 2), generator=generator)
    assert isinstance(batch.images, torch.Tensor)
    values = batch.images.flatten(1)[:, : 9 * 192].reshape(-1, 9, 192)
    names = ("tokens", "indices", "labels", "groups")
    cut = {name: getattr(batch, name)[rows] for name in names}
    return replace(batch, images=Patches(values, shapes)[rows], **cut)


def model_of(kind: Kind) -> CLIP:
    torch.manual_seed(3)
    return CLIP(**NAFLEX | {"logit_bias": kind == "siglip"})


def gradients_of(rank: int, world_size: int) -> list[tuple[float, np.ndarray]]:
    cuts = [0, *(3, 3, 9)[: world_size - 1], 11]  # of four ranks, one has nothing
    batch = patches_of(slice(cuts[rank], cuts[rank + 1]))
    results = []
    for kind, micro_batches in CASES:
        model = model_of(kind)
        optimizer = Recording(model.parameters(), lr=0.1, fused=True)
        step = train_step(
            model, optimizer, batch, PREPROCESS, rate=0.1, kind=kind, towers=wrap_ddp(model),
            settings=TrainConfig(micro_batches=micro_batches), weight=WEIGHT,
        )  # fmt: skip
        whole = torch.cat([gradient.reshape(-1) for gradient in optimizer.gradients])
        results.append((step.loss.item(), whole.numpy()))
    return results


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_do_not_depend_on_how_the_batch_is_split(world_size: int, tmp_path: Path) -> None:
    """And are those of the loss times the weight, in float64."""
    of_ranks = ranks_of(world_size, lambda rank: gradients_of(rank, world_size), tmp_path)
    for number, (kind, _) in enumerate(CASES):
        model, batch = model_of(kind).double(), patches_of()
        pixels = normalize(batch.images, PREPROCESS.mean, PREPROCESS.std)
        features = model.encode_image(pixels.to(torch.float64)), model.encode_text(batch.tokens)
        zimg, ztxt = (torch.nn.functional.normalize(z, dim=-1) for z in features)
        scale = model.logit_scale.exp()
        if kind == "siglip":
            assert model.logit_bias is not None
            loss = siglip_loss(zimg, ztxt, scale, model.logit_bias)
        else:
            loss = clip_loss(zimg, ztxt, scale)
        (loss * WEIGHT).backward()
        grads = [torch.zeros(1) if p.grad is None else p.grad for p in model.parameters()]
        expected = torch.cat([grad.reshape(-1) for grad in grads])
        for results in of_ranks:
            found, gradient = results[number]
            assert found == pytest.approx(loss.item(), rel=1e-5)
            error = (torch.from_numpy(gradient).double() - expected).norm() / expected.norm()
            assert error < 1e-5, (kind, error)


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


def test_ranks_and_micro_batches_reach_the_losses_of_one(
    command: Callable[..., Any], naflex: Path
) -> None:
    options = ("train", "-c", "config.yaml", "-o", "evaluate.retrieval=null")
    command(*options, "--output-dir", "one")
    more = ("-o", "train.batch_size=2", "-o", "train.micro_batches=3", "--output-dir", "many")
    ranks = fork_ranks(2, *options, *more, folder=naflex)
    assert [rank.code() for rank in ranks] == [0, 0]
    assert len(losses(naflex / "one")) == 2 * 5  # one of 16 samples, two of 7, two of 4
    assert losses(naflex / "many") == pytest.approx(losses(naflex / "one"), rel=1e-4)


def test_a_killed_run_goes_on_to_the_same_bits(naflex: Path) -> None:
    options = (
        "train", "-c", "config.yaml", "-o", "train.epochs=12", "-o", "checkpoint.every_steps=3",
        "-o", "evaluate.retrieval=null",
    )  # fmt: skip

    def weights_of(run: str) -> bytes:
        return (naflex / run / "checkpoints/step-00000060/model.safetensors").read_bytes()

    assert Forked(*options, "--output-dir", "whole", folder=naflex).code() == 0
    for steps in (4, 17):
        killed = Forked(*options, "--output-dir", "killed", folder=naflex)
        killed.until(lambda steps=steps: len(losses(naflex / "killed")) >= steps)
        killed.send(signal.SIGKILL)
        assert killed.code() == -signal.SIGKILL
    stopped = Forked(*options, "--output-dir", "killed", folder=naflex)
    stopped.until(lambda: len(losses(naflex / "killed")) >= 30)
    stopped.send(signal.SIGTERM)
    assert stopped.code() == 143
    assert Forked(*options, "--output-dir", "killed", folder=naflex).code() == 0
    assert losses(naflex / "killed") == losses(naflex / "whole")
    assert weights_of("killed") == weights_of("whole")


def settings(*changes: str, load: str | None = None) -> Config:
    return load_config("config.yaml", [*changes], load=load)


def test_the_plan_counts_batches_and_weights_samples(naflex: Path) -> None:
    del naflex
    plan = make_plan(settings("optimizer.reference_batch=4"), CPU)
    assert plan.steps == 10
    assert plan.sizes.mean == 38 / 5
    assert plan.weight(16) == 16 / plan.sizes.mean
    total = sum(plan.weight(size.samples) for size in plan.sizes.rest(Position()))
    assert total == pytest.approx(plan.steps_per_epoch)
    assert plan.peak_learning_rate == pytest.approx(1e-3 * plan.sizes.mean / 4)
    assert "one of 16 x 4 patches, 7 x 9 patches, 4 x 16 patches" in headline(plan)
    assert memory_estimate(plan)[1] > 0
    one = make_plan(settings("data.patches=[16]"), CPU)
    assert one.weight(3) == 1.0
    assert (one.preprocess.max_patches, one.batch_size) == (16, 4)
    assert make_plan(settings("data.patches=null"), CPU).preprocess.max_patches == 16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["data.patches=[0]"], "data.patches"),
        (["data.patches=[]"], "patches: should be different numbers, found []"),
        (["data.patches=[4,4]"], "different numbers"),
        (["data.resize=squash"], "data.patches: goes with data.resize naflex, found squash"),
        (["data.resize=null"], "data.patches: goes with data.resize naflex, found shortest"),
        (
            ["model.vision_positions=learned"],
            "data.resize: naflex needs a model with vision_positions resized, found learned",
        ),
    ],
)
def test_settings_that_do_not_fit(naflex: Path, changes: list[str], words: str) -> None:
    del naflex
    with pytest.raises(ConfigError) as caught:
        make_plan(settings(*changes), CPU)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def make_weights(folder: Path, preprocess: Preprocess = PREPROCESS, **changes: Any) -> Path:
    torch.manual_seed(5)
    model = CLIP(**MODEL | changes)
    folder.mkdir()
    save_weights(folder, model.state_dict(), model.config, preprocess)
    return folder


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"patch_size": 7}, "patches of 7 pixels, the model takes 8"),
        ({"max_patches": 10**9}, "the maximum is 8192"),
        ({"max_patches": 0}, "max_patches: 0"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, values: dict[str, int], words: str) -> None:
    folder = make_weights(tmp_path / "weights")
    config = json.loads((folder / "config.json").read_text())
    config["preprocess"] |= values
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LeanclipError) as caught:
        leanclip.load(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_patches_of_a_model_of_squares_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = CLIP(**TINY)
    save_weights(tmp_path, model.state_dict(), model.config, PREPROCESS)
    with pytest.raises(WeightsError, match="needs vision_positions resized, found learned"):
        leanclip.load(tmp_path)


def test_loaded_weights_are_used_and_trained_as_they_are(naflex: Path) -> None:
    make_weights(naflex / "weights", replace(PREPROCESS, max_patches=25, interpolation="bilinear"))
    plan = make_plan(settings("data.patches=null", "data.resize=null", load="weights"), CPU)
    assert (plan.preprocess.max_patches, plan.preprocess.interpolation) == (25, "bilinear")
    with pytest.raises(ConfigError, match=r"model\.vision_patch_size: 16, the loaded weights take"):
        make_plan(settings("model.vision_patch_size=16", load="weights"), CPU)
    run = Forked(
        "train", "-c", "config.yaml", "--load", "weights", "-o", "finetune.lock_image=all",
        "-o", "data.augment=false", "-o", "data.patches=[16]", "--output-dir", "run",
        folder=naflex,
    )  # fmt: skip
    assert run.code() == 0, run.output()
    assert "the image tower runs once" in run.output()
    clip = leanclip.load(naflex / "run")
    assert clip.preprocess.max_patches == 16
    report = json.loads((naflex / "run/report.json").read_text())
    assert "image_to_text_R@1" in json.dumps(report)


def test_features_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    clip = leanclip.load(make_weights(tmp_path / "weights"))
    sizes = [(30, 40), (100, 20), (3, 90), (64, 64), (1, 1)]
    images = [noise_image(n, size) for n, size in enumerate(sizes)]
    together = clip.embed_images(images)
    for image, features in zip(images, together, strict=True):
        np.testing.assert_allclose(clip.embed_images(image)[0], features, atol=1e-6)
        square = torch.from_numpy(np.asarray(clip.preprocess(image).values))  # pyright: ignore
        raw = clip.encode_image(Patches(square, clip.preprocess(image).shapes))  # pyright: ignore
        np.testing.assert_allclose(raw[0] / raw[0].norm(), features, atol=1e-6)
    assert len(clip.classify(images, ["a", "b"])) == len(sizes)
    (batch,) = clip.image_batches(images)
    np.testing.assert_array_equal(batch, together)


def test_attention_maps_have_the_proportions_of_the_image(tmp_path: Path) -> None:
    clip = leanclip.load(make_weights(tmp_path / "weights"))
    text = clip.embed_texts("a cat", as_torch=True)
    for h, w in ((2, 5), (4, 4), (1, 9)):
        pixels = torch.randn(2, 3, 8 * h, 8 * w)
        found = rollout(clip.model, pixels)
        assert found.shape == (2, h, w)
        torch.testing.assert_close(found.sum(dim=(1, 2)), torch.ones(2))
        assert gradient_map(clip.model, pixels, text).shape == (2, h, w)
        # a map moves with what it shows: the order of rows and columns is that of the pixels
        values = pixels.unflatten(2, (h, 8)).unflatten(4, (w, 8)).permute(0, 2, 4, 3, 5, 1)
        patches = Patches(values.reshape(2, h * w, 192), torch.tensor([[h, w]] * 2))
        features = clip.encode_image(patches)
        torch.testing.assert_close(features, clip.encode_image(pixels), atol=1e-5, rtol=1e-5)


def test_lengths_of_a_budget_hold_the_patches_of_a_batch(naflex: Path) -> None:
    del naflex
    plan = make_plan(settings(), CPU)
    budget = 4 * 16
    assert all(math.floor(budget / n) == size for size, n in plan.sizes.sizes if n is not None)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_the_page_and_search_take_images_of_any_shape(tmp_path: Path) -> None:
    clip = leanclip.load(make_weights(tmp_path / "weights"))
    sizes = [(30, 40), (100, 20), (64, 64), (1, 1)]
    (tmp_path / "images").mkdir()
    for number, size in enumerate(sizes):
        noise_image(number, size).save(tmp_path / f"images/{number}.png")
    images = [noise_image(number, size) for number, size in enumerate(sizes)]
    features = clip.embed_images(images)
    embed(clip, Source.of(tmp_path / "images"), tmp_path / "out", batch_size=3)
    np.testing.assert_allclose(read_embeddings(tmp_path / "out")[1], features, atol=1e-6)
    with serving(clip) as client:
        files = upload(*map(png, images))
        found = client.post("/api/compare", files=files, data={"texts": "a cat"}).json()
        np.testing.assert_allclose(
            found["similarity"], clip.similarity(images, ["a cat"]), atol=2e-6
        )
        for texts in ({}, {"texts": "a cat"}):
            one = upload(png(images[1]), name="image")
            answer = client.post("/api/attention", files=one, data=texts)
            assert Image.open(io.BytesIO(answer.content)).size == (448, 90)


def test_an_export_takes_squares(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clip = leanclip.load(make_weights(tmp_path / "weights"), device="cpu")
    assert export(clip, tmp_path / "out", "torch")
    assert "squashed to 32 x 32 pixels" in caplog.text
    exported = leanclip.load(tmp_path / "out", backend="torch")
    assert exported.preprocess.resize == "squash"
    square = noise_image(0, (32, 32))
    np.testing.assert_allclose(exported.embed_images(square), clip.embed_images(square), atol=1e-5)
