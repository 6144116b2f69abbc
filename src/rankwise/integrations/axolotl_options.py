"""The schema of axolotl's options under ``rankwise:``. It needs pydantic, which axolotl installs."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, model_validator

from rankwise.integrations.axolotl import check_configuration


class RankwiseArgs(BaseModel):
    """The schema of the key ``rankwise``. axolotl checks its whole configuration with it."""

    rankwise: dict[str, Any] | None = Field(
        default=None, description="Options of adaptive ranks: target_r, tinit, tfinal, deltaT."
    )

    @model_validator(mode="before")
    @classmethod
    def check_rankwise(cls, data: Any) -> Any:
        """Refuse wrong options, and adapters that cannot be adapted."""
        if isinstance(data, dict):
            check_configuration(data)
        return data
