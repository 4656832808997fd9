"""Hugging Face's CLIPModel: config.json, safetensors or bin in one file or several, processor.

Projections are transposed there, and queries, keys and values are separate.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from leanclip.config.model import ModelConfig
from leanclip.config.sections import parse
from leanclip.errors import ConfigError, WeightsError
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.text import Tokenizer
from leanclip.preprocess.tokenizer import END, START, VOCAB_SIZE, merges, vocabulary
from leanclip.weights.files import MALFORMED, find_file, read_json
from leanclip.weights.names import Rule, to_ours, to_theirs
from leanclip.weights.processor import read_processor, to_values
from leanclip.weights.state_dict import read_state_dict
from leanclip.weights.weights import Weights, mlp_ratio, square_side

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}

FILES = ("model.safetensors", "pytorch_model.bin")  # or an index of shards of such a name

_TOKENIZER_CLASSES = (None, "CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast")
_OTHER_TOKENIZERS = ("vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")

_TOWERS = {"visual.transformer": "vision_model.encoder", "transformer": "text_model.encoder"}
_BLOCK = (
    ("ln_1.*", "layer_norm1.*"),
    ("ln_2.*", "layer_norm2.*"),
    ("mlp.c_fc.*", "mlp.fc1.*"),
    ("mlp.c_proj.*", "mlp.fc2.*"),
    ("attn.out_proj.*", "self_attn.out_proj.*"),
    ("attn.in_proj_*", "self_attn.{q,k,v}_proj.*"),
)
RULES = (
    Rule("logit_scale", "logit_scale"),
    Rule("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    Rule("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    Rule("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    Rule("visual.ln_pre.*", "vision_model.pre_layrnorm.*"),
    Rule("visual.ln_post.*", "vision_model.post_layernorm.*"),
    Rule("visual.proj", "visual_projection.weight", transpose=True),
    Rule("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    Rule("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    Rule("ln_final.*", "text_model.final_layer_norm.*"),
    Rule("text_projection", "text_projection.weight", transpose=True),
    *(
        Rule(f"{tower}.resblocks.*.{ours}", f"{encoder}.layers.*.{theirs}")
        for tower, encoder in _TOWERS.items()
        for ours, theirs in _BLOCK
    ),
)

_ONLY_DEFAULT = ("pre_norm", "patch_bias", "vision_pool", "transformer_causal")
_SETTINGS = (  # ours, the section there, its field, its default
    ("image_resolution", "vision_config", "image_size", 224),
    ("vision_patch_size", "vision_config", "patch_size", 32),
    ("vision_layers", "vision_config", "num_hidden_layers", 12),
    ("vision_width", "vision_config", "hidden_size", 768),
    ("vision_heads", "vision_config", "num_attention_heads", 12),
    ("context_length", "text_config", "max_position_embeddings", 77),
    ("vocab_size", "text_config", "vocab_size", VOCAB_SIZE),
    ("transformer_layers", "text_config", "num_hidden_layers", 12),
    ("transformer_width", "text_config", "hidden_size", 512),
    ("transformer_heads", "text_config", "num_attention_heads", 8),
)


def is_folder(folder: Path) -> bool:
    """Whether a folder is in this format."""
    file = folder / "config.json"
    return file.is_file() and read_json(file).get("model_type") == "clip"


def is_state_dict(names: Collection[str]) -> bool:
    """Whether tensors have this format's names."""
    return any(name.startswith("vision_model.") for name in names)


def from_state_dict(
    source: Path, tensors: Mapping[str, torch.Tensor], model: ModelConfig | None
) -> Weights:
    """Weights of tensors alone, which do not determine their activation.

    Raises:
        WeightsError: some of a block's queries, keys and values are missing.
    """
    counters = ".position_ids"  # from 0, stored by old versions
    theirs = {name: tensor for name, tensor in tensors.items() if not name.endswith(counters)}
    return Weights(source, "hf", to_ours(theirs, RULES), model)


