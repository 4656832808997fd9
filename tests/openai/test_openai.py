"""`leanclip.openai` beside OpenAI's own code.

OpenAI's `model.py` and `simple_tokenizer.py` are those of clip-anytorch, which `make setup`
installs without its dependencies: the two are loaded by their paths, as its `clip.py` needs
torchvision. The pixels of its transform are in data/openai-transform.npz.
"""

import http.server
import importlib.metadata
import importlib.util
import io
import pickle
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA, noise_image
from PIL import Image
from test_images import reference
from test_inference import save_tiny
from torch import nn
from torch.nn import functional as F

import leanclip
import leanclip.openai as clip
from leanclip.openai.network import CLIP, build_model, convert_weights
from leanclip.openai.simple_tokenizer import SimpleTokenizer
from leanclip.openai.transforms import CenterCrop, steps_of
from leanclip.preprocess.images import CLIP_MEAN, CLIP_STD, Preprocess, Rounding
from leanclip.weights import hub

# embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size, context_length,
# vocab_size, transformer_width, transformer_heads, transformer_layers; heads of 64 channels
VIT = (32, 64, 3, 128, 16, 77, 49408, 128, 2, 3)
RESNET = (32, 64, (1, 2, 1, 1), 16, None, 77, 49408, 64, 1, 2)
ARCHITECTURES = {"vit": VIT, "resnet": RESNET}
NAMES = ["cat", "sports car", "piece of cake"]


