"""A plan of ranks, made before training: as a configuration, as YAML or as a table."""

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
    """A planned rank for each layer.

    Args:
        ranks: rank of each layer, by path, at least 0.
        widths: number of parameters of one rank in each layer, by path, at least 1.
        kept: share of the gradient's squared norm that the ranks hold, in [0, 1].

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
        """Number of parameters of all factors."""
        return sum(rank * self.widths[path] for path, rank in self.ranks.items())

    @property
    def rank_pattern(self) -> dict[str, int]:
        """``rank_pattern`` of `LoraConfig`: the rank of every layer whose rank is at least 1."""
        return {path: rank for path, rank in self.ranks.items() if rank}

    @property
    def target_modules(self) -> list[str]:
        """Paths of the layers whose rank is at least 1."""
        return list(self.rank_pattern)

    @property
    def mean_rank(self) -> int:
        """Rank of a LoRA on all layers with equally many parameters, rounded, at least 1."""
        return max(1, round(self.parameters / sum(self.widths.values())))

    def lora_config(self, **fields: Any) -> LoraConfig:
        """Return a configuration with these ranks.

        All layers have the scale ``lora_alpha / r``, whatever their own rank is. If each layer's alpha were divided by
        its own rank, layers of higher rank would learn more slowly.

        Args:
            fields: further fields of `LoraConfig`. ``r`` defaults to `mean_rank`.

        Raises:
            TypeError: a field is unknown, or a value has the wrong type.
            ValueError: a value is out of range, or a field is one that the plan sets.
        """
        return LoraConfig(**self.lora_fields(fields))

    def lora_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of the configuration that `lora_config` makes.

        Args:
            fields: further fields of `LoraConfig`, by name.

        Raises:
            ValueError: a field is one that the plan sets.
        """
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
        """Return fields of `AdaLoraConfig` for a run on the layers whose planned rank is at least 1.

        The run finds the ranks of these layers itself. It ends with as many parameters as the plan has, unless
        ``fields`` sets ``target_r``.

        Args:
            fields: further fields of `AdaLoraConfig`, by name.

        Raises:
            ValueError: ``fields`` sets ``target_modules``, which the plan sets.
        """
        if "target_modules" in fields:
            raise ValueError("The plan gives `target_modules`: leave it out.")
        width = sum(self.widths[path] for path in self.target_modules)
        return {"target_r": self.parameters / max(width, 1), **fields, "target_modules": self.target_modules}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as YAML, as a whole or not at all.

        Args:
            path: path of the file.

        Raises:
            ImportError: PyYAML is missing.
            OSError: the file cannot be written.
        """
        write_file(Path(path), _HEAD + _yaml().safe_dump(self.to_dict(), sort_keys=False, width=200))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return {
            "parameters": self.parameters,
            "kept": round(self.kept, 4),
            "layers": {path: {"rank": rank, "width": self.widths[path]} for path, rank in self.ranks.items()},
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RankPlan:
        """Read a plan that `save` wrote. Its ranks may have been edited by hand.

        Args:
            path: path of the file.

        Raises:
            ImportError: PyYAML is missing.
            FileNotFoundError: the file does not exist.
            ValueError: the file does not hold a plan.

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
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        layers = data.get("layers") if isinstance(data, dict) else None
        if not isinstance(layers, dict) or not layers:
            raise ValueError(
                f"{path} is not a rank plan: it has no `layers`. Make one with `rankwise probe`."
            )
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
