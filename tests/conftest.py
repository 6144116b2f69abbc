"""Settings and fixtures of every test process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tests don't use the network, open windows, or compete with other test processes for cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Ignore helpers and scripts: `--doctest-modules` would import every file here, not only the tests."""
    is_helper = collection_path.suffix == ".py" and not collection_path.name.startswith("test_")
    return True if is_helper else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests more time than pyproject.toml gives to others."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1200))


_MANY_MODULES = 100
_searched = 0  # number of imported modules when garbage collection was last told to ignore them


def pytest_runtest_teardown() -> None:
    """Exclude imported libraries from garbage collection.

    A trainer collects garbage at its start and its end. Libraries hold hundreds of thousands of objects that are never
    garbage. Searching them takes as long as all the rest of a run of a tiny model.
    """
    global _searched
    if len(sys.modules) > _searched + _MANY_MODULES:
        _searched = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[list[str]]:
    """The first words of a command that runs with a disk of one megabyte at ``tmp_path``."""
    mount = f"mount -t tmpfs -o size=1m none {tmp_path} && exec"
    for own in ([], ["--user", "--map-root-user"]):
        command = ["unshare", *own, "--mount", "sh", "-c", f'{mount} "$@"', "sh"]
        try:
            result = subprocess.run([*command, "true"], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("There is no `unshare` here to mount a small disk with.")
        if result.returncode == 0:
            yield command
            return
    pytest.skip(f"A small disk can't be mounted here: {result.stderr.strip()}")


# Model and data for the tests of recipes and of the command line. A test file may define its own `world`.


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny text classifier."""
    from recipe_world import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with a table of labelled texts. Runs write into it as well."""
    from recipe_world import write_table

    write_table(tmp_path / "reviews.csv")
    return tmp_path
