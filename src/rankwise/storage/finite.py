"""Refuses to write adapters with NaN or infinite values, and numbers that overflow a smaller dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rankwise.attach.attachment import plain_name
from rankwise.files.tensors import is_finite, read_tensor_file
from rankwise.run.run_tensors import BUFFERS
from rankwise.storage.names import PREFIX, WEIGHTS_NAME, checkpoint_step

_SMALL = {torch.float16: "torch.bfloat16 or torch.float32"}


class NotFiniteError(ValueError):
    """An adapter that was to be saved holds NaN or infinite values."""


def refuse_broken(folder: Path, model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse to save NaN and infinite values, except in buffers of whole modules.

    If a trainer has just created an empty checkpoint folder for this save, the folder is removed. Otherwise the run
    would be resumed from it.

    Args:
        folder: the folder to save the adapter in.
        model: the adapted model.
        adapter: the adapter's name.
        tensors: all tensors to save, by name in the file.

    Raises:
        NotFiniteError: a tensor holds such values. The message names it, and the last checkpoint that is finite.
    """
    may = _own_buffers(model, adapter)
    broken = next(
        (
            name
            for name, each in tensors.items()
            if not is_finite(each) and name.removeprefix(PREFIX) not in may
        ),
        None,
    )
    if broken is None:
        return
    if checkpoint_step(folder) is not None:
        with contextlib.suppress(OSError):  # not empty, or missing
            folder.rmdir()
    last = last_finite(folder)
    if last is None:
        mend = "There is no earlier checkpoint. Train again with a lower learning rate."
    else:
        mend = (
            f"The last one without such values is {str(last)!r}: go on from there with a lower learning rate."
        )
    raise NotFiniteError(
        f"The adapter {adapter!r} is not saved to {str(folder)!r}, where nothing has changed: "
        f"{broken.removeprefix(PREFIX)!r} holds NaN or infinite values. The run has diverged, and more training does "
        f"not help. {mend}"
    )


def _own_buffers(model: nn.Module, adapter: str) -> set[str]:
    """The names in files of the buffers that are not rankwise's. They may hold infinities, as a mask does."""
    names = {plain_name(name) for name, _ in model.named_buffers()} - set(BUFFERS)
    inside = f".modules_to_save.{adapter}."
    return names | {name.replace(inside, other) for name in names for other in (".", ".modules_to_save.")}


def last_finite(folder: Path) -> Path | None:
    """The newest adapter at or near ``folder`` that can be read and holds no NaN or infinite values.

    For a checkpoint folder, such as ``…/checkpoint-500``, the checkpoints in its parent folder are tried. For another
    folder, the folder itself and the checkpoints in it are tried. The result is None if no adapter qualifies.
    """
    return next((each for each in _near(folder) if holds_finite_adapter(each)), None)


def holds_finite_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter that can be read and has no NaN or infinite values."""
    names = [each for each in _subfolders(folder) if checkpoint_step(each) is None]
    for place in (folder, *names):  # the adapter "default" is in the folder itself
        path = place / WEIGHTS_NAME
        if path.is_file():
            try:
                tensors = read_tensor_file(path)
                return not any(_is_broken(name, tensor) for name, tensor in tensors.items())
            except (OSError, ValueError):
                return False
    return False


def _is_broken(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of a file must be wrong. A head may hold infinities, as a mask does."""
    if "lora_" in name:
        return not is_finite(tensor)
    return tensor.is_floating_point() and bool(tensor.isnan().any())


def _near(folder: Path) -> Iterator[Path]:
    # a named adapter is in a subfolder
    own = folder if checkpoint_step(folder.parent) is None else folder.parent
    if checkpoint_step(own) is None:
        yield own
        yield from _checkpoints(own)
    else:
        yield from _checkpoints(own.parent)


def _checkpoints(folder: Path) -> Iterator[Path]:
    """The checkpoints in a folder, the newest first."""
    steps = [(step, each) for each in _subfolders(folder) if (step := checkpoint_step(each)) is not None]
    yield from (each for _, each in sorted(steps, reverse=True))


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(each for each in folder.iterdir() if each.is_dir())
    except OSError:
        return []


def converted(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Convert a factor to the dtype in which it is written.

    Args:
        name: the factor's name in messages.
        tensor: the factor, floating point.
        dtype: the dtype to write; by default the factor's own.

    Raises:
        ValueError: the factor holds NaN or infinite values, or ``dtype`` is not a floating-point dtype, can't hold one
            of the numbers, or would turn all of them into 0.

    Example:
        >>> converted("lora_B of 'q'", torch.tensor([1.0, 70000.0]), torch.float16)
        Traceback (most recent call last):
        ...
        ValueError: lora_B of 'q' has the number 7e+04, but float16 ends at 6.55e+04, so that it would be written as \
another. Write it with dtype torch.bfloat16 or torch.float32.
    """
    dtype = dtype or tensor.dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be floating point, such as torch.bfloat16, but is {dtype!r}.")
    if not is_finite(tensor):
        raise ValueError(
            f"{name} holds NaN or infinite values: the run has diverged. Use an earlier checkpoint."
        )
    made = tensor.to(dtype)
    refuse_overflow(name, tensor, made)
    if tensor.numel() and tensor.any() and not made.double().any():
        raise ValueError(
            f"{name} has no number above {_largest(tensor):.3g}, and {_short(dtype)} begins at "
            f"{torch.finfo(dtype).smallest_normal:.3g}, so that all would be written as 0. Write it with dtype "
            f"{_larger(dtype)}."
        )
    return made


def refuse_overflow(name: str, tensor: Tensor, made: Tensor) -> None:
    """Refuse ``made``, which is ``tensor`` in another dtype, if a finite number is out of that dtype's range.

    Raises:
        ValueError: a number is out of range. Most dtypes turn it into infinity, those of one byte into their largest
            number.
    """
    if not (tensor.is_floating_point() and made.is_floating_point()):
        return
    wide, info = tensor.detach().double(), torch.finfo(made.dtype)
    if info.max >= torch.finfo(tensor.dtype).max:
        return
    usual = wide[wide.isfinite()]
    # Numbers up to half a step beyond the end of the range are rounded to it.
    if usual.numel() and _largest(usual) > info.max * (1 + info.eps / 4):
        raise ValueError(
            f"{name} has the number {_largest(usual):.3g}, but {_short(made.dtype)} ends at {info.max:.3g}, so that it "
            f"would be written as another. Write it with dtype {_larger(made.dtype)}."
        )


def near(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert finite values to ``dtype``, or to float32 if ``dtype`` can't hold them.

    Example:
        >>> [near(torch.tensor(value), torch.float16).dtype for value in (60000.0, 70000.0)]
        [torch.float16, torch.float32]
    """
    made = values.to(dtype)
    return made if is_finite(made) else values.to(torch.promote_types(dtype, torch.float32))


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().double().abs().max())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _larger(dtype: torch.dtype) -> str:
    if dtype.itemsize == 1:
        return "torch.bfloat16"
    return _SMALL.get(dtype, "torch.float32" if dtype.itemsize < 4 else "torch.float64")
