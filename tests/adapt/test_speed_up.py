"""`speed_up` on PEFT's layers: the same numbers in one step, and PEFT's own forward wherever it is needed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from costs import Operations
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rankwise as rw
from lora_world import COPIES, STEPS, base, examples, train, with_lora
from rankwise.adapt import fast_layer
from tiny import llama, token_batches

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = token_batches(1, size=4, length=32)[0]["input_ids"]


@pytest.fixture
def fast_passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The adapters of passes through layers that were computed fast, one after the other."""
    passes: list[str] = []
    computed = fast_layer.FastLoraLayer._computed

    def noted(self: Any, x: Tensor, parts: Any) -> Tensor | None:
        made = computed(self, x, parts)
        if made is not None:
            passes.append(parts.name)
        return made

    monkeypatch.setattr(fast_layer.FastLoraLayer, "_computed", noted)
    return passes


def random_lora(model: nn.Module | None = None, seed: int = 0, **settings: Any) -> Any:
    """The perceptron with an adapter of PEFT that does something."""
    model = with_lora("linear", model, **settings)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def gradients(model: Any, x: Tensor, compute: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    output = (model if compute is None else compute)(x)
    output.float().square().sum().backward()
    made = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    model.zero_grad()
    return [output.detach(), *made]  # type: ignore[list-item]


# The same numbers.


def test_outputs_gradients_and_second_derivatives_are_pefts(fast_passes: list[str]) -> None:
    model, (x, _) = random_lora(), examples("linear")
    fast = copy.deepcopy(model)
    assert repr(rw.speed_up(fast)) == "SpedUp(layers=3)"

    torch.testing.assert_close(gradients(fast, x), gradients(model, x))

    assert fast_passes == ["default"] * 3
    found = []
    for each in (model, fast):
        trained = [p for p in each.parameters() if p.requires_grad]
        inside = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(each(inside).tanh().sum(), inside, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [inside, *trained]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_the_same(mode: Any, fast_passes: list[str]) -> None:
    model, (x, _) = random_lora().eval(), examples("linear")
    with mode():
        expected = model(x)
        rw.speed_up(model)
        torch.testing.assert_close(model(x), expected)
    assert len(fast_passes) == 3


def test_a_run_has_the_same_losses(fast_passes: list[str]) -> None:
    model = with_lora("linear")
    fast = copy.deepcopy(model)
    rw.speed_up(fast)
    assert train(fast, "linear") == pytest.approx(train(model, "linear"), rel=1e-9)
    assert len(fast_passes) == 3 * STEPS


def test_adapt_ranks_gives_the_same_ranks_and_losses_whichever_comes_first() -> None:
    runs = []
    for order in ("none", "before", "after"):
        model = with_lora("linear")
        if order == "before":
            rw.speed_up(model)
        ranks = rw.adapt_ranks(model, target_r=1, total_step=STEPS, tfinal=15)
        fast = rw.speed_up(model) if order == "after" else None
        losses = train(model, "linear")
        assert ranks.is_over
        runs.append((losses, [record.ranks for record in ranks.rank_history.records]))
        x, _ = examples("linear")
        expected = model(x)
        if fast is not None:
            fast.undo()
            torch.testing.assert_close(model(x), expected)
    for losses, found in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-7) and found == runs[0][1]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_as_near_to_exact_as_pefts(dtype: torch.dtype, autocast: bool) -> None:
    def adapted() -> Any:
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
        return peft.get_peft_model(llama().to(dtype), config)

    model, fast = adapted(), adapted()
    exact = copy.deepcopy(model).double()
    rw.speed_up(fast)
    found = []
    for each in (exact, model, fast):
        half = autocast and each is not exact
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = each(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found.append([loss.detach().double(), *(p.grad for p in each.parameters() if p.grad is not None)])
    assert [each.dtype for each in found[1]] == [each.dtype for each in found[2]]
    far = 2e-4 if dtype == torch.float32 and not autocast else 0.06
    for right, theirs, ours in zip(*found, strict=True):
        assert (ours - right).norm() <= max(1.5 * (theirs - right).norm(), far * right.norm())


@pytest.mark.parametrize("kind", ["4-bit", "8-bit"])
@pytest.mark.parametrize("autocast", [False, True])
def test_packed_layers_compute_the_same(kind: str, autocast: bool, fast_passes: list[str]) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    if kind == "4-bit":
        layer = bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=torch.bfloat16, quant_type="nf4")
    else:
        layer = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(layer.to("cpu")), config)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.base_layer.is_loaded_in_8bit = kind == "8-bit"
    assert type(model.base_model.model[0]).__name__ in ("Linear4bit", "Linear8bitLt", "Linear")
    x = torch.randn(2, 10, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = gradients(model, x)
        rw.speed_up(model)
        made = gradients(model, x)
    assert fast_passes
    for one, other in zip(made, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one.float() - other.float()).norm() < 0.02 * other.float().norm()


def test_dropout_has_its_rate_and_its_scale(fast_passes: list[str]) -> None:
    layer = nn.Linear(400, 2, bias=False)
    nn.init.zeros_(layer.weight)
    config = peft.LoraConfig(r=1, lora_alpha=1, lora_dropout=0.25, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(layer), config).train()
    adapted: Any = model.base_model.model[0]
    nn.init.ones_(adapted.lora_A["default"].weight)
    nn.init.ones_(adapted.lora_B["default"].weight)
    rw.speed_up(model)
    made = model(torch.ones(200, 400)) / 400
    assert len(fast_passes) == 1 and made.std() > 0.01 and abs(made.mean() - 1) < 0.01
    torch.testing.assert_close(model.eval()(torch.ones(1, 400)), torch.full((1, 2), 400.0))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool, fast_passes: list[str]) -> None:
    model, (x, _) = random_lora(), examples("linear")
    expected = gradients(model, x)
    rw.speed_up(model)
    made = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    torch.testing.assert_close(made, expected)
    assert len(fast_passes) >= 5  # computing again stops as soon as all is there that was saved


