"""Adaptive ranks on PEFT's layers in every trainer: real libraries, whole runs, and the files that they write."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import rankwise as rw
from tiny import WORDS, bert, fresh_accelerator, llama, token_batches, told, words_tokenizer
from trl_world import ARGUMENTS, NEEDS_A_REFERENCE, STEPS, TRAINERS, base_for, logged, trl_trainer

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "v_proj"]
PHASES: dict[str, Any] = {"tinit": 2, "tfinal": 3, "deltaT": 1}  # cuts at steps 3, 4 and 5 of 8


def lora(**changes: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **changes})


def with_lora(base: nn.Module | None = None, **changes: Any) -> Any:
    base = llama() if base is None else base
    torch.manual_seed(5)
    return peft.get_peft_model(base, lora(**changes))


def ranks_of(callback: rw.AdaptRanks) -> rw.AdaptiveRanks:
    assert callback.ranks is not None
    return callback.ranks


def assert_whole_run(ranks: rw.AdaptiveRanks, steps: int = STEPS) -> None:
    """Check that all phases happened, step by step, and that the layers were narrowed to the target."""
    state, budgets = ranks.allocation_state, [record.budget for record in ranks.rank_history.records]
    assert (state.step, state.total_step, state.phase) == (steps, steps, "final")
    assert state.budget == state.target < state.initial
    assert budgets[0] == state.initial and budgets[-1] == state.target
    assert 0 < ranks.rank_summary().total_rank < state.initial
    assert ranks.is_over and state.skipped_steps == 0


def assert_loads_in_peft(model: Any, folder: Path, base: nn.Module) -> None:
    """Check that PEFT alone reads the saved adapter, and computes the same."""
    loaded, ids = peft.PeftModel.from_pretrained(base, folder).eval(), token_batches(1)[0]["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
        assert not torch.equal(loaded(input_ids=ids).logits, loaded.unload()(input_ids=ids).logits)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if "lora_" in name}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Check that the factors are equal, bit for bit."""
    ours, theirs = trained(one), trained(other)
    assert ours and ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


