"""`leanclip.passl` beside what PASSL's own code gave, and its document."""

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA, PROJECT, TINY
from photographs import DESCRIPTIONS
from reference_tokenizer import encode as reference_encode

import leanclip
from leanclip.errors import ConfigError, WeightsError
from leanclip.passl import CLIPWrapper, SimpleTokenizer, load, preprocess, to_tensor, zeros
from leanclip.preprocess.tokenizer import encode
from leanclip.weights import read_weights, write_weights

ARCH: dict[str, Any] = json.loads((DATA / "passl-vit/arch.json").read_text())


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
    with pytest.raises(WeightsError, match="missing keys"):
        second.set_state_dict({"model.logit_scale": torch.tensor(1.0)})
    with pytest.raises(ConfigError, match="give the architecture"):
        CLIPWrapper(head={"name": "ClipHead"})
    with pytest.raises(ConfigError, match="mode test"):
        second(torch.rand(1, 3, 32, 32), torch.ones(1, 4, dtype=torch.long), mode="test")


# What the cells of PASSL's document "Train CLIP Model" do, one string a cell, with a smaller model.
CELLS = (
    """
!python3 -m pip install paddlepaddle-gpu
import numpy as np
import paddle

print("Paddle version:", paddle.__version__)
""",
    """
!wget https://passl.bj.bcebos.com/models/ViT-B-32.pdparams

from passl.modeling.architectures import CLIPWrapper
arch = {'name': 'CLIP', 'embed_dim': 64, 'image_resolution': 224, 'vision_layers': 2,
        'vision_width': 128, 'vision_patch_size': 32, 'context_length': 77, 'vocab_size': 49408,
        'transformer_width': 64, 'transformer_heads': 1, 'transformer_layers': 2, 'qkv_bias': True}
head = {'name': 'ClipHead'}
model = CLIPWrapper(architecture=arch, head=head)
""",
    """
from paddle.vision.transforms import Compose, Resize, CenterCrop, ToTensor, Normalize
from passl.datasets.preprocess.transforms import ToRGB

preprocess = Compose([Resize(224,interpolation='bicubic'), CenterCrop(224), ToTensor()])
image_mean = paddle.to_tensor([0.48145466, 0.4578275, 0.40821073])
image_std = paddle.to_tensor([0.26862954, 0.26130258, 0.27577711])
""",
    """
class SimpleTokenizer(object):
    def __init__(self, bpe_path="passl/utils/bpe_simple_vocab_16e6.txt.gz"):
        self.merges = open(bpe_path)
""",
    """
import os
import skimage
import matplotlib.pyplot as plt
from PIL import Image

images = []
texts = []
for filename in [filename for filename in os.listdir(skimage.data_dir)]:
    name = os.path.splitext(filename)[0]
    if name not in descriptions:
        continue
    im = Image.open(os.path.join(skimage.data_dir, filename))
    image = preprocess(im.convert("RGB"))
    images.append(image)
    texts.append(descriptions[name])
    plt.imshow(image.transpose((1, 2, 0)))
""",
    """
image_input = paddle.to_tensor(np.stack(images))
image_input -= paddle.to_tensor(np.array(image_mean).reshape(-1,1,1))
image_input /= paddle.to_tensor(np.array(image_std).reshape(-1,1,1))
tokenizer = SimpleTokenizer()
text_tokens = [tokenizer.encode("This is " + desc) for desc in texts]
text_input = paddle.zeros((len(text_tokens), 77), dtype="int64")
sot_token = tokenizer.encoder['<|startoftext|>']
eot_token = tokenizer.encoder['<|endoftext|>']
for i, tokens in enumerate(text_tokens):
    tokens = [sot_token] + tokens + [eot_token]
    text_input[i, :len(tokens)] = paddle.to_tensor(tokens)
with paddle.no_grad():
    image_input = paddle.to_tensor(image_input)
    text_input = paddle.to_tensor(text_input)
    state_dict = paddle.load("ViT-B-32.pdparams")['state_dict']
    model.set_state_dict(state_dict)
    image_features = model.model.encode_image(image_input)
    text_features = model.model.encode_text(text_input)
""",
    """
image_features /= image_features.norm(axis=-1, keepdim=True)
text_features /= text_features.norm(axis=-1, keepdim=True)
similarity = paddle.matmul(text_features, image_features.t()).cpu().numpy()
for i, image in enumerate(images):
    plt.imshow(image.transpose((1, 2, 0)), extent=(i - 0.5, i + 0.5, -1.6, -0.6), origin="lower")
""",
)


