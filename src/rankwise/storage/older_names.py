"""Reads adapters whose files name layers as an older version of Transformers did.

Transformers renames modules from version to version. Since 5.0 it keeps the experts of a mixture in one parameter. It
loads older checkpoints by a table of conversions, which is applied to an adapter's names here. For example,
``language_model.model.layers.0`` of LLaVA becomes ``model.language_model.layers.0``. The adapters of Mixtral's experts
``w1`` and ``w3`` are joined into one of ``gate_up_proj``, with exactly the same update.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rankwise.adapters import adapters_for
from rankwise.attach.attachment import base_scaling, names_for, plain_name
from rankwise.attach.matching import matcher, pattern_value
from rankwise.attach.targets import modules_to_save_paths, own_modules
from rankwise.config import AdaLoraConfig, LoraConfig
from rankwise.storage.adapter_file import AdapterFile
from rankwise.storage.nesting import nested_paths


def take_present_names(model: nn.Module, file: AdapterFile) -> None:
    """Rename the contents of a file as ``model`` names them. Names that fit already or are unknown do not change.

    Raises:
        ValueError: the names are known, but the adapter can't be converted to a form that the model accepts.
    """
    if file.config.target_parameters:  # older versions did not have them
        return
    modules = {plain_name(path): module for path, module in own_modules(model).items()}
    own = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    if all(path in modules for path in file.factors) and all(_known(n, modules, own) for n in file.others):
        return
    names = _Names.of(model, own)
    if names is not None:
        _Taken(model, modules, own, names, file).take()


def _known(name: str, modules: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    name = name.replace(".base_layer.", ".")
    return name in own or name.rpartition(".")[0] in modules


class _Names:
    """Transformers' current names for the older names of a model's parameters."""

    def __init__(self, model: Any, own: Mapping[str, Any]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key

        transforms = get_model_conversion_mapping(model)
        self._rename = rename_source_key
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._renamings = [each for each in transforms if not isinstance(each, WeightConverter)]
        self._prefix, self._own = getattr(model, "base_model_prefix", ""), dict(own)
        self.converters = {source: each for each in self._converters for source in each.source_patterns}

    @classmethod
    def of(cls, model: nn.Module, own: Mapping[str, Any]) -> _Names | None:
        """The names for ``model``; None for other models than Transformers', or if its version has no such table."""
        if not hasattr(model, "base_model_prefix"):
            return None
        try:
            return cls(model, own)
        except (AttributeError, ImportError):
            return None

    def new(self, name: str) -> tuple[str, str | None]:
        """The current name; and the pattern of the older name, if it is one of several joined in one parameter."""
        found: tuple[str, str | None] = self._rename(
            name, self._renamings, self._converters, self._prefix, self._own
        )
        return found

    def number(self, name: str, pattern: str) -> int | None:
        """The index of the stacked matrix that an older name means."""
        renamed, _ = self._rename(name, self._renamings, [])
        match = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), renamed)
        return int(match[1]) if match and match.groups() else None


