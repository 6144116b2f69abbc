"""The largest singular values of a gradient, from a sketch of it. A large gradient is never stored itself.

For a layer y = W x the gradient of a batch is G = sum over tokens of (dL/dy) x^T, a matrix of W's size. Two passes over
the same batches find its first directions (Halko, Martinsson and Tropp, 2011). The first pass sums Y = G Omega, where
Omega is random and has only k columns. Q is an orthonormal basis of Y. The second pass sums Q^T G. Its singular values
are those of G in the directions that Q spans. Both are sums over tokens, so no matrix of W's size is formed, and the
sketch takes about as much memory as an adapter. Where W is so small that G takes no more room than the sketch, G itself
is summed, and the result is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.method.magnitude import largest, power_below, scaled_norm

OVERSAMPLING = 8  # columns of the sketch in addition to the wanted directions


class GradientSketch:
    """Sums products of x and dL/dy of a layer, batch by batch, in one or two passes over the same batches.

    Args:
        d_out: number of rows of the weight.
        d_in: number of columns of the weight.
        directions: number of singular values that are wanted, at least 1.
        generator: generator of the random matrix. The sketch lies on its device.
        dtype: dtype of the sketch, float32 or float64.

    Attributes:
        exact: whether the gradient itself is summed.
        passes: number of passes over the batches, 1 or 2.
        finished: whether all passes are complete.

    Example:
        >>> x, dy = torch.randn(50, 30), torch.randn(50, 20)
        >>> sketch = GradientSketch(20, 30, directions=20, generator=torch.Generator())
        >>> for _ in range(sketch.passes):
        ...     sketch.add(x, dy)
        ...     sketch.end_pass()
        >>> exact = torch.linalg.svdvals(dy.T @ x)
        >>> bool(torch.allclose(sketch.singular_values(), exact.double(), rtol=1e-4))
        True
    """

    def __init__(
        self,
        d_out: int,
        d_in: int,
        directions: int,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        size = min(directions + OVERSAMPLING, d_out, d_in)
        self.exact = d_out * d_in <= size * (d_out + d_in)
        self.passes = 1 if self.exact else 2
        self.directions = min(directions, d_out, d_in)
        options = {"dtype": dtype, "device": generator.device}
        self._wide: Tensor | None = None  # Omega (d_in, k) in the first pass, Q (d_out, k) in the second
        if not self.exact:
            self._wide = torch.randn(d_in, size, generator=generator, **options)  # type: ignore[call-overload]
        self._sum = torch.zeros(d_out, d_in if self.exact else size, **options)  # type: ignore[call-overload]
        self._in_second, self._norm = False, 0.0
        self.finished = False

    @property
    def numbers(self) -> int:
        """The number of elements that the sketch holds: at most (directions + 8) (d_out + d_in)."""
        return int(self._sum.numel()) + (0 if self._wide is None else int(self._wide.numel()))

    def add(self, x: Tensor, dy: Tensor) -> None:
        """Add tokens: x, (..., d_in), and dL/dy, (..., d_out), of any dtype."""
        dtype = self._sum.dtype
        x, dy = x.reshape(-1, x.shape[-1]).to(dtype), dy.reshape(-1, dy.shape[-1]).to(dtype)
        if self._wide is None:
            self._sum.addmm_(dy.T, x)
        elif self._in_second:
            self._sum.addmm_((dy @ self._wide).T, x)
        else:
            self._sum.addmm_(dy.T, x @ self._wide)

    def end_pass(self) -> None:
        """Complete a pass. Call it once all batches were added."""
        if self._wide is None or self._in_second:
            self.finished = True
            return
        # The squared length of G times a normal vector is, on average, the squared norm of G.
        self._norm = scaled_norm(self._sum) / math.sqrt(self._sum.shape[1])
        d_in = len(self._wide)
        self._wide = torch.linalg.qr(self._sum / self._power()).Q
        self._sum = self._sum.new_zeros(self._wide.shape[1], d_in)
        self._in_second = True

    def size(self) -> float:
        """The norm of this pass's sum. It is 0 without any gradient, and not finite if a gradient was not finite."""
        return scaled_norm(self._sum)

    def singular_values(self) -> Tensor:
        """The largest singular values of the sum, in descending order, float64: exact ones, or slightly too small."""
        power = self._power()
        values: Tensor = torch.linalg.svdvals(self._sum / power)
        return values[: self.directions].double() * power.flatten().double()

    def norm(self) -> float:
        """The Frobenius norm of the gradient: the root of the sum of all squared singular values.

        With a sketch it is the root of an unbiased estimate of the squared norm, but at least the norm that was found.
        """
        return self.size() if self.exact else max(self.size(), self._norm)

    def _power(self) -> Tensor:
        return power_below(largest(self._sum, (0, 1)))


def effective_rank(singular_values: Sequence[float]) -> float:
    """The number of directions in which a matrix acts: the exponential of its spectrum's entropy.

    Roy and Vetterli (2007) define it.

    Args:
        singular_values: singular values, at least 0, in any order.

    Returns:
        A number from 1, if one direction holds everything, to the number of values, if all are equal. 0 if all are 0.

    Example:
        >>> effective_rank([3.0, 0.0]), round(effective_rank([2.0, 2.0, 2.0]), 6), effective_rank([0.0])
        (1.0, 3.0, 0.0)
    """
    values = torch.tensor(singular_values, dtype=torch.float64, device="cpu")
    if not values.any():
        return 0.0
    shares = values / values.max()
    return float(torch.special.entr(shares / shares.sum()).sum().exp())
