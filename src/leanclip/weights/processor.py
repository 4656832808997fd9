"""Hugging Face's image processors as a `Preprocess`: every field is honoured or refused by name.

    processor_config.json (its image_processor), else preprocessor_config.json -> Preprocess

A missing field has the default of the processor's class; null turns a `do_` field off. Pixels
equal those of transformers 5's PIL backend; an unknown field is an error, never ignored.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leanclip.errors import WeightsError
from leanclip.preprocess.images import CLIP_MEAN, CLIP_STD, Preprocess, Resize, rgb_triple
from leanclip.weights.files import MALFORMED, read_json

FILES = ("processor_config.json", "preprocessor_config.json")  # the first wins

_STANDARD = {"image_mean": 0.5, "image_std": 0.5}
_OPENAI = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
_SQUARE = {"height": 224, "width": 224}
_CLIP = _OPENAI | {
    "resample": 3,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "crop_size": _SQUARE,
    "do_center_crop": True,
}
_CLASSES: dict[str, dict[str, Any]] = {  # the defaults of each, by the name without its ending
    "CLIP": _CLIP,
    "ChineseCLIP": _CLIP,
    "Bit": _CLIP,
    "Siglip": _STANDARD | {"resample": 3, "size": _SQUARE, "default_to_square": False},
    "ViT": _STANDARD | {"resample": 2, "size": _SQUARE},
    "Siglip2": _STANDARD | {"resample": 2, "patch_size": 16, "max_num_patches": 256},
}
_COMMON = {
    "do_resize": True,
    "do_center_crop": False,
    "crop_size": None,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "default_to_square": True,
    # The model takes RGB in any case; transformers fails on other images without the conversion.
    "do_convert_rgb": True,
}
_WITHOUT_EFFECT = {  # on the pixels of an image that Pillow has read
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "auto_map",
    "_valid_processor_keys",
    "input_data_format",
    "return_tensors",
    "device",
    "disable_grouping",
    "image_seq_length",
    "transformers_version",
}
_ONLY = {"data_format": "channels_first", "use_square_size": False, "do_pad": False}
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def read_processor(
    folder: Path,
    resolution: int | None,
    patch_size: int | None = None,
    kind: str = "CLIPImageProcessor",
) -> Preprocess | None:
    """The preprocessing of a folder; None where it has none.

    Args:
        folder: of the processor's configuration.
        resolution: of the model, which the processor must give; None: any.
        patch_size: of a model that takes patches (NaFlex); None: it takes squares.
        kind: the processor's class where its configuration names none: that of the model.

    Raises:
        WeightsError: a file is damaged, or a field's value is not supported; names the field.
    """
    for name in FILES:
        path = folder / name
        values: Any = read_json(path) if path.is_file() else None
        if name == FILES[0] and values is not None:
            values = values.get("image_processor")  # older ones have none
        if values is not None:
            try:
                values = {
                    "image_processor_type": values.get("feature_extractor_type", kind),
                    **values,
                }
                return _from_values(values, resolution, patch_size)
            except MALFORMED as error:
                raise WeightsError(f"{path}: {error}") from None
    return None


def default_preprocess(kind: str, resolution: int, patch_size: int | None) -> Preprocess:
    """The preprocessing by the defaults of a processor's class, at a model's resolution."""
    values: dict[str, Any] = {"image_processor_type": kind}
    if patch_size is not None:
        values["patch_size"] = patch_size
    elif "shortest_edge" in _defaults(values)["size"]:
        values |= {"size": {"shortest_edge": resolution}, "crop_size": resolution}
    else:
        values["size"] = {"height": resolution, "width": resolution}
    return _from_values(values, resolution, patch_size)


def _from_values(
    values: Mapping[str, Any], resolution: int | None, patch_size: int | None
) -> Preprocess:
    """As `read_processor`; a ValueError begins with the name of the field."""
    defaults = _defaults(values)
    for name, value in values.items():
        known = name in defaults or name in _WITHOUT_EFFECT or value is None
        if not known and (name not in _ONLY or value != _ONLY[name]):
            raise ValueError(f"{name}: {value!r} is not supported")
    fields = defaults | dict(values)
    resample = fields["resample"]
    if type(resample) is not int or resample not in _RESAMPLE:
        raise ValueError(f"resample: {resample!r} is none of Pillow's, {_RESAMPLE}")
    mean, std = _mean_and_std(fields)
    pixels: dict[str, Any] = {"mean": mean, "std": std, "interpolation": _RESAMPLE[resample]}
    is_patches = "max_num_patches" in fields
    if resolution is not None and is_patches != (patch_size is not None):
        made, taken = ("patches", "squares") if is_patches else ("squares", "patches")
        kind = fields["image_processor_type"]
        raise ValueError(f"image_processor_type: {kind} makes {made}, the model takes {taken}")
    if is_patches:
        return _patches(fields, resolution, patch_size, pixels)
    resize, size = _resize(fields)
    side = _output(fields, size if resize == "squash" else None)
    which = "crop_size" if fields["do_center_crop"] else "size"
    if resolution is not None and side != resolution:
        raise ValueError(f"{which}: makes images of {side} pixels a side, the model takes "
                         f"{resolution}")  # fmt: skip
    same = size in (side, (side, side))
    size = None if same or resize == "none" else size
    return Preprocess(resolution=side, resize=resize, size=size, rounding="down", **pixels)


def _patches(
    fields: Mapping[str, Any],
    resolution: int | None,
    patch_size: int | None,
    pixels: dict[str, Any],
) -> Preprocess:
    """NaFlex: the size with the most patches, up to a number."""
    own, most = fields["patch_size"], fields["max_num_patches"]
    for name in ("patch_size", "max_num_patches"):
        if type(fields[name]) is not int or fields[name] < 1:
            raise ValueError(f"{name}: {fields[name]!r} is not a whole positive number")
    if patch_size not in (None, own):
        raise ValueError(f"patch_size: {own}, the model takes patches of {patch_size} pixels")
    if not fields["do_resize"]:
        raise ValueError("do_resize: false is not supported with patches")
    side = resolution or own * max(1, math.isqrt(most))
    return Preprocess(resolution=side, resize="naflex", patch_size=own, max_patches=most, **pixels)


def _defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of the fields of a processor's class."""
    name = values["image_processor_type"]
    if {"AutoImageProcessor", "AutoFeatureExtractor"} & dict(values.get("auto_map") or {}).keys():
        raise ValueError("auto_map: names code of the repository, which is not run")
    stem = str(name).removesuffix("Fast").removesuffix("Pil")
    stem = stem.removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    if stem not in _CLASSES:
        raise ValueError(
            f"image_processor_type: {name} is not supported; known: "
            f"{', '.join(f'{known}ImageProcessor' for known in _CLASSES)}"
        )
    return _COMMON | _CLASSES[stem]


