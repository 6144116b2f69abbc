"""Runs on PEFT's layers that end in an unusual way: starts, names, budgets and calls that few people meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import rankwise as rw
from lora_world import WORLDS, base, examples, perceptron, train, with_lora
from rankwise.adapt.ranks import HANDLES
from tiny import llama, told

SCHEDULE: dict[str, Any] = {"total_step": 12, "tinit": 1, "tfinal": 4, "deltaT": 1}


def test_an_orthogonal_start_ends_as_an_adapter_of_odd_ranks_that_peft_loads(tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, target_modules=["0", "2", "4"], init_lora_weights="orthogonal")
    model = peft.get_peft_model(base("linear", torch.float32), config)
    rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    train(model, "linear", 12, dtype=torch.float32)
    assert {layer.r["default"] % 2 for layer in model.modules() if hasattr(layer, "lora_A")} == {1}
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base("linear", torch.float32), str(tmp_path))
    x, _ = examples("linear", torch.float32)
    torch.testing.assert_close(loaded(x), model.eval()(x))


def test_adapters_that_peft_ties_are_refused() -> None:
    model = llama(tie_word_embeddings=True)
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match=r"share their factor.*ensure_weight_tying"):
        rw.adapt_ranks(peft.get_peft_model(model, config), target_r=2, total_step=10)


def test_a_start_that_keeps_B_is_refused_for_that_reason() -> None:
    model = with_lora("linear", base("linear", torch.float32))
    model.peft_config["default"].init_lora_weights = "mica"
    with pytest.raises(ValueError, match="'mica' keeps B as it is"):
        rw.adapt_ranks(model, target_r=2, total_step=10)


def test_a_layer_that_the_last_budget_cannot_pay_for_leaves_it_to_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Earlier budgets can pay for it. It must not take them up, so that nothing else is left in the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 16)).double()
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "2", "4"]))
    ranks = rw.adapt_ranks(model, target_r=0.4, **SCHEDULE)
    monkeypatch.setattr(ranks._choice, "_worth", lambda strengths: torch.tensor([1.0] * 8 + [9.0] * 4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, _ = examples("linear")
    for _ in range(12):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    ended = {row.path: row.rank for row in ranks.rank_summary().layers}
    assert ended["4"] == 0 and ended["0"] + ended["2"] > 0


def test_layers_that_all_end_without_ranks_leave_an_adapter_that_loads_and_adds_nothing(
    tmp_path: Path,
) -> None:
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=1, **SCHEDULE)
    ranks._rankwise_controller.factors.mask.zero_()
    ranks._rankwise_controller.factors.switch_off()
    ranks._rankwise_controller.fix()
    ranks.end()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base("linear"), str(tmp_path))
    x, _ = examples("linear")
    torch.testing.assert_close(loaded(x), base("linear")(x))


class Twice(nn.Module):
    """A module of the base, which was never adapted, has a name that ends as an adapted one's does."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = perceptron(), nn.ModuleDict({"block": perceptron()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) + self.other["block"](x)


def test_what_was_not_adapted_is_not_adapted_when_the_result_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = with_lora("linear", Twice().double(), target_modules=r"block\.[024]")
    rw.adapt_ranks(model, target_r=0.7, **SCHEDULE)
    train(model, "linear", 12)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Twice().double(), str(tmp_path))

    def adapted(whole: Any) -> set[str]:
        return {name for name, module in whole.named_modules() if hasattr(module, "lora_A")}

    assert adapted(loaded) == adapted(model) != set()


