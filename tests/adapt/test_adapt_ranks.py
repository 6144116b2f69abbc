"""Adaptive ranks on PEFT's own layers: the same method, and an ordinary LoRA adapter at the end."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import rankwise as rw
from lora_world import COPIES, STEPS, WORLDS, base, examples, perceptron, train, with_lora
from tiny import told

KINDS = list(WORLDS)
SCHEDULE: dict[str, Any] = {"total_step": STEPS, "tfinal": 15}


def off(model: nn.Module, ranks: rw.AdaptiveRanks) -> float:
    """The largest number in ranks that are switched off."""
    factors = ranks._controller.factors
    largest = 0.0
    for key in ("A", "B"):
        for rows, mask in zip(factors.rows(key), factors.mask.split(factors.layout.ranks), strict=True):
            largest = max(largest, float(rows[~mask].abs().max()) if (~mask).any() else 0.0)
    return largest


# The method is the same.

OWN = ("linear", "conv2d", "embedding", "experts")


def start_alike(own: Any, other: Any) -> None:
    """Copy the initial factors of PEFT's layers into rankwise's layers."""
    state = peft.get_peft_model_state_dict(other)
    for path, layer in own.named_modules():
        if not hasattr(layer, "lora_A") or "default" not in layer.lora_A:
            continue
        plain = path.replace("adapted_parameters.", "")
        inner = {"experts.up": "experts.base_layer", "experts.down": "experts"}.get(plain, plain)
        embeds = isinstance(layer, nn.Embedding)
        for factor, held in (("A", layer.lora_A), ("B", layer.lora_B)):
            name = f"base_model.model.{inner}.lora_{'embedding_' if embeds else ''}{factor}"
            value = state[name if embeds else f"{name}.weight"]
            value = type(layer).from_file(layer, factor, value, False) if not embeds else value
            held["default"].data.copy_(value.reshape(held["default"].shape))


@pytest.mark.parametrize("name", OWN)
def test_pefts_layers_and_rankwises_own_give_the_same_ranks_and_losses(name: str) -> None:
    model = with_lora(name)
    config = rw.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=4, **SCHEDULE, **WORLDS[name][1])
    own = rw.get_peft_model(base(name), config)
    start_alike(own, model)
    ranks = rw.adapt_ranks(model, target_r=2, **SCHEDULE)

    losses, own_losses = train(model, name), train(own, name)

    assert losses == pytest.approx(own_losses, rel=1e-9)
    assert losses[-1] < 0.9 * losses[0]
    found = [
        (r.step, r.budget, sorted(zip(ranks.rank_history.layers, r.ranks, strict=True)))
        for r in ranks.rank_history.records
    ]
    assert found == [
        (r.step, r.budget, sorted(zip(own.rank_history.layers, r.ranks, strict=True)))
        for r in own.rank_history.records
    ]
    assert len(found) > 5 and found[-1][2] != found[0][2]


# All kinds of layers.


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_pefts_layers_ends_as_an_ordinary_adapter(name: str, tmp_path: Path) -> None:
    model = with_lora(name)
    ranks = rw.adapt_ranks(model, target_r=1.5, **SCHEDULE)

    losses = train(model, name)
    x, _ = examples(name)
    output = model(x)

    assert ranks.allocation_state.reached_target and losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(name), tmp_path)
    assert torch.allclose(again(x), output, rtol=1e-6, atol=1e-7)
    merged = peft.PeftModel.from_pretrained(base(name), tmp_path).merge_and_unload()
    assert torch.allclose(merged(x), output, rtol=1e-6, atol=1e-7)
    assert torch.allclose(model.merge_and_unload()(x), output, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", KINDS)
def test_ranks_that_are_off_stay_exactly_0_until_they_are_dropped(name: str) -> None:
    model = with_lora(name)
    ranks = rw.adapt_ranks(model, target_r=1.5, **SCHEDULE)
    ranks.leave_the_end_to(trainer=True)

    train(model, name)

    assert not ranks.is_over and off(model, ranks) == 0.0
    x, _ = examples(name)
    padded = model(x)
    before = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ranks.end()
    assert ranks.is_over
    assert torch.allclose(model(x), padded, rtol=1e-9, atol=1e-10)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) < before


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_saved_in_the_middle_of_a_run_computes_the_same(name: str, tmp_path: Path) -> None:
    model = with_lora(name)
    rw.adapt_ranks(model, target_r=2, **SCHEDULE)
    train(model, name, steps=12)
    x, _ = examples(name)

    model.save_pretrained(tmp_path)

    again = peft.PeftModel.from_pretrained(base(name), tmp_path)
    assert torch.allclose(again(x), model(x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantized_layers_adapt(kind: str, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer: Any = (
        bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)
        if kind == "4bit"
        else bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    )
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(64, 4)).to("cpu")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "2"]))
    ranks = rw.adapt_ranks(model, target_r=1, total_step=20)
    torch.manual_seed(0)
    x, y = torch.randn(16, 64), torch.randn(16, 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ranks.is_over and ranks.rank_summary().total_rank <= 2
    model.save_pretrained(tmp_path)
    assert model(x).isfinite().all()


# The user's choices.


@pytest.mark.parametrize("rslora", [False, True])
def test_a_run_ends_with_the_scale_that_the_user_chose(rslora: bool) -> None:
    model = with_lora("linear", use_rslora=rslora)
    chosen = 8 / (4**0.5 if rslora else 4)
    rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    layer = model.base_model.model[2]
    assert layer.scaling["default"] == pytest.approx(chosen * (0.5 if rslora else 0.25))

    train(model, "linear")

    held = [each for each in model.modules() if "default" in getattr(each, "scaling", {})]
    assert held and all(each.scaling["default"] == pytest.approx(chosen) for each in held)


def test_each_layer_starts_at_its_rank_in_the_rank_pattern() -> None:
    model = with_lora("linear", rank_pattern={"2": 8}, alpha_pattern={"2": 32})
    ranks = rw.adapt_ranks(model, target_r=2, **SCHEDULE)
    assert ranks.rank_history.records[0].ranks == [4, 8, 4]

    train(model, "linear")

    chosen = {"0": 2.0, "2": 4.0, "4": 2.0}
    held = {n: each for n, each in model.base_model.model.named_children() if hasattr(each, "scaling")}
    assert "2" in held and {n: each.scaling["default"] for n, each in held.items()} == {
        n: chosen[n] for n in held
    }


def test_the_target_is_half_of_the_adapters_rank_by_default() -> None:
    ranks = rw.adapt_ranks(with_lora("linear"), **SCHEDULE)
    assert ranks.allocation_state.target == 6


def test_an_adapter_that_was_trained_before_computes_the_same_when_its_ranks_begin_to_adapt() -> None:
    model = with_lora("linear")
    train(model, "linear", steps=20)
    x, _ = examples("linear")
    before = model(x)

    rw.adapt_ranks(model, target_r=1.5, **SCHEDULE)

    assert torch.allclose(model(x), before, rtol=1e-12)


def test_dora_keeps_its_magnitudes_even_in_layers_at_rank_0(tmp_path: Path) -> None:
    model = with_lora("linear", use_dora=True)
    ranks = rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    train(model, "linear")
    x, _ = examples("linear")
    assert ranks.is_over

    model.save_pretrained(tmp_path)

    again = peft.PeftModel.from_pretrained(base("linear"), tmp_path)
    assert torch.allclose(again(x), model(x), rtol=1e-6, atol=1e-7)
    assert all(
        model.base_model.model[n].lora_magnitude_vector["default"].weight is not None for n in (0, 2, 4)
    )


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_saved_even_in_layers_at_rank_0(bias: str, tmp_path: Path) -> None:
    model = with_lora("linear", bias=bias)
    ranks = rw.adapt_ranks(model, target_r=1 / 3, **SCHEDULE)
    train(model, "linear")
    x, _ = examples("linear")
    assert ranks.is_over and ranks.rank_summary().total_rank < 3

    model.save_pretrained(tmp_path)

    again = peft.PeftModel.from_pretrained(base("linear"), tmp_path)
    assert torch.allclose(again(x), model(x), rtol=1e-6, atol=1e-7)


def test_trained_biases_are_saved_where_a_layer_at_rank_0_still_holds_another_adapter(tmp_path: Path) -> None:
    model = with_lora("linear", bias="all")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0", "2", "4"]))
    ranks = rw.adapt_ranks(model, target_r=1 / 3, adapter="default", **SCHEDULE)
    train(model, "linear")
    x, _ = examples("linear")
    assert ranks.is_over and ranks.rank_summary().total_rank < 3

    model.save_pretrained(tmp_path, selected_adapters=["default"])

    again = peft.PeftModel.from_pretrained(base("linear"), tmp_path)
    assert torch.allclose(again(x), model(x), rtol=1e-6, atol=1e-7)


def test_one_of_several_adapters_adapts_and_the_others_stay(tmp_path: Path) -> None:
    model = with_lora("linear")
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False))
    state = {k: v.clone() for k, v in peft.get_peft_model_state_dict(model, adapter_name="other").items()}
    ranks = rw.adapt_ranks(model, target_r=0.7, adapter="default", **SCHEDULE)

    train(model, "linear")

    x, _ = examples("linear")
    output = model(x)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".other." in name)
    model.set_adapter("default")
    assert torch.equal(model(x), output) and ranks.rank_summary().total_rank < 3
    now = peft.get_peft_model_state_dict(model, adapter_name="other")
    assert now.keys() == state.keys() and all(torch.equal(now[key], state[key]) for key in state)
    model.set_adapter("other")
    assert model(x).isfinite().all()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base("linear"), tmp_path)
    model.set_adapter("default")
    assert torch.allclose(again(x), model(x), rtol=1e-6, atol=1e-7)


def test_an_optimizer_of_another_adapter_does_not_delay_cuts_until_this_adapter_is_frozen() -> None:
    def adapting(names: list[str]) -> tuple[Any, rw.AdaptiveRanks, list[torch.optim.Optimizer]]:
        model = with_lora("linear")
        model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["0", "2"]))
        ranks = rw.adapt_ranks(model, target_r=1, adapter="default", **SCHEDULE)
        factors = [p for name, p in model.named_parameters() if "lora_" in name]  # of both adapters
        return model, ranks, [torch.optim.AdamW(factors, lr=2e-2) for _ in names]

    def trained(names: list[str]) -> tuple[Any, rw.AdaptiveRanks]:
        model, ranks, optimizers = adapting(names)
        for _ in range(STEPS):
            for name, optimizer in zip(names, optimizers, strict=True):
                model.set_adapter(name)
                train(model, "linear", steps=1, optimizer=optimizer)
        model.set_adapter("default")
        return model, ranks

    alone, expected = trained(["default"])
    model, ranks = trained(["default", "other"])

    assert ranks.rank_history == expected.rank_history and ranks.is_over
    x, _ = examples("linear")
    assert torch.equal(model(x), alone(x))


def test_adapters_that_were_injected_adapt_too() -> None:
    model = base("linear")
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["0", "2"]), model)
    model.peft_config = {"default": peft.LoraConfig(r=4, target_modules=["0", "2"])}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    ranks = rw.adapt_ranks(model, target_r=1, adapter="default", **SCHEDULE)
    train(model, "linear")
    assert ranks.is_over and ranks.rank_history.layers == ["0", "2"]


# Any training loop.


def test_the_model_keeps_the_handle() -> None:
    model = with_lora("linear")
    rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    gc.collect()
    before = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)

    train(model, "linear")

    after = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert after < before, "the layers are narrowed at the end, by a handle that nobody else keeps"


def test_training_goes_on_after_the_end_as_if_zeros_were_still_there() -> None:
    runs = []
    for narrow in (True, False):
        model = with_lora("linear")
        ranks = rw.adapt_ranks(model, target_r=1.5, **SCHEDULE)
        ranks.leave_the_end_to(trainer=not narrow)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        with told():
            train(model, "linear", optimizer=optimizer)
            runs.append(train(model, "linear", steps=20, optimizer=optimizer))
        assert ranks.is_over == narrow
    assert runs[0] == pytest.approx(runs[1], rel=1e-10)


class Parts(nn.Module):
    """A model that calls its parts in the same way as wrappers call what they wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.sub_module, self.module = perceptron(), nn.Sequential(nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(self.sub_module(x))


def test_layers_are_named_by_their_own_paths_even_if_a_part_is_called_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bare = Parts().double()
    targets = ["sub_module.0", "sub_module.2", "sub_module.4", "module.1"]
    model = with_lora("linear", copy.deepcopy(bare), target_modules=targets)
    ranks = rw.adapt_ranks(model, target_r=1.5, **SCHEDULE)
    train(model, "linear")
    assert [layer.path for layer in ranks.rank_summary().layers] == targets
    assert len({layer.rank for layer in ranks.rank_summary().layers}) > 1, "a pattern is needed"
    model.save_pretrained(tmp_path)
    x, _ = examples("linear")
    for read in (peft.PeftModel.from_pretrained, rw.PeftModel.from_pretrained):
        loaded = read(copy.deepcopy(bare), tmp_path).double()
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_handle_can_be_asked_after_the_first_layer_has_ended_without_ranks() -> None:
    from rankwise.integrations.common import rank_metrics

    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=0.5, **SCHEDULE)
    model.base_model.model[0].lora_B["default"].weight.register_hook(
        torch.zeros_like
    )  # the layer learns nothing
    train(model, "linear")
    assert ranks.is_over and ranks.rank_summary().layers[0].rank == 0
    assert rank_metrics(ranks)["total_rank"] == ranks.rank_summary().total_rank


