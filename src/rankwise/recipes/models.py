"""Loading a recipe's model, configuration and tokenizer. Without weights, the model is on the meta device."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rankwise.attach.embeddings import output_embeddings
from rankwise.recipes.errors import refusal
from rankwise.recipes.places import Place, find_place, refuse_unreachable
from rankwise.recipes.recipe import BaseRecipe

_OF_TOKENIZERS = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "source.spm", "tekken", "bpe")


def model_place(recipe: BaseRecipe) -> Place:
    """The place of the recipe's model."""
    return find_place(recipe.model, "model", recipe.folder)


def load_processor(recipe: BaseRecipe, auto_class: str, **options: Any) -> Any:
    """Load the model's tokenizer or feature extractor. ``options`` are those of ``from_pretrained``."""
    return _from_pretrained(recipe, auto_class, **options)


def load_tokenizer(recipe: BaseRecipe) -> Any:
    """Load the model's tokenizer, with a padding token.

    Raises:
        RecipeError: the tokenizer has neither a padding token nor an end token to use instead.
    """
    tokenizer = load_processor(recipe, "AutoTokenizer")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise refusal("model", "its tokenizer has no padding token, and no end token to use as one.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def token_limit(wanted: int | None, tokenizer: Any, config: Any, most: int | None = None) -> int:
    """The number of tokens to read of each text.

    Args:
        wanted: the recipe's ``data.max_length``. None: as many tokens as the model takes.
        tokenizer: the model's tokenizer.
        config: the model's configuration.
        most: the upper limit where ``wanted`` is None. None: no limit but the model's.

    Raises:
        RecipeError: ``wanted`` is more than the model takes.
    """
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    takes = min((int(limit) for limit in limits if limit and limit < 10**6), default=None)
    if wanted is not None and takes is not None and wanted > takes:
        raise refusal("data.max_length", f"is {wanted}, but the model takes at most {takes} tokens.")
    return wanted or min((limit for limit in (takes, most) if limit), default=512)


def model_config(recipe: BaseRecipe) -> Any:
    """Load the model's configuration."""
    return _from_pretrained(recipe, "AutoConfig")


def padding_config(recipe: BaseRecipe, tokenizer: Any) -> Any:
    """Load the model's configuration, and set its padding token to the tokenizer's. ``tokenizer`` may be None."""
    config = model_config(recipe)
    if tokenizer is not None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


def name_labels(config: Any, names: Sequence[str]) -> None:
    """Write the labels' names, by number, into a model's configuration."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}


def load_model(recipe: BaseRecipe, auto_class: str, config: Any, *, weights: bool) -> Any:
    """Load a model to adapt.

    Weights that the model's files do not have are random. `new_weights` lists them.

    Args:
        recipe: the recipe, which names the model and its dtype.
        auto_class: the name of a class of Transformers, such as ``AutoModelForSequenceClassification``.
        config: the model's configuration.
        weights: whether to load the weights. False: the model is on the meta device.

    Raises:
        RecipeError: there is no such model, or it can't do the task.
    """
    import torch
    import transformers

    auto = getattr(transformers, auto_class)
    if not weights:
        try:
            options = {} if recipe.dtype == "auto" else {"dtype": getattr(torch, recipe.dtype)}
            with torch.device("meta"):
                return auto.from_config(config, **options)
        except ValueError as error:
            raise refusal("model", _first_line(error)) from error
    dtype = recipe.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    model, report = _from_pretrained(
        recipe, auto_class, config=config, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
    )
    foreign = {name for name, *_ in report["mismatched_keys"]} - set(_head_parameters(model))
    if foreign:
        raise refusal("model", f"its weights do not fit its config.json: {', '.join(sorted(foreign)[:3])}.")
    model._rankwise_new_weights = sorted(
        {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    )
    return model


def new_weights(model: Any) -> list[str]:
    """The names of a loaded model's parameters that were not in the model's files."""
    return list(model.__dict__.get("_rankwise_new_weights", ()))


def head_modules(model: Any) -> list[str]:
    """The head of a Transformers model: the names of its modules with parameters outside the model's body.

    The head is trained in full and saved with the adapter. A language model's output layer does not count as a head,
    because it was pretrained.
    """
    body = getattr(model, "base_model_prefix", "")
    outputs = list(output_embeddings(model))
    return [
        name
        for name, module in model.named_children()
        if name != body
        and not any(module is each for each in outputs)
        and next(module.parameters(), None) is not None
    ]


def _head_parameters(model: Any) -> list[str]:
    heads = tuple(f"{name}." for name in head_modules(model))
    return [name for name, _ in model.named_parameters() if name.startswith(heads)]


def _from_pretrained(recipe: BaseRecipe, auto_class: str, **options: Any) -> Any:
    """Load with Transformers. Code that comes with a model never runs, and a folder is loaded without the network."""
    import transformers

    place = model_place(recipe)
    refuse_unreachable(place, "model", ("config.json",))
    if auto_class == "AutoTokenizer" and place.path is not None and place.path.is_dir():
        _refuse_without_tokenizer(place.path)
    try:
        with quiet():
            if place.path is not None and is_gguf(place.path):
                return _from_gguf(auto_class, place.path, **options)
            name = place.name if place.path is None else str(place.path)
            return getattr(transformers, auto_class).from_pretrained(
                name, local_files_only=place.path is not None, trust_remote_code=False, **options
            )
    except ImportError as error:
        if place.path is None or not is_gguf(place.path):
            raise
        raise refusal(
            "model", 'a .gguf file is read with the package gguf. Install it: pip install ".[language]"'
        ) from error
    except (OSError, ValueError, KeyError) as error:
        what = "as a model" if place.path else "as a folder here or a model on the Hugging Face hub"
        raise refusal("model", f"{place.name!r} can't be loaded {what}: {_first_line(error)}") from error


def _refuse_without_tokenizer(folder: Path) -> None:
    """Refuse a folder without a tokenizer. Transformers' own error would list all ways to make a tokenizer."""
    if (folder / "config.json").is_file() and not any(
        path.name.startswith(_OF_TOKENIZERS) for path in folder.iterdir()
    ):
        raise refusal(
            "model",
            f"{str(folder)!r} holds no tokenizer: neither tokenizer.json nor another file of one. Copy its files there "
            "from where the model is from, or write them with `tokenizer.save_pretrained` into that folder.",
        )


def is_gguf(path: Path) -> bool:
    """Whether a path names a .gguf file, the format of llama.cpp's models."""
    return path.suffix.lower() == ".gguf"


def _from_gguf(auto_class: str, path: Path, **options: Any) -> Any:
    """Load from a GGUF file. Quantized weights are dequantized."""
    import transformers

    if not auto_class.startswith("AutoModel"):
        return copy.deepcopy(_parsed_gguf(auto_class, path, path.stat().st_mtime, **options))
    if hasattr(transformers, "GgufConfig"):  # newer versions would keep weights quantized where they can
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):  # hides a progress bar that no setting turns off
        loaded = getattr(transformers, auto_class).from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True, **options
        )
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    # Older versions still mark the model as quantized, and then refuse to train or save it.
    model.hf_quantizer, model.is_quantized = None, False
    model.config.__dict__.pop("quantization_config", None)
    model.config._name_or_path = str(path)
    return loaded


@functools.lru_cache(maxsize=4)
def _parsed_gguf(auto_class: str, path: Path, modified: float, **options: Any) -> Any:
    """Load a configuration or tokenizer once: reading a vocabulary from a GGUF file takes seconds."""
    import transformers

    return getattr(transformers, auto_class).from_pretrained(
        str(path.parent), gguf_file=path.name, local_files_only=True, **options
    )


def loading_arguments(base: str) -> str:
    """The arguments of ``from_pretrained``, as Python source, that load the model at a path or with a hub name.

    Example:
        >>> print(loading_arguments("someone/model"), loading_arguments("models/small.gguf"), sep="; ")
        'someone/model'; 'models', gguf_file='small.gguf'
    """
    path = Path(base)
    return f"{str(path.parent)!r}, gguf_file={path.name!r}" if is_gguf(path) else repr(base)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Transformers' progress bars and warnings. The recipe checks and says everything that matters."""
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
    """The first line of an error's message. If that line ends in a colon, the whole message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines) if lines[0].endswith(":") else lines[0]
