"""Warns of modules that are new in a pretrained model, such as a classifier, and would stay at random values."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import nn

from rankwise.attach.defaults import HEADS
from rankwise.attach.embeddings import input_embeddings, output_embeddings, resized_vocabulary
from rankwise.attach.matching import within
from rankwise.config import LoraConfig

_LOADED = "_is_hf_initialized"  # Transformers marks each parameter that it reads from a checkpoint
_TASKS = {
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
}
_MAY_BE_UNUSED = ("pooler",)  # many models have one even if their task does not need it


def tell_of_new_heads(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    saved: Collection[str],
    adapted: Collection[str],
) -> None:
    """Warn of modules that no checkpoint has filled and that ``config`` leaves frozen.

    Args:
        model: the model, which has no adapter of this configuration yet.
        modules: modules of the model, by path.
        config: the configuration.
        saved: paths of the modules that train in full.
        adapted: paths of the adapted layers.

    Warns:
        UserWarning: there are such modules. The message names them and the setting that trains them.
    """
    if config.inference_mode:
        return
    new = [path for path in _new_modules(model, modules) if not within(path, saved) and path not in adapted]
    if not new:
        return
    names = list(dict.fromkeys(path.rpartition(".")[2] if path.count(".") > 1 else path for path in new))
    task = next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), None)
    heads = HEADS.get(task or "", ())
    covered = task if task and all(within(path, _under(heads, modules)) for path in new) else None
    mend = (
        f"`task_type={covered!r}`, or `modules_to_save={names}`" if covered else f"`modules_to_save={names}`"
    )
    warnings.warn(
        f"{', '.join(map(repr, new[:6]))} of this {type(model).__name__} was newly initialized, not loaded from a "
        f"checkpoint, and would stay frozen at random values. To train and save it, set {mend} in the "
        f"{type(config).__name__}.",
        UserWarning,
        stacklevel=4,
    )


def _under(heads: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    return [path for path in modules if path.rpartition(".")[2] in heads]


def _new_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Paths of modules whose own parameters are all new, while others were loaded. Resized embeddings do not count."""
    marked = any(hasattr(parameter, _LOADED) for parameter in model.parameters())
    if not marked:
        yield from _heads_of_another_class(model, modules)
        return
    embeddings = [*input_embeddings(model), *output_embeddings(model)]
    resized = any(map(_is_new, embeddings)) and resized_vocabulary(model) is not None
    left_out = {id(each) for each in embeddings} if resized else set()
    for path, module in modules.items():
        named = any(part in _MAY_BE_UNUSED for part in path.split("."))
        if _is_new(module) and not named and id(module) not in left_out:
            yield path


def _is_new(module: nn.Module) -> bool:
    own = [p for p in module._parameters.values() if p is not None]
    packed = type(module).__module__.startswith("bitsandbytes")
    return bool(own) and not packed and not any(hasattr(p, _LOADED) or not p.is_floating_point() for p in own)


def _heads_of_another_class(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The heads of a classifier of Transformers whose configuration does not come from a saved classifier."""
    task = next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), None)
    made_for = getattr(getattr(model, "config", None), "architectures", None)
    if task is None or made_for == [type(model).__name__]:
        return
    for path, module in modules.items():
        if path.rpartition(".")[2] in HEADS[task] and any(True for _ in module.parameters()):
            yield path