def test_a_run_that_ends_early_is_finished_by_a_call(tmp_path: Path) -> None:
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    train(model, "linear", steps=5)

    ranks.finalize_ranks()

    assert ranks.is_over and ranks.rank_summary().total_rank <= 3 and ranks.allocation_state.reached_target
    model.save_pretrained(tmp_path)
    x, _ = examples("linear")
    assert torch.allclose(peft.PeftModel.from_pretrained(base("linear"), tmp_path)(x), model(x), rtol=1e-6)


@pytest.mark.parametrize("load_first", [True, False])
def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(load_first: bool) -> None:
    def begin() -> tuple[Any, torch.optim.Optimizer]:
        model = with_lora("linear")
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    model, optimizer = begin()
    ranks = rw.adapt_ranks(model, target_r=1.5, **SCHEDULE)
    train(model, "linear", steps=12, optimizer=optimizer)
    saved = [copy.deepcopy(each.state_dict()) for each in (model, optimizer, ranks)]
    train(model, "linear", steps=STEPS - 12, optimizer=optimizer)

    other, its_optimizer = begin()
    if load_first:
        other.load_state_dict(saved[0])
    again = rw.adapt_ranks(other, target_r=1.5, **SCHEDULE)
    if not load_first:
        other.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    train(other, "linear", steps=STEPS - 12, optimizer=its_optimizer)

    assert again.rank_history == ranks.rank_history
    end, its_end = model.state_dict(), other.state_dict()
    assert end.keys() == its_end.keys() and all(torch.equal(end[key], its_end[key]) for key in end)


