"""DeepSpeed ZeRO (stages 1 to 3): reading and changing an adapter of which each process holds a part.

ZeRO concatenates the trainable parameters into flat vectors and divides these between the processes. The user's
optimizer steps the parts, which are float32 *masters*. Their gradients are already averaged, unscaled and clipped.
After the step ZeRO copies the masters to the parameters. Changes before and after a step are therefore made to the
masters, at the moment when that optimizer steps. Whole matrices are first gathered from all processes.

DeepSpeed steps the optimizer once for each of its vectors, so one step of the adapter may take several calls.

This module does not import DeepSpeed. DeepSpeed marks the parameters that it manages, and the marks are enough. Its
`safe_get_full_grad` cannot be used: while the optimizer steps, it raises an error (stages 1 and 2), or it returns
gradients that are neither unscaled nor clipped (stage 3).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_FRAMES = 14  # the most frames between DeepSpeed's call of an optimizer's step and a hook of that step
_GROUPS_AND_VECTORS = (  # attributes of the ZeRO optimizers: lists of parameters, and the vector of each list
    ("bit16_groups", "single_partition_of_fp32_groups"),  # stages 1 and 2
    ("fp16_groups", "fp32_partitioned_groups_flat"),  # stage 3, of any precision
    ("bf16_groups", "fp32_groups_flat_partition"),  # stage 1 in bfloat16
)


def partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed ZeRO steps its own parts instead of this parameter."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")  # stage 3; stages 1 and 2


def is_away(tensor: Any) -> bool:
    """Whether ZeRO stage 3 has partitioned a parameter, so that the parameter itself is empty now."""
    return bool(getattr(tensor, "ds_numel", 0)) and not tensor.numel()


def whole(parameters: Iterable[Any]) -> AbstractContextManager[None]:
    """Return a context in which ``parameters`` can be read whole. All processes must enter it together."""
    own = [parameter for parameter in parameters if is_away(parameter)]
    if not own:
        return nullcontext()
    gathered: AbstractContextManager[None] = sys.modules["deepspeed"].zero.GatheredParameters(own)
    return gathered


def tell_who_uses(layer: nn.Module, parameters: Iterable[Any]) -> None:
    """Tell ZeRO-3 that ``layer`` computes with ``parameters`` of modules that it never calls.

    ZeRO-3 would find this out in a forward pass, but could then mistake the order in which parameters are needed.
    """
    for parameter in parameters:
        if hasattr(parameter, "ds_id"):
            sys.modules["deepspeed"].zero.register_external_parameter(layer, parameter)


def refuse_away(parameters: Iterable[Any]) -> None:
    """Refuse to compute with factors that stage 3 has partitioned.

    Raises:
        ValueError: one of ``parameters`` is partitioned.
    """
    largest = max((int(parameter.ds_numel) for parameter in parameters if is_away(parameter)), default=0)
    if largest:
        raise ValueError(
            f"DeepSpeed ZeRO-3 has partitioned a factor of {largest} elements of an adapter, which must stay whole in "
            'every process. Set "stage3_param_persistence_threshold" under "zero_optimization" in DeepSpeed\'s '
            "configuration to more than the elements of the largest factor (rank times width)."
        )


def who_steps() -> tuple[str, Any]:
    """Return the name of the DeepSpeed module that is stepping an optimizer, and the ZeRO optimizer around it.

    Call it from a hook of the step. The name is "" if DeepSpeed is not stepping, and the second is None without ZeRO.
    """
    frame: FrameType | None = sys._getframe(1)
    caller = ""
    for _ in range(_FRAMES):
        if frame is None:
            break
        name: str = frame.f_globals.get("__name__", "")
        if name.startswith("deepspeed."):
            caller = caller or name
            owner = frame.f_locals.get("self")
            if any(hasattr(owner, vectors) for _, vectors in _GROUPS_AND_VECTORS):
                return caller, owner
        frame = frame.f_back
    return caller, None


class Piece(NamedTuple):
    """A part of one parameter that this process steps."""

    number: int  # number of the parameter
    start: int  # index of the piece's first element in the flat parameter
    master: Tensor  # (n,), float32, a view
    gradient: Tensor  # (n,), a view


class ZeroParts:
    """The parameters of one adapter, as ZeRO holds them.

    Args:
        parameters: all parameters of the adapter. A parameter's number is its position in this list.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self._stepped: set[int] = set()

    @property
    def _group(self) -> Any:
        first = next(p for p in self.parameters if partitioned(p))
        return getattr(first, "ds_process_group", None) or getattr(first, "_dp_group", None)

    def _trained(self) -> Iterator[int]:
        """Numbers of the parameters that ZeRO steps, in any process."""
        for number, parameter in enumerate(self.parameters):
            if _is_stepped(parameter):
                yield number

    def shape(self, number: int) -> torch.Size:
        """The shape of a whole parameter."""
        return shape_of(self.parameters[number])

    # Steps.

    def held(self, owner: Any, optimizer: torch.optim.Optimizer) -> frozenset[int]:
        """Numbers of the parameters that some process steps with the vectors that ``optimizer`` holds now.

        The result is the same in all processes, even in those that hold no piece.

        Args:
            owner: the ZeRO optimizer, as `who_steps` returns it.
            optimizer: the user's optimizer, which the ZeRO optimizer steps.
        """
        stepped = {id(vector) for vector in _vectors(optimizer)}
        names = next((pair for pair in _GROUPS_AND_VECTORS if hasattr(owner, pair[1])), None)
        if names is None:
            return frozenset()
        groups, vectors = (getattr(owner, name) for name in names)
        inside = {
            id(p)
            for group, vector in zip(groups, vectors, strict=True)
            if id(vector) in stepped
            for p in group
        }
        return frozenset(number for number, p in enumerate(self.parameters) if id(p) in inside)

    def stepped(self, numbers: Iterable[int]) -> bool:
        """Note that ``numbers`` were stepped, and return whether this completes the adapter's step."""
        self._stepped.update(numbers)
        if not self._stepped.issuperset(self._trained()):
            return False
        self._stepped.clear()
        return True

    def pieces(self, optimizer: torch.optim.Optimizer) -> Iterator[Piece]:
        """This process's pieces of the vectors that ``optimizer`` holds now."""
        vectors = list(_vectors(optimizer))
        for number in self._trained():
            master, start = _master(self.parameters[number])
            if master is None:
                continue
            for vector in vectors:
                offset = _place_in(vector, master)
                if offset is not None and vector.grad is not None:
                    gradient = vector.grad.view(-1)[offset : offset + master.numel()]
                    yield Piece(number, start, master, gradient)

    # Whole tensors.

    def gathered(
        self, numbers: Sequence[int], pieces: Iterable[Piece], value: Callable[[Piece], Tensor]
    ) -> list[Tensor]:
        """Put together whole float32 tensors, in the shapes of ``numbers``, from ``value`` of each piece.

        All processes must call it together. It takes one exchange between them.
        """
        shapes = [self.shape(number) for number in numbers]
        size, device = sum(shape.numel() for shape in shapes), self.parameters[0].device
        vector = torch.zeros(size, device=device, dtype=torch.float32)
        places = dict(zip(numbers, vector.split([shape.numel() for shape in shapes]), strict=True))
        for piece in pieces:
            if piece.number in places:
                values = value(piece)
                places[piece.number][piece.start : piece.start + values.numel()].copy_(values)
        torch.distributed.all_reduce(vector, group=self._group)
        return [places[number].view(shape) for number, shape in zip(numbers, shapes, strict=True)]

    def whole(self, numbers: Sequence[int]) -> list[Tensor]:
        """Return the masters of ``numbers``, whole. All processes must call it together.

        Parameters that ZeRO does not step are returned as they are.
        """
        stepped = [number for number in numbers if _is_stepped(self.parameters[number])]
        pieces = [piece for piece in self._own_pieces() if piece.number in stepped]
        masters = dict(zip(stepped, self.gathered(stepped, pieces, lambda piece: piece.master), strict=True))
        return [masters.get(n, self.parameters[n].detach()) for n in numbers]

    def _own_pieces(self) -> Iterator[Piece]:
        """This process's pieces of all parameters that ZeRO steps. The gradient field holds the master, too."""
        for number in self._trained():
            master, start = _master(self.parameters[number])
            if master is not None:
                yield Piece(number, start, master, master)

    def summed(self, values: Tensor) -> Tensor:
        """Sum ``values`` over all processes, in place. All processes must call it together."""
        torch.distributed.all_reduce(values, group=self._group)
        return values

    def any(self, here: bool) -> bool:
        """Whether ``here`` is true in any process. All processes must call it together."""
        return bool(self.summed(torch.tensor(int(here), device=self.parameters[0].device)))

    def remembered(self, optimizer: torch.optim.Optimizer, name: str) -> Iterator[Piece]:
        """This process's pieces, with ``optimizer``'s state tensor ``name`` in the gradient field."""
        for piece in self._own_pieces():
            for vector, state in optimizer.state.items():
                offset = _place_in(vector, piece.master)
                value = state.get(name) if offset is not None else None
                if isinstance(value, Tensor) and value.numel() == vector.numel():
                    held = value.view(-1)[offset : offset + piece.master.numel()]  # type: ignore[operator]
                    yield piece._replace(gradient=held)

    def assign(self, values: Mapping[int, Tensor]) -> None:
        """Give parameters new values, each in the parameter's shape. Masters and working copies both change."""
        for number, value in values.items():
            self._write(self.parameters[number], value)

    @staticmethod
    def add_to_gradients(pieces: Iterable[Piece], added: dict[int, Tensor]) -> None:
        """Add whole matrices, given by number, to the gradients of the pieces."""
        for piece in pieces:
            if piece.number in added:
                part = added[piece.number].reshape(-1)[piece.start : piece.start + piece.gradient.numel()]
                piece.gradient.add_(part.to(piece.gradient))

    @staticmethod
    def _write(parameter: Any, value: Tensor) -> None:
        """Copy ``value`` to every tensor that holds the parameter or a part of it."""
        if not is_away(parameter):
            parameter.data.copy_(value)
        if hasattr(parameter, "ds_tensor"):
            part = _part_of_stage_3(parameter, value)
            parameter.ds_tensor.data.view(-1)[: part.numel()].copy_(part)
        master, start = _master(parameter) if _is_stepped(parameter) else (None, 0)
        if master is not None:
            master.copy_(value.reshape(-1)[start : start + master.numel()])