class _Taken:
    """A file whose names are changed to the current ones."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        own: Mapping[str, Tensor],
        names: _Names,
        file: AdapterFile,
    ) -> None:
        self.model, self.modules, self.own, self.names, self.file = model, modules, own, names, file
        self.old = file.config
        # by older path: the path of a layer or of a parameter with one matrix
        self.moved: dict[str, str] = {}
        # by parameter, pattern and index: the older path
        self.stacks: dict[str, dict[str, dict[int, str]]] = {}

    def take(self) -> None:
        for path in self.file.factors:
            self._sort(path)
        if self.stacks and isinstance(self.old, AdaLoraConfig):
            raise ValueError(
                f"{self.file.source} adapts experts one by one, which this Transformers keeps as one parameter. The "
                "ranks of an AdaLoRA adapter can't be put together: export it as plain LoRA (`rankwise export`) with "
                "the Transformers that it was trained with, and load that."
            )
        ranks = {new: self._rank(old) for old, new in self.moved.items()}
        alphas = {new: self._alpha(old) for old, new in self.moved.items()}
        factors = {new: self.file.factors[old] for old, new in self.moved.items()}
        kinds = {new: self.file.kinds[old] for old, new in self.moved.items()}
        for name, sources in self.stacks.items():
            factors[name], ranks[name], alphas[name] = self._stacked(name, sources)
            kinds[name] = self.file.kinds[next(path for each in sources.values() for path in each.values())]
        slots = [name for name in self.own if name in factors and name not in self.modules]
        if not slots and self.modules.keys().isdisjoint(factors):
            return  # an adapter of another model, which the reader will report
        self.file.factors = {path: factors[path] for path in [*self.modules, *slots] if path in factors}
        self.file.factors |= factors  # layers that the model lacks, which the reader will report
        self.file.kinds = {path: kinds[path] for path in self.file.factors}
        self.file.nested = {} if isinstance(self.old, AdaLoraConfig) else nested_paths(slots)
        self.file.others = {self._other(name): tensor for name, tensor in self.file.others.items()}
        self._take_run()
        self.file.config = self._config(ranks, alphas, slots)

    def _sort(self, path: str) -> None:
        from rankwise.storage.export.converted import stacks_and_joins  # it imports this package

        name = f"{path}.weight"
        new, pattern = (name, None) if path in self.modules else self.names.new(name)
        if pattern is not None and new in self.own:
            number = self.names.number(name, pattern)
            if number is None or not stacks_and_joins(self.names.converters[pattern].operations):
                raise ValueError(
                    f"{self.file.source} adapts {path!r}, which this Transformers holds in {new!r}, in a form to "
                    "which an adapter can't be converted. Load it with the Transformers that it was trained with."
                )
            self.stacks.setdefault(new, {}).setdefault(pattern, {})[number] = path
            return
        module = self.modules.get(new.removesuffix(".weight"))
        is_layer = module is not None and adapters_for(module) is not None
        known = is_layer or new in self.own
        self.moved[path] = path if not known else new.removesuffix(".weight") if is_layer else new

    def _stacked(
        self, name: str, sources: Mapping[str, Mapping[int, str]]
    ) -> tuple[dict[str, Tensor], int, float]:
        """The factors of a stack in a file's layout, its rank, and its `lora_alpha`.

        Each matrix of the stack joins the rows of several older matrices. Their updates are stacked vertically, so
        their ranks add up. A matrix without an adapter in the file gets zeros.
        """
        number, rows, columns = self.own[name].shape
        patterns = self.names.converters[next(iter(sources))].source_patterns
        found = {path: self.file.factors[path] for each in sources.values() for path in each.values()}
        ranks = {
            p: max((len(found[path]["A"]) for path in sources.get(p, {}).values()), default=0)
            for p in patterns
        }
        heights = {p: len(found[next(iter(sources[p].values()))]["B"]) for p in patterns if p in sources}
        absent = [p for p in patterns if p not in heights]
        heights |= dict.fromkeys(absent, (rows - sum(heights.values())) // max(len(absent), 1))
        scales = {path: base_scaling(self.old, path, self._rank(path)) for path in found}
        scale, rank = next(iter(scales.values())), sum(ranks.values())
        like = next(iter(found.values()))["A"]
        A, B = like.new_zeros(number, rank, columns), like.new_zeros(number, rows, rank)
        top = left = 0
        for pattern in patterns:
            for place, path in sources.get(pattern, {}).items():
                own_A, own_B = found[path]["A"], found[path]["B"]
                last = left + len(own_A)
                fits = place < number and own_A.shape[1] == columns and len(own_B) == heights[pattern]
                if not fits or top + heights[pattern] > rows:
                    raise ValueError(
                        f"{self.file.source}: {path!r} is adapted by {tuple(own_A.shape)} and {tuple(own_B.shape)}, "
                        f"which does not fit {name!r} of {tuple(self.own[name].shape)}: the adapter belongs to another "
                        "model."
                    )
                A[place, left:last] = own_A
                B[place, top : top + heights[pattern], left:last] = own_B * (scales[path] / scale)
            top, left = top + heights[pattern], left + ranks[pattern]
        factors = {"A": A.flatten(0, 1), "B": B.permute(1, 2, 0).flatten(1)}
        return factors, rank, scale * (rank**0.5 if self.old.use_rslora else rank)

    def _rank(self, path: str) -> int:
        if isinstance(self.old, AdaLoraConfig):
            return self.old.init_r
        return pattern_value(self.old.rank_pattern or {}, path, self.old.r)

    def _alpha(self, path: str) -> float:
        return pattern_value(self.old.alpha_pattern or {}, path, self.old.lora_alpha)

    def _other(self, name: str) -> str:
        plain = name.replace(".base_layer.", ".")
        new = plain if plain in self.own else self.names.new(plain)[0]
        return new if new in self.own and new != plain else name

    def _take_run(self) -> None:
        """Rename the tensors of the run's state. A run whose experts were joined can't continue."""
        if self.file.training is None:
            return
        if self.stacks:
            self.file.training = None
            return
        moved = {
            f"{old}.lora_{factor}": f"{new}.lora_{factor}"
            for old, new in self.moved.items()
            for factor in "ABE"
        }
        self.file.training = {
            moved.get(name) or self._other(name): tensor for name, tensor in self.file.training.items()
        }

    def _config(self, ranks: Mapping[str, int], alphas: Mapping[str, float], slots: list[str]) -> LoraConfig:
        heads = self._heads()
        layers = [path for path in self.modules if path in ranks]
        changes: dict[str, Any] = {
            "target_modules": names_for(self.model, layers, heads) if layers else [],
            "target_parameters": _short(slots, self.own) or None,
            "modules_to_save": heads or self.old.modules_to_save,
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
        }
        if isinstance(self.old, AdaLoraConfig):
            pattern = self.old.rank_pattern or {}
            renamed = {f"{old}.lora_E": f"{new}.lora_E" for old, new in self.moved.items()}
            changes["rank_pattern"] = {_end(renamed, key): kept for key, kept in pattern.items()} or None
            self.file.history = None
        else:
            changes["rank_pattern"] = {path: rank for path, rank in ranks.items() if rank != self.old.r}
            changes["alpha_pattern"] = {
                path: alpha for path, alpha in alphas.items() if alpha != self.old.lora_alpha
            }
        return replace(self.old, **changes)

    def _heads(self) -> list[str]:
        """The paths of the modules that train in full and that the model has."""
        names = [self._module(name) for name in self.old.modules_to_save or ()]
        there = [name for name in names if any(map(matcher([name]), self.modules))]
        if not there:
            return []
        paths = modules_to_save_paths(self.model, replace(self.old, modules_to_save=there, task_type=None))
        return [plain_name(path) for path in paths]

    def _module(self, name: str) -> str:
        if any(map(matcher([name]), self.modules)):
            return name
        new = self.names.new(f"{name}.weight")[0].removesuffix(".weight")
        return new if new in self.modules else name


def _end(renamed: Mapping[str, str], key: str) -> str:
    """The current form of a key of AdaLoRA's `rank_pattern`, which may begin with PEFT's prefix."""
    return next((new for old, new in renamed.items() if key == old or key.endswith(f".{old}")), key)


def _short(slots: list[str], own: Iterable[str]) -> list[str]:
    """Names for `target_parameters`: the last two parts of each path, if they match no other parameters."""
    short = list(dict.fromkeys(".".join(path.split(".")[-2:]) for path in slots))
    return short if [name for name in own if matcher(short)(name)] == slots else slots