ALONE = "without the state of the run"


def test_values_of_an_earlier_point_are_not_loaded_in_silence_with_the_present_scale() -> None:
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    x, _ = examples("linear")
    train(model, "linear", steps=6)
    output, run = model(x), ranks.state_dict()
    best = copy.deepcopy(peft.get_peft_model_state_dict(model))
    train(model, "linear", steps=6)

    peft.set_peft_model_state_dict(model, best)
    with pytest.warns(UserWarning, match=ALONE):
        assert not torch.allclose(model(x), output)

    ranks.load_state_dict(run)
    assert torch.equal(model(x), output)


USES: dict[str, Callable[[Any, rw.AdaptiveRanks], object]] = {
    "step": lambda model, ranks: train(model, "linear", steps=1),
    "forward of a part": lambda model, ranks: model.base_model.model(examples("linear")[0]),
    "save": lambda model, ranks: peft.get_peft_model_state_dict(model),
    "end": lambda model, ranks: ranks.finalize_ranks(),
}


@pytest.mark.parametrize("use", USES)
def test_going_back_in_a_run_is_silent_with_the_state_of_the_run_in_either_order(use: str) -> None:
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    train(model, "linear", steps=12)
    values, run = copy.deepcopy(model.state_dict()), ranks.state_dict()
    train(model, "linear", steps=3)
    with told() as messages:
        model.load_state_dict(values)
        ranks.load_state_dict(run)
        train(model, "linear", steps=3)
        ranks.load_state_dict(run)
        peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(model, values))
        USES[use](model, ranks)
    assert not messages


