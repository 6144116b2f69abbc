"""The base of all adapted layers: the factors of their adapters, and which of them act.

An adapted layer is the base layer itself, given a subclass in place: its weights keep their names, and
``isinstance(layer, nn.Linear)`` still holds. For each adapter name it holds

    lora_A: (r, d_in), lora_B: (d_out, r), and for AdaLoRA lora_E: (r, 1),

and its output is that of the base layer plus ``scaling * B diag(E) A`` applied to the input. For a convolution
d_in is ``in_channels * kernel height * kernel width``, for an embedding the number of entries.

A new kind of base layer is a subclass of `AdapterLayer` in a file of its own, and a line in ``KINDS``. The class says
which layers it adapts, which shapes and names their factors have in a file, and how they act. Methods for layers that
are not adapted yet take the layer as an argument.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankwise.adapters.branch import WithoutAutocast
from rankwise.adapters.inplace import InPlace
from rankwise.parallel.ddp import keep_in_graph, note_use


class AdapterLayer(InPlace, nn.Module):
    """Base of the mixins, one for each kind of base layer. `prepare` makes the attributes; see the module."""

    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict
    lora_E: nn.ParameterDict
    scaling: dict[str, float]
    dropout_rate: dict[str, float]
    # The triplets that act, once some were cut for good: the first n, or those with these indices.
    kept: dict[str, int | Tensor]
    # For compilers: the scales of those adapters whose scale has changed, 0-dim and float32, on the CPU.
    changed_scale: dict[str, Tensor]
    adapter_compute_dtype: dict[str, torch.dtype]  # if it differs from the dtypes of input and output
    active_adapters: list[str]
    merged_adapters: list[str]
    adapters_enabled: bool
    before_merge: Any  # the packed weight that `unmerge` puts back, while something is merged into it

    called: ClassVar[str]  # the name of such layers in messages
    in_all_linear: ClassVar[bool] = False  # whether `target_modules="all-linear"` includes it
    starts_at_zero: ClassVar[str] = "lora_B"  # the factor that makes LoRA's update 0 at the start
    requantizes: ClassVar[bool] = False  # merging unpacks the base weight and packs it again, which rounds it
    file_prefix: ClassVar[str] = "lora_"  # the prefix of A and B in a file
    file_dims: ClassVar[int] = 2  # dimensions of plain LoRA's A and B in a file
    base_in_file: ClassVar[bool] = False  # whether a file may also hold the base weight

    _own_attributes: ClassVar[tuple[str, ...]] = (
        *("lora_A", "lora_B", "lora_E", "scaling", "changed_scale", "dropout_rate", "kept"),
        *("adapter_compute_dtype", "active_adapters", "merged_adapters", "adapters_enabled", "before_merge"),
    )

    def prepare(self) -> None:
        """Make the attributes, empty. Call this before the first adapter is added."""
        for name in ("lora_A", "lora_B", "lora_E"):
            setattr(self, name, nn.ParameterDict())
        self.scaling, self.dropout_rate, self.kept, self.adapter_compute_dtype = {}, {}, {}, {}
        self.changed_scale = {}
        self.active_adapters, self.merged_adapters = [], []
        self.adapters_enabled = True
        self.before_merge = None

    def clean(self) -> None:
        """Remove the attributes that `prepare` made."""
        for name in AdapterLayer._own_attributes:  # the layer may already have its own class again
            delattr(self, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a pickle or a copy. A pickle of an earlier version has no `changed_scale`."""
        super().__setstate__({"changed_scale": {}, **state})  # type: ignore[no-untyped-call]

    # Facts about a kind of base layer.

    @classmethod
    def adapts(cls, layer: nn.Module) -> bool:
        """Whether ``layer`` is of this kind."""
        raise NotImplementedError

    @classmethod
    def factor_shapes(cls, layer: Any, rank: int, adalora: bool) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of A and B at rank ``rank``: (r, d_in) and (d_out, r), unless plain LoRA has another layout.

        Raises:
            ValueError: the layer can't have this rank.
        """
        raise NotImplementedError

    @classmethod
    def rank_of(cls, layer: Any, A: Tensor) -> int:
        """The rank at which `factor_shapes` gives A its rows."""
        return len(A) // cls.blocks(layer)

    @classmethod
    def blocks(cls, layer: Any) -> int:
        """The number of matrices in the layer, each with its own rank. A's rows and B's columns lie block by block."""
        return 1

    def add_adapter_output(self, output: Tensor, x: Tensor, name: str) -> Tensor:
        """``output`` plus adapter ``name``'s output for the input ``x``."""
        raise NotImplementedError

    def shape_like_weight(self, delta: Tensor) -> Tensor:
        """A (d_out, d_in) matrix in the shape of the base weight."""
        return delta

    @classmethod
    def reset_factors(cls, A: Tensor, B: Tensor, gaussian: bool) -> None:
        """Plain LoRA's start: B = 0 and A Kaiming-uniform, or normal with deviation 1/r if ``gaussian``."""
        if gaussian:
            nn.init.normal_(A, std=1 / max(A.shape[0], 1))
        elif A.numel():
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        nn.init.zeros_(B)

    # Names and layout of the factors in a file of PEFT's format.

    @classmethod
    def file_name(cls, path: str, factor: str, adalora: bool) -> str:
        """The name of ``factor`` ("A", "B" or "E") of the layer at ``path``."""
        return f"{path}.lora_{factor}" if adalora else f"{path}.lora_{factor}.weight"

    def to_file(self, factor: str, tensor: Tensor, adalora: bool) -> Tensor:
        """A factor in the file's layout."""
        return tensor

    @classmethod
    def from_file(cls, layer: Any, factor: str, tensor: Tensor, adalora: bool) -> Tensor:
        """A factor in the layout of ``layer``. This undoes `to_file`."""
        return tensor

    @classmethod
    def as_lora(cls, layer: Any, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of an update ``B A`` of the layer's weight, in plain LoRA's layout."""
        return A, B

    @classmethod
    def from_lora(cls, layer: Any, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Undo `as_lora`.

        Raises:
            ValueError: `as_lora` can't have made these factors.
        """
        return A, B

    # Adapters.

    def add_adapter(
        self, name: str, A: Tensor, B: Tensor, E: Tensor | None, scaling: float, dropout_rate: float
    ) -> None:
        """Hold a new adapter's factors: A (r, d_in), B (d_out, r) and, for AdaLoRA, E (r, 1)."""
        self.lora_A[name] = nn.Parameter(A, requires_grad=False)
        self.lora_B[name] = nn.Parameter(B, requires_grad=False)
        if E is not None:
            self.lora_E[name] = nn.Parameter(E, requires_grad=False)
        self.scaling[name], self.dropout_rate[name] = scaling, dropout_rate

    def remove_adapter(self, name: str) -> None:
        """Forget adapter ``name``; it must not be merged."""
        factors = (self.lora_A, self.lora_B, self.lora_E)
        numbers = (self.scaling, self.changed_scale, self.dropout_rate)
        for held in (*factors, *numbers, self.kept, self.adapter_compute_dtype):
            held.pop(name) if name in held else None
        if name in self.active_adapters:
            self.active_adapters.remove(name)

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """``{"lora_A": A, "lora_E": E, "lora_B": B}`` of adapter ``name``; without "lora_E" for plain LoRA."""
        held = {"lora_A": self.lora_A, "lora_E": self.lora_E, "lora_B": self.lora_B}
        return {key: factors[name] for key, factors in held.items() if name in factors}

    def factor(self, key: str, name: str) -> Any:
        """`lora_A`, `lora_E` or `lora_B` of adapter ``name``. None if it has no such factor, as plain LoRA has no E.

        Every layer calls this in every pass. Reading ``_modules`` takes a fraction of an attribute's time.
        """
        held: Any = self._modules[key]
        parameters = held.__dict__["_parameters"]
        if name in parameters:
            return parameters[name]  # not `get`: under DeepSpeed, indexing gathers the parameter
        return held[name] if name in held._keys else None

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A with E folded in, (k, d_in), and B, (d_out, k), of the k triplets that act."""
        if not torch.is_grad_enabled():
            note_use(self._trained_here(name))
        A, B = self.lora_A[name], self.lora_B[name]
        E = self.lora_E[name] if name in self.lora_E else None
        if E is None and torch.compiler.is_compiling():
            return A, B  # ranks that are off are 0, so the graph need not depend on which ones they are
        if name in self.kept:
            kept = self.kept[name]
            chosen = slice(kept) if isinstance(kept, int) else kept.to(A.device)
            A, B = A[chosen], B[:, chosen]
            E = None if E is None else E[chosen]
        return (A if E is None else A * E), B

    def acts(self, name: str) -> bool:
        """Whether adapter ``name`` has any triplet here. At rank 0 the layer is its base layer.

        Raises:
            ValueError: the factors were offloaded.
        """
        A = self.factor("lora_A", name)
        if A is None or not A.numel():
            return False
        if A.is_meta and hasattr(self.lora_A, "_hf_hook"):
            raise ValueError(
                f"The factors of adapter {name!r} are not here: Accelerate has offloaded them, and only brings the "
                "base weights back. Offload the base model first, and attach or load the adapter afterwards."
            )
        if torch.compiler.is_compiling():
            if name not in self.lora_E:
                return True  # without a look at `kept`, on which the compiler would depend
        elif not self.kept:
            return True
        kept = self.kept.get(name, 1)
        return kept > 0 if isinstance(kept, int) else kept.numel() > 0

    def block_ranks(self, name: str) -> list[int]:
        """The number of triplets of adapter ``name`` that act in each of the layer's `blocks`."""
        kept = self.kept_ranks_of_stack(name)
        acts = torch.ones(len(self.lora_A[name]), dtype=torch.bool, device="cpu") if kept is None else kept
        return [int(part.sum()) for part in acts.tensor_split(self.blocks(self))]

    def kept_ranks_of_stack(self, name: str) -> Tensor | None:
        """The mask of acting triplets, (r,), bool, on the CPU. None: all act, or the layer is one block."""
        if self.blocks(self) == 1 or name not in self.kept:
            return None
        mask = torch.zeros(len(self.lora_A[name]), dtype=torch.bool, device="cpu")
        kept = self.kept[name]
        mask[slice(kept) if isinstance(kept, int) else kept.cpu()] = True
        return mask

    def delta_weight(self, name: str) -> Tensor:
        """``scaling * B diag(E) A`` in the shape of the base weight, in the factors' dtype."""
        A, B = self.factors(name)
        return self.shape_like_weight((B @ A) * self.scaling[name])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = self.base_forward(x, *args, **kwargs)
        for name in self._active_unmerged():
            if self.acts(name):
                output = self.add_adapter_output(output, x, name)
            else:
                output = keep_in_graph(output, self._trained_here(name))
        return output

    def base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output for ``x``, without adapters."""
        output: Tensor = super().forward(x, *args, **kwargs)
        return output

    def _active_unmerged(self) -> list[str]:
        """The active adapters whose output has to be added."""
        if not self.adapters_enabled:
            return []
        if not self.merged_adapters:
            return self.active_adapters
        return [name for name in self.active_adapters if name not in self.merged_adapters]

    def _trained_here(self, name: str) -> list[nn.Parameter]:
        bias = self._parameters.get("bias")
        return [*self.adapter_parameters(name).values(), *([] if bias is None else [bias])]

    def _adapter_input(self, x: Tensor, name: str) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A[name].dtype)
        return nn.functional.dropout(x, self.dropout_rate[name], self.training)

    # Merging.

    @torch.no_grad()
    def check_merge(self, names: list[str], finite: bool = False) -> None:
        """Check that `merge` will work and, if ``finite``, that the merged weight has no NaN or infinite values.

        Raises:
            ValueError: it will not.
        """
        acting = self._not_yet_merged(names)
        if acting and not isinstance(self.held_weight(), nn.Parameter):
            raise ValueError(
                f"The weight of a {type(self).__name__} is computed from other parameters (by weight_norm?), so "
                "nothing can be merged into it. Remove the parametrization first, or keep the adapter unmerged."
            )
        if acting:
            self._refuse_packed_or_absent()
        if finite and not self._moved(acting, 1).isfinite().all():
            raise ValueError(
                f"Merging {acting} would put NaN or infinite values into a {type(self).__name__} weight. "
                "The adapter is broken: load an earlier checkpoint."
            )

    @torch.no_grad()
    def merge(self, names: list[str], for_good: bool = False) -> None:
        """Add the adapters' updates to the base weight. Call `check_merge` first.

        ``for_good``: it will not be unmerged, so that a packed weight need not be remembered.
        """
        if acting := self._not_yet_merged(names):
            if self.requantizes and not for_good and self.before_merge is None:
                self.before_merge = self.packed_weight()
            self.set_base_weight(self._moved(acting, 1))
        self.merged_adapters += [name for name in names if name not in self.merged_adapters]

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract what `merge` added."""
        if self.before_merge is not None:
            self.set_packed_weight(self.before_merge)
            self.before_merge = None
        elif acting := [name for name in self.merged_adapters if self.acts(name)]:
            self.set_base_weight(self._moved(acting, -1))
        self.merged_adapters = []

    def _refuse_packed_or_absent(self) -> None:
        weight: Any = self.held_weight()
        if weight.is_meta:
            raise ValueError(
                f"the weight of this {type(self).__name__} is not here (offloaded by Accelerate?), so nothing can be "
                "merged into it. Load the base model without offloading, load the adapter into that, and merge."
            )
        plain = type(weight) is nn.Parameter and weight.is_floating_point()
        if not plain and not self.requantizes:
            raise ValueError(cant_merge_into(type(weight).__name__))

    def _not_yet_merged(self, names: list[str]) -> list[str]:
        return [name for name in names if self.acts(name) and name not in self.merged_adapters]

    def _moved(self, names: list[str], sign: int) -> Tensor:
        """The base weight with the adapters' updates added (1) or subtracted (-1), and rounded once."""
        weight = self.base_weight()
        wide = weight.dtype if weight.element_size() >= 4 else torch.float32
        moved = weight.to(wide)
        with WithoutAutocast(moved):
            for name in names:
                moved = moved + sign * self.delta_weight(name).to(wide)
        return moved.to(weight.dtype)

    def held_weight(self) -> nn.Parameter | None:
        """The parameter that is adapted, if there is one."""
        return self._parameters.get("weight")

    def base_weight(self) -> Tensor:
        """The base weight as a dense tensor."""
        return self.weight  # type: ignore[return-value]

    def set_base_weight(self, weight: Tensor) -> None:
        """Replace the base weight by a dense tensor."""
        self.weight.data.copy_(weight)  # type: ignore[operator]

    def packed_weight(self) -> Any:
        """The packed base weight, from which `set_packed_weight` restores it bit for bit."""
        raise NotImplementedError

    def set_packed_weight(self, packed: Any) -> None:
        """Restore the weight that `packed_weight` returned."""
        raise NotImplementedError


def cant_merge_into(what: str) -> str:
    """The message that refuses merging into weights packed as ``what``, and names another way."""
    return (
        f"nothing can be merged into a packed weight ({what}). Keep the adapter unmerged; or load the base model "
        "without quantization, load the adapter into that, merge, and quantize the result."
    )
