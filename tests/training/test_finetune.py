"""Fine-tuning: what stays locked, how fast the rest goes, and the weights that are written."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, TINY, assert_refused, ranks_of
from families import FAMILIES
from safetensors.torch import load_file

import leanclip
from leanclip import CLIP, ConfigError, Preprocess
from leanclip.config.schema import load_config
from leanclip.config.sections import to_plain
from leanclip.config.training import FinetuneConfig, OptimizerConfig, TrainConfig
from leanclip.data.batch import Batch
from leanclip.distributed.wrap_model import wrap_ddp
from leanclip.evaluation import evaluate
from leanclip.io.files import read_metrics
from leanclip.model.lora import ADAPTED
from leanclip.preprocess.tokenizer import tokenize
from leanclip.training import checkpoint
from leanclip.training.finetune import Tuning, group_of
from leanclip.training.optimizer import build_optimizer
from leanclip.training.plan import make_plan, memory_estimate
from leanclip.training.step import train_step
from leanclip.weights import save_weights

BIOMED, COCA = FAMILIES["biomed"], FAMILIES["coca"]
SIGLIP = FAMILIES["siglip"] | {"image_resolution": 32, "logit_bias": False}
Command = Callable[..., subprocess.CompletedProcess[str]]
RESNET = TINY | {
    "vision_layers": [1, 2, 1, 1], "vision_width": 4, "vision_patch_size": None,
}  # fmt: skip


def batch_of(rows: slice = slice(None), n: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(8)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tokens = tokenize([f"number {i}" for i in range(n)], 24)
    return Batch(images[rows], tokens[rows], torch.arange(n)[rows], torch.full((n,), -1)[rows])


def tuned(arch: dict[str, Any] = TINY, **settings: Any) -> tuple[CLIP, Tuning, Any]:
    torch.manual_seed(3)
    model = CLIP(**arch)
    tuning = Tuning(model, FinetuneConfig(**settings))
    return model, tuning, build_optimizer(model, OptimizerConfig(), tuning.factors)


def step(model: CLIP, optimizer: Any, rate: float = 1e-3, **settings: Any) -> Any:
    return train_step(
        model, optimizer, batch_of(), Preprocess(32), rate=rate, settings=TrainConfig(**settings)
    )


def state_of(model: CLIP) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: CLIP, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}


def gradients_of(model: CLIP) -> dict[str, torch.Tensor]:
    """The gradients of the steps to come, by name; the last ones stay."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: found.update({name: p.grad.clone()})
            )
    return found


def is_locked(name: str, settings: dict[str, Any]) -> bool:
    group = group_of(name, CLIP(**TINY).config)
    count = settings.get(f"lock_{group.tower}", 0) if group else 0
    return group is not None and (count == "all" or group.level < count)


def write_base(folder: Path) -> None:
    """Weights to start from."""
    folder.mkdir()
    torch.manual_seed(11)
    model = CLIP(**TINY)
    save_weights(folder, model.state_dict(), model.config, Preprocess(32))


def weights_of(run: Path, name: str = "model") -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return load_file(newest / f"{name}.safetensors")


# --- groups


def test_groups_of_a_vit_and_of_the_text_tower() -> None:
    model = CLIP(**TINY)
    places = {name: group_of(name, model.config) for name, _ in model.named_parameters()}
    assert places.pop("logit_scale") is None
    assert places["visual.conv1.weight"] == ("image", 0, 3)
    assert places["visual.ln_pre.weight"] == ("image", 0, 3)
    assert places["visual.transformer.resblocks.1.mlp.c_fc.bias"] == ("image", 2, 3)
    assert places["visual.ln_post.bias"] == places["visual.proj"] == ("image", 3, 3)
    assert places["token_embedding.weight"] == places["positional_embedding"] == ("text", 0, 3)
    assert places["transformer.resblocks.0.ln_1.weight"] == ("text", 1, 3)
    assert places["text_projection"] == places["ln_final.weight"] == ("text", 3, 3)
    assert None not in places.values()


