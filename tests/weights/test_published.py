"""Published names: what they stand for, the files that are fetched, and what wrong names suggest.

The hub is a server of this test with the two answers that huggingface_hub needs: the list of a
repository's files, and a file.
"""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY

from leanclip import CLIP
from leanclip.config import published
from leanclip.config.presets import PRESETS
from leanclip.errors import WeightsError
from leanclip.preprocess.images import Preprocess
from leanclip.weights import Weights, hub, read_weights, write_weights

LAION = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"


def tiny(**changes: object) -> Weights:
    model = CLIP(**TINY | changes)
    return Weights(Path("tiny"), "leanclip", model.state_dict(), model.config, Preprocess(32))


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("ViT-B-32::laion2b_s34b_b79k", LAION),
        (LAION, LAION),
        (f"hf-hub:{LAION}", LAION),
        ("CLIP-ViT-B-32-laion2B-s34B-b79K", LAION),
        ("ViT-B-16-SigLIP2::webli", "timm/ViT-B-16-SigLIP2"),
        ("ViT-B-16-SigLIP2", "timm/ViT-B-16-SigLIP2"),
        ("ViT-SO400M-16-SigLIP2-naflex", "google/siglip2-so400m-patch16-naflex"),
        ("ViT-B-16-SigLIP2-naflex::webli", "google/siglip2-base-patch16-naflex"),
        ("siglip2-base-patch16-224", "google/siglip2-base-patch16-224"),
        ("google/siglip2-base-patch16-224", "google/siglip2-base-patch16-224"),
        ("siglip-so400m-patch14-384", "google/siglip-so400m-patch14-384"),
        ("ViT-H-14::metaclip_fullcc", "timm/vit_huge_patch14_clip_224.metaclip_2pt5b"),
        ("ViT-H-14-quickgelu::metaclip_fullcc", "timm/vit_huge_patch14_clip_224.metaclip_2pt5b"),
        ("metaclip-h14-fullcc2.5b", "facebook/metaclip-h14-fullcc2.5b"),
        ("facebook/metaclip-h14-fullcc2.5b", "facebook/metaclip-h14-fullcc2.5b"),
        ("ViT-H-14-378-quickgelu", "apple/DFN5B-CLIP-ViT-H-14-378"),
        ("PE-Core-B-16::meta", "timm/PE-Core-B-16"),
        ("PE-Core-B16-224", "facebook/PE-Core-B16-224"),
        ("metaclip-2-worldwide-b16", "facebook/metaclip-2-worldwide-b16"),
        ("chinese-clip-vit-base-patch16", "OFA-Sys/chinese-clip-vit-base-patch16"),
        (
            "BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
            "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        ),
        ("someone/finetuned-1.5", "someone/finetuned-1.5"),
    ],
)
def test_a_name_stands_for_a_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, repository: str
) -> None:
    asked = []
    monkeypatch.setattr(hub, "_fetch_hub", lambda one, **_: asked.append(one) or tmp_path)
    assert hub.locate(name) == tmp_path
    assert hub.locate_settings(name) == tmp_path
    assert asked == [repository, repository]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ViT-B/32", "ViT-B-32.pt"),
        ("ViT-B-32", "ViT-B-32.pt"),
        ("ViT-B-32::openai", "ViT-B-32.pt"),
        ("ViT-B-32-quickgelu", "ViT-B-32.pt"),
        ("ViT-B-32-quickgelu::openai", "ViT-B-32.pt"),
        ("ViT-L/14@336px", "ViT-L-14-336px.pt"),
        ("ViT-L-14-336", "ViT-L-14-336px.pt"),
        ("RN50x64", "RN50x64.pt"),
    ],
)
def test_a_name_stands_for_a_file_of_openai(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, file: str
) -> None:
    monkeypatch.setattr(hub, "fetch_openai", lambda one: tmp_path / one)
    assert hub.locate(name).name == file
    assert hub.locate_settings(name) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("siglip2-base-patch16-225", "no such file; did you mean siglip2-base-patch16-224?"),
        ("ViT-B-16-SigLIP2::weblii", "did you mean ViT-B-16-SigLIP2::webli?"),
        ("vit-b-32", "did you mean ViT-B-32?"),
        ("ViT-B-32-quickgelu::laion2b_s34b_b79k", "did you mean ViT-B-32::laion2b_s34b_b79k?"),
        ("ViT-H-14", "several published weights; use ViT-H-14::laion2b_s32b_b79k, ViT-H-14::meta"),
        ("convnext_base_w::laion2b_s13b_b82k", "a ConvNeXt, which leanclip does not read"),
        ("EVA02-B-16", "an EVA, which leanclip does not read"),
        ("nothing", "no such file, and no published model (list them: leanclip models)"),
        ("weights.pt", "weights.pt: no such file"),
    ],
)
def test_a_wrong_name_is_refused_with_the_nearest(name: str, words: str) -> None:
    with pytest.raises(WeightsError) as caught:
        read_weights(name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_weights(tiny(), tmp_path / "ViT-B-32", "leanclip")
    monkeypatch.chdir(tmp_path)
    assert read_weights("ViT-B-32").format == "leanclip"


def test_every_name_stands_for_one_model() -> None:
    names = published.names()
    assert len(names) == len(set(names)) > 400
    for one in published.published():
        assert published.find(one.name) == [one]
        assert not one.repository or published.find(one.repository.split("/")[1])


def test_presets_are_architectures_of_open_clip() -> None:
    known = {one.architecture for one in published.published()}
    assert {name.removesuffix("-quickgelu") for name in PRESETS} <= known


# --- the files of a repository

TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize(
    ("listed", "wanted"),
    [
        (  # LAION's: open_clip's form, transformers' form, and both as pickles
            [
                "open_clip_config.json",
                "open_clip_model.safetensors",
                "open_clip_pytorch_model.bin",
                "config.json",
                "preprocessor_config.json",
                "model.safetensors",
                "pytorch_model.bin",
                "README.md",
                "onnx/model.onnx",
                "sub/spiece.model",
                *TOKENIZER,
            ],
            [
                "open_clip_config.json",
                "config.json",
                "preprocessor_config.json",
                "open_clip_model.safetensors",
                *TOKENIZER,
            ],
        ),
        (  # timm's: model.safetensors is an image tower
            [
                "open_clip_config.json",
                "open_clip_pytorch_model.bin",
                "config.json",
                "model.safetensors",
            ],
            ["open_clip_config.json", "config.json", "open_clip_pytorch_model.bin"],
        ),
        (  # transformers' tensors before open_clip's pickle
            [
                "open_clip_config.json",
                "open_clip_pytorch_model.bin",
                "config.json",
                "preprocessor_config.json",
                "model.safetensors",
            ],
            ["config.json", "preprocessor_config.json", "model.safetensors"],
        ),
        (
            ["open_clip_config.json", "open_clip_pytorch_model.safetensors", "pytorch_model.bin"],
            ["open_clip_config.json", "open_clip_pytorch_model.safetensors"],
        ),
        (  # BiomedCLIP's
            [
                "open_clip_config.json",
                "open_clip_pytorch_model.bin",
                "config.json",
                "pytorch_model.bin",
                "modeling_biomed_clip.py",
                "vocab.txt",
            ],
            ["open_clip_config.json", "config.json", "vocab.txt", "open_clip_pytorch_model.bin"],
        ),
        (  # Google's
            ["config.json", "model.safetensors", "spiece.model", "flax_model.msgpack"],
            ["config.json", "spiece.model", "model.safetensors"],
        ),
        (
            [
                "config.json",
                "model.safetensors.index.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "pytorch_model.bin",
                "model.fp16.safetensors",
            ],
            [
                "config.json",
                "model.safetensors.index.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
            ],
        ),
        (["config.json", "pytorch_model.bin"], ["config.json", "pytorch_model.bin"]),
        (["longclip-B.pt", "README.md"], ["longclip-B.pt"]),
        (
            ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"],
            ["adapter_config.json", "adapter_model.safetensors"],
        ),
        (  # an adapter beside its base model
            ["adapter_config.json", "adapter_model.bin", "config.json", "model.safetensors"],
            ["adapter_config.json", "adapter_model.bin", "config.json", "model.safetensors"],
        ),
        (["one.pt", "another.pt"], []),
    ],
)
def test_files_of_one_form_are_fetched(listed: list[str], wanted: list[str]) -> None:
    assert sorted(hub.wanted_files(listed)) == sorted(wanted)
    settings = [name for name in wanted if name.endswith((".json", ".txt", ".model"))]
    settings = [name for name in settings if "index" not in name]
    assert sorted(hub.wanted_files(listed, weights=False)) == sorted(settings)


class Hub(http.server.ThreadingHTTPServer):
    """A hub with repositories in a folder; it records the files that it sent."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sent: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_HEAD(self) -> None:
        self.answer(is_head=True)

    def do_GET(self) -> None:
        self.answer(is_head=False)

    def answer(self, *, is_head: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/"):
            owner, name = path.removeprefix("/api/models/").split("/")[:2]
            folder = self.server.folder / owner / name
            if not folder.is_dir():
                self.send_error(404)
                return
            if "/tree/" in path:
                tree = [
                    {"type": "file", "path": file.name, "oid": "0", "size": file.stat().st_size}
                    for file in folder.iterdir()
                ]
                self.send(json.dumps(tree).encode(), is_head)
                return
            files = [{"rfilename": file.name} for file in folder.iterdir()]
            facts = {"id": f"{owner}/{name}", "modelId": name, "sha": "0" * 40, "tags": []}
            self.send(json.dumps(facts | {"siblings": files}).encode(), is_head)
            return
        owner, name, _, _, file = path.strip("/").split("/")
        content = (self.server.folder / owner / name / file).read_bytes()
        if not is_head:
            self.server.sent.append(file)
        self.send(content, is_head)

    def send(self, content: bytes, is_head: bool) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not is_head:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def load_from(server: Hub, tmp_path: Path, *names: str, **more: str) -> list[str]:
    """What a process of its own reads: the format of each name, or the error."""
    code = (
        "import sys\n"
        "from leanclip.errors import WeightsError\n"
        "from leanclip.weights import read_preprocess, read_weights\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        read_preprocess(name)\n"
        "        print(read_weights(name).format)\n"
        "    except WeightsError as error:\n"
        "        print(error)\n"
    )
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        env=environment | more, capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_one_form_is_fetched_from_a_hub_once(server: Hub, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    both = tmp_path / "hub" / LAION
    write_weights(tiny(), both, "open_clip")
    write_weights(tiny(), tmp_path / "hf", "hf")
    for file in (tmp_path / "hf").iterdir():
        file.rename(both / file.name)
    (both / "open_clip_pytorch_model.bin").write_bytes(b"the same, as a pickle")
    (both / "pytorch_model.bin").write_bytes(b"the same, as a pickle")
    bare = tmp_path / "hub" / "BeichenZhang" / "LongCLIP-B"
    wide = {"vision_width": 64, "vision_heads": 1, "transformer_width": 64, "transformer_heads": 1}
    write_weights(tiny(**wide, activation="quick_gelu"), bare / "longclip-B.pt", "openai")

    (tmp_path / "hub" / "someone" / "words").mkdir(parents=True)
    (tmp_path / "hub" / "someone" / "words" / "README.md").write_text("no weights")
    names = ("ViT-B-32::laion2b_s34b_b79k", "LongCLIP-B", "someone/absent", LAION.lower())
    names += ("someone/words",)
    found = load_from(server, tmp_path, *names)
    assert found[:2] == ["open_clip", "openai"]
    assert "someone/absent: no such file, and the hub failed" in found[2]
    assert f"did you mean {LAION}" in found[3]
    assert found[4] == "someone/words: has no weights of a known form"
    weights = [file for file in server.sent if file.endswith((".safetensors", ".bin", ".pt"))]
    assert weights == ["open_clip_model.safetensors", "longclip-B.pt"]
    assert len(server.sent) == len(set(server.sent))
    # The cache serves without the hub.
    assert load_from(server, tmp_path, *names[:2], HF_HUB_OFFLINE="1") == found[:2]
