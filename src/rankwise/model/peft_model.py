"""Attaching adapters to a model: `get_peft_model`, and the class of methods that the model gets."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rankwise.adapters.inplace import InPlace, add_methods
from rankwise.adapters.ready import OncePerPass
from rankwise.attach.attachment import check_compute_dtype, plan_attachment, set_compute_dtype
from rankwise.attach.precision import in_base_dtype
from rankwise.config import LoraConfig
from rankwise.model.options import check_attach_options
from rankwise.model.rows import GeneratesByRow, TakesRows
from rankwise.model.shared import SharesAdapters
from rankwise.model.state import CarriesRun
from rankwise.model.untrained import TellsOfNoTraining, watch

_OF_ANOTHER_LIBRARY = (
    " of another library. Import it from rankwise, where its fields have PEFT's names. Or keep PEFT's layers: "
    "`peft.get_peft_model(model, peft.LoraConfig(...))` and `rankwise.adapt_ranks(model)`."
)


class PeftModel(InPlace, TakesRows, TellsOfNoTraining, OncePerPass, SharesAdapters, CarriesRun):
    """The methods of an adapted model, with PEFT's names. `get_peft_model` adds them to the model's class.

    The model stays the same object. It is still an instance of its own class, with its own ``forward``, ``generate``
    and so on. ``PeftModel(model, peft_config)`` is PEFT's other way to call `get_peft_model`.

    Args:
        model: base model, any ``nn.Module``.
        peft_config: an `AdaLoraConfig` or a `LoraConfig`.
        adapter_name: name of the adapter.
        options: other arguments of `get_peft_model`.

    Raises:
        TypeError: as `get_peft_model`.
        ValueError: as `get_peft_model`.

    Example:
        >>> import torch, rankwise as rw
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = rw.PeftModel(base, rw.LoraConfig(r=2, target_modules=["0"]))
        >>> model is base, isinstance(model, rw.PeftModel), isinstance(model, torch.nn.Sequential)
        (True, True, True)
    """

    def __init__(
        self, model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default", **options: Any
    ) -> None:
        """Do nothing: ``PeftModel(model, config)`` returns the model that `get_peft_model` made."""

    @classmethod
    def _from_scratch(cls, *args: Any, **options: Any) -> Any:
        return get_peft_model(*args, **options)

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        model_id: Any = None,
        adapter_name: str = "default",
        is_trainable: bool = False,
        **options: Any,
    ) -> Any:
        """Attach the adapter in a folder to a base model, in place, and return the model.

        Args:
            model: the base model, or an adapted model.
            model_id: an adapter folder, or a repository on the Hugging Face hub (needs ``huggingface_hub``).
            adapter_name: name of the adapter in the model.
            is_trainable: whether the adapter trains. If the folder holds the state of an unfinished run, the run then
                continues from there. False puts the model into evaluation mode.
            options: ``adapter_compute_dtype`` and ``autocast_adapter_dtype``, as for `get_peft_model`; ``config``, a
                configuration that replaces the folder's; and ``revision``, ``subfolder``, ``cache_dir`` and ``token``
                for the hub.

        Returns:
            ``model`` itself.

        Raises:
            FileNotFoundError: the adapter does not exist.
            TypeError: an option is unknown (the message suggests the nearest known one), or ``model`` is not a module.
            ValueError: a file is broken, or belongs to another model. The model is then as before.

        Example:
            >>> import tempfile, torch, rankwise as rw
            >>> layers = lambda: torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
            >>> config = rw.LoraConfig(r=2, target_modules=["0"])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     rw.get_peft_model(layers(), config).save_pretrained(folder)
            ...     model = rw.PeftModel.from_pretrained(layers(), folder)
            >>> model.active_adapters
            ['default']
        """
        if "_original_class" not in vars(cls):
            return _load_into_base(model, model_id, adapter_name, is_trainable, **options)
        own: Any = super()  # on an adapted model's class this is the class's own way to load a base model
        return own.from_pretrained(model, *([] if model_id is None else [model_id]), **options)

    @property
    def base_model(self) -> nn.Module:
        """The model itself, or the part that the model's own class calls ``base_model``."""
        own: Any = self._modules.get("base_model", self.__dict__.get("base_model"))
        if own is None:
            own = getattr(super(), "base_model", None)
        return self if own is None else own

    def get_base_model(self) -> nn.Module:
        """Return the model itself, as rankwise does not wrap it."""
        return self

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the number of parameters that train, and the number of all parameters."""
        sizes = [(p.numel() * _packing(p), p.requires_grad) for p in self.parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)

    def get_layer_status(self) -> Any:
        """Return the state of each adapted layer; see `rankwise.get_layer_status`."""
        from rankwise.peft_api.status import get_layer_status

        return get_layer_status(self)

    def get_model_status(self) -> Any:
        """Return the state of the model as a whole; see `rankwise.get_model_status`."""
        from rankwise.peft_api.status import get_model_status

        return get_model_status(self)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, in PEFT's format."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")


class PeftModelThatGenerates(GeneratesByRow, PeftModel):
    """The methods of an adapted model that has ``generate``."""


def get_peft_model(
    model: Any,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    adapter_compute_dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    """Attach an adapter to ``model``, in place, and return ``model``.

    Only the adapted layers change, and all other parameters are frozen. The model stays an instance of its own class
    and gets the methods of `PeftModel`. AdaLoRA needs no further call: ranks are cut when the optimizer that holds the
    adapter's parameters steps.

    Args:
        model: base model or adapted model, any ``nn.Module``.
        peft_config: an `AdaLoraConfig` or a `LoraConfig`.
        adapter_name: name of the adapter.
        adapter_compute_dtype: floating-point dtype in which linear layers compute the adapter's products. None: the
            dtypes of the layer's input and output. PEFT computes in ``torch.float32``; with it, a bfloat16 base takes
            as much time and memory as in PEFT.
        options: PEFT's other arguments. ``autocast_adapter_dtype=False`` keeps the adapter, and modules that train in
            full, in the base model's half precision; otherwise they are float32. ``revision`` is the base model's
            revision, which is stored in the configuration. ``low_cpu_mem_usage`` has no effect, and ``mixed`` must be
            False.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module, ``peft_config`` is not one of rankwise's configurations, or
            ``adapter_compute_dtype`` is not a floating-point dtype.
        ValueError: no layer matches ``target_modules``, or a matching layer cannot be adapted. The model is then as
            before.

    Example:
        >>> import torch, rankwise as rw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> config = rw.AdaLoraConfig(init_r=4, target_r=2, total_step=10, tfinal=2, target_modules=["0", "2"])
        >>> model = rw.get_peft_model(model, config)
        >>> model.print_trainable_parameters()
        trainable params: 104 || all params: 194 || trainable%: 53.6082
        >>> isinstance(model, torch.nn.Sequential)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, but is a {type(model).__name__}.")
    if not isinstance(peft_config, LoraConfig):
        raise TypeError(
            f"`peft_config` must be rankwise's LoraConfig or AdaLoraConfig, but is a {type(peft_config).__name__}"
            f"{_OF_ANOTHER_LIBRARY if hasattr(peft_config, 'peft_type') else '.'}"
        )
    widens = check_attach_options("get_peft_model", options)
    check_compute_dtype(adapter_compute_dtype)
    if options.get("revision") is not None:
        peft_config = replace(peft_config, revision=options["revision"])
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, peft_config, autocast_adapter_dtype=widens)
        model.set_adapter(adapter_name)
        set_compute_dtype(model, adapter_name, adapter_compute_dtype)
        return model
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"This {type(model).__name__} has adapters of PEFT already. Take its base model "
            "(`model.unload()`, or `model.get_base_model()` before it was adapted)."
        )
    attachment = plan_attachment(model, peft_config, adapter_name)
    if not widens:
        attachment = in_base_dtype(model, attachment)
    adapted = _make_peft_model(model)
    try:
        adapted._attach(attachment)
    except BaseException:
        adapted._strip()
        raise
    set_compute_dtype(model, adapter_name, adapter_compute_dtype)
    return model


