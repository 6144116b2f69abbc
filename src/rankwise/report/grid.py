"""A layer's place in a picture of the model: block numbers down, kinds of module across.

The rule reads only module paths, so it needs no list of architectures. The first number in a path is the block's
number. The part before it names the stack, and the part after it names the kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from rankwise.run.summary import LayerRank

# Containers whose number is the block's even inside numbered stages: Swin's `layers.0.blocks.1`, a UNet's
# `down_blocks.0.attentions.1.transformer_blocks.0`.
_BLOCKS = {"block", "blocks", "resblocks", "transformer_blocks"}

_CROSS = re.compile(r"encoder_attn|encdecattention|cross|attn2")
_ATTENTION = re.compile(r"att")
# By the last part of a kind: query, key, value, all others, output.
_ATTENTION_ROLES = (
    ("q", "query", "q_proj", "q_lin", "to_q", "query_proj", "wq"),
    ("k", "key", "k_proj", "k_lin", "to_k", "key_proj", "wk"),
    ("v", "value", "v_proj", "v_lin", "to_v", "value_proj", "wv"),
    ("",),
    ("o", "o_proj", "out_proj", "out_lin", "dense", "c_proj", "wo"),
)
_MLP_ROLES = (
    ("gate", "gate_proj", "w1", "wi_0"),
    ("up", "up_proj", "fc1", "lin1", "c_fc", "intermediate", "wi", "wi_1", "w3"),
    ("",),
    ("down", "down_proj", "fc2", "lin2", "c_proj", "wo", "w2"),
)


class GridPosition(NamedTuple):
    """A layer's place in a picture of the model.

    Args:
        stack: the path before the block's number.
        layer: the block's number in the stack; None for a layer outside every stack.
        kind: the kind of module in the block.
    """

    stack: str
    layer: int | None
    kind: str


def grid_position(path: str) -> GridPosition:
    """Read a layer's place from its module path.

    Args:
        path: a module path such as ``"model.layers.3.self_attn.q_proj"``.

    Returns:
        The path before the block's number, that number, and the path after it. A path without a number has the
        stack ``""``, the layer None and itself as its kind. If nothing follows the number, as in an
        ``nn.Sequential``, the container's name is the kind.

    Example:
        >>> grid_position("model.layers.3.self_attn.q_proj")
        GridPosition(stack='model.layers', layer=3, kind='self_attn.q_proj')
        >>> grid_position("decoder.block.1.layer.2.DenseReluDense.wi")
        GridPosition(stack='decoder.block', layer=1, kind='DenseReluDense.wi')
        >>> grid_position("pooler.dense")
        GridPosition(stack='', layer=None, kind='pooler.dense')
    """
    parts = path.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdecimal()]
    if not numbers:
        return GridPosition("", None, path)
    inner = [
        at
        for at in numbers
        if at and parts[at - 1] in _BLOCKS and not all(part.isdecimal() for part in parts[at + 1 :])
    ]
    at = inner[-1] if inner else numbers[0]
    rest = parts[at + 1 :]
    if len(rest) > 2 and rest[0] == "layer" and rest[1].isdecimal():  # T5 also numbers the parts of a block
        rest = rest[2:]
    kind = ".".join(rest) or (parts[at - 1] if at else "layer")
    return GridPosition(".".join(parts[:at]), int(parts[at]), kind)


@dataclass(frozen=True)
class RankGrid:
    """One table of the picture.

    Args:
        title: the stack, with ``*`` for the numbers of outer stages; a fixed title for layers outside every stack.
        rows: a label for each row, from the top: a block number, or the whole path for layers outside every stack.
        columns: the kinds of module, attention first; a single ``""`` for layers outside every stack.
        cells: the layer at (row, column), without an entry where the model has no layer.
    """

    title: str
    rows: list[str]
    columns: list[str]
    cells: dict[tuple[int, int], LayerRank]

    @property
    def loose(self) -> bool:
        """Whether these are the layers outside every stack, one per row."""
        return self.columns == [""]


def rank_grids(layers: Iterable[LayerRank]) -> list[RankGrid]:
    """Lay out a model's layers: one grid for each stack of blocks, and one for the layers outside every stack.

    Experts of a mixture have one grid for each of their parameters, with one column per expert.

    Example:
        >>> paths = [f"h.{number}.{kind}" for kind in ("fc", "attn") for number in (0, 10, 1)]
        >>> layers = [LayerRank(path, 4, 8, 0.0, 64) for path in paths]
        >>> [grid] = rank_grids(layers)
        >>> grid.title, grid.rows, grid.columns
        ('h', ['0', '1', '10'], ['attn', 'fc'])
        >>> paths = [f"h.{number}.experts.up.{expert}" for number in (0, 1) for expert in range(4)]
        >>> [grid] = rank_grids([LayerRank(path, 4, 8, 0.0, 64) for path in paths])
        >>> grid.title, grid.rows, grid.columns
        ('h.*.experts.up', ['0', '1'], ['0', '1', '2', '3'])
    """
    layers = list(layers)
    experts = _expert_kinds(grid_position(layer.path).kind for layer in layers)
    stacks: dict[str, list[tuple[tuple[int, ...], str, LayerRank]]] = {}
    loose: list[LayerRank] = []
    for layer in layers:
        stack, number, kind = grid_position(layer.path)
        if number is None:
            loose.append(layer)
            continue
        parts = stack.split(".")
        outer = tuple(int(part) for part in parts if part.isdecimal())
        title = ".".join("*" if part.isdecimal() else part for part in parts)
        if kind in experts:
            parameter, _, kind = kind.rpartition(".")
            title = f"{title}.*.{parameter}"
        stacks.setdefault(title, []).append(((*outer, number), kind, layer))
    grids = [_stack_grid(title, members) for title, members in stacks.items()]
    if loose:
        cells = {(row, 0): layer for row, layer in enumerate(loose)}
        grids.append(
            RankGrid("other layers" if grids else "layers", [each.path for each in loose], [""], cells)
        )
    return grids


def _expert_kinds(kinds: Iterable[str]) -> set[str]:
    """Find the kinds that are one expert's part of a parameter: numbered from 0, under a name with "expert"."""
    found = {kind for kind in kinds if kind.rpartition(".")[2].isdecimal() and "expert" in kind.lower()}
    return {kind for kind in found if f"{kind.rpartition('.')[0]}.0" in found}