# --- TRL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAINERS)
def test_trl_with_a_peft_config_and_one_callback_ends_as_an_adapter_that_peft_loads(
    kind: str, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    callback = rw.AdaptRanks(target_r=2)
    config = lora(r=8, modules_to_save=["score"] if kind == "reward" else None)
    trainer = trl_trainer(kind, tmp_path, peft_config=config, callbacks=[callback])
    trainer.train()
    assert_whole_run(ranks_of(callback))
    if kind in NEEDS_A_REFERENCE:
        assert trainer.ref_model is None
    first = {"dpo": ("loss", math.log(2)), "kto": ("loss", 0.5), "grpo": ("kl", 0), "rloo": ("kl", 0)}
    if kind in first:
        name, expected = first[kind]
        assert logged(trainer, name)[0] == pytest.approx(expected, abs=1e-6)
    assert logged(trainer, "rank_phase")[-1] == 2
    assert logged(trainer, "total_rank")[-1] == ranks_of(callback).rank_summary().total_rank
    assert (config.r, config.rank_pattern) == (8, {})  # the caller's own configuration is unchanged
    trainer.save_model(str(tmp_path / "saved"))
    assert_loads_in_peft(trainer.model, tmp_path / "saved", base_for(kind))


@pytest.mark.parametrize("kind", NEEDS_A_REFERENCE)
def test_trl_on_an_adapter_that_goes_on_starts_at_the_policy_that_it_had(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    before = with_lora(task_type="CAUSAL_LM")
    for name, parameter in before.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    before.save_pretrained(tmp_path / "sft")
    model = peft.PeftModel.from_pretrained(llama(), tmp_path / "sft", is_trainable=True)
    callback = rw.AdaptRanks(target_r=2)
    trainer = trl_trainer(kind, tmp_path / "run", model, callbacks=[callback])
    trainer.train()
    assert_whole_run(ranks_of(callback))
    assert trainer.ref_model is None
    if kind in ("dpo", "kto"):
        assert logged(trainer, "loss")[0] == pytest.approx(math.log(2) if kind == "dpo" else 0.5, abs=1e-6)
        assert logged(trainer, "rewards/chosen")[0] == pytest.approx(0, abs=1e-5)
    else:
        assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
    trainer.save_model(str(tmp_path / "saved"))
    assert_loads_in_peft(trainer.model, tmp_path / "saved", llama())
    trainer.model.set_adapter("ref")  # TRL's copy of the initial policy does not change
    assert_loads_in_peft(trainer.model, tmp_path / "saved" / "ref", llama())
    assert_loads_in_peft(trainer.model, tmp_path / "sft", llama())


def test_trl_resumes_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    models = []
    for name in ("whole", "resumed"):
        callback = rw.AdaptRanks(target_r=2, **PHASES)
        trainer = trl_trainer(
            "dpo",
            tmp_path / name,
            peft_config=lora(),
            callbacks=[callback],
            save_strategy="steps",
            save_steps=4,
        )
        checkpoint = str(tmp_path / "whole" / "checkpoint-4") if name == "resumed" else None
        trainer.train(resume_from_checkpoint=checkpoint)
        assert_whole_run(ranks_of(callback))
        models.append(trainer.model)
    assert_same(*models)


# --- Transformers' Trainer ------------------------------------------------------------------------------------------


def rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for batch in token_batches(STEPS) for ids in batch["input_ids"]]


def trainer_for(
    folder: Path, callback: Any, model: Any = None, callbacks: Any = (), metrics: Any = None, **changes: Any
) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(str(folder), **{**ARGUMENTS, **changes})
    return Trainer(
        with_lora() if model is None else model,
        arguments,
        train_dataset=rows(),
        eval_dataset=rows()[:4],
        callbacks=[callback, *callbacks],
        compute_metrics=metrics,
    )


def trainer_for_best(
    folder: Path, callback: Any, score: Callable[[int], float], *more: Any, **changes: Any
) -> Any:
    """A trainer that saves and evaluates at each step, and loads the best checkpoint at the end.

    ``score`` maps the number of the evaluation, from 1, to what the best checkpoint has most of.
    """
    calls = itertools.count(1)
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score"}
    return trainer_for(
        folder, callback, *more, metrics=lambda _: {"score": score(next(calls))}, **every, **best, **changes
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, rw.AdaptRanks, Path]:
    """An undisturbed run with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("whole")
    callback = rw.AdaptRanks(target_r=2, **PHASES)
    trainer = trainer_for(folder, callback, save_strategy="steps", save_steps=1)
    trainer.train()
    assert_whole_run(ranks_of(callback))
    return trainer, callback, folder


@pytest.mark.parametrize("step", [1, 3, 4, 5, 7])
def test_trainer_resumes_bit_for_bit_in_every_phase(step: int, whole: Any, tmp_path: Path) -> None:
    trainer, callback, folder = whole
    again = rw.AdaptRanks(target_r=2, **PHASES)
    resumed = trainer_for(tmp_path, again)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert_same(resumed.model, trainer.model)
    assert ranks_of(again).rank_history == ranks_of(callback).rank_history
    assert ranks_of(again).allocation_state == ranks_of(callback).allocation_state
    losses = logged(trainer, "loss")
    assert logged(resumed, "loss")[-(STEPS - step) :] == losses[step:]


def test_trainer_that_restores_callbacks_from_the_checkpoint_resumes_too(whole: Any, tmp_path: Path) -> None:
    trainer, _, folder = whole
    callback = rw.AdaptRanks(target_r=2, **PHASES)
    resumed = trainer_for(tmp_path, callback, restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert_same(resumed.model, trainer.model)


@pytest.mark.parametrize("steps", [6, 12])
def test_a_run_resumed_with_another_number_of_steps_keeps_its_schedule_and_says_so(
    steps: int, whole: Any, tmp_path: Path
) -> None:
    _, callback, folder = whole
    again = rw.AdaptRanks(target_r=2, **PHASES)
    resumed = trainer_for(tmp_path, again, max_steps=steps)
    with told() as messages:
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    wanted = f"total_step=8, but this Trainer runs {steps} optimizer steps. The run is at step 4 and keeps"
    assert [each for each in messages if wanted in each]
    assert not [each for each in messages if "Leave `total_step` out" in each]
    assert ranks_of(again).allocation_state.step == steps and ranks_of(again).is_over
    assert ranks_of(again).rank_history == ranks_of(callback).rank_history


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_checkpoint_of_every_phase_is_an_adapter_that_peft_loads(step: int, whole: Any) -> None:
    folder = whole[2] / f"checkpoint-{step}"
    model = peft.PeftModel.from_pretrained(llama(), folder)
    config, layer = model.peft_config["default"], model.base_model.model.model.layers[0].self_attn.q_proj
    assert config.r == 4 and layer.scaling["default"] == pytest.approx(config.lora_alpha / 4)
    assert (folder / "rank_history.json").is_file()


def test_a_checkpoint_without_the_state_of_a_run_is_refused(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    plain = TrainingArguments(str(tmp_path), **{**ARGUMENTS, "save_strategy": "steps"}, save_steps=4)
    Trainer(with_lora(), plain, train_dataset=rows()).train()
    trainer = trainer_for(tmp_path, rw.AdaptRanks(target_r=2))
    with pytest.raises(ValueError, match="no state of adaptive ranks"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize(("best", "reached"), [(3, False), (4, True), (6, True), (8, True)])
def test_the_best_checkpoint_comes_back_with_its_own_ranks(best: int, reached: bool, tmp_path: Path) -> None:
    callback = rw.AdaptRanks(target_r=2, **PHASES)
    trainer = trainer_for_best(tmp_path, callback, lambda call: -abs(call - best))
    with told() as messages:
        trainer.train()
    checkpoint = tmp_path / f"checkpoint-{best}"
    assert trainer.state.best_model_checkpoint == str(checkpoint)
    ranks = ranks_of(callback)
    assert ranks.allocation_state.step == best and ranks.is_over == reached
    assert bool([each for each in messages if "finalize_ranks" in each]) == (not reached)
    assert_loads_in_peft(trainer.model, checkpoint, llama())
    trainer.save_model(str(tmp_path / "saved"))
    assert_loads_in_peft(trainer.model, tmp_path / "saved", llama())
    if not reached:
        ranks.finalize_ranks()
        assert ranks.is_over and ranks.allocation_state.reached_target


@pytest.mark.parametrize("others", [(), ("default",)])
def test_the_best_checkpoint_of_an_adapter_with_a_name_comes_back_with_its_values(
    others: tuple[str, ...], tmp_path: Path
) -> None:
    torch.manual_seed(5)
    first, *rest = [*others, "mine"]
    model = peft.get_peft_model(llama(), lora(), adapter_name=first)
    for name in rest:
        model.add_adapter(name, lora())
    model.set_adapter("mine")
    callback = rw.AdaptRanks(target_r=2, **PHASES)
    trainer = trainer_for_best(tmp_path, callback, lambda call: -abs(call - 4), model)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert ranks_of(callback).allocation_state.step == 4
    model.set_adapter("mine")
    assert_loads_in_peft(model, tmp_path / "checkpoint-4" / "mine", llama())


def test_each_of_two_runs_on_one_model_has_its_own_logs_and_its_own_best_values(tmp_path: Path) -> None:
    model = with_lora()
    model.add_adapter("other", lora(r=3))
    for name, target in (("other", 1), ("default", 2)):
        model.set_adapter(name)
        callback = rw.AdaptRanks(target_r=target, **PHASES)
        trainer = trainer_for_best(tmp_path / name, callback, lambda call: -abs(call - 4), model)
        trainer.train()
        history = ranks_of(callback).rank_history.records
        assert logged(trainer, "total_rank")[3] == sum(history[-1].ranks)
        place = tmp_path / name / "checkpoint-4"
        assert_loads_in_peft(model, place if name == "default" else place / name, llama())
        ranks_of(callback).finalize_ranks()


def test_a_best_checkpoint_without_its_ranks_ends_no_run_and_changes_no_factor(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Forget(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            file = Path(state.best_model_checkpoint) / "trainer_state.json"
            kept = json.loads(file.read_text())
            file.write_text(json.dumps({**kept, "stateful_callbacks": {}}))

    callback = rw.AdaptRanks(target_r=2, **PHASES)
    trainer = trainer_for_best(tmp_path, Forget(), lambda call: -abs(call - 4), callbacks=[callback])
    with told() as messages:
        trainer.train()
    assert [each for each in messages if "not the ranks that it had" in each]
    factors = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    for name, value in factors.items():
        own = name.replace(".weight", ".default.weight")
        assert torch.equal(trainer.model.get_parameter(own), value)


@contextlib.contextmanager
def memory_that_runs_out(trainer: Any, at: int) -> Iterator[list[int]]:
    """Let the first attempt fail in step ``at``, as on a GPU that is too small. Yields the batch sizes."""
    sizes: list[int] = []
    step = trainer.training_step

    def training_step(model: Any, inputs: Any, *rest: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if len(sizes) == at:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(model, inputs, *rest)

    trainer.training_step = training_step
    yield sizes


@pytest.mark.parametrize("at", [1, 4, 7], ids=["at once", "while pruning", "in the final phase"])
@pytest.mark.parametrize("layers", ["PEFT's", "rankwise's"])
def test_an_attempt_with_too_large_a_batch_does_not_count(at: int, layers: str, tmp_path: Path) -> None:
    callback: Any = rw.AdaptRanks(target_r=2)
    model, callbacks = None, [callback]
    if layers == "rankwise's":
        torch.manual_seed(5)
        model = rw.get_peft_model(llama(), rw.AdaLoraConfig(init_r=4, target_r=2, target_modules=TARGETS))
        from transformers import TrainerCallback

        callbacks = [TrainerCallback()]
    trainer = trainer_for(
        tmp_path, callbacks[0], model, auto_find_batch_size=True, max_steps=-1, num_train_epochs=1
    )
    with memory_that_runs_out(trainer, at) as sizes, told() as messages:
        trainer.train()
    run = model or ranks_of(callback)
    state = run.allocation_state
    assert max(sizes) > sizes[-1] and trainer.state.max_steps > STEPS
    assert (state.step, state.total_step) == (trainer.state.max_steps, trainer.state.max_steps)
    assert state.reached_target
    assert not [each for each in messages if "total_step" in each or "goes on" in each]
    steps = [record.step for record in run.rank_history.records]
    assert steps == sorted(set(steps)) and steps[0] == 0
    if layers == "PEFT's":
        assert ranks_of(callback).is_over
        trainer.save_model(str(tmp_path / "saved"))
        assert_loads_in_peft(trainer.model, tmp_path / "saved", llama())


def test_a_run_that_stops_early_says_how_to_finish_it(tmp_path: Path) -> None:
    from transformers import EarlyStoppingCallback

    callback = rw.AdaptRanks(target_r=2, **PHASES)
    trainer = trainer_for_best(tmp_path, callback, lambda call: 0.0, callbacks=[EarlyStoppingCallback(2)])
    with told() as messages:
        trainer.train()
    assert trainer.state.global_step < 5
    (message,) = [each for each in messages if "budget" in each]
    assert "`callback.ranks.finalize_ranks()`" in message and "model.finalize_ranks" not in message
    assert not ranks_of(callback).is_over
    ranks_of(callback).finalize_ranks()
    assert ranks_of(callback).is_over and ranks_of(callback).allocation_state.reached_target
    trainer.save_model(str(tmp_path / "saved"))
    assert_loads_in_peft(trainer.model, tmp_path / "saved", llama())


def test_a_run_of_a_command_that_stops_early_is_saved_and_the_message_names_a_command(tmp_path: Path) -> None:
    from transformers import EarlyStoppingCallback, TrainerCallback

    from rankwise.integrations.ms_swift import AdaptRanks

    stop = EarlyStoppingCallback(2)
    trainer = trainer_for_best(tmp_path, TrainerCallback(), lambda call: 0.0, callbacks=[stop])
    trainer.add_callback(AdaptRanks.for_trainer(trainer, target_r=2, **PHASES))
    with told() as messages:
        trainer.train()
    (message,) = [each for each in messages if "budget" in each]
    assert "`rankwise compress ADAPTER --rank 2 -o OUT`" in message and "callback" not in message
    assert_loads_in_peft(trainer.model, tmp_path, llama())


def test_accumulated_steps_count_once(tmp_path: Path) -> None:
    callback = rw.AdaptRanks(target_r=2, **PHASES)
    trainer = trainer_for(tmp_path, callback, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    trainer.train()
    assert_whole_run(ranks_of(callback))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_both_kinds_is_the_same_run(
    reentrant: bool, whole: Any, tmp_path: Path
) -> None:
    callback = rw.AdaptRanks(target_r=2, **PHASES)
    options = {"use_reentrant": reentrant}
    trainer = trainer_for(
        tmp_path, callback, gradient_checkpointing=True, gradient_checkpointing_kwargs=options
    )
    trainer.train()
    assert ranks_of(callback).rank_history == ranks_of(whole[1]).rank_history
    for name, value in trained(whole[0].model).items():
        torch.testing.assert_close(trained(trainer.model)[name], value, rtol=1e-4, atol=1e-6)


def test_resuming_after_the_layers_were_narrowed_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    callback = rw.AdaptRanks(target_r=2, **PHASES)
    trainer = trainer_for(tmp_path, callback, save_strategy="steps", save_steps=4)
    trainer.train()
    with pytest.raises(ValueError, match=r"narrowed when the run ended.*attach the adapter anew"):
        trainer.train(resume_from_checkpoint=True)


def test_training_once_more_is_plain_lora_with_a_warning(tmp_path: Path) -> None:
    callback = rw.AdaptRanks(target_r=2, **PHASES)
    trainer = trainer_for(tmp_path, callback)
    trainer.train()
    ranks = ranks_of(callback).rank_summary()
    before = {name: value.clone() for name, value in trained(trainer.model).items()}
    with told() as messages:
        trainer.train()
    assert [each for each in messages if "ranks stay as they are" in each]
    after = trained(trainer.model)
    assert {name: value.shape for name, value in after.items()} == {n: v.shape for n, v in before.items()}
    assert not any(torch.equal(value, before[name]) for name, value in after.items())
    assert ranks_of(callback).rank_summary() == ranks


def test_a_new_trainer_with_a_new_callback_adapts_the_narrowed_adapter_further(tmp_path: Path) -> None:
    first, second = rw.AdaptRanks(target_r=2), rw.AdaptRanks(target_r=1)
    trainer = trainer_for(tmp_path, first)
    trainer.train()
    trainer_for(tmp_path, second, trainer.model).train()
    assert_whole_run(ranks_of(second))
    assert ranks_of(second).allocation_state.initial == ranks_of(first).rank_summary().total_rank
    trainer.model.save_pretrained(tmp_path / "saved")
    assert_loads_in_peft(trainer.model, tmp_path / "saved", llama())


def stopped_early(folder: Path, target_r: float | None = 2) -> tuple[Any, rw.AdaptRanks]:
    """A trainer that stopped before the last cut, and its callback."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            control.should_training_stop = state.global_step == 3

    callback = rw.AdaptRanks(target_r=target_r, **PHASES)
    trainer = trainer_for(folder, callback, callbacks=[Stop()])
    with pytest.warns(UserWarning, match="finalize_ranks"):
        trainer.train()
    assert not ranks_of(callback).is_over
    return trainer, callback


@pytest.mark.parametrize("changes", [{"target_r": 1}, {"tinit": 0}, {"tfinal": None}, {"deltaT": 2}], ids=str)
def test_a_new_callback_with_other_settings_is_not_ignored_while_a_run_has_not_ended(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    trainer, first = stopped_early(tmp_path)
    before = {name: value.clone() for name, value in trained(trainer.model).items()}
    settings = {"target_r": 2, **PHASES, **changes}
    with pytest.raises(ValueError, match="adapt already, in a run that has not ended and has other settings"):
        trainer_for(tmp_path, rw.AdaptRanks(**settings), trainer.model)
    assert all(torch.equal(before[name], value) for name, value in trained(trainer.model).items())
    ranks_of(first).finalize_ranks()
    again = rw.AdaptRanks(target_r=1)
    trainer_for(tmp_path, again, trainer.model).train()
    assert ranks_of(again) is not ranks_of(first) and ranks_of(again).is_over


def test_a_new_callback_with_the_same_settings_continues_a_run_that_has_not_ended(tmp_path: Path) -> None:
    trainer, first = stopped_early(tmp_path, target_r=None)
    again = rw.AdaptRanks(target_r=2, **PHASES)
    trainer_for(tmp_path, again, trainer.model).train()
    assert ranks_of(again) is ranks_of(first) and ranks_of(again).is_over


def test_a_callback_adapts_the_active_adapter_and_not_another_whose_run_has_not_ended(tmp_path: Path) -> None:
    trainer, first = stopped_early(tmp_path)
    trainer.model.add_adapter("other", lora())
    trainer.model.set_adapter("other")
    step = ranks_of(first).allocation_state.step
    callback = rw.AdaptRanks(target_r=1)
    trainer_for(tmp_path, callback, trainer.model).train()
    assert ranks_of(callback).adapter == "other" and ranks_of(callback).is_over
    assert ranks_of(first).allocation_state.step == step and not ranks_of(first).is_over


@pytest.mark.parametrize("whole", [None, ["lm_head"]], ids=str)
def test_an_adapter_that_is_frozen_is_named_when_training_begins(
    whole: list[str] | None, tmp_path: Path
) -> None:
    with_lora(task_type="CAUSAL_LM", modules_to_save=whole).save_pretrained(tmp_path / "own")
    model = peft.PeftModel.from_pretrained(llama(), tmp_path / "own")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".modules_to_save." in name)
    with pytest.raises(ValueError, match=r"'default' is frozen.*is_trainable=True"):
        trainer_for(tmp_path, rw.AdaptRanks(target_r=2), model).train()
    model = peft.PeftModel.from_pretrained(llama(), tmp_path / "own", is_trainable=True)
    callback = rw.AdaptRanks(target_r=2)
    trainer_for(tmp_path, callback, model).train()
    assert ranks_of(callback).is_over


def test_a_run_that_is_detached_while_it_trains_goes_on_as_plain_lora(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Detach(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            if state.global_step == 4:
                ranks_of(callback).detach()

    callback = rw.AdaptRanks(target_r=2, **PHASES)
    trainer = trainer_for(tmp_path, callback, callbacks=[Detach()], save_strategy="steps", save_steps=2)
    trainer.train()
    assert ranks_of(callback).allocation_state.step == 4
    assert peft.PeftConfig.from_pretrained(tmp_path / f"checkpoint-{STEPS}").r == 4


def test_every_trial_of_a_search_is_a_run_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    from transformers import Trainer, TrainingArguments

    callback, ended = rw.AdaptRanks(target_r=2), []

    def objective(metrics: dict[str, float]) -> float:
        ended.append(ranks_of(callback))
        return metrics["eval_loss"]

    trainer = Trainer(
        args=TrainingArguments(str(tmp_path), **ARGUMENTS, eval_strategy="steps", eval_steps=STEPS),
        model_init=lambda trial=None: with_lora(), train_dataset=rows(), eval_dataset=rows()[:4],
        callbacks=[callback],
    )  # fmt: skip
    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)},
        compute_objective=objective, n_trials=2, backend="optuna",
    )  # fmt: skip
    final = {id(each) for each in ended}
    assert len(final) == 2
    for each in ended:
        assert each.allocation_state.step == STEPS