def with_new_words(folder: Path) -> Any:
    """A saved Llama whose vocabulary was made larger, with other new rows in each call."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(72, mean_resizing=False)
    return model


def train_on(words: torch.Tensor, model: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(12):
        model(input_ids=words, labels=words).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("target", "left"), [(0.6, True), (0.2, False)])
def test_new_words_are_saved_with_the_adapter_of_the_embedding_where_peft_cannot_see_the_base(
    target: float, left: bool, tmp_path: Path
) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj", "v_proj"])
    model = peft.get_peft_model(with_new_words(tmp_path / "base"), config)
    model.peft_config["default"].base_model_name_or_path = ""  # as with the hub's models without a network
    ranks = rw.adapt_ranks(model, target_r=target, **SCHEDULE)
    words = torch.arange(24).view(2, 12) * 3
    train_on(words, model)
    assert ranks.is_over and bool(ranks._controller.allocated_ranks()["model.embed_tokens"]) is left
    model.save_pretrained(tmp_path / "adapter")

    again = peft.PeftModel.from_pretrained(with_new_words(tmp_path / "base"), tmp_path / "adapter")

    torch.testing.assert_close(again(input_ids=words).logits, model.eval()(input_ids=words).logits)


@pytest.mark.parametrize("targets", ["embed_tokens", "model.embed_tokens", r".*\.(embed_tokens|q_proj)"])
def test_pefts_rule_for_saving_an_embeddings_base_weight_holds_after_layers_were_dropped(
    targets: str, tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=4, target_modules=targets if "*" in targets else [targets, "q_proj"])
    model = peft.get_peft_model(llama(), config)
    ranks = rw.adapt_ranks(model, target_r=0.5, **SCHEDULE)
    before = {name for name in peft.get_peft_model_state_dict(model) if "lora" not in name}
    train_on(torch.arange(24).view(2, 12) * 2, model)
    left = ranks._controller.allocated_ranks()
    assert ranks.is_over and left["model.embed_tokens"] and not left["model.layers.0.self_attn.q_proj"]
    after = {name for name in peft.get_peft_model_state_dict(model) if "lora" not in name}
    assert after == before and bool(before) == (targets != "model.embed_tokens")


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_ends_when_its_adapter_is_taken_out_and_other_models_train_on(replaced: bool) -> None:
    model = with_lora("linear")
    rw.adapt_ranks(model, target_r=2, **SCHEDULE)
    train(model, "linear", 3)
    model.delete_adapter("default")
    if replaced:
        model.add_adapter("default", peft.LoraConfig(r=2, target_modules=["0", "2", "4"]))
        model.set_adapter("default")
    other = with_lora("linear")
    with told() as messages:
        train(other, "linear", 3)
        if replaced:
            train(model.double(), "linear", 14)
    assert len([each for each in messages if "run of adaptive ranks has ended" in each]) == 1


@pytest.mark.parametrize("name", ["linear", "embedding", "experts", "attention"])
def test_the_handle_of_a_run_whose_adapter_was_deleted_can_be_asked_and_makes_room(name: str) -> None:
    model = with_lora(name)
    gone = rw.adapt_ranks(model, target_r=2, **SCHEDULE)
    train(model, name, 3)
    cut = [row.rank for row in gone.rank_summary().layers]
    model.add_adapter("default 2", peft.LoraConfig(r=3, **WORLDS[name][1]))
    model.delete_adapter("default")

    assert gone.is_over and gone.allocation_state.step == 3 and gone.allocation_state.total_step == 12
    assert [row.rank for row in gone.rank_summary().layers] == cut
    with pytest.raises(ValueError, match=r"'default' that it began with was deleted"):
        gone.finalize_ranks()
    ranks = rw.adapt_ranks(model, target_r=1, adapter="default 2", **SCHEDULE)
    gone.detach()
    assert not ranks.is_over


@pytest.mark.parametrize("asked", [False, True])
def test_an_adapter_that_was_deleted_and_added_again_has_no_run_until_one_is_begun(asked: bool) -> None:
    model = with_lora("linear")
    gone = rw.adapt_ranks(model, target_r=2, **SCHEDULE)
    train(model, "linear", 3)
    model.delete_adapter("default")
    model.add_adapter("default", peft.LoraConfig(r=4, lora_alpha=12, target_modules=["0", "2", "4"]))
    model.set_adapter("default")
    model.double()
    if asked:
        assert rw.adapt_ranks(model, target_r=1, **SCHEDULE) is not gone and gone.is_over
    train(model, "linear", 14)
    config = model.peft_config["default"]
    assert (config.r < 4) == asked
    left = [each for each in model.modules() if "default" in getattr(each, "scaling", {})]
    assert left and all(each.scaling["default"] == pytest.approx(3) for each in left)
    assert asked or (config.r, config.lora_alpha, config.alpha_pattern) == (4, 12, {})


def test_ranks_are_not_cut_while_the_adapter_is_merged() -> None:
    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=2, **SCHEDULE)
    train(model, "linear", 3)
    x, _ = examples("linear")
    before = model(x)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into '0'.*unmerge_adapter"):
        ranks.finalize_ranks()
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), before)
    ranks.finalize_ranks()
    assert ranks.is_over


@pytest.mark.parametrize("wrap", ["compiled", "inside"])
def test_a_model_in_a_wrapper_is_adapted_under_its_own_names(wrap: str, tmp_path: Path) -> None:
    model = with_lora("linear")
    outer: Any = torch.compile(model) if wrap == "compiled" else nn.ModuleDict({"model": model})
    ranks = rw.adapt_ranks(outer, target_r=0.7, **SCHEDULE)
    assert [row.path for row in ranks.rank_summary().layers] == ["0", "2", "4"]
    train(model, "linear", 12)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base("linear"), str(tmp_path))
    x, _ = examples("linear")
    torch.testing.assert_close(loaded(x), model.eval()(x))


def test_inference_mode_leaves_a_run_that_trains() -> None:
    model = with_lora("linear")
    with torch.inference_mode():
        ranks = rw.adapt_ranks(model, target_r=2, **SCHEDULE)
    train(model, "linear", 4)
    with torch.inference_mode():
        ranks.finalize_ranks()
    assert ranks.is_over
    train(model, "linear", 2)


def test_an_adapter_without_values_is_refused() -> None:
    config = peft.LoraConfig(r=4, target_modules=["0", "2"])
    model = peft.get_peft_model(perceptron(), config, low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match=r"meta device.*low_cpu_mem_usage"):
        rw.adapt_ranks(model, target_r=2, **SCHEDULE)


@pytest.mark.parametrize("layers", ["PEFT's", "rankwise's"])
def test_an_average_that_copies_the_model_while_its_ranks_adapt_is_told(layers: str) -> None:
    from torch.optim.swa_utils import AveragedModel

    if layers == "PEFT's":
        model = with_lora("linear")
        rw.adapt_ranks(model, target_r=2, **SCHEDULE)
    else:
        config = rw.AdaLoraConfig(init_r=4, target_r=2, target_modules=["0", "2", "4"], **SCHEDULE)
        model = rw.get_peft_model(perceptron().double(), config)
    with pytest.warns(UserWarning, match=r"an average with later values means nothing.*final"):
        AveragedModel(model)
    with told() as messages:
        AveragedModel(with_lora("linear"))  # no ranks adapt
        train(model, "linear", 8)
        AveragedModel(model)
    assert not messages


def test_an_average_of_the_weights_that_begins_in_the_final_phase_is_narrowed_with_them() -> None:
    from torch.optim.swa_utils import AveragedModel

    model = with_lora("linear")
    ranks = rw.adapt_ranks(model, target_r=2, **SCHEDULE)
    ranks.leave_the_end_to(trainer=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, y = examples("linear")
    average = None
    with told() as messages:
        for _ in range(12):
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if ranks.allocation_state.phase == "final":
                average = average or AveragedModel(model)
                average.update_parameters(model)
    assert average is not None and not messages
    before = average(x)
    ranks.end()
    own = vars(average.module)[HANDLES]["default"]
    own.finalize_ranks()
    torch.testing.assert_close(average(x), before)
    assert own.rank_summary().layers[0].rank == ranks.rank_summary().layers[0].rank