def _vectors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The vectors that an optimizer holds now."""
    return (vector for group in optimizer.param_groups for vector in group["params"])


def _place_in(vector: Tensor, part: Tensor) -> int | None:
    """The index in ``vector`` at which ``part`` begins, if ``part`` is a view of the same memory. None otherwise."""
    if part.untyped_storage().data_ptr() != vector.untyped_storage().data_ptr():
        return None
    offset = int(part.storage_offset() - vector.storage_offset())
    return offset if 0 <= offset <= vector.numel() - part.numel() else None


def shape_of(parameter: Any) -> torch.Size:
    """The shape of a whole parameter, also where ZeRO-3 has partitioned it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _is_stepped(parameter: Any) -> bool:
    """Whether the optimizer that ZeRO wraps steps a parameter, or a part of it in some process."""
    if not parameter.requires_grad or not hasattr(parameter, "ds_id"):
        return parameter.requires_grad and hasattr(parameter, "_hp_mapping")
    optimizer = getattr(parameter, "_z3_optimizer", None)
    return optimizer is not None and optimizer.get_param_id(parameter) in optimizer.grad_position


def _master(parameter: Any) -> tuple[Tensor | None, int]:
    """This process's part of a parameter's master, (n,), and its start. None if the process holds no part."""
    try:
        return _master_of_stage_3(parameter) if hasattr(parameter, "ds_id") else _master_of_stage_2(parameter)
    except AttributeError as error:
        version = getattr(sys.modules.get("deepspeed"), "__version__", "?")
        raise ValueError(
            f"DeepSpeed {version} keeps the parts of the adapter's parameters in a way that rankwise does not know "
            f"({error}). Use DistributedDataParallel or `fully_shard` (FSDP version 2)."
        ) from error


