"""Sections of settings, validated strictly from plain values (as of YAML or JSON), and dumped.

The error for an unknown setting suggests the nearest known name.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from leanclip.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
Size = Annotated[int, Field(gt=0, le=100_000_000)]  # of a model
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of a running mean
Ratio = Annotated[float, Field(gt=0, le=100)]


class Section(BaseModel):
    """A group of settings: frozen, strict types, no unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def parse(section: type[S], values: Mapping[str, Any], *, where: str) -> S:
    """Validate plain values (as from YAML or JSON) as a section.

    Raises:
        ConfigError: names the first invalid setting, what was found and what is valid.
    """
    try:
        text = json.dumps(values)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}") from None
    for key, value in _flatten(values):
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{where}: {key}: {value!r} is not UTF-8, which settings must be; rename it, or "
                f"give a link to it"
            ) from None
    try:
        # Strict JSON mode accepts lists as tuples; strict Python mode does not.
        return section.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_problem(section, error)}") from None


def to_plain(section: Section) -> dict[str, Any]:
    """A section as plain values for YAML and JSON."""
    return section.model_dump(mode="json")


def differences(old: Section, new: Section, *, ignore: Sequence[str] = ()) -> list[str]:
    """One `key.path: old there, new here` per setting that differs.

    `ignore` names settings, or whole sections, that may differ.
    """
    before, after = (dict(_flatten(to_plain(section))) for section in (old, new))
    return [
        f"{key}: {before.get(key)} there, {after.get(key)} here"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(key == name or key.startswith(f"{name}.") for name in ignore)
    ]


def _first_problem(section: type[Section], error: ValidationError) -> str:
    """The first problem as `key.path: what is wrong; what to do`."""
    problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path = ".".join(str(part) for part in problem["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    found = problem["input"]
    if problem["type"] == "extra_forbidden":
        what = f"no such setting{_suggestion(section, path)}"
    elif problem["type"] == "missing":
        what = "is required and not set"
    elif problem["type"] == "value_error":
        what = problem["msg"].removeprefix("Value error, ")
    else:
        wanted = problem["msg"].removeprefix("Input should be ")
        what = f"should be {wanted}, found {kind(found)}"
    return f"{path}: {what}{more}" if path else f"{what}{more}"


def _suggestion(section: type[Section], path: str) -> str:
    """`; did you mean x?` for the nearest path, or the nearest last name; may be empty."""
    known = list(paths(section))
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.75)
    if not close:
        by_name = {name.rpartition(".")[2]: name for name in reversed(known)}
        last = difflib.get_close_matches(path.rpartition(".")[2], by_name, n=1, cutoff=0.6)
        close = [by_name[name] for name in last]
    return f"; did you mean {close[0]}?" if close else ""


def paths(section: type[Section], prefix: str = "") -> list[str]:
    """The paths of all settings, such as `train.epochs`."""
    found = []
    for name, field in section.model_fields.items():
        found.append(prefix + name)
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, Section):
                found += paths(part, f"{prefix}{name}.")
    return found


def _flatten(values: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(values, dict):
        return [(prefix, values)]
    return [
        item
        for key, value in values.items()
        for item in _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    ]


def kind(value: Any) -> str:
    """A value as shown in messages."""
    names = {dict: "a group of settings", list: "a list", type(None): "null"}
    return names.get(type(value)) or json.dumps(value, ensure_ascii=False)[:60]