def _stack_grid(title: str, members: list[tuple[tuple[int, ...], str, LayerRank]]) -> RankGrid:
    rows = {numbers: row for row, numbers in enumerate(sorted({numbers for numbers, _, _ in members}))}
    kinds = list(dict.fromkeys(kind for _, kind, _ in members))
    columns = {kind: column for column, kind in enumerate(sorted(kinds, key=kind_order))}
    return RankGrid(
        title,
        [".".join(map(str, numbers)) for numbers in rows],
        list(columns),
        {(rows[numbers], columns[kind]): layer for numbers, kind, layer in members},
    )


def kind_order(kind: str) -> tuple[int, int]:
    """A sort key that puts kinds in the order of data flow: attention, cross-attention, then the rest.

    Example:
        >>> sorted(["mlp.down_proj", "self_attn.o_proj", "mlp.up_proj", "self_attn.q_proj"], key=kind_order)
        ['self_attn.q_proj', 'self_attn.o_proj', 'mlp.up_proj', 'mlp.down_proj']
    """
    lower = kind.lower()
    attention = _ATTENTION.search(lower) or _CROSS.search(lower)
    group = 2 if not attention else 1 if _CROSS.search(lower) else 0
    roles = _ATTENTION_ROLES if attention else _MLP_ROLES
    parts = lower.split(".")
    last = parts[-2] if parts[-1] == "dense" and len(parts) > 1 and not attention else parts[-1]
    last = "down" if last == "output" and not attention else last
    role = next((number for number, names in enumerate(roles) if last in names), roles.index(("",)))
    return group, role


def short_kinds(kinds: list[str]) -> list[str]:
    """Shorten each kind to its shortest unique ending, and drop a final ``dense``, which says nothing.

    Example:
        >>> short_kinds(["self_attn.q_proj", "encoder_attn.q_proj", "mlp.fc1"])
        ['self_attn.q_proj', 'encoder_attn.q_proj', 'fc1']
        >>> short_kinds(["attention.output.dense", "intermediate.dense", "output.dense"])
        ['attention.output', 'intermediate', 'output']
    """
    bare = [kind.removesuffix(".dense") for kind in kinds]
    kinds = bare if len(set(bare)) == len(kinds) else kinds
    return [_shortest_end(kind, [other for other in kinds if other != kind]) for kind in kinds]


def _shortest_end(kind: str, others: list[str]) -> str:
    parts = kind.split(".")
    ends = (".".join(parts[at:]) for at in range(len(parts) - 1, -1, -1))
    free = (end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others))
    return next(free, kind)


# Viridis (van der Walt and Smith, 2015): even steps of lightness, readable with every kind of colour vision.
_RAMP = (
    (68, 1, 84),
    (71, 45, 123),
    (59, 82, 139),
    (44, 114, 142),
    (33, 145, 140),
    (40, 174, 128),
    (94, 201, 98),
    (173, 220, 48),
    (253, 231, 37),
)


def rank_colour(rank: int, largest: int) -> tuple[int, int, int]:
    """The colour of a rank from 1 to ``largest``, as red, green and blue from 0 to 255.

    Example:
        >>> rank_colour(1, 12), rank_colour(12, 12)
        ((68, 1, 84), (253, 231, 37))
    """
    at = (len(_RAMP) - 1) * (min(max(rank, 1), largest) - 1) / max(1, largest - 1) if largest > 1 else 4.0
    low = min(int(at), len(_RAMP) - 2)
    red, green, blue = (
        round(a + (b - a) * (at - low)) for a, b in zip(_RAMP[low], _RAMP[low + 1], strict=True)
    )
    return red, green, blue


def ink_on(colour: tuple[int, int, int]) -> str:
    """Black or white, whichever has more contrast with a colour (by WCAG 2's relative luminance).

    Example:
        >>> ink_on((68, 1, 84)), ink_on((253, 231, 37))
        ('white', 'black')
    """
    red, green, blue = (_linear(part / 255) for part in colour)
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "white"


def _linear(part: float) -> float:
    return float(part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)


def largest_rank(layers: Iterable[LayerRank]) -> int:
    """The end of the colour scale: the largest current or initial rank of any layer, at least 1."""
    return max((max(layer.rank, layer.init_r) for layer in layers), default=1) or 1
