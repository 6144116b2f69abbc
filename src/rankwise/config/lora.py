"""LoRA's settings, which AdaLoRA shares: the layers to adapt and the scale, their checks, and their JSON.

Field names, meanings and defaults are those of Hugging Face PEFT. A script or an ``adapter_config.json`` moves over
unchanged. PEFT accepts some values and then ignores them, or fails on them in the middle of a run. Such values are
refused here, when the configuration is made or changed.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from rankwise.config.checks import (
    Default,
    DefaultFraction,
    check_flag,
    check_layer_indices,
    check_names,
    check_names_or_pattern,
    check_number,
    check_one_of,
    check_pattern,
    check_positive,
    check_rank,
    check_regular_expression,
    check_start,
    check_text,
    check_whole,
    short,
)
from rankwise.config.hub_options import check_hub_options
from rankwise.config.kinds import PeftType, TaskType
from rankwise.config.names import (
    CheckedKeywords,
    check_extra,
    field_names,
    is_neutral,
    tell_of_unknown,
    unknown_keyword,
)
from rankwise.files.atomic import write_file
from rankwise.files.hub import find_adapter_folder
from rankwise.files.json_file import read_json

CONFIG_NAME = "adapter_config.json"
TASK_TYPES = tuple(task.value for task in TaskType)

_BIASES = ("none", "all", "lora_only")
_FLAGS = ("fan_in_fan_out", "use_rslora", "inference_mode")
PEFT_DEFAULT_R = 8
_PEFT_DEFAULT_ALPHA = 8

# Starts that matter only before training. Any other start has changed the base weights, which are not in the file.
_STARTS_OF_NO_CONSEQUENCE = ("eva", "mica", "orthogonal")

when_made: list[Callable[[], None]] = []  # functions that are called after each new configuration

_Config = TypeVar("_Config", bound="LoraConfig")


@dataclass(kw_only=True)
class LoraConfig(CheckedKeywords):
    """A plain LoRA adapter: a layer computes ``W x + scale * B A x``.

    A configuration is always valid: it is checked when it is made, when it is read from a file, and when a field is
    set. Use ``dataclasses.replace`` to change several fields that depend on each other. A tuple or a set may stand
    for a list.

    Args:
        r: rank, at least 1.
        target_modules: which layers to adapt: a list of names (the whole path, or its last parts), a regular
            expression that matches whole paths, ``"all-linear"``, or None for the known defaults of an architecture.
            An empty list adapts no layer; use it with ``target_parameters``.
        target_parameters: parameters to adapt directly, such as the experts of a mixture of experts: a list of whole
            names, or of their last parts (``"experts.down_proj"``). A parameter of three dimensions is a stack of
            matrices, and each matrix has its own rank. ``lora_dropout`` must be 0.
        exclude_modules: layers to leave alone, by name or by regular expression.
        lora_alpha: numerator of the scale ``lora_alpha / r``, greater than 0.
        lora_dropout: probability, in [0, 1), that training drops an element of the adapter's input.
        fan_in_fan_out: accepted for compatibility and ignored. The kind of layer tells how its weight is stored.
        bias: which biases train: "none", "all", or "lora_only" (those of adapted layers).
        use_rslora: scale by ``lora_alpha / sqrt(r)`` instead.
        modules_to_save: names of whole modules to train and save, such as a new classification head.
        init_lora_weights: start of the factors: True (the update starts at 0), "gaussian" (the same with a normal A)
            or False (a random update, for tests).
        layers_to_transform: index of the only layer to adapt, or a list of indices, counted from 0.
            ``target_modules`` must then be a list.
        layers_pattern: name of the module list that ``layers_to_transform`` counts in, such as "layers" or "h".
        rank_pattern: ranks of layers that differ from ``r``, at least 1. Each key is a regular expression that matches
            the end of a path; the first that matches counts.
        alpha_pattern: values of ``lora_alpha`` for layers that differ, with the same kind of keys.
        task_type: one of ``TASK_TYPES``, or None. The types of classification and question answering train the head.
        inference_mode: True if the adapter is for inference only and does not train.
        base_model_name_or_path: name or folder of the base model.
        revision: revision of the base model on the Hugging Face hub.
        extra: fields of a PEFT file that have no meaning here. They are written back unchanged.

    Raises:
        TypeError: a field is unknown, or a value has the wrong type.
        ValueError: a value is out of range, or two values contradict each other.

    Example:
        >>> config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
        >>> config.peft_type.value, config.r
        ('LORA', 16)
        >>> LoraConfig(rank=16)
        Traceback (most recent call last):
        ...
        TypeError: LoraConfig has no field `rank`. Did you mean `r`?
    """

    peft_type: ClassVar[PeftType] = PeftType.LORA

    r: int = PEFT_DEFAULT_R
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = _PEFT_DEFAULT_ALPHA
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | Literal["gaussian"] = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    task_type: str | None = None
    inference_mode: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None
    extra: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check()
        self.__dict__["_made"] = True
        for listener in when_made:
            listener()

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in field_names(type(self)):
            if is_neutral(type(self), name, value):
                return
            raise AttributeError(unknown_keyword(type(self), name, field_names(type(self))))
        if "_made" not in self.__dict__:
            self.__dict__[name] = value
            return
        before = dict(self.__dict__)
        self.__dict__[name] = value
        try:
            self._check()
        except Exception:
            self.__dict__.update(before)
            raise

    # -- checks: each stores the checked value in its plain form (lists, dicts, int, float, str)

    def _check(self) -> None:
        values = self.__dict__
        self._check_rank()
        self._check_modules()
        self._check_layers()
        values["lora_alpha"] = check_positive("lora_alpha", self.lora_alpha)
        values["lora_dropout"] = check_number("lora_dropout", self.lora_dropout)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` must be in [0, 1), but is {self.lora_dropout}.")
        if self.lora_dropout and self.target_parameters:
            raise ValueError(
                f"`lora_dropout`={self.lora_dropout} does not work with `target_parameters`, as in PEFT: set it to 0."
            )
        for name in _FLAGS:
            values[name] = check_flag(name, values[name])
        values["bias"] = check_one_of("bias", self.bias, _BIASES)
        if self.task_type is not None:
            values["task_type"] = check_one_of("task_type", self.task_type, TASK_TYPES)
        values["init_lora_weights"] = self._checked_start(self.init_lora_weights)
        values["alpha_pattern"] = check_pattern("alpha_pattern", self.alpha_pattern, check_positive)
        values["base_model_name_or_path"] = check_text(
            "base_model_name_or_path", self.base_model_name_or_path
        )
        values["revision"] = check_text("revision", self.revision)
        values["extra"] = check_extra(self.extra)

    def _check_rank(self) -> None:
        self.__dict__["r"] = check_whole("r", self.r, least=1)
        self.__dict__["rank_pattern"] = check_pattern("rank_pattern", self.rank_pattern, check_rank)

    def _check_modules(self) -> None:
        targets = check_names_or_pattern("target_modules", self.target_modules)
        if isinstance(targets, str) and targets.lower() == "all-linear":
            targets = "all-linear"
        if isinstance(self.target_parameters, str):
            raise TypeError(
                f"`target_parameters` must be a list of names; write [{self.target_parameters!r}]. Expressions are "
                "not taken here, as in PEFT."
            )
        parameters = check_names("target_parameters", self.target_parameters) or None
        self.__dict__["target_parameters"] = parameters
        if targets is not None and not targets and not parameters:
            raise ValueError("`target_modules` is empty: name a module, or leave it out for the defaults.")
        self.__dict__["target_modules"] = targets
        self.__dict__["exclude_modules"] = (
            check_names_or_pattern("exclude_modules", self.exclude_modules) or None
        )
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"`modules_to_save` must be a list of names; write [{self.modules_to_save!r}].")
        self.__dict__["modules_to_save"] = check_names("modules_to_save", self.modules_to_save) or None

    def _check_layers(self) -> None:
        values = self.__dict__
        values["layers_to_transform"] = indices = check_layer_indices(self.layers_to_transform)
        values["layers_pattern"] = pattern = (
            check_names_or_pattern("layers_pattern", self.layers_pattern) or None
        )
        for each in [pattern] if isinstance(pattern, str) else pattern or ():
            check_regular_expression("layers_pattern", each)
        if isinstance(self.target_modules, str) and indices is not None:
            raise ValueError(
                "`layers_to_transform` needs `target_modules` to be a list of names: "
                f"say which layers in the expression {self.target_modules!r} itself."
            )
        if pattern is not None and indices is None:
            raise ValueError(
                f"`layers_pattern`={pattern!r} needs `layers_to_transform`, which says what to count."
            )

    @staticmethod
    def _checked_start(value: Any) -> bool | str:
        return check_start(
            value, "True (the update starts at 0), 'gaussian' (the same, with a normal A) or False (random)"
        )

    # -- files

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration under PEFT's names, ready for JSON.

        Example:
            >>> LoraConfig(target_modules={"v", "q"}).to_dict()["target_modules"]
            ['q', 'v']
        """
        values = {each.name: self.__dict__[each.name] for each in dataclasses.fields(self)}
        extra = dict(values.pop("extra"))
        start = extra.pop("init_lora_weights", None)
        data = {**values, **extra, "peft_type": self.peft_type.value}
        if start is not None and self.init_lora_weights is True:
            data["init_lora_weights"] = start
        return {name: _plain(value) for name, value in data.items()}

    @classmethod
    def from_dict(cls: type[_Config], data: Mapping[str, Any], source: str = CONFIG_NAME) -> _Config:
        """Make a configuration from what ``to_dict`` or PEFT wrote. ``peft_type`` decides the class.

        Fields that the class does not have are kept in ``extra``. They are refused if they are known to change what
        the adapter computes. The schedule of an adapter in ``inference_mode`` is not checked, as nothing will be
        trained.

        Args:
            data: the fields, by name.
            source: name of the file for messages.

        Raises:
            TypeError: a value has the wrong type. This message and the next begin with ``source``.
            ValueError: a value is out of range, or ``peft_type`` names another kind of adapter.

        Warns:
            UserWarning: a field is unknown, and may change what the adapter computes.

        Example:
            >>> config = LoraConfig.from_dict({"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "r": 8})
            >>> type(config).__name__, config.init_r
            ('AdaLoraConfig', 4)
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"{source}: must hold a JSON object, but holds {short(data)}.")
        kind = _kind_of_adapter(data.get("peft_type"), source)
        if not issubclass(kind, cls):
            raise ValueError(f"{source}: holds a {kind.peft_type} adapter, to be read with {kind.__name__}.")
        try:
            values, extra = _split_fields(kind, data)
            kind._from_file(values, extra)
            config: _Config = kind(**values, extra=extra)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{source}: {error}") from None
        tell_of_unknown(extra, source)
        return config

    @classmethod
    def from_peft_type(cls, **fields: Any) -> LoraConfig:
        """Make a configuration of the class that ``peft_type`` names. Without ``peft_type``, make one of this class.

        Args:
            fields: the configuration's fields, and ``peft_type``.

        Raises:
            TypeError: a field is unknown, or a value has the wrong type.
            ValueError: ``peft_type`` names an unknown kind of adapter, or a value is out of range.

        Example:
            >>> type(LoraConfig.from_peft_type(peft_type="ADALORA", total_step=100)).__name__
            'AdaLoraConfig'
        """
        kind = _kind_of_adapter(fields["peft_type"], "from_peft_type") if "peft_type" in fields else cls
        made: LoraConfig = kind(**fields)
        return made

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """Read the fields in a configuration's file, unchecked. `from_pretrained` makes a configuration of them.

        Args:
            path_json_file: path of the file.

        Raises:
            ValueError: the file does not hold a JSON object.
        """
        fields = read_json(Path(path_json_file))
        if not isinstance(fields, dict):
            raise ValueError(f"{path_json_file} must hold a JSON object, but holds {short(fields)}.")
        return {name: value for name, value in fields.items() if name != "runtime_config"}

    @classmethod
    def _from_file(cls, values: dict[str, Any], extra: dict[str, Any]) -> None:
        """Correct, in place, fields that PEFT writes and a user should not give: here, the start of training."""
        start = values.get("init_lora_weights")
        if not isinstance(start, str) or start == "gaussian":
            return
        if start not in _STARTS_OF_NO_CONSEQUENCE:
            raise ValueError(
                f"`init_lora_weights` is {start!r}: such an adapter belongs to base weights that its start "
                "has changed, and they are not in the file. Convert it to a plain LoRA adapter with PEFT."
            )
        if start != "orthogonal":  # PEFT reads "orthogonal" only where all ranks are even
            extra["init_lora_weights"] = start
        values["init_lora_weights"] = True

    @classmethod
    def from_pretrained(cls: type[_Config], folder: str | os.PathLike[str], **hub_options: Any) -> _Config:
        """Read ``adapter_config.json`` in a folder, or in a repository on the Hugging Face hub.

        Args:
            folder: the adapter's folder, or "owner/name" on the hub.
            hub_options: ``subfolder``, the folder inside the repository; and ``revision``, ``token``, ``cache_dir`` and
                others for the hub.

        Raises:
            FileNotFoundError: the folder or the file does not exist.
            TypeError: an option is unknown, or a value in the file has the wrong type.
            ValueError: the file is broken; see ``from_dict``.
        """
        check_hub_options(f"{cls.__name__}.from_pretrained", hub_options)
        path = find_adapter_folder(folder, only_config=True, **hub_options) / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{os.fspath(folder)!r} is not the folder of an adapter: no {CONFIG_NAME}."
            )
        return cls.from_dict(read_json(path), source=str(path))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``adapter_config.json`` into a folder and return the file's path.

        The file is written aside and then renamed, so at any moment it is either the old one or the new one.

        Args:
            folder: the folder, which is made if it does not exist.
        """
        path = Path(folder) / CONFIG_NAME
        # Patterns keep their order, because the first that matches counts.
        fields = dict(sorted(self.to_dict().items()))
        write_file(path, json.dumps(fields, indent=2, allow_nan=False) + "\n")
        return path


