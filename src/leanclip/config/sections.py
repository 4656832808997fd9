"""Groups of settings: strict about types and names, read from plain values and written to them.

Unknown settings fail with the nearest known name.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from leanclip.errors import ConfigError


class Section(BaseModel):
    """A group of settings: frozen, and strict about types and names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def parse(section: type[S], values: Mapping[str, Any], *, where: str) -> S:
    """Check plain values (as from YAML or JSON) against a section.

    Raises:
        ConfigError: names the first setting that is wrong, what was found and what is known.
    """
    try:
        text = json.dumps(values)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}") from None
    for key, value in _flatten(values):
        if isinstance(value, str) and not _is_unicode(value):
            raise ConfigError(
                f"{where}: {key}: {value!r} is not UTF-8, which settings are; rename it, or give "
                f"a link to it"
            )
    try:
        # JSON mode takes lists for tuples and nothing else; Python mode has no such strictness.
        return section.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_problem(section, error)}") from None


def to_plain(section: Section) -> dict[str, Any]:
    """A section as plain values that YAML and JSON can hold."""
    return section.model_dump(mode="json")


def differences(old: Section, new: Section, *, ignore: Sequence[str] = ()) -> list[str]:
    """One `key.path: old there, new here` per setting that differs.

    Settings in `ignore`, and in the groups of settings it names, are passed over.
    """
    before, after = (dict(_flatten(to_plain(section))) for section in (old, new))
    return [
        f"{key}: {before.get(key)} there, {after.get(key)} here"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(key == name or key.startswith(f"{name}.") for name in ignore)
    ]


def _first_problem(section: type[Section], error: ValidationError) -> str:
    """The first thing wrong, as `key.path: what is wrong; what to do`."""
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
    """`; did you mean x?` by the whole path, or by the last name alone."""
    known = list(paths(section))
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.75)
    if not close:
        by_name = {name.rpartition(".")[2]: name for name in reversed(known)}
        last = difflib.get_close_matches(path.rpartition(".")[2], by_name, n=1, cutoff=0.6)
        close = [by_name[name] for name in last]
    return f"; did you mean {close[0]}?" if close else ""


def paths(section: type[Section], prefix: str = "") -> list[str]:
    """The names of all settings, `group.name` for those within groups."""
    found = []
    for name, field in section.model_fields.items():
        found.append(prefix + name)
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, Section):
                found += paths(part, f"{prefix}{name}.")
    return found


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a name in another encoding
        return False
    return True


def _flatten(values: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(values, dict):
        return [(prefix, values)]
    return [
        item
        for key, value in values.items()
        for item in _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    ]


def kind(value: Any) -> str:
    """A value as a message shows it."""
    names = {dict: "a group of settings", list: "a list", type(None): "null"}
    return names.get(type(value)) or json.dumps(value, ensure_ascii=False)[:60]