@pytest.mark.parametrize("use", USES)
def test_going_back_in_a_run_without_its_state_is_warned_of_when_the_values_are_used(use: str) -> None:
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    train(model, "linear", steps=6)
    values = copy.deepcopy(model.state_dict())
    train(model, "linear", steps=6)
    with told() as messages:
        model.load_state_dict(values)
    assert not messages
    with told() as messages:
        USES[use](model, ranks)
        model(examples("linear")[0])
    assert sum(ALONE in each for each in messages) == 1
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_accelerate_goes_back_in_a_run_without_a_warning(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(ranks)
    train(model, "linear", 12, optimizer)
    accelerator.save_state(str(tmp_path))
    with told() as messages:
        train(model, "linear", 3, optimizer)
        accelerator.load_state(str(tmp_path))
        train(model, "linear", 3, optimizer)
    assert not messages and ranks.allocation_state.step == 15


@pytest.mark.parametrize("end", ["narrowed", "detached", "deleted"])
def test_a_loop_writes_its_checkpoints_after_the_run_too(end: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(model)
    accelerator.register_for_checkpointing(ranks)
    train(model, "linear", STEPS if end == "narrowed" else 12)
    if end == "detached":
        ranks.detach()
    if end == "deleted":
        model.delete_adapter("default")
    accelerator.save_state(str(tmp_path))
    assert ranks.is_over
    with pytest.raises(ValueError, match="a run that was over"):
        rw.adapt_ranks(with_lora("linear"), target_r=1, **SCHEDULE).load_state_dict(ranks.state_dict())


def test_values_of_a_run_are_not_evaluated_in_silence_with_the_scale_of_the_start() -> None:
    model = with_lora("linear")
    rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    train(model, "linear", steps=12)
    fresh = with_lora("linear")
    rw.adapt_ranks(fresh, target_r=1, **SCHEDULE)
    fresh.load_state_dict(model.state_dict())
    x, _ = examples("linear")
    with pytest.warns(UserWarning, match=ALONE):
        assert not torch.allclose(fresh(x), model(x))


@pytest.mark.parametrize("copied", [lambda model: model, *COPIES])
def test_values_from_before_the_end_are_refused_by_narrowed_layers_with_the_reason(copied: Any) -> None:
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    train(model, "linear", steps=12)
    values = copy.deepcopy(model.state_dict())
    train(model, "linear", steps=STEPS - 12)
    assert ranks.is_over
    model = copied(model)
    with pytest.raises(ValueError, match=r"other ranks.*attach the adapter anew"):
        torch.nn.ModuleDict({"of_lightning": model}).load_state_dict(
            {f"of_lightning.{name}": value for name, value in values.items()}
        )
    model.load_state_dict(model.state_dict())
    model.delete_adapter("default")
    model.add_adapter("default", peft.LoraConfig(r=4, target_modules=["0", "2", "4"]))
    model.load_state_dict(model.state_dict())


def test_a_model_that_is_filled_with_its_own_values_gives_no_warning() -> None:
    model = with_lora("linear")
    rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    with told() as messages:
        values = model.state_dict()
        model.to("meta")
        model.load_state_dict(values, assign=True)
        model.set_adapter("default")
        train(model, "linear", steps=2)
    assert not messages


def test_values_load_after_one_of_two_adapters_with_runs_was_deleted() -> None:
    model = with_lora("linear")
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["0", "2"]))
    runs = [rw.adapt_ranks(model, target_r=1, adapter=name, **SCHEDULE) for name in ("default", "other")]
    model.set_adapter("other")
    model.delete_adapter("default")
    model.load_state_dict(model.state_dict())
    assert [each.is_over for each in runs] == [True, False]


