"""Layers on which an adapter would do nothing, or would not do what it should.

The parent of some layers reads their weight without calling them. Other layers are linear, or convolutions, or
embeddings by their class, but their own forward computes something else.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import re
import textwrap
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rankwise.adapters.embedding import scale_of_embedding
from rankwise.config import LoraConfig


def why_ignored(model: nn.Module, path: str, config: LoraConfig) -> str | None:
    """The reason why an adapter on the layer would do nothing, or None: its parent only reads its weight."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    called, read = _uses(_class_of(parent))
    kind = type(parent).__name__
    if name in read and name not in called:
        return f"{kind} reads its weight without calling it, so an adapter would do nothing."
    if name in read and hasattr(parent, "A_log") and not config.inference_mode:
        return (
            f"the fused kernels of {kind} read its weight without calling it, so an adapter would not train."
        )
    return None


def _class_of(module: nn.Module) -> Any:
    """A module's class before it was adapted."""
    return getattr(module, "_original_class", type(module))


def check_fast_path(model: nn.Module, path: str) -> None:
    """Refuse a layer of a Transformer encoder that PyTorch's fast path computes without calling it.

    Raises:
        ValueError: the fast path computes the layer at ``path``.
    """
    parent = model.get_submodule(path.rpartition(".")[0])
    if torch.backends.mha.get_fastpath_enabled() and _has_fast_path(parent):
        raise ValueError(
            f"{path!r} can't be adapted as it is: in evaluation, nn.TransformerEncoderLayer takes a fast path "
            "that reads its weight without calling it. Call `torch.backends.mha.set_fastpath_enabled(False)` "
            "first, also where the adapter is loaded."
        )


def _has_fast_path(module: nn.Module) -> bool:
    """Whether PyTorch has a fast path for a layer of a Transformer encoder with these settings."""
    if not isinstance(module, nn.TransformerEncoderLayer):
        return False
    attention = module.self_attn
    plain = attention.batch_first and attention.in_proj_bias is not None and attention.num_heads % 2 == 0
    return plain and bool(module.activation_relu_or_gelu)


def why_unlike_its_class(layer: nn.Module, same_numbers: bool) -> str | None:
    """The reason why a linear layer, an embedding or a convolution is none, or None: its class computes something else.

    Routers return choices of experts, grouped layers multiply blocks, and embeddings of positions look up other rows
    than their input says. The layer is tried on a small input.

    Args:
        layer: any module.
        same_numbers: whether a linear layer's output must be that of the plain layer. False: if it has the same shape,
            an adapter's output can be added to it. Embeddings and convolutions must always give the same numbers:
            other numbers mean other rows, or that PEFT computes the layer's adapters as another convolution, too.
    """
    cls = _class_of(layer)
    weight = layer._parameters.get("weight")
    if weight is None or weight.is_meta or not weight.is_floating_point() or type(weight) is not nn.Parameter:
        return None
    before, was_training = torch.get_rng_state(), layer.training
    try:
        layer.training = False
        with torch.no_grad():
            tried = _tried(layer, cls, weight)
            if tried is None:
                return None
            kind, x, wanted = tried
            try:
                found = cls.forward(layer, x)
            except Exception:  # the class may take another shape of input, or more inputs
                found = None
        if isinstance(found, torch.Tensor) and found.shape == wanted.shape:
            numbers = wanted.double()
            near = 1e-2 * float(numbers.abs().nan_to_num(0, 0, 0).max())
            if (
                isinstance(layer, nn.Linear)
                and not same_numbers
                or torch.allclose(found.double(), numbers, rtol=1e-2, atol=near, equal_nan=True)
            ):
                return None
    finally:
        layer.training = was_training
        torch.set_rng_state(before)
    return f"{cls.__name__} is {kind} by its class, but computes something else with its weight"


