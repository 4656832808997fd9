"""What a run will do, worked out before anything is written: data, steps, rates, memory.

Config, device -> make_plan -> Plan -> describe (for --dry-run), headline, train
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from leanclip.config.data import DataConfig
from leanclip.config.schema import Config, load_config
from leanclip.config.sections import to_plain
from leanclip.config.strict_yaml import dump_yaml
from leanclip.config.training import FinetuneConfig, Precision
from leanclip.data import Dataset, open_dataset, source_configs
from leanclip.data.formats.mixture import Mixture
from leanclip.data.splits import split_in_use
from leanclip.distributed.collectives import barrier, from_first, rank_and_world_size
from leanclip.distributed.wrap_model import checkpoint_activations
from leanclip.errors import ConfigError, WeightsError
from leanclip.evaluation import METRICS, Task, open_retention, open_tasks
from leanclip.io.files import split_lines
from leanclip.losses import MAX_LOGITS_KEPT, TILE, Kind
from leanclip.model import CLIP
from leanclip.model.skip_init import meta_device
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.tokenizer import VOCAB_SIZE
from leanclip.training.feature_cache import cached_towers
from leanclip.training.finetune import Tuning
from leanclip.training.optimizer import scaled_learning_rate
from leanclip.training.tracking import check_tracker
from leanclip.weights import read_preprocess

SHOWN_CLASSES = 5  # of a data set, in a run's first lines


@dataclass(frozen=True)
class Plan:
    """A configuration with everything that follows from it and from the data."""

    config: Config
    device: torch.device
    dataset: Dataset
    tasks: list[Task]
    retention: Task | None
    preprocess: Preprocess
    loss: Kind
    ranks: int
    batch_size: int  # pairs per step over all ranks
    steps_per_epoch: int
    steps: int  # from the first sample to the last, in batches of this size
    peak_learning_rate: float
    warmup: int  # steps
    offset: int = 0  # steps made so far, less those that this batch size would have taken

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.output_dir)

    @property
    def last_step(self) -> int:
        """The number of the last step, counting every step that the run has made."""
        return self.offset + self.steps


def make_plan(config: Config, device: torch.device, *, ranks: int = 1) -> Plan:
    """Open the data and work out the steps and rates of a run.

    `ranks` is how many processes there will be; where a launcher has started them, it knows.

    Raises:
        ConfigError: the model cannot hold the tokeniser's ids, a setting does not go with another
            or with the data, or a tracker is not installed.
        DataError: the data is missing, empty or not of its format.
    """
    _check_together(config)
    # Asked on every rank, or ranks of other settings would wait for each other without end.
    precision = from_first(partial(_precision, config, device))
    if config.train.precision == "auto":
        train = config.train.model_copy(update={"precision": precision})
        config = config.model_copy(update={"train": train})
    check_tracker(config.train.report_to)
    rank, world_size = rank_and_world_size()
    if rank > 0:
        barrier()  # what the first rank prepares, such as an index, the others find
    dataset, tasks, retention = (
        open_dataset(config.data),
        open_tasks(config),
        open_retention(config),
    )
    if rank == 0:
        barrier()
    _check_best_metric(config, tasks, retention)
    world_size = max(ranks, world_size)
    batch_size = min(config.train.batch_size * world_size, len(dataset))
    steps_per_epoch = len(dataset) // batch_size
    steps = config.train.epochs * steps_per_epoch
    return Plan(
        config=config,
        device=device,
        dataset=dataset,
        tasks=tasks,
        retention=retention,
        preprocess=model_preprocess(config),
        loss=_loss(config, dataset),
        ranks=world_size,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        peak_learning_rate=scaled_learning_rate(config.optimizer, batch_size),
        warmup=round(config.optimizer.warmup_fraction * steps),
    )


def _precision(config: Config, device: torch.device) -> Precision:
    """What "auto" stands for: the precision of the run that goes on, else the device's."""
    folder = Path(config.output_dir)
    if (folder / "checkpoints").is_dir() and (folder / "config.yaml").is_file():
        return load_config(folder / "config.yaml").train.precision
    return default_precision(device)


def default_precision(device: torch.device) -> Precision:
    """bf16 where it is fast, on a GPU that has it, else fp32."""
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "fp32"


def _check_best_metric(config: Config, tasks: list[Task], retention: Task | None) -> None:
    wanted = config.checkpoint.best_metric
    known = [name for task in tasks for name in METRICS[task.name]]
    known += [f"retention/{name}" for name in METRICS[retention.name]] if retention else []
    if wanted is not None and wanted not in known:
        there_are = f"there are: {', '.join(known)}" if known else "nothing is"
        raise ConfigError(f"checkpoint.best_metric: {wanted} is not measured; {there_are}")