def test_a_trainer_that_goes_on_after_its_last_values_were_the_best_gives_no_warning() -> None:
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    ranks.leave_the_end_to(trainer=True)
    train(model, "linear", steps=6)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    ranks.end()
    assert not ranks.is_over
    ranks.begin_anew(STEPS)
    with told() as messages:
        train(model, "linear", steps=2)
    assert not messages


@pytest.mark.parametrize("steps", [12, 20, 30])
def test_a_run_that_a_trainer_stops_early_is_narrowed_or_a_warning_says_that_it_is_not(steps: int) -> None:
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    ranks.leave_the_end_to(trainer=True)
    train(model, "linear", steps=steps)
    reached, phase = ranks.allocation_state.reached_target, ranks.allocation_state.phase
    assert (reached, phase) == {12: (False, "pruning"), 20: (True, "pruning"), 30: (True, "final")}[steps]
    x, _ = examples("linear")
    output = model(x)

    with told() as messages:
        ranks.end()

    assert ranks.is_over == reached and bool(messages) == (not reached)
    torch.testing.assert_close(model(x), output)
    ranks.finalize_ranks()
    assert ranks.is_over and ranks.allocation_state.reached_target


@pytest.mark.parametrize("whole", [True, False])
def test_a_resumed_run_is_warned_at_its_first_step_if_only_its_values_were_loaded(whole: bool) -> None:
    first = with_lora("embedding")
    before = rw.adapt_ranks(first, target_r=1, **SCHEDULE)
    train(first, "embedding", steps=6)
    model = with_lora("embedding")
    ranks = rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    with told() as messages:
        peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(first))
        if whole:
            ranks.load_state_dict(before.state_dict())
        model.load_state_dict(base("embedding").state_dict(), strict=False)  # not the adapter's
    assert not messages
    with told() as messages:
        train(model, "embedding", steps=2)
    assert [ALONE in each for each in messages] == [True] * (not whole)