def test_operations_and_steps_of_autograd_become_fewer() -> None:
    def cost(model: Any, autocast: bool) -> int:
        for _ in range(2):
            model.zero_grad()
            with Operations() as operations, torch.autocast("cpu", torch.bfloat16, autocast):
                model(input_ids=IDS, labels=IDS).loss.backward()
        return operations.count

    for dtype, autocast, fewer in (
        (torch.float32, False, 3.5),
        (torch.bfloat16, False, 5),
        (torch.float32, True, 7.5),
    ):
        model = peft.get_peft_model(llama().to(dtype), peft.LoraConfig(r=4, target_modules=TARGETS))
        before = cost(model, autocast)
        with rw.speed_up(model):
            assert before - cost(model, autocast) >= fewer * 2 * len(TARGETS)
        assert cost(model, autocast) == before


# PEFT's model and its API stay.


def test_classes_state_and_files_stay_and_undoing_gives_everything_back(tmp_path: Any) -> None:
    model, (x, _) = random_lora(), examples("linear")
    kinds = {name: type(module) for name, module in model.named_modules()}
    state, expected = model.state_dict(), model(x)
    fast = rw.speed_up(model)
    assert {name: type(each).__name__ for name, each in model.named_modules()} == {
        name: kind.__name__ for name, kind in kinds.items()
    }
    assert isinstance(model, peft.PeftModel) and isinstance(
        model.base_model.model[0], peft.tuners.lora.Linear
    )
    assert list(model.state_dict()) == list(state)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base("linear"), tmp_path)
    torch.testing.assert_close(loaded(x), expected)
    fast.undo()
    fast.undo()
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_is_fast_too_and_is_undone_by_itself(
    copied: Callable[[Any], Any], fast_passes: list[str]
) -> None:
    model, (x, _) = random_lora(), examples("linear")
    fast = rw.speed_up(model)
    other = copied(model)
    fast.undo()
    assert torch.equal(model(x), random_lora()(x)) and not fast_passes
    torch.testing.assert_close(other(x), model(x))
    assert len(fast_passes) == 3
    rw.speed_up(other).undo()
    other(x)
    assert len(fast_passes) == 3


def test_merging_disabling_and_unloading_are_pefts_own(fast_passes: list[str]) -> None:
    model, (x, _) = random_lora(), examples("linear")
    plain, expected = base("linear")(x), model(x)
    rw.speed_up(model)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert not fast_passes
    torch.testing.assert_close(model(x), expected)
    assert len(fast_passes) == 3
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_several_adapters_and_an_adapter_for_each_row_are_pefts_own(fast_passes: list[str]) -> None:
    model, (x, _) = random_lora(), examples("linear")
    settings = {"r": 2, "init_lora_weights": False, "target_modules": ["0", "2"]}
    model.add_adapter("other", peft.LoraConfig(**settings))
    model.to(torch.float64)
    names = ["default", "other", "__base__"] * 8

    def outputs() -> list[Tensor]:
        made = []
        for active in ("default", "other", ["default", "other"]):
            model.base_model.set_adapter(active)
            made.append(model(x).detach())
        return [*made, model.eval()(x, adapter_names=names).detach()]

    expected = outputs()
    rw.speed_up(model)
    torch.testing.assert_close(outputs(), expected)
    assert fast_passes.count("other") == 2 and fast_passes.count("default") == 4  # in the third layer alone


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"bias": "lora_only"}], ids=str
)
def test_variants_and_biases_that_train_are_pefts_own(
    settings: dict[str, Any], fast_passes: list[str]
) -> None:
    model, (x, _) = random_lora(**settings), examples("linear")
    expected = gradients(model, x)
    rw.speed_up(model)
    torch.testing.assert_close(gradients(model, x), expected, rtol=0, atol=0)
    assert not fast_passes


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_the_modules_inside_a_layer_run(kind: str, part: str, fast_passes: list[str]) -> None:
    model, (x, _) = random_lora(), examples("linear")
    rw.speed_up(model)
    seen = []
    handle = getattr(model.base_model.model[2].get_submodule(part), kind)(lambda *each: seen.append(1))
    model(x)
    assert seen == [1] and len(fast_passes) == 2
    handle.remove()
    model(x)
    assert seen == [1] and len(fast_passes) == 5


