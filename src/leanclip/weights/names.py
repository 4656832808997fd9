"""Tensors between OpenAI's names and another system's, by a table of rules.

A rule is a pair of patterns, ours and theirs. `*` stands for a part of a dotted name and `**` for
any parts, the same in both; `{q,k,v}` (or any three words) for three tensors that are one tensor
here, one after another, and `{q,kv}` for two, the second of twice the rows:

    Rule("visual.ln_pre.*", "vision_model.pre_layrnorm.*")
    Rule("visual.proj", "visual_projection.weight", transpose=True)
    Rule("transformer.resblocks.*.attn.in_proj_*", "text.layers.*.self_attn.{q,k,v}_proj.*")

The first rule that matches a name is applied.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from leanclip.errors import WeightsError

_PARTS = re.compile(r"\{(\w+(?:,\w+){1,2})\}")  # such as {q,k,v}


@dataclass(frozen=True)
class Rule:
    """A name here, the same name there, and how the tensor's shape differs there.

    Args:
        ours: the pattern of the name here.
        theirs: the pattern of the name there.
        transpose: matrices are transposed there.
        patches: a convolution of patches here, (D, 3, p, p), is a matrix there, (D, p * p * 3) by
            row, column, channel.
        leading: the number of leading dimensions of size 1 that it has there and not here.
    """

    ours: str
    theirs: str
    transpose: bool = False
    patches: bool = False
    leading: int = 0

    @functools.cached_property
    def parts(self) -> list[str]:
        """The names there: one, or two or three that are joined here."""
        match = _PARTS.search(self.theirs)
        words = match[1].split(",") if match else [""]
        return [_PARTS.sub(word, self.theirs) for word in words]

    def pieces(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """A tensor of the shape there, in its parts: all, a third and two, or three thirds."""
        if len(self.parts) == 1:
            return [tensor]
        third = len(tensor) // 3
        return list(tensor.split([third, 2 * third] if len(self.parts) == 2 else third))

    def shaped_here(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor from there, in the shape that it has here."""
        for _ in range(self.leading):
            tensor = tensor[0] if tensor.shape[:1] == (1,) else tensor
        if self.patches and tensor.ndim == 2:
            side = math.isqrt(tensor.shape[1] // 3)
            if 3 * side * side == tensor.shape[1]:  # else load_into names the shape
                return tensor.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)  # (D, 3, p, p)
        return tensor.t() if self.transpose and tensor.ndim == 2 else tensor

    def shaped_there(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor from here, in the shape that it has there."""
        if self.patches:
            tensor = tensor.permute(0, 2, 3, 1).flatten(1)  # (D, p * p * 3)
        elif self.transpose and tensor.ndim == 2:
            tensor = tensor.t()
        return tensor[(None,) * self.leading]


_BERT_BLOCK = (
    ("attn.in_proj_*", "attention.self.{query,key,value}.*"),
    ("attn.out_proj.*", "attention.output.dense.*"),
    ("ln_1.*", "attention.output.LayerNorm.*"),
    ("mlp.c_fc.*", "intermediate.dense.*"),
    ("mlp.c_proj.*", "output.dense.*"),
    ("ln_2.*", "output.LayerNorm.*"),
)


def bert_rules(tower: str) -> tuple[Rule, ...]:
    """The names of a text tower of transformers' BERT kind, which are under `tower` there."""
    return (
        Rule("token_embedding.weight", f"{tower}.embeddings.word_embeddings.weight"),
        Rule("positional_embedding", f"{tower}.embeddings.position_embeddings.weight"),
        Rule("token_type_embedding", f"{tower}.embeddings.token_type_embeddings.weight"),
        Rule("ln_embedding.*", f"{tower}.embeddings.LayerNorm.*"),
        *(
            Rule(f"transformer.resblocks.*.{a}", f"{tower}.encoder.layer.*.{b}")
            for a, b in _BERT_BLOCK
        ),
    )


def to_ours(tensors: Mapping[str, torch.Tensor], rules: Sequence[Rule]) -> dict[str, torch.Tensor]:
    """Tensors by OpenAI's names; those that no rule matches keep theirs.

    Raises:
        WeightsError: of tensors that are one here, some are missing.
    """
    found: dict[str, torch.Tensor] = {}
    joined: dict[str, tuple[Rule, dict[int, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        for rule, place, part in ((r, i, p) for r in rules for i, p in enumerate(r.parts)):
            if (ours := _rename(name, part, rule.ours)) is not None:
                tensor = rule.shaped_here(tensor)
                if len(rule.parts) == 1:
                    found[ours] = tensor
                else:
                    joined.setdefault(ours, (rule, {}))[1][place] = tensor
                break
        else:
            found[name] = tensor
    for ours, (rule, parts) in joined.items():
        if (count := len(rule.parts)) != len(parts):
            raise WeightsError(f"missing keys: only {len(parts)} of {count} parts of {ours}")
        found[ours] = torch.cat([parts[place] for place in range(count)])  # (3D, D) or (3D,)
    return found


def to_theirs(
    tensors: Mapping[str, torch.Tensor], rules: Sequence[Rule]
) -> dict[str, torch.Tensor]:
    """Tensors by the other system's names, contiguous.

    Raises:
        KeyError: there is no rule for a name.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        rule = next((rule for rule in rules if _rename(name, rule.ours, "") is not None), None)
        if rule is None:
            raise KeyError(name)
        tensor = rule.shaped_there(tensor)
        for part, piece in zip(rule.parts, rule.pieces(tensor), strict=True):
            found[str(_rename(name, rule.ours, part))] = piece.contiguous()
    return found


def _rename(name: str, pattern: str, target: str) -> str | None:
    """The name by another pattern; None where it does not match its own."""
    if (match := _regex(pattern).fullmatch(name)) is None:
        return None
    stars = iter(match.groups())
    return re.sub(r"\*+", lambda _: next(stars), target)


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern)
    return re.compile(escaped.replace(r"\*\*", "(.+)").replace(r"\*", "([^.]+)"))
