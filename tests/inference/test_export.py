"""Exported towers give the model's features, or are not written."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import Command, assert_refused
from photographs import DESCRIPTIONS, write_photographs
from test_inference import save_tiny
from test_use import RESNET
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch.nn import functional as F

import leanclip
from leanclip.errors import ConfigError, WeightsError
from leanclip.inference import export as exporting
from leanclip.inference.export import export
from leanclip.weights import fingerprint

TEXTS = [*DESCRIPTIONS.values(), "a", "a longer text, with more words in it than the others have"]


@pytest.fixture(autouse=True, scope="module")
def towers_written_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Towers of the same model are exported once, which takes seconds, and then copied."""
    write, done = exporting._write_towers, {}  # pyright: ignore[reportPrivateUsage]

    def write_once(model: leanclip.CLIP, folder: Path, description: dict[str, Any]) -> None:
        key = fingerprint(model.state_dict()), json.dumps(description), exporting.EXTERNAL_BYTES
        if key not in done:
            done[key] = tmp_path_factory.mktemp("towers")
            write(model, done[key], description)
        shutil.copytree(done[key], folder, dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "_write_towers", write_once)
        yield


def cosines(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum(axis=1).min())


@pytest.mark.parametrize(
    ("to", "changes"),
    [
        ("onnx", {}),
        pytest.param("onnx", RESNET, marks=pytest.mark.slow),
        pytest.param(
            "onnx", {"vision_pool": "avg", "transformer_pool": "last"}, marks=pytest.mark.slow
        ),
        pytest.param("torch", {}, marks=pytest.mark.slow),
    ],
    ids=["vit", "resnet", "padded", "torch"],
)
def test_exported_towers_give_the_models_features(
    tmp_path: Path, to: str, changes: dict[str, Any]
) -> None:
    clip = leanclip.load(save_tiny(tmp_path / "tiny", **changes), device="cpu")
    facts = export(clip, tmp_path / "exported", to)
    assert min(facts["cosines"].values()) > 0.99999
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    again = leanclip.load(tmp_path / "exported", backend=to)
    folder = write_photographs(tmp_path / "photographs")
    for batch_size in (1, 3, 8):
        images = again.embed_images(folder, batch_size=batch_size)
        np.testing.assert_allclose(images, clip.embed_images(folder), atol=1e-5)
    np.testing.assert_allclose(again.embed_texts(TEXTS), clip.embed_texts(TEXTS), atol=1e-5)
    assert again.logit_scale == pytest.approx(clip.logit_scale)
    labels = ["cat", "rocket", "horse"]
    ours, theirs = (one.classify(folder / "page.png", labels) for one in (clip, again))
    assert [prediction.label for prediction in ours] == [prediction.label for prediction in theirs]


@pytest.mark.slow
def test_the_folder_tells_another_runtime_all(tmp_path: Path, command: Command) -> None:
    save_tiny(tmp_path / "tiny")
    done = command("export", "tiny", "exported", "--to", "onnx")
    assert done.returncode == 0, done.stderr
    assert "lowest cosines with the model's features: image 1.000000, text 1.000000" in done.stdout
    folder = Path("exported")
    facts = json.loads((folder / "clip.json").read_text())
    table = {"vocab": folder / facts["tokenizer"]["vocabulary"]}
    merges = (folder / facts["tokenizer"]["merges"]).read_text().splitlines()[1:]
    vocabulary = json.loads(table["vocab"].read_text())
    bpe = Tokenizer(
        BPE(vocabulary, [(a, b) for a, b in (m.split() for m in merges)], end_of_word_suffix="</w>")
    )
    ids = [i for word in ("a", "photo", "of", "segmentation") for i in bpe.encode(word).ids]
    ids = [facts["tokenizer"]["start"], *ids, facts["tokenizer"]["end"]]
    session = onnxruntime.InferenceSession(folder / facts["text"]["file"])
    (features,) = session.run(None, {"tokens": np.array([ids])})
    features = np.asarray(features)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    expected = leanclip.load("tiny").embed_texts("a photo of segmentation")
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert facts["preprocess"]["resolution"] == 32
    assert facts["preprocess"]["mean"][0] == pytest.approx(0.48145466)


