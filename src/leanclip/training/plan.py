"""The plan of a run, made before anything is written: data, steps, learning rate, evaluations.

Config, device -> make_plan -> Plan -> train; headline and describe (--dry-run) print it
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from leanclip.config.data import DataConfig
from leanclip.config.schema import Config, load_config
from leanclip.config.sections import to_plain
from leanclip.config.strict_yaml import dump_yaml
from leanclip.config.training import FinetuneConfig, Precision
from leanclip.data import Dataset, open_dataset, source_configs
from leanclip.data.batch_sizes import BatchSizes
from leanclip.data.formats.mixture import Mixture
from leanclip.data.splits import training_split
from leanclip.distributed.collectives import barrier, from_first, rank_and_world_size
from leanclip.distributed.wrap_model import checkpoint_activations
from leanclip.errors import ConfigError
from leanclip.evaluation import METRICS, Task, open_retention, open_tasks
from leanclip.io.files import split_lines
from leanclip.losses import MAX_LOGITS_KEPT, TILE, Kind
from leanclip.model import CLIP
from leanclip.model.skip_init import meta_device
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.patches import Patches
from leanclip.preprocess.text import Tokenizer
from leanclip.report.text import count
from leanclip.training.feature_cache import cached_towers
from leanclip.training.finetune import Tuning
from leanclip.training.optimizer import scaled_learning_rate
from leanclip.training.stored import model_preprocess, model_tokenizer
from leanclip.training.tracking import check_tracker

MAX_CLASSES = 5  # class names printed of a data set


@dataclass(frozen=True)
class Plan:
    """A configuration with all that follows from it and the data."""

    config: Config
    device: torch.device
    dataset: Dataset
    tasks: list[Task]
    retention: Task | None
    preprocess: Preprocess
    tokenizer: Tokenizer
    cached_towers: list[str]  # of "image" and "text", those that run once
    loss: Kind
    ranks: int
    batch_size: int  # pairs per step over all ranks; of several lengths, of the longest
    steps_per_epoch: int
    steps: int  # of all epochs, in batches of this size
    peak_learning_rate: float
    warmup_steps: int  # steps
    offset: int = 0  # steps made so far, minus those that this batch size would have taken

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.output_dir)

    @property
    def sizes(self) -> BatchSizes:
        """The sizes of all batches."""
        lengths = self.config.data.patches or ()
        return BatchSizes(len(self.dataset), self.batch_size, self.config.seed, lengths)

    def weight(self, samples: int) -> float:
        """That of a batch's loss in the gradients: its size over the mean, if sizes differ."""
        return samples / self.sizes.mean if len(self.sizes.lengths) > 1 else 1.0

    @property
    def last_step(self) -> int:
        """The number of the last step, counted from the start of the run."""
        return self.offset + self.steps


def make_plan(config: Config, device: torch.device, *, ranks: int = 1) -> Plan:
    """Open the data, list the evaluation tasks, and compute the steps and learning rate of a run.

    `ranks` is the number of processes of a run that is not started yet.

    Raises:
        ConfigError: settings contradict each other or the data, or a tracker is not installed.
        DataError: the data is missing, empty or not of its format.
    """
    tokenizer = model_tokenizer(config)
    _check_together(config, tokenizer)
    # Always called: ranks with different settings would wait for each other forever.
    precision = from_first(partial(_precision, config, device))
    if config.train.precision == "auto":
        train = config.train.model_copy(update={"precision": precision})
        config = config.model_copy(update={"train": train})
    check_tracker(config.train.report_to)
    rank, world_size = rank_and_world_size()
    if rank > 0:
        barrier()  # the first rank prepares indices and the like
    dataset = open_dataset(config.data)
    tasks = open_tasks(config.data, config.evaluate)
    retention = open_retention(config.data, config.evaluate)
    if rank == 0:
        barrier()
    _check_best_metric(config.checkpoint.best_metric, tasks, retention)
    world_size = max(ranks, world_size)
    batch_size = min(config.train.batch_size * world_size, len(dataset))
    sizes = BatchSizes(len(dataset), batch_size, config.seed, config.data.patches or ())
    steps = config.train.epochs * sizes.steps_per_epoch
    return Plan(
        config=config,
        device=device,
        dataset=dataset,
        tasks=tasks,
        retention=retention,
        preprocess=model_preprocess(config),
        tokenizer=tokenizer,
        cached_towers=cached_towers(config.finetune, config.model, config.data, dataset),
        loss=_loss(config, dataset),
        ranks=world_size,
        batch_size=batch_size,
        steps_per_epoch=sizes.steps_per_epoch,
        steps=steps,
        peak_learning_rate=scaled_learning_rate(config.optimizer, sizes.mean),
        warmup_steps=round(config.optimizer.warmup_fraction * steps),
    )


def _precision(config: Config, device: torch.device) -> Precision:
    """The value of "auto": the precision of the run that is resumed, else the device's."""
    folder = Path(config.output_dir)
    if (folder / "checkpoints").is_dir() and (folder / "config.yaml").is_file():
        return load_config(folder / "config.yaml").train.precision
    return default_precision(device)


