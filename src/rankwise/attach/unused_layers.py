"""Layers on which an adapter would do nothing, or would not do what it should.

The parent of some layers reads their weight without calling them. Other layers are linear by their class, but their own
forward computes something else.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

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


def why_unlike_linear(path: str, layer: nn.Module, same_numbers: bool) -> str | None:
    """The reason why a layer of a linear class is not linear, or None: its class computes something else.

    Routers return choices of experts, and grouped layers multiply blocks. The layer is tried on a small input.

    Args:
        path: path of the layer.
        layer: any module.
        same_numbers: whether the output must be that of a linear layer. False: its shape must be, so that an adapter's
            output can be added to it.
    """
    cls = _class_of(layer)
    plain = cls.forward in (nn.Linear.forward, NonDynamicallyQuantizableLinear.forward)
    weight = layer._parameters.get("weight") if isinstance(layer, nn.Linear) and not plain else None
    if weight is None or weight.is_meta or not weight.is_floating_point() or type(weight) is not nn.Parameter:
        return None
    if list(weight.shape) != [layer.out_features, layer.in_features]:  # packed, or sharded over processes
        return None
    before, was_training = torch.get_rng_state(), layer.training
    try:
        layer.training = False
        with torch.no_grad():
            x = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=weight.dtype, device=weight.device)
            x = x.view(2, weight.shape[1])
            wanted = nn.functional.linear(x, weight, layer._parameters.get("bias"))
            found = cls.forward(layer, x)
        if isinstance(found, torch.Tensor) and found.shape == wanted.shape:
            if not same_numbers or torch.allclose(
                found.double(), wanted.double(), rtol=1e-2, atol=1e-2, equal_nan=True
            ):
                return None
    except Exception:  # the class may take another shape of input, or more inputs
        pass
    finally:
        layer.training = was_training
        torch.set_rng_state(before)
    name = path.rpartition(".")[2]
    return (
        f"{cls.__name__} is a linear layer by its class, but computes something else with its weight, to which an "
        f"adapter's output can't be added. `target_parameters=['{name}.weight']` adapts the weight itself."
    )


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