def test_a_run_that_is_over_says_nothing_of_values_that_fit() -> None:
    model = with_lora("linear")
    rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    train(model, "linear")
    with told() as messages:
        peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(model))
    assert not messages and not model._state_dict_pre_hooks


def test_steps_that_no_optimizer_took_are_reported_on_saving(tmp_path: Path) -> None:
    def save(model: Any) -> list[str]:
        with told() as messages:
            model.save_pretrained(tmp_path)
        return messages

    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, total_step=STEPS)
    assert not save(model)
    x, y = examples("linear")
    (model(x) - y).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    (message,) = save(model)
    assert "No rank was cut" in message and "`ranks.update_and_allocate(step)`" in message
    assert ranks.allocation_state.step == 0
    trained = with_lora("linear")
    train(trained, "linear", 2)
    rw.adapt_ranks(trained, total_step=STEPS)
    assert not save(trained), "these values are from before the run"


def test_a_script_that_cuts_by_hand_keeps_control() -> None:
    runs = []
    for by_hand in (False, True):
        model = with_lora("linear")
        ranks = rw.adapt_ranks(model, target_r=1.5, **SCHEDULE)
        ranks.leave_the_end_to(trainer=True)
        if by_hand:
            x, y = examples("linear")
            optimizer = torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.01
            )
            for step in range(STEPS):
                (model(x) - y).square().mean().backward()
                optimizer.step()
                ranks.update_and_allocate(step + 1)
                optimizer.zero_grad()
        else:
            train(model, "linear")
        runs.append(ranks.rank_history.records[-1].ranks)
    assert runs[0] == runs[1]


