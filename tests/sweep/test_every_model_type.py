"""Every model type of Transformers is adapted, saved, loaded into a fresh base, compared and merged.

Types that can't complete this are listed in `known.py`, with the reason. The test fails if a type fails that is not
listed, or if a listed type works.
"""

from __future__ import annotations

import importlib.util
import time

import pytest
import torch

from sweep import known
from sweep.cycle import NothingToAdapt, Rankwise, cycle
from sweep.shrunk import TooLarge, model_classes, model_types, shrunk_model

# Fast types of many kinds: without embeddings; for pictures, sound and molecules; with weights that modules share; with
# unusual linear layers; with experts and state spaces.
SAMPLE = (
    "beit", "clip", "d_fine", "deepseek_v4", "esm", "granite_speech5_ctc", "hubert", "llama4_text", "luke",
    "mamba", "mixtral", "phimoe", "resnet", "segformer", "siglip2", "siglip2_vision_model", "speecht5", "t5",
    "wav2vec2", "zamba",
)  # fmt: skip


def outcome(model_type: str) -> str:
    """ "works", or the reason why it does not."""
    if not model_classes(model_type):
        return known.NO_CLASS
    try:
        shrunk_model(model_type)
    except TooLarge:
        return known.TOO_LARGE
    except ImportError as error:
        return known.NEEDS if not all(map(importlib.util.find_spec, known.PACKAGES)) else f"fails: {error}"
    except Exception:  # any constructor may raise it; adapters are not involved
        return known.NOT_MADE
    try:
        cycle(model_type, Rankwise())
    except NothingToAdapt:
        return known.NOTHING
    except Exception as error:  # any error must be listed
        return f"fails: {type(error).__name__}: {error}"[:300]
    return "works"


def listed(model_type: str) -> str:
    return next((why for why, types in known.REASONS.items() if model_type in types), "works")


@pytest.mark.parametrize("model_type", [each for each in SAMPLE if listed(each) == "works"])
def test_some_model_types_go_all_the_way(model_type: str) -> None:
    assert cycle(model_type, Rankwise()) in ("outputs", "weights")


def test_nothing_is_listed_twice_and_nothing_that_does_not_exist() -> None:
    every = [each for types in known.REASONS.values() for each in types]
    assert sorted(every) == sorted(set(every))


@pytest.mark.slow
def test_every_model_type_goes_all_the_way_or_is_listed_with_its_reason() -> None:
    torch.manual_seed(0)
    began = time.process_time()
    found = {model_type: outcome(model_type) for model_type in model_types()}
    wrong = {each: what for each, what in found.items() if what != listed(each)}
    works = sum(what == "works" for what in found.values())
    print(
        f"{works} of {len(found)} model types work, in {time.process_time() - began:.0f} seconds of one core."
    )
    assert not wrong, "\n".join(
        f"{each}: listed as {listed(each)!r}, but {what}" for each, what in wrong.items()
    )
    assert works > known.OF_PEFT