def read_folder(folder: Path, arch: ModelConfig | None) -> Weights:
    """Read a folder in this format; `arch` takes the place of its config.json.

    Raises:
        WeightsError: a file is missing or damaged, or the architecture is not CLIPModel's.
    """
    file = find_file(folder, FILES)
    if file is None:
        raise WeightsError(f"{folder}: has config.json, but none of {', '.join(FILES)}")
    tensors, unexpected = read_state_dict(file)
    check_tokenizer(folder)
    model = arch or _architecture(folder / "config.json", read_json(folder / "config.json"))
    notes = ()
    if model.transformer_eos_id not in (None, END) and model.vocab_size >= VOCAB_SIZE:
        notes = (
            f"its eos_token_id is {model.transformer_eos_id}, CLIP's tokeniser ends texts with "
            f"{END}: they are all read at their first token, as in transformers",
        )
    own = None if arch else model.image_resolution  # images are resized for another architecture
    preprocess = read_processor(folder, own) or Preprocess(model.image_resolution, rounding="down")
    weights = from_state_dict(folder, tensors, model)
    return replace(weights, preprocess=preprocess, notes=notes, unexpected=unexpected)


def read_preprocess(folder: Path) -> Preprocess | None:
    """The preprocessing of a folder in this format; None where it has none.

    Raises:
        WeightsError: it is damaged, or not supported.
    """
    return read_processor(folder, None)


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokeniser of a folder in this format; None: CLIP's.

    Raises:
        WeightsError: it is damaged, or not supported.
    """
    return None


def write(folder: Path, weights: Weights, model: ModelConfig, preprocess: Preprocess) -> None:
    """Write a folder for transformers' CLIPModel and CLIPProcessor.

    Raises:
        WeightsError: CLIPModel has no equivalent of something in the architecture.
    """
    if not isinstance(model.vision_layers, int):
        raise WeightsError(f"{weights.source}: Hugging Face's CLIPModel cannot hold a ResNet")
    known = {name: (ModelConfig.model_fields[name].default,) for name in _ONLY_DEFAULT}
    for name, values in (known | {"transformer_pool": ("argmax", "eos")}).items():
        if getattr(model, name) not in values:
            raise WeightsError(
                f"{weights.source}: CLIPModel cannot hold {name}: {getattr(model, name)}"
            )
    try:
        processor = to_values(preprocess)
    except ValueError as error:
        raise WeightsError(f"{weights.source}: CLIPImageProcessor has no {error}") from None
    try:
        tensors = to_theirs(weights.tensors, RULES)
    except KeyError as error:
        raise WeightsError(f"{weights.source}: CLIPModel has no place for {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    files = {
        "config.json": _config(model, next(iter(tensors.values())).dtype),
        "processor_config.json": {"image_processor": processor, "processor_class": "CLIPProcessor"},
        "preprocessor_config.json": processor,  # for transformers before 5
        "vocab.json": vocabulary(),
        "tokenizer_config.json": _tokenizer(model),
        "special_tokens_map.json": _special_tokens(),
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *merges())) + "\n")


def check_tokenizer(folder: Path) -> None:
    """Check that a folder's tokeniser, if it has one, is CLIP's.

    Raises:
        WeightsError: it is another one, with other ids; names the file.
    """

    def values_of(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).is_file() else {}

    def check(name: str, what: str, is_clips: bool) -> None:
        if not is_clips:
            raise WeightsError(
                f"{folder / name}: {what} is not CLIP's; leanclip has no other tokeniser yet"
            )

    for name in _OTHER_TOKENIZERS:
        check(name, "this tokeniser", not (folder / name).is_file())
    kind = values_of("tokenizer_config.json").get("tokenizer_class")
    check("tokenizer_config.json", f"tokenizer_class {kind}", kind in _TOKENIZER_CLASSES)
    known = vocabulary()
    check("vocab.json", "this vocabulary", values_of("vocab.json") in ({}, known))
    if (folder / "merges.txt").is_file():
        pairs = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
        check("merges.txt", "the tokeniser of these merges", _are_clips(pairs))
    if fast := values_of("tokenizer.json"):
        model = fast.get("model") or {}
        check("tokenizer.json", "this vocabulary", model.get("vocab") == known)
        pairs = [" ".join(m) if isinstance(m, list) else m for m in model.get("merges") or ()]
        check("tokenizer.json", "the tokeniser of these merges", _are_clips(pairs))
    added = {one.get("content"): one.get("id") for one in fast.get("added_tokens") or ()}
    for name, ids in (
        ("tokenizer.json", added),
        ("added_tokens.json", values_of("added_tokens.json")),
    ):
        more = [word for word, id_ in ids.items() if known.get(word) != id_]
        check(name, f"the tokeniser, to which it adds {', '.join(map(repr, more[:3]))},", not more)


def _are_clips(found: list[str]) -> bool:
    """Whether merges begin with CLIP's; its vocabulary cannot use others."""
    return found[: len(merges())] == merges()


