"""Batch normalization has running averages, which training changes: they are reported, or they are saved."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw


def base(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).to(dtype)


def config(**changes: Any) -> rw.LoraConfig:
    return rw.LoraConfig(**{"r": 2, "target_modules": ["0"], **changes})


def test_running_averages_that_no_adapter_saves_are_reported() -> None:
    with pytest.warns(UserWarning, match="'1' would change their running averages.*`modules_to_save`"):
        rw.get_peft_model(base(), config())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rw.get_peft_model(base(), config(modules_to_save=["1"]))
        rw.get_peft_model(base(), config(inference_mode=True))
        without = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False))
        rw.get_peft_model(without, config())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batch_normalization_trains_in_full_on_every_base(dtype: torch.dtype, tmp_path: Path) -> None:
    model = rw.get_peft_model(base(dtype), config(modules_to_save=["1"]))
    x = torch.randn(8, 6).to(dtype)
    for _ in range(3):
        model(x).float().square().sum().backward()
    expected = model.eval()(x)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(rw.PeftModel.from_pretrained(base(dtype), tmp_path)(x), expected)
    merged = model.merge_and_unload()
    assert {value.dtype for value in merged[1].state_dict().values()} == {dtype, torch.int64}
    torch.testing.assert_close(merged(x), expected, atol=2e-2 if dtype != torch.float32 else 1e-6, rtol=2e-2)
