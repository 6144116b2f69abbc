"""PEFT's `AutoPeftModelFor…`: an adapter together with the base model that its configuration names."""

from __future__ import annotations

import importlib
import os
from typing import Any, ClassVar

from torch import nn

from rankwise.attach.embeddings import input_embeddings
from rankwise.config import LoraConfig
from rankwise.config.hub_options import HUB_OPTIONS
from rankwise.files.atomic import read_folder
from rankwise.files.hub import find_adapter_folder
from rankwise.model import PeftModel
from rankwise.storage import OWNED, PREFIX, WEIGHTS_NAME, read_header

_OF_THE_ADAPTER = (
    "adapter_compute_dtype",
    "autocast_adapter_dtype",
    "ephemeral_gpu_offload",
    "low_cpu_mem_usage",
)
_BY_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


class AutoPeftModel:
    """Loads a base model of Transformers and an adapter on it, by the adapter's folder alone.

    The class of the base model is the one that Transformers has for the ``task_type`` in the adapter's configuration.
    `AutoPeftModelForCausalLM` and others say the class themselves.
    """

    _auto_class: ClassVar[str | None] = None

    def __init__(self, *args: Any, **options: Any) -> None:
        raise TypeError(
            f"{type(self).__name__} makes no object of its own: use {type(self).__name__}.from_pretrained."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> Any:
        """Load the base model, attach the adapter, and return the model.

        Where the adapter's file holds embeddings of another vocabulary, the base model's are resized to it first.

        Args:
            pretrained_model_name_or_path: the adapter's folder, or its name on the Hugging Face hub.
            adapter_name: as for `PeftModel.from_pretrained`.
            is_trainable: as for `PeftModel.from_pretrained`.
            config: the adapter's configuration, in place of the folder's.
            revision: the adapter's, on the hub; the base model's is in the adapter's configuration.
            options: ``subfolder`` and those of `get_peft_model` for the adapter, all others for the base model's
                ``from_pretrained``; those for the hub for both.

        Raises:
            FileNotFoundError: there is no such adapter.
            ValueError: its configuration names no base model, or no class for it; and as `PeftModel.from_pretrained`.
        """
        hub = {name: options[name] for name in HUB_OPTIONS & options.keys()}
        of_the_adapter = {name: options.pop(name) for name in _OF_THE_ADAPTER if name in options}
        subfolder = options.pop("subfolder", None)
        folder = find_adapter_folder(
            pretrained_model_name_or_path, **{**hub, "revision": revision, "subfolder": subfolder}
        )
        config = config or LoraConfig.from_pretrained(folder)
        if not config.base_model_name_or_path:
            raise ValueError(
                f"{folder}: the configuration names no base model (`base_model_name_or_path`). Load that yourself, and "
                "call `PeftModel.from_pretrained(base, folder)`."
            )
        of_the_base = {"revision": config.revision, **options} if config.revision else options
        base = cls._base_class(config).from_pretrained(config.base_model_name_or_path, **of_the_base)
        rows = _rows_of_embeddings(folder, base)
        if rows is not None:
            base.resize_token_embeddings(rows)
        return PeftModel.from_pretrained(
            base, folder, adapter_name, is_trainable, config=config, **of_the_adapter
        )

    @classmethod
    def _base_class(cls, config: LoraConfig) -> Any:
        import transformers

        name = cls._auto_class or _BY_TASK.get(config.task_type or "")
        if name is not None:
            return getattr(transformers, name)
        said: Any = config.extra.get("auto_mapping") or {}
        if {"base_model_class", "parent_library"} <= said.keys():
            return _class_in_transformers(said["parent_library"], said["base_model_class"])
        raise ValueError(
            "The adapter's configuration has no `task_type`, so it does not tell the base model's class. Use one of "
            "the classes that say it, such as AutoPeftModelForCausalLM, or load the base model yourself and call "
            "`PeftModel.from_pretrained(base, folder)`."
        )


def _class_in_transformers(module: str, name: str) -> Any:
    """The class that a file names; it must be one of Transformers', as importing anything else could run any code."""
    if module.split(".")[0] != "transformers":
        raise ValueError(
            f"The adapter's configuration names {module}.{name} as the base model's class, which is not in "
            "Transformers. Load the base model yourself, and call `PeftModel.from_pretrained(base, folder)`."
        )
    return getattr(importlib.import_module(module), name)


def _rows_of_embeddings(folder: Any, base: Any) -> int | None:
    """How many entries the input embeddings in an adapter's file have, if it holds them and they are others here."""
    if not (folder / WEIGHTS_NAME).is_file():
        return None
    embeddings = next(input_embeddings(base), None)
    paths = [path for path, module in base.named_modules() if module is embeddings]
    if not isinstance(embeddings, nn.Embedding) or not paths:
        return None
    tensors = read_folder(folder, OWNED, read_header).tensors
    for name in (f"{PREFIX}{paths[0]}.weight", f"{PREFIX}{paths[0]}.base_layer.weight"):
        if name in tensors and tensors[name].shape[0] != embeddings.num_embeddings:
            return int(tensors[name].shape[0])
    return None


class AutoPeftModelForCausalLM(AutoPeftModel):
    """`AutoPeftModel` of language models."""

    _auto_class = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """`AutoPeftModel` of encoder-decoder models."""

    _auto_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """`AutoPeftModel` of classifiers of texts."""

    _auto_class = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """`AutoPeftModel` of classifiers of tokens."""

    _auto_class = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """`AutoPeftModel` of models that find answers in texts."""

    _auto_class = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """`AutoPeftModel` of models without a head."""

    _auto_class = "AutoModel"
