"""Weights of every format against the systems that wrote them, and from each into each."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, TINY, assert_refused, make_config
from safetensors.torch import save_file

import leanclip
from leanclip import CLIP, ConfigError, Preprocess, WeightsError
from leanclip.config.sections import to_plain
from leanclip.model import ModifiedResNet
from leanclip.weights import WEIGHTS_FORMATS, Weights, hub, load_into, read_weights, write_weights
from leanclip.weights.weights import mlp_ratio

PASSL_ARCH = DATA / "passl-vit" / "arch.json"
WIDE = {"vision_width": 64, "transformer_width": 64, "vision_heads": 1, "transformer_heads": 1}
FILES = {"openai": "w.pt", "passl": "w.pdparams", "leanclip": "w", "open_clip": "w", "hf": "w"}


def relative_error(ours: torch.Tensor, theirs: np.ndarray) -> float:
    return float(np.abs(ours.numpy() - theirs).max() / np.abs(theirs).max())


def tiny(**changes: object) -> Weights:
    model = CLIP(**TINY | changes)
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    return Weights(Path("tiny"), "leanclip", tensors, model.config, Preprocess(32))


def rewrite(weights: Weights, folder: Path, format: str) -> Weights:
    """Write in a format and read it back."""
    write_weights(weights, folder / format / FILES[format], format)
    return read_weights(folder / format / FILES[format], arch=weights.model)


def assert_same(ours: Weights, theirs: Weights) -> None:
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in ours.tensors.items():
        assert tensor.dtype == theirs.tensors[name].dtype, name
        assert torch.equal(tensor, theirs.tensors[name]), name


# --- what the other systems computed


@torch.no_grad()
@pytest.mark.parametrize(
    ("source", "arch"),
    [
        ("openai-vit/torchscript.pt", None),
        ("openai-resnet/torchscript.pt", None),
        ("hf-vit", None),
        ("passl-vit/bare.pdparams", PASSL_ARCH),
        ("passl-vit/nested.pdparams", PASSL_ARCH),
        ("passl-vit/training.pdparams", PASSL_ARCH),
    ],
)
def test_golden_features_and_logits(source: str, arch: Path | None) -> None:
    clip = leanclip.load(DATA / source, arch=arch, device="cpu")
    io = np.load(DATA / source.partition("/")[0] / "io.npz")
    pixels, tokens = torch.from_numpy(io["image"]), torch.from_numpy(io["text"])
    assert relative_error(clip.model.encode_image(pixels), io["image_features"]) < 1e-5
    assert relative_error(clip.model.encode_text(tokens), io["text_features"]) < 1e-5
    image, text, scale = clip.model(pixels, tokens)
    assert relative_error(scale * image @ text.T, io["logits_per_image"]) < 1e-5


@torch.no_grad()
def test_passls_resnet_is_its_trunk_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    folder = DATA / "passl-resnet"
    clip = leanclip.load(folder / "bare.pdparams", arch=folder / "arch.json", device="cpu")
    io = np.load(folder / "io.npz")
    assert isinstance(clip.model.visual, ModifiedResNet)
    trunk = clip.model.visual.trunk(torch.from_numpy(io["image"]))
    assert relative_error(trunk, io["trunk_layer4"]) < 1e-5
    text = clip.model.encode_text(torch.from_numpy(io["text"]))
    assert relative_error(text, io["text_features"]) < 1e-5
    assert "no visual.attnpool.positional_embedding" in caplog.text


# --- from each into each


@pytest.fixture(scope="module")
def in_each_format(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    """OpenAI's golden weights, and what comes back from each format that they are written in."""
    golden = read_weights(DATA / "openai-vit/torchscript.pt")
    folder = tmp_path_factory.mktemp("formats")
    return {"golden": golden} | {name: rewrite(golden, folder, name) for name in WEIGHTS_FORMATS}