@pytest.mark.parametrize(
    ("family", "name", "group"),
    [
        ("siglip", "visual.conv1.bias", ("image", 0, 3)),
        ("siglip", "visual.attn_pool.probe", ("image", 3, 3)),
        ("siglip", "visual.attn_pool.mlp.c_fc.weight", ("image", 3, 3)),
        ("siglip", "text_projection_bias", ("text", 3, 3)),
        ("siglip", "logit_bias", None),
        ("coca", "visual.attn_pool.attn.q_proj_weight", ("image", 3, 3)),
        ("coca", "visual.transformer.resblocks.1.ls_2.gamma", ("image", 2, 3)),
        ("coca", "cls_emb", ("text", 0, 3)),
        ("biomed", "visual.proj_bias", ("image", 3, 3)),
        ("biomed", "token_type_embedding", ("text", 0, 3)),
        ("biomed", "ln_embedding.weight", ("text", 0, 3)),
        ("biomed", "transformer.resblocks.1.ln_2.weight", ("text", 2, 3)),
        ("biomed", "pooler.bias", ("text", 3, 3)),
        ("biomed", "text_projection_hidden", ("text", 3, 3)),
    ],
)
def test_groups_of_the_families(family: str, name: str, group: tuple | None) -> None:
    model = CLIP(**FAMILIES[family])
    assert name in dict(model.named_parameters())
    assert group_of(name, model.config) == group


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wholly_locked_tower_has_the_groups_that_are_counted(family: str) -> None:
    """Locking all groups by number is locking all."""
    for tower in ("image", "text"):
        for count in ("all", 4):
            model, _, _ = tuned(FAMILIES[family], **{f"lock_{tower}": count})
            for name, parameter in model.named_parameters():
                is_locked = not name.startswith("logit_")
                is_locked &= name.startswith("visual.") == (tower == "image")
                assert parameter.requires_grad != is_locked, name


@pytest.mark.parametrize("family", FAMILIES)
def test_fine_tuning_a_family_trains_what_is_not_locked(family: str) -> None:
    arch = FAMILIES[family] | {"image_resolution": 32}
    model, tuning, optimizer = tuned(
        arch, lock_image=2, lock_text=1, layer_decay=0.5, ema_decay=0.5, patch_dropout=0.5
    )
    before = state_of(model)
    kind = "siglip" if arch.get("logit_bias") else "clip"
    for _ in range(2):
        result = train_step(
            model, optimizer, batch_of(), Preprocess(32), rate=1e-3, kind=kind,
            settings=TrainConfig(micro_batches=2),
        )  # fmt: skip
        tuning.after_step(result.is_finite)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed(model, before) == trained
    assert tuning.factors["visual.ln_post.weight"] == 1.0
    assert tuning.factors["visual.transformer.resblocks.1.ln_1.weight"] == 0.5
    with tuning.averaged():
        assert changed(model, before) == trained


def test_groups_of_a_resnet() -> None:
    config = CLIP(**RESNET).config
    for name, place in {
        "conv1.weight": 0,
        "bn3.bias": 0,
        "layer1.0.bn1.weight": 1,
        "layer2.0.conv1.weight": 2,
        "layer2.1.conv1.weight": 3,
        "layer4.0.downsample.0.weight": 5,
        "attnpool.c_proj.bias": 6,
    }.items():
        assert group_of(f"visual.{name}", config) == ("image", place, 6), name


# --- locks


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [{"lock_image": "all"}, {"lock_text": "all"}, {"lock_image": 2, "lock_text": 1}],
)
def test_locked_groups_stay_and_the_rest_is_trained_as_ever(
    settings: dict[str, Any], micro_batches: int
) -> None:
    after = []
    for chosen in ({}, settings):
        model, _, optimizer = tuned(**chosen)
        before, gradients = state_of(model), gradients_of(model)
        step(model, optimizer, micro_batches=micro_batches)
        after.append((changed(model, before), gradients))
    wanted = {name for name in after[0][0] if not is_locked(name, settings)}
    assert wanted < after[0][0]
    assert after[1][0] == wanted
    assert after[1][1].keys() == wanted
    for name in wanted:
        torch.testing.assert_close(after[1][1][name], after[0][1][name])


def test_locked_batchnorms_keep_their_statistics_through_an_evaluation() -> None:
    model, _, optimizer = tuned(RESNET, lock_image=3)
    norms = {name: m for name, m in model.named_modules() if hasattr(m, "running_mean")}
    locked = {name: not next(m.parameters()).requires_grad for name, m in norms.items()}
    assert 0 < sum(locked.values()) < len(locked)
    assert {name: not m.training for name, m in norms.items()} == locked
    evaluate(model, [], Preprocess(32))
    before = state_of(model)
    step(model, optimizer)
    moved = {n.removesuffix(".running_mean") for n in changed(model, before) if "running_mean" in n}
    assert moved == {name for name, is_locked in locked.items() if not is_locked}