def _master_of_stage_2(parameter: Any) -> tuple[Tensor | None, int]:
    mapping = parameter._hp_mapping  # None if the parameter lies in other processes' parts
    if mapping is None:
        return None, 0
    return mapping.hp_fragment.detach().view(-1), mapping.lp_fragment_address.start


def _part_of_stage_3(parameter: Any, values: Tensor) -> Tensor:
    """This process's part of ``values``, (n,), which are divided as ``parameter`` is. It may be empty."""
    length = parameter.ds_tensor.numel()  # the last processes' parts are padded
    first = torch.distributed.get_rank(parameter.ds_process_group) * length
    return values.reshape(-1)[first : first + length]


def _master_of_stage_3(parameter: Any) -> tuple[Tensor | None, int]:
    optimizer = parameter._z3_optimizer
    if optimizer.swap_optimizer:
        raise ValueError(
            'DeepSpeed keeps the optimizer\'s state on disk ("offload_optimizer" with the device "nvme"), where the '
            "adapter's ranks can't be allocated. Use the device \"cpu\" or none."
        )
    number, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    first = torch.distributed.get_rank(parameter.ds_process_group) * length
    held = min(length, parameter.ds_numel - first)  # the last processes' parts are padded
    if held <= 0:
        return None, 0
    return optimizer.fp32_partitioned_groups_flat[number].detach()[start : start + held], first