@pytest.mark.parametrize("there", WEIGHTS_FORMATS)
@pytest.mark.parametrize("here", WEIGHTS_FORMATS)
def test_a_vit_comes_back_to_the_bit(
    here: str, there: str, in_each_format: dict[str, Weights], tmp_path: Path
) -> None:
    golden, first = in_each_format["golden"], in_each_format[here]
    second = rewrite(first, tmp_path, there)
    for weights in (first, second):
        assert_same(golden, weights)
        assert weights.model == golden.model


@pytest.mark.parametrize("format", [d for d in WEIGHTS_FORMATS if d != "hf"])
def test_a_resnet_comes_back_to_the_bit(format: str, tmp_path: Path) -> None:
    golden = read_weights(DATA / "openai-resnet/torchscript.pt")
    assert_same(golden, rewrite(golden, tmp_path, format))


def test_hugging_face_cannot_hold_a_resnet(tmp_path: Path) -> None:
    golden = read_weights(DATA / "openai-resnet/torchscript.pt")
    with pytest.raises(WeightsError, match="CLIPModel cannot hold a ResNet"):
        write_weights(golden, tmp_path / "w", "hf")
    assert not (tmp_path / "w").exists()


def test_square_matrices_are_transposed_for_paddle(tmp_path: Path) -> None:
    from leanclip.weights.unpickle import read_numpy_pickle

    weights = tiny(vision_heads=None, vision_width=64, transformer_width=64, transformer_heads=1)
    write_weights(weights, tmp_path / "w.pdparams", "passl")
    loaded = read_numpy_pickle(tmp_path / "w.pdparams")
    assert isinstance(loaded, dict)
    assert [*loaded] == ["state_dict"]  # PASSL's document takes it from there
    arrays = loaded["state_dict"]  # for the wrapper, whose model is in `.model`
    square = arrays["model.transformer.blocks.0.attn.proj.weight"]
    assert square.shape == (64, 64)
    ours = weights.tensors["transformer.resblocks.0.attn.out_proj.weight"].numpy()
    np.testing.assert_array_equal(square, ours.T)
    visual_proj = arrays["model.visual.proj"]
    np.testing.assert_array_equal(visual_proj, weights.tensors["visual.proj"].numpy())
    names = {
        f"model.{line.split()[0].removeprefix('model.')}"
        for line in (DATA / "passl-formats/passl_vitb32_names.txt").read_text().splitlines()
        if ".blocks." not in line
    }
    assert {name for name in arrays if ".blocks." not in name} == names


