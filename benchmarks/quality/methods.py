"""The methods of the comparison, each as its users call it, with the same number of trained parameters in the end."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from tasks import Batch, Task, placed
from torch import Tensor, nn

Model = Any
# Adapts a task's model for a final average rank; the batches are for those that look at data first.
Method = Callable[[nn.Module, Task, float, Iterable[Batch]], Model]
_LOOKS_AT = 8  # batches, before training
_CUT_FROM = 4  # times the rank, where a LoRA is cut when it is trained
_B_IS_FASTER = 16  # the learning rate of B over that of A in LoRA+, as its paper advises
_QUERY_KEY = ("query", "key", "q_proj", "k_proj")
_ATTENTION = (*_QUERY_KEY, "value", "v_proj", "o_proj", "out_proj", "attention.output.dense")


def _uniform(task: Task, rank: float) -> tuple[int, list[str]]:
    """One rank for all layers, and the layers: below 1 it is 1, in fewer layers."""
    return (int(rank), list(task.targets)) if rank >= 1 else (1, list(task.fewer[rank]))


def _adapts(name: str, targets: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _width(model: nn.Module, targets: Iterable[str]) -> int:
    """The parameters of a LoRA of rank 1 in these layers."""
    linear = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.Linear)]
    return sum(each.in_features + each.out_features for name, each in linear if _adapts(name, targets))


def _average(model: nn.Module, task: Task, rank: float) -> float:
    """The average rank over all layers that has as many parameters as LoRA."""
    uniform, targets = _uniform(task, rank)
    return rank if rank >= 1 else uniform * _width(model, targets) / _width(model, task.targets)


def _spare(rank: float) -> int:
    """The rank that AdaLoRA in the paper's form starts with."""
    return {2: 8, 8: 16}.get(rank, max(2, round(2 * rank)))


