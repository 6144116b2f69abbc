"""PEFT's `AutoPeftModelFor…` classes: they load an adapter together with the base model that it names."""

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
    """Loads a base model of Transformers and an adapter on it, given only the adapter's folder.

    The ``task_type`` in the adapter's configuration determines which class of Transformers the base model gets. The
    subclasses, such as `AutoPeftModelForCausalLM`, always use one class. Call ``from_pretrained`` to get a model.

    Raises:
        TypeError: the class is called.

    Example:
        >>> import tempfile, rankwise as rw
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(f"{folder}/base")
        ...     base = LlamaForCausalLM.from_pretrained(f"{folder}/base")
        ...     model = rw.get_peft_model(base, rw.LoraConfig(r=2, task_type="CAUSAL_LM"))
        ...     model.save_pretrained(f"{folder}/adapter")
        ...     loaded = rw.AutoPeftModel.from_pretrained(f"{folder}/adapter")
        >>> isinstance(loaded, LlamaForCausalLM), loaded.active_adapters
        (True, ['default'])
    """

    _auto_class: ClassVar[str | None] = None

    def __init__(self, *args: Any, **options: Any) -> None:
        raise TypeError(
            f"{type(self).__name__} can't be instantiated: use {type(self).__name__}.from_pretrained."
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

        If the adapter's file holds embeddings of another vocabulary size, those of the base model are resized first.

        Args:
            pretrained_model_name_or_path: the adapter's folder, or its repository on the Hugging Face hub.
            adapter_name: name of the adapter in the model.
            is_trainable: whether the adapter trains, as for `PeftModel.from_pretrained`.
            config: configuration that replaces the folder's. None: the folder's.
            revision: revision of the adapter on the hub. The base model's revision is in the adapter's configuration.
            options: options for the hub, which serve the adapter and the base model; ``subfolder`` and the options of
                `get_peft_model`, which serve the adapter; and options of the base model's ``from_pretrained``.

        Returns:
            The adapted model.

        Raises:
            FileNotFoundError: the adapter does not exist.
            TypeError: an option is unknown.
            ValueError: the adapter's configuration does not name the base model or its class; or a file is broken, or
                belongs to another model.
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
            "The adapter's configuration has no `task_type`, so the base model's class is not known. Use a class that "
            "determines it, such as AutoPeftModelForCausalLM, or load the base model yourself and call "
            "`PeftModel.from_pretrained(base, folder)`."
        )


def _class_in_transformers(module: str, name: str) -> Any:
    """The class that a file names. It must be in Transformers, as importing another module could run any code."""
    if module.split(".")[0] != "transformers":
        raise ValueError(
            f"The adapter's configuration names {module}.{name} as the base model's class, which is not in "
            "Transformers. Load the base model yourself, and call `PeftModel.from_pretrained(base, folder)`."
        )
    return getattr(importlib.import_module(module), name)


def _rows_of_embeddings(folder: Any, base: Any) -> int | None:
    """The vocabulary size of embeddings in an adapter's file. None if it holds none, or if it equals the base's."""
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
    """`AutoPeftModel` for language models."""

    _auto_class = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """`AutoPeftModel` for encoder-decoder models."""

    _auto_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """`AutoPeftModel` for models that classify texts."""

    _auto_class = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """`AutoPeftModel` for models that classify tokens."""

    _auto_class = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """`AutoPeftModel` for models that find answers in texts."""

    _auto_class = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """`AutoPeftModel` for models without a head."""

    _auto_class = "AutoModel"
