"""Load a recipe's model, its configuration and its tokenizer; or only its shape, on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rankwise.recipes.errors import Problem, RecipeError
from rankwise.recipes.places import Place, find_place
from rankwise.recipes.recipe import BaseRecipe


def model_place(recipe: BaseRecipe) -> Place:
    """Where the model is."""
    return find_place(recipe.model, "model", recipe.folder)


def load_processor(recipe: BaseRecipe, auto_class: str) -> Any:
    """The tokenizer or feature extractor that comes with the model."""
    return _from_pretrained(recipe, auto_class)


def model_config(recipe: BaseRecipe) -> Any:
    """The model's configuration."""
    return _from_pretrained(recipe, "AutoConfig")


def load_model(recipe: BaseRecipe, auto_class: str, config: Any, *, weights: bool) -> Any:
    """The model of ``auto_class``, ready to be adapted.

    Weights that the checkpoint does not have are new and random; `new_weights` lists them.

    Args:
        recipe: says which model, and its dtype.
        auto_class: such as ``AutoModelForSequenceClassification``.
        config: the model's configuration.
        weights: load them; otherwise the model is on the meta device.

    Raises:
        RecipeError: there is no such model, or it can't do the task.
    """
    import torch
    import transformers

    auto = getattr(transformers, auto_class)
    if not weights:
        try:
            with torch.device("meta"):
                return auto.from_config(config)
        except ValueError as error:
            raise RecipeError([Problem("model", _first_line(error))]) from error
    dtype = recipe.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    model, report = _from_pretrained(
        recipe, auto_class, config=config, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
    )
    foreign = {name for name, *_ in report["mismatched_keys"]} - set(_head_parameters(model))
    if foreign:
        message = f"its weights do not fit its config.json: {', '.join(sorted(foreign)[:3])}."
        raise RecipeError([Problem("model", message)])
    model._rankwise_new_weights = sorted(
        {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    )
    return model


def new_weights(model: Any) -> list[str]:
    """The names of a loaded model's parameters that its checkpoint did not have."""
    return list(model.__dict__.get("_rankwise_new_weights", ()))


def head_modules(model: Any) -> list[str]:
    """The modules beside a Transformers model's body that have parameters: its head.

    They are trained whole, and saved with the adapter.
    """
    body = getattr(model, "base_model_prefix", "")
    return [
        name
        for name, module in model.named_children()
        if name != body and next(module.parameters(), None) is not None
    ]


def _head_parameters(model: Any) -> list[str]:
    heads = tuple(f"{name}." for name in head_modules(model))
    return [name for name, _ in model.named_parameters() if name.startswith(heads)]


def _from_pretrained(recipe: BaseRecipe, auto_class: str, **options: Any) -> Any:
    """Load with Transformers: from a folder without any network, and never running code that comes with a model."""
    import transformers

    place = model_place(recipe)
    name = place.name if place.path is None else str(place.path)
    try:
        with quiet():
            return getattr(transformers, auto_class).from_pretrained(
                name, local_files_only=place.path is not None, trust_remote_code=False, **options
            )
    except (OSError, ValueError, KeyError) as error:
        what = "as a model" if place.path else "as a folder here or a model on the Hugging Face hub"
        raise RecipeError(
            [Problem("model", f"{place.name!r} can't be loaded {what}: {_first_line(error)}")]
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Transformers' progress bars and warnings: what matters is checked and said by the recipe."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
