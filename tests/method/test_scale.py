"""The number that multiplies an update: LoRA's scale, and the pace while more ranks act than at the end."""

from __future__ import annotations

import math

import pytest

from rankwise.method.scale import adalora_scale, lora_scale, pace


def test_the_scale_is_that_of_peft() -> None:
    assert lora_scale(16, 8) == 2 and lora_scale(16, 4, use_rslora=True) == 8
    assert adalora_scale(8, 12) == 8 / (12 + 1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("average", [8.0, 5.5, 2.0, 1.0, 0.25])
def test_the_end_scale_times_the_pace_is_loras_scale_at_the_current_average_rank(
    average: float, use_rslora: bool
) -> None:
    end = lora_scale(16, 2, use_rslora)
    assert end * pace(2, average, use_rslora) == pytest.approx(lora_scale(16, average, use_rslora))


def test_with_no_rank_left_the_pace_is_finite() -> None:
    assert pace(2, 0) == pace(2, 0.0, use_rslora=True) == 1 and math.isfinite(pace(2, 1e-300))