def default_precision(device: torch.device) -> Precision:
    """bf16 on GPUs that support it natively, else fp32."""
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "fp32"


def _check_best_metric(metric: str | None, tasks: list[Task], retention: Task | None) -> None:
    known = [name for task in tasks for name in METRICS[task.name]]
    known += [f"retention/{name}" for name in METRICS[retention.name]] if retention else []
    if metric is not None and metric not in known:
        found = f"there are: {', '.join(known)}" if known else "nothing is evaluated"
        raise ConfigError(f"checkpoint.best_metric: {metric} is not evaluated; {found}")


def _check_together(config: Config, tokenizer: Tokenizer) -> None:
    """Refuse settings that contradict each other."""
    if config.model.vocab_size < tokenizer.vocab_size:
        remedy = f"set it to {tokenizer.vocab_size}"
        if config.load is not None:
            remedy = f"put the tokeniser's files of {config.load} beside its weights"
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size} is less than the "
            f"{tokenizer.vocab_size} ids of the tokeniser; {remedy}"
        )
    if config.train.loss == "siglip" and not config.model.logit_bias:
        raise ConfigError(
            "train.loss: siglip has a bias on the logits, and the model has none; set "
            "model.logit_bias: true"
        )
    if config.train.initial_logit_bias is not None and (
        config.load is not None or not config.model.logit_bias
    ):
        raise ConfigError(
            "train.initial_logit_bias: is for training from scratch with model.logit_bias: true; "
            "remove it"
        )
    if config.train.loss in ("clip", "multi-positive") and config.model.logit_bias:
        raise ConfigError(
            f"train.loss: {config.train.loss} does not train the bias of model.logit_bias; set "
            f"train.loss: siglip, or auto"
        )
    is_resnet, settings = isinstance(config.model.vision_layers, tuple), config.train
    if settings.compile and (
        settings.sharding == "fsdp" or (is_resnet and settings.checkpoint_activations)
    ):
        raise ConfigError(
            "train.compile: cannot be combined with train.sharding fsdp, nor with "
            "train.checkpoint_activations of a ResNet; remove one of them"
        )
    if settings.sharding == "fsdp" and config.finetune != FinetuneConfig():
        raise ConfigError("train.sharding: fsdp cannot be combined with settings of finetune yet")


def _loss(config: Config, dataset: Dataset) -> Kind:
    """The loss; for "auto" that of the model, and samples of one class are not negatives."""
    if config.train.loss != "auto":
        return config.train.loss
    if config.model.logit_bias:
        return "siglip"
    return "multi-positive" if _has_classes(dataset) else "clip"


def _has_classes(dataset: Dataset) -> bool:
    sources = dataset.sources if isinstance(dataset, Mixture) else [dataset]
    return any(source.classes for source in sources)


def headline(plan: Plan) -> str:
    """The run in a few lines, for the start of training."""
    config, optimizer = plan.config, plan.config.optimizer
    with meta_device():
        parameters = CLIP(**to_plain(config.model)).parameter_count()
    scaling = (
        "not scaled with the batch size"
        if optimizer.reference_batch is None
        else f"{optimizer.learning_rate:.3g} x {'mean ' * (len(plan.sizes.lengths) > 1)}batch "
        f"{plan.sizes.mean:.6g} / "
        f"reference batch {optimizer.reference_batch}"
    )
    smaller = (
        f" (train.batch_size is {config.train.batch_size}, the data set is smaller)"
        if plan.batch_size < config.train.batch_size
        else ""
    )
    sizes = plan.sizes.sizes
    batches = f"{count(plan.steps_per_epoch, 'batch', 'batches')} of {plan.batch_size}{smaller}"
    if len(sizes) > 1:
        each = ", ".join(f"{samples:,} x {patches} patches" for samples, patches in sizes)
        batches = f"{count(plan.steps_per_epoch, 'batch', 'batches')}, one of {each}"
    lines = [
        f"model: {parameters:,} parameters, {config.model.image_resolution} px, "
        f"{config.train.precision} on {plan.device.type}, loss {plan.loss}",
        f"data: {_data_line(plan)}",
        f"steps: {plan.steps:,} = {count(config.train.epochs, 'epoch')} x {batches}",
        f"learning rate: peak {plan.peak_learning_rate:.3g}, "
        f"{count(plan.warmup_steps, 'warm-up step')}, cosine to 0 ({scaling})",
        f"folder: {plan.folder}",
    ]
    lines += [
        f"locked: the {tower} tower runs once, its features are cached in {plan.folder}/features"
        for tower in plan.cached_towers
    ]
    return "\n".join(lines)