# -- files and messages


def _kind_of_adapter(peft_type: Any, source: str) -> type[Any]:
    name = getattr(peft_type, "value", peft_type)
    own: tuple[type[Any], ...] = (LoraConfig, *LoraConfig.__subclasses__())
    kinds = {kind.peft_type: kind for kind in own}
    if not isinstance(name, str):
        raise TypeError(f"{source}: `peft_type` must be one of {', '.join(kinds)}, but is {short(name)}.")
    if name not in kinds:
        raise ValueError(f"{source}: `peft_type` is {name!r}; rankwise reads {' and '.join(kinds)}.")
    return kinds[name]


def _split_fields(kind: type[Any], data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    names = field_names(kind) - {"extra"}
    values = {name: value for name, value in data.items() if name in names}
    for name in _FLAGS:
        if values.get(name, False) is None:  # PEFT takes None for False, and frameworks write it
            del values[name]
    extra = {name: value for name, value in data.items() if name not in names and name != "peft_type"}
    return values, extra


def _plain(value: Any) -> Any:
    """Return a copy that JSON can hold."""
    if type(value) in (bool, int, float, str):  # a fast path for most values: checks of protocols are slow
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, AbstractSet):
        return sorted((_plain(each) for each in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, DefaultFraction):
        return float(value)
    return int(value) if isinstance(value, Default) else value
