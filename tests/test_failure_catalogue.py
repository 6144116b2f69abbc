"""Failures of adaptive-rank fine-tuning with Hugging Face PEFT, row by row, and tests that they can't happen here.

Every test is named after the failure that users of PEFT's AdaLoRA saw. `docs/what-cant-go-wrong.md` describes them for
users. Some rows are tested elsewhere:

- gradient checkpointing with several processes, ``Expected to mark a variable ready only once``:
  `test_distributed.py`;
- an AdaLoRA adapter that no server accepts: `test_export_lora.py`;
- parts of a configuration that select nothing: `test_selectors.py`; new heads that stay frozen: `test_new_heads.py`;
- options that are misspelt or ignored, notebook cells that are run again: `test_options.py`;
- ``adapter_names`` that is ignored: `test_rows.py`; frozen adapters and early optimizers: `test_untrained.py`;
- PEFT's own functions on a model with rankwise's layers: `test_states.py`.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import rankwise as rw
import rankwise.report
from rankwise.attach.attachment import adapter_layers
from tiny import bert, llama, token_batches, told

STEPS, TARGETS = 10, ["q_proj", "v_proj", "down_proj"]


def config(**changes: Any) -> rw.AdaLoraConfig:
    """Ten steps: two of warm-up, then pruning up to step 7."""
    options = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": STEPS}
    return rw.AdaLoraConfig(**{**options, "target_modules": TARGETS, **changes})


def adapted(base: nn.Module | None = None, **changes: Any) -> Any:
    model = llama() if base is None else base
    torch.manual_seed(1)
    return rw.get_peft_model(model, changes.pop("whole", None) or config(**changes))


def optimizer_for(model: nn.Module, rate: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0)


def train(model: Any, steps: int = STEPS, rate: float = 1e-2) -> Any:
    """A plain loop without any code for ranks."""
    optimizer = optimizer_for(model, rate)
    for batch in token_batches(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def total_rank(model: Any) -> int:
    return int(model.rank_summary().total_rank)


def meets_its_budget(model: Any, target_r: int = 2) -> bool:
    """Whether the adapter has no more parameters than LoRA of rank ``target_r``, and no room for another rank."""
    layers = adapter_layers(model).values()
    costs = [layer.lora_A["default"].shape[1] + layer.lora_B["default"].shape[0] for layer in layers]
    ranks = [row.rank for row in model.rank_summary().layers]
    left = target_r * sum(costs) - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    return 0 <= left < max(costs)


def trainer_for(model: nn.Module, folder: Path, callbacks: Any = (), **changes: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2, "report_to": "none", "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "logging_steps": 2, "seed": 3,
    }  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for batch in token_batches(12) for ids in batch["input_ids"]]
    arguments = TrainingArguments(str(folder), **{**settings, **changes})
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8], callbacks=list(callbacks))


# --- kthvalue(): selected number k out of range for dimension 0 ----------------------------------------------------

WHISPER_RUN = {"init_r": 96, "target_r": 64, "total_step": 13500, "target_modules": ["q_proj", "v_proj"]}


def tiny_whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 32, "d_model": 16, "num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 8,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    }  # fmt: skip
    parts = {
        f"{part}_{what}": size
        for part in ("encoder", "decoder")
        for what, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
    }
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, **parts))


def speech(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_features": torch.randn(2, 8, 12, generator=generator),
        "labels": torch.randint(3, 32, (2, 6), generator=generator),
    }


def test_kthvalue_crash_at_step_2500_is_refused_when_the_configuration_is_made() -> None:
    with pytest.raises(ValueError, match="leaves no step for pruning") as refusal:
        rw.AdaLoraConfig(tinit=6000, tfinal=11000, **WHISPER_RUN)
    message = str(refusal.value)
    assert "tinit=6000 must be less than total_step - tfinal = 13500 - 11000 = 2500" in message
    nearest = message.split("Nearest that works: ")[1].rstrip(".")
    numbers = {name: int(value) for name, value in (pair.split("=") for pair in nearest.split(", "))}
    assert rw.AdaLoraConfig(**{**WHISPER_RUN, **numbers}).resolved_schedule().total_step == 13500


def test_kthvalue_crash_at_step_2500_does_not_come_with_a_schedule_that_fits() -> None:
    model = adapted(tiny_whisper(), **{**WHISPER_RUN, "init_r": 6, "target_r": 4}, tinit=2000, tfinal=10000)
    optimizer = optimizer_for(model)
    budgets = {}
    for step in (1, 2000, 2001, 2500, 3000, 3500, 3501, 13500):
        model(**speech(step)).loss.backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
        budgets[step] = model.allocation_state.budget
    assert budgets[2000] == 36 and budgets[3500] == budgets[13500] == 24
    assert list(budgets.values()) == sorted(budgets.values(), reverse=True)
    assert total_rank(model) == 24


@pytest.mark.parametrize(("tinit", "tfinal"), [(0.1, 0.3), (1, 4), (0.2, 3)])
def test_kthvalue_crash_because_the_schedule_was_made_for_another_number_of_steps(
    tinit: float, tfinal: float, tmp_path: Path
) -> None:
    model = adapted(tinit=tinit, tfinal=tfinal, total_step=None)
    trainer_for(model, tmp_path).train()
    assert model.allocation_state.total_step == STEPS
    assert meets_its_budget(model) and model.allocation_state.phase == "final"


def test_kthvalue_crash_in_a_trainer_too_short_for_the_schedule_is_refused_before_the_first_step(
    tmp_path: Path,
) -> None:
    model = adapted(tinit=200, tfinal=500, total_step=None)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"tinit=200 must be less than total_step - tfinal = 10 - 500"):
        trainer_for(model, tmp_path).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_kthvalue_crash_with_init_r_equal_to_target_r_is_a_run_of_fixed_ranks(tmp_path: Path) -> None:
    model = train(adapted(init_r=4, target_r=4))
    assert {row.rank for row in model.rank_summary().layers} == {4}
    assert len(model.rank_history.records) == 1
    model.save_pretrained(tmp_path)
    loaded = rw.PeftModel.from_pretrained(llama(), tmp_path)
    batch = token_batches(1)[0]
    torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize(("init_r", "target_r"), [(8, 12), (1, 2)])
def test_kthvalue_crash_with_target_r_above_init_r_is_refused(init_r: int, target_r: int) -> None:
    with pytest.raises(ValueError, match=f"`target_r`={target_r} is greater than `init_r`={init_r}"):
        rw.AdaLoraConfig(init_r=init_r, target_r=target_r)


# --- r should be a positive integer value but the value passed is 0 ------------------------------------------------


@pytest.fixture(scope="module")
def with_rank_0() -> Any:
    """A run in which some layers don't matter: from 6 ranks at the start to an average of 1 at the end."""
    model = train(adapted(init_r=6, target_r=1, target_modules="all-linear"), rate=3e-2)
    ranks = [row.rank for row in model.rank_summary().layers]
    assert 0 in ranks and max(ranks) > 1, "some layers should end at rank 0, or the tests show nothing"
    return model


