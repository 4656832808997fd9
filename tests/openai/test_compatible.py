"""`leanclip.openai` and `leanclip.passl` beside what those systems' own code gave."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA, TINY
from photographs import DESCRIPTIONS, photograph
from reference_tokenizer import encode as reference_encode
from test_inference import save_tiny

import leanclip.openai as clip
from leanclip.errors import ConfigError, DataError, WeightsError
from leanclip.passl import CLIPWrapper, SimpleTokenizer, load, preprocess
from leanclip.preprocess.tokenizer import encode

ARCH: dict[str, Any] = json.loads((DATA / "passl-vit/arch.json").read_text())


@pytest.mark.parametrize("name", ["openai-vit", "openai-resnet"])
def test_the_forward_pass_is_openais(name: str) -> None:
    model, _ = clip.load(str(DATA / name / "torchscript.pt"), device="cpu")
    golden = np.load(DATA / name / "io.npz")
    image, text = torch.from_numpy(golden["image"]), torch.from_numpy(golden["text"])
    with torch.no_grad():
        per_image, per_text = model(image, text)
    np.testing.assert_allclose(per_image, golden["logits_per_image"], atol=1e-4)
    assert torch.equal(per_image.T, per_text)
    assert model.visual.input_resolution == 64
    assert model.dtype == torch.float32
    assert (model.context_length, model.vocab_size) == (77, 320)
    assert not model.training


def test_the_first_snippet_of_openais_readme(tmp_path: Path) -> None:
    weights = save_tiny(tmp_path / "tiny", context_length=77)
    image_path = tmp_path / "CLIP.png"
    photograph("coffee").save(image_path)
    # From here as there, but for the names of the files.
    from PIL import Image

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, preprocess = clip.load(str(weights), device=device)

    image = preprocess(Image.open(image_path)).unsqueeze(0).to(device)
    text = clip.tokenize(["a diagram", "a dog", "a cat"]).to(device)

    with torch.no_grad():
        image_features = model.encode_image(image)
        text_features = model.encode_text(text)

        logits_per_image, _ = model(image, text)
        probs = logits_per_image.softmax(dim=-1).cpu().numpy()
    assert probs.shape == (1, 3)
    assert probs.sum() == pytest.approx(1)

    # The zero-shot prediction, whose 100.0 is a trained model's scale.
    scale = model.logit_scale.exp().item()
    image_features /= image_features.norm(dim=-1, keepdim=True)
    text_features /= text_features.norm(dim=-1, keepdim=True)
    similarity = (scale * image_features @ text_features.T).softmax(dim=-1)
    values, indices = similarity[0].topk(2)
    np.testing.assert_allclose(values, np.sort(probs[0])[:0:-1], rtol=1e-5)
    assert indices[0] == probs[0].argmax()


def test_other_names_of_openais_package(tmp_path: Path) -> None:
    assert clip.available_models()[:2] == ["RN50", "RN101"]
    assert clip.tokenize("a cat").tolist()[0][:4] == [49406, 320, 2368, 49407]
    assert clip.tokenize(["a", "b"], context_length=10).shape == (2, 10)
    assert clip.tokenize("word " * 100, truncate=True).shape == (1, 77)
    with pytest.raises(DataError, match="over the context"):
        clip.tokenize("word " * 100)
    with pytest.raises(ConfigError, match="jit=True"):
        clip.load("ViT-B/32", jit=True)
    model, _ = clip.load(save_tiny(tmp_path / "tiny"), device="cpu")
    image = torch.rand(1, 3, 32, 32)
    expected = model.encode_image(image)
    half = model.half().encode_image(image)  # images are converted, as there
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("file", ["bare", "nested", "training"])
def test_the_wrapper_gives_passls_losses(file: str) -> None:
    model = CLIPWrapper(architectual=ARCH, head={"name": "ClipCNHead"})
    state = load(DATA / f"passl-vit/{file}.pdparams")
    model.set_state_dict(state.get("state_dict", state))
    golden = np.load(DATA / "passl-vit/io.npz")
    image, text = torch.from_numpy(golden["image"]), torch.from_numpy(golden["text"])
    np.testing.assert_allclose(
        model.model.encode_image(image).detach(), golden["image_features"], atol=1.2e-5
    )
    np.testing.assert_allclose(
        model.model.encode_text(text).detach(), golden["text_features"], atol=1.2e-5
    )
    pairs = min(len(image), len(text))
    losses = model.train_iter(image[:pairs], text[:pairs])
    expected = json.loads((DATA / "passl-vit/meta.json").read_text())["eval_mode_loss"]
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name], abs=1e-4)
    losses["loss"].backward()
    assert model.model.logit_scale.grad is not None
    assert model(image[:pairs], text[:pairs], mode="train")["loss"] == losses["loss"]


def test_the_wrapper_takes_back_its_own_state(tmp_path: Path) -> None:
    first, second = (CLIPWrapper(architecture=TINY, head={"name": "ClipHead"}) for _ in "ab")
    second.set_state_dict(first.state_dict())
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(WeightsError, match="keys are missing"):
        second.set_state_dict({"model.logit_scale": torch.tensor(1.0)})
    with pytest.raises(ConfigError, match="give the architecture"):
        CLIPWrapper(head={"name": "ClipHead"})
    with pytest.raises(ConfigError, match="mode test"):
        second(torch.rand(1, 3, 32, 32), torch.ones(1, 4, dtype=torch.long), mode="test")


def cells(folder: Path) -> Iterator[np.ndarray]:
    """The cells of PASSL's document, `paddle` replaced by `torch`; the features they give."""
    arch = ARCH | {"vocab_size": 49408, "image_resolution": 40}
    head = {"name": "ClipCNHead"}
    model = CLIPWrapper(architectual=arch, head=head)
    image_mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    image_std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    images, texts = [], []
    for name, description in DESCRIPTIONS.items():
        images.append(preprocess(photograph(name).convert("RGB"), 40))
        texts.append(description)
    assert images[0].transpose((1, 2, 0)).shape == (40, 40, 3)

    image_input = torch.tensor(np.stack(images))
    image_input -= torch.tensor(np.array(image_mean).reshape(-1, 1, 1))
    image_input /= torch.tensor(np.array(image_std).reshape(-1, 1, 1))
    tokenizer = SimpleTokenizer()
    text_tokens = [tokenizer.encode("This is " + desc) for desc in texts]
    text_input = torch.zeros((len(text_tokens), 77), dtype=torch.int64)
    sot_token = tokenizer.encoder["<|startoftext|>"]
    eot_token = tokenizer.encoder["<|endoftext|>"]
    for i, tokens in enumerate(text_tokens):
        tokens = [sot_token, *tokens, eot_token]
        text_input[i, : len(tokens)] = torch.tensor(tokens)
    with torch.no_grad():
        state_dict = load(folder / "ViT-B-32.pdparams")["state_dict"]
        model.set_state_dict(state_dict)
        image_features = model.model.encode_image(image_input)
        text_features = model.model.encode_text(text_input)
    image_features /= image_features.norm(dim=-1, keepdim=True)
    text_features /= text_features.norm(dim=-1, keepdim=True)
    yield torch.matmul(text_features, image_features.t()).cpu().numpy()


