"""The methods of the comparison, each as its users call it, with the same number of trained parameters in the end."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from tasks import Batch, Task
from torch import Tensor, nn

Model = Any
# Adapts a task's model for a final rank; the batches are for those that look at data first.
Method = Callable[[nn.Module, Task, int, Iterable[Batch]], Model]


def _alpha(rank: int) -> int:
    return 2 * rank


def _spare(rank: int) -> int:
    """The rank that adaptive methods start with."""
    return {2: 8, 8: 16}.get(rank, 2 * rank)


def _phases(task: Task) -> dict[str, Any]:
    tenth = task.steps // 10
    return {"tinit": tenth, "tfinal": 3 * tenth, "deltaT": max(1, task.steps // 60)}


def _peft(model: nn.Module, task: Task, rank: int, lora_alpha: float | None = None, **options: Any) -> Model:
    import peft

    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=rank,
            lora_alpha=lora_alpha or _alpha(rank),
            target_modules=list(task.targets),
            modules_to_save=list(task.heads) or None,
            **options,
        ),
    )


def _peft_eva(model: nn.Module, task: Task, rank: int, batches: Iterable[Batch]) -> Model:
    """EVA looks at the layers' inputs in ten batches: without padding where the model is told of it."""
    import peft

    options = peft.EvaConfig(use_label_mask=False, tau=0.9)  # labels of whole sentences mask no tokens
    adapted = _peft(model, task, rank, init_lora_weights="eva", eva_config=options)
    looked_at = list(itertools.islice(batches, 10))
    how: dict[str, Any] = {"show_progress_bar": False}
    if "input_ids" not in looked_at[0]:
        how["prepare_model_inputs_fn"] = None
        how["prepare_layer_inputs_fn"] = _all_positions
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.initialize_lora_eva_weights(adapted, looked_at, **how)
    return adapted


def _all_positions(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    inputs: Tensor = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    return inputs.flatten(0, -2)


def _peft_adalora(model: nn.Module, task: Task, rank: int, batches: Iterable[Batch]) -> Model:
    import peft

    config = peft.AdaLoraConfig(
        init_r=_spare(rank),
        target_r=rank,
        target_modules=list(task.targets),
        modules_to_save=list(task.heads) or None,
        lora_alpha=_alpha(rank),
        orth_reg_weight=0.1,
        total_step=task.steps,
        **_phases(task),
    )
    return peft.get_peft_model(model, config)


def _rankwise(model: nn.Module, task: Task, rank: int, **options: Any) -> Model:
    """As its users call it: the rank that they would give LoRA, and everything else left out."""
    import rankwise

    config = rankwise.AdaLoraConfig(
        target_r=rank,
        total_step=task.steps,
        target_modules=list(task.targets),
        modules_to_save=list(task.heads) or None,
        **options,
    )
    return rankwise.get_peft_model(model, config)


METHODS: dict[str, Method] = {
    "PEFT LoRA": lambda model, task, rank, batches: _peft(model, task, rank),
    "PEFT rsLoRA": lambda model, task, rank, batches: _peft(model, task, rank, use_rslora=True),
    "PEFT EVA": _peft_eva,
    "PEFT AdaLoRA": _peft_adalora,
    "rankwise": lambda model, task, rank, batches: _rankwise(model, task, rank),
    "rankwise, use_rslora=True": lambda model, task, rank, batches: _rankwise(
        model, task, rank, use_rslora=True
    ),
    "rankwise, the paper's form": lambda model, task, rank, batches: _rankwise(
        model,
        task,
        rank,
        init_r=_spare(rank),
        lora_alpha=_alpha(rank),
        init_lora_weights=True,
        orth_reg_weight=0.1,
        **_phases(task),
    ),
}


def trained_parameters(model: Model) -> int:
    """The numbers of the adapter that train in the end; heads, which are the same for all, are left out."""
    if hasattr(model, "rank_summary"):
        summary = model.rank_summary()
        gates = summary.total_rank if not _trains_E(model) else 0
        return int(summary.parameters - gates)
    factors = [(name, p) for name, p in model.named_parameters() if ".lora_" in name and p.requires_grad]
    kept = getattr(model.peft_config["default"], "rank_pattern", None) or {}
    if not any(".lora_E." in name for name, _ in factors):
        return sum(p.numel() for _, p in factors)
    return sum(_kept(name, p, kept) for name, p in factors)


def _kept(name: str, parameter: Tensor, pattern: dict[str, list[bool]]) -> int:
    path = name.split(".lora_")[0].removeprefix("base_model.model.")
    mask = next((mask for key, mask in pattern.items() if path in key), None)
    rank = min(parameter.shape) if mask is None else sum(mask)
    size = max(parameter.shape) if ".lora_E." not in name else 1
    return int(rank * size)


def _trains_E(model: Model) -> bool:
    return any(".lora_E." in name and p.requires_grad for name, p in model.named_parameters())


def after_step(model: Model, step: int) -> None:
    """What PEFT's AdaLoRA must be told between ``optimizer.step()`` and ``zero_grad()``; nothing else must."""
    tuner = getattr(model, "base_model", None)
    if type(tuner).__name__ == "AdaLoraModel":
        with torch.no_grad():
            tuner.update_and_allocate(step)


def penalty(model: Model) -> Tensor | float:
    """What PEFT's AdaLoRA adds to the loss where its wrapper is called with a task type."""
    tuner = getattr(model, "base_model", None)
    if type(tuner).__name__ != "AdaLoraModel":
        return 0.0
    total, count = torch.zeros(()), 0
    for name, p in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            product = p @ p.T if ".lora_A." in name else p.T @ p
            total = total + torch.linalg.norm(product - torch.eye(len(product)))
            count += 1
    return model.peft_config["default"].orth_reg_weight * total / count
