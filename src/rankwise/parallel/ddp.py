"""What DistributedDataParallel (DDP) must be told of adapters.

DDP averages a parameter's gradient over the processes when the backward pass has reached it, and waits until all
have been reached. Two cases need help:

- In the final phase a layer at rank 0 is its base layer, so nothing would reach its factors and DDP would wait
  for ever. `keep_in_graph` puts them into the graph without computing anything.
- Under re-entrant checkpointing the graph shows no parameters, so DDP with ``find_unused_parameters=True`` takes
  them for unused, and stops when the backward pass reaches them all the same ("marked ready twice"). `note_use`
  tells DDP of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointFunction

from rankwise.parallel import zero
from rankwise.parallel.processes import many_processes, running


class _KeepInGraph(torch.autograd.Function):
    """The first input as it is; the others get gradients of zero, which hooks of any tool can work with."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *parameters: Tensor) -> Tensor:
        ctx.kinds = [(p.shape, p.dtype, p.device) for p in parameters]
        ctx.set_materialize_grads(False)
        return output.detach()  # and not a view: what follows may work in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        return gradient, *(
            torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.kinds
        )


def keep_in_graph(output: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """``output``, with ``parameters`` in its graph: the backward pass gives them gradients of zero.

    Without a process group, or where no gradients are computed, it is ``output`` itself.
    """
    parameters = list(parameters)
    if not torch.compiler.is_compiling():
        zero.refuse_away(parameters)  # a factor that is not here looks like a layer at rank 0
    if not torch.is_grad_enabled():
        note_use(parameters)
    if not torch.is_grad_enabled() or not many_processes():
        return output
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    taken: Tensor = _KeepInGraph.apply(output, *trained) if trained else output  # type: ignore[no-untyped-call]
    return taken


def note_use(parameters: Iterable[nn.Parameter]) -> None:
    """Tell the DDP whose forward is running that ``parameters`` are used, where its graph won't show it.

    That is so inside a re-entrant checkpoint; anywhere else this does nothing.
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
    """DDP's own, and then its search for unused parameters again, from ``used`` as well.

    It stands in for one forward pass only.
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


def _inside_reentrant_checkpoint() -> bool:
    return running(CheckpointFunction.forward)