def test_locks_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"finetune\.lock_text: 9 groups, but the text tower has"):
        tuned(lock_text=9)
    with pytest.raises(ConfigError, match="nothing is left to train"):
        tuned(lock_text="all", lock_image=4)
    with pytest.raises(ConfigError, match=r"finetune\.patch_dropout: a ResNet has no patches"):
        tuned(RESNET, patch_dropout=0.5)


def test_ranks_agree_with_one_process_when_a_tower_is_locked(tmp_path: Path) -> None:
    def work(world_size: int, rank: int) -> dict[str, Any]:
        model, _, optimizer = tuned(lock_image="all", lock_text=1)
        rows = slice(rank, None, world_size)
        for _ in range(2):
            train_step(
                model, optimizer, batch_of(rows), Preprocess(32), rate=1e-3,
                towers=wrap_ddp(model), settings=TrainConfig(micro_batches=2),
            )  # fmt: skip
        return {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    (alone,) = ranks_of(1, lambda rank: work(1, rank), tmp_path)
    for one in ranks_of(2, lambda rank: work(2, rank), tmp_path):
        for name, expected in alone.items():
            torch.testing.assert_close(
                torch.from_numpy(one[name]), torch.from_numpy(expected), rtol=1e-3, atol=1e-4
            )


# --- rates


def test_rates_fall_from_the_top_of_each_tower_and_new_parameters_have_their_own() -> None:
    torch.manual_seed(3)
    model = CLIP(**TINY)
    settings = FinetuneConfig(layer_decay=0.5, new_learning_rate_factor=10.0)
    tuning = Tuning(model, settings, new=["visual.proj", "visual.conv1.weight"])
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.0), tuning.factors)
    step(model, optimizer, rate=1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: rates[id(p)] for name, p in model.named_parameters()}
    for name, factor in {
        "logit_scale": 1, "text_projection": 1, "visual.proj": 10, "visual.ln_post.weight": 1,
        "transformer.resblocks.1.ln_1.bias": 0.5, "transformer.resblocks.0.ln_1.bias": 0.25,
        "visual.transformer.resblocks.0.attn.in_proj_weight": 0.25,
        "token_embedding.weight": 0.125, "visual.conv1.weight": 1.25,
        "visual.class_embedding": 0.125,
    }.items():  # fmt: skip
        assert by_name[name] == pytest.approx(1e-3 * factor), name


def test_partial_weights_say_what_is_new(command: Command, workplace: Path) -> None:
    write_base(workplace / "a")
    options = ["train", "-c", "config.yaml", "--load", "a", "--partial", "--output-dir", "b",
               "-o", "model.transformer_layers=3", "-o", "finetune.new_learning_rate_factor=3",
               "-o", "checkpoint.every_steps=1"]  # fmt: skip
    assert command(*options).returncode == 0
    newest = sorted((workplace / "b/checkpoints").glob("step-*"))[-1]
    new = checkpoint.progress_of(newest).new
    assert len(new) == 12
    assert all(name.startswith("transformer.resblocks.2.") for name in new)
    assert "resuming from" in command(*options).stderr  # the new ones are known without the load


# --- patch dropout


def test_dropped_patches_are_the_same_in_both_passes_and_come_back_to_evaluate() -> None:
    results = []
    for micro_batches in (1, 4, 4):
        model, _, optimizer = tuned(patch_dropout=0.5)
        lengths: list[int] = []
        model.get_submodule("visual.ln_pre").register_forward_hook(
            lambda _, args, __, lengths=lengths: lengths.append(args[0].shape[1])
        )
        torch.manual_seed(5)
        result = step(model, optimizer, micro_batches=micro_batches)
        assert result.is_finite
        assert set(lengths) == {1 + 8}  # of 16 patches
        results.append((result.gradient_norm, state_of(model)))
    assert torch.equal(results[1][0], results[2][0])
    assert all(torch.equal(t, results[2][1][name]) for name, t in results[1][1].items())
    model.eval()
    whole = CLIP(**TINY).eval()
    whole.load_state_dict(model.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.encode_image(pixels), whole.encode_image(pixels))


