"""What axolotl's schema takes under ``rankwise:``. axolotl, which needs pydantic itself, imports this."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, model_validator

from rankwise.integrations.axolotl import check_configuration


class RankwiseArgs(BaseModel):
    """Axolotl's configuration gets the key ``rankwise``, and is checked with it as a whole."""

    rankwise: dict[str, Any] | None = Field(
        default=None, description="Options of adaptive ranks: target_r, tinit, tfinal, deltaT."
    )

    @model_validator(mode="before")
    @classmethod
    def check_rankwise(cls, data: Any) -> Any:
        """Refuse wrong options, and adapters that can't be adapted."""
        if isinstance(data, dict):
            check_configuration(data)
        return data
