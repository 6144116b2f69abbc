"""A run's output folder: whether it is free, what is in it, and which checkpoint to resume from.

output/
recipe.yaml            the recipe with its overrides and defaults, to train the same run again
results.json           metrics, log and ranks, kept up to date; "finished" is true when the run is done
adapter_config.json    the adapter, when training is done
…
checkpoint-500/        a checkpoint to resume from
best-450/              the best adapter so far, removed when training is done
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from rankwise.files.atomic import write_file
from rankwise.files.locks import TRAINING, lock_file
from rankwise.recipes.errors import RecipeError
from rankwise.recipes.places import find_place
from rankwise.recipes.recipe import BaseRecipe
from rankwise.storage import OWNED, PICKLE_NAME, checkpoint_step

# Files that every complete checkpoint has, beginning with the one that Transformers writes last.
_NEEDED = (
    "trainer_state.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
)
_RECIPE, _RESULTS = "recipe.yaml", "results.json"
_RECIPE_HEAD = "# The whole recipe of this run"
# Transformers' names for the weights of a whole model, which no run writes.
_OF_WHOLE_MODELS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Files of an earlier run, which --overwrite removes. Other files in the folder stay.
_OWN_FILES = (_RECIPE, _RESULTS, "config.json", *(name for name in OWNED if name != PICKLE_NAME))


class Output:
    """A run's output folder.

    Args:
        recipe: the run's recipe.
    """

    def __init__(self, recipe: BaseRecipe) -> None:
        self.recipe = recipe
        self.folder = Path(recipe.output).expanduser()

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that holds an earlier run, unless the user asked to resume or overwrite it.

        Args:
            resume: whether to resume the run in the folder.
            overwrite: whether to replace the run in the folder.

        Raises:
            RecipeError: the folder is taken, can't be written, or holds a run of another recipe.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise RecipeError(f"`output` is {str(self.folder)!r}, which is a file. Choose another name.")
        self._refuse_others_files()
        if resume and overwrite:
            raise RecipeError("--resume continues a run, --overwrite starts it again: choose one.")
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if not (resume and self.finished) and not os.access(there, os.W_OK | os.X_OK):
            raise RecipeError(
                f"The output folder {str(self.folder)!r} can't be written: {str(there)!r} is read-only, or not a "
                "folder. Choose another `output`."
            )
        if overwrite:
            return
        if resume:
            begun = self.finished or self.newest_checkpoint()[0] is not None
            changed = list(self._changed_keys()) if begun else []
            if changed:
                raise RecipeError(
                    f"The run in {str(self.folder)!r} had other settings: {'; '.join(changed)}. Resuming needs "
                    "the same recipe. Set them back, or start again with --overwrite."
                )
        elif self.finished or (self.folder / "adapter_config.json").exists():
            raise RecipeError(
                f"The output folder {str(self.folder)!r} holds a finished adapter. To replace it, add --overwrite; "
                "to keep it, choose another `output`."
            )
        elif any(self.checkpoints()):
            raise RecipeError(
                f"The output folder {str(self.folder)!r} holds an unfinished run. To resume it, add --resume; "
                "to start again, add --overwrite."
            )

    def _refuse_others_files(self) -> None:
        """Refuse a folder with files that the run would replace, though no run has written them."""
        model = next((name for name in _OF_WHOLE_MODELS if (self.folder / name).exists()), None)
        if model is not None:
            raise RecipeError(
                f"The output folder {str(self.folder)!r} holds a whole model ({model}), whose configuration a run "
                "would replace. Choose another `output`."
            )
        recipe, head = self.folder / _RECIPE, _RECIPE_HEAD
        with suppress(OSError, ValueError):
            head = recipe.read_text(encoding="utf-8")
        if not head.startswith(_RECIPE_HEAD) and "finished" not in self.results:
            raise RecipeError(
                f"{str(recipe)!r} is where a run writes its whole recipe, and would be replaced. Move or rename it, or "
                "choose another `output`."
            )

    @contextmanager
    def claimed(self, *, resume: bool, overwrite: bool) -> Iterator[None]:
        """Keep other processes from training into the folder, which is made if it does not exist.

        Args:
            resume: as in `check`.
            overwrite: as in `check`.

        Raises:
            RecipeError: another process trains into the folder; or as in `check`, because another process has trained
                into it since.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock_file(self.folder / TRAINING) as free:
            if not free:
                raise RecipeError(
                    f"Another process is training into the output folder {str(self.folder)!r}; `rankwise watch` shows "
                    "its run. Wait for its end or stop it. Or choose another `output`."
                )
            self.check(resume=resume, overwrite=overwrite)
            yield

    def begin(self) -> None:
        """Prepare the folder for a new run: remove earlier checkpoints and results, and write the recipe."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for checkpoint in self.checkpoints():
            shutil.rmtree(checkpoint)
        self.clear_best()
        for name in _OWN_FILES:
            (self.folder / name).unlink(missing_ok=True)
        text = yaml.safe_dump(settled(self.recipe), sort_keys=False, allow_unicode=True, width=100)
        write_file(self.folder / _RECIPE, f"{_RECIPE_HEAD}, defaults included.\n{text}")

    def clear_best(self) -> None:
        """Remove the best adapters that were kept during the run."""
        from rankwise.recipes.best import best_folders

        for folder in best_folders(self.folder):
            shutil.rmtree(folder)

    def checkpoints(self) -> Iterator[Path]:
        """The checkpoint folders, complete or not, newest first."""
        if self.folder.is_dir():
            found = ((checkpoint_step(path), path) for path in self.folder.iterdir() if path.is_dir())
            steps = [(step, path) for step, path in found if step is not None]
            yield from (path for _, path in sorted(steps, reverse=True))

    def newest_checkpoint(self) -> tuple[Path | None, list[Path]]:
        """The newest complete checkpoint or None, and newer checkpoints that are incomplete."""
        broken: list[Path] = []
        for checkpoint in self.checkpoints():
            if is_whole(checkpoint):
                return checkpoint, broken
            broken.append(checkpoint)
        return None, broken

    @property
    def results(self) -> dict[str, Any]:
        """The contents of ``results.json``, or an empty dictionary if there is no such file."""
        try:
            results = json.loads((self.folder / _RESULTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return results if isinstance(results, dict) else {}

    @property
    def finished(self) -> bool:
        """Whether the run in the folder is finished."""
        return self.results.get("finished") is True

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Replace ``results.json``."""
        write_file(self.folder / _RESULTS, json.dumps(_finite(results), indent=2, allow_nan=False) + "\n")

    def _changed_keys(self) -> Iterator[str]:
        """The settings that differ from those of the run in the folder, and matter for resuming."""
        try:
            before = yaml.safe_load((self.folder / _RECIPE).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            return
        old, new = dict(flat(before)), dict(flat(settled(self.recipe)))
        for key in dict.fromkeys([*old, *new]):
            if old.get(key) != new.get(key) and key not in self.recipe.free_when_resuming:
                yield f"{key} was {old.get(key)!r} and is {new.get(key)!r} now"


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete."""
    if not all((checkpoint / name).is_file() for name in _NEEDED):
        return False
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state


def settled(recipe: BaseRecipe) -> dict[str, Any]:
    """The recipe as plain data, with paths that are valid from every folder."""
    plain = recipe.plain()
    plain["model"] = find_place(recipe.model, "model", recipe.folder).reference
    for key in ("train", "eval"):
        reference = plain["data"].get(key)
        if isinstance(reference, str):
            plain["data"][key] = find_place(reference, f"data.{key}", recipe.folder).reference
    if "plan" in plain["adapter"]:
        reference = plain["adapter"]["plan"]
        plain["adapter"]["plan"] = find_place(reference, "adapter.plan", recipe.folder).reference
    if recipe.method == "lora":
        del plain["schedule"]
    return plain


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys and the values of nested dictionaries."""
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
