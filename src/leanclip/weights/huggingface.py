"""Hugging Face's CLIPModel: config.json, safetensors or bin in one file or several, processor.

Projections are transposed there, and queries, keys and values stand apart.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from leanclip.config.model import ModelConfig
from leanclip.config.sections import parse
from leanclip.errors import ConfigError, WeightsError
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.tokenizer import END, START, VOCAB_SIZE, merges, vocabulary
from leanclip.weights.processor import read_processor, to_values
from leanclip.weights.state_dict import find_file, read_json, read_state_dict
from leanclip.weights.weights import Weights, mlp_ratio, square_side

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}

FILES = ("model.safetensors", "pytorch_model.bin")  # or an index of shards of such a name

_OTHER_TOKENIZERS = ("vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")

_NAMES = {  # ours -> theirs; blocks apart
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
}
_TRANSPOSED = ("visual.proj", "text_projection")
_TOWERS = {"visual.transformer.resblocks": "vision_model", "transformer.resblocks": "text_model"}
_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OUR_NAMES, _OUR_TOWERS, _OUR_PARTS = (
    {theirs: ours for ours, theirs in table.items()} for table in (_NAMES, _TOWERS, _PARTS)
)


def read_folder(folder: Path, facts: dict[str, Any], arch: ModelConfig | None) -> Weights:
    """Read a folder whose config.json holds `facts`.

    Raises:
        WeightsError: a file is missing or damaged, or the architecture is not CLIPModel's.
    """
    file = find_file(folder, FILES)
    if file is None:
        raise WeightsError(f"{folder}: has config.json, but none of {', '.join(FILES)}")
    theirs, unexpected = read_state_dict(file)
    check_tokenizer(folder)
    model = arch or _architecture(folder, facts)
    notes = ()
    if model.transformer_eos_id not in (None, END) and model.vocab_size >= VOCAB_SIZE:
        notes = (
            f"its eos_token_id is {model.transformer_eos_id}, CLIP's tokeniser ends texts with "
            f"{END}: they are all read at their first token, as in transformers",
        )
    tensors = to_openai(folder, theirs)
    own = None if arch else model.image_resolution  # another one's images are fitted to it
    preprocess = read_processor(folder, own) or Preprocess(model.image_resolution, rounding="down")
    return Weights(folder, "hf", tensors, model, preprocess, notes=notes, unexpected=unexpected)


def write(folder: Path, weights: Weights, model: ModelConfig, preprocess: Preprocess) -> None:
    """A folder that transformers' CLIPModel and CLIPProcessor load.

    Raises:
        WeightsError: CLIPModel has no place for something in the architecture.
    """
    if not isinstance(model.vision_layers, int):
        raise WeightsError(f"{weights.source}: Hugging Face's CLIPModel cannot hold a ResNet")
    default = ModelConfig.model_fields
    if model.transformer_pool not in ("argmax", "eos"):
        raise WeightsError(
            f"{weights.source}: CLIPModel cannot hold transformer_pool: {model.transformer_pool}"
        )
    for name in ("pre_norm", "patch_bias", "vision_pool", "transformer_causal"):
        if getattr(model, name) != default[name].default:
            raise WeightsError(
                f"{weights.source}: CLIPModel cannot hold {name}: {getattr(model, name)}"
            )
    try:
        processor = to_values(preprocess)
    except ValueError as error:
        raise WeightsError(f"{weights.source}: CLIPImageProcessor has no {error}") from None
    try:
        tensors = _from_openai(weights.tensors)
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
    """See that a folder's tokeniser, where it has one, is CLIP's.

    Raises:
        WeightsError: it is another, whose texts would have other ids; names the file.
    """
    refused = "is not CLIP's; leanclip has no other tokeniser yet"
    for name in _OTHER_TOKENIZERS:
        if (folder / name).is_file():
            raise WeightsError(f"{folder / name}: this tokeniser {refused}")
    path = folder / "tokenizer_config.json"
    kind = read_json(path).get("tokenizer_class") if path.is_file() else None
    if kind not in (None, "CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast"):
        raise WeightsError(f"{path}: tokenizer_class {kind} {refused}")
    known, path = vocabulary(), folder / "vocab.json"
    if path.is_file() and read_json(path) != known:
        raise WeightsError(f"{path}: this vocabulary {refused}")
    path = folder / "tokenizer.json"
    values = read_json(path) if path.is_file() else {}
    model = values.get("model") or {}
    if values and model.get("vocab") != known:
        raise WeightsError(f"{path}: this vocabulary {refused}")
    pairs = [" ".join(m) if isinstance(m, list) else m for m in model.get("merges") or ()]
    if values and not _are_clips(pairs):
        raise WeightsError(f"{path}: these merges are of a tokeniser that {refused}")
    path = folder / "merges.txt"
    if path.is_file() and not _are_clips(path.read_text(encoding="utf-8").split("\n")[1:]):
        raise WeightsError(f"{path}: these merges are of a tokeniser that {refused}")
    path = folder / "tokenizer.json"
    added = {one.get("content"): one.get("id") for one in values.get("added_tokens") or ()}
    path = path if added else folder / "added_tokens.json"
    added |= read_json(path) if path.name == "added_tokens.json" and path.is_file() else {}
    if more := [word for word, id_ in added.items() if known.get(word) != id_]:
        raise WeightsError(f"{path}: it adds {', '.join(map(repr, more[:3]))}, so the tokeniser "
                           f"{refused}")  # fmt: skip


def _are_clips(found: list[str]) -> bool:
    """Whether these merges begin with CLIP's, which are all that its vocabulary can use."""
    return found[: len(merges())] == merges()


