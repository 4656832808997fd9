"""Every setting of a run: typed, described, checked where it is declared.

YAML file -> strict loader -> -o key.path=value -> Config -> YAML in the run's folder
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from leanclip.config.sections import Section, kind, parse
from leanclip.config.strict_yaml import load_yaml
from leanclip.errors import ConfigError
from leanclip.io.files import LFS_POINTER, is_lfs_file

Positive = Annotated[int, Field(gt=0)]
Size = Annotated[int, Field(gt=0, le=100_000_000)]  # of a model
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of a running mean; 1 would never take anything in
Ratio = Annotated[float, Field(gt=0, le=100)]
Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Format = Literal["shapes", "food101", "folder", "pairs", "table", "shards", "wds", "hub", "mixture"]


_VIT_ONLY = (  # a ResNet takes none of these, or only their defaults
    "vision_patch_size",
    "vision_mlp_ratio",
    "vision_pool",
    "vision_norm_after_pool",
    "pre_norm",
    "patch_bias",
)


_WEIGHTS_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".pdparams"}
_COMMON_NAMES = {"model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model"}


class ModelConfig(Section):
    """The architecture, in the keys of OpenAI's code and of PASSL's `arch` dict."""

    embed_dim: Size = Field(description="width of the shared feature space")
    image_resolution: Size = Field(description="side of the square input image, in pixels")
    vision_layers: int | tuple[int, int, int, int] = Field(
        description="a number: blocks of a ViT; four: bottlenecks of a ResNet's stages"
    )
    vision_width: Size = Field(
        description="width of the vision tower; of a ResNet: channels after the stem"
    )
    vision_patch_size: Size | None = Field(
        default=None, description="side of a ViT's patch, in pixels; of a ResNet: null or 0"
    )
    vision_heads: Size | None = Field(
        default=None,
        description="attention heads of the vision tower; of a ResNet: of its attention pool; "
        "null: OpenAI's, 64 channels each",
    )
    vision_mlp_ratio: Ratio = Field(
        default=4.0, description="hidden width of a ViT's perceptrons / vision_width, rounded down"
    )
    vision_pool: Literal["tok", "avg"] = Field(
        default="tok", description="what a ViT is read at: its class token, or its patches' mean"
    )
    vision_norm_after_pool: bool = Field(
        default=False, description="with vision_pool avg: the last LayerNorm comes after the mean"
    )
    context_length: Size = Field(default=77, description="tokens of a caption, with start and end")
    vocab_size: Size = Field(default=49408, description="number of token ids")
    transformer_width: Size = Field(description="width of the text tower")
    transformer_heads: Size = Field(description="attention heads of the text tower")
    transformer_layers: Annotated[int, Field(gt=0, le=1000)] = Field(
        description="blocks of the text tower"
    )
    transformer_mlp_ratio: Ratio = Field(
        default=4.0,
        description="hidden width of the text tower's perceptrons / its width, rounded down",
    )
    transformer_pool: Literal["argmax", "first", "last", "eos"] = Field(
        default="argmax",
        description="the token that the text is read at: the highest id (the end token), the "
        "first, the last of the padded context, or the first that is transformer_eos_id",
    )
    transformer_eos_id: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="with transformer_pool eos: the id; a text without it is read at its first "
        "token, as in transformers and open_clip",
    )
    transformer_causal: bool = Field(
        default=True, description="a token of the text sees only those before it"
    )
    activation: Activation = Field(
        default="quick_gelu",
        description="of both towers' perceptrons; OpenAI's: quick_gelu",
    )
    pre_norm: bool = Field(default=True, description="LayerNorm before a ViT's first block")
    patch_bias: bool = Field(default=False, description="a bias in a ViT's patch embedding")
    logit_bias: bool = Field(
        default=False, description="a bias on the logits, for the loss siglip; starts at -10"
    )

    @property
    def attention_heads(self) -> int:
        """Heads of the vision tower: `vision_heads`, or OpenAI's."""
        return self.vision_heads or self._attention_width // 64

    @property
    def _attention_width(self) -> int:
        """Channels that the vision tower's attention sees; a ResNet's last stage has 32 W."""
        return self.vision_width * (1 if isinstance(self.vision_layers, int) else 32)

    @model_validator(mode="before")
    @classmethod
    def _from_passl(cls, values: Any) -> Any:
        """Take PASSL's `model:` block or `arch` dict: unwrap it, drop what is always so here."""
        if not isinstance(values, dict):
            return values
        if isinstance(values.get("architecture"), dict):
            wrapper = {"architecture", "head", "name"}
            outer = {key: value for key, value in values.items() if key not in wrapper}
            values = values["architecture"] | outer
        fixed = {"name": "CLIP", "qkv_bias": True, "proj": True}
        for key in fixed.keys() & values.keys():
            if values[key] != fixed[key]:
                raise ValueError(f"{key}: {values[key]} is not supported, only {fixed[key]}")
        values = {key: value for key, value in values.items() if key not in fixed}
        if isinstance(values.get("vision_layers"), list) and values.get("vision_patch_size") == 0:
            values["vision_patch_size"] = None  # PASSL's ResNets
        return values

    @field_validator("vision_layers", mode="before")
    @classmethod
    def _one_or_four(cls, value: Any) -> Any:
        """Turn JSON's list into a tuple; one message in place of one for each kind."""
        is_list = isinstance(value, list | tuple)
        numbers = tuple(value) if is_list else (value,)
        are_counts = all(type(number) is int and 0 < number <= 1000 for number in numbers)
        if not are_counts or len(numbers) != (4 if is_list else 1):
            found = json.dumps(value, ensure_ascii=False)[:60]
            raise ValueError(f"should be one number (a ViT) or four (a ResNet), found {found}")
        return numbers if is_list else value

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if (self.transformer_pool == "eos") != (self.transformer_eos_id is not None):
            raise ValueError("transformer_eos_id goes with transformer_pool eos, and only with it")
        side, heads = self.image_resolution, self.attention_heads
        text_width, text_heads = self.transformer_width, self.transformer_heads
        checks: list[tuple[str, int, str, int]] = [
            ("transformer_width", text_width, "transformer_heads", text_heads)
        ]
        if isinstance(self.vision_layers, int):
            if self.vision_patch_size is None:
                raise ValueError("vision_patch_size is required with a ViT, and not set")
            checks += [
                ("image_resolution", side, "vision_patch_size", self.vision_patch_size),
                ("vision_width", self.vision_width, "vision_heads", heads),
            ]
        else:
            for name in _VIT_ONLY:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} {getattr(self, name)} does not go with a ResNet")
            checks += [
                ("image_resolution", side, "a ResNet's", 32),  # it halves the side five times
                ("vision_width", self.vision_width, "a ResNet's", 2),  # its stem starts with half
                ("32 * vision_width", self._attention_width, "vision_heads", heads),
            ]
        for name, value, divisor_name, divisor in checks:
            if divisor == 0 or value % divisor:
                raise ValueError(f"{name} {value} is not a multiple of {divisor_name} {divisor}")
        for tower in ("vision", "transformer"):
            width, ratio = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_mlp_ratio")
            if int(width * ratio) < 1:
                raise ValueError(f"{tower}_mlp_ratio {ratio} of {width} leaves no hidden width")
        return self


