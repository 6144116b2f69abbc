"""Chooses the singular directions to keep within a budget, from squared singular values and widths.

Keeping the first k singular directions of a layer's update is the best that rank k allows (Eckart and Young, 1936). It
loses the sum of the other squared singular values. Over several layers these losses add up. One rank costs as many
parameters as the layer's width. So directions are taken by square per parameter, over all layers at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Squares = Mapping[str, Sequence[float]]  # layer -> squared singular values, in descending order


def ranks_for_budget(squares: Squares, widths: Mapping[str, int], budget: int) -> dict[str, int]:
    """The ranks that keep the largest sum of squares with at most ``budget`` parameters.

    Directions are taken by square per parameter while they fit. If widths differ much, two other ways can be better:
    to take the first direction that did not fit, and to start from one rank for all layers. All three are tried, and
    the best result is returned.

    Args:
        squares: squared singular values of each layer, in descending order.
        widths: parameters of one rank in each layer, at least 1.
        budget: number of parameters of all layers together, at least 0.

    Returns:
        The rank of each layer, which may be 0.

    Example:
        >>> ranks_for_budget({"q": [9.0, 1.0], "v": [4.0, 3.0]}, {"q": 10, "v": 10}, budget=30)
        {'q': 1, 'v': 2}
        >>> ranks_for_budget({"small": [1.0], "large": [50.0]}, {"small": 10, "large": 1000}, budget=1000)
        {'small': 0, 'large': 1}
    """
    nothing = dict.fromkeys(squares, 0)
    greedy, missed = _filled(squares, widths, budget, nothing)
    found = [greedy]
    if missed is not None:
        path, number = missed
        start = nothing | {path: number + 1}
        if parameters_of(start, widths) <= budget:
            found.append(_filled(squares, widths, budget, start)[0])
    equal = budget // max(parameters_of(dict.fromkeys(squares, 1), widths), 1)
    start = {path: min(equal, len(values)) for path, values in squares.items()}
    found.append(_filled(squares, widths, budget, start)[0])
    return max(found, key=lambda ranks: kept_by(squares, ranks))


def ranks_for_share(squares: Squares, widths: Mapping[str, int], share: float) -> dict[str, int]:
    """Ranks with few parameters that keep at least ``share`` of the sum of all squares.

    Directions are taken by square per parameter until the share is reached. Then those that are not needed are removed.

    Args:
        squares: squared singular values of each layer, in descending order.
        widths: parameters of one rank in each layer, at least 1.
        share: share of the sum of all squares, in (0, 1].

    Returns:
        The rank of each layer, which may be 0.

    Example:
        >>> ranks_for_share({"q": [9.0, 1.0], "v": [4.0, 3.0]}, {"q": 10, "v": 10}, share=0.9)
        {'q': 1, 'v': 2}
    """
    wanted = share * kept_by(squares, {path: len(values) for path, values in squares.items()})
    wanted -= 1e-12 * wanted  # sums of the same numbers in two orders may differ in the last digits
    ranks, kept = dict.fromkeys(squares, 0), 0.0
    for path, number in _by_worth(squares, widths):
        if kept >= wanted:
            break
        ranks[path] = number + 1
        kept += squares[path][number]
    for path in sorted(ranks, key=lambda each: -widths[each]):
        while ranks[path] and kept - squares[path][ranks[path] - 1] >= wanted:
            ranks[path] -= 1
            kept -= squares[path][ranks[path]]
    return ranks


def kept_by(squares: Squares, ranks: Mapping[str, int]) -> float:
    """The sum of the squares that the first ``ranks`` directions hold."""
    return sum(sum(squares[path][:rank]) for path, rank in ranks.items())


def parameters_of(ranks: Mapping[str, int], widths: Mapping[str, int]) -> int:
    """The number of parameters of ``ranks``."""
    return sum(rank * widths[path] for path, rank in ranks.items())


def _by_worth(squares: Squares, widths: Mapping[str, int]) -> list[tuple[str, int]]:
    """All directions with a square above 0, the largest square per parameter first. Equal ones keep their order."""
    directions = [(path, i) for path, values in squares.items() for i, value in enumerate(values) if value]
    return sorted(directions, key=lambda each: -squares[each[0]][each[1]] / widths[each[0]])


def _filled(
    squares: Squares, widths: Mapping[str, int], budget: int, start: Mapping[str, int]
) -> tuple[dict[str, int], tuple[str, int] | None]:
    """Fill the budget from the ranks ``start`` on. Return the ranks, and the first direction that did not fit."""
    ranks, missed = dict(start), None
    left = budget - parameters_of(ranks, widths)
    for path, number in _by_worth(squares, widths):
        if number < ranks[path]:
            continue
        if widths[path] > left:
            missed = missed or (path, number)
        else:
            ranks[path] = number + 1
            left -= widths[path]
    return ranks, missed