def _check_together(config: Config) -> None:
    """Refuse settings that do not go with each other."""
    if config.model.vocab_size < VOCAB_SIZE:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size} is less than the {VOCAB_SIZE} ids of "
            f"the tokeniser; set it to {VOCAB_SIZE}"
        )
    if (config.train.loss == "siglip") != config.model.logit_bias:
        raise ConfigError("train.loss: siglip goes with model.logit_bias: true, and only with it")
    is_resnet, settings = isinstance(config.model.vision_layers, tuple), config.train
    if settings.compile and (
        settings.sharding == "fsdp" or (is_resnet and settings.checkpoint_activations)
    ):
        raise ConfigError(
            "train.compile: does not go with train.sharding fsdp, nor with "
            "train.checkpoint_activations of a ResNet; leave one of them out"
        )
    if settings.sharding == "fsdp" and config.finetune != FinetuneConfig():
        raise ConfigError("train.sharding: fsdp does not go with the settings of finetune yet")


def _loss(config: Config, dataset: Dataset) -> Kind:
    """The loss that "auto" stands for: samples of one class are not each other's negatives."""
    if config.train.loss != "auto":
        return config.train.loss
    sources = dataset.sources if isinstance(dataset, Mixture) else [dataset]
    return "multi-positive" if any(source.classes for source in sources) else "clip"


def model_preprocess(config: Config, source: str | None = None) -> Preprocess:
    """The evaluation transform of the model that a configuration describes.

    What `data.resize` and `data.interpolation` leave open is as stored with the weights: those of
    `source`, else of the run that goes on, else of `load`; else as OpenAI's. Every rank calls this,
    and the first one reads: a run's folder may be on its disk alone.
    """
    data, resolution = config.data, config.model.image_resolution
    stored = from_first(
        lambda: _stored_preprocess(config) if source is None else read_preprocess(source)
    )
    base = Preprocess(resolution) if stored is None else stored.at(resolution)
    if data.resize is not None and data.resize != base.resize:
        base = Preprocess(resolution, interpolation=base.interpolation, resize=data.resize)
    return replace(
        base,
        mean=data.mean,
        std=data.std,
        interpolation=data.interpolation or base.interpolation,
    )


def _stored_preprocess(config: Config) -> Preprocess | None:
    """Of the newest checkpoint that says it, else of the weights to load."""
    for path in sorted(Path(config.output_dir).glob("checkpoints/step-*"), reverse=True):
        with suppress(WeightsError):  # one that is damaged is not gone on from either
            return read_preprocess(path)
    return None if config.load is None else read_preprocess(config.load)


def headline(plan: Plan) -> str:
    """The run in a few lines, for the start of training."""
    config, optimizer = plan.config, plan.config.optimizer
    with meta_device():
        parameters = CLIP(**to_plain(config.model)).parameter_count()
    rate = f"peak learning rate {plan.peak_learning_rate:.3g}"
    if optimizer.reference_batch is None:
        rate += " as it stands (optimizer.reference_batch is null)"
    else:
        rate += (
            f" = {optimizer.learning_rate:.3g} x batch {plan.batch_size} / "
            f"reference batch {optimizer.reference_batch}"
        )
    smaller = (
        f" (train.batch_size is {config.train.batch_size}, the data set is smaller)"
        if plan.batch_size < config.train.batch_size
        else ""
    )
    frozen = "".join(
        f"\nlocked: the {tower} tower runs once, its features are kept in {plan.folder}/features"
        for tower in cached_towers(config, plan.dataset)
    )
    return "\n".join(
        (
            f"model: {parameters:,} parameters, {config.model.image_resolution} px, "
            f"{config.train.precision} on {plan.device.type}, loss {plan.loss}",
            f"data: {_data_line(plan)}",
            f"steps: {plan.steps:,} = {config.train.epochs} epochs x {plan.steps_per_epoch} "
            f"batches of {plan.batch_size}{smaller}",
            f"rates: {rate}, {plan.warmup} steps of warm-up, then a cosine to zero",
            f"folder: {plan.folder}{frozen}",
        )
    )


def batch_warnings(plan: Plan) -> list[str]:
    """What a run loses by the size of its batches, a sentence each."""
    size, batch, found = len(plan.dataset), plan.batch_size, []
    if batch == 1:
        has_loss = plan.loss == "siglip"
        what = "a pair has no negatives" if has_loss else "its loss is 0, so nothing is learned"
        found.append(f"the batch is one pair: {what}; raise train.batch_size, or use more data")
    left_out = size - plan.steps_per_epoch * batch
    if left_out and (2 * batch > size or 10 * left_out > size):
        found.append(
            f"batches of {batch:,} leave out {left_out:,} of {size:,} samples in each epoch "
            f"({left_out / size:.0%}), others each time; lower train.batch_size to leave out fewer"
        )
    return found


