"""YAML by the core schema of version 1.2: a text -> plain values, and back.

`5e-4` is a number, `no` and `12:30` are strings. Duplicate keys, aliases, tags and deep nesting are
errors that name the line.
"""

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from leanclip.errors import ConfigError

Resolvers = dict[str, list[tuple[str, re.Pattern[str]]]]


def load_yaml(text: str, *, where: str) -> Any:
    """Plain values of a YAML text, by the core schema of YAML 1.2.

    Raises:
        ConfigError: not YAML; or a duplicate key, an alias, a tag or nesting over 20 levels.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None


def dump_yaml(values: Any) -> str:
    """Plain values as YAML, in the order given."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


_MAX_DEPTH = 20


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases, tags, duplicate keys, and the implicit types of YAML 1.1."""

    yaml_implicit_resolvers: Resolvers = {}  # noqa: RUF012, as PyYAML declares it
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(
                None, None, "aliases are not supported: write it out", self.peek_event().start_mark
            )
        if getattr(self.peek_event(), "tag", None) is not None:
            raise ComposerError(
                None, None, "tags are not supported: remove it", self.peek_event().start_mark
            )
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise ComposerError(
                None, None, f"nested over {_MAX_DEPTH} levels", self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is None or name in seen:
                what = "a key must be a string" if name is None else f"{name}: set twice"
                raise ConstructorError(None, None, what, key.start_mark)
            seen.add(name)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes by the loader's rules."""

    yaml_implicit_resolvers: Resolvers = {}  # noqa: RUF012, as PyYAML declares it

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), _first
        )
# YAML 1.1's constructor reads 0123 as octal; in the core schema it is decimal.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Loader.add_constructor(
    "tag:yaml.org,2002:float",
    lambda _, node: float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan")),
)