def test_dropped_patches_gradient_is_that_of_one_draw() -> None:
    """GradCache draws the same patches when it computes the features again."""
    model, _, optimizer = tuned(patch_dropout=0.5)
    seen = []
    model.visual.register_forward_hook(lambda _, __, out: seen.append(out.detach().clone()))
    step(model, optimizer, micro_batches=3)
    for first, again in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(first, again)
    assert not torch.equal(seen[0], model.visual(torch.randn(2, 3, 32, 32)))


# --- the mean of the weights


def test_the_mean_follows_its_formula_and_leaves_out_steps_that_do_not_count() -> None:
    model, tuning, optimizer = tuned(ema_decay=0.75, lock_text="all")
    expected = state_of(model)
    for _ in range(3):
        result = step(model, optimizer)
        tuning.after_step(result.is_finite)
        for name, tensor in model.state_dict().items():
            expected[name] = 0.75 * expected[name] + 0.25 * tensor
    raw = state_of(model)
    tuning.after_step(torch.tensor(False))
    written = tuning.weights()
    for name, tensor in expected.items():
        torch.testing.assert_close(written[name], tensor, msg=name)
    assert not torch.equal(written["visual.proj"], raw["visual.proj"])
    assert changed(model, raw) == set()
    with tuning.averaged():
        assert torch.equal(model.get_parameter("visual.proj"), written["visual.proj"])


FINETUNINGS = {
    "ema": ["-o", "finetune.ema_decay=0.8"],
    "lora": ["-o", "finetune.lora_rank=2", "-o", "finetune.lora_alpha=8"],
    "lora+ema": ["-o", "finetune.lora_rank=2", "-o", "finetune.ema_decay=0.8"],
    "others": ["-o", "finetune.lock_image=2", "-o", "finetune.layer_decay=0.7",
               "-o", "finetune.patch_dropout=0.5", "-o", "train.micro_batches=2"],
}  # fmt: skip


@pytest.mark.parametrize("name", FINETUNINGS)
def test_a_run_goes_on_to_the_bit_and_its_weights_are_those_measured(
    command: Command, workplace: Path, name: str
) -> None:
    write_base(workplace / "base")
    options = ["train", "-c", "config.yaml", "--load", "base", *FINETUNINGS[name]]
    whole = command(*options, "--output-dir", "whole")
    assert whole.returncode == 0, whole.stderr
    shutil.copytree(workplace / "whole", workplace / "cut")
    shutil.rmtree(workplace / "cut/checkpoints/step-00000006")
    again = command(*options, "--output-dir", "cut")
    assert "resuming from cut/checkpoints/step-00000003" in again.stderr
    for file in ("model", "training"):
        ours, theirs = weights_of(workplace / "cut", file), weights_of(workplace / "whole", file)
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    losses = [
        [line["train/loss"] for line in read_metrics(workplace / run) if "train/loss" in line]
        for run in ("whole", "cut")
    ]
    assert losses[0] == losses[1]
    # What everyone reads is what was measured.
    assert command("eval", "--model", "whole", "--out", "e").returncode == 0
    reports = [json.loads((workplace / run / "report.json").read_text()) for run in ("whole", "e")]
    for part in ("metrics", "intervals", "data"):
        assert reports[0][part] == reports[1][part]
    assert reports[0]["weights"]["sha256"] == reports[1]["weights"]["sha256"]


# --- LoRA