def _make_peft_model(model: Any) -> PeftModel:
    model.peft_config, model._rankwise_controller, model._rankwise_histories = {}, None, {}
    model._rankwise_to_train = set()
    add_methods(model, PeftModelThatGenerates if callable(getattr(model, "generate", None)) else PeftModel)
    inner = model.base_model
    # PEFT scripts call model.base_model.update_and_allocate.
    if inner is not model and isinstance(inner, nn.Module):
        inner.__dict__["update_and_allocate"] = _UpdateAndAllocate(model)
        model.__dict__["_rankwise_inner"] = inner
    watch(model)
    adapted: PeftModel = model
    return adapted


class _UpdateAndAllocate:
    """`update_and_allocate` for a part of the adapted model, to which it holds a weak reference."""

    def __init__(self, model: Any) -> None:
        self._find: Callable[[], Any] = weakref.ref(model) if model is not None else lambda: None

    def __call__(self, global_step: int) -> None:
        model = self._find()
        if model is None:
            raise RuntimeError("The adapted model, of which this is a part, does not exist any more.")
        model.update_and_allocate(global_step)

    def __reduce__(self) -> Any:
        return _UpdateAndAllocate, (self._find(),)


def _load_into_base(
    model: Any,
    model_id: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    adapter_compute_dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    if not isinstance(model, nn.Module):
        raise TypeError(f"The base model must be a torch.nn.Module, but is a {type(model).__name__}.")
    new = not isinstance(model, PeftModel)
    adapted = model if isinstance(model, PeftModel) else _make_peft_model(model)
    try:
        function = "PeftModel.from_pretrained"
        adapted._load(function, model_id, adapter_name, is_trainable, adapter_compute_dtype, options)
        adapted.set_adapter(adapter_name)
        if not is_trainable:
            adapted.eval()
    except BaseException:
        if new:
            adapted._strip()
        raise
    return model


def _packing(parameter: nn.Parameter) -> int:
    """The number of weights in one element of a parameter: bitsandbytes packs two 4-bit weights into a byte."""
    return 2 if type(parameter).__name__ == "Params4bit" and parameter.element_size() == 1 else 1
