"""What ``torch.compile`` makes of adapted models: as few kernels as of PEFT's."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import kernels
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap
from trainings import Setting, Training, peft_lora, rankwise_adalora, rankwise_lora, small, training_of

import rankwise as rw
from tiny import llama, token_batches

MODEL = small(1, 64)  # a Llama of one layer
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counts(attach: Callable[..., Training], precision: str, prunes: bool = False) -> tuple[int, int]:
    """The kernels of a compiled step, and the matrix products among them."""
    torch._dynamo.reset()
    return kernels(training_of(attach, MODEL, Setting(precision=precision, compiled=True)), prunes)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("precision", "casts"), [("float32", 0), ("float32, autocast", 0), ("bfloat16", 4)])
def test_a_compiled_model_has_at_most_as_many_kernels_as_pefts(precision: str, casts: int) -> None:
    """With a bfloat16 base, kernels of their own cast factors and gradients. PEFT computes in float32 there."""
    theirs, their_products = counts(peft_lora, precision)
    for attach, prunes in ((rankwise_lora, False), (rankwise_adalora, True)):
        ours, products = counts(attach, precision, prunes)
        assert 0 < products <= their_products
        assert ours <= theirs + casts * len(MODEL.targets)


def step(precision: str, compiled: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits of a step, and the factors' gradients."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = llama(num_hidden_layers=1).to(dtype)
    rw.get_peft_model(model, rw.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.05)
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    ids = token_batches(1)[0]["input_ids"]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled="autocast" in precision):
        output = forward(input_ids=ids, labels=ids)
    output.loss.backward()
    return output.logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", ["float32", "float32, autocast", "bfloat16"])
def test_a_compiled_step_has_the_logits_and_gradients_of_an_uncompiled_one(precision: str) -> None:
    (logits, gradients), (expected, by_hand) = step(precision, True), step(precision, False)
    bound = 1e-5 if precision == "float32" else 3e-2
    assert (logits - expected).norm() <= bound * expected.norm()
    assert gradients.keys() == by_hand.keys() and len(gradients) == 14
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - by_hand[name]).norm() <= bound * by_hand[name].norm(), name


@pytest.mark.parametrize(
    ("layers", "targets", "options"),
    [
        (lambda: [torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)], ["0", "2"], {}),
        (lambda: [torch.nn.Linear(16, 16), torch.nn.Linear(16, 4)], ["0", "1"], {"lora_dropout": 0.1}),
        (lambda: [torch.nn.Embedding(9, 16), torch.nn.Linear(16, 4)], ["0", "1"], {}),
        (lambda: [torch.nn.Conv1d(4, 8, 3), torch.nn.Conv1d(8, 4, 3)], ["0", "1"], {}),
    ],
    ids=["linear", "dropout", "embedding", "convolution"],
)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_twenty_cuts_compile_a_model_once_more_at_most(
    layers: Any, targets: list[str], options: dict[str, Any], autocast: bool
) -> None:
    """Each cut changes the scale. A graph that holds the scale as a constant would be compiled for each cut."""
    base = torch.nn.Sequential(*layers())
    x = {"Embedding": torch.randint(0, 9, (8, 5)), "Conv1d": torch.randn(2, 4, 9)}
    config = rw.AdaLoraConfig(target_r=2, init_r=4, target_modules=targets, total_step=40, **options)
    model = rw.get_peft_model(base, config)
    graphs = []

    def counted(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return aot_autograd(fw_compiler=lambda graph, _: graph)(graph, inputs)

    compiled = torch.compile(model, backend=counted)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(40):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = compiled(x.get(type(base[0]).__name__, torch.randn(8, 16)))
        output.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(model.rank_history) > 15 and len(graphs) <= 2


@pytest.mark.parametrize("precision", ["float32", "float32, autocast", "bfloat16"])
def test_a_compiled_step_after_a_cut_has_the_gradients_of_an_uncompiled_one(precision: str) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    base = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).to(dtype)
    config = rw.AdaLoraConfig(target_r=2, init_r=4, target_modules=["0", "2"], total_step=10, tinit=1)
    model = rw.get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, first = torch.randn(8, 16, dtype=dtype), model[0].scaling["default"]

    def gradients(forward: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled="autocast" in precision):
            output = forward(x)
        output.float().square().mean().backward()
        return [each.grad.clone() for each in model.parameters() if each.grad is not None]

    for _ in range(6):
        gradients(model)
        optimizer.step()
    assert model[0].scaling["default"] != first
    bound = 1e-5 if precision == "float32" else 3e-2
    compiled = gradients(torch.compile(model, backend="aot_eager"))
    for one, other in zip(compiled, gradients(model), strict=True):
        assert (one - other).norm() <= bound * other.norm()


def test_no_compiled_step_multiplies_a_wide_gradient_by_the_scaling() -> None:
    """Only tensors of the adapter's rank are, as a factor of a matrix product."""
    made: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        made.append(graph)
        return graph

    layer = torch.nn.Sequential(torch.nn.Linear(32, 32))
    rw.get_peft_model(layer, rw.LoraConfig(r=4, lora_alpha=12, target_modules=["0"]))
    x = torch.randn(8, 32, requires_grad=True)
    torch.compile(layer, backend=aot_autograd(fw_compiler=lambda g, _: g, bw_compiler=keep))(
        x
    ).sum().backward()
    (backward,) = made
    called = [node.target for node in backward.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten.mul.Tensor not in called
    assert called.count(torch.ops.aten.addmm.default) == 2


def test_a_compiled_transform_of_torch_func_has_the_uncompiled_ones_result() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8))
    rw.get_peft_model(layer, rw.LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    factors = {name: p.detach() + 0.1 for name, p in layer.named_parameters() if "lora" in name}
    x = torch.randn(5, 8)

    def loss(factors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, factors, (x,)).square().sum()

    def second(factors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return sum(each.square().sum() for each in grad(loss)(factors, x).values())

    for transform in (vmap(grad(loss), (None, 0)), grad(second)):
        made = torch.compile(transform, backend="aot_eager")(factors, x)
        torch.testing.assert_close(made, transform(factors, x), rtol=1e-4, atol=1e-4)


def test_a_compiled_derivative_in_forward_mode_is_the_uncompiled_one() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8))
    rw.get_peft_model(layer, rw.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False))
    x, direction = torch.randn(5, 8), torch.randn(5, 8)

    def along(x: torch.Tensor) -> torch.Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction))).tangent

    torch.testing.assert_close(torch.compile(along, backend="eager")(x), along(x))


def test_a_model_that_is_compiled_before_the_adapter_is_attached_has_a_run_too(tmp_path: Path) -> None:
    config = rw.AdaLoraConfig(
        init_r=4, target_r=2, total_step=6, tinit=1, tfinal=2, target_modules=["q_proj"]
    )
    found = []
    for compiled in (False, True):
        base = torch.compile(llama(), backend="eager") if compiled else llama()
        torch.manual_seed(0)
        model = rw.get_peft_model(base, config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for batch in token_batches(6):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(tmp_path / str(compiled))
        loaded = rw.PeftModel.from_pretrained(llama(), tmp_path / str(compiled))
        found.append((loaded(**batch).logits, model.rank_summary().total_rank))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