def test_low_rank_updates_start_at_nothing_and_merge_into_plain_weights(tmp_path: Path) -> None:
    counts = [(TINY, 16), (RESNET, 12), (BIOMED, 16), (SIGLIP, 20), (COCA, 20)]
    for arch, count in counts:
        torch.manual_seed(3)
        base = CLIP(**arch).eval()
        model, tuning, optimizer = tuned(arch, lora_rank=2, lora_alpha=4.0)
        batch = batch_of()
        pixels = torch.randn(2, 3, 32, 32)
        model.eval()
        assert torch.equal(model.encode_image(pixels), base.encode_image(pixels))
        assert torch.equal(model.encode_text(batch.tokens), base.encode_text(batch.tokens))
        before = state_of(model)
        for _ in range(3):
            step(model, optimizer, rate=1e-2)
        assert all(name.endswith((".up", ".down")) for name in changed(model, before))
        assert len(changed(model, before)) == 2 * count
        merged = CLIP(**arch).eval()
        merged.load_state_dict(tuning.weights())
        assert not torch.equal(merged.encode_image(pixels), base.encode_image(pixels))
        for ours, theirs in (
            (merged.encode_image(pixels), model.encode_image(pixels)),
            (merged.encode_text(batch.tokens), model.encode_text(batch.tokens)),
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_low_rank_updates_leave_locked_towers_out() -> None:
    model, _, _ = tuned(lora_rank=2, lock_text="all", lock_image=2)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split(".parametrizations")[0] for name in trained} == {
        f"visual.transformer.resblocks.1.{part}"
        for part in ("attn", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_a_low_rank_run_is_read_and_goes_through_formats(command: Command, workplace: Path) -> None:
    write_base(workplace / "base")
    done = command("train", "-c", "config.yaml", "--load", "base", "--output-dir", "tuned",
                   "-o", "finetune.lora_rank=2", "-o", "optimizer.learning_rate=0.01")  # fmt: skip
    assert "training 4,096 of" in done.stderr
    base, model = leanclip.load("base").model, leanclip.load("tuned").model
    assert base.state_dict().keys() == model.state_dict().keys()
    moved = changed(model, base.state_dict())
    assert len(moved) == 16
    assert command("convert", "tuned", "tuned-hf", "--to", "hf").returncode == 0
    assert changed(leanclip.load("tuned-hf").model, state_of(model)) == set()


# --- memory


def test_memory_is_estimated_for_what_is_trained(workplace: Path) -> None:
    def estimate(*overrides: str) -> tuple[int, int]:
        return memory_estimate(
            make_plan(load_config("config.yaml", overrides), torch.device("cpu"))
        )

    everything, activations = estimate()
    locked = estimate("finetune.lock_image=all")
    image = sum(p.numel() for p in CLIP(**TINY).visual.parameters())
    assert everything - locked[0] == 12 * image  # no gradients, no moments
    assert locked[1] < 0.7 * activations
    mean = estimate("finetune.ema_decay=0.9")
    assert mean == (everything + 4 * CLIP(**TINY).parameter_count(), activations)
    adapted = sum(p.numel() for n, p in CLIP(**TINY).named_parameters() if n.endswith(ADAPTED))
    low_rank = estimate("finetune.lora_rank=2")
    assert low_rank[0] == 4 * CLIP(**TINY).parameter_count() + 16 * 4096
    of_four, of_eight = (
        estimate("finetune.lora_rank=2", f"train.batch_size={n}")[1] - 16 * n * n for n in (4, 8)
    )
    always = 2 * of_four - of_eight  # the sums, once whatever the batch, with their parts
    first = 2 * 96 * 32  # of each tower's first block: its input has no gradient to pass on
    assert 4 * (adapted - first) <= always <= 4 * (adapted + 3 * 4096)


# --- the configs


@pytest.mark.parametrize("path", sorted((PROJECT / "configs/finetune").glob("*.yaml")), ids=str)
def test_a_config_is_read_and_opens_with_its_command(path: Path) -> None:
    config = load_config(path)
    with torch.device("meta"):
        model = CLIP(**to_plain(config.model))
    assert Tuning(model, config.finetune).factors
    name = path.relative_to(PROJECT)
    assert path.read_text().startswith(f"# leanclip train -c {name} --load ViT-B/32\n")
    assert "not measured" in path.read_text()


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["finetune.lock_image=all"], ["finetune.lock_image", "give --load"]),
        (["finetune.lora_rank=2"], ["finetune.lora_rank", "give --load"]),
        (["finetune.lock_image=most"], ["finetune.lock_image", '"all" or null, found "most"']),
        (["finetune.lock_text=0"], ["finetune.lock_text", "found 0"]),
        (["finetune.lora_alpha=3"], ["finetune: lora_alpha goes with lora_rank"]),
        (["finetune.ema_decay=1"], ["finetune.ema_decay", "less than 1"]),
    ],
)
def test_a_mistake_is_one_line(command: Command, arguments: list[str], words: list[str]) -> None:
    options = [word for argument in arguments for word in ("-o", argument)]
    assert_refused(command("train", "-c", "config.yaml", *options), *words)