def test_the_cells_of_passls_document(tmp_path: Path) -> None:
    import pickle

    import leanclip
    from leanclip.weights import read_weights, write_weights

    arch = ARCH | {"vocab_size": 49408, "image_resolution": 40}
    torch.manual_seed(3)
    wrapper = CLIPWrapper(architecture=arch)
    source = tmp_path / "plain.pt"
    torch.save(wrapper.model.state_dict(), source)
    write_weights(read_weights(source, arch=arch), tmp_path / "bare.pdparams", "passl")
    state = load(tmp_path / "bare.pdparams")
    with (tmp_path / "ViT-B-32.pdparams").open("wb") as file:
        pickle.dump({"epoch": 3, "state_dict": state}, file, protocol=4)
    (similarity,) = cells(tmp_path)
    ours = leanclip.load(tmp_path / "ViT-B-32.pdparams", arch=arch, device="cpu")
    images = [photograph(name) for name in DESCRIPTIONS]
    expected = ours.similarity(images, [f"This is {text}" for text in DESCRIPTIONS.values()])
    np.testing.assert_allclose(similarity, expected, atol=1e-5)


def test_the_tokenizer_has_passls_tables() -> None:
    tokenizer = SimpleTokenizer()
    assert len(tokenizer.encoder) == 49408
    assert tokenizer.decoder[49407] == "<|endoftext|>"
    for text in ("A photo of a CAT, 3 dogs & “café”!", "naïve 東京 🙂"):
        assert tokenizer.encode(text) == encode(text) == reference_encode(text)
    ids = [49406, *tokenizer.encode("a café"), 49407]
    assert tokenizer.decode(ids) == "<|startoftext|>a café <|endoftext|>"
