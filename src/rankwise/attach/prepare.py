"""Prepares a base model for adapters: it is frozen, numerically safe, and has gradient checkpointing."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import nn

from rankwise.attach.attachment import adapter_layers, saved_modules
from rankwise.attach.input_gradients import hook_inputs

# Kernels of these methods need scales, zero points and the other parameters in the dtype of the checkpoint.
_KEEP_DTYPES = {"aqlm", "eetq", "gptq", "hqq", "torchao"}
_HALF = (torch.float16, torch.bfloat16)


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    **unused: Any,
) -> Any:
    """Prepare a quantized base model for training adapters, in place, and return it.

    The base is frozen. Parameters in half precision (norms, embeddings, the head) become float32, and packed weights
    stay as they are. GPTQ, AQLM, EETQ, HQQ and torchao models keep all their dtypes, which their kernels need. With
    gradient checkpointing, the outputs of the embeddings require a gradient. Without that, re-entrant checkpointing
    would give the adapters no gradient.

    Call it before `get_peft_model`, as with PEFT. A later call is harmless, and the adapters still train.

    Args:
        model: a Transformers model, or any module. Gradient checkpointing needs the methods
            ``gradient_checkpointing_enable`` and ``get_input_embeddings``.
        use_gradient_checkpointing: whether to recompute activations in the backward pass, to save memory.
        gradient_checkpointing_kwargs: arguments of `torch.utils.checkpoint.checkpoint`, such as
            ``{"use_reentrant": False}``. None: the model's own defaults.
        unused: ``auto_clear_cache``, as in PEFT. It has no effect, as cached memory is always released.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module, or an argument is unknown.
        ValueError: the model has no gradient checkpointing. Pass ``use_gradient_checkpointing=False``.

    Example:
        >>> import torch, rankwise as rw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8, dtype=torch.bfloat16), torch.nn.Linear(8, 2))
        >>> model = rw.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        >>> model[0].weight.dtype, model[0].weight.requires_grad
        (torch.float32, False)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, but is a {type(model).__name__}.")
    for name in unused.keys() - {"auto_clear_cache"}:
        raise TypeError(f"prepare_model_for_kbit_training has no argument {name!r}.")
    if use_gradient_checkpointing:
        _check_can_checkpoint(model)
    trains = {id(parameter) for parameter in _adapter_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in trains:
            parameter.requires_grad_(False)
    if _quantization_method(model) not in _KEEP_DTYPES:
        _widen(model)
    if use_gradient_checkpointing:
        enable_checkpointing(model, dict(gradient_checkpointing_kwargs or {}))
        let_inputs_require_grad(model)
    return model


def let_inputs_require_grad(model: Any) -> None:
    """Let the outputs of the embeddings require a gradient, so that gradients pass checkpoints. Done at most once."""
    if getattr(model, "_require_grads_hooks", None) or getattr(model, "_rankwise_input_hook", None):
        return
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
        return
    model._rankwise_input_hook = hook_inputs(model, ())


def _adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    held: list[nn.Parameter] = []
    for layer in adapter_layers(model).values():
        held += [p for name in layer.lora_A for p in layer.adapter_parameters(name).values()]
    for module in saved_modules(model).values():
        held += list(module.modules_to_save.parameters())
    if held:  # an adapter trains the base's own biases
        held += [p for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]
    return held


def _quantization_method(model: nn.Module) -> str:
    method = getattr(model, "quantization_method", None)
    if method is None and getattr(model, "hqq_quantized", False):
        return "hqq"
    return str(getattr(method, "value", method))


@torch.no_grad()
def _widen(model: nn.Module) -> None:
    packed = {"Params4bit", "Int8Params"}
    for parameter in model.parameters():
        if parameter.dtype in _HALF and type(parameter).__name__ not in packed:
            parameter.data = parameter.data.float()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_can_checkpoint(model: Any) -> None:
    able = hasattr(model, "gradient_checkpointing_enable") and hasattr(model, "get_input_embeddings")
    if not able or not getattr(model, "supports_gradient_checkpointing", True):
        raise ValueError(
            f"{type(model).__name__} has no gradient checkpointing to switch on. Pass "
            "`use_gradient_checkpointing=False`, and checkpoint in the model's own forward if need be."
        )


def checkpointing_name(owner: Any, ending: str = "") -> str:
    """The name of gradient checkpointing in a model or in Transformers' arguments.

    Newer versions of Transformers call it activation checkpointing.

    Example:
        >>> checkpointing_name(torch.nn.Linear(2, 2))
        'gradient_checkpointing'
    """
    new = "activation_checkpointing"
    return new if hasattr(owner, f"{new}{ending}") else "gradient_checkpointing"


def enable_checkpointing(model: Any, options: dict[str, Any]) -> None:
    """Switch on a Transformers model's gradient checkpointing, with ``options`` for PyTorch's ``checkpoint``."""
    name = checkpointing_name(model, "_enable")
    enable = getattr(model, f"{name}_enable")
    if f"{name}_kwargs" in inspect.signature(enable).parameters:
        enable(**{f"{name}_kwargs": options or None})
        return
    if options:
        warnings.warn(
            f"{type(model).__name__}.{name}_enable takes no arguments, so "
            f"`gradient_checkpointing_kwargs={options!r}` is left out.",
            stacklevel=3,
        )
    enable()