def openais(name: str) -> Any:
    """A module of OpenAI's package."""
    try:
        package = importlib.metadata.distribution("clip-anytorch")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("clip-anytorch is not installed (make setup does it): nothing to compare with")
    path = package.locate_file(f"clip/{name}.py")
    spec = importlib.util.spec_from_file_location(f"openais_{name}", str(path))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def both(name: str, *, is_half: bool = False) -> tuple[Any, Any]:
    """OpenAI's model and ours, made with the same seed."""
    models = []
    for made_by, converted_by in (
        (openais("model").CLIP, openais("model").convert_weights),
        (CLIP, convert_weights),
    ):
        torch.manual_seed(3)
        model = made_by(*ARCHITECTURES[name])
        with torch.no_grad():  # as drawn, a ResNet's blocks do nothing
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("bn3.weight"):
                    parameter.normal_(std=0.5)
        if is_half:
            converted_by(model)
        models.append(model.eval())
    return models[0], models[1]


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (3, 3, 64, 64) and tokens (3, 77)."""
    image = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    return image, clip.tokenize([f"a photo of a {name}." for name in NAMES])


# --- beside OpenAI's code


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_modules_and_parameters_are_openais(name: str) -> None:
    theirs, ours = both(name)
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    for key, tensor in theirs.state_dict().items():  # one seed, one initialisation
        assert torch.equal(ours.state_dict()[key], tensor), key
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    modules = dict(theirs.named_modules())
    assert [*modules] == [n for n, _ in ours.named_modules()]
    for path, module in ours.named_modules():
        assert type(module).__name__ == type(modules[path]).__name__
        own = {key for key in vars(modules[path]) if not key.startswith("_")}
        assert own <= {key for key in dir(module)}, path
    assert type(ours.transformer.resblocks[0].attn) is nn.MultiheadAttention


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("is_half", [False, True])
def test_features_and_hooks_are_openais(name: str, is_half: bool) -> None:
    theirs, ours = both(name, is_half=is_half)
    assert ours.dtype == theirs.dtype == (torch.float16 if is_half else torch.float32)
    for key, tensor in theirs.state_dict().items():
        assert ours.state_dict()[key].dtype == tensor.dtype, key
    tolerance = {"rtol": 0, "atol": 2e-3 if is_half else 1e-5}
    image, text = inputs()
    seen: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for model, outputs in zip((theirs, ours), seen, strict=True):
        for path, module in model.named_modules():

            def hook(
                _: nn.Module, __: Any, output: Any, path: str = path, to: Any = outputs
            ) -> None:
                to[path] = output[0] if isinstance(output, tuple) else output.clone()

            module.register_forward_hook(hook)
        with torch.no_grad():
            model(image, text)
            outputs["image"], outputs["text"] = model.encode_image(image), model.encode_text(text)
    # The attention pool's projections are not called as modules there.
    assert seen[0].keys() <= seen[1].keys()
    for path, expected in seen[0].items():
        assert seen[1][path].dtype == expected.dtype, path
        torch.testing.assert_close(seen[1][path], expected, msg=path, **tolerance)
    if name == "vit":  # every block gives all tokens, (L, B, D)
        assert seen[1]["visual.transformer.resblocks.2"].shape == (17, 3, 128)
        assert seen[1]["transformer.resblocks.2"].shape == (77, 3, 128)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_build_model_is_openais(name: str) -> None:
    theirs, ours = both(name)
    state = ours.state_dict() | {"input_resolution": torch.tensor(64)}
    built = (openais("model").build_model(dict(state)), build_model(state))
    assert "input_resolution" in state  # what is passed stays as it was
    for model in built:
        assert not model.training
        assert model.dtype == torch.float16
        assert model.visual.input_resolution == 64
    for key, tensor in built[0].state_dict().items():
        assert torch.equal(built[1].state_dict()[key], tensor), key
    with torch.no_grad():
        torch.testing.assert_close(
            built[1].float()(*inputs())[0], theirs(*inputs())[0], atol=2e-2, rtol=0
        )
    for damage in ({}, {"ln_final.weight": torch.ones(3)}):
        with pytest.raises(RuntimeError):
            build_model(damage)


def learn_prompts(model: Any, tokenize: Any, steps: int = 3) -> list[float]:
    """Losses of a prompt learner in the style of CoOp (arXiv 2109.01134), written length-first."""
    torch.manual_seed(11)
    model.requires_grad_(False)
    tokens = tokenize([f"X X X X {name}." for name in NAMES]).long()
    embedded = model.token_embedding(tokens).type(model.dtype)  # (C, L, D)
    context = nn.Parameter(torch.randn(4, embedded.shape[-1], dtype=model.dtype) * 0.02)
    optimizer = torch.optim.SGD([context], lr=2.0)
    image, _ = inputs()
    labels, losses = torch.arange(3), []
    for _ in range(steps):
        middle = context.expand(3, -1, -1)
        x = torch.cat([embedded[:, :1], middle, embedded[:, 5:]], dim=1)
        x = x + model.positional_embedding.type(model.dtype)
        x = model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        x = model.ln_final(x).type(model.dtype)
        text = x[torch.arange(3), tokens.argmax(dim=-1)] @ model.text_projection
        features = model.visual(image.type(model.dtype))
        cosines = F.normalize(features, dim=-1) @ F.normalize(text, dim=-1).t()
        loss = F.cross_entropy((model.logit_scale.exp() * cosines).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("is_half", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prompt_learner_has_openais_losses(name: str, is_half: bool) -> None:
    theirs, ours = both(name, is_half=is_half)
    expected, losses = (learn_prompts(model, clip.tokenize) for model in (theirs, ours))
    assert losses == pytest.approx(expected, abs=5e-3 if is_half else 1e-6)
    assert len({*losses}) == 3


def fine_tune(model: Any, convert: Any) -> list[float]:
    """Losses of training in half precision, as is usual for OpenAI's package."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6)
    (image, text), truth, losses = inputs(), torch.arange(3), []
    for _ in range(2):
        optimizer.zero_grad()
        per_image, per_text = model(image, text)
        loss = (F.cross_entropy(per_image, truth) + F.cross_entropy(per_text, truth)) / 2
        loss.backward()
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
            parameter.grad.data = parameter.grad.data.float()
        optimizer.step()
        convert(model)
        losses.append(loss.item())
    return losses


def test_fine_tuning_in_half_precision_has_openais_losses() -> None:
    theirs, ours = both("vit", is_half=True)
    expected = fine_tune(theirs, openais("model").convert_weights)
    losses = fine_tune(ours, clip.model.convert_weights)
    assert losses == pytest.approx(expected, abs=5e-3)
    assert losses[1] < losses[0]


