"""The sections `train`, `optimizer`, `finetune` and `checkpoint`."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from leanclip.config.sections import (
    Decay,
    Fraction,
    Positive,
    PositiveFloat,
    PositiveFraction,
    Section,
    kind,
)

Precision = Literal["auto", "fp32", "bf16", "fp16"]


class TrainConfig(Section):
    """Length, batch size and precision of training."""

    epochs: Positive = Field(default=10, description="passes over the training data")
    batch_size: Positive = Field(default=128, description="pairs per step and device")
    micro_batches: Positive = Field(
        default=1,
        description="chunks in which the towers process a device's batch, to save memory; the "
        "gradients equal those of the whole batch",
    )
    loss: Literal["auto", "clip", "multi-positive", "siglip"] = Field(
        default="auto",
        description="auto: siglip for a model with model.logit_bias, else multi-positive for "
        "class data, else clip",
    )
    initial_logit_bias: float | None = Field(
        default=None,
        description="bias of the siglip loss at the start of training from scratch; null: SigLIP's "
        "-10, for batches of 32,768; smaller ones train faster from about -log(global batch)",
    )
    tiled_loss: bool = Field(
        default=True, description="compute the logits in tiles, never the whole matrix of the batch"
    )
    max_skipped_steps: Positive = Field(
        default=10, description="consecutive steps that may be skipped for non-finite gradients"
    )
    precision: Precision = Field(
        default="auto",
        description="bf16, fp16: autocast; weights, loss and temperature stay float32; fp16 uses "
        "loss scaling; auto: bf16 on a GPU that supports it, else fp32",
    )
    sharding: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="over several ranks: ddp replicates the weights; fsdp shards weights, "
        "gradients and optimiser state",
    )
    checkpoint_activations: bool = Field(
        default=False,
        description="activation checkpointing: keep only each block's input and recompute the "
        "rest; less memory, about a third more time, the same gradients",
    )
    compile: bool = Field(
        default=False, description="torch.compile both towers; takes minutes at the start"
    )
    deterministic: bool = Field(
        default=False,
        description="on a GPU: only deterministic kernels, which are slower; an operation without "
        "one ends the run. The CPU is always deterministic",
    )
    truncate_captions: bool = Field(
        default=True,
        description="truncate captions longer than the context; false: they are bad samples",
    )
    log_every: Positive = Field(default=10, description="steps between lines of metrics.jsonl")
    report_to: Literal["auto", "tensorboard", "wandb", "trackio"] | None = Field(
        default="auto",
        description="experiment tracker beside metrics.jsonl; auto: tensorboard if installed",
    )


class OptimizerConfig(Section):
    """AdamW, linear warm-up, cosine to zero."""

    learning_rate: PositiveFloat = Field(
        default=1e-4, description="peak learning rate, for a global batch of `reference_batch`"
    )
    reference_batch: Positive | None = Field(
        default=None,
        description="the learning rate is scaled by global batch / this; null: not scaled",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.2, description="not applied to biases, norms, temperature and position embeddings"
    )
    beta1: Decay = Field(default=0.9, description="decay of the first moment")
    beta2: Decay = Field(default=0.98, description="decay of the second moment; OpenAI's ViT: 0.98")
    epsilon: PositiveFloat = Field(default=1e-6, description="OpenAI's ViT: 1e-6")
    warmup_fraction: Fraction = Field(
        default=0.05, description="fraction of the steps with linear warm-up"
    )
    max_gradient_norm: PositiveFloat | None = Field(
        default=None, description="clip the global gradient norm to this; null: no clipping"
    )


Lock = Literal["all"] | Annotated[int, Field(gt=0)] | None


class FinetuneConfig(Section):
    """Fine-tuning: docs/finetune.md. Off by default.

    The layer groups of a tower, from the lowest: the stem with its embeddings, each block, and the
    last norm with the projection.
    """

    lock_image: Lock = Field(
        default=None,
        description='number of frozen groups of the image tower, from the lowest, or "all"',
    )
    lock_text: Lock = Field(
        default=None,
        description='number of frozen groups of the text tower, from the lowest, or "all"',
    )
    layer_decay: PositiveFraction | None = Field(
        default=None, description="learning rate of a group / that of the group above it"
    )
    new_learning_rate_factor: PositiveFloat = Field(
        default=1.0,
        description="learning rate factor of parameters missing in weights loaded with --partial",
    )
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="fraction of a ViT's patches that training drops at random"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="decay per step of an exponential moving average of the weights, which is "
        "evaluated and written; null: none",
    )
    cache_features: bool = Field(
        default=True,
        description="encode inputs of a frozen tower that never change only once (captions, and "
        "images with data.augment false); the features are stored in the run's folder",
    )
    lora_rank: Positive | None = Field(
        default=None, description="rank of LoRA updates; null: all weights are trained"
    )
    lora_alpha: PositiveFloat | None = Field(
        default=None, description="LoRA updates are scaled by alpha / rank; null: alpha = rank"
    )

    @field_validator("lock_image", "lock_text", mode="before")
    @classmethod
    def _all_or_a_number(cls, value: Any) -> Any:
        """One message in place of one per type of the union."""
        if value not in (None, "all") and not (type(value) is int and value > 0):
            raise ValueError(f'should be a number of groups, "all" or null, found {kind(value)}')
        return value

    @model_validator(mode="after")
    def _check(self) -> "FinetuneConfig":
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ValueError("lora_alpha goes with lora_rank, which is not set")
        return self


class CheckpointConfig(Section):
    """When checkpoints are written, besides the one at the end of a run."""

    every_epochs: Positive | None = Field(default=1, description="epochs between checkpoints")
    every_steps: Positive | None = Field(
        default=None, description="steps between checkpoints, in addition"
    )
    keep: Annotated[int, Field(ge=2)] = Field(
        default=2, description="number of newest checkpoints to keep"
    )
    best_metric: str | None = Field(
        default=None,
        description="a metric of the evaluations, such as zeroshot_top1; the checkpoint with its "
        "highest value is kept too",
    )
