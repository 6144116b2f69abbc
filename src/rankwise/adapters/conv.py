"""Adapters for convolutions in one, two or three dimensions, with any stride, padding, dilation and groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.adapters.layer import AdapterLayer


class ConvAdapters(AdapterLayer):
    """For convolutions: weight (d_out, in_channels / groups, *kernel).

    AdaLoRA's update has exactly the weight's shape: A is (r, in_channels / groups * size of the kernel). Plain LoRA
    follows PEFT's layout, which for ``groups`` > 1 is not a change of the weight. A is a dense convolution over
    all input channels, B a grouped one with (d_out, r / groups); such an adapter can't be merged, unless AdaLoRA wrote
    it: then A is 0 for the channels of other groups.
    """

    base: ClassVar[type[nn.Module]]
    convolution: ClassVar[Callable[..., Tensor]]

    @classmethod
    def adapts(cls, layer: nn.Module) -> bool:
        return isinstance(layer, cls.base)

    @classmethod
    def factor_shapes(cls, layer: Any, rank: int, adalora: bool) -> tuple[tuple[int, int], tuple[int, int]]:
        size = math.prod(layer.kernel_size)
        if adalora:
            d_in = layer.in_channels // layer.groups * size
            return (rank, d_in), (layer.out_channels, rank)
        if rank % layer.groups:
            raise ValueError(
                f"A {cls.called} with groups={layer.groups} takes a LoRA rank divisible by its groups, but r={rank}. "
                "Set another rank for it in `rank_pattern`, or leave it out with `exclude_modules`."
            )
        return (rank, layer.in_channels * size), (layer.out_channels, rank // layer.groups)

    def to_file(self, factor: str, tensor: Tensor, adalora: bool) -> Tensor:
        """Plain LoRA's factors are kernels: A (r, channels, *kernel), B (d_out, r / groups, 1, …)."""
        if adalora:
            return tensor
        kernel: Any = self.kernel_size if factor == "A" else self._ones()
        return tensor.view(tensor.shape[0], -1, *kernel)

    @classmethod
    def from_file(cls, layer: Any, factor: str, tensor: Tensor, adalora: bool) -> Tensor:
        return tensor.flatten(1)

    @classmethod
    def as_lora(cls, layer: Any, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Every group gets its own k rows of a dense A, which are 0 for the channels of other groups."""
        return _for_each_group(A, layer.groups), B

    @classmethod
    def from_lora(cls, layer: Any, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return ungrouped(A, layer.groups), B

    def add_adapter_output(self, output: Tensor, x: Tensor, name: str) -> Tensor:
        """``output`` plus the adapter's output for ``x`` (batch, in_channels, …)."""
        x = self._adapter_input(x, name)
        groups: int = self.groups  # type: ignore[assignment]
        if groups > 1 and self._changes_weight(name):
            added = self._convolve(x, self.delta_weight(name), groups)
        else:
            A, B = self.factors(name)
            hidden = self._convolve(x, A.view(A.shape[0], -1, *self.kernel_size), 1)  # type: ignore[misc]
            added = (
                self.convolution(hidden, B.view(*B.shape, *self._ones()), groups=groups) * self.scaling[name]
            )
        return (output + added).to(output.dtype)

    def shape_like_weight(self, delta: Tensor) -> Tensor:
        return delta.reshape(self.base_weight().shape)

    def delta_weight(self, name: str) -> Tensor:
        A, B = self._of_weight(name)
        return self.shape_like_weight((B @ A) * self.scaling[name])

    def check_merge(self, names: list[str], finite: bool = False) -> None:
        for name in names:
            if self.acts(name):
                self._of_weight(name)
        super().check_merge(names, finite)

    def _changes_weight(self, name: str) -> bool:
        """Whether the product of the factors changes the weight. It does not in plain LoRA's layout for groups."""
        return bool(self.lora_B[name].shape[1] == len(self.lora_A[name]))

    def _of_weight(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the factors if their product changes the weight, and raise a ValueError otherwise."""
        A, B = self.factors(name)
        if self._changes_weight(name):
            return A, B
        try:
            return self.from_lora(self, A, B)
        except ValueError:
            raise ValueError(
                f"A plain LoRA adapter of a {self.called} with groups={self.groups} is not a change of its weight, "
                "so it can't be merged. Keep it unmerged, or leave the layer out with `exclude_modules`."
            ) from None

    def _convolve(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        layer: Any = self
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
        return self.convolution(x, weight, None, layer.stride, padding, layer.dilation, groups)

    def _ones(self) -> tuple[int, ...]:
        return (1,) * (self.file_dims - 2)


class Conv1dAdapters(ConvAdapters):
    """For ``nn.Conv1d``: weight (d_out, in_channels / groups, kernel length)."""

    called = "Conv1d"
    file_dims = 3
    base = nn.Conv1d
    convolution = staticmethod(F.conv1d)


class Conv2dAdapters(ConvAdapters):
    """For ``nn.Conv2d``: weight (d_out, in_channels / groups, kernel height, kernel width)."""

    called = "Conv2d"
    file_dims = 4
    base = nn.Conv2d
    convolution = staticmethod(F.conv2d)


class Conv3dAdapters(ConvAdapters):
    """For ``nn.Conv3d``: weight (d_out, in_channels / groups, kernel depth, kernel height, kernel width)."""

    called = "Conv3d"
    file_dims = 5
    base = nn.Conv3d
    convolution = staticmethod(F.conv3d)


def _for_each_group(A: Tensor, groups: int) -> Tensor:
    """Return plain LoRA's A, (groups * k, groups * d_in), for the factor A (k, d_in) of a weight's change."""
    if groups == 1:
        return A
    dense = A.new_zeros(groups, len(A), groups, A.shape[1])
    for group in range(groups):
        dense[group, :, group] = A
    return dense.reshape(groups * len(A), -1)


def ungrouped(A: Tensor, groups: int) -> Tensor:
    """Return the factor A (k, d_in) from which plain LoRA's A, (groups * k, groups * d_in), was made.

    Raises:
        ValueError: plain LoRA's A was not made from such a factor, because it reads channels of other groups, too.

    Example:
        >>> import torch
        >>> ungrouped(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 2)
        tensor([[1.]])
    """
    own = A if groups == 1 else A.view(groups, len(A) // groups, groups, -1)[0, :, 0]
    if not _for_each_group(own, groups).equal(A):
        raise ValueError(
            f"its factors are not a change of the weight of a convolution with groups={groups}. They are plain LoRA's, "
            "which reads the channels of all groups."
        )
    return own
