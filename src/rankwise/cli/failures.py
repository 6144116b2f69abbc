"""Turning exceptions into one message and an exit code.

Exit codes:

- 0: done.
- 2: a mistake that the user can correct. One message names it, without a traceback.
- 1: a fault of rankwise itself, with a traceback.
- 130, 143 and 129: SIGINT (Ctrl-C), SIGTERM and SIGHUP (a closed terminal).
- 141: the program that read the output has ended, as `head` does.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from rankwise.files.streams import discard

MEND, FAULT = 2, 1
EXTRAS = 'pip install "rankwise[train,report]"'
_EXTRA_OF = dict.fromkeys(("optuna", "psutil", "sqlalchemy"), 'pip install "rankwise[sweep]"')


@contextlib.contextmanager
def failures(*mendable: type[Exception], kept: str = "") -> Iterator[None]:
    """Turn the exceptions of a ``with`` block into messages and exit codes.

    Args:
        mendable: exception types, in addition to `RecipeError`, whose messages tell the user what to correct.
        kept: what is left of the work, and how to continue, if a file can't be written.
    """
    try:
        yield
    except KeyboardInterrupt as stopped:
        _say("Stopped.")
        raise _exit(128 + getattr(stopped, "number", 2)) from None
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        if name == "rankwise":
            raise _fault() from error
        # Libraries that look for optional packages raise errors without a name. Their messages say what to install.
        extra = _EXTRA_OF.get(name, EXTRAS)
        raise _mend(
            f"The Python package {name!r} is missing. Install: {extra}" if name else str(error)
        ) from error
    except BrokenPipeError:
        discard(sys.stdout)
        raise _exit(141) from None
    except Exception as error:
        message = _unwritten_message(error, kept) or _mendable_message(error, mendable)
        if message is None:
            raise _fault() from error
        raise _mend(message) from error


def _unwritten_message(error: Exception, kept: str) -> str | None:
    """Return the message for a file that could not be written, or None if the error is another one."""
    from rankwise.files.explain import NOT_WRITTEN, errno_of, is_of_torch_save

    if isinstance(error, OSError) and error.errno in NOT_WRITTEN:
        where = f": {error.filename}" if error.filename else ""
        said = f"{error.strerror}{where}".rstrip(".")
    elif is_of_torch_save(error):
        said = f"A file could not be written ({error}): the disk is probably full"
    elif not isinstance(error, OSError) and errno_of(error) in NOT_WRITTEN:
        said = str(error).rstrip(".")
    else:
        return None
    return f"{said}. {kept}".strip()


def _mendable_message(error: Exception, mendable: tuple[type[Exception], ...]) -> str | None:
    """Return the message that tells the user what to correct, or None if the error is a fault of rankwise."""
    recipes = sys.modules.get("rankwise.recipes.errors")
    if isinstance(error, mendable) or (recipes is not None and isinstance(error, recipes.RecipeError)):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "The GPU's memory is too small. Lower training.per_device_train_batch_size (and raise "
            "training.gradient_accumulation_steps by the same factor), set training.gradient_checkpointing: true, or "
            "lower data.max_length. `rankwise plan` with the recipe shows what takes the memory."
        )
    return None


def _exit(code: int) -> Exception:
    from typer import Exit

    return Exit(code)


def _mend(message: str) -> Any:
    _say(message)
    return _exit(MEND)


def _fault() -> Any:
    if _is_main_process():
        traceback.print_exc()
        _say("This is a fault of rankwise. Please report it with the lines above.")
    return _exit(FAULT)


def _say(message: str) -> None:
    if _is_main_process():
        print(message, file=sys.stderr)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