def test_the_tokenizer_is_openais() -> None:
    theirs, ours = openais("simple_tokenizer").SimpleTokenizer(), SimpleTokenizer()
    for table in ("encoder", "decoder", "byte_encoder", "byte_decoder", "bpe_ranks"):
        expected = getattr(theirs, table)
        assert [*getattr(ours, table).items()] == [*expected.items()], table
    texts = ["A photo of a CAT, 3 dogs & “café”!", "naïve 東京 🙂", "<|startoftext|>it's", "x" * 40]
    for text in texts:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.pat.findall(text) == theirs.pat.findall(text)
        for word in theirs.pat.findall(text.lower()):
            token = "".join(theirs.byte_encoder[byte] for byte in word.encode("utf-8"))
            assert ours.bpe(token) == theirs.bpe(token)
    for function in ("basic_clean", "whitespace_clean", "get_pairs"):
        for text in ("a  &amp;lt; b\t", "ab"):
            expected = getattr(openais("simple_tokenizer"), function)(text)
            assert getattr(clip.simple_tokenizer, function)(text) == expected


def test_the_tokenizer_takes_no_other_table(tmp_path: Path) -> None:
    import gzip

    path = clip.simple_tokenizer.default_bpe()
    assert SimpleTokenizer(path).encode("a cat") == [320, 2368]
    other = tmp_path / "other.txt.gz"
    other.write_bytes(gzip.compress(b"#version\na b\n"))
    with pytest.raises(leanclip.ConfigError, match="is not CLIP's merge table"):
        SimpleTokenizer(other)


# --- in place of the package


def test_code_that_imports_clip_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = [name for name in sys.modules if name.partition(".")[0] == "clip"]
    for name in ("clip", "clip.clip", "clip.model", "clip.simple_tokenizer", *imported):
        monkeypatch.setitem(sys.modules, name, clip)  # what is imported below goes with the test
        monkeypatch.delitem(sys.modules, name)
    program = """
import sys
import leanclip.openai
sys.modules["clip"] = leanclip.openai
import clip
from clip import clip as module, tokenize
from clip.clip import _MODELS, _download, _tokenizer, _transform, build_model
import clip.model
import clip.simple_tokenizer as simple_tokenizer
from clip.model import (AttentionPool2d, Bottleneck, CLIP, LayerNorm, ModifiedResNet, QuickGELU,
    ResidualAttentionBlock, Transformer, VisionTransformer, build_model, convert_weights)
from clip.simple_tokenizer import SimpleTokenizer as Tokenizer
model = CLIP(16, 32, 1, 64, 8, 77, 49408, 64, 1, 1)
clip.model.convert_weights(model)
assert isinstance(model, leanclip.openai.model.CLIP)  # one class, whatever it is imported as
assert isinstance(model.visual, VisionTransformer)
assert isinstance(model.ln_final, clip.model.LayerNorm)
assert type(_tokenizer) is Tokenizer is leanclip.openai.simple_tokenizer.SimpleTokenizer
assert module.tokenize is tokenize is clip.tokenize
assert [*_MODELS] == clip.available_models() == [*module._MODELS]
assert clip.build_model is build_model is module.build_model
names = {}
exec("from clip import *", names)
assert {"available_models", "load", "tokenize"} == {*names} - {"__builtins__"}
exec("from clip.model import *\\nassert CLIP and OrderedDict and nn.Module and F.relu and np", {})
"""
    exec(program, {})
    assert sys.modules["clip"] is clip


def test_tokens_are_int32_and_long_texts_raise() -> None:
    tokens = clip.tokenize(["a cat", "b"], context_length=10)
    assert (tokens.dtype, tokens.shape) == (torch.int32, (2, 10))
    assert clip.tokenize("a cat").tolist()[0][:4] == [49406, 320, 2368, 49407]
    cut = clip.tokenize("word " * 100, truncate=True)
    assert (cut.shape, int(cut[0, -1])) == ((1, 77), 49407)
    with pytest.raises(RuntimeError, match=r"too long for context length 77: .* 102 tokens"):
        clip.tokenize(["short", "word " * 100])


@pytest.mark.parametrize("name", ["ViT-B/99", "nowhere/ViT-B-32.pt", "owner/name"])
def test_an_unknown_model_raises(name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"Model {name} not found; available models = \['RN50"):
        clip.load(name)


def test_other_mistakes_raise_too(tmp_path: Path) -> None:
    (tmp_path / "damaged.pt").write_bytes(b"PK\3\4 and no more")
    with pytest.raises(RuntimeError, match=r"damaged\.pt"):
        clip.load(tmp_path / "damaged.pt")
    with pytest.raises(RuntimeError, match=r"device: should be auto.*found nowhere"):
        clip.load(DATA / "openai-vit/torchscript.pt", device="nowhere")


