"""The command line: one file for each command, imported in the order in which ``--help`` lists the commands."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings

from rankwise.cli.app import app, takes_any_text

from rankwise.cli.init import init  # isort: skip
from rankwise.cli.train import train  # isort: skip
from rankwise.cli.sweep import sweep  # isort: skip
from rankwise.cli.probe import probe  # isort: skip
from rankwise.cli.plan import plan  # isort: skip
from rankwise.cli.inspect import inspect  # isort: skip
from rankwise.cli.predict import predict  # isort: skip
from rankwise.cli.evaluate import evaluate  # isort: skip
from rankwise.cli.compress import compress  # isort: skip
from rankwise.cli.export import export  # isort: skip
from rankwise.cli.report import report  # isort: skip
from rankwise.cli.watch import watch  # isort: skip

__all__ = [
    "app",
    "compress",
    "evaluate",
    "export",
    "init",
    "inspect",
    "main",
    "plan",
    "predict",
    "probe",
    "report",
    "sweep",
    "train",
    "watch",
]


def main() -> None:
    """Run the ``rankwise`` command."""
    quieten_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not takes_any_text(stream):
            stream.reconfigure(errors="backslashreplace")
    app()


def quieten_libraries() -> None:
    """Silence the deprecation warnings of libraries, and their log messages below the level of errors.

    Most of these messages tell of optional packages that are not installed. Users who set ``TORCH_LOGS`` or Python's
    ``-W`` still get what they asked for.
    """
    if logging.lastResort is not None:  # Python's handler for loggers without one
        logging.lastResort.setLevel(logging.ERROR)
    if "TORCH_LOGS" not in os.environ:
        logging.getLogger("torch").setLevel(logging.ERROR)
    if not sys.warnoptions:
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
