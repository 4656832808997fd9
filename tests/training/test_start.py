"""What a run starts from is the same on every rank, and it is what the command asked for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import (
    TINY,
    Command,
    assert_refused,
    fork_ranks,
    make_config,
    make_model,
    make_pairs,
    ranks_of,
    weights_hash,
)
from safetensors.torch import load_file, save_file

from leanclip import CLIP, Preprocess
from leanclip.config.schema import load_config
from leanclip.config.sections import to_plain
from leanclip.config.strict_yaml import dump_yaml
from leanclip.errors import LeanclipError
from leanclip.io.files import read_metrics
from leanclip.training import checkpoint
from leanclip.training.optimizer import build_optimizer
from leanclip.training.plan import make_plan
from leanclip.training.start import check_same_plan, choose_checkpoint, read_on_all_ranks
from leanclip.weights import fingerprint, read_weights

OPTIONS = (
    "train", "-c", "config.yaml", "-o", "train.epochs=3", "-o", "evaluate.retrieval=null",
    "-o", "checkpoint.every_steps=2",
)  # fmt: skip
OF_TWO = (*OPTIONS, "-o", "train.batch_size=2")
STEPS = [f"step-{step:08d}" for step in (8, 9)]  # of two that are kept


@pytest.fixture
def run(workplace: Path) -> Path:
    """A run `a` that is done, with checkpoints of steps 8 and 9."""
    folder = workplace / "a"
    config = load_config("config.yaml", ["train.epochs=3", "train.precision=fp32"])
    model = CLIP(**TINY)
    optimizer = build_optimizer(model, config.optimizer)
    # As of weights that were loaded once: a rank without the checkpoint has it from the first one.
    preprocess = Preprocess(32, resize="squash", interpolation="bilinear")
    for step, place in ((8, (2, 8)), (9, (3, 0))):
        done = checkpoint.Progress(step, *place, 4 * step, [], 1.0, 12, 4, run="this")
        checkpoint.save(
            folder / "checkpoints", done, model, optimizer, preprocess, keep=2
        )  # fmt: skip
        torch.nn.init.ones_(model.get_parameter("text_projection"))
    (folder / "config.yaml").write_text(dump_yaml(to_plain(config)))
    return folder


def errors_of(workplace: Path, *own: tuple[str, ...]) -> list[str]:
    """What two ranks find wrong before they begin, each with its own settings."""

    def work(rank: int) -> str:
        try:
            config = load_config("config.yaml", ["train.epochs=3", *own[rank]])
            plan = make_plan(config, torch.device("cpu"))
            check_same_plan(plan)
            choose_checkpoint(plan, False)
        except LeanclipError as error:
            return str(error)
        return ""

    return ranks_of(2, work, workplace)


def without_newest(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / STEPS[1])


def without_any(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def damaged(run: Path) -> None:
    (run / "checkpoints" / STEPS[1] / "model.safetensors").write_bytes(b"")


def changed(run: Path) -> None:
    """A checkpoint of the same name that is whole, and another."""
    folder = run / "checkpoints" / STEPS[1]
    shutil.rmtree(folder)
    shutil.copytree(run / "checkpoints" / STEPS[0], folder)


def of_another_run(run: Path) -> None:
    """An older checkpoint, which the first rank has not, of another run."""
    without_newest(run)
    folder = (run / "checkpoints" / STEPS[0]).rename(run / "checkpoints/step-00000005")
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"run": "that"}))
    (folder / "manifest.json").unlink()
    checkpoint._write_manifest(folder, {})


def older(run: Path) -> None:
    """An older checkpoint of the run, which the first rank has not any more."""
    without_newest(run)
    (run / "checkpoints" / STEPS[0]).rename(run / "checkpoints/step-00000005")


@pytest.mark.parametrize(
    ("first", "second", "seen"),
    [
        (None, None, None),
        (None, without_newest, None),
        (None, without_any, None),
        (None, damaged, None),
        (damaged, damaged, None),
        (damaged, without_newest, None),
        (without_newest, None, (STEPS[1], STEPS[0])),
        (without_any, None, (STEPS[1], "no checkpoint")),
        (without_any, damaged, (STEPS[0], "no checkpoint")),
        (damaged, None, (STEPS[1], STEPS[0])),
        (None, changed, (STEPS[1], STEPS[1])),
        (changed, None, (STEPS[1], STEPS[1])),
        (None, older, None),
        (None, of_another_run, ("step-00000005", STEPS[1])),
    ],
)
def test_another_rank_may_see_less_but_nothing_else(
    run: Path,
    workplace: Path,
    first: Callable[[Path], None] | None,
    second: Callable[[Path], None] | None,
    seen: tuple[str, str] | None,
) -> None:
    shutil.copytree(run, workplace / "b")
    for change, folder in ((first, run), (second, workplace / "b")):
        if change is not None:
            change(folder)
    options = ("train.batch_size=2", "evaluate.retrieval=null")
    found = errors_of(workplace, (*options, "output_dir=a"), (*options, "output_dir=b"))
    if seen is None:
        assert found == ["", ""]
        return
    assert found[0] == found[1]
    before, after = found[0].split(", where rank 0 sees ")
    assert before.startswith("rank 1 sees b/checkpoints/step-")
    assert seen[0] in before
    assert seen[1] in after
    if seen[0] == seen[1]:
        assert before[-13:-1] != after.partition("digest ")[2][:12]


@pytest.mark.parametrize("ema_decay", ["0.9", "null"])
def test_ranks_on_two_disks_go_on_from_the_first_ones_checkpoint(
    ema_decay: str, workplace: Path
) -> None:
    """Moments, the weights' mean and random states too: the bits of a run in one folder."""
    more = f"finetune.ema_decay={ema_decay}"
    options = (*OF_TWO, "-o", more, "-o", "finetune.patch_dropout=0.3")
    ranks = fork_ranks(2, *options, "--output-dir", "whole", folder=workplace)
    assert [rank.code() for rank in ranks] == [0, 0]
    shutil.copytree("whole", "a")
    without_newest(workplace / "a")
    own = [("--output-dir", name) for name in "ab"]
    ranks = fork_ranks(2, *options, folder=workplace, own=own)
    assert [rank.code() for rank in ranks] == [0, 0]
    assert "resuming from a/checkpoints/step-00000008, step 8 of 9" in ranks[0].output()
    assert weights_hash(workplace / "a") == weights_hash(workplace / "whole")
    state = (
        Path(name) / "checkpoints/step-00000009/training.safetensors" for name in ("a", "whole")
    )
    assert len({path.read_bytes() for path in state}) == 1


