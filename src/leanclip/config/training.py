"""The sections `train`, `optimizer`, `finetune` and `checkpoint`."""

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from leanclip.config.sections import Section, kind
from leanclip.config.types import (
    Decay,
    Fraction,
    Positive,
    PositiveFloat,
    PositiveFraction,
)

Precision = Literal["auto", "fp32", "bf16", "fp16"]


class TrainConfig(Section):
    """How long, in what batches, in what arithmetic."""

    epochs: Positive = Field(default=10, description="passes over the training data")
    batch_size: Positive = Field(default=128, description="pairs per step and device")
    micro_batches: Positive = Field(
        default=1,
        description="parts that a device's batch goes through the towers in, for less memory; "
        "the gradients stay those of the whole batch",
    )
    loss: Literal["auto", "clip", "multi-positive", "siglip"] = Field(
        default="auto",
        description="auto: multi-positive for class data, clip elsewhere",
    )
    tiled_loss: bool = Field(
        default=True, description="never hold the batch's whole matrix of logits"
    )
    max_skipped_steps: Positive = Field(
        default=10, description="steps in a row that may be lost to non-finite gradients"
    )
    precision: Precision = Field(
        default="auto",
        description="bf16, fp16: autocast; weights, loss and temperature stay float32; bf16 needs "
        "no scaling of the loss; auto: bf16 on a GPU that has it, else fp32",
    )
    sharding: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="of several ranks: ddp, each holds all weights; fsdp, each its part of them, "
        "of gradients and of moments",
    )
    checkpoint_activations: bool = Field(
        default=False,
        description="keep each block's input alone and compute the rest again: less memory, about "
        "a third more time, the same gradients",
    )
    compile: bool = Field(
        default=False, description="torch.compile both towers, which takes minutes at the start"
    )
    deterministic: bool = Field(
        default=False,
        description="on a GPU: only kernels that give the same bits again, which are slower; an "
        "operation that has none ends the run. On the CPU it is always so",
    )
    truncate_captions: bool = Field(
        default=True, description="cut captions over the context; false: they are bad samples"
    )
    log_every: Positive = Field(default=10, description="steps between two lines of metrics.jsonl")
    report_to: Literal["auto", "tensorboard", "wandb", "trackio"] | None = Field(
        default="auto",
        description="where metrics go beside metrics.jsonl; auto: tensorboard where installed",
    )


class OptimizerConfig(Section):
    """AdamW, linear warm-up, cosine to zero."""

    learning_rate: PositiveFloat = Field(
        default=1e-4, description="peak rate, for a global batch of `reference_batch`"
    )
    reference_batch: Positive | None = Field(
        default=None,
        description="the rate is scaled by global batch / this; null: it is used as it stands",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.2, description="not on biases, norms, temperature and positions"
    )
    beta1: Decay = Field(default=0.9, description="decay of the gradient's mean")
    beta2: Decay = Field(
        default=0.98, description="decay of the gradient's square; OpenAI's ViT: 0.98"
    )
    epsilon: PositiveFloat = Field(default=1e-6, description="OpenAI's ViT: 1e-6")
    warmup_fraction: Fraction = Field(
        default=0.05, description="fraction of the run with a rising rate"
    )
    max_gradient_norm: PositiveFloat | None = Field(
        default=None, description="clip the global gradient norm to this; null: no clipping"
    )


Lock = Literal["all"] | Annotated[int, Field(gt=0)] | None


class FinetuneConfig(Section):
    """What is different in training that starts from weights: docs/finetune.md. All off here.

    The groups of a tower, from the lowest: the stem with its embeddings, each block, and the
    last norm with the projection.
    """

    lock_image: Lock = Field(
        default=None, description='lowest groups of the image tower that stay as loaded, or "all"'
    )
    lock_text: Lock = Field(
        default=None, description='lowest groups of the text tower that stay as loaded, or "all"'
    )
    layer_decay: PositiveFraction | None = Field(
        default=None, description="a group's rate is this much of that of the group above it"
    )
    new_learning_rate_factor: PositiveFloat = Field(
        default=1.0,
        description="on the rate of parameters that weights loaded with --partial did not have",
    )
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of a ViT's patches that training leaves out, by chance"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="a step's mean of the weights is this much of the mean before; the mean is "
        "evaluated and written",
    )
    cache_features: bool = Field(
        default=True,
        description="a locked tower runs once over what it sees the same each time: captions, and "
        "images with data.augment false; its features are kept in the run's folder",
    )
    lora_rank: Positive | None = Field(
        default=None, description="rank of the only updates of the weights (LoRA); null: of all"
    )
    lora_alpha: PositiveFloat | None = Field(
        default=None, description="low-rank updates count alpha / rank; null: alpha is the rank"
    )

    @field_validator("lock_image", "lock_text", mode="before")
    @classmethod
    def _all_or_a_number(cls, value: Any) -> Any:
        """One message in place of one for each kind."""
        if value not in (None, "all") and not (type(value) is int and value > 0):
            raise ValueError(f'should be a number of groups, "all" or null, found {kind(value)}')
        return value

    @model_validator(mode="after")
    def _check(self) -> "FinetuneConfig":
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ValueError("lora_alpha goes with lora_rank, which is not set")
        return self


class CheckpointConfig(Section):
    """When the state of training is written; the end of a run always is."""

    every_epochs: Positive | None = Field(default=1, description="epochs between two")
    every_steps: Positive | None = Field(default=None, description="steps between two, besides")
    keep: Annotated[int, Field(ge=2)] = Field(default=2, description="newest ones that are kept")
    best_metric: str | None = Field(
        default=None,
        description="a metric of the evaluations, such as zeroshot_top1; the checkpoint where it "
        "was highest is kept besides",
    )
