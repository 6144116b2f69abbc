"""Ctrl-C, SIGTERM and a closed terminal. The first signal asks a training loop to save, the second stops it at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A signal told the process to stop.

    Args:
        number: the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def _signals() -> list[int]:
    """The signals that ask to stop. SIGHUP is one of them where it exists, unless ``nohup`` has it ignored."""
    numbers = [int(signal.SIGINT), int(signal.SIGTERM)]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(int(hangup))
    return numbers


class Interruption:
    """A context in which SIGINT, SIGTERM and SIGHUP (a closed terminal) are requests to stop.

    Outside the training loop (``in_loop`` is False) there is nothing to save, so a signal raises `Interrupted` at once.
    Inside the loop, a signal is noted in ``number``, and the loop acts on it after the step.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.in_loop = False
        self._before: dict[int, Any] = {}
        # torchrun passes a signal on to processes that have already received it from the terminal.
        self.may_repeat = "TORCHELASTIC_RUN_ID" in os.environ

    def __enter__(self) -> Interruption:
        # Python lets only the main thread handle signals. In other threads, the caller's handlers stay.
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
        """The number of the signal that any of the training processes has received, or None.

        All processes get the same answer. All must call this at the same point, because they save together.
        """
        import torch
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # The exchange runs on the CPU, so that it does not wait for the GPU.
            if not hasattr(self, "_group"):
                self._group = dist.new_group(backend="gloo")
            noted = torch.tensor(self.number or 0)
            dist.all_reduce(noted, dist.ReduceOp.MAX, group=self._group)
            self.number = int(noted) or None
        return self.number