@pytest.mark.slow
def test_int8_is_smaller_and_says_what_it_costs(tmp_path: Path) -> None:
    big = {"vision_width": 128, "transformer_width": 128}
    clip = leanclip.load(save_tiny(tmp_path / "tiny", **big), device="cpu")
    export(clip, tmp_path / "plain", "onnx")
    facts = export(clip, tmp_path / "small", "onnx", int8=True)
    assert min(facts["cosines"].values()) > 0.99999
    assert 0.9 < min(facts["int8"].values()) < 0.99999
    size = {
        name: sum(path.stat().st_size for path in (tmp_path / name).glob("*.onnx"))
        for name in ("plain", "small")
    }
    assert size["small"] < 0.35 * size["plain"]
    small = leanclip.load(tmp_path / "small", backend="onnx")
    assert cosines(small.embed_texts(TEXTS), clip.embed_texts(TEXTS)) > 0.95


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(RESNET, marks=pytest.mark.slow),
        pytest.param({"vision_pool": "avg", "transformer_pool": "last"}, marks=pytest.mark.slow),
    ],
    ids=["vit", "resnet", "padded"],
)
def test_int8_features_do_not_depend_on_the_batch(tmp_path: Path, changes: dict[str, Any]) -> None:
    clip = leanclip.load(save_tiny(tmp_path / "tiny", **changes), device="cpu")
    export(clip, tmp_path / "small", "onnx", int8=True)
    small = leanclip.load(tmp_path / "small", backend="onnx")
    generator = torch.Generator().manual_seed(0)
    side = clip.preprocess.resolution
    pixels = torch.randn(6, 3, side, side, generator=generator)
    pixels *= torch.tensor([0, 0.01, 0.5, 1, 3, 30]).view(-1, 1, 1, 1)  # one blank, one extreme
    tokens = torch.randint(1, 49000, (6, 9), generator=generator)
    tokens[:, 0], tokens[:, -1] = 49406, 49407
    for encode, batch in ((small.encode_image, pixels), (small.encode_text, tokens)):
        expected = torch.cat([encode(row[None]) for row in batch])
        assert expected.isfinite().all()
        for rows in ([0, 1, 2, 3, 4, 5], [5, 3], [4, 4, 0, 2]):
            torch.testing.assert_close(encode(batch[rows]), expected[rows], atol=1e-6, rtol=1e-6)
        plain = clip.encode_image if batch is pixels else clip.encode_text
        assert F.cosine_similarity(expected, plain(batch)).min() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True])
def test_weights_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, int8: bool
) -> None:
    monkeypatch.setattr(exporting, "EXTERNAL_BYTES", 1000)  # bytes; protobuf's bound is 2 GB
    clip = leanclip.load(save_tiny(tmp_path / "tiny"), device="cpu")
    export(clip, tmp_path / "large", "onnx", int8=int8)
    suffix = ".int8.onnx" if int8 else ".onnx"
    names = {f"{tower}{suffix}{more}" for tower in ("image", "text") for more in ("", ".data")}
    assert {path.name for path in (tmp_path / "large").glob("*.onnx*")} == names
    large = leanclip.load(tmp_path / "large", backend="onnx")
    assert cosines(large.embed_texts(TEXTS), clip.embed_texts(TEXTS)) > 0.99


def test_what_falls_short_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = leanclip.load(save_tiny(tmp_path / "tiny"), device="cpu")
    write = exporting._write_towers  # pyright: ignore[reportPrivateUsage]

    def of_another_model(model: leanclip.CLIP, folder: Path, facts: dict[str, Any]) -> None:
        torch.manual_seed(9)
        write(leanclip.CLIP(**facts["model"]).eval(), folder, facts)

    monkeypatch.setattr(exporting, "_write_towers", of_another_model)
    with pytest.raises(WeightsError, match=r"differ from the model's.*nothing was written"):
        export(clip, tmp_path / "exported", "torch")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_mistakes_have_their_words(tmp_path: Path, command: Command) -> None:
    save_tiny(tmp_path / "tiny")
    clip = leanclip.load("tiny", device="cpu")
    with pytest.raises(ConfigError, match="--to tflite: unknown format; known: onnx, torch"):
        export(clip, tmp_path / "x", "tflite")
    assert_refused(command("export", "tiny", "x", "--to", "torch", "--int8"), "needs --to onnx")
    assert_refused(command("export", "tiny", "data", "--to", "onnx"), "data: already exists")
    with pytest.raises(ConfigError, match="is for exported folders"):
        leanclip.load("tiny", backend="onnx")
    folder = tmp_path / "exported"
    export(clip, folder, "torch")
    with pytest.raises(ConfigError, match="exported to torch"):
        leanclip.load(folder, backend="onnx")
    with pytest.raises(
        ConfigError, match=r"may execute code .* if you trust this folder, set backend='torch'"
    ):
        leanclip.load(folder)
    (folder / "image.pt2").write_bytes(b"PK nothing")
    with pytest.raises(WeightsError, match="not an exported model"):
        leanclip.load(folder, backend="torch")
    (folder / "clip.json").write_text("{}")
    with pytest.raises(WeightsError, match="not an exported model"):
        leanclip.load(folder)