def _resize(fields: Mapping[str, Any]) -> tuple[Resize, int | tuple[int, int] | None]:
    if not fields["do_resize"]:
        return "none", None
    size = _size(fields["size"], "size", is_square=bool(fields["default_to_square"]))
    return ("shortest", size) if isinstance(size, int) else ("squash", size)


def _size(value: Any, name: str, *, is_square: bool = True) -> int | tuple[int, int]:
    """A short side, or (height, width)."""
    if isinstance(value, bool) or value is None:
        raise ValueError(f"{name}: {value!r} is not a size")
    if isinstance(value, int):
        value = {"height": value, "width": value} if is_square else {"shortest_edge": value}
    elif isinstance(value, list | tuple) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {value!r} is not a size")
    value = {key: number for key, number in value.items() if number is not None}
    if value.keys() not in ({"shortest_edge"}, {"height", "width"}):
        raise ValueError(f"{name}: {' and '.join(sorted(value)) or 'nothing'} is not supported, "
                         f"only shortest_edge or height and width")  # fmt: skip
    numbers = list(value.values())
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError(f"{name}: {value} is not of whole positive numbers")
    return numbers[0] if len(numbers) == 1 else (value["height"], value["width"])


def _output(fields: Mapping[str, Any], squash: Any) -> int:
    """The side of the square that comes out."""
    if fields["do_center_crop"]:
        name, sides = "crop_size", _size(fields["crop_size"], "crop_size")
    else:
        name, sides = "size", squash
        if sides is None:
            missing = "do_resize" if not fields["do_resize"] else "do_center_crop"
            raise ValueError(f"{missing}: false leaves images of different proportions; the model "
                             f"takes squares")  # fmt: skip
    if not isinstance(sides, tuple) or sides[0] != sides[1]:
        raise ValueError(f"{name}: {fields[name]} is not a square, which the model takes")
    return sides[0]


def _mean_and_std(fields: Mapping[str, Any]) -> tuple[Any, Any]:
    """Those of pixels in [0, 1], whatever pixels are multiplied with there."""
    mean, std, factor = (0.0,) * 3, (1.0,) * 3, 1.0
    if fields["do_normalize"]:
        mean, std = (rgb_triple(fields[name], name) for name in ("image_mean", "image_std"))
    if fields["do_rescale"]:
        factor = fields["rescale_factor"]
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor:
            raise ValueError(f"rescale_factor: {factor!r} is not a factor")
    if not all(std):
        raise ValueError(f"image_std: {fields['image_std']} has a zero")
    if factor == 1 / 255:
        return mean, std
    scale = 255 * factor
    return tuple(m / scale for m in mean), tuple(s / scale for s in std)


def to_values(
    preprocess: Preprocess,
    kind: str = "CLIPImageProcessor",
    processor: str = "CLIPProcessor",
) -> dict[str, Any]:
    """The fields of an image processor with the same pixels, except for the crop's rounding.

    Args:
        preprocess: of the model.
        kind: the processor's class; CLIP's takes its place where it has no crop.
        processor: the class that joins it with a tokeniser.

    Raises:
        ValueError: it cannot do the same; names the field of `Preprocess`.
    """
    if preprocess.resize == "longest" or preprocess.fill:
        name = "fill" if preprocess.fill else "resize"
        raise ValueError(f"{name}: {getattr(preprocess, name)}")
    if (preprocess.resize == "naflex") != (kind == "Siglip2ImageProcessor"):
        raise ValueError(f"resize: {preprocess.resize}")
    resolution, sides = preprocess.resolution, preprocess.sides
    is_squash = preprocess.resize == "squash"
    is_cropped = not is_squash or sides != (resolution, resolution)
    values: dict[str, Any] = {
        "do_resize": preprocess.resize != "none",
        "resample": {name: n for n, name in _RESAMPLE.items()}[preprocess.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "do_convert_rgb": True,
    }
    if preprocess.resize == "naflex":
        values |= {"patch_size": preprocess.patch_size, "max_num_patches": preprocess.max_patches}
    else:
        both = {"height": sides[0], "width": sides[1]}
        values["size"] = both if is_squash else {"shortest_edge": sides[0]}
    if kind == "SiglipImageProcessor" and is_cropped:
        kind = "CLIPImageProcessor"
    if kind in ("CLIPImageProcessor", "ChineseCLIPImageProcessor"):
        values["do_center_crop"] = is_cropped
        values["crop_size"] = {"height": resolution, "width": resolution}
    return {"image_processor_type": kind, "processor_class": processor} | values