@pytest.mark.parametrize(
    ("changes", "format", "words"),
    [
        (WIDE | {"activation": "gelu"}, "openai", "implies activation quick_gelu, this model"),
        ({"activation": "gelu"}, "passl", "PASSL has activation quick_gelu, this model gelu"),
        ({}, "openai", "OpenAI's format implies heads of 64"),
        (
            {"patch_bias": True},
            "open_clip",
            "no vision tower of timm with patch_bias True; the nearest",
        ),
        ({"pre_norm": False}, "hf", "CLIPModel cannot hold pre_norm: False"),
        ({"vision_pool": "avg"}, "hf", "cannot hold vision_pool: avg"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    changes: dict, format: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=words):
        write_weights(tiny(**changes), tmp_path / FILES[format], format)


@pytest.mark.parametrize("format", ["leanclip", "open_clip", "hf"])
@pytest.mark.parametrize(
    "changes", [{"activation": "gelu"}, {"transformer_mlp_ratio": 2.0, "vision_mlp_ratio": 3.0}]
)
def test_folders_keep_the_architecture(changes: dict, format: str, tmp_path: Path) -> None:
    weights = tiny(**changes)
    rounding = "down" if format == "hf" else "even"
    preprocess = Preprocess(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), rounding=rounding)
    weights = replace(weights, preprocess=preprocess)
    write_weights(weights, tmp_path / "w", format)
    back = read_weights(tmp_path / "w")
    assert back.model is not None
    assert back.format == format
    assert to_plain(back.model) == to_plain(weights.model)  # pyright: ignore[reportArgumentType]
    assert back.preprocess == preprocess


@torch.no_grad()
def test_transformers_loads_what_was_written(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    golden = read_weights(DATA / "openai-vit/torchscript.pt")
    tensors = {name: tensor.float() for name, tensor in golden.tensors.items()}
    write_weights(replace(golden, tensors=tensors), tmp_path / "w", "hf")
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "w", dtype=torch.float32).eval()
    io = np.load(DATA / "openai-vit/io.npz")
    pixels, tokens = torch.from_numpy(io["image"]), torch.from_numpy(io["text"])
    out = theirs(input_ids=tokens, pixel_values=pixels)
    assert relative_error(out.logits_per_image, io["logits_per_image"]) < 1e-5


def test_transformers_processor_agrees(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from PIL import Image
    from skimage import data as photographs

    write_weights(tiny(), tmp_path / "w", "hf")
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "w")
    image = Image.fromarray(photographs.astronaut())
    texts = ["a photo of a cat!", "don't   Stop", "naïve café 12:30"]
    out = processor(text=texts, images=image, return_tensors="pt", padding=True)
    torch.testing.assert_close(out["pixel_values"][0], Preprocess(32)(image))
    for row, text in zip(out["input_ids"], texts, strict=True):
        ids = leanclip.tokenize(text)[0]
        end = int(ids.argmax())
        assert row[: end + 1].tolist() == ids[: end + 1].tolist()


# --- plain and wrapped state dicts


@pytest.mark.parametrize("wrap", ["bare", "open_clip", "ema", "text", "legacy", "safetensors"])
def test_state_dicts_as_training_programs_leave_them(wrap: str, tmp_path: Path) -> None:
    weights = tiny()
    tensors, path = weights.tensors, tmp_path / "w.bin"
    module = {f"module.{name}": tensor for name, tensor in tensors.items()}
    text = {
        name if name.startswith(("visual", "logit")) else f"text.{name}": tensor
        for name, tensor in tensors.items()
    }
    match wrap:
        case "bare":
            torch.save(tensors, path)
        case "open_clip":
            torch.save({"epoch": 3, "name": "x", "state_dict": module, "optimizer": {}}, path)
        case "ema":
            torch.save({"state_dict_ema": module, "args": None}, path)
        case "text":
            torch.save(text, path)
        case "legacy":
            torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=False)
        case "safetensors":
            save_file(tensors, path)
    back = read_weights(path, arch=TINY)
    assert_same(weights, back)
    assert read_weights(path).model is None
    if wrap == "open_clip":
        assert back.unexpected == ("epoch", "name", "optimizer")
    with pytest.raises(WeightsError, match=r"without its architecture.*arch='ViT-B-32'"):
        leanclip.load(path)


