"""`rankwise train` under torchrun and `accelerate launch`: the same command, and only the first process prints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import safetensors

from one_run import ACCELERATE, TORCHRUN, run_command
from recipe_world import save_tiny_model, write_recipe, write_table

pytest.importorskip("transformers", reason="recipes need Transformers")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(*TORCHRUN, "-m"), (*ACCELERATE, "-m")], ids=["torchrun", "accelerate"])
def test_a_recipe_trains_in_two_processes_and_one_of_them_talks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: tuple[str, ...]
):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("COLUMNS", "100")
    write_table(tmp_path / "reviews.csv")
    recipe = write_recipe(tmp_path, save_tiny_model(tmp_path / "model"))
    said = run_command(*launcher, "rankwise", "train", str(recipe))

    alone = run_command(
        sys.executable, "-m", "rankwise", "train", str(recipe), f"output={tmp_path / 'alone'}"
    )
    assert headings(said) == headings(alone), said
    out = tmp_path / "out"
    files = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    others = {
        path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*") if path.is_file()
    }
    assert adapters(files) == adapters(others) != set()
    assert sum(final_ranks(out)) > 0
    assert not list(out.rglob("*.tmp"))


def headings(said: str) -> list[str]:
    """The printed lines without numbers, which are the same for any number of processes."""
    lines = (line.strip() for line in said.splitlines())
    return [
        line for line in lines if line and not any(letter.isdigit() for letter in line) and "─" not in line
    ]


def adapters(files: set[Path]) -> set[Path]:
    return {path for path in files if path.name.startswith(("adapter", "rank_history"))}


def final_ranks(out: Path) -> list[int]:
    with safetensors.safe_open(out / "adapter_model.safetensors", "pt") as file:
        return [len(file.get_tensor(name)) for name in file.keys() if "lora_A" in name]  # noqa: SIM118
