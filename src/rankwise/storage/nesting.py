"""The names of adapted parameters' factors in a LoRA file of PEFT's format.

PEFT wraps a module once for each adapted parameter, in the order in which the module holds them. A wrapper has the
module's name. With two parameters ``a`` and ``b``, the factors of ``a`` are therefore at ``<module>.base_layer`` and
those of ``b`` at ``<module>``. In rankwise they are at ``<module>.a`` and ``<module>.b``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

_INNER = ".base_layer"
_LAST = ("down_proj", "w2")  # w2 is DBRX's name


def nested_paths(parameters: Iterable[str]) -> dict[str, str]:
    """The path in a file of each adapted parameter; the parameters must be in the order of their modules.

    Example:
        >>> sorted(nested_paths(["mlp.experts.up", "mlp.experts.down"]).items())
        [('mlp.experts.down', 'mlp.experts'), ('mlp.experts.up', 'mlp.experts.base_layer')]
    """
    return {
        path: owner + _INNER * depth
        for owner, paths in by_owner(parameters).items()
        for depth, path in enumerate(reversed(paths))
    }


def unnested_paths(found: Iterable[str], names_of: Callable[[str], Sequence[str]]) -> dict[str, str]:
    """The parameter's path for each path in a file that belongs to a parameter. Other paths are left out.

    Args:
        found: paths in a file.
        names_of: a function from a module's path to the names of its adapted parameters, in the module's order.

    Example:
        >>> unnested_paths(["q", "experts", "experts.base_layer"], {"experts": ["up", "down"], "q": []}.__getitem__)
        {'experts': 'experts.down', 'experts.base_layer': 'experts.up'}
    """
    depths: dict[str, dict[int, str]] = {}
    for path in found:
        owner, depth = path, 0
        while owner.endswith(_INNER):
            owner, depth = owner.removesuffix(_INNER), depth + 1
        depths.setdefault(owner, {})[depth] = path
    return {
        members[depth]: f"{owner}.{name}"
        for owner, members in depths.items()
        if set(members) == set(range(len(names := names_of(owner))))
        for depth, name in enumerate(reversed(names))
    }


def named_by_targets(targets: Sequence[str]) -> Callable[[str], list[str]]:
    """Make ``names_of`` for `unnested_paths` when no model is available.

    PEFT may write ``target_parameters`` in any order, because it keeps them in a set. All classes of Transformers hold
    the experts' down projection last. For other names, the order is assumed to be the module's.

    Example:
        >>> named_by_targets(["experts.down_proj", "experts.up_proj", "router.weight"])("layers.0.experts")
        ['up_proj', 'down_proj']
    """

    def names_of(owner: str) -> list[str]:
        names = sorted(
            dict.fromkeys(target.rpartition(".")[2] for target in targets),
            key=lambda name: name in _LAST,
        )
        return [
            name for name in names if any(f".{owner}.{name}".endswith(f".{target}") for target in targets)
        ]

    return names_of


def by_owner(parameters: Iterable[str]) -> dict[str, list[str]]:
    """The paths of parameters, by the path of the module that holds them."""
    owners: dict[str, list[str]] = {}
    for path in parameters:
        owners.setdefault(path.rpartition(".")[0], []).append(path)
    return owners