def test_hugging_face_shards_and_bins(tmp_path: Path) -> None:
    weights = tiny()
    write_weights(weights, tmp_path / "w", "hf")
    folder = tmp_path / "w"
    from safetensors.torch import load_file

    theirs = load_file(folder / "model.safetensors")
    names = sorted(theirs)
    (folder / "model.safetensors").unlink()
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in halves.items():
        save_file({name: theirs[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(weights, read_weights(folder))
    index["weight_map"][names[0]] = "../a.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="is not the name of a file beside it"):
        read_weights(folder)
    (folder / "model.safetensors.index.json").unlink()
    torch.save(theirs | {"text_model.embeddings.position_ids": torch.arange(77)},
               folder / "pytorch_model.bin")  # fmt: skip
    assert_same(weights, read_weights(folder))


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("vision_cfg", "timm_model_name", "vit_base"),
        ("text_cfg", "ls_init_value", 0.1),
        ("text_cfg", "hf_model_name", "google/mt5-base"),
        ("vision_cfg", "unheard_of", 1),
    ],
)
def test_open_clip_models_that_leanclip_has_not(
    section: str, name: str, value: object, tmp_path: Path
) -> None:
    write_weights(tiny(), tmp_path / "w", "open_clip")
    path = tmp_path / "w" / "open_clip_config.json"
    facts = json.loads(path.read_text())
    facts["model_cfg"][section][name] = value
    path.write_text(json.dumps(facts))
    with pytest.raises(WeightsError, match=f"{name}: .* is not supported"):
        read_weights(tmp_path / "w")


# --- sizes, missing keys, settings that no tensor shows


def test_passl_cannot_hold_narrow_heads_and_text_heads_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(WeightsError, match=r"PASSL has 1 vision heads at this width, .* 4"):
        write_weights(
            tiny(**WIDE | {"vision_heads": 4, "transformer_heads": 1}), tmp_path / "w", "passl"
        )
    write_weights(tiny(**WIDE | {"transformer_heads": 2}), tmp_path / "w.pdparams", "passl")
    assert "with transformer_heads: 2" in caplog.text


def test_tensors_that_are_not_the_architectures_are_not_written(tmp_path: Path) -> None:
    weights = read_weights(DATA / "openai-vit/torchscript.pt", arch="ViT-L-14-quickgelu")
    with pytest.raises(WeightsError, match=r"shapes differ: .* in the architecture"):
        write_weights(weights, tmp_path / "w", "leanclip")
    assert not (tmp_path / "w").exists()


def test_arch_wins_over_a_folders_own(tmp_path: Path) -> None:
    write_weights(tiny(), tmp_path / "w", "leanclip")
    model = read_weights(tmp_path / "w", arch=TINY | {"activation": "gelu"}).model
    assert model is not None
    assert model.activation == "gelu"


@pytest.mark.parametrize("width", [896, 1408, 1280, 1664])
def test_every_hidden_width_comes_back(width: int) -> None:
    for hidden in range(1, 6 * width, 7):
        assert int(width * mlp_ratio(width, hidden)) == hidden


def test_oddities_in_strangers_files_are_one_line(tmp_path: Path) -> None:
    import pickle

    arrays = {"visual.positional_embedding": np.zeros(3), "logit_scale": np.zeros((2, 2))}
    for name, array in arrays.items():
        (tmp_path / "w.pdparams").write_bytes(pickle.dumps({name: array}, protocol=4))
        with pytest.raises(WeightsError, match=r"w\.pdparams"):
            read_weights(tmp_path / "w.pdparams")
    write_weights(tiny(), tmp_path / "oc", "open_clip")
    path = tmp_path / "oc" / "open_clip_config.json"
    facts = json.loads(path.read_text())
    facts["preprocess_cfg"]["mean"] = [0.5]
    path.write_text(json.dumps(facts))
    with pytest.raises(WeightsError, match=r"preprocess_cfg: mean: .* is not one number, or three"):
        read_weights(tmp_path / "oc")
    endless: dict = {}
    endless["state_dict"] = endless
    torch.save(endless, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"w\.pt: holds no state dict"):
        read_weights(tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="should be one number"):
        CLIP(**TINY | {"vision_layers": 10**9})


@torch.no_grad()
def test_image_positions_are_resized_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    weights = tiny()
    model = CLIP(**TINY | {"image_resolution": 48})
    load_into(model, weights)
    assert "visual.positional_embedding 17 -> 37: resized, bicubic" in caplog.text
    old = weights.tensors["visual.positional_embedding"].float()
    new = model.state_dict()["visual.positional_embedding"]
    assert torch.equal(new[0], old[0])
    expected = torch.nn.functional.interpolate(
        old[1:].T.reshape(1, 32, 4, 4), (6, 6), mode="bicubic", antialias=True
    )
    torch.testing.assert_close(new[1:], expected[0].flatten(1).T)


def test_text_positions_are_cut_or_extended_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    weights = tiny()
    old = weights.tensors["positional_embedding"].float()
    shorter, longer = (CLIP(**TINY | {"context_length": n}) for n in (16, 32))
    own = longer.positional_embedding.detach().clone()
    load_into(shorter, weights)
    load_into(longer, weights)
    assert torch.equal(shorter.positional_embedding, old[:16])
    assert torch.equal(longer.positional_embedding, torch.cat([old, own[24:]]))
    assert "text positions 24 -> 16: cut" in caplog.text
    assert "text positions 24 -> 32: kept" in caplog.text


def test_partial_lists_what_does_not_match(caplog: pytest.LogCaptureFixture) -> None:
    weights = tiny()
    tensors = dict(weights.tensors)
    del tensors["ln_final.bias"]
    tensors["extra"] = torch.zeros(1)
    weights = replace(weights, tensors=tensors)
    with pytest.raises(WeightsError, match=r"missing keys: ln_final\.bias"):
        load_into(CLIP(**TINY), weights)
    model = CLIP(**TINY)
    load_into(model, weights, partial=True)
    assert "missing keys: ln_final.bias" in caplog.text
    assert "unexpected keys: extra" in caplog.text
    assert torch.equal(model.get_parameter("text_projection"), tensors["text_projection"].float())


@pytest.mark.parametrize(
    "changes", [{"activation": "gelu"}, {"vision_heads": 4}, {"transformer_heads": 1}]
)
def test_settings_that_no_tensor_shows_are_compared(changes: dict) -> None:
    (name,) = changes
    with pytest.raises(WeightsError, match=f"set model.*{name.removeprefix('vision_')}"):
        load_into(CLIP(**TINY | changes), tiny())


def test_arch_wins_and_is_checked(tmp_path: Path) -> None:
    source = DATA / "openai-vit/torchscript.pt"
    arch = to_plain(read_weights(source).model)  # pyright: ignore[reportArgumentType]
    assert read_weights(source, arch=arch | {"activation": "gelu"}).model.activation == "gelu"  # pyright: ignore[reportOptionalMemberAccess]
    assert read_weights(source, arch="ViT-B-32").model.vision_width == 768  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(WeightsError, match="shapes differ"):
        leanclip.load(source, arch="ViT-B-32-quickgelu", device="cpu")
    with pytest.raises(ConfigError, match="ViT-B-33: no such model; did you mean ViT-B-32"):
        read_weights(source, arch="ViT-B-33")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ConfigError, match="contains no settings of a model"):
        read_weights(source, arch=tmp_path / "list.json")
    with pytest.raises(ConfigError, match="proj: False is not supported"):
        read_weights(source, arch=json.loads(PASSL_ARCH.read_text()) | {"proj": False})