def batch_warnings(plan: Plan) -> list[str]:
    """Warnings about a batch that wastes data or misleads the loss, one sentence each."""
    size, batch, found = len(plan.dataset), plan.sizes.sizes[-1].samples, []
    if batch == 1:
        found.append(
            "the batch is one pair, which has no negatives; raise train.batch_size, or use more "
            "data"
        )
    if plan.loss == "siglip" and _has_classes(plan.dataset):
        found.append(
            "samples of one class are each other's negatives in the sigmoid loss, which has no "
            "multi-positive form yet; use captions, or batches smaller than the number of classes"
        )
    left_out = size - round(plan.steps_per_epoch * plan.sizes.mean)
    if left_out and (2 * batch > size or 10 * left_out > size):
        found.append(
            f"batches of {batch:,} leave out {left_out:,} of {size:,} samples in each epoch "
            f"({left_out / size:.0%}), different ones each time; lower train.batch_size"
        )
    return found


def _data_line(plan: Plan) -> str:
    data, dataset = plan.config.data, plan.dataset
    if not (data.sources and isinstance(dataset, Mixture)):
        details = split_and_classes(data, dataset)
        return f"{len(dataset):,} samples of {data.format} in {data.root}{details}"
    parts = (
        f"{fraction:.1%} of {len(source):,} from {settings.root} ({settings.format})"
        f"{split_and_classes(settings, source)}"
        for fraction, source, settings in zip(
            dataset.fractions, dataset.sources, source_configs(data), strict=True
        )
    )
    return f"{len(dataset):,} samples per epoch: {'; '.join(parts)}"


def split_and_classes(data: DataConfig, dataset: Dataset) -> str:
    """The split and classes of a data set, if it has them: ", split val, 2 classes: ant, bee"."""
    split, names = training_split(data), dataset.classes
    found = f", split {split}" if split else ""
    if names:
        more = ", ..." if len(names) > MAX_CLASSES else ""
        found += (
            f", {count(len(names), 'class', 'classes')}: {', '.join(names[:MAX_CLASSES])}{more}"
        )
    return found


def describe(plan: Plan) -> str:
    """The output of --dry-run: the resolved configuration as YAML, the plan as comments."""
    weights, activations = memory_estimate(plan)
    memory = (
        f"memory{' per rank' if plan.ranks > 1 else ''}: about "
        f"{(weights + activations) / 2**30:.2f} GiB = {weights / 2**30:.2f} for weights, gradients "
        f"and moments + {activations / 2**30:.2f} for a batch's activations (captions as long as "
        f"the context)"
    )
    warnings = [f"warning: {warning}" for warning in batch_warnings(plan)]
    comments = [f"# {line}\n" for line in (*split_lines(headline(plan)), *warnings, memory)]
    return "".join(comments) + dump_yaml(to_plain(plan.config)).rstrip()


def memory_estimate(plan: Plan) -> tuple[int, int]:
    """Bytes per rank: weights with gradients and AdamW's moments; activations with the loss.

    For the activations the model runs on the meta device, and the tensors that autograd saves are
    counted. Those of low-rank updates do not depend on the batch.

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
    return weights, max(_activations(plan, model, *size) for size in plan.sizes.sizes)


def _activations(plan: Plan, model: CLIP, batch_size: int, patches: int | None) -> int:
    """Bytes of a batch's activations and loss."""
    settings = plan.config.train
    shape = plan.preprocess.shape_of_image(patches)
    of_two, of_three = (_saved_by_autograd(model, pairs, shape) for pairs in (2, 3))
    per_pair = of_three - of_two
    fixed = of_two - 2 * per_pair
    if settings.precision != "fp32":
        per_pair //= 2
    own = -(-batch_size // plan.ranks)
    at_once = -(-own // settings.micro_batches)
    return fixed + at_once * per_pair + _loss_bytes(plan, batch_size, own)


def _loss_bytes(plan: Plan, batch_size: int, own: int) -> int:
    """Bytes of the loss for a rank's `own` pairs: features, their gradients, and logits."""
    features = 4 * 4 * batch_size * plan.config.model.embed_dim
    if not plan.config.train.tiled_loss:
        return features + 4 * 4 * batch_size**2  # logits, two softmaxes, a gradient
    logits = own * batch_size
    return features + 4 * (min(MAX_LOGITS_KEPT, logits) + 3 * min(TILE**2, logits))


def _saved_by_autograd(model: CLIP, pairs: int, shape: tuple[int, ...]) -> int:
    """Bytes that a forward pass of a model on the meta device saves, besides its parameters.

    `shape` is that of an image: (3, R, R), or (P, 3p²) of patches.
    """
    saved: dict[int, torch.UntypedStorage] = {}  # by id

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[id(storage)] = storage
        return tensor

    pixels = torch.empty(pairs, *shape, device="meta")
    if len(shape) == 2:
        pixels = Patches(pixels, torch.tensor([[1, shape[0]]] * pairs))
    tokens = torch.empty(pairs, model.context_length, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        features = model(pixels, tokens)
    del features
    for parameter in model.parameters():
        saved.pop(id(parameter.untyped_storage()), None)
    return sum(storage.nbytes() for storage in saved.values())
