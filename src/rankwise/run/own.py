"""A run on rankwise's own layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.config import AdaLoraConfig
from rankwise.method.importance import ElementImportance
from rankwise.method.scale import lora_scale
from rankwise.run.choice.choice import Choice
from rankwise.run.choice.paper import PaperChoice
from rankwise.run.choice.principal import PrincipalChoice
from rankwise.run.controller import Controller
from rankwise.run.factors import Factors
from rankwise.run.own_pairs import own_pairs
from rankwise.run.pairs import KEYS
from rankwise.run.run_tensors import ModelBuffers
from rankwise.run.warn_once import WarnOnce


def own_controller(
    model: nn.Module, layers: dict[str, Any], adapter: str, config: AdaLoraConfig
) -> Controller:
    """Start the run of an adapter on rankwise's layers. The run's tensors become buffers of ``model``.

    Args:
        model: the adapted model.
        layers: the adapted layers by module path, in model order.
        adapter: the adapter's name.
        config: the adapter's configuration.

    Raises:
        ValueError: ``target_r`` leaves no rank at all.
    """
    pairs, warn = own_pairs(layers, adapter), WarnOnce()
    has_E = config.form.has_E
    chosen = any(adapter in layer.kept for layer in layers.values())  # before the adapter was loaded
    factors = Factors(pairs, ModelBuffers(model, pairs[0].device), ("E", *KEYS) if has_E else KEYS)
    if not chosen:
        factors.layout.refuse_no_rank(config.target_r)
    _warn_of_unused_penalty(config, warn)
    choice: Choice
    if has_E:
        choice = PaperChoice(factors, ElementImportance(factors.layout), (config.beta1, config.beta2), warn)
    else:
        end = lora_scale(config.lora_alpha, config.target_r, config.use_rslora)
        choice = PrincipalChoice(factors, config.target_r, config.use_rslora, [end] * len(pairs), warn)
    controller = Controller(adapter, factors, choice, config, warn)
    if chosen:
        factors.mask.copy_(torch.cat([pair.acting() for pair in pairs]))
        controller.fix()
    return controller


def _warn_of_unused_penalty(config: AdaLoraConfig, warn: WarnOnce) -> None:
    weight = config.orth_reg_weight
    if weight and not config.form.has_E:
        warn(
            f"`orth_reg_weight`={weight} belongs to the paper's form of AdaLoRA, which PEFT has. This run has the "
            "default form, which needs no penalty, because it makes directions orthogonal exactly: leave "
            "`orth_reg_weight` out. For PEFT's form set `init_lora_weights=True`."
        )


def kept_ranks(controller: Controller, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the masks of the ranks that a saved adapter holds, by module path. A mask is bool, (r,), on the CPU.

    In the paper's form, a triplet may have grown back since the last cut. Its E is then not 0.

    Args:
        controller: the controller of an adapter on rankwise's layers.
        state: a whole state dictionary of the model to read E from. By default E is read from the layers.
    """
    factors, mask = controller.factors, controller.factors.mask.cpu()
    if "E" in factors.keys and not controller.fixed:
        own = state and [state[f"{pair.path}.lora_E.{controller.adapter}"] for pair in factors.pairs]
        E = own or factors.rows("E")
        mask = mask | (torch.cat([each.detach().flatten().cpu() for each in E]) != 0)
    paths = [pair.path for pair in factors.pairs]
    return dict(zip(paths, mask.split(factors.layout.ranks), strict=True))
