"""Ctrl-C, SIGTERM and a closed terminal: the first asks a training loop to save, a second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """The process was told to stop.

    Args:
        number: the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def _signals() -> list[int]:
    """The signals that ask to stop; SIGHUP only where it exists, and not where ``nohup`` has it ignored."""
    numbers = [int(signal.SIGINT), int(signal.SIGTERM)]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(int(hangup))
    return numbers


class Interruption:
    """While it is entered, SIGINT, SIGTERM and SIGHUP (a closed terminal) are requests to stop.

    Outside of the training loop (``in_loop`` is False) a signal raises `Interrupted` there and then, as there is
    nothing to save; inside it, it is noted in ``number``, and the loop acts on it after the step.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.in_loop = False
        self._before: dict[int, Any] = {}
        # torchrun passes a signal on to processes that have had it from the terminal already.
        self.may_repeat = "TORCHELASTIC_RUN_ID" in os.environ

    def __enter__(self) -> Interruption:
        # Python lets only the main thread handle signals; elsewhere they stay with whoever runs it.
        if threading.current_thread() is threading.main_thread():
            for number in _signals():
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.in_loop or (self.number is not None and not self.may_repeat):
            raise Interrupted(number)
        self.number = self.number or number

    def agreed(self) -> int | None:
        """The signal, if any of the training processes has had one: all of them get the same answer.

        To be called by all processes at the same point, as they have to save together.
        """
        import torch
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # On the CPU, so that it does not wait for what a GPU is still computing.
            if not hasattr(self, "_group"):
                self._group = dist.new_group(backend="gloo")
            noted = torch.tensor(self.number or 0)
            dist.all_reduce(noted, dist.ReduceOp.MAX, group=self._group)
            self.number = int(noted) or None
        return self.number
