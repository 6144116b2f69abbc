"""Errors and warnings about the targets of a configuration."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from torch import nn
from torch.nn.parameter import UninitializedParameter

from rankwise.adapters import adapters_for, in_all_linear, kinds_in_words
from rankwise.attach.defaults import HEADS
from rankwise.attach.matching import by_ends, by_letters, matcher, within
from rankwise.attach.unused_layers import check_fast_path, why_ignored, why_unlike_its_class
from rankwise.config import LoraConfig
from rankwise.config.suggest import suggestion


def check_names(modules: Mapping[str, nn.Module], config: LoraConfig) -> None:
    """Refuse a name in ``target_modules`` if everything that it matches is also in ``modules_to_save``."""
    targets = config.target_modules if isinstance(config.target_modules, list) else []
    matches = by_ends(modules)
    implied = HEADS.get(config.task_type or "", ())
    listed = matcher([name for name in config.modules_to_save or () if name not in implied])
    saved = [path for path in modules if listed(path)]
    for name in targets:
        if name in matches and all(within(path, saved) for path in matches[name]):
            raise ValueError(
                f"`target_modules` names {name!r}, but all that it matches is in `modules_to_save` and trains "
                f"whole (such as {matches[name][0]!r}): take it out of one of them."
            )


def check_heads(modules: Mapping[str, nn.Module], saved: list[str], config: LoraConfig) -> None:
    """Warn of a task whose head the model lacks, and of modules that train in full in PEFT only."""
    if config.inference_mode:
        return
    implied = HEADS.get(config.task_type or "", ())
    taken_by_peft = by_letters([*(config.modules_to_save or ()), *implied])
    more = [path for path in modules if taken_by_peft(path) and not within(path, saved)]
    if saved and more:
        warnings.warn(
            f"{some(more)} won't train in full, as PEFT would have it: its name only ends with the letters of another "
            "in `modules_to_save`. Name it there if it should.",
            UserWarning,
            stacklevel=3,
        )
    if implied and not saved:
        held = [path for path in modules if "." not in path]
        warnings.warn(
            f"`task_type` is {config.task_type}, but the model has no module called {' or '.join(implied)}: no "
            f"head will train. If it has one, name it in `modules_to_save`; the model holds {some(held, 12)}.",
            UserWarning,
            stacklevel=3,
        )


def check_layer(model: nn.Module, path: str, module: nn.Module, config: LoraConfig) -> None:
    """Refuse a layer that cannot be adapted, or whose adapter would do nothing.

    Raises:
        ValueError: the layer cannot be adapted. The message says why.
    """
    if adapters_for(module) is None:
        raise ValueError(_cannot_adapt(path, module, config))
    if any(isinstance(each, UninitializedParameter) for each in module.parameters(recurse=False)):
        raise ValueError(f"{path!r} has no shape yet: run the model once before it is adapted.")
    reason = why_ignored(model, path, config) or _why_unlike(path, module, same_numbers=False)
    if reason:
        raise ValueError(f"{path!r} can't be adapted: {reason} Name it in `exclude_modules`.")
    check_fast_path(model, path)


def adaptable(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    config: LoraConfig,
    shared: Mapping[str, str],
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the targets that can be adapted, and warn of linear layers that cannot. The user has named none of them.

    ``shared`` maps a target to a module that shares its weight, if there is one.
    """
    left_out: dict[str, list[str]] = {}
    for path, module in targets.items():
        if adapters_for(module) is None:
            continue
        reason = why_ignored(model, path, config) or _why_unlike(path, module, same_numbers=True)
        if reason:
            left_out.setdefault(f"can't be adapted: {reason}", []).append(path)
        elif path in shared:
            said = (
                f"won't be adapted: it shares its weight with {shared[path]!r}, and an adapter of one of them "
                "can't be merged into it. To adapt it anyway, name it in `target_modules`."
            )
            left_out.setdefault(said, []).append(path)
        else:
            check_layer(model, path, module, config)
            yield path, module
    for said, paths in left_out.items():
        warnings.warn(f"{some(paths)} {said} Left out.", UserWarning, stacklevel=3)


def _why_unlike(path: str, module: nn.Module, same_numbers: bool) -> str | None:
    """`why_unlike_its_class` as a reason not to adapt a layer."""
    reason = why_unlike_its_class(module, same_numbers)
    if reason is None:
        return None
    reason += ", to which an adapter's output can't be added."
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        return reason
    name = path.rpartition(".")[2]
    return f"{reason} `target_parameters=['{name}.weight']` adapts the weight itself."


def _cannot_adapt(path: str, module: nn.Module, config: LoraConfig) -> str:
    kind = type(module).__name__
    inner = Counter(
        name.rpartition(".")[2] for name, each in module.named_modules() if name and in_all_linear(each)
    )
    if not inner:
        return (
            f"{path!r} is a {kind}: only {kinds_in_words()} layers can be adapted. Narrow `target_modules`, or use "
            "`exclude_modules`."
        )
    names = [name for name, _ in inner.most_common(8)]
    if isinstance(config.target_modules, str):
        mend = f"make {config.target_modules!r} match only layers, for example r'.*\\.({'|'.join(names)})'"
    else:
        mend = f"name the layers in it instead: {', '.join(names)}"
    return f"{path!r} is a {kind}, which holds other modules: {mend}."


def nothing_found(
    modules: Mapping[str, nn.Module],
    matched: list[str],
    saved: list[str],
    names: list[str] | str,
    config: LoraConfig,
) -> str:
    """Write the message for a configuration that adapts no layer: what matched, and what excluded it."""
    shown = repr(names) if isinstance(names, str) else some(names)
    if matched:
        why = [f"`exclude_modules`={config.exclude_modules!r}"] if config.exclude_modules else []
        why += [f"the modules that train in full ({some(saved)})"] if saved else []
        left = f"{' and '.join(why)} leave nothing of it" if why else "nothing of it can be adapted"
        return f"`target_modules` ({shown}) matches {some(matched)}, but {left}."
    if not names:  # those of "all-linear"
        return f"`target_modules`={config.target_modules!r} finds no layer: the model has no linear layer to adapt."
    if any(map(matcher(names), modules)):
        return (
            f"`target_modules` ({shown}) matches layers, but none in `layers_to_transform`="
            f"{config.layers_to_transform!r} with `layers_pattern`={config.layers_pattern!r}."
        )
    if isinstance(names, str):
        what, hints = f"the expression {shown} matches no whole path in the model", ""
    else:
        what = f"{shown} matches no module of the model"
        hints = "".join(nearest_name(name, modules) for name in names[:4])
    return f"`target_modules`: {what}.{hints} {linear_names(modules)}"


def nearest_name(name: str, paths: Iterable[str]) -> str:
    """Suggest the nearest of the paths' ends that have as many parts as ``name``."""
    parts = name.count(".") + 1
    return suggestion(name, dict.fromkeys(".".join(path.split(".")[-parts:]) for path in paths))


def linear_names(modules: Mapping[str, nn.Module], most: int = 12) -> str:
    """Say how the model's linear layers are called, the most frequent name first."""
    counts = Counter(path.rpartition(".")[2] for path, module in modules.items() if in_all_linear(module))
    names = ", ".join(name for name, _ in counts.most_common(most))
    return f"Its linear layers are called {names}." if names else "The model has no linear layers."


def some(names: list[str], most: int = 6) -> str:
    """Show the first names and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