def _architecture(where: Path, values: dict[str, Any]) -> ModelConfig:
    try:
        sections = {name: _section(values, name) for name in ("vision_config", "text_config")}
        vision, text = sections.values()
        activations = {section.get("hidden_act", "quick_gelu") for section in (vision, text)}
        if len(activations) != 1 or not activations <= ACTIVATIONS.keys():
            raise ValueError(f"hidden_act: {sorted(activations)} is not supported")
        if any(section.get("layer_norm_eps", 1e-5) != 1e-5 for section in (vision, text)):
            raise ValueError("layer_norm_eps: must be 1e-5")
        if vision.get("num_channels", 3) != 3:
            raise ValueError(f"num_channels: {vision['num_channels']} is not supported")
        arch = {
            ours: sections[section].get(theirs, default)
            for ours, section, theirs, default in _SETTINGS
        }
        arch |= {
            "embed_dim": values.get("projection_dim", 512),
            "image_resolution": square_side("image_size", arch["image_resolution"]),
            "vision_patch_size": square_side("patch_size", arch["vision_patch_size"]),
            "vision_mlp_ratio": mlp_ratio(
                arch["vision_width"], vision.get("intermediate_size", 3072)
            ),
            "transformer_mlp_ratio": mlp_ratio(
                arch["transformer_width"], text.get("intermediate_size", 2048)
            ),
            "activation": ACTIVATIONS[activations.pop()],
            **_text_pool(text),
        }
        return parse(ModelConfig, arch, where="model")
    except (*MALFORMED, ConfigError) as error:
        raise WeightsError(f"{where}: not CLIPModel's: {error}") from None


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A tower's settings: those of `NAME_dict`, an older form, if present.

    As in transformers 5, the fields that it omits then have their defaults, whatever is in `NAME`.
    """
    older = values.get(f"{name}_dict")
    return dict((values.get(name) or {}) if older is None else older)


def _text_pool(text: dict[str, Any]) -> dict[str, Any]:
    """Where the text is pooled: at the first `eos_token_id`; 2 means at the highest id."""
    end = text.get("eos_token_id", END)
    if type(end) is not int:
        raise ValueError(f"text_config.eos_token_id: {end!r} is not a token id")
    if end in (2, text.get("vocab_size", VOCAB_SIZE) - 1):  # the last id is the highest
        return {"transformer_pool": "argmax"}
    return {"transformer_pool": "eos", "transformer_eos_id": end}


def _config(model: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[model.activation]
    both = {"hidden_act": activation, "layer_norm_eps": 1e-5, "projection_dim": model.embed_dim}
    vision_hidden = int(model.vision_width * model.vision_mlp_ratio)
    text_hidden = int(model.transformer_width * model.transformer_mlp_ratio)
    vision = {"model_type": "clip_vision_model", "intermediate_size": vision_hidden} | both
    text = {"model_type": "clip_text_model", "intermediate_size": text_hidden} | both
    sections: dict[str, dict[str, Any]] = {"vision_config": vision, "text_config": text}
    for ours, section, theirs, _ in _SETTINGS:
        sections[section][theirs] = getattr(model, ours)
    vision |= {"num_attention_heads": model.attention_heads, "num_channels": 3}
    text |= {
        "bos_token_id": model.vocab_size - 2,
        "eos_token_id": _eos_token_id(model),
        "pad_token_id": 0,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": str(dtype).removeprefix("torch."),
        "projection_dim": model.embed_dim,
        "logit_scale_init_value": 2.6592,
        **sections,
    }


def _eos_token_id(model: ModelConfig) -> int:
    """The id that makes CLIPModel pool a text where the model does; 2: at the highest id."""
    if model.transformer_eos_id is not None:
        return model.transformer_eos_id
    return END if model.vocab_size == VOCAB_SIZE else 2


def _special_tokens() -> dict[str, str]:
    words = {id_: word for word, id_ in vocabulary().items() if id_ in (START, END)}
    end = words[END]
    return {"bos_token": words[START], "eos_token": end, "unk_token": end, "pad_token": end}


def _tokenizer(model: ModelConfig) -> dict[str, Any]:
    return _special_tokens() | {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": model.context_length,
        "do_lower_case": True,
    }
