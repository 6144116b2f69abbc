"""Adapters under DistributedDataParallel (DDP): the two cases in which DDP needs help.

DDP averages a parameter's gradient over the processes when the backward pass has reached the parameter. It waits until
the backward pass has reached all parameters.

- In the final phase a layer at rank 0 is its base layer. The backward pass then never reaches the layer's factors, and
  DDP would wait for ever. `keep_in_graph` puts the factors into the graph without computing anything.
- Under re-entrant checkpointing the graph shows no parameters. DDP with ``find_unused_parameters=True`` therefore
  takes them for unused. It stops with an error when the backward pass reaches them ("marked ready twice").
  `note_use` tells DDP that they are used.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointFunction

from rankwise.parallel import zero
from rankwise.parallel.processes import many_processes, running


class _KeepInGraph(torch.autograd.Function):
    """Passes its first input on unchanged, and gives the other inputs gradients of zero, on which any hook works."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *parameters: Tensor) -> Tensor:
        ctx.kinds = [(p.shape, p.dtype, p.device) for p in parameters]
        ctx.set_materialize_grads(False)
        return output.detach()  # a view would forbid in-place operations on it

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        return gradient, *(
            torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.kinds
        )


def keep_in_graph(output: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return ``output`` with ``parameters`` in its graph, so that the backward pass gives them gradients of zero.

    Without a process group, or where no gradients are computed, the result is ``output`` itself.
    """
    parameters = list(parameters)
    if not torch.compiler.is_compiling():
        zero.refuse_away(parameters)  # a factor that ZeRO-3 has partitioned looks like one of rank 0
    if not torch.is_grad_enabled():
        note_use(parameters)
    if not torch.is_grad_enabled() or not many_processes():
        return output
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    taken: Tensor = _KeepInGraph.apply(output, *trained) if trained else output  # type: ignore[no-untyped-call]
    return taken


def note_use(parameters: Iterable[nn.Parameter]) -> None:
    """Tell the DDP model whose forward pass is running that ``parameters`` are used.

    This is needed inside a re-entrant checkpoint, where the graph does not show them. Elsewhere the call does nothing.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not many_processes():
        return
    ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None or not ddp.find_unused_parameters or not _inside_reentrant_checkpoint():
        return
    after = vars(ddp).get("_post_forward")
    if after is None:
        after = functools.partial(_post_forward, ddp, [])
        object.__setattr__(ddp, "_post_forward", after)
    after.args[1].extend(parameter for parameter in parameters if parameter.requires_grad)


def _post_forward(ddp: Any, used: list[nn.Parameter], output: Any) -> Any:
    """Stand in for DDP's own method in one forward pass.

    After DDP's own method it repeats the search for unused parameters, in which ``used`` now counts as used.
    """
    object.__delattr__(ddp, "_post_forward")
    output = ddp._post_forward(output)
    searches = ddp.find_unused_parameters and not ddp.static_graph and ddp.require_backward_grad_sync
    if torch.is_grad_enabled() and searches:
        shows = _KeepInGraph.apply(torch.zeros(()), *used)  # type: ignore[no-untyped-call]
        ddp.reducer.prepare_for_backward([*_tensors(output), shows])
    return output


def _tensors(output: Any) -> Iterable[Tensor]:
    from torch.nn.parallel.distributed import _find_tensors

    tensors: Iterable[Tensor] = _find_tensors(output)
    return tensors


def steps_alone(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether this process is about to step with gradients of its own, because ``no_sync`` of DDP is on.

    Local SGD does so: the processes train apart, and average their values now and then.
    """
    if not many_processes():
        return False
    own = set(map(id, parameters))
    wrappers = [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]
    return any(
        not each.require_backward_grad_sync and any(id(p) in own for p in each.parameters())
        for each in wrappers
    )


def _inside_reentrant_checkpoint() -> bool:
    return running(CheckpointFunction.forward)
