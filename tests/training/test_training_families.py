"""Fine-tuning the golden folders of the families through the command line."""

import math
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, TINY, Command, assert_refused, make_config
from families import FAMILIES
from safetensors.torch import load_file

import leanclip
from leanclip import CLIP, Preprocess
from leanclip.config.schema import load_config
from leanclip.io.files import read_metrics
from leanclip.training.stored import model_preprocess
from leanclip.weights import read_weights, save_weights
from leanclip.weights.read import stored_architecture

MODERN = PROJECT / "tests/data/modern"
FOLDERS = {  # and their loss
    "hf-siglip": "siglip",
    "hf-siglip2": "siglip",
    "hf-metaclip2": "clip",
    "hf-chinese-clip": "clip",
    "oc-biomed": "clip",
    "oc-xlm-roberta": "clip",
}


def without_model(folder: Path, **sections: object) -> str:
    """A config without an architecture."""
    path = make_config(folder / "no-model.yaml", **sections)
    text = path.read_text()
    start, end = text.index("model:"), text.index("data:")
    path.write_text(text[:start] + text[end:])
    return str(path)


def is_readable(folder: Path) -> bool:
    try:
        leanclip.load(folder)
    except leanclip.WeightsError:
        return False
    return True


def losses(run: str) -> list[float]:
    return [line["train/loss"] for line in read_metrics(Path(run)) if "train/loss" in line]