def _phases(task: Task) -> dict[str, Any]:
    tenth = task.steps // 10
    return {"tinit": tenth, "tfinal": 3 * tenth, "deltaT": max(1, task.steps // 60)}


def _lora_config(task: Task, rank: float, **options: Any) -> Any:
    import peft

    uniform, targets = _uniform(task, rank)
    return peft.LoraConfig(
        r=uniform,
        lora_alpha=2 * uniform,
        target_modules=targets,
        modules_to_save=list(task.heads) or None,
        **options,
    )


def _peft(model: nn.Module, task: Task, rank: float, **options: Any) -> Model:
    import peft

    return peft.get_peft_model(model, _lora_config(task, rank, **options))


def _left_out(model: nn.Module, task: Task, rank: float, names: Iterable[str]) -> Model:
    """LoRA without some layers. The others have as many parameters together, as evenly as whole ranks allow."""
    import peft

    linear = {path: each for path, each in model.named_modules() if isinstance(each, nn.Linear)}
    kept = [path for path in linear if _adapts(path, task.targets) and not _adapts(path, names)]
    budget = _average(model, task, rank) * _width(model, task.targets)
    average = budget / _width(model, kept)
    # The sum of the first ranks is the whole part of as many averages.
    ranks = {path: int((place + 1) * average) - int(place * average) for place, path in enumerate(kept)}
    ranks = {path: own for path, own in ranks.items() if own}
    config = peft.LoraConfig(
        r=max(ranks.values()),
        target_modules=list(ranks),
        modules_to_save=list(task.heads) or None,
        rank_pattern={f"^{re.escape(path)}$": own for path, own in ranks.items()},
        alpha_pattern={f"^{re.escape(path)}$": 2 * own for path, own in ranks.items()},
    )
    return peft.get_peft_model(model, config)


def _lora_plus(model: nn.Module, task: Task, rank: float, batches: Iterable[Batch]) -> Model:
    """LoRA+ trains B at a higher rate than A."""
    adapted = _peft(model, task, rank)
    adapted.b_is_faster = _B_IS_FASTER
    return adapted


def _full(model: nn.Module, task: Task, rank: float, batches: Iterable[Batch]) -> Model:
    """All parameters train, in float32, as the steps of full fine-tuning are lost in bfloat16."""
    # Not `model.float()`, which Transformers refuses for a model that was read from a GGUF file.
    return nn.Module.float(model).requires_grad_(True)


def _to_be_cut(model: nn.Module, task: Task, rank: float, batches: Iterable[Batch]) -> Model:
    """LoRA of more rank than it ends with, in all layers."""
    budget = int(_average(model, task, rank) * _width(model, task.targets))
    adapted = _peft(model, task, max(1, _CUT_FROM * rank))
    adapted.cut_to = budget
    return adapted


def _peft_lora_ga(model: nn.Module, task: Task, rank: float, batches: Iterable[Batch]) -> Model:
    """LoRA-GA starts along the gradients of the first batches."""
    import peft
    from peft.tuners.lora.loraga import preprocess_loraga

    looked_at = list(itertools.islice(batches, _LOOKS_AT))

    def gradients() -> None:
        model.eval()
        for batch in looked_at:
            (task.loss(model, batch) / len(looked_at)).backward()

    config = _lora_config(task, rank, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    preprocess_loraga(model, config, gradients)
    model.zero_grad()
    return peft.get_peft_model(model, config)


def _peft_eva(model: nn.Module, task: Task, rank: float, batches: Iterable[Batch]) -> Model:
    """EVA looks at the layers' inputs in ten batches: without padding where the model is told of it."""
    import peft

    options = peft.EvaConfig(use_label_mask=False, tau=0.9)  # labels of whole sentences mask no tokens
    adapted = _peft(model, task, rank, init_lora_weights="eva", eva_config=options)
    looked_at = [placed(batch, model) for batch in itertools.islice(batches, 10)]
    how: dict[str, Any] = {"show_progress_bar": False}
    if "input_ids" in looked_at[0]:  # and all else that it looks at is what the model reads
        looked_at = [{key: batch[key] for key in batch if key != "labels"} for batch in looked_at]
    else:
        how["prepare_model_inputs_fn"] = None
        how["prepare_layer_inputs_fn"] = _all_positions
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.initialize_lora_eva_weights(adapted, looked_at, **how)
    return adapted


def _all_positions(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    inputs: Tensor = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    return inputs.flatten(0, -2)


def _peft_adalora(model: nn.Module, task: Task, rank: float, batches: Iterable[Batch]) -> Model:
    import peft

    config = peft.AdaLoraConfig(
        init_r=_spare(rank),
        target_r=max(1, rank),  # which it takes as a whole number only
        target_modules=list(task.targets),
        modules_to_save=list(task.heads) or None,
        lora_alpha=2 * max(1, rank),
        orth_reg_weight=0.1,
        total_step=task.steps,
        **_phases(task),
    )
    return peft.get_peft_model(model, config)


def by_rankwise(model: nn.Module, task: Task, rank: float, **options: Any) -> Model:
    """As its users call it: the rank that they would give LoRA, and everything else left out."""
    import rankwise as rw

    fields = {
        "target_r": _average(model, task, rank),
        "total_step": task.steps,
        "target_modules": list(task.targets),
        "modules_to_save": list(task.heads) or None,
    }
    return rw.get_peft_model(model, rw.AdaLoraConfig(**fields | options))


METHODS: dict[str, Method] = {
    "PEFT LoRA": lambda model, task, rank, batches: _peft(model, task, rank),
    "PEFT rsLoRA": lambda model, task, rank, batches: _peft(model, task, rank, use_rslora=True),
    "PEFT EVA": _peft_eva,
    "PEFT LoRA-GA": _peft_lora_ga,
    "PEFT DoRA": lambda model, task, rank, batches: _peft(model, task, rank, use_dora=True),
    "PEFT PiSSA": lambda model, task, rank, batches: _peft(model, task, rank, init_lora_weights="pissa"),
    "PEFT LoRA+": _lora_plus,
    "PEFT LoRA, the MLP only": lambda model, task, rank, batches: _left_out(model, task, rank, _ATTENTION),
    "PEFT LoRA, without query and key": lambda model, task, rank, batches: _left_out(
        model, task, rank, _QUERY_KEY
    ),
    "full fine-tuning": _full,
    "PEFT LoRA, 4 times the rank, cut at the end": _to_be_cut,
    "PEFT AdaLoRA": _peft_adalora,
    "rankwise": lambda model, task, rank, batches: by_rankwise(model, task, rank),
    "rankwise, the paper's form": lambda model, task, rank, batches: by_rankwise(
        model,
        task,
        rank,
        init_r=_spare(rank),
        lora_alpha=2 * max(1, rank),
        init_lora_weights=True,
        orth_reg_weight=0.1,
        **_phases(task),
    ),
}


@torch.no_grad()
def cut(model: Model) -> None:
    """Cut a LoRA that is trained to its budget, by the singular values of all layers at once, if it has one."""
    from rankwise.method.principal import principal_directions
    from rankwise.method.truncation import ranks_for_budget

    budget = getattr(model, "cut_to", None)
    if budget is None:
        return
    layers = {name: each for name, each in model.named_modules() if "default" in getattr(each, "lora_A", {})}
    found, widths = {}, {}
    for name, layer in layers.items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        found[name] = principal_directions(
            A[None], B[None], torch.ones(1, len(A), dtype=torch.bool, device=A.device)
        )
        widths[name] = A.shape[1] + B.shape[0]
    squares = {
        name: (layers[name].scaling["default"] * each.strengths[0]).square().tolist()
        for name, each in found.items()
    }
    for name, rank in ranks_for_budget(squares, widths, budget).items():
        layers[name].lora_A["default"].weight.data = found[name].A[0, :rank].contiguous()
        layers[name].lora_B["default"].weight.data = found[name].B[0, :, :rank].contiguous()


def trained_parameters(model: Model) -> int:
    """The numbers of the adapter that train in the end; heads, which are the same for all, are left out."""
    if hasattr(model, "rank_summary"):
        return int(model.rank_summary().parameters)
    if not hasattr(model, "peft_config"):
        return sum(p.numel() for p in model.parameters() if p.requires_grad)
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


def optimizer_for(model: Model, rate: float) -> torch.optim.Optimizer:
    """AdamW without weight decay."""
    if hasattr(model, "b_is_faster"):
        from peft.optimizers import create_loraplus_optimizer

        optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=model.b_is_faster, weight_decay=0.0
        )
        return optimizer
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


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
            total = total + torch.linalg.norm(product - torch.eye(len(product), device=product.device))
            count += 1
    return model.peft_config["default"].orth_reg_weight * total / count