def replacements() -> dict[str, str]:
    """The table of docs/checkpoints.md: what stands in the document -> what stands here."""
    page = (PROJECT / "docs/checkpoints.md").read_text()
    table = page.partition("### The document's cells")[2].partition("\n\n|")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:3]] for row in table.splitlines()[2:]]
    return dict(rows)


def test_the_cells_of_passls_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import matplotlib as mpl
    import skimage

    mpl.use("Agg")
    named = replacements()
    text = {old.strip("`"): new.strip("`") for old, new in named.items() if old.startswith("`")}
    assert len(text) == 4
    assert named.keys() - {f"`{old}`" for old in text} == {
        "the cell that defines `SimpleTokenizer`",
        "lines that begin with `!`",
    }
    cells = []
    for cell in CELLS:
        if "class SimpleTokenizer" in cell:
            cells.append(named["the cell that defines `SimpleTokenizer`"].strip("`"))
            continue
        for old, new in text.items():
            cell = cell.replace(old, new)
        cells.append(re.sub(r"(?m)^!.*\n", "", cell))

    # The weights are converted, as a person would who goes back to PASSL.
    arch = eval(re.search(r"arch = (\{.*?\})", CELLS[1], re.DOTALL)[1])  # pyright: ignore
    torch.manual_seed(3)
    torch.save(CLIPWrapper(architecture=arch).model.state_dict(), tmp_path / "plain.pt")
    weights = read_weights(tmp_path / "plain.pt", arch=arch)
    write_weights(weights, tmp_path / "ViT-B-32.pdparams", "passl")

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"descriptions": DESCRIPTIONS}
    for cell in cells:
        exec(cell, names)
    assert capsys.readouterr().out == f"Paddle version: {leanclip.__version__}\n"
    assert sorted(names["texts"]) == sorted(DESCRIPTIONS.values())

    ours = leanclip.load("ViT-B-32.pdparams", arch=arch, device="cpu")
    paths = [path for path in Path(skimage.data_dir).iterdir() if path.stem in DESCRIPTIONS]
    paths.sort(key=lambda path: names["texts"].index(DESCRIPTIONS[path.stem]))
    expected = ours.similarity(paths, [f"This is {text}" for text in names["texts"]])
    np.testing.assert_allclose(names["similarity"], expected, atol=1e-5)
    pixels = [preprocess(path) for path in paths]  # the same in one step
    np.testing.assert_array_equal(pixels, np.stack(names["images"]))


def test_tensors_take_paddles_arguments_and_torchs() -> None:
    x = to_tensor([[3.0, 4.0], [6.0, 8.0]])
    assert (x.dtype, to_tensor([1, 2]).dtype) == (torch.float32, torch.int64)
    assert x.norm(axis=-1).tolist() == x.norm(dim=-1).tolist() == x.norm(2, 1).tolist() == [5, 10]
    assert x.norm(axis=1, keepdim=True).shape == (2, 1)
    assert x.norm().item() == pytest.approx(125**0.5)
    y = zeros((2, 3, 5))
    assert y.transpose((2, 0, 1)).shape == (5, 2, 3)
    assert y.transpose(0, 2).shape == y.transpose(dim0=0, dim1=2).shape == (5, 3, 2)
    z = to_tensor(x)
    z += 1
    assert float(x[0, 0]) == 3  # a copy
    for other in (copy.deepcopy([x, x]), pickle.loads(pickle.dumps([x, x]))):
        assert type(other[0]) is type(x)
        assert other[0] is other[1] is not x
        assert torch.equal(other[0], x)


def test_the_tokenizer_has_passls_tables() -> None:
    tokenizer = SimpleTokenizer()
    assert len(tokenizer.encoder) == 49408
    assert tokenizer.decoder[49407] == "<|endoftext|>"
    for text in ("A photo of a CAT, 3 dogs & “café”!", "naïve 東京 🙂"):
        assert tokenizer.encode(text) == encode(text) == reference_encode(text)
    ids = [49406, *tokenizer.encode("a café"), 49407]
    assert tokenizer.decode(ids) == "<|startoftext|>a café <|endoftext|>"