class Buffered(nn.Linear):
    """A linear layer whose weight is a buffer, and which has no bias."""

    def __init__(self, *widths: int) -> None:
        super().__init__(*widths)
        weight = self.weight.detach()
        del self.weight, self.bias
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def test_layers_without_the_parameters_of_a_linear_layer_are_pefts_own(fast_passes: list[str]) -> None:
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model, x = peft.get_peft_model(nn.Sequential(Buffered(6, 5), nn.Linear(5, 2)), config), torch.randn(3, 6)
    expected = model(x)
    rw.speed_up(model)
    assert torch.equal(model(x), expected) and not fast_passes


def test_a_model_whose_layers_are_undone_through_another_handle_computes_on() -> None:
    model, x = random_lora().float(), examples("linear")[0].float()
    rw.speed_up(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = [model(x) for _ in range(2)][0]
        rw.speed_up(model.base_model).undo()
        torch.testing.assert_close(model(x), expected, rtol=0.02, atol=0.02)


def test_transforms_and_forward_derivatives_see_pefts_own_forward(fast_passes: list[str]) -> None:
    model, (x, _) = random_lora(), examples("linear")
    rw.speed_up(model)
    expected = torch.autograd.functional.jacobian(model, x[:1])[0, :, 0]
    fast_passes.clear()
    made = torch.func.jacrev(lambda x: model(x[None])[0])(x[0])
    torch.testing.assert_close(made, expected)
    _, tangent = torch.func.jvp(lambda x: model(x[None])[0], (x[0],), (torch.ones_like(x[0]),))
    torch.testing.assert_close(tangent, expected.sum(1))
    assert not fast_passes


def test_the_compiler_sees_pefts_own_forward(fast_passes: list[str]) -> None:
    model, (x, _) = random_lora(), examples("linear")
    expected = gradients(model, x)
    rw.speed_up(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(model, x, compiled), expected)
    assert not fast_passes


def test_a_layer_that_shares_its_input_in_place_reads_it_as_it_is(fast_passes: list[str]) -> None:
    model, (x, _) = random_lora(), examples("linear")
    layer = model.base_model.model[0]
    expected = [layer(x), layer(-x).relu()]
    rw.speed_up(model)
    torch.testing.assert_close([layer(x), layer(x.neg_()).relu_()], expected)
    assert len(fast_passes) == 2


def test_transformers_own_adapters_are_sped_up(fast_passes: list[str]) -> None:
    model = llama()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    expected = model(input_ids=IDS).logits
    rw.speed_up(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    assert len(fast_passes) == 2 * len(TARGETS)


# What is refused.


def test_what_cannot_be_sped_up_is_refused_with_what_to_do() -> None:
    with pytest.raises(TypeError, match="Module with a LoRA adapter of PEFT, but is a str"):
        rw.speed_up("model")  # type: ignore[arg-type]
    for model in (base("linear"), with_lora("conv2d"), with_lora("conv1d of transformers")):
        before = {name: type(module) for name, module in model.named_modules()}
        if any(type(module).__name__ == "Linear" and hasattr(module, "lora_A") for module in model.modules()):
            continue  # PEFT has no class of its own for Conv1D
        with pytest.raises(ValueError, match="no LoRA layer of PEFT that can be sped up"):
            rw.speed_up(model)
        assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_base_layer_that_is_no_linear_layer_is_pefts_own(fast_passes: list[str]) -> None:
    model, (x, _) = with_lora("conv1d of transformers", init_lora_weights=False), examples("linear")
    expected = gradients(model, x)
    rw.speed_up(model)
    torch.testing.assert_close(gradients(model, x), expected, rtol=0, atol=0)
    assert not fast_passes