def test_ranks_that_see_two_runs_all_end_and_say_so(run: Path, workplace: Path) -> None:
    shutil.copytree(run, "b")
    without_newest(run)
    own = [("--output-dir", name) for name in "ab"]
    ranks = fork_ranks(2, *OF_TWO, folder=workplace, own=own)
    assert [rank.code() for rank in ranks] == [2, 2]
    for rank in ranks:
        assert "error: rank 1 sees b/checkpoints/step-00000009 (step 9, digest" in rank.output()
    assert len(list((run / "checkpoints").glob("step-*"))) == 1


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (["seed=1"], "seed: 1 there, 0 here"),
        (["train.precision=bf16"], "train.precision: bf16 there, fp32 here"),
        (["data.root=less"], "samples of data: 11 there, 12 here"),
        (["train.epochs=2"], "train.epochs: 2 there, 3 here; steps: 2 there, 3 here"),
        (["evaluate.retrieval.root=less"], "samples of evaluate.retrieval: 11 there, 12 here"),
        (["data.workers=1", "output_dir=elsewhere", "train.report_to=null"], ""),
    ],
)
def test_plans_are_compared(workplace: Path, own: list[str], words: str) -> None:
    make_pairs(workplace / "less", 11)
    found = errors_of(workplace, (), tuple(own))
    assert found[0] == found[1]
    assert words in found[0]
    assert found[0].startswith("rank 1 (there) differs from rank 0 (here): " if words else "")
    assert bool(words) == bool(found[0])