def paths_at_rank_0(model: Any) -> list[str]:
    return [row.path for row in model.rank_summary().layers if row.rank == 0]


def test_r_should_be_positive_but_is_0_when_an_adapter_is_loaded(with_rank_0: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with_rank_0.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    path = paths_at_rank_0(with_rank_0)[0]
    base = with_rank_0.get_submodule(path)
    assert isinstance(base, torch.nn.Linear)
    assert tensors and not any(f".{path}." in name for name in tensors), "a rank of 0 is in no file"
    assert path not in json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    batch = token_batches(1)[0]
    expected = copy.deepcopy(with_rank_0).eval()(**batch).logits
    for reader in (rw, peft):
        loaded = reader.PeftModel.from_pretrained(llama(), tmp_path).eval()
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loaded.merge_and_unload()(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_r_should_be_positive_but_is_0_while_training_goes_on(with_rank_0: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(with_rank_0)
    paths = paths_at_rank_0(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training deliberately goes past the last step
        train(model, steps=2)
    assert paths_at_rank_0(model) == paths
    model.save_pretrained(tmp_path)
    on = rw.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert math.isfinite(float(on(**token_batches(1)[0]).loss.detach()))


def test_a_layer_at_rank_0_costs_nothing_to_run_and_the_report_shows_it(with_rank_0: Any) -> None:
    layer = with_rank_0.get_submodule(paths_at_rank_0(with_rank_0)[0])
    x = torch.randn(2, layer.in_features, requires_grad=True)
    output = layer(x)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(output, plain)
    assert type(output.grad_fn) is type(plain.grad_fn), "nothing of the adapter is in the graph"
    rows = [row for row in str(with_rank_0.rank_summary()).splitlines() if " 0/6 " in row]
    assert len(rows) == len(paths_at_rank_0(with_rank_0))
    assert f"{len(rows)} layers at rank 0" in str(with_rank_0.rank_summary())


# --- r=16 has no effect; misspelt fields are ignored ---------------------------------------------------------------


def test_r_16_in_adaloraconfig_has_no_effect_and_is_reported_with_the_setting_to_use() -> None:
    with pytest.warns(UserWarning, match=r"`r=16` has no effect.*set target_r=16 and init_r=32"):
        made = rw.AdaLoraConfig(r=16, init_r=12, target_r=8)
    assert (made.init_r, made.target_r) == (12, 8)


@pytest.mark.parametrize(
    ("field", "meant"),
    [("delta_r", "deltaT"), ("delta_t", "deltaT"), ("t_init", "tinit"), ("total_steps", "total_step")],
)
def test_a_misspelt_field_has_no_effect_is_an_error_that_names_the_real_one(field: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"no field `{field}`. Did you mean `{meant}`"):
        rw.AdaLoraConfig(**{field: 10})


# --- unsupported operand type(s) for *: 'Parameter' and 'NoneType' -------------------------------------------------


def classify(model: Any, steps: int = STEPS) -> Any:
    optimizer = optimizer_for(model)
    for batch in token_batches(steps):
        model(input_ids=batch["input_ids"], labels=batch["labels"][:, 0] % 3).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def tiny_roberta() -> nn.Module:
    """The head has a layer named ``dense``, and so has the encoder."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "num_labels": 3,
    }  # fmt: skip
    return RobertaForSequenceClassification(RobertaConfig(**sizes))


def test_unsupported_operand_parameter_and_nonetype_with_a_classification_head() -> None:
    pristine = tiny_roberta().state_dict()
    model = adapted(tiny_roberta(), target_modules=["query", "value", "dense"], task_type="SEQ_CLS")
    classify(model)
    assert model.allocation_state.reached_target
    assert not [row.path for row in model.rank_summary().layers if row.path.startswith("classifier")]
    inside = [name for name, _ in model.named_parameters() if name.startswith("classifier.")]
    assert not [name for name in inside if "lora" in name], "a copy that trains is not adapted as well"
    for name, value in model.state_dict().items():
        if name.startswith("classifier.modules_to_save.default."):
            own = name.removeprefix("classifier.modules_to_save.default.")
            assert not torch.equal(value, pristine[f"classifier.{own}"]), "the head trains"
            assert torch.equal(model.state_dict()[f"classifier.{own}"], pristine[f"classifier.{own}"])


def test_unsupported_operand_parameter_and_nonetype_with_frozen_adapter_parameters() -> None:
    model = adapted(bert(), target_modules=["query", "value"], task_type="SEQ_CLS")
    frozen = [p for name, p in model.named_parameters() if ".layer.0." in name and ".lora_" in name]
    before = [parameter.requires_grad_(False).clone() for parameter in frozen]
    with told() as messages:
        classify(model)
    assert all(torch.equal(one, other) for one, other in zip(before, frozen, strict=True))
    ranks = {row.path: row.rank for row in model.rank_summary().layers}
    assert [rank for path, rank in ranks.items() if ".layer.0." in path] == [4, 4]
    assert sum(rank for path, rank in ranks.items() if ".layer.1." in path) == 2 * 2
    assert not messages


def test_unsupported_operand_parameter_and_nonetype_with_layers_that_a_step_does_not_use() -> None:
    from transformers.modeling_outputs import BaseModelOutput

    model = adapted(tiny_whisper(), target_modules=["q_proj", "v_proj"])
    optimizer = optimizer_for(model)
    with told() as messages:
        for step in range(1, STEPS + 1):
            batch = speech(step)
            if step % 2:  # as if encoder outputs were computed once and cached
                hidden = BaseModelOutput(
                    model.model.encoder(batch.pop("input_features")).last_hidden_state.detach()
                )
                batch["encoder_outputs"] = hidden
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert meets_its_budget(model)
    assert model.allocation_state.step == STEPS and not messages


# --- AdaLoRA silently trains as plain LoRA: no rank ever changes ---------------------------------------------------


def assert_ranks_were_found(model: Any) -> None:
    ranks = {row.rank for row in model.rank_summary().layers}
    assert meets_its_budget(model)
    assert len(ranks) > 1, "ranks should differ, or the test shows nothing"
    assert [record.step for record in model.rank_history.records] == [0, 3, 4, 5, 6, 7]


def test_no_rank_ever_changes_because_a_plain_loop_never_calls_update_and_allocate() -> None:
    assert_ranks_were_found(train(adapted()))


def test_no_rank_ever_changes_because_the_trainer_never_calls_update_and_allocate(tmp_path: Path) -> None:
    model = adapted()
    trainer_for(model, tmp_path).train()
    assert_ranks_were_found(model)


def test_no_rank_ever_changes_because_a_seq2seq_trainer_on_whisper_never_calls_update_and_allocate(
    tmp_path: Path,
) -> None:
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    model = adapted(tiny_whisper(), target_modules=["q_proj", "k_proj", "v_proj"])
    data = [{name: value[0] for name, value in speech(seed).items()} for seed in range(8)]
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    Seq2SeqTrainer(model, arguments, train_dataset=data).train()
    assert_ranks_were_found(model)


def test_no_rank_ever_changes_because_accelerate_never_calls_update_and_allocate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = adapted()
    prepared, optimizer = accelerator.prepare(model, optimizer_for(model))
    for batch in token_batches(STEPS):
        accelerator.backward(prepared(**batch).loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert_ranks_were_found(model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_no_rank_ever_changes_because_sentence_transformers_never_calls_update_and_allocate(
    tmp_path: Path,
) -> None:
    library = pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers.losses import CosineSimilarityLoss
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertTokenizerFast

    words = "a cat sat on the mat while dogs ran far away".split()
    bert().bert.save_pretrained(tmp_path / "base")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(tmp_path / "base")
    transformer = Transformer(str(tmp_path / "base"))
    adapted(transformer.auto_model, target_modules=["query", "value", "dense"])
    pooling = Pooling(transformer.get_word_embedding_dimension())
    model = library.SentenceTransformer(modules=[transformer, pooling], device="cpu")
    pairs = {"one": words * 2, "other": words[::-1] * 2, "score": [i % 3 / 2 for i in range(2 * len(words))]}
    arguments = library.SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_dict(pairs)
    library.SentenceTransformerTrainer(model, arguments, data, loss=CosineSimilarityLoss(model)).train()
    assert_ranks_were_found(transformer.auto_model)


# --- all scores tie, and every rank of every layer is pruned -------------------------------------------------------


def test_every_rank_of_every_layer_is_pruned_when_all_scores_tie() -> None:
    model, again = (train(adapted(orth_reg_weight=0), rate=0.0) for _ in range(2))
    assert not any(row.importance for row in model.rank_summary().layers)
    assert [row.rank for row in model.rank_summary().layers] == [2] * 6
    assert all(sum(record.ranks) == record.budget for record in model.rank_history.records)
    assert torch.equal(model.rankwise_mask, again.rankwise_mask)


# --- one NaN gradient, and no rank is pruned for the rest of the run -----------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_nan_gradient_and_no_rank_is_pruned_for_the_rest_of_the_run(value: float) -> None:
    model = adapted()
    optimizer = optimizer_for(model)
    with told() as messages:
        for step, batch in enumerate(token_batches(STEPS), 1):
            before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
            model(**batch).loss.backward()
            if step == 1:  # before the first cut: weights restored after a cut would switch ranks on again
                next(p for name, p in model.named_parameters() if "lora_B" in name).grad.fill_(value)
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:  # the weights are restored, as by a person who watches over the run
                for name, parameter in model.named_parameters():
                    parameter.data.copy_(before[0][name])
                optimizer.load_state_dict(before[1])
    assert meets_its_budget(model)
    assert [record.budget for record in model.rank_history.records][-1] == 12
    assert model.allocation_state.skipped_steps == 1
    (message,) = messages
    assert "Step 1" in message and "NaN or infinite" in message and "skipped_steps" in message


# --- training ends early, and the saved adapter is half pruned -----------------------------------------------------


def test_training_ends_at_20_of_100_steps_and_the_saved_adapter_is_reported_and_finished_by_one_call(
    tmp_path: Path,
) -> None:
    model = train(adapted(total_step=100, tinit=10, tfinal=30), steps=20)
    with told() as messages:
        model.save_pretrained(tmp_path / "early")
    (message,) = messages
    assert f"At step 20 the budget is {model.allocation_state.budget} ranks; its target is 12" in message
    assert "step 70" in message and "`model.finalize_ranks()`" in message

    model.finalize_ranks()
    with told() as messages:
        model.save_pretrained(tmp_path / "final")
    assert not messages
    saved = json.loads((tmp_path / "final" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "final" / "adapter_model.safetensors")
    ranks = [len(value) for name, value in tensors.items() if name.endswith("lora_A.weight")]
    assert sum(ranks) == total_rank(model) and max(ranks) == saved["r"]
    peft = pytest.importorskip("peft")
    batch = token_batches(1)[0]
    for reader in (rw, peft):
        loaded = reader.PeftModel.from_pretrained(llama(), tmp_path / "final").eval()
        torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits, rtol=1e-4, atol=1e-4)


# --- training goes on past total_step ------------------------------------------------------------------------------


def test_training_goes_on_past_total_step_and_the_ranks_stay(tmp_path: Path) -> None:
    model = adapted()
    with told() as messages:
        train(model, steps=STEPS + 5)
    about = [message for message in messages if "past total_step=10" in message]
    assert about == messages and len(about) == 1
    assert meets_its_budget(model) and [record.step for record in model.rank_history.records][-1] == 7


# --- the loss is too high by the penalty, or the penalty is not there ----------------------------------------------


def true_loss(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Cross-entropy of the next token, from the logits alone."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    wanted = batch["input_ids"][:, 1:]
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()).detach())


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_the_loss_is_too_high_by_the_penalty(task_type: str | None, tmp_path: Path) -> None:
    model = adapted(task_type=task_type, orth_reg_weight=0.5)
    batch = token_batches(1)[0]
    assert float(model.orthogonal_penalty()) > 1
    for training in (True, False):
        model.train(training)
        assert float(model(**batch).loss.detach()) == pytest.approx(true_loss(model, batch), rel=1e-5)
    trainer = trainer_for(model, tmp_path)
    shown = trainer.evaluate()["eval_loss"]
    data = {"input_ids": torch.stack([row["input_ids"] for row in trainer.eval_dataset])}
    assert shown == pytest.approx(true_loss(model, data), rel=1e-4)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["orth_penalty"] > 1 for entry in logged), "its value is a metric of its own"
    assert logged[0]["loss"] < true_loss(adapted(), data) + 0.5 * logged[0]["orth_penalty"]


def test_the_penalty_is_silently_never_applied_when_task_type_is_not_given() -> None:
    penalties, weights = {}, {}
    for task_type in (None, "CAUSAL_LM"):
        for weight in (0.0, 0.5):
            model = train(adapted(task_type=task_type, orth_reg_weight=weight, init_lora_weights=True))
            penalties[task_type, weight] = float(model.orthogonal_penalty())
            weights[task_type, weight] = model.model.layers[0].self_attn.q_proj.lora_A["default"]
    assert penalties[None, 0.5] < 0.9 * penalties[None, 0.0]
    for weight in (0.0, 0.5):
        assert torch.equal(weights[None, weight], weights["CAUSAL_LM", weight])


def test_the_penalty_acts_the_same_whichever_way_the_model_is_called() -> None:
    def called(model: Any, way: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if way == "model":
            return model(**batch).loss
        if way == "base model":
            return model.get_base_model()(**batch).loss
        hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state
        return model.loss_function(
            logits=model.lm_head(hidden), labels=batch["labels"], vocab_size=model.config.vocab_size
        )

    results = []
    for way in ("model", "base model", "its parts"):
        model = adapted()
        optimizer = optimizer_for(model)
        for batch in token_batches(4):
            called(model, way, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append({name: value for name, value in model.state_dict().items() if "lora_A" in name})
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value)


def test_no_attribute_trainable_adapter_name_when_a_loaded_adapter_is_evaluated_with_labels(
    tmp_path: Path,
) -> None:
    peft = pytest.importorskip("peft")
    train(adapted(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "ours")
    theirs = peft.get_peft_model(
        llama(), peft.AdaLoraConfig(total_step=STEPS, tfinal=3, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    theirs.save_pretrained(tmp_path / "theirs")
    batch = token_batches(1)[0]
    for folder in ("ours", "theirs"):
        model = rw.PeftModel.from_pretrained(llama(), tmp_path / folder)
        for training in (False, True):
            model.train(training)
            assert float(model(**batch).loss.detach()) == pytest.approx(true_loss(model, batch), rel=1e-5)


# --- the same learning rate as LoRA, and a much worse result --------------------------------------------------------


def test_at_loras_learning_rate_adalora_learns_far_less_than_lora() -> None:
    peft = pytest.importorskip("peft")
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    # At 1e-3, a random model learns too little in 60 steps to tell layers apart.
    for rate in (3e-3, 1e-2):
        schedule: dict[str, Any] = {
            "init_r": 6, "target_r": 2, "tinit": 6, "tfinal": 18, "total_step": 60,
            "target_modules": TARGETS, "lora_alpha": 4,
        }  # fmt: skip
        lora = peft.get_peft_model(llama(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS))
        found = held_out_loss(train(lora, 60, rate))
        model = train(adapted(whole=rw.AdaLoraConfig(**schedule)), 60, rate)
        kept = model.rank_summary().parameters - model.rank_summary().total_rank  # E does not train
        assert kept <= lora.get_nb_trainable_parameters()[0]
        ours[f"{rate:g}"] = held_out_loss(model) - found
        paper = rw.AdaLoraConfig(**schedule, init_lora_weights=True)
        theirs[f"{rate:g}"] = held_out_loss(train(adapted(whole=paper), 60, rate)) - found
    assert max(ours.values()) < 0.02, f"behind LoRA by {ours}"
    assert min(theirs.values()) > 0.1, (
        f"the paper's form should be behind, or the test shows nothing: {theirs}"
    )


def held_out_loss(model: Any) -> float:
    model.eval()
    with torch.no_grad():
        return sum(float(model(**batch).loss) for batch in token_batches(5, seed=9)) / 5


# --- resuming in the pruning phase diverges ------------------------------------------------------------------------


def test_only_the_tensors_named_lora_were_kept_and_the_loaded_model_gives_other_results() -> None:
    model = train(adapted())
    ids = token_batches(1)[0]["input_ids"]
    kept = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    loaded = adapted()
    with told() as messages:
        loaded.load_state_dict(kept, strict=False)
    assert not torch.allclose(loaded.eval()(ids).logits, model.eval()(ids).logits)
    assert len(messages) == 1 and "`model.save_pretrained`" in messages[0]

    with told() as messages:
        loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(ids).logits, model(ids).logits) and not messages


def test_resuming_in_the_pruning_phase_diverges_and_restarts_the_budget(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            control.should_training_stop = state.global_step == 5

    saving = {"save_strategy": "steps", "save_steps": 5, "logging_steps": 1}
    whole = trainer_for(adapted(), tmp_path / "whole", **saving)
    whole.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run ends early
        trainer_for(adapted(), tmp_path / "stopped", callbacks=[Ends()], **saving).train()
    assert (tmp_path / "stopped" / "checkpoint-5").is_dir()
    resumed = trainer_for(adapted(), tmp_path / "stopped", **saving)
    resumed.train(resume_from_checkpoint=True)

    def steps(trainer: Any) -> list[dict[str, Any]]:
        numbers = ("step", "loss", "grad_norm", "budget", "total_rank", "rank_phase")
        return [
            {key: entry[key] for key in numbers} for entry in trainer.state.log_history if "loss" in entry
        ]

    assert steps(resumed)[-5:] == steps(whole)[-5:] and len(steps(whole)) == STEPS
    assert resumed.model.rank_history == whole.model.rank_history
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    own, other = resumed.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"]
    assert all(torch.equal(own[i][key], other[i][key]) for i in other for key in ("exp_avg", "exp_avg_sq"))


# --- no way to see what happened to the ranks ----------------------------------------------------------------------


def test_no_way_to_see_what_happened_to_the_ranks(tmp_path: Path) -> None:
    model = train(adapted())
    history = model.rank_history
    assert history.layers == [row.path for row in model.rank_summary().layers]
    assert [(record.step, record.budget) for record in history.records][0] == (0, 24)
    assert history.records[-1].ranks == [row.rank for row in model.rank_summary().layers]
    assert all(row.importance >= 0 for row in model.rank_summary().layers)
    table = str(model.rank_summary())
    assert all(row.path.rpartition(".")[2] in table for row in model.rank_summary().layers)
    assert f"6 layers: rank {total_rank(model)} of 24" in table

    model.save_pretrained(tmp_path)
    loaded = rw.PeftModel.from_pretrained(llama(), tmp_path)
    assert loaded.rank_history == history
    assert [row.rank for row in loaded.rank_summary().layers] == history.records[-1].ranks
    pytest.importorskip("matplotlib")
    from rankwise.report import rank_heatmap, rank_history_plot

    rank_history_plot(history, tmp_path / "history.png")
    rank_heatmap(loaded.rank_summary(), tmp_path / "ranks.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("history.png", "ranks.png"))


# Files and names


class TwoHeads(nn.Module):
    """As in DistilBERT's classifier, the name of one module ends with the name of the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.pre_classifier, self.classifier = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.pre_classifier(self.body(x)).relu())


def test_modules_to_save_classifier_takes_pre_classifier_too(tmp_path: Path) -> None:
    fields = {"r": 2, "target_modules": ["body", "pre_classifier"], "modules_to_save": ["classifier"]}
    with pytest.warns(UserWarning, match="'pre_classifier' won't train in full, as PEFT would have it"):
        model = rw.get_peft_model(TwoHeads(), rw.LoraConfig(**fields))
    assert [path for path, module in model.named_modules() if hasattr(module, "lora_A")] == fields[
        "target_modules"
    ]
    with torch.no_grad():
        model.classifier.modules_to_save["default"].bias.add_(1.0)
        model.pre_classifier.lora_B["default"].add_(1.0)
    model.save_pretrained(tmp_path)
    loaded = rw.PeftModel.from_pretrained(TwoHeads(), tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(loaded(x), model(x))
    report = rw.report.inspect_adapter(tmp_path)
    assert [module.path for module in report.saved_modules] == ["classifier"]


def test_modules_to_save_classifier_in_a_file_of_pefts_holds_pre_classifier_too(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    fields = {"r": 2, "target_modules": ["body"], "modules_to_save": ["classifier"]}
    theirs = peft.get_peft_model(TwoHeads(), peft.LoraConfig(**fields))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert [module.path for module in rw.report.inspect_adapter(tmp_path / "theirs").saved_modules] == [
        "classifier",
        "pre_classifier",
    ]
    x = torch.randn(3, 4)
    loaded = rw.PeftModel.from_pretrained(TwoHeads(), tmp_path / "theirs")
    assert torch.allclose(loaded(x), theirs(x), atol=1e-6)
    loaded.save_pretrained(tmp_path / "again")
    again = rw.PeftModel.from_pretrained(TwoHeads(), tmp_path / "again")
    assert torch.equal(again(x), loaded(x))
    assert again.peft_config["default"].modules_to_save == ["classifier", "pre_classifier"]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:5e8f\nsize 4096\n"


@pytest.mark.parametrize(
    "name",
    ["adapter_config.json", "adapter_model.safetensors", "rank_history.json", "training_state.safetensors"],
)
def test_an_adapter_folder_cloned_without_git_lfs_is_called_cut_off(name: str, tmp_path: Path) -> None:
    model = train(adapted(), 3)
    model.save_pretrained(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / name).write_text(POINTER)
    said = rf"{name} is a Git LFS pointer, not the file itself\. Fetch it with: git lfs pull"
    with pytest.raises(ValueError, match=said):
        rw.PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-3", is_trainable=True)
    with pytest.raises(ValueError, match=said):
        model.load_checkpoint(tmp_path / "checkpoint-3")
    if "config" in name or "model" in name:
        with pytest.raises(ValueError, match=said):
            rw.report.inspect_adapter(tmp_path / "checkpoint-3")
    if "config" in name:
        with pytest.raises(ValueError, match=said):
            rw.LoraConfig.from_pretrained(tmp_path / "checkpoint-3")
    if "history" in name:
        assert "git lfs pull" in rw.report.inspect_adapter(tmp_path / "checkpoint-3").notes[0]


def test_a_pickle_cloned_without_git_lfs_is_named_a_pointer(tmp_path: Path) -> None:
    adapted(whole=rw.LoraConfig(r=2, target_modules=TARGETS)).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_text(POINTER)
    with pytest.raises(ValueError, match="git lfs pull"):
        rw.PeftModel.from_pretrained(llama(), tmp_path)


# --- numbers that grow without bound -------------------------------------------------------------------------------


class Idle(nn.Module):
    """A layer that trains but is in no forward pass, like a head for another task, next to two that are used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.idle = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("size", [1e14, 1e19, 1e25, 1e37, math.nan, math.inf])
def test_linalgerror_from_a_decomposition_in_the_middle_of_a_run(size: float) -> None:
    """The run continues to its target, and the layers that are used learn undisturbed."""
    whole = rw.AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=3, total_step=STEPS, target_modules=["first", "second", "idle"]
    )
    model = adapted(Idle(), whole=whole)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    losses = []
    for step in range(STEPS):
        if step == 2:
            for key in ("lora_A", "lora_B"):
                getattr(model.idle, key)["default"].data.normal_().mul_(size)
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x[:, :3]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses)) and model.allocation_state.phase == "final"
    assert all(model.get_parameter(f"{name}.lora_A.default").isfinite().all() for name in ("first", "second"))
    if math.isfinite(size) and size < 1e37:
        assert model.idle.lora_A["default"].isfinite().all() and model.idle.lora_B["default"].isfinite().all()


def test_a_loaded_adapter_of_a_resnet_gives_other_results(tmp_path: Path) -> None:
    def layers() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    with pytest.warns(UserWarning, match="'1' would change their running averages"):
        adapted(layers(), whole=rw.LoraConfig(r=2, target_modules=["0"]))
    model = adapted(layers(), whole=rw.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    x = torch.randn(16, 6)
    model.train()(x)
    model.save_pretrained(tmp_path)
    assert torch.equal(rw.PeftModel.from_pretrained(layers(), tmp_path)(x), model.eval()(x))


def test_a_run_diverges_and_the_good_adapter_is_replaced_by_one_full_of_nan(tmp_path: Path) -> None:
    model = train(adapted(), steps=3)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    next(p for name, p in model.named_parameters() if "lora_B" in name).data.fill_(math.nan)
    with pytest.raises(ValueError, match="lora_B.*NaN.*go on from there"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    rw.PeftModel.from_pretrained(llama(), tmp_path)