class SourceConfig(Section):
    """Where images and captions are, and how they are arranged: docs/data.md."""

    format: Format = Field(description="how the data is arranged")
    root: str = Field(
        default="",
        description="its folder, file, pattern of shards (paths or URLs), or id on the hub",
    )
    split: str | None = Field(default=None, description="a part of it; null: the format's own")
    templates: tuple[str, ...] | None = Field(
        default=None, description="captions of class data, {} for the name; null: the format's own"
    )
    class_names: str | None = Field(
        default=None, description="a text file, a class's name a line, in the order of the labels"
    )
    image_column: str | None = Field(
        default=None, description="of a table or hub data set; null: the first usual name there is"
    )
    caption_column: str | tuple[str, ...] | None = Field(
        default=None, description="one or several, of a table, a hub data set or shards' .json"
    )
    one_caption_per_line: bool = Field(
        default=True, description="of a .txt file; false: the whole file is one caption"
    )
    label_column: str | None = Field(
        default=None, description="names the class, in place of captions; an index or a name"
    )
    streaming: bool = Field(default=False, description="read a hub data set without storing it")


class MixedSource(SourceConfig):
    """One source of a mixture; what it does not set may be inherited from the mixture."""

    weight: PositiveFloat | None = Field(
        default=None, description="its part of the samples, to the others'; null: its size"
    )
    epoch_size: Positive | None = Field(
        default=None, description="of a stream: samples that count as its size"
    )

    @model_serializer(mode="wrap")
    def _what_is_set(self, to_plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not set: read back, that would not be inherited any more."""
        values: dict[str, Any] = to_plain(self)
        return {name: value for name, value in values.items() if name in self.model_fields_set}

    @model_validator(mode="after")
    def _check(self) -> "MixedSource":
        if self.format == "mixture" or not self.root:
            raise ValueError("a source needs a root, and a format other than mixture")
        return self


class DataConfig(SourceConfig):
    """What training reads, and how it looks at it."""

    sources: tuple[MixedSource, ...] = Field(default=(), description="of format mixture")
    epoch_size: Positive | None = Field(
        default=None, description="samples that count as an epoch; null: as many as there are"
    )
    shuffle_buffer: Positive = Field(
        default=10_000, description="shards and streams are shuffled among so many samples"
    )
    augment: bool = Field(
        default=True,
        description="false: training sees an image as evaluation does, without random crops",
    )
    crop_scale: tuple[PositiveFraction, PositiveFraction] = Field(
        default=(0.9, 1.0), description="share of the image's area that a training crop keeps"
    )
    crop_ratio: tuple[Ratio, Ratio] = Field(
        default=(0.75, 1.3333333333333333), description="width over height of a training crop"
    )
    scaled_decoding: bool = Field(
        default=True, description="training may decode large JPEGs at a half, a quarter, an eighth"
    )
    mean: tuple[Fraction, Fraction, Fraction] = Field(
        default=(0.48145466, 0.4578275, 0.40821073), description="of RGB in [0, 1]"
    )
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = Field(
        default=(0.26862954, 0.26130258, 0.27577711), description="of RGB in [0, 1]"
    )
    resize: Literal["shortest", "longest", "squash"] | None = Field(
        default=None,
        description="how evaluation makes an image a square: by its short side and a crop, by its "
        "long side and a border, or regardless of its proportions; null: as the weights that are "
        "loaded, else shortest",
    )
    interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] | None = (
        Field(
            default=None,
            description="of evaluation's resize; null: as loaded weights', else bicubic",
        )
    )
    workers: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="processes that read images; 0: the training process itself; "
        "null: one per CPU core, at most 8",
    )
    cache_gigabytes: PositiveFloat = Field(
        default=50,
        description="disk for shards fetched by URL, 1e9 bytes each; the least used make room",
    )
    max_bad_fraction: Fraction = Field(
        default=0.01,
        description="share of the data set that may be unusable before the run stops",
    )
    max_pixels: Annotated[int, Field(gt=0, le=178_956_970)] = Field(
        default=178_956_970,
        description="an image of more is not decoded; Pillow decodes no larger ones",
    )

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _in_order(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"should be the least and the greatest, found {list(value)}")
        return value

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if (self.format == "mixture") != bool(self.sources):
            raise ValueError("sources: a list of format, root, weight; with format mixture only")
        given = [source.weight is not None for source in self.sources]
        if any(given) and not all(given):
            raise ValueError("sources: give every source a weight, or none")
        if not self.root and self.format != "mixture":
            raise ValueError("root is required and not set")
        return self


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


class EvaluationData(Section):
    """A data set to evaluate on; what is not given is as in `data`."""

    format: Format | None = Field(default=None, description="null: data.format")
    root: str | None = Field(default=None, description="null: data.root")
    split: str | None = Field(
        default=None,
        description="null: the format's own for evaluation; of data's root: val, valid, "
        "validation, test or dev, the first there is, if training uses another split",
    )
    templates: tuple[str, ...] | None = Field(
        default=None, description="prompts, averaged per class; null: the format's own"
    )
    class_names: str | None = Field(
        default=None, description="null: data.class_names, if format and root are data's"
    )
    image_column: str | None = Field(default=None, description="null: as class_names")
    caption_column: str | tuple[str, ...] | None = Field(
        default=None, description="null: as class_names, unless label_column is set"
    )
    label_column: str | None = Field(
        default=None, description="null: as class_names, unless caption_column is set"
    )
    one_caption_per_line: bool | None = Field(default=None, description="null: as class_names")
    limit: Positive | None = Field(
        default=None,
        description="measure a sample of this many images with all their captions; it is the same "
        "for every model and seed; null: all",
    )


class ProbeData(EvaluationData):
    """Class data for a probe, which learns from another split of it."""

    train_split: str | None = Field(
        default=None,
        description='what the probe learns from; null: "train" where there is one, else a half '
        "of each class",
    )
    shots: Positive | None = Field(
        default=None, description="images of each class that it learns from; null: all"
    )


class NeighbourData(EvaluationData):
    """Class data for a k-NN probe."""

    train_split: str | None = Field(default=None, description="as of linear_probe")
    k: Positive = Field(default=20, description="neighbours that vote")


class EvaluateConfig(Section):
    """What is measured at the end, and on the way."""

    every_epochs: Positive | None = Field(
        default=None, description="epochs between two; null: at the end"
    )
    batch_size: Positive = Field(default=256, description="most images or texts per forward pass")
    pictures: bool = Field(default=True, description="draw what was measured, and the curves")
    zero_shot: EvaluationData | None = Field(
        default=None, description="class data; null: not measured"
    )
    retrieval: EvaluationData | None = Field(default=None, description="pairs; null: not measured")
    linear_probe: ProbeData | None = Field(
        default=None, description="class data, with labels to learn from; null: not measured"
    )
    knn: NeighbourData | None = Field(default=None, description="the same for nearest neighbours")
    retention: EvaluationData | None = Field(
        default=None,
        description="what must not be forgotten, class data or pairs; measured before training too",
    )
    patience: Positive | None = Field(
        default=None,
        description="evaluations without a gain of checkpoint.best_metric that end the run; null: "
        "it goes to its end",
    )


class CheckpointConfig(Section):
    """When the state of training is written; the end of a run always is."""

    every_epochs: Positive | None = Field(default=1, description="epochs between two")
    every_steps: Positive | None = Field(default=None, description="steps between two, besides")
    keep: Annotated[int, Field(ge=2)] = Field(default=2, description="newest ones that are kept")
    best_metric: str | None = Field(
        default=None,
        description="a figure of the evaluations, such as zeroshot_top1; the checkpoint where it "
        "was highest is kept besides",
    )


class Config(Section):
    """One run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = Field(
        default=0, description="of weights, order and crops"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: cuda where there is"
    )
    tf32: bool = Field(
        default=False,
        description="on a GPU: float32 products and convolutions may round their factors to TF32 "
        "(10 bits of mantissa in place of 23), in training and evaluation; faster",
    )
    load: str | None = Field(
        default=None, description="weights to start from, with a fresh optimiser"
    )
    load_arch: str | None = Field(
        default=None, description="with load: what the weights are, a preset's name or a file"
    )
    load_partial: bool = Field(
        default=False, description="with load: keys that are missing or left over are listed"
    )
    output_dir: str = Field(default="runs/run", description="the run's folder")

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.evaluate.patience is not None:
            if self.checkpoint.best_metric is None:
                raise ValueError("evaluate.patience goes with checkpoint.best_metric; set it too")
            if self.evaluate.every_epochs is None:
                raise ValueError("evaluate.patience goes with evaluate.every_epochs; set it too")
        return self


def load_config(path: str | Path, overrides: Sequence[str] = (), **settings: Any) -> Config:
    """Read a YAML file, apply `key.path=value` overrides, then `settings` that are not None.

    Where neither sets `output_dir`, it is `runs/` and the file's name, with the weights' name where
    `load` is not the file's own: a run from weights is another one than that from scratch.

    Raises:
        ConfigError: the file or an override cannot be read, or a setting is wrong.
    """
    path = Path(path)
    if is_lfs_file(path):
        raise ConfigError(f"{path}: {LFS_POINTER}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    values = load_yaml(text, where=str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a mapping of settings, found {kind(values)}")
    load = values.get("load")
    for override in overrides:
        apply_override(values, override)
    values |= {key: value for key, value in settings.items() if value is not None}
    name = path.stem
    if isinstance(values.get("load"), str) and values["load"] != load:
        name += f"-{weights_name(values['load'])}"
    values.setdefault("output_dir", f"runs/{name}")
    return parse(Config, values, where=str(path))


def weights_name(source: str) -> str:
    """What weights are called in the name of a folder.

    A file's or folder's name, a published name (ViT-B-32), a hub id's last part; of what lies in a
    checkpoint's folder the run's name and the step.
    """
    if re.fullmatch(r"ViT-\w+/\d+(@\d+px)?", source):
        return source.replace("/", "-")
    path = PurePosixPath(source.removeprefix("hf-hub:"))
    if path.suffix in _WEIGHTS_SUFFIXES:
        path = path.with_suffix("")
    if path.name in _COMMON_NAMES and path.parent.name:
        path = path.parent
    name = path.name
    if path.parent.name == "checkpoints":
        name = f"{path.parent.parent.name}-{name}"
    return re.sub(r"[^\w.@-]+", "-", name).strip("-.") or "weights"


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `key.path=value` in nested plain values; the value is read as YAML.

    Raises:
        ConfigError: it is not of that form, or not YAML.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"-o {override}: not of the form key.path=value")
    for depth, key in enumerate(keys[:-1]):
        inner = values.setdefault(key, {})
        if inner is None:
            inner = values[key] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"-o {override}: {'.'.join(keys[: depth + 1])} is {kind(inner)}")
        values = inner
    values[keys[-1]] = load_yaml(text, where=f"-o {override}")
