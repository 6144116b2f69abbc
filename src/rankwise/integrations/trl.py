"""TRL: refuses trainers that would use a wrong reference, and PEFT's adapters on top of rankwise's.

TRL knows PEFT's models. Their reference is the base with the adapter switched off, or a copy of the adapter. For any
other model TRL's trainers load the reference from ``config._name_or_path``, which is the bare base. That is the wrong
reference for an adapter that is trained further, and it takes the memory of a second model.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType
from typing import Any

from transformers import trainer as transformers_trainer

from rankwise.adapters import AdapterLayer
from rankwise.config import LoraConfig
from rankwise.integrations.common import own_model
from rankwise.parallel.processes import callers
from rankwise.run.under_peft import FROZEN_BY_PEFT, parameters_of_peft

_LOADS_A_REFERENCE = frozenset({"ref_model", "create_model_from_path"})  # names in constructors that load one

_ROAD = (
    "Give the trainer the base model, `peft_config=peft.LoraConfig(r=..., ...)` and "
    "`callbacks=[rankwise.AdaptRanks(target_r=...)]`: ranks then adapt on PEFT's layers, and TRL finds the reference "
    "by itself."
)


def check_new_trainer(model: Any) -> bool:
    """Refuse a trainer that would train ``model`` wrongly. It is called from within the trainer's constructor.

    Returns:
        Whether the caller gave the trainer a reference model.

    Raises:
        ValueError: the trainer is about to load a bare base model as the reference of an adapted model; it would mix
            the values of a model whose ranks adapt into its reference; it would send the parameters of rankwise's
            layers to vLLM; or PEFT has added an adapter to an adapted model, so that rankwise's adapter does not train.
    """
    adapted = own_model(model)
    if adapted is None:
        return False
    if _is_frozen(adapted) and parameters_of_peft(model):
        raise ValueError(f"{FROZEN_BY_PEFT} {_ROAD}")
    frames = [frame for frame in _constructors() if "trainer" in frame.f_globals.get("__name__", "")]
    given = any(frame.f_locals.get("ref_model") is not None for frame in frames)
    mixes = any(getattr(frame.f_locals.get("args"), "sync_ref_model", False) for frame in frames)
    if mixes and adapted.allocation_state is not None:
        raise ValueError(
            "`sync_ref_model=True` mixes the model's factors into those of its reference. But a cut rotates the "
            "model's directions and changes its scale, so the mixture would mean nothing. Set `sync_ref_model=False`, "
            "or use `rankwise.LoraConfig`, whose ranks are fixed."
        )
    if any(getattr(frame.f_locals.get("args"), "use_vllm", False) for frame in frames):
        raise ValueError(
            "`use_vllm=True` sends every parameter of the model to vLLM under its name, and vLLM knows no names of "
            f"rankwise's own layers. {_ROAD} Or set `use_vllm=False`."
        )
    for frame in frames:
        if not given and _LOADS_A_REFERENCE.issubset(frame.f_code.co_names):
            _check_reference(frame.f_locals)
    return given


def _is_frozen(adapted: Any) -> bool:
    """Whether all adapters that were attached for training are frozen."""
    factors = [
        parameter
        for layer in adapted.modules()
        if isinstance(layer, AdapterLayer)
        for name in adapted._rankwise_to_train
        for parameter in layer.adapter_parameters(name).values()
    ]
    return bool(factors) and not any(parameter.requires_grad for parameter in factors)


def _check_reference(its: dict[str, Any]) -> None:
    """Refuse a constructor that loads a reference. ``its`` holds the constructor's variables so far."""
    trainer, args = its.get("self"), its.get("args")
    name = type(trainer).__name__
    if "ref_model" in its:
        computed_before = getattr(args, "precompute_ref_log_probs", False)
        if not computed_before or getattr(trainer, "is_fsdp_enabled", False):
            raise ValueError(_wrong_reference(name, getattr(trainer, "is_fsdp_enabled", False), passed=True))
    elif getattr(args, "beta", 0.0) != 0.0:
        raise ValueError(_wrong_reference(name, False, passed=False))


def _wrong_reference(name: str, is_fsdp: bool, passed: bool) -> str:
    if passed:
        first = (
            ""
            if is_fsdp
            else "`precompute_ref_log_probs=True` in its arguments takes it from the model itself. "
        )
        others = f"{first}Or pass `ref_model=copy.deepcopy(model)`."
    else:
        others = "`beta=0.0` in its arguments trains without a reference."
    return (
        f"{name} would load a bare base model as the reference, because the model has rankwise's own layers. That is "
        "the wrong reference for an adapter that is trained further, and a second model in memory. "
        f"{_ROAD} To keep rankwise's layers: {others}"
    )


def check_reference_in_use(model: Any, given: bool) -> None:
    """Refuse to train against a reference that the trainer has made, if it is a bare base model.

    Args:
        model: the model that is trained.
        given: whether the caller gave the trainer its reference.

    Raises:
        ValueError: the reference is a bare base model.
    """
    if given or own_model(model) is None:
        return
    trainer = next((each for each in _trainers()), None)
    reference = getattr(trainer, "ref_model", None)
    if reference is not None and own_model(reference) is None:
        raise ValueError(_wrong_reference(type(trainer).__name__, True, passed=True))


def _constructors() -> Iterator[FrameType]:
    """The frames of the constructors of the trainer that is being made, the innermost first."""
    for frame in callers():
        if frame.f_code.co_name == "__init__":
            if isinstance(frame.f_locals.get("self"), transformers_trainer.Trainer):
                yield frame


def _trainers() -> Iterator[Any]:
    """The trainers whose methods are running now."""
    for frame in callers():
        if "self" in frame.f_code.co_varnames and isinstance(
            own := frame.f_locals.get("self"), transformers_trainer.Trainer
        ):
            yield own


def explain_foreign_configurations() -> None:
    """Let every Trainer refuse a rankwise configuration as ``peft_config``, and say what to pass instead."""
    trainer = transformers_trainer.Trainer
    if "__new__" in vars(trainer):
        return

    def __new__(cls: type, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("peft_config")
        if isinstance(config, LoraConfig):
            raise TypeError(
                f"`peft_config` is rankwise's {type(config).__name__}, but {cls.__name__} takes PEFT's configurations. "
                f"{_ROAD} Or attach rankwise's layers yourself, `model = rankwise.get_peft_model(model, config)`, and "
                "leave `peft_config` out."
            )
        return object.__new__(cls)

    trainer.__new__ = __new__