def test_a_target_above_the_adapters_rank_is_refused_when_the_trainer_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`target_r`=6 is greater than the adapter's rank"):
        trainer_for(tmp_path, rw.AdaptRanks(target_r=6))


# --- sentence-transformers ------------------------------------------------------------------------------------------


def test_sentence_transformers_with_an_adapter_of_its_own(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers.losses import CosineSimilarityLoss
    from sentence_transformers.models import Pooling, Transformer

    bert().bert.save_pretrained(tmp_path / "base")
    words_tokenizer().save_pretrained(tmp_path / "base")
    transformer = Transformer(str(tmp_path / "base"))
    pooling = Pooling(transformer.get_word_embedding_dimension())
    model = library.SentenceTransformer(modules=[transformer, pooling], device="cpu")
    model.add_adapter(lora(target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"))
    callback = rw.AdaptRanks(target_r=2)
    pairs = {"one": WORDS * 2, "other": WORDS[::-1] * 2, "score": [i % 3 / 2 for i in range(2 * len(WORDS))]}
    arguments = library.SentenceTransformerTrainingArguments(str(tmp_path / "run"), **ARGUMENTS)
    library.SentenceTransformerTrainer(
        model, arguments, Dataset.from_dict(pairs), loss=CosineSimilarityLoss(model), callbacks=[callback]
    ).train()
    assert_whole_run(ranks_of(callback))
    model.save_pretrained(str(tmp_path / "saved"))
    plain = library.SentenceTransformer(str(tmp_path / "base"), device="cpu")
    loaded = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    expected = torch.tensor(model.encode(WORDS))
    torch.testing.assert_close(torch.tensor(loaded.encode(WORDS)), expected)
    assert not torch.allclose(torch.tensor(plain.encode(WORDS)), expected)


# --- Lightning ------------------------------------------------------------------------------------------------------


def lightning_task(lightning: Any, model: nn.Module) -> Any:
    class Task(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    return Task()


def lightning_trainer(lightning: Any, folder: Path, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(
        accelerator="cpu", default_root_dir=str(folder), **quiet,
        **{"max_epochs": 1, "enable_checkpointing": False, **options},
    )  # fmt: skip


def lightning_data(count: int = 4 * STEPS) -> Any:
    return torch.utils.data.DataLoader(rows()[:count], batch_size=4)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_fills_in_the_length_and_narrows_in_the_end(package: str, tmp_path: Path) -> None:
    lightning = pytest.importorskip(package)
    model = with_lora()
    ranks = rw.adapt_ranks(model, target_r=2)
    lightning_trainer(lightning, tmp_path).fit(lightning_task(lightning, model), lightning_data())
    assert_whole_run(ranks)
    model.save_pretrained(tmp_path / "saved")
    assert_loads_in_peft(model, tmp_path / "saved", llama())


@pytest.mark.parametrize("at", [1, 4, 6])
def test_lightning_resumes_bit_for_bit_from_its_own_checkpoint(at: int, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    models = []
    for first in (True, False):
        models.append(with_lora())
        ranks = rw.adapt_ranks(models[-1], target_r=2, **PHASES)
        saver = lightning.callbacks.ModelCheckpoint(
            str(tmp_path), filename="{step}", every_n_epochs=1, save_top_k=-1
        )
        options: Any = {"callbacks": [saver], "enable_checkpointing": True} if first else {}
        checkpoint = None if first else str(tmp_path / f"step={at}.ckpt")
        lightning_trainer(lightning, tmp_path, max_epochs=STEPS, **options).fit(  # an epoch has one step
            lightning_task(lightning, models[-1]), lightning_data(4), ckpt_path=checkpoint
        )
        assert_whole_run(ranks)
    assert_same(*models)


# --- Accelerate, and a plain loop -----------------------------------------------------------------------------------


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def test_accelerate_accumulates_clips_saves_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")

    def run(first: int, save_at: int | None = None) -> Any:
        accelerator = fresh_accelerator(gradient_accumulation_steps=2)
        model = with_lora()
        ranks = rw.adapt_ranks(model, target_r=2, total_step=STEPS, **PHASES)
        accelerator.register_for_checkpointing(ranks)
        data = torch.utils.data.DataLoader(rows() * 2, batch_size=4)
        model, optimizer, data = accelerator.prepare(model, optimizer_for(model), data)
        if first:
            accelerator.load_state(str(tmp_path / "state"))
        for number, batch in enumerate(data):
            if number < first:
                continue
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if number + 1 == save_at:
                accelerator.save_state(str(tmp_path / "state"))
        assert_whole_run(ranks)
        return model

    assert_same(run(0, save_at=8), run(8))


def test_a_step_that_a_gradient_scaler_skips_does_not_count() -> None:
    model = with_lora(llama().half())
    ranks = rw.adapt_ranks(model, target_r=2, total_step=STEPS, **PHASES)
    optimizer, scaler = optimizer_for(model), torch.amp.GradScaler("cpu", init_scale=128.0)
    batches, taken = token_batches(STEPS + 2), 0
    for number, batch in enumerate(batches):
        loss = model(**batch).loss
        if number in (0, 4):
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        taken += number not in (0, 4)
        assert ranks.allocation_state.step == taken
    assert_whole_run(ranks)


@pytest.mark.parametrize("weights_first", [True, False])
@pytest.mark.parametrize("at", [1, 4, 6])
def test_a_plain_loop_goes_on_bit_for_bit_from_its_own_checkpoint(
    at: int, weights_first: bool, tmp_path: Path
) -> None:
    batches = token_batches(STEPS)

    def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            model(**batches[step]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    whole = with_lora()
    ranks = rw.adapt_ranks(whole, target_r=2, total_step=STEPS, **PHASES)
    optimizer = optimizer_for(whole)
    train(whole, optimizer, range(at))
    whole.save_pretrained(tmp_path / "adapter")
    states = {"ranks": ranks.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(states, tmp_path / "run.pt")
    train(whole, optimizer, range(at, STEPS))
    assert_whole_run(ranks)

    states = torch.load(tmp_path / "run.pt")
    resumed = with_lora()
    if weights_first:
        resumed.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    again = rw.adapt_ranks(resumed, target_r=2, total_step=STEPS, **PHASES)
    if not weights_first:
        resumed.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    again.load_state_dict(states["ranks"])
    optimizer = optimizer_for(resumed)
    optimizer.load_state_dict(states["optimizer"])
    train(resumed, optimizer, range(at, STEPS))
    assert_same(resumed, whole)
    assert again.rank_history == ranks.rank_history