def _tried(layer: Any, cls: Any, weight: nn.Parameter) -> tuple[str, torch.Tensor, torch.Tensor] | None:
    """The kind of a layer in words, an input, and the plain layer's output for it.

    None: the class computes as the plain layer, or the weight is packed or sharded over processes.
    """
    dtype, device = weight.dtype, weight.device
    if isinstance(layer, nn.Linear):
        plain = cls.forward in (nn.Linear.forward, NonDynamicallyQuantizableLinear.forward)
        if plain or list(weight.shape) != [layer.out_features, layer.in_features]:
            return None
        x = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=dtype, device=device).view(2, weight.shape[1])
        return "a linear layer", x, nn.functional.linear(x, weight, layer._parameters.get("bias"))
    if isinstance(layer, nn.Embedding):
        plain = cls.forward is nn.Embedding.forward
        if plain or list(weight.shape) != [layer.num_embeddings, layer.embedding_dim]:
            return None
        x = torch.tensor([[2, 0, 1]], dtype=torch.int64, device=device) % len(weight)
        return "an embedding", x, nn.functional.embedding(x, weight) * scale_of_embedding(layer)
    for base in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(layer, base):
            plain = cls.forward is base.forward and cls._conv_forward is base._conv_forward
            channels = layer.in_channels
            if plain or list(weight.shape) != [
                layer.out_channels, channels // layer.groups, *layer.kernel_size
            ]:  # fmt: skip
                return None
            edges = [0] * len(layer.stride) if isinstance(layer.padding, str) else layer.padding
            sizes = zip(layer.kernel_size, layer.dilation, layer.stride, edges, strict=True)
            size = [dilation * kernel + stride + edge + 1 for kernel, dilation, stride, edge in sizes]
            x = torch.linspace(-1, 1, channels * math.prod(size), dtype=dtype, device=device).view(
                1, channels, *size
            )
            return "a convolution", x, base._conv_forward(layer, x, weight, layer._parameters.get("bias"))  # type: ignore
    return None


@functools.lru_cache(maxsize=512)
def _uses(cls: type[nn.Module]) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the submodules that a forward pass of ``cls`` calls or passes on, and of those whose weight it reads."""
    called: set[str] = set()
    read: set[str] = set()
    methods = _methods(cls)
    waiting = ["forward"] if "forward" in methods else list(methods)
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for method in methods[name]:
            if "super()" not in _look_into(method, called, read):
                break  # the overridden method does not run
        waiting += [each for each in called if each in methods and each not in seen]
    return frozenset(called), frozenset(read)


def _look_into(method: Any, called: set[str], read: set[str]) -> str:
    """Collect the submodules of ``self`` that a method uses, and return the method's source."""
    try:
        source = textwrap.dedent(inspect.getsource(method))
        tree = ast.parse(source) if ".weight" in source else None
    except (OSError, TypeError, SyntaxError, ValueError):
        return ""
    if tree is None:
        called.update(re.findall(r"\bself\.(\w+)", source))
    else:
        _walk(tree, None, None, called, read)
    return source


def _methods(cls: type[nn.Module]) -> dict[str, list[Any]]:
    """The methods of a class by name, each followed by those that it overrides."""
    left_out = {"__init__", "__repr__", "extra_repr", "__setstate__"}
    found: dict[str, list[Any]] = {}
    for each in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, method in vars(each).items():
            if name not in left_out and "init_" not in name and "reset_" not in name and callable(method):
                found.setdefault(name, []).append(inspect.unwrap(method))
    return found


_ONLY_ASKED = frozenset(
    "device dtype shape size dim ndim numel requires_grad is_cuda is_meta data_ptr".split()
)


def _walk(node: ast.AST, parent: ast.AST | None, call: str | None, called: set[str], read: set[str]) -> None:
    """Collect ``self.x`` used as a whole, and ``self.x.weight`` used for more than its dtype, device or shape."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        if not isinstance(parent, ast.Attribute):
            called.add(node.attr)
        return
    owner = node.value if isinstance(node, ast.Attribute) and node.attr == "weight" else None
    if isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name) and owner.value.id == "self":
        asked = isinstance(parent, ast.Attribute) and parent.attr in _ONLY_ASKED
        if not asked and call not in ("isinstance", "hasattr", "getattr", "type"):
            read.add(owner.attr)
        return
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        call = node.func.id
    elif isinstance(node, ast.Call):
        call = None
    for child in ast.iter_child_nodes(node):
        _walk(child, node, call, called, read)
