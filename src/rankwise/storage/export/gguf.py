"""The export for llama.cpp and Ollama: an adapter in a GGUF file, by the source of llama.cpp's loader and converter.

llama.cpp divides alpha by each tensor's own rank, and uses a scale of 1 if alpha is 0. Here alpha is therefore 0, and
the scales are multiplied into the factors: mixed ranks are exact without padding. The ``gguf`` package gives the names.
For Llama, the converter reorders the rows of q and k so that the two halves of a head become pairs. The rows of B are
reordered in the same way.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from rankwise.adapters.embedding import EmbeddingAdapters
from rankwise.files.atomic import write_file
from rankwise.storage.export.base import BaseShape, base_path, read_base_shape
from rankwise.storage.export.exported import (
    MERGE_INSTEAD,
    Exported,
    refuse_convolutions,
    refuse_whole_tensors,
)
from rankwise.storage.finite import converted
from rankwise.storage.lora_layout import Update
from rankwise.storage.updates import Updates, acting

_PAIRED = ("llama",)  # architectures whose q and k store the halves of each head as pairs
_TIED = (
    "Its base model has one matrix for input embedding and output layer, and llama.cpp can't adapt one alone."
)


def export_for_llama_cpp(
    file: Path, updates: Updates, dtype: torch.dtype | None = None, base: Path | None = None
) -> Exported:
    """Write a GGUF file that llama.cpp and Ollama load in addition to the base model.

    Args:
        file: the file to write. Its name ends in ``.gguf``.
        updates: the adapter's updates.
        dtype: the dtype of the written factors; float32 by default.
        base: the base model's folder or ``.gguf`` file. By default it is read from the adapter's configuration.

    Raises:
        FileNotFoundError: the base model does not exist.
        ImportError: the package gguf is not installed.
        ValueError: the adapter holds something that llama.cpp cannot load, or llama.cpp's layout of the base model's
            architecture is unknown here.
        OSError: the file can't be written. Its previous contents are then unchanged.
    """
    if file.suffix.lower() != ".gguf":
        raise ValueError(f"{str(file)!r} should end in .gguf: llama.cpp takes an adapter as one file.")
    refuse_whole_tensors(updates, "llama.cpp")
    layers = acting(updates)
    refuse_convolutions(updates, layers, "llama.cpp")
    shape = read_base_shape(base_path(updates, base, "an adapter for llama.cpp"))
    if shape.architecture is None:
        raise ValueError(
            f"{shape.source} has an architecture whose layout in llama.cpp is not known here; known are Llama, "
            f"Mistral, Qwen 2 and 3, Gemma 1 to 3 and Phi 3. {MERGE_INSTEAD}"
        )
    names = tensor_names(updates, layers, shape, shape.architecture)
    tensors: dict[str, Tensor] = {}
    for path, update in layers.items():
        A, B = _in_layout(path, update, shape)
        tensors |= {f"{names[path]}.lora_a": A, f"{names[path]}.lora_b": B}
    write_file(file, _gguf(shape.architecture, tensors, dtype or torch.float32))
    return Exported(
        file,
        (
            f"llama-server -m BASE.gguf --lora {file}",
            f"Ollama, in a Modelfile: FROM BASE and ADAPTER {file.absolute()}",
        ),
    )


def tensor_names(
    updates: Updates, layers: dict[str, Update], base: BaseShape, architecture: str
) -> dict[str, str]:
    """llama.cpp's names for the weights of layers.

    Raises:
        ValueError: llama.cpp has no such weight, or one that two layers share.
    """
    import gguf

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    mapping = gguf.get_tensor_name_map(numbers[architecture], base.layers)
    names = {}
    for path in layers:
        name = mapping.get_name(path)
        if name is None:
            raise ValueError(
                f"{updates.source} adapts {path!r}, which llama.cpp's {architecture} with {base.layers} layers "
                f"does not have. Is {base.source} the base model? If it is: {MERGE_INSTEAD}"
            )
        if base.tied and name in ("token_embd", "output"):
            raise ValueError(f"{updates.source} adapts {path!r}. {_TIED} {MERGE_INSTEAD}")
        names[path] = f"{name}.weight"
    return names


def _in_layout(path: str, update: Update, base: BaseShape) -> tuple[Tensor, Tensor]:
    """The factors in the layout in which llama.cpp multiplies with them."""
    A, B = update.A, update.B
    if issubclass(update.kind, EmbeddingAdapters):
        return A.T, B  # llama.cpp looks up rows of A
    projection = path.rpartition(".")[2]
    if base.architecture in _PAIRED and projection in ("q_proj", "k_proj"):
        heads = base.heads if projection == "q_proj" else base.kv_heads
        if len(B) != heads * base.head_width:
            raise ValueError(
                f"{path!r} has {len(B)} outputs, but {base.source} {heads} heads of {base.head_width}: it is not the "
                "base model that the adapter was trained on."
            )
        B = B.view(heads, 2, base.head_width // 2, -1).transpose(1, 2).reshape(B.shape)
    return A, B


def _gguf(architecture: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> bytes:
    import gguf

    kinds = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    if dtype not in kinds:
        raise ValueError(f"`dtype` must be one of {', '.join(map(str, kinds))}, but is {dtype}.")
    with tempfile.TemporaryDirectory() as folder:  # the package writes only to a path
        path = Path(folder, "adapter.gguf")
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
        for name, tensor in tensors.items():
            converted(f"{name}", tensor, dtype)
            data = gguf.quantize(tensor.detach().float().contiguous().numpy(), kinds[dtype])
            writer.add_tensor(name, data, raw_dtype=kinds[dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()
