"""Merging an adapter into its base model. Transformers loads the result, with head and settings, without rankwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rankwise.files.atomic import refuse_existing, write_folder
from rankwise.recipes.errors import RecipeError
from rankwise.recipes.models import is_gguf, quiet
from rankwise.recipes.places import find_place
from rankwise.recipes.predicting.saved import open_adapter
from rankwise.recipes.tasks import load_task
from rankwise.storage.export.exported import Exported, check_place_of_model

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def needs_loading(adapter: Path, base: Path | None = None) -> bool:
    """Whether merging must load the model: it has a new head, settings of its task, or a base in a ``.gguf`` file.

    For other models, `rankwise.storage.export` merges within the files, which takes little memory.

    Args:
        adapter: the adapter's folder.
        base: the base model's folder or file. None: the adapter's configuration names it.
    """
    if not (adapter / "recipe.yaml").is_file():
        return False
    saved = open_adapter(adapter, str(adapter), truth_needed=False)
    place = base or find_place(saved.recipe.model, "model", saved.recipe.folder).path
    return saved.recipe.task != "causal-lm" or (place is not None and is_gguf(place))


def merge_adapter(
    adapter: str | Path, output: str | Path, *, base: str | Path | None = None, overwrite: bool = False
) -> Exported:
    """Write a model folder with the adapter merged in. It holds head, labels, tokenizer and generation settings, too.

    The model's dtype is the recipe's ``dtype``.

    Args:
        adapter: the adapter's folder, written by ``rankwise train`` or by PEFT.
        output: the folder to write.
        base: the base model's folder or file. None: the adapter's configuration names it.
        overwrite: whether to replace the model in ``output``.

    Returns:
        The folder, and notes for the user.

    Raises:
        RecipeError: the adapter does not fit the model, or its task is unknown.
        ValueError: ``output`` holds an adapter or the base model.
        FileExistsError: ``output`` exists, and ``overwrite`` is False.
        OSError: the model can't be written. Files that were there before are unchanged.
    """
    output = Path(output)
    if not overwrite:
        refuse_existing(output)
    given = [] if base is None else [f"model={json.dumps(str(base))}"]
    notes: list[str] = []
    with quiet():
        saved = open_adapter(adapter, str(adapter), given, truth_needed=False)
        check_place_of_model(output, find_place(saved.recipe.model, "model", saved.recipe.folder).path)
        task = load_task(saved.recipe.task)
        processor = task.processor(saved.recipe)
        model = saved.model(processor, notes)
        if saved.recipe.task == "speech-recognition":
            from rankwise.recipes.tasks.speech_recognition.task import set_generation

            recipe: Any = saved.recipe
            set_generation(recipe, processor, model)
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise RecipeError(str(error)) from error

        def write(temporary: Path) -> None:
            merged.save_pretrained(temporary)
            processor.save_pretrained(temporary)

        stale = (
            [path.name for pattern in _WEIGHTS for path in output.glob(pattern)] if output.is_dir() else []
        )
        write_folder(output, write, owned=stale)
    kind = type(merged).__name__
    return Exported(output, (f"Transformers alone loads it: {kind}.from_pretrained({str(output)!r})", *notes))
