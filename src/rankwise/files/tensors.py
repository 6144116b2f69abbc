"""Files of tensors: safetensors with a checksum, and pickles that hold only tensors. Reading runs no code."""

from __future__ import annotations

import ctypes
import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from rankwise.files.pointers import refuse_pointer

CHECKSUM = "rankwise_crc32"  # the key in the metadata of a safetensors file
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


@dataclass(frozen=True)
class TensorInfo:
    """The header of a tensor in a file.

    Args:
        shape: the tensor's shape.
        dtype: PyTorch's name of its dtype, such as ``"float32"``.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """The number of values in the tensor."""
        return math.prod(self.shape)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except Exception as error:  # a broken file may raise anything
        refuse_pointer(path)
        raise ValueError(
            f"{path} is broken or cut off: it can't be read as safetensors ({error}). Copy it again, or use an earlier "
            "checkpoint."
        ) from None


def read_tensor_header(path: Path) -> dict[str, TensorInfo]:
    """Read the names, shapes and dtypes in a safetensors file, without reading any tensor.

    Raises:
        ValueError: the file is empty, cut off, or not a safetensors file.
    """
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        dtypes = {name: each.get_dtype() for name, each in slices.items()}
        return {
            name: TensorInfo(tuple(each.get_shape()), _DTYPES.get(dtypes[name], dtypes[name].lower()))
            for name, each in slices.items()
        }


def read_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Read some tensors of a safetensors file, to the CPU. The others are not read, so no checksum is compared.

    Raises:
        ValueError: the file is empty, cut off, or not a safetensors file.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in names}


def stored_checksum(path: Path) -> str | None:
    """The checksum that rankwise wrote into a safetensors file; None if the file has none.

    Raises:
        ValueError: the file is empty, cut off, or not a safetensors file.
    """
    with _opened(path) as file:
        found: str | None = (file.metadata() or {}).get(CHECKSUM)
    return found


def read_tensor_file(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, to the CPU.

    If the file has a checksum, as rankwise's files do, the whole file is read to compare it. The tensors still share
    memory with the file, which may be changed later. Copy tensors that are to be kept.

    Raises:
        ValueError: the file is empty, cut off, damaged, or not a safetensors file.
    """
    with _opened(path) as file:
        tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        expected = (file.metadata() or {}).get(CHECKSUM)
    if expected is not None and expected != checksum(tensors):
        raise ValueError(
            f"{path} is damaged: its tensors are not those that were saved. Copy it again, or use an earlier "
            f"checkpoint. (If it was changed on purpose, leave {CHECKSUM!r} out of its metadata.)"
        )
    return tensors


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, with a checksum by which `read_tensor_file` notices damage.

    The same tensors always give the same bytes.
    """
    save_file(dict(tensors), path, metadata={"format": "pt", CHECKSUM: checksum(tensors)})
    _order_metadata(path)


def _order_metadata(path: Path) -> None:
    """Sort the metadata in the header of a safetensors file alphabetically.

    The library writes them in random order. The header is JSON. It begins at the ninth byte, with the metadata.
    """
    with open(path, "r+b") as file:
        start = b'{"__metadata__":'
        file.seek(8)
        if file.read(len(start)) != start:
            return
        size = int.from_bytes(_at(file, 0, 8), "little")
        header = _at(file, 8, size).decode("utf-8")
        metadata, end = json.JSONDecoder().raw_decode(header, len(start))
        ordered = json.dumps(dict(sorted(metadata.items())), ensure_ascii=False, separators=(",", ":"))
        if len(ordered) == end - len(start):  # otherwise it holds text that JSON can write in several ways
            file.seek(8 + len(start))
            file.write(ordered.encode("utf-8"))


def _at(file: BinaryIO, place: int, size: int) -> bytes:
    file.seek(place)
    return file.read(size)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of names, dtypes, shapes and values. It detects accidents, not forgery.

    Example:
        >>> checksum({"a": torch.ones(2)}) == checksum({"a": torch.ones(2, 1)})
        False
    """
    value = 0
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        value = zlib.crc32(f"{key}:{tensor.dtype}:{tuple(tensor.shape)};".encode(), value)
        if tensor.nbytes:
            value = zlib.crc32((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()), value)
    return f"{value:08x}"


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file that ``torch.save`` wrote, to the CPU.

    Raises:
        ValueError: the file holds anything other than tensors, or can't be read.
    """
    try:
        _refuse_compressed(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle may raise anything
        refuse_pointer(path)
        raise ValueError(f"{path} can't be read as a file of tensors only ({error}).") from None
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise ValueError(f"{path} must hold a dictionary of tensors by name.")
    for key, tensor in tensors.items():
        plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu"
        # A view may repeat one number to any size.
        if not plain or tensor.is_quantized or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {key!r} is not a plain tensor.")
    return {key: tensor.detach() for key, tensor in tensors.items()}


def _refuse_compressed(path: Path) -> None:
    """Refuse compressed files: torch.save writes none, and a small one may fill the memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("it is compressed")


def check_finite(source: str, name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinite values.

    Raises:
        ValueError: the tensor holds such values. The message names ``source`` and ``name``.
    """
    if not is_finite(tensor):
        raise ValueError(
            f"{source}: {name} holds NaN or infinite values, so what was saved is broken: use an earlier checkpoint."
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinite values. Integers never do. The tensor must not be on "meta".

    Example:
        >>> is_finite(torch.ones(2)), is_finite(torch.tensor([1.0, torch.nan])), is_finite(torch.tensor(3))
        (True, False, True)
    """
    if not tensor.is_floating_point():
        return True
    parts = tensor.detach().reshape(-1).split(2**24)
    return all(bool((part.float() if part.element_size() == 1 else part).isfinite().all()) for part in parts)
