"""A new adapter that combines others: `add_weighted_adapter`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rankwise.adapters import AdapterLayer, ParameterSlot
from rankwise.attach.attachment import (
    Attachment,
    Factors,
    adapter_layers,
    check_adapter_name,
    saved_modules,
)
from rankwise.config import LoraConfig
from rankwise.config.checks import check_number, check_one_of, check_whole
from rankwise.model.named import NamesAdapters
from rankwise.parallel.sharded import shared_out

_COMBINATIONS = ("svd", "linear", "cat")
_OF_PEFT = tuple("ties ties_svd dare_ties dare_linear dare_ties_svd dare_linear_svd".split()) + (
    "magnitude_prune",
    "magnitude_prune_svd",
)


class CombinesAdapters(NamesAdapters):
    """The part of an adapted model that combines several adapters into one."""

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        **options: Any,
    ) -> None:
        """Add a plain LoRA adapter that is the weighted sum of others. `set_adapter` makes it act.

        Args:
            adapters: names of LoRA or AdaLoRA adapters.
            weights: a finite number for each adapter.
            adapter_name: name of the new adapter.
            combination_type: "cat" gives the exact sum of the updates, at the sum of the ranks. "svd" gives the best
                approximation of that sum at rank ``svd_rank``. "linear" adds the factors of adapters of one rank, each
                times the square root of its weight and scale, as PEFT does. With several adapters the result of
                "linear" is not the sum of the updates, since each A is multiplied by every B.
            svd_rank: rank for "svd", at least 1. None: the greatest of the adapters' ranks.
            options: PEFT's other arguments. ``svd_full_matrices``, ``svd_driver`` and ``density`` have no effect here;
                all others are refused.

        Raises:
            TypeError: an option is unknown, or a value has the wrong type.
            ValueError: an adapter does not exist, the adapters cannot be combined, or ``combination_type`` is one that
                only PEFT has.

        Example:
            >>> import torch, rankwise as rw
            >>> config = rw.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
            >>> model = rw.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config, "a")
            >>> model.add_adapter("b", config)
            >>> model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "both", combination_type="cat")
            >>> layer = model[0]
            >>> expected = 0.5 * layer.delta_weight("a") + 2 * layer.delta_weight("b")
            >>> torch.allclose(layer.delta_weight("both"), expected, atol=1e-6)
            True
        """
        _check_options(combination_type, options)
        check_adapter_name(self, adapter_name)
        names, amounts = self._checked_parts(adapters, weights)
        kind = "linear" if len(names) == 1 else combination_type
        layers = adapter_layers(self)
        rank = _rank(layers, names, kind, svd_rank)
        made: dict[str, Factors] = {}
        for path, layer in layers.items():
            parts = [
                (name, weight) for name, weight in zip(names, amounts, strict=True) if name in layer.lora_A
            ]
            if parts:
                A, B = _combined(path, layer, parts, kind, rank)
                made[path] = Factors(A, B, None, 1.0)
        saved: dict[str, Any] = {}
        for path, module in saved_modules(self).items():
            held = [name for name in names if name in module.modules_to_save]
            if len(held) > 1:
                raise ValueError(
                    f"The adapters {held} can't be combined: each has a copy of {path!r} in `modules_to_save`, "
                    "and at most one of them may."
                )
            if held:
                state = module.modules_to_save[held[0]].state_dict()
                saved[path] = {key: value.detach().clone() for key, value in state.items()}
        config = _plain_lora(self.peft_config[names[0]], rank, list(made), list(saved))
        self._attach(Attachment(adapter_name, config, made, saved))

    def _checked_parts(
        self, adapters: Sequence[str], weights: Sequence[float]
    ) -> tuple[list[str], list[float]]:
        if isinstance(adapters, str) or not adapters or len(adapters) != len(weights):
            raise ValueError(
                f"`adapters` and `weights` must be lists of one length, but are {adapters!r} and {weights!r}."
            )
        names = list(adapters)
        if len(set(names)) < len(names):
            raise ValueError(f"`adapters`={names!r} names one twice: add up its weights.")
        for name in names:
            self._check_name(name)
            if self.peft_config[name].bias != "none":
                raise ValueError(
                    f"{name!r} has trained the base model's biases (bias={self.peft_config[name].bias!r}), which can't "
                    "be combined."
                )
        if shared_out(self):
            raise ValueError("Combine adapters before the model's parameters are sharded over processes.")
        return names, [float(check_number("weights", weight)) for weight in weights]


def _check_options(combination_type: str, options: dict[str, Any]) -> None:
    if combination_type in _OF_PEFT:
        raise ValueError(
            f"`combination_type`={combination_type!r} is not offered: use one of {', '.join(_COMBINATIONS)}, or "
            "combine the saved adapters with PEFT, which has it."
        )
    check_one_of("combination_type", combination_type, _COMBINATIONS)
    for name, value in options.items():
        if name == "svd_clamp":
            if value is not None:
                raise ValueError(
                    "`svd_clamp` is not offered: combine the saved adapters with PEFT, which has it."
                )
        elif name == "density":
            if value is not None:
                warnings.warn(
                    f"`density`={value!r} has no effect on `combination_type`={combination_type!r}.",
                    UserWarning,
                    stacklevel=3,
                )
        elif name not in ("svd_full_matrices", "svd_driver", "majority_sign_method"):
            raise TypeError(f"add_weighted_adapter has no argument {name!r}.")


def _rank(layers: dict[str, AdapterLayer], names: list[str], kind: str, svd_rank: int | None) -> int:
    ranks = {
        name: max(
            (len(layer.factors(name)[0]) for layer in layers.values() if name in layer.lora_A), default=0
        )
        for name in names
    }
    if kind == "cat":
        return max(sum(ranks.values()), 1)
    if kind == "svd" and svd_rank is not None:
        return check_whole("svd_rank", svd_rank, least=1)
    if kind == "linear" and len(set(ranks.values())) > 1:
        raise ValueError(
            f"`combination_type`='linear' needs adapters of one rank, but theirs are {ranks}: use 'svd' or 'cat'."
        )
    return max(*ranks.values(), 1)


@torch.no_grad()
def _combined(
    path: str, layer: AdapterLayer, parts: list[tuple[str, float]], kind: str, rank: int
) -> tuple[Tensor, Tensor]:
    """A, (rank, d_in), and B, (d_out, rank), of the combination, whose scale is 1."""
    if isinstance(layer, ParameterSlot):
        raise ValueError(f"{path!r} is adapted as a parameter, of which adapters can't be combined.")
    given = [(*layer.factors(name), weight * layer.scaling[name]) for name, weight in parts]
    for A, B, _ in given:
        if len(A) != B.shape[1]:
            raise ValueError(f"{path!r} is a grouped convolution, of which adapters can't be combined.")
    if kind == "linear":
        most = max(len(A) for A, _, _ in given)
        roots = [math.sqrt(abs(weight)) for _, _, weight in given]
        rows = [
            _padded(A, most) * math.copysign(root, w) for (A, _, w), root in zip(given, roots, strict=True)
        ]
        columns = [_padded(B.T, most) * root for (_, B, _), root in zip(given, roots, strict=True)]
        A, B = torch.stack(rows).sum(0), torch.stack(columns).sum(0).T
    else:
        A = torch.cat([A * weight for A, _, weight in given])
        B = torch.cat([B for _, B, _ in given], dim=1)
        if kind == "svd":
            A, B = _best(A, B, rank)
    dtype, device = layer.lora_A[parts[0][0]].dtype, layer.lora_A[parts[0][0]].device
    A, B = _padded(A, rank), _padded(B.T, rank).T
    return A.to(device, dtype).contiguous(), B.to(device, dtype).contiguous()


def _best(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of ``B A``, of a rank of at most ``rank``."""
    # In float64 the products of float32 numbers cannot overflow.
    Q_A, R_A = torch.linalg.qr(A.double().T)
    Q_B, R_B = torch.linalg.qr(B.double())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * (Vh[:rank] @ Q_A.T), Q_B @ (U[:, :rank] * root)


def _padded(rows: Tensor, rank: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(rank - len(rows), rows.shape[1])]) if len(rows) < rank else rows


def _plain_lora(config: LoraConfig, rank: int, layers: list[str], saved: list[str]) -> LoraConfig:
    """A LoRA configuration of scale 1 for ``layers``."""
    kept = ("task_type", "base_model_name_or_path", "revision", "fan_in_fan_out", "lora_dropout")
    return LoraConfig(
        **{name: getattr(config, name) for name in kept},
        r=rank,
        lora_alpha=rank,
        target_modules=layers,
        modules_to_save=saved or None,
    )
