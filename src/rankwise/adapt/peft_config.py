"""Updates PEFT's configuration of an adapter whose scales and ranks have changed, so that it is saved correctly."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rankwise.adapt.peft_pairs import PeftPair

# PEFT saves the embeddings' base weights with an adapter if `target_modules` is a list with one of these names, or a
# pattern that matches a path with one of these ends.
_EMBEDDINGS = ("embed_tokens", "lm_head")


def write_config(
    config: Any, pairs: Sequence[PeftPair], dropped: Sequence[PeftPair], others: Iterable[str] = ()
) -> None:
    """Write the current ranks, scales and layers of an adapter into its ``LoraConfig``.

    Args:
        config: PEFT's ``LoraConfig``, which is changed in place.
        pairs: layers that hold the adapter.
        dropped: layers that held the adapter at the start of the run, and no longer do.
        others: paths of the base model's other modules.
    """
    ranks = {pair.path: pair.rank for pair in pairs}
    alphas = {pair.path: whole_if_it_is(pair.alpha) for pair in pairs}
    config.r = max(ranks.values())
    # Servers that read only `r` and `lora_alpha` use this scale for all layers.
    at_most = [alphas[path] for path, rank in ranks.items() if rank == config.r]
    config.lora_alpha = Counter(at_most).most_common(1)[0][0]
    every = [*pairs, *dropped]
    named = [pair for pair in pairs if not _is_inner(pair)]
    config.rank_pattern = {
        _key(pair, every): ranks[pair.path] for pair in named if ranks[pair.path] != config.r
    }
    config.alpha_pattern = {
        _key(pair, every): alphas[pair.path] for pair in named if alphas[pair.path] != config.lora_alpha
    }
    if dropped:
        _write_targets(config, pairs, others)


def _key(pair: PeftPair, every: Sequence[PeftPair]) -> str:
    """The pattern for one layer. PEFT compares it with the end of each path, unless it starts with ``^``."""
    ends_like_it = any(other.path.endswith(f".{pair.path}") for other in every)
    return f"^{pair.path}" if ends_like_it else pair.path


def _is_inner(pair: PeftPair) -> bool:
    """Whether PEFT adapts the layer together with the one around it, and gives both the same settings."""
    return ".base_layer." in f".{pair.path}"


def _write_targets(config: Any, pairs: Sequence[PeftPair], others: Iterable[str]) -> None:
    parameters = [pair.path for pair in pairs if pair.is_parameter]
    if config.target_parameters:
        config.target_parameters = parameters or None
    given = config.target_modules or ()
    saves_embeddings = isinstance(given, str) or any(name in given for name in _EMBEDDINGS)
    paths = [pair.path for pair in pairs if not pair.is_parameter and not _is_inner(pair)]
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    # PEFT looks for these names alone in a list, which has whole paths from here on.
    hidden = any(map(is_embedding_of_words, paths)) and not any(name in paths for name in _EMBEDDINGS)
    as_pattern = (saves_embeddings and hidden) or _any_ends_with(others, set(paths))
    config.target_modules = "|".join(map(re.escape, paths)) if as_pattern else set(paths)


def is_embedding_of_words(path: str) -> bool:
    """Whether PEFT takes the layer at ``path`` for an embedding whose base weight may belong in an adapter's file.

    Example:
        >>> is_embedding_of_words("model.embed_tokens"), is_embedding_of_words("layers.0.fc")
        (True, False)
    """
    return path.rpartition(".")[2] in _EMBEDDINGS


def _any_ends_with(paths: Iterable[str], ends: set[str]) -> bool:
    """Whether one of ``paths`` ends with a dot and one of ``ends``.

    Example:
        >>> _any_ends_with(["encoder.layers.0.fc"], {"layers.0.fc"}), _any_ends_with(["my_fc"], {"fc"})
        (True, False)
    """
    for path in paths:
        rest = path
        while "." in rest:
            rest = rest.partition(".")[2]
            if rest in ends:
                return True
    return False


def whole_if_it_is(value: float) -> float:
    """Turn a whole number into an int, which servers expect in ``lora_alpha``.

    Example:
        >>> whole_if_it_is(16.0), whole_if_it_is(2.5)
        (16, 2.5)
    """
    near = round(value)
    return near if abs(value - near) <= 1e-9 * max(abs(value), 1) else value
