"""What every test process starts with."""

from __future__ import annotations

import os
from pathlib import Path

# No test talks to the network, opens a window, or fights the other test processes for cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave helpers and scripts alone: `--doctest-modules` would import every file here, not only the tests."""
    is_helper = collection_path.suffix == ".py" and not collection_path.name.startswith("test_")
    return True if is_helper else None
