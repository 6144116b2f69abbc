"""What ``torch.compile`` makes of adapted models: as few kernels as of PEFT's."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from compiled import kernels
from trainings import Setting, Training, peft_lora, rankwise_adalora, rankwise_lora, small, training_of

pytestmark = pytest.mark.slow
MODEL = small(1, 64)  # a Llama of one layer
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counts(attach: Callable[..., Training], precision: str) -> tuple[int, int]:
    """The kernels of a compiled step, and the matrix products among them."""
    torch._dynamo.reset()
    return kernels(training_of(attach, MODEL, Setting(precision=precision, compiled=True)))


@needs_compiler
@pytest.mark.parametrize(("precision", "casts"), [("float32", 0), ("float32, autocast", 0), ("bfloat16", 4)])
def test_a_compiled_model_has_at_most_as_many_kernels_as_pefts(precision: str, casts: int) -> None:
    """With a bfloat16 base, each layer casts two factors and their gradients. PEFT computes in float32 there."""
    theirs, their_products = counts(peft_lora, precision)
    for attach in (rankwise_lora, rankwise_adalora):
        ours, products = counts(attach, precision)
        assert 0 < products <= their_products
        assert ours <= theirs + casts * len(MODEL.targets)