def weights_of(run: str) -> dict[str, torch.Tensor]:
    return load_file(sorted(Path(run, "checkpoints").glob("step-*"))[-1] / "model.safetensors")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_family_is_fine_tuned_from_its_weights_alone(
    command: Command, workplace: Path, name: str
) -> None:
    """Architecture, mean and std, tokeniser and loss are those of the weights."""
    if not is_readable(MODERN / name):
        pytest.skip("not read yet")
    config = without_model(workplace, evaluate={"retrieval": None})
    load = ["train", "-c", config, "--load", str(MODERN / name)]
    whole = command(*load, "--output-dir", "whole")
    assert whole.returncode == 0, whole.stderr
    assert f"loss {FOLDERS[name]}" in whole.stderr
    assert "was trained with mean" not in whole.stderr
    before, after = leanclip.load(MODERN / name), leanclip.load("whole")
    assert after.model.config == before.model.config
    assert after.preprocess == before.preprocess
    assert after.model.tokenizer == before.model.tokenizer
    state = before.model.state_dict()
    assert all(not torch.equal(t, state[n]) for n, t in weights_of("whole").items() if t.dim() > 1)
    # in other micro-batches the same losses; resumed, the same bits
    command(*load, "-o", "train.micro_batches=3", "--output-dir", "micro")
    assert losses("micro") == pytest.approx(losses("whole"), rel=1e-4)
    command(*load, "-o", "checkpoint.every_steps=1", "--output-dir", "cut")
    newest = sorted(Path("cut/checkpoints").glob("step-*"))[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert "resuming from" in command(*load, "--resume", "--output-dir", "cut").stderr
    assert losses("cut")[-1] == losses("whole")[-1]
    assert all(torch.equal(t, weights_of("whole")[n]) for n, t in weights_of("cut").items())


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("name", ["hf-siglip", "hf-chinese-clip"])
def test_a_locked_tower_of_a_family_runs_once(
    command: Command, workplace: Path, name: str, tower: str
) -> None:
    more = {"data": {"augment": False}, "evaluate": {"retrieval": None}}
    config = without_model(workplace, finetune={f"lock_{tower}": "all"}, **more)
    for run, is_used in (("with", "true"), ("without", "false")):
        words = ("--output-dir", run, "-o", f"finetune.cache_features={is_used}")
        done = command("train", "-c", config, "--load", str(MODERN / name), *words)
        assert done.returncode == 0, done.stderr
    assert Path("with/features", tower).is_dir()
    assert losses("with") == pytest.approx(losses("without"), rel=1e-4)


def test_the_recipe_is_a_siglip_of_the_quickstarts_size() -> None:
    ours = load_config(PROJECT / "configs/siglip-quickstart.yaml")
    clip = load_config(PROJECT / "configs/quickstart.yaml")
    for section in ("data", "train", "optimizer", "evaluate", "finetune"):
        changed = {"initial_logit_bias": None} if section == "train" else {}
        same = getattr(ours, section).model_copy(update=changed)
        assert same == getattr(clip, section), section
    assert ours.train.initial_logit_bias == pytest.approx(-math.log(64), abs=0.01)
    with torch.device("meta"):
        sizes = [CLIP(**one.model.model_dump()).parameter_count() for one in (ours, clip)]
    assert 0.95 < sizes[0] / sizes[1] < 1.05


def test_the_bias_starts_where_it_is_told(command: Command, workplace: Path) -> None:
    make_config(workplace / "config.yaml", model=FAMILIES["siglip"] | {"image_resolution": 32})
    short = ("train", "-c", "config.yaml", "-o", "train.epochs=1", "-o", "evaluate.retrieval=null")
    for run, setting, start in (("a", "null", -10), ("b", "-1.4", -1.4)):
        words = ("-o", f"train.initial_logit_bias={setting}", "--output-dir", run)
        assert command(*short, *words).returncode == 0
        assert weights_of(run)["logit_bias"].item() == pytest.approx(start, abs=0.01)
    told = ("-o", "train.initial_logit_bias=-1.4")
    assert_refused(command(*short, *told, "--load", "a"), "initial_logit_bias", "from scratch")
    plain = (*told, "-o", "model.logit_bias=false")
    assert_refused(command(*short, *plain), "initial_logit_bias", "remove it")


def test_mistakes_with_weights_of_another_family(command: Command, workplace: Path) -> None:
    siglip = str(MODERN / "hf-siglip")
    made_of = ("made with", "a config without the section model takes that of the weights")
    assert_refused(command("train", "-c", "config.yaml", "--load", siglip), *made_of)
    model = CLIP(**TINY)
    torch.save(model.state_dict(), workplace / "bare.pt")
    config = without_model(workplace)
    assert_refused(command("train", "-c", config), "model", "required")
    assert_refused(command("train", "-c", config, "--load", "gone.pt"), "gone.pt")
    arch = FAMILIES["siglip"] | {"image_resolution": 32}
    base = CLIP(**arch)
    (workplace / "base").mkdir()
    save_weights(workplace / "base", base.state_dict(), base.config, Preprocess(32))
    for loss, words in (
        ("clip", ("train.loss: clip", "does not train the bias", "auto")),
        ("multi-positive", ("train.loss: multi-positive", "does not train the bias")),
    ):
        options = ("--load", "base", "-o", f"train.loss={loss}")
        assert_refused(command("train", "-c", config, *options), *words)
    siglip_loss = command("train", "-c", "config.yaml", "-o", "train.loss=siglip")
    assert_refused(siglip_loss, "train.loss: siglip", "set model.logit_bias: true")
    too_many = ("--load", "base", "-o", "finetune.lock_image=9")
    assert_refused(command("train", "-c", config, *too_many), "finetune.lock_image: 9 groups")
    both = ("--load", "base", "-o", "finetune.lock_image=all", "-o", "finetune.lock_text=4")
    assert_refused(command("train", "-c", config, *both), "nothing is left to train")


def test_a_file_of_pe_core_is_fine_tuned_with_its_own_preprocessing(tmp_path: Path) -> None:
    source = str(
        MODERN / "pe-core-pt/model.pt"
    )  # no settings beside it: they follow from its format
    path = without_model(tmp_path)
    config = load_config(path, architecture_of=stored_architecture, load=source)
    assert model_preprocess(config) == read_weights(source).preprocess
    assert model_preprocess(config).mean == (0.5, 0.5, 0.5)
    assert model_preprocess(config).resize == "squash"
