"""A whole model of an adapter and its base, with its task's head and settings, for Transformers alone."""

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
from rankwise.storage.export.exported import Exported

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def needs_loading(adapter: Path, base: Path | None = None) -> bool:
    """Whether merging must load the model: it has a new head, settings of its task, or a base in a ``.gguf`` file.

    Of other models `rankwise.storage.export` changes the files, which takes little memory.

    Args:
        adapter: the adapter's folder.
        base: the base model, if it is not where the adapter says.
    """
    if not (adapter / "recipe.yaml").is_file():
        return False
    saved = open_adapter(adapter, str(adapter), truth_needed=False)
    place = base or find_place(saved.recipe.model, "model", saved.recipe.folder).path
    return saved.recipe.task != "causal-lm" or (place is not None and is_gguf(place))


def merge_adapter(
    adapter: str | Path, output: str | Path, *, base: str | Path | None = None, overwrite: bool = False
) -> Exported:
    """Write a model folder with the adapter merged in: head, labels, tokenizer and settings of writing included.

    It is in the dtype of the recipe's ``dtype``, in which the adapter was trained.

    Args:
        adapter: the adapter's folder, of ``rankwise train`` or of PEFT.
        output: the folder to write.
        base: the base model, if it is not where the adapter says.
        overwrite: replace the model in ``output``.

    Raises:
        RecipeError: the adapter and the model do not belong together, or what the adapter does can't be told.
        FileExistsError: there is something at ``output``, and ``overwrite`` is False.
        OSError: it can't be written; what was there before is whole.
    """
    output = Path(output)
    if not overwrite:
        refuse_existing(output)
    given = [] if base is None else [f"model={json.dumps(str(base))}"]
    notes: list[str] = []
    with quiet():
        saved = open_adapter(adapter, str(adapter), given, truth_needed=False)
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