def _data_line(plan: Plan) -> str:
    """How many samples of what."""
    data, dataset = plan.config.data, plan.dataset
    if not (data.sources and isinstance(dataset, Mixture)):
        what = split_and_classes(data, dataset)
        return f"{len(dataset):,} samples of {data.format} in {data.root}{what}"
    parts = (
        f"{share:.1%} of {len(source):,} from {settings.root} ({settings.format})"
        f"{split_and_classes(settings, source)}"
        for share, source, settings in zip(
            dataset.shares, dataset.sources, source_configs(data), strict=True
        )
    )
    return f"{len(dataset):,} samples an epoch: {'; '.join(parts)}"


def split_and_classes(data: DataConfig, dataset: Dataset) -> str:
    """ ", split val, 2 classes: ant, bee" of a data set, as far as it has them."""
    split, names = split_in_use(data), dataset.classes
    found = f", split {split}" if split else ""
    if names:
        more = ", ..." if len(names) > SHOWN_CLASSES else ""
        found += f", {len(names):,} classes: {', '.join(names[:SHOWN_CLASSES])}{more}"
    return found


def describe(plan: Plan) -> str:
    """What --dry-run prints: the resolved configuration as YAML, the rest as comments of it."""
    weights, activations = memory_estimate(plan)
    whose = " of a rank" if plan.ranks > 1 else ""
    gigabytes = (
        f"memory{whose}: about {(weights + activations) / 2**30:.2f} GiB = {weights / 2**30:.2f} "
        f"for weights, gradients and moments + {activations / 2**30:.2f} for a batch's activations "
        f"(captions as long as the context; shorter ones take less)"
    )
    warnings = [f"warning: {warning}" for warning in batch_warnings(plan)]
    lines = (*split_lines(headline(plan)), *warnings, gigabytes)
    comments = "".join(f"# {line}\n" for line in lines)
    return comments + dump_yaml(to_plain(plan.config)).rstrip()


def memory_estimate(plan: Plan) -> tuple[int, int]:
    """Bytes of a rank: weights with gradients and AdamW's moments, and activations with the loss.

    Activations are counted, not guessed: the model runs on the meta device, where nothing is
    computed, and the tensors that autograd keeps are added up; the sums of low-rank updates are
    among them, once whatever the batch.

    Raises:
        ConfigError: the settings of `finetune` do not fit the model.
    """
    settings = plan.config.train
    with meta_device():
        model = CLIP(**to_plain(plan.config.model))
        tuning = Tuning(model, plan.config.finetune)
    if settings.checkpoint_activations:
        checkpoint_activations(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = 4 * model.parameter_count() + 12 * trained
    weights += sum(4 * mean.numel() for mean in tuning.average.values())
    if settings.sharding == "fsdp":
        weights //= plan.ranks
    of_two, of_three = (_kept_by_autograd(model, pairs) for pairs in (2, 3))
    per_pair = of_three - of_two
    always = of_two - 2 * per_pair
    if settings.precision != "fp32":
        per_pair //= 2
    own = -(-plan.batch_size // plan.ranks)
    at_once = -(-own // settings.micro_batches)
    return weights, always + at_once * per_pair + _loss_bytes(plan, own)


def _loss_bytes(plan: Plan, own: int) -> int:
    """What the loss takes for `own` pairs of a rank: features, their gradients, and logits."""
    features = 4 * 4 * plan.batch_size * plan.config.model.embed_dim
    if not plan.config.train.tiled_loss:
        return features + 4 * 4 * plan.batch_size**2  # logits, two softmaxes, a gradient
    logits = own * plan.batch_size
    return features + 4 * (min(MAX_LOGITS_KEPT, logits) + 3 * min(TILE**2, logits))


def _kept_by_autograd(model: CLIP, pairs: int) -> int:
    """Bytes that a forward pass of a model on the meta device keeps, besides its parameters."""
    kept: dict[int, torch.UntypedStorage] = {}  # by id

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage
        return tensor

    side, length = model.visual.input_resolution, model.context_length
    pixels = torch.empty(pairs, 3, side, side, device="meta")
    tokens = torch.empty(pairs, length, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = model(pixels, tokens)
    del features
    for parameter in model.parameters():
        kept.pop(id(parameter.untyped_storage()), None)
    return sum(storage.nbytes() for storage in kept.values())
