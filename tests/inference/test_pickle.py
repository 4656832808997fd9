"""Models and loaded models are pickled, saved whole, copied and sent to other processes."""

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from test_inference import save_tiny
from test_use import RESNET

import leanclip
from leanclip.inference.export import export
from leanclip.model.lora import add_low_rank, merged_state


def saved_whole(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "oldest pickle": lambda model: pickle.loads(pickle.dumps(model, protocol=2)),
    "torch.save": saved_whole,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("low_rank", [False, True], ids=["plain", "low rank"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "gelu", "vision_pool": "avg", "transformer_pool": "last"},
        {"activation": "gelu_tanh", "logit_bias": True, "pre_norm": False},
        RESNET,
    ],
    ids=["vit", "average", "tanh", "resnet"],
)
def test_a_copied_model_is_the_model(changes: dict[str, Any], low_rank: bool, how: str) -> None:
    torch.manual_seed(0)
    model = leanclip.CLIP(**TINY | changes).eval()
    model.uses_packing = True
    if low_rank:
        model.visual.conv1.requires_grad_(False)
        add_low_rank(model, 2, 4.0)
        for name, parameter in model.named_parameters():
            if name.endswith(".up"):
                torch.nn.init.normal_(parameter)
    found = COPIES[how](model)
    state, again = model.state_dict(), found.state_dict()
    assert list(again) == list(state)
    assert all(torch.equal(again[name], state[name]) for name in state)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in found.named_parameters()} == trained
    side = model.config.image_resolution
    pixels, tokens = torch.randn(2, 3, side, side), torch.tensor([[49406, 5, 49407]] * 2)
    for one, other in zip(found(pixels, tokens), model(pixels, tokens), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():  # the copy has values of its own, and its updates count
        for parameter in found.parameters():
            parameter.add_(1 if parameter.requires_grad else 0)
    merged, changed = merged_state(model), merged_state(found)
    assert list(merged) == list(changed)
    name = "visual.attnpool.q_proj.weight" if changes is RESNET else "transformer.resblocks.0"
    name = name if "attnpool" in name else f"{name}.attn.in_proj_weight"
    assert not torch.equal(merged[name], changed[name])


def embed(clip: leanclip.InferenceModel, texts: list[str]) -> np.ndarray:
    return clip.embed_texts(texts)


@pytest.mark.parametrize("backend", [None, pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_loaded_model_goes_to_a_spawned_process(tmp_path: Path, backend: str | None) -> None:
    clip = leanclip.load(save_tiny(tmp_path / "tiny"), device="cpu")
    if backend:
        export(clip, tmp_path / "exported", backend)
        clip = leanclip.load(tmp_path / "exported", backend=backend)
    texts = ["a cat", "two dogs"]
    expected = clip.embed_texts(texts)
    np.testing.assert_array_equal(copy.deepcopy(clip).embed_texts(texts), expected)
    classifier = clip.classifier(texts)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(embed, clip, texts).result(timeout=300)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        found = pool.submit(copy.copy, classifier).result(timeout=300)
    assert found.labels == classifier.labels
    assert torch.equal(found.weights, classifier.weights)
