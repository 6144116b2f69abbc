"""Layers whose weight their parent reads without calling them, so that an adapter would do nothing."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rankwise.config import LoraConfig


def why_ignored(model: nn.Module, path: str, config: LoraConfig) -> str | None:
    """Why an adapter on the layer would do nothing, if so: its parent takes the weight and calls no layer."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    called, read = _uses(type(parent))  # type: ignore[arg-type]
    kind = type(parent).__name__
    if name in read and name not in called:
        return f"{kind} reads its weight without calling it, so an adapter would do nothing."
    if name in read and hasattr(parent, "A_log") and not config.inference_mode:
        return (
            f"the fused kernels of {kind} read its weight without calling it, so an adapter would not train."
        )
    return None


def check_fast_path(model: nn.Module, path: str) -> None:
    """Refuse layers of a Transformer encoder that PyTorch computes without calling them.

    Raises:
        ValueError: the layer at ``path`` is one.
    """
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise ValueError(
            f"{path!r} can't be adapted as it is: in evaluation, nn.TransformerEncoderLayer takes a fast path "
            "that reads its weight without calling it. Call `torch.backends.mha.set_fastpath_enabled(False)` "
            "first, also where the adapter is loaded."
        )


@functools.lru_cache(maxsize=512)
def _uses(cls: type[nn.Module]) -> tuple[frozenset[str], frozenset[str]]:
    """Names of submodules that ``cls``'s methods use as a whole, and of those whose weight they compute with."""
    called: set[str] = set()
    read: set[str] = set()
    for method in _methods(cls):
        try:
            source = textwrap.dedent(inspect.getsource(method))
            tree = ast.parse(source) if ".weight" in source else None
        except (OSError, TypeError, SyntaxError, ValueError):
            continue
        if tree is None:
            called.update(re.findall(r"\bself\.(\w+)", source))
        else:
            _walk(tree, None, None, called, read)
    return frozenset(called), frozenset(read)


def _methods(cls: type[nn.Module]) -> Iterator[Any]:
    seen: set[str] = {"__init__", "__repr__", "extra_repr", "__setstate__"}
    for each in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, method in vars(each).items():
            if name not in seen and "init_" not in name and "reset_" not in name and callable(method):
                seen.add(name)
                yield inspect.unwrap(method)


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
