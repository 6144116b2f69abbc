"""Ranks for the layers of a model, planned before training: as a configuration, as YAML, as a table."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.config import LoraConfig
from rankwise.files.atomic import write_file

_HEAD = (
    "# Ranks that rankwise planned from the gradient; in a recipe: adapter: {method: lora, plan: THIS FILE}\n"
)


@dataclass(frozen=True)
class RankPlan:
    """A rank for each layer.

    Args:
        ranks: by the layer's path, 0 included.
        widths: parameters that one rank takes in each layer.
        kept: the share of the gradient's squared norm that the ranks hold, from 0 to 1.

    Example:
        >>> plan = RankPlan({"q": 3, "k": 0, "v": 1}, {"q": 8, "k": 8, "v": 8}, kept=0.9)
        >>> plan.parameters, plan.rank_pattern, plan.target_modules
        (32, {'q': 3, 'v': 1}, ['q', 'v'])
        >>> config = plan.lora_config(r=2, lora_alpha=4)
        >>> config.alpha_pattern  # every layer is scaled by lora_alpha / r
        {'q': 6.0, 'v': 2.0}
    """

    ranks: Mapping[str, int]
    widths: Mapping[str, int]
    kept: float

    @property
    def parameters(self) -> int:
        """Numbers in all factors."""
        return sum(rank * self.widths[path] for path, rank in self.ranks.items())

    @property
    def rank_pattern(self) -> dict[str, int]:
        """What `LoraConfig` calls so: the rank of every layer that gets one."""
        return {path: rank for path, rank in self.ranks.items() if rank}

    @property
    def target_modules(self) -> list[str]:
        """The layers that get a rank."""
        return list(self.rank_pattern)

    @property
    def mean_rank(self) -> int:
        """The rank of LoRA with as many parameters in these layers, rounded; at least 1."""
        return max(1, round(self.parameters / sum(self.widths.values())))

    def lora_config(self, **fields: Any) -> LoraConfig:
        """A configuration with these ranks.

        Every layer gets the scale of a layer with rank ``r``, so that a layer does not learn the slower the more ranks
        it has.

        Args:
            fields: of `LoraConfig`; ``r`` defaults to `mean_rank`.

        Raises:
            TypeError, ValueError: a field is wrong, or one that the plan gives.
        """
        return LoraConfig(**self.lora_fields(fields))

    def lora_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of `lora_config`."""
        taken = sorted({"rank_pattern", "alpha_pattern", "target_modules"} & set(fields))
        if taken:
            raise ValueError(f"The plan gives `{taken[0]}`: leave it out.")
        plain = LoraConfig(**{"r": self.mean_rank, **fields})
        root = math.sqrt if plain.use_rslora else float
        scale = plain.lora_alpha / root(plain.r)
        return {
            "r": plain.r,
            **fields,
            "target_modules": self.target_modules,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": {path: scale * root(rank) for path, rank in self.rank_pattern.items()},
        }

    def adalora_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of `AdaLoraConfig` for a run that starts where the plan leaves off.

        It adapts the layers that get a rank, and ends with as many parameters as the plan has, unless ``fields`` give
        ``target_r``; between them the run finds the ranks anew.
        """
        if "target_modules" in fields:
            raise ValueError("The plan gives `target_modules`: leave it out.")
        width = sum(self.widths[path] for path in self.target_modules)
        return {"target_r": self.parameters / max(width, 1), **fields, "target_modules": self.target_modules}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as YAML, whole or not at all.

        Raises:
            ImportError: PyYAML is missing.
            OSError: it can't be written.
        """
        write_file(Path(path), _HEAD + _yaml().safe_dump(self.to_dict(), sort_keys=False, width=200))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "parameters": self.parameters,
            "kept": round(self.kept, 4),
            "layers": {path: {"rank": rank, "width": self.widths[path]} for path, rank in self.ranks.items()},
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RankPlan:
        """Read what `save` wrote; ranks may have been changed by hand.

        Raises:
            ImportError: PyYAML is missing.
            FileNotFoundError: there is no such file.
            ValueError: it is no plan.

        Example:
            >>> import tempfile
            >>> file = Path(tempfile.mkdtemp()) / "plan.yaml"
            >>> RankPlan({"q": 3, "v": 0}, {"q": 8, "v": 8}, kept=0.9).save(file)
            >>> RankPlan.load(file).ranks
            {'q': 3, 'v': 0}
        """
        yaml = _yaml()
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
        layers = data.get("layers") if isinstance(data, dict) else None
        if not isinstance(layers, dict) or not layers:
            raise ValueError(f"{path} is no plan: it has no `layers`. Make one with `rankwise probe`.")
        for name, layer in layers.items():
            for key, least in (("rank", 0), ("width", 1)):
                value = layer.get(key) if isinstance(layer, dict) else None
                if not isinstance(value, int) or isinstance(value, bool) or value < least:
                    raise ValueError(
                        f"{path}: `layers.{name}.{key}` must be a whole number of at least {least}, but is {value!r}."
                    )
        if not any(layer["rank"] for layer in layers.values()):
            raise ValueError(f"{path} gives no layer a rank: nothing would train.")
        ranks = {name: layer["rank"] for name, layer in layers.items()}
        kept = data.get("kept")
        kept = float(kept) if isinstance(kept, (int, float)) else math.nan
        return cls(ranks, {name: layer["width"] for name, layer in layers.items()}, kept)


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("Plans are YAML: pip install pyyaml.", name="yaml") from error
    return yaml
