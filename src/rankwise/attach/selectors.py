"""Warns of every part of a configuration that has no effect on the selected layers.

A name that the model lacks is one way to select nothing. Others are a parent's name, an index beyond the last layer,
an expression that leaves out a layer's last part, and a name whose matches another selector excludes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from rankwise.attach.matching import in_layers, layer_index, matcher, pattern_matches, within
from rankwise.attach.refusals import nearest_name, some
from rankwise.config import AdaLoraConfig, LoraConfig


def tell_of_second_names(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Warn of layers that the model calls under several names: PEFT adapts them under the first one only.

    Args:
        model: the base model.
        targets: what is adapted, by path.

    Warns:
        UserWarning: there is such a layer.
    """
    first = {id(layer): path for path, layer in targets.items()}
    others = [
        (first[id(module)], name)
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in first and first[id(module)] != name
    ]
    if others:
        path, name = others[0]
        warnings.warn(
            f"{path!r} is also called {name!r}, and so adapted in both places. PEFT adapts such a layer under its "
            "first name only. So an adapter that is trained here and used by PEFT computes something else, and the "
            f"other way round.{f' There are {len(others)} such names.' if len(others) > 1 else ''}",
            UserWarning,
            stacklevel=4,
        )


def tell_of_idle_selectors(
    modules: Mapping[str, nn.Module],
    names: list[str] | str,
    targets: Mapping[str, nn.Module],
    config: LoraConfig,
) -> None:
    """Warn of each selector of ``config`` without which the same layers would be adapted in the same way.

    Args:
        modules: every module of the model, by path.
        names: names or expression that ``target_modules`` stands for.
        targets: adapted layers and parameters, by path.
        config: the configuration.

    Warns:
        UserWarning: a part of ``target_modules``, ``exclude_modules``, ``layers_to_transform``, ``layers_pattern``,
            ``rank_pattern``, ``alpha_pattern`` or ``bias`` has no effect. The message says why.
    """
    told = [
        *_idle_targets(modules, targets, config),
        *_idle_exclusions(modules, targets, names, config),
        *_idle_layers(modules, targets, names, config),
        *_idle_patterns(targets, config),
        *_idle_bias(modules, targets, config),
    ]
    for message in told:
        warnings.warn(message, UserWarning, stacklevel=5)


def _idle_targets(
    modules: Mapping[str, nn.Module], targets: Mapping[str, nn.Module], config: LoraConfig
) -> Iterable[str]:
    listed = config.target_modules if isinstance(config.target_modules, list) else []
    for name in listed:
        means = matcher([name])
        if any(map(means, targets)):
            continue
        matched = [path for path in modules if means(path)]
        if not matched:
            yield f"`target_modules` names {name!r}, but the model has no such module.{nearest_name(name, modules)}"
            continue
        yield (
            f"`target_modules` names {name!r}, but nothing that it matches is adapted (such as {matched[0]!r}): "
            f"{_what_takes(matched, listed, config)}"
        )


def _what_takes(matched: list[str], names: list[str], config: LoraConfig) -> str:
    if not any(in_layers(path, names, config) for path in matched):
        return f"`layers_to_transform`={config.layers_to_transform!r} leaves it out."
    if any(map(matcher(config.exclude_modules or []), matched)):
        return f"`exclude_modules`={config.exclude_modules!r} leaves it out."
    return "it lies in a module that trains in full."


def _idle_exclusions(
    modules: Mapping[str, nn.Module],
    targets: Mapping[str, nn.Module],
    names: list[str] | str,
    config: LoraConfig,
) -> Iterable[str]:
    excluded = config.exclude_modules or []
    wanted = frozenset(names).__contains__ if config.target_modules == "all-linear" else matcher(names)
    for part in [excluded] if isinstance(excluded, str) else excluded:
        means = matcher(part if isinstance(excluded, str) else [part])
        matched = [path for path in modules if means(path)]
        if any(wanted(path) and in_layers(path, names, config) for path in matched):
            continue
        what = f"`exclude_modules` {'is' if isinstance(excluded, str) else 'names'} {part!r}, "
        if not matched:
            if isinstance(excluded, str):
                yield f"{what}which matches no whole path in the model, so it excludes nothing."
            else:
                yield f"{what}but the model has no such module.{nearest_name(part, modules)}"
            continue
        inside = [path for path in targets if within(path, matched)]
        if inside:
            yield (
                f"{what}which matches {some(matched, 2)}, but not the layers in it (such as {inside[0]!r}), which are "
                f"adapted: only a layer's own path is compared, as in PEFT. Write an expression for whole paths, such "
                f"as {_expression_for(part)!r}."
            )


def _expression_for(name: str) -> str:
    return rf"(.*\.)?{name.rstrip('.')}\..*"


def _idle_layers(
    modules: Mapping[str, nn.Module],
    targets: Mapping[str, nn.Module],
    names: list[str] | str,
    config: LoraConfig,
) -> Iterable[str]:
    wanted = config.layers_to_transform
    if wanted is None:
        return
    means = matcher(names)
    there = {layer_index(path, config.layers_pattern) for path in modules if means(path)} - {None}
    indices = sorted(index for index in there if index is not None)
    for index in [wanted] if isinstance(wanted, int) else wanted:
        if not any(layer_index(path, config.layers_pattern) == index for path in targets):
            held = f"from {indices[0]} to {indices[-1]}" if indices else "none at all"
            yield (
                f"`layers_to_transform` asks for layer {index}, but nothing is adapted there: the layers that "
                f"`target_modules` matches have the indices {held}."
            )
    patterns = config.layers_pattern
    for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
        if not any(layer_index(path, [pattern]) is not None for path in targets):
            yield f"`layers_pattern` has {pattern!r}, in which nothing is adapted."


def _idle_patterns(targets: Mapping[str, nn.Module], config: LoraConfig) -> Iterable[str]:
    ranks: dict[str, Any] = {} if isinstance(config, AdaLoraConfig) else config.rank_pattern
    for field, patterns in (("rank_pattern", ranks), ("alpha_pattern", config.alpha_pattern)):
        first = _first_matches(list(patterns), targets)
        for key in patterns:
            if key in first:
                continue
            matched = [path for path in targets if pattern_matches(key, path)]
            if matched:
                yield (
                    f"`{field}` has {key!r}, but another key comes first for all that it matches (such as "
                    f"{matched[0]!r}): put {key!r} before it."
                )
            else:
                yield f"`{field}` has {key!r}, which matches no adapted layer.{nearest_name(key, targets)}"


def _first_matches(keys: list[str], targets: Iterable[str]) -> set[str]:
    """The keys that determine the value of at least one target."""
    plain: Callable[[str], bool] = set(keys).__contains__
    decide = set()
    for path in targets:
        first = next((key for key in keys if pattern_matches(key, path)), path if plain(path) else None)
        if first is not None:
            decide.add(first)
    return decide


def _idle_bias(
    modules: Mapping[str, nn.Module], targets: Mapping[str, nn.Module], config: LoraConfig
) -> Iterable[str]:
    if config.bias == "none":
        return
    among = (
        [modules[path] for path in targets if path in modules]
        if config.bias == "lora_only"
        else modules.values()
    )
    if not any(getattr(module, "bias", None) is not None for module in among):
        where = "no adapted layer" if config.bias == "lora_only" else "no module of the model"
        yield f"`bias`={config.bias!r} trains no bias, as {where} has one."
