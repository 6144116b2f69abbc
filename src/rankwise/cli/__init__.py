"""The command line: one file a command, in the order in which ``--help`` lists them."""

from __future__ import annotations

from rankwise.cli.app import app

from rankwise.cli.train import train  # isort: skip
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
    "inspect",
    "main",
    "plan",
    "predict",
    "probe",
    "report",
    "train",
    "watch",
]


def main() -> None:
    """The ``rankwise`` command."""
    app()