def test_a_bare_state_dict_is_of_openais_architecture(tmp_path: Path) -> None:
    """What training saves, without the three numbers of OpenAI's files."""
    torch.manual_seed(1)
    expected = CLIP(*VIT).eval()
    torch.save(expected.state_dict(), tmp_path / "mine.pt")
    with pytest.warns(UserWarning, match="its activation is unknown; QuickGELU is used"):
        model, _ = clip.load(str(tmp_path / "mine.pt"), device="cpu")
    assert torch.equal(model(*inputs())[0], expected(*inputs())[0])
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(RuntimeError, match=r"other\.pt: not CLIP's tensors"):
        clip.load(tmp_path / "other.pt")


def test_jit_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="TorchScript is not supported"):
        model, _ = clip.load(DATA / "openai-vit/torchscript.pt", device="cpu", jit=True)
    assert isinstance(model, CLIP)


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_weights_are_float16_where_openais_are() -> None:
    model, _ = clip.load(DATA / "openai-vit/torchscript.pt", device="meta")  # as any but the CPU
    assert (model.dtype, model.ln_final.weight.dtype) == (torch.float16, torch.float32)
    model, _ = clip.load(DATA / "openai-vit/torchscript.pt", device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """ViT-B/32 is a tiny archive on a local server; gives the paths that it was asked for."""
    content = (DATA / "openai-vit/torchscript.pt").read_bytes()
    file = f"{sha256(content).hexdigest()}/ViT-B-32.pt"
    asked: list[str] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content if self.path == f"/{file}" else b"something else")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("LEANCLIP_OPENAI_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setitem(hub.OPENAI_FILES, "ViT-B/32", file)
    monkeypatch.setitem(clip.clip._MODELS, "ViT-B/32", f"{hub.OPENAI_URL}/{file}")
    yield asked
    server.shutdown()


def test_download_root_is_where_files_go(
    published: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEANCLIP_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "some" / "root"
    clip.load("ViT-B/32", device="cpu", download_root=root)
    model, _ = clip.load("ViT-B/32", device="cpu", download_root=str(root))
    assert model.vocab_size == 320
    assert [path.name for path in root.iterdir()] == ["ViT-B-32.pt"]
    assert len(published) == 1
    assert not (tmp_path / "cache").exists()
    # CoOp's way, through the private names.
    url = clip.clip._MODELS["ViT-B/32"]
    assert clip.clip._download(url, str(root)) == str(root / "ViT-B-32.pt")
    path = clip.clip._download(url)
    assert path == str(tmp_path / "cache" / "ViT-B-32.pt")
    archive = torch.jit.load(path, map_location="cpu").eval()
    rebuilt = clip.build_model(archive.state_dict()).float()
    image, text = torch.randn(1, 3, 64, 64), torch.tensor([[318, 5, 319]])
    torch.testing.assert_close(rebuilt(image, text), model(image, text))
    with pytest.raises(RuntimeError, match="differs from its checksum"):
        clip.clip._download(f"{hub.OPENAI_URL}/{'0' * 64}/ViT-B-32.pt", str(tmp_path / "other"))


# --- the transform

IMAGES = ("rgb", "rgba", "palette", "palette_alpha", "grey_alpha", "grey16", "bits", "cmyk", "exif")


def example(kind: str) -> bytes:
    """A file of an image of one kind, 45 x 31."""
    image, options, file = noise_image(7, (45, 31)), {}, io.BytesIO()
    alpha = Image.fromarray(np.linspace(0, 255, 45 * 31).reshape(31, 45).astype(np.uint8))
    if kind == "rgba":
        image.putalpha(alpha)
    elif kind.startswith("palette"):
        image = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
        options = {"transparency": 3} if kind.endswith("alpha") else {}
    elif kind == "grey_alpha":
        image = Image.merge("LA", (image.convert("L"), alpha))
    elif kind == "grey16":
        image = Image.fromarray((np.arange(31 * 45).reshape(31, 45) % 512).astype(np.uint16))
    elif kind == "bits":
        image = image.convert("1")
    elif kind == "cmyk":
        image = image.convert("CMYK")
    elif kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by a quarter
        options = {"exif": exif}
    image.save(file, "TIFF" if kind == "cmyk" else "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", IMAGES)
def test_the_transform_is_openais(kind: str) -> None:
    """The golden pixels are those of torchvision's steps as its source has them: Pillow's."""
    golden = np.load(DATA / "openai-transform.npz")
    image = Image.open(io.BytesIO(example(kind)))
    ours = clip._transform(24)(image)
    assert ours.dtype == torch.float32
    np.testing.assert_array_equal(ours, reference(image, 24))
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    pixels = np.round((ours.numpy() * std + mean) * 255)
    np.testing.assert_allclose(pixels, golden[kind], atol=1)  # Pillow's versions may differ by one


def test_the_steps_of_the_transform(tmp_path: Path) -> None:
    _, preprocess = clip.load(save_tiny(tmp_path / "tiny"), device="cpu")
    resize, crop, _, to_tensor, normalize = preprocess.transforms
    assert (resize.size, resize.interpolation, crop.size) == (
        32,
        Image.Resampling.BICUBIC,
        (32, 32),
    )
    assert normalize.mean == CLIP_MEAN
    image = noise_image(1, (70, 50))
    expected = preprocess(image)
    # Some steps alone, as where others augment; and the transform in another process.
    some = clip.clip.Compose([resize, crop, preprocess.transforms[2], to_tensor])(image)
    torch.testing.assert_close(normalize(some), expected)
    assert float(some.min()) >= 0
    assert torch.equal(pickle.loads(pickle.dumps(preprocess))(image), expected)
    assert str(preprocess).startswith("Compose(transforms=[Resize(size=32, ")
    # Without ToTensor it takes tensors, with gradients.
    preprocess.transforms.pop(2)
    preprocess.transforms.pop(2)
    pixels = torch.rand(2, 3, 50, 70, requires_grad=True)
    prepared = preprocess(pixels)
    assert prepared.shape == (2, 3, 32, 32)
    prepared.sum().backward()
    assert pixels.grad is not None
    one = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    assert (preprocess(one) - expected).abs().mean() < 0.01  # no rounding between the steps


@pytest.mark.parametrize(
    ("width", "even", "down"), [(5, 0, 0), (6, 1, 1), (7, 2, 1), (9, 2, 2), (11, 4, 3), (3, 0, -1)]
)
def test_half_a_pixel_of_a_crop_is_rounded(width: int, even: int, down: int) -> None:
    image = Image.fromarray(np.arange(1, width + 1, dtype=np.uint8)[None].repeat(4, 0))
    offsets: dict[Rounding, int] = {"even": even, "down": down}
    for rounding, left in offsets.items():
        crop = CenterCrop(4, rounding)(image)
        expected = [n + 1 if 0 <= n < width else 0 for n in range(left, left + 4)]
        assert np.asarray(crop)[0].tolist() == expected


@pytest.mark.parametrize("size", [(40, 31), (20, 9), (9, 20)])
def test_crops_of_images_and_tensors_are_the_same(size: tuple[int, int]) -> None:
    image = noise_image(2, size)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    cropped = clip.clip.CenterCrop(20)(image)  # black where it is larger than the image
    assert cropped.size == (20, 20)
    expected = torch.from_numpy(np.asarray(cropped).copy()).permute(2, 0, 1)
    assert torch.equal(clip.clip.CenterCrop(20)(pixels), expected)


def test_a_transform_that_these_steps_cannot_express_is_kept() -> None:
    other = Preprocess(16, resize="longest")
    assert steps_of(other).transforms == [other]
    half = (0.5, 0.5, 0.5)
    *_, normalize = steps_of(Preprocess(16, half, half)).transforms
    assert (normalize.mean, normalize.std) == (half, half)


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(24),
        Preprocess(24, rounding="down"),
        Preprocess(24, size=32, interpolation="bilinear"),
        Preprocess(
            24, resize="squash", interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
        ),
    ],
)
def test_other_preprocessing_in_openais_steps(preprocess: Preprocess) -> None:
    steps = steps_of(preprocess)
    assert len(steps.transforms) == 5
    assert steps.transforms[-1].mean == preprocess.mean
    for size in ((50, 35), (35, 51), (24, 24)):
        image = noise_image(1, size)
        torch.testing.assert_close(steps(image), preprocess(image), rtol=0, atol=1e-6)