def test_classes_are_compared(workplace: Path) -> None:
    for root, names in (("x", ("ant", "bee")), ("y", ("ant", "cow"))):
        for name in names:
            (workplace / root / name).mkdir(parents=True)
            shutil.copy("data/000.png", workplace / root / name)
    folder = ("data.format=folder", "evaluate.retrieval=null")
    found = errors_of(workplace, (*folder, "data.root=x"), (*folder, "data.root=y"))
    assert "classes of data" in found[0]


@pytest.mark.parametrize(
    ("second", "words"),
    [("same", ""), ("other", "rank 1 has other weights"), ("none", "rank 1: none: no such file")],
)
def test_loaded_weights_are_compared(workplace: Path, second: str, words: str) -> None:
    make_model(workplace / "first")
    shutil.copytree("first", "same")
    make_model(workplace / "other", vision_width=64)

    def work(rank: int) -> str:
        try:
            read_on_all_ranks(second if rank else "first")
        except LeanclipError as error:
            return str(error)
        return ""

    found = ranks_of(2, work, workplace)
    assert found[0] == found[1]
    assert words in found[0]
    assert bool(words) == bool(found[0])


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ((("--load", "first"), ("--load", "other")), "rank 1 has other weights in other (SHA-256"),
        ((("--load", "first"), ()), "weights with --load: False there, True here"),
    ],
)
def test_ranks_of_other_weights_all_end_and_say_so(
    workplace: Path, own: tuple[tuple[str, ...], ...], words: str
) -> None:
    make_model(workplace / "first")
    make_model(workplace / "other")
    weights = load_file(workplace / "other/model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, workplace / "other/model.safetensors")
    ranks = fork_ranks(2, *OF_TWO, "--output-dir", "run", folder=workplace, own=own)
    assert [rank.code() for rank in ranks] == [2, 2]
    for rank in ranks:
        assert words in rank.output().splitlines()[-1]


def test_features_of_a_locked_tower_are_the_first_ranks(workplace: Path) -> None:
    """A rank that has the features of an earlier run in its own folder does not take them."""
    make_model(workplace / "base")
    locked = (*OPTIONS, "--load", "base", "-o", "finetune.lock_text=all")
    (alone,) = fork_ranks(1, *locked, "-o", "seed=4", "--output-dir", "b", folder=workplace)
    assert alone.code() == 0
    shutil.rmtree("b/checkpoints")
    (workplace / "b/features/text/_index.json").write_text("{}")  # of other weights, say
    own = [("--output-dir", name) for name in "ab"]
    more = ("-o", "train.batch_size=2")
    ranks = fork_ranks(2, *locked, *more, folder=workplace, own=own)
    assert [rank.code() for rank in ranks] == [2, 2]
    for rank in ranks:
        assert "/features/text: rank 1 does not see what rank 0 wrote" in rank.output()


def test_shards_want_one_folder(workplace: Path) -> None:
    own = [("--output-dir", name) for name in "ab"]
    ranks = fork_ranks(2, *OF_TWO, "-o", "train.sharding=fsdp", folder=workplace, own=own)
    assert [rank.code() for rank in ranks] == [2, 2]
    for rank in ranks:
        assert "rank 1 does not see a/" in rank.output()
        assert "train.sharding fsdp needs an output folder that all ranks share" in rank.output()
    assert not list(workplace.glob("[ab]/.*"))


# --- weights to start from


def status_of(run: str) -> dict[str, object]:
    return json.loads(Path(run, "status.json").read_text())


def metrics_of(run: str) -> dict[str, float]:
    return json.loads(Path(run, "report.json").read_text())["metrics"]


def test_passls_two_steps_are_two_runs(command: Command, workplace: Path) -> None:
    """Train, then train from a .pdparams with the same config; each again is that run again."""
    arch = {"vision_heads": None, "vision_width": 64, "transformer_width": 64}
    make_model(workplace / "base", **arch, transformer_heads=1)
    assert command("convert", "base", "ViT-B-32.pdparams", "--to", "passl").returncode == 0
    make_config(workplace / "config.yaml", model=arch | {"transformer_heads": 1})
    first = ("train", "-c", "config.yaml")
    second = (*first, "--load", "ViT-B-32.pdparams")
    loaded = []
    for words, folder in ((first, "runs/config"), (second, "runs/config-ViT-B-32")):
        done = command(*words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Trained for")
        assert f"Folder:   {folder}\n" in done.stdout
        assert read_metrics(Path(folder))[-1]["step"] == 6
        before, metrics = weights_hash(Path(folder)), metrics_of(folder)
        again = command(*words)
        assert again.returncode == 0, again.stderr
        assert again.stdout.startswith(f"{folder}: already finished, at step 6 ")
        assert again.stdout.split("\n", 1)[1] == done.stdout.split("\n", 1)[1]  # the same metrics
        assert (weights_hash(Path(folder)), metrics_of(folder)) == (before, metrics)
        progress = checkpoint.last_progress(Path(folder, "checkpoints"))
        loaded.append(progress.loaded if progress else None)
    assert loaded == ["", fingerprint(read_weights("ViT-B-32.pdparams").tensors)]


def test_another_load_is_refused_and_the_same_goes_on(command: Command, workplace: Path) -> None:
    make_model(workplace / "a")
    shutil.copytree("a", "copy")
    make_model(workplace / "b")
    other = workplace / "b/model.safetensors"
    weights = {name: tensor + 1 for name, tensor in load_file(other).items()}
    save_file(weights, other)
    start = (*OPTIONS, "-o", "train.report_to=null", "--output-dir")
    assert command(*start, "scratch").returncode == 0
    assert command(*start, "loaded", "--load", "a").returncode == 0
    shutil.copytree("loaded", "whole")
    for run, load, began in (
        ("scratch", "a", "began from scratch"),
        ("loaded", "b/model.safetensors", "began with other weights (a)"),
        ("loaded", "nowhere.pt", "nowhere.pt: no such file"),
    ):
        assert_refused(command(*start, run, "--load", load), load, began)
    assert "choose another --output-dir" in command(*start, "scratch", "--load", "a").stderr
    assert status_of("scratch")["state"] == "done"  # refused: the run is as it was
    for words in (("--load", "a"), ("--load", "copy"), ("--resume",), ()):  # not finished
        without_newest(workplace / "loaded")
        done = command(*start, "loaded", *words)
        assert done.returncode == 0, done.stderr
        assert "resuming from loaded/checkpoints/step-00000008, step 8 of 9" in done.stderr
        assert weights_hash(workplace / "loaded") == weights_hash(workplace / "whole")
    command(*start, "loaded", "--load", "a")  # `copy` is what its settings name now
    shutil.rmtree("a")
    done = command(*start, "loaded", "--load", "a")  # what it began with is not needed any more
    assert done.returncode == 0, done.stderr
    assert "--load cannot be compared" in done.stderr
    shutil.copytree("b", "a")
    (workplace / "a/config.json").write_text((workplace / "copy/config.json").read_text())
    save_file(weights, workplace / "a/model.safetensors")
    assert_refused(command(*start, "loaded", "--load", "a"), "began with other weights")
    assert command("train", "--resume", "loaded").returncode == 0


@pytest.mark.parametrize(
    ("load", "name"),
    [
        ("ViT-B-32.pdparams", "ViT-B-32"),
        ("weights/some.model.v2.pt", "some.model.v2"),
        ("ViT-L/14@336px", "ViT-L-14@336px"),
        ("RN50x4", "RN50x4"),
        ("ViT-B-16-SigLIP2::webli", "ViT-B-16-SigLIP2-webli"),
        ("hf-hub:owner/some-clip", "some-clip"),
        ("runs/quickstart/", "quickstart"),
        ("runs/big/checkpoints/step-00000600", "big-step-00000600"),
        ("runs/big/checkpoints/step-00000600/model.safetensors", "big-step-00000600"),
        ("..", "weights"),
    ],
)
def test_the_default_folder_has_the_weights_name(workplace: Path, load: str, name: str) -> None:
    assert load_config("config.yaml", load=load).output_dir == f"runs/config-{name}"
    assert load_config("config.yaml", [f"load={load}"]).output_dir == f"runs/config-{name}"
    assert load_config("config.yaml", load=load, output_dir="x").output_dir == "x"
    path = make_config(workplace / "own.yaml", load=load)
    assert load_config(path).output_dir == "runs/own"