def test_folders_and_files_that_are_no_weights(tmp_path: Path) -> None:
    for content, words in (
        ("{}", "neither leanclip's nor Hugging Face's"),
        ('{"model_type": "bert"}', "model_type: bert"),
        ('{"model_type": "clip"}', r"none of model\.safetensors, pytorch_model"),
        ('{"format": "leanclip"}', r"model\.safetensors"),
        ("[]", "holds no JSON object"),
        ("{", "cannot be read"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(WeightsError, match=words):
            read_weights(tmp_path)
    torch.save({"a": 1, "b": [torch.zeros(1)]}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="holds no state dict; its keys are a, b"):
        read_weights(tmp_path / "x.pt")
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><html></html>")
    with pytest.raises(WeightsError, match="a web page"):
        read_weights(tmp_path / "page.pt")


# --- by name


def test_a_published_name_is_fetched_checked_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (DATA / "openai-vit/torchscript.pt").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404 if "gone" in self.path else 200)
            self.end_headers()
            self.wfile.write(content if "good" in self.path else b"something else")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("LEANCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(hub.OPENAI_FILES, "ViT-B/32", f"{digest}/ViT-B-32.pt")
    monkeypatch.setenv("LEANCLIP_OPENAI_URL", f"{base}/bad")
    with pytest.raises(WeightsError, match="differs from its checksum"):
        read_weights("ViT-B/32")
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setenv("LEANCLIP_OPENAI_URL", f"{base}/good")
    for _ in range(2):
        assert read_weights("ViT-B/32").format == "openai"
    assert asked == [f"/bad/{digest}/ViT-B-32.pt", f"/good/{digest}/ViT-B-32.pt"]
    (tmp_path / "cache" / "ViT-B-32.pt").write_bytes(b"spoilt")
    monkeypatch.setenv("LEANCLIP_OPENAI_URL", f"{base}/gone")  # another failure is tried again
    with pytest.raises(WeightsError, match="cannot be fetched"):
        read_weights("ViT-B/32")
    server.shutdown()


def test_a_hub_id_is_taken_from_the_cache_offline(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    repository = tmp_path / "hub" / "models--someone--clip-tiny"
    snapshot = repository / "snapshots" / "0123456789012345678901234567890123456789"
    write_weights(tiny(), snapshot, "open_clip")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    squashing = replace(tiny(), preprocess=Preprocess(32, resize="squash"))
    other = tmp_path / "hub" / "models--someone--clip-squash"
    write_weights(squashing, other / "snapshots" / snapshot.name, "hf")
    (other / "snapshots" / snapshot.name / "preprocessor_config.json").unlink()
    shutil.copytree(repository / "refs", other / "refs")
    assert "processor_config.json" in hub._SETTINGS
    code = (
        "import sys, leanclip\n"
        "from leanclip.weights import read_preprocess\n"
        "for name in sys.argv[1:]:\n"
        "    print(leanclip.load(name, device='cpu').model.config)\n"
        "    print(read_preprocess(name).resize)\n"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    names = (
        "hf-hub:someone/clip-tiny",
        "someone/clip-tiny",
        "someone/clip-squash",
        "someone/absent",
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        env=environment, capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.count("vision_width=32") == 3, done.stderr
    assert [line for line in done.stdout.splitlines() if "=" not in line] == [
        "shortest",
        "shortest",
        "squash",
    ]
    assert "WeightsError: someone/absent: no such file, and the hub" in done.stderr


# --- the command line


def test_convert_and_inspect_on_the_command_line(command, tmp_path: Path) -> None:
    golden = str(DATA / "openai-vit/torchscript.pt")
    for format, name in FILES.items():
        destination = tmp_path / format / name
        done = command("convert", golden, str(destination), "--to", format)
        assert done.returncode == 0, done.stderr
        done = command("inspect", str(destination))
        assert f"format           {format}" in done.stdout
        assert "957,569" in done.stdout
        assert "activation       quick_gelu" in done.stdout
    assert_refused(
        command("convert", golden, str(tmp_path / "hf/w"), "--to", "hf"), "already exists"
    )
    assert_refused(
        command("convert", golden, str(tmp_path / "x"), "--to", "onnx"), "no such format"
    )
    assert_refused(command("inspect", str(tmp_path / "none")), "no such file")


def test_training_starts_from_any_format(command, workplace: Path) -> None:
    tmp_path = workplace
    make_config(tmp_path / "c.yaml", train={"epochs": 1, "batch_size": 4})
    write_weights(tiny(), tmp_path / "w", "hf")
    done = command("train", "-c", "c.yaml", "--load", "w")
    assert done.returncode == 0, done.stderr
    assert "starting from the weights of w" in done.stderr
    shutil.copytree(tmp_path / "w", tmp_path / "less")
    facts = json.loads((tmp_path / "less/config.json").read_text())
    facts["vision_config"]["hidden_act"] = facts["text_config"]["hidden_act"] = "gelu"
    (tmp_path / "less/config.json").write_text(json.dumps(facts))
    refused = command("train", "-c", "c.yaml", "--load", "less", "--output-dir", "b")
    assert_refused(refused, "made with activation gelu, the model has quick_gelu")