def to_openai(source: Path, theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by OpenAI's names; what is unknown keeps its own."""
    tensors, left = {}, dict(theirs)
    for name in [n for n in left if n.endswith(".position_ids")]:
        del left[name]  # a counter from 0, stored by old versions
    for name in list(left):
        ours = _our_name(name)
        if ours is not None:
            tensor = left.pop(name)
            tensors[ours] = tensor.T if ours in _TRANSPOSED else tensor
    pattern = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)")
    for name in list(left):
        if match := pattern.fullmatch(name):
            tower, number, kind = match.groups()
            block = f"{_OUR_TOWERS[f'{tower}_model']}.{number}.attn.in_proj_{kind}"
            parts = [left.pop(name.replace("q_proj", f"{part}_proj"), None) for part in "qkv"]
            present = [part for part in parts if part is not None]
            if len(present) != 3:
                raise WeightsError(f"{source}: keys are missing beside {name}")
            tensors[block] = torch.cat(present)  # (3D, D) or (3D,)
    return tensors | left  # what is left over is named when it is put into a model


def _from_openai(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    theirs = {}
    for name, tensor in tensors.items():
        tower = next((t for t in _TOWERS if name.startswith(f"{t}.")), None)
        if tower is None:
            stem, _, kind = name.rpartition(".")
            new = _NAMES.get(name) or f"{_NAMES[stem]}.{kind}"
            theirs[new] = (tensor.T if name in _TRANSPOSED else tensor).contiguous()
            continue
        number, _, part = name.removeprefix(f"{tower}.").partition(".")
        block = f"{_TOWERS[tower]}.encoder.layers.{number}"
        if part.startswith("attn.in_proj_"):
            kind = part.removeprefix("attn.in_proj_")
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                theirs[f"{block}.self_attn.{letter}_proj.{kind}"] = third.contiguous()
        else:
            stem, _, kind = part.rpartition(".")
            theirs[f"{block}.{_PARTS[stem]}.{kind}"] = tensor.contiguous()
    return theirs


def _our_name(name: str) -> str | None:
    """OpenAI's name for one of theirs; None for queries, keys, values and what is unknown."""
    if name in _OUR_NAMES:
        return _OUR_NAMES[name]
    stem, _, kind = name.rpartition(".")
    if stem in _OUR_NAMES:
        return f"{_OUR_NAMES[stem]}.{kind}"
    if match := re.fullmatch(r"(vision_model|text_model)\.encoder\.layers\.(\d+)\.(.+)", stem):
        tower, number, part = match.groups()
        ours = _OUR_PARTS.get(part)
        return f"{_OUR_TOWERS[tower]}.{number}.{ours}.{kind}" if ours else None
    return None


def _architecture(folder: Path, values: dict[str, Any]) -> ModelConfig:
    where = folder / "config.json"
    try:
        vision, text = (_section(values, name) for name in ("vision_config", "text_config"))
        activations = {vision.get("hidden_act", "quick_gelu"), text.get("hidden_act", "quick_gelu")}
        if len(activations) != 1 or not activations <= ACTIVATIONS.keys():
            raise ValueError(f"hidden_act: {sorted(activations)} is not supported")
        for section in (vision, text):
            if section.get("layer_norm_eps", 1e-5) != 1e-5:
                raise ValueError("layer_norm_eps: must be 1e-5")
        if vision.get("num_channels", 3) != 3:
            raise ValueError(f"num_channels: {vision['num_channels']} is not supported")
        vision_width, text_width = vision.get("hidden_size", 768), text.get("hidden_size", 512)
        arch = {
            "embed_dim": values.get("projection_dim", 512),
            "image_resolution": square_side("image_size", vision.get("image_size", 224)),
            "vision_layers": vision.get("num_hidden_layers", 12),
            "vision_width": vision_width,
            "vision_heads": vision.get("num_attention_heads", 12),
            "vision_patch_size": square_side("patch_size", vision.get("patch_size", 32)),
            "vision_mlp_ratio": mlp_ratio(vision_width, vision.get("intermediate_size", 3072)),
            "context_length": text.get("max_position_embeddings", 77),
            "vocab_size": text.get("vocab_size", VOCAB_SIZE),
            "transformer_width": text_width,
            "transformer_heads": text.get("num_attention_heads", 8),
            "transformer_layers": text.get("num_hidden_layers", 12),
            "transformer_mlp_ratio": mlp_ratio(text_width, text.get("intermediate_size", 2048)),
            "activation": ACTIVATIONS[activations.pop()],
            **_text_pool(text),
        }
        return parse(ModelConfig, arch, where="model")
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise WeightsError(f"{where}: not CLIPModel's: {error}") from None
    except ConfigError as error:
        raise WeightsError(f"{where}: not CLIPModel's: {error}") from None


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A tower's settings: of `NAME_dict`, an older form, where it is there.

    As in transformers 5 even a field that it leaves out then has its default, whatever `NAME`
    says.
    """
    older = values.get(f"{name}_dict")
    return dict((values.get(name) or {}) if older is None else older)


def _text_pool(text: dict[str, Any]) -> dict[str, Any]:
    """Where the text is read: at the first `eos_token_id`; 2 stands for the highest id."""
    end = text.get("eos_token_id", END)
    if type(end) is not int:
        raise ValueError(f"text_config.eos_token_id: {end!r} is not a token id")
    if end in (2, text.get("vocab_size", VOCAB_SIZE) - 1):  # the last id is the highest
        return {"transformer_pool": "argmax"}
    return {"transformer_pool": "eos", "transformer_eos_id": end}


def _config(model: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[model.activation]
    both = {"hidden_act": activation, "layer_norm_eps": 1e-5, "projection_dim": model.embed_dim}
    text_width, width = model.transformer_width, model.vision_width
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": str(dtype).removeprefix("torch."),
        "projection_dim": model.embed_dim,
        "logit_scale_init_value": 2.6592,
        "text_config": both
        | {
            "model_type": "clip_text_model",
            "vocab_size": model.vocab_size,
            "hidden_size": text_width,
            "intermediate_size": int(text_width * model.transformer_mlp_ratio),
            "num_hidden_layers": model.transformer_layers,
            "num_attention_heads": model.transformer_heads,
            "max_position_embeddings": model.context_length,
            "bos_token_id": model.vocab_size - 2,
            "eos_token_id": _eos_token_id(model),
            "pad_token_id": 0,
        },
        "vision_config": both
        | {
            "model_type": "clip_vision_model",
            "hidden_size": width,
            "intermediate_size": int(width * model.vision_mlp_ratio),
            "num_hidden_layers": model.vision_layers,
            "num_attention_heads": model.attention_heads,
            "image_size": model.image_resolution,
            "patch_size": model.vision_patch_size,
            "num_channels": 3,
        },
    }


def _eos_token_id(model: ModelConfig) -> int:
    """What makes CLIPModel read a text where the model does; 2: at the highest id."""
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