def test_a_compiled_model_is_compiled_twice_at_most_in_a_run_of_twenty_cuts() -> None:
    from torch._dynamo.testing import CompileCounter

    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=1.5, total_step=60)
    ranks.leave_the_end_to(trainer=True)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    x, y = examples("linear")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(60):
        (compiled(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(ranks.rank_history) > 15 and counter.frame_count <= 2
    assert torch.allclose(compiled(x), model(x))


def test_after_detach_ranks_stay_as_they_are() -> None:
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    train(model, "linear", steps=8)
    before = ranks.rank_history.records[-1].ranks
    ranks.detach()
    train(model, "linear", steps=STEPS)
    assert ranks.rank_history.records[-1].ranks == before
    rw.adapt_ranks(model, target_r=1, **SCHEDULE)  # a new run may begin


def test_the_handle_can_be_asked_after_detach_and_refuses_to_go_on() -> None:
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    train(model, "linear", steps=8)
    saved, state, summary = ranks.state_dict(), ranks.allocation_state, ranks.rank_summary()
    ranks.detach()
    assert ranks.is_over and (ranks.allocation_state, ranks.rank_summary()) == (state, summary)
    ranks.update_and_allocate(9)
    ranks.end()
    ranks.detach()
    assert "default" in model.base_model.model[0].lora_A and ranks.allocation_state == state
    for call in (ranks.finalize_ranks, lambda: ranks.load_state_dict(saved)):
        with pytest.raises(ValueError, match=r"detach\(\)"):
            call()


def test_a_state_is_not_loaded_into_narrowed_layers() -> None:
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    train(model, "linear", steps=8)
    saved = ranks.state_dict()
    train(model, "linear", steps=STEPS - 8)
    with pytest.raises(ValueError, match=r"layers are narrowed.*attach the adapter anew"):
        ranks.load_state_dict(saved)


def test_resuming_with_another_scale_is_told(tmp_path: Path) -> None:
    model = with_lora("linear")
    saved = rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    train(model, "linear", steps=8)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base("linear"), tmp_path, is_trainable=True)
    for other in (with_lora("linear"), again):  # no warning
        rw.adapt_ranks(other, target_r=1, **SCHEDULE).load_state_dict(saved.state_dict())
    louder = rw.adapt_ranks(with_lora("linear", lora_alpha=80), target_r=1, **SCHEDULE)
    with pytest.warns(UserWarning, match=r"scale that it began with, 2 .* give 20, which is not used"):
        louder.load_state_dict(saved.state_dict())


# A user's own LoRA.


class MyLora(nn.Module):
    """A user's own LoRA layer: its factors are plain parameters, and transposed."""

    def __init__(self, d_in: int, d_out: int, r: int) -> None:
        super().__init__()
        self.base = nn.Linear(d_in, d_out)
        self.base.requires_grad_(False)
        self.lora_a, self.lora_b = nn.Linear(d_in, r, bias=False), nn.Linear(r, d_out, bias=False)
        nn.init.zeros_(self.lora_b.weight)
        self.alpha, self.rank = 8.0, r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.alpha / self.rank * self.lora_b(self.lora_a(x))


class MyPair(rw.FactorPair):
    def __init__(self, path: str, layer: MyLora) -> None:
        super().__init__(path)
        self.layer = layer

    def parameter(self, key: str) -> nn.Parameter:
        return self.layer.lora_a.weight if key == "A" else self.layer.lora_b.weight

    @property
    def scale(self) -> float:
        return self.layer.alpha / self.layer.rank

    @scale.setter
    def scale(self, value: float) -> None:
        self.layer.alpha = value * self.layer.rank


def test_a_users_own_layer_takes_a_dozen_lines() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(MyLora(8, 16, 4), nn.Tanh(), MyLora(16, 4, 4)).double()
    pairs = [MyPair(f"layer {n}", model[n]) for n in (0, 2)]  # type: ignore[arg-type]
    ranks = rw.adapt_ranks(pairs, target_r=1, **SCHEDULE)

    losses = train(model, "linear")

    assert losses[-1] < losses[0] and ranks.rank_summary().total_rank <= 2
    assert off(model, ranks) == 0.0 and [pair.scale for pair in pairs] == pytest.approx([2, 2])


def _with(pair: MyPair, **attributes: Any) -> MyPair:
    for name, value in attributes.items():
        setattr(pair, name, value)
    return pair


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (
            lambda layer: setattr(layer, "lora_b", nn.Linear(8, 4, bias=False)),
            r"count the same ranks.*\(4, 8\)",
        ),
        (lambda layer: setattr(layer.lora_a, "weight", nn.Parameter(torch.ones(8))), "count the same ranks"),
        (lambda layer: setattr(layer, "alpha", 0.0), r"`scale` must be finite and not 0, but is 0\.0"),
        (lambda layer: setattr(layer, "alpha", float("nan")), "`scale` must be finite"),
    ],
)
def test_factors_of_ones_own_that_make_up_no_product_are_refused(changed: Any, named: str) -> None:
    layer = MyLora(8, 16, 4)
    changed(layer)
    with pytest.raises(ValueError, match=f"'mine'.*{named}"):
        rw.adapt_ranks([MyPair("mine", layer)], target_r=1, **SCHEDULE)


def test_blocks_starts_and_shared_layers_of_ones_own_are_checked() -> None:
    layer = MyLora(8, 16, 4)
    with pytest.raises(ValueError, match=r"4 ranks can't be shared evenly by `blocks`=3"):
        rw.adapt_ranks([_with(MyPair("mine", layer), blocks=3)], target_r=1, **SCHEDULE)
    with pytest.raises(ValueError, match=r"`starts_at_zero` is 'A' or 'B', but is 'C'"):
        rw.adapt_ranks([_with(MyPair("mine", layer), starts_at_zero="C")], target_r=1, **SCHEDULE)
    with pytest.raises(ValueError, match="'one' and 'two' share their factor A"):
        rw.adapt_ranks([MyPair("one", layer), MyPair("two", layer)], target_r=1, **SCHEDULE)
