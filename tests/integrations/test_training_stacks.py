"""The libraries that people train with: attaching the adapter is enough, whatever runs the training loop.

Every run here goes through all three phases and must reach its target. The libraries are the real ones. A test is
skipped if its library is not installed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw
from tiny import WORDS, bert, fresh_accelerator, llama, token_batches, told, words_tokenizer

STEPS = 8


# --- small runs ----------------------------------------------------------------------------------------------------


def adapted(base: nn.Module | None = None, **changes: Any) -> Any:
    """An adapter that halves its ranks. Its trainer must fill in the length of the run."""
    options = {
        "init_r": 4,
        "target_r": 2,
        "tinit": 1,
        "tfinal": 2,
        "deltaT": 1,
        "target_modules": ["q_proj", "v_proj"],
    }
    base = llama() if base is None else base
    torch.manual_seed(5)
    return rw.get_peft_model(base, rw.AdaLoraConfig(**{**options, **changes}))


def with_length(base: nn.Module | None = None, **changes: Any) -> Any:
    return adapted(base, **{"total_step": STEPS, **changes})


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def assert_whole_run(model: Any, steps: int = STEPS) -> None:
    """Check that all phases happened, step by step, and that the adapter reached its target and has learned."""
    state, budgets = model.allocation_state, [record.budget for record in model.rank_history.records]
    assert (state.step, state.total_step, state.phase) == (steps, steps, "final")
    assert state.budget == state.target == state.initial // 2
    assert 0 < model.rank_summary().total_rank < state.initial
    assert budgets[0] == state.initial and budgets[-1] == state.target
    assert any(state.target < budget < state.initial for budget in budgets)
    assert any(parameter.any() for name, parameter in model.named_parameters() if ".lora_B." in name)
    assert state.skipped_steps == 0


def same_run(one: Any, other: Any) -> bool:
    """Whether two models are in the same state, bit for bit."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def sentences() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for batch in token_batches(STEPS) for ids in batch["input_ids"]]


ARGUMENTS = {
    "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none",
    "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 2, "seed": 3,
}  # fmt: skip


def loop(
    model: Any, optimizer: torch.optim.Optimizer, forward: Any = None, steps: range = range(STEPS)
) -> list[float]:
    """A plain training loop."""
    losses, batches = [], token_batches(steps.stop)
    for step in steps:
        loss = (model if forward is None else forward)(**batches[step]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), **{"lr": 1e-2, **options})


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings.simplefilter("ignore")


# --- a plain loop --------------------------------------------------------------------------------------------------


def test_a_plain_loop_with_clipping_and_a_scheduler() -> None:
    model = with_length()
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS)
    for batch in token_batches(STEPS):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable(model), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert_whole_run(model)


def test_several_parameter_groups_with_a_head_that_trains_whole() -> None:
    model = with_length(bert(), target_modules=["query", "value"], task_type="SEQ_CLS")
    head = [parameter for name, parameter in model.named_parameters() if "modules_to_save" in name]
    factors = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    groups = [
        {"params": head, "lr": 1e-3},
        {"params": factors[::2], "weight_decay": 0.1},
        {"params": factors[1::2]},
    ]
    before = [parameter.detach().clone() for parameter in head]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for batch in token_batches(STEPS):
        model(input_ids=batch["input_ids"], labels=batch["labels"][:, 0] % 3).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_whole_run(model)
    assert not any(map(torch.equal, before, head))


def test_fused_foreach_and_plain_adamw_make_the_same_run() -> None:
    runs = [with_length() for _ in range(3)]
    for model, options in zip(runs, ({"foreach": False}, {"foreach": True}, {"fused": True}), strict=True):
        loop(model, adamw(model, **options))
        assert_whole_run(model)
    for model in runs[1:]:
        for ours, theirs in zip(trainable(model), trainable(runs[0]), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_8_bit_adam_of_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = with_length(init_r=8, target_r=4, target_modules="all-linear")
    optimizer = bitsandbytes.optim.AdamW8bit(trainable(model), lr=1e-2, min_8bit_size=16)
    loop(model, optimizer)
    assert_whole_run(model)


def test_schedule_free_adamw_whose_evaluation_weights_hold_only_kept_ranks(tmp_path: Path) -> None:
    schedulefree = pytest.importorskip("schedulefree")
    model = with_length()
    optimizer = schedulefree.AdamWScheduleFree(trainable(model), lr=1e-2)
    optimizer.train()
    losses = loop(model, optimizer)
    assert_whole_run(model) and losses[-1] < losses[0]
    optimizer.eval()
    model.save_pretrained(tmp_path)
    loaded = rw.PeftModel.from_pretrained(llama(), tmp_path)
    batch = token_batches(1)[0]
    assert loaded.rank_summary().total_rank == model.rank_summary().total_rank
    torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits)


def test_lbfgs_steps_with_a_closure_and_counts_one_step_each() -> None:
    model = with_length(orth_reg_weight=0.0)
    optimizer = torch.optim.LBFGS(trainable(model), lr=0.1, max_iter=3)
    for batch in token_batches(STEPS):

        def closure(batch: Any = batch) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_whole_run(model)


def test_bfloat16_autocast_with_float32_factors_and_scores() -> None:
    model = with_length()
    optimizer = adamw(model)
    for batch in token_batches(STEPS):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_whole_run(model)
    assert {parameter.dtype for parameter in trainable(model)} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp16_with_a_grad_scaler_and_a_base_in_half_precision(dtype: torch.dtype) -> None:
    model = with_length(llama().to(dtype))
    assert {parameter.dtype for parameter in trainable(model)} == {torch.float32}
    optimizer, scaler = adamw(model), torch.amp.GradScaler("cpu", init_scale=128.0)
    for batch in token_batches(STEPS):
        scaler.scale(model(**batch).loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trainable(model), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert_whole_run(model)


# --- torch.compile -------------------------------------------------------------------------------------------------


def compiled_frames() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor"))]
)
def test_a_compiled_model_is_one_graph_and_recompiles_only_at_the_first_cut(backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, model = with_length(llama(num_hidden_layers=1)), with_length(llama(num_hidden_layers=1))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizer, graphs = adamw(model), []
    for step in range(STEPS):
        loop(model, optimizer, compiled, range(step, step + 1))
        graphs.append(compiled_frames())
    assert_whole_run(model)
    # scales change at the first cut
    first = next(record.step for record in model.rank_history.records if record.step)
    # These two backends may specialize once more, for one of the new scales after a cut.
    assert set(graphs[:first]) == {1} and max(graphs) <= (2 if backend == "eager" else 3)
    loop(plain, adamw(plain))
    for ours, theirs in zip(trainable(model), trainable(plain), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    torch._dynamo.reset()


# --- Transformers --------------------------------------------------------------------------------------------------


def trainer_for(model: nn.Module, folder: Path, **changes: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(str(folder), **{**ARGUMENTS, **changes})
    data = sentences()
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8])


def scalars(folder: Path) -> dict[str, list[float]]:
    """The values in TensorBoard's event files in a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_trainer_fills_in_the_length_and_logs_to_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    model = adapted()
    trainer = trainer_for(
        model, tmp_path, report_to="tensorboard", gradient_accumulation_steps=2, max_grad_norm=0.5,
        lr_scheduler_type="cosine", warmup_steps=2, bf16=True, logging_steps=1,
    )  # fmt: skip
    trainer.train()
    assert_whole_run(model)
    logged = scalars(tmp_path / "events")
    budgets = {record.step: record.budget for record in model.rank_history.records}
    budgets[1], budgets[7], budgets[8] = budgets[0], budgets[6], budgets[6]
    assert logged["train/rank_phase"] == [0, 1, 1, 1, 1, 2, 2, 2]
    assert logged["train/total_rank"][-1] == model.rank_summary().total_rank
    assert logged["train/budget"] == [budgets[step] for step in range(1, STEPS + 1)]
    assert "train/orth_penalty" not in logged, "there is no penalty in the default form"
    assert trainer.state.log_history[0]["budget"] == 16


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_trainer_on_a_classifier_evaluates_keeps_the_best_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    data = [
        {"input_ids": ids, "labels": ids[0] % 3}
        for batch in token_batches(STEPS)
        for ids in batch["input_ids"]
    ]

    def trainer(folder: str) -> Any:
        model = adapted(bert(), target_modules=["query", "value"], task_type="SEQ_CLS")
        arguments = TrainingArguments(
            str(tmp_path / folder),
            **{**ARGUMENTS, "save_strategy": "steps"}, save_steps=1, eval_strategy="steps", eval_steps=1,
            load_best_model_at_end=folder == "best", metric_for_best_model="accuracy", label_names=["labels"],
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8], compute_metrics=accuracy)

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    assert_whole_run(whole.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert same_run(resumed.model, whole.model)
    evaluations = [entry["eval_accuracy"] for entry in whole.state.log_history if "eval_accuracy" in entry]
    predicted = whole.predict(data[:8])
    assert predicted.metrics["test_accuracy"] == evaluations[-1] == accuracy(predicted)["accuracy"]
    assert "eval_loss" in whole.evaluate()

    best = trainer("best")
    best.train()
    assert best.state.best_metric == max(evaluations)
    assert best.evaluate()["eval_accuracy"] == max(evaluations)
    loaded = rw.PeftModel.from_pretrained(bert(), best.state.best_model_checkpoint)
    again = Trainer(loaded, whole.args, eval_dataset=data[:8], compute_metrics=accuracy)
    assert again.evaluate()["eval_accuracy"] == max(evaluations)


class Wrapped(nn.Module):
    """A user's own model that contains a Transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        output = self.inner(input_ids=input_ids, labels=labels)
        return {"loss": output.loss, "logits": output.logits}


@pytest.mark.parametrize("which", ["the whole", "the inner model"])
def test_trainer_on_a_model_of_the_users_own_resumes_bit_for_bit(which: str, tmp_path: Path) -> None:
    runs = []
    for name in ("whole", "resumed"):
        model = Wrapped()
        runs.append((adapted(model if which == "the whole" else model.inner), model))
        trainer = trainer_for(model, tmp_path / name, save_strategy="steps", save_steps=4)
        trainer.train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4") if name == "resumed" else None
        )
        assert_whole_run(runs[-1][0])
    assert same_run(runs[0][1], runs[1][1])


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def test_seq2seq_trainer_generates_for_its_metrics(tmp_path: Path) -> None:
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

    model = adapted(t5(), target_modules=["q", "v", "wo"])

    def metrics(prediction: Any) -> dict[str, float]:
        return {"tokens": float((prediction.predictions > 0).mean())}

    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), **{**ARGUMENTS, "save_strategy": "steps"}, save_steps=4, eval_strategy="steps", eval_steps=4,
        predict_with_generate=True, generation_max_length=6, label_names=["labels"], load_best_model_at_end=True,
        label_smoothing_factor=0.1,
    )  # fmt: skip
    data = [{name: ids.tolist() for name, ids in row.items()} for row in sentences()]
    collator = DataCollatorForSeq2Seq(words_tokenizer(), model)  # it asks the model for the decoder's inputs
    trainer = Seq2SeqTrainer(
        model, arguments, collator, train_dataset=data, eval_dataset=data[:8], compute_metrics=metrics
    )
    trainer.train()
    assert model.allocation_state.total_step == STEPS
    if trainer.state.best_model_checkpoint.endswith("-8"):
        assert_whole_run(model)
    predicted = trainer.predict(data[:4])
    assert predicted.predictions.shape[0] == 4 and "test_tokens" in predicted.metrics


@pytest.mark.parametrize(
    "optimizer",
    [
        "adafactor",
        "adamw_8bit",
        "schedule_free_adamw",
        pytest.param("adamw_torch_8bit", marks=pytest.mark.slow),
    ],
)
def test_trainers_own_optimizers(optimizer: str, tmp_path: Path) -> None:
    needs = {
        "adamw_8bit": "bitsandbytes",
        "adamw_torch_8bit": "torchao",
        "schedule_free_adamw": "schedulefree",
    }
    if optimizer in needs:
        pytest.importorskip(needs[optimizer])
    model = adapted()
    constant = {"lr_scheduler_type": "constant"} if optimizer.startswith("schedule_free") else {}
    trainer_for(model, tmp_path, optim=optimizer, **constant).train()
    assert_whole_run(model)


def test_generate_and_pipelines_work_while_training_in_half_and_after_merging() -> None:
    from transformers import pipeline

    model = with_length()
    loop(model, adamw(model))
    ids = token_batches(1)[0]["input_ids"]
    model.eval()
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    classifier = with_length(bert(), target_modules=["query", "value"])
    with warnings.catch_warnings(record=True):
        made = pipeline("text-classification", classifier, tokenizer=words_tokenizer())
        assert {"label", "score"} <= made("a cat sat").pop().keys()
    assert copy.deepcopy(model).half().generate(
        ids, max_new_tokens=4, do_sample=False, pad_token_id=0
    ).shape == (4, 16)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)
    merged = model.merge_and_unload()
    assert type(merged).__name__ == "LlamaForCausalLM" and not isinstance(merged, rw.PeftModel)
    assert torch.equal(merged.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)


# --- TRL -----------------------------------------------------------------------------------------------------------


def sft_trainer(model: nn.Module, folder: Path, **changes: Any) -> Any:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    data = Dataset.from_dict({"text": [" ".join(WORDS[i % 5 : i % 5 + 6]) for i in range(32)]})
    arguments = trl.SFTConfig(str(folder), **{**ARGUMENTS, "max_length": 16, **changes})
    return trl.SFTTrainer(model, args=arguments, train_dataset=data, processing_class=words_tokenizer())


def test_sft_trainer_trains_the_adapter_as_it_is_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    runs = []
    for name in ("whole", "resumed"):
        runs.append(adapted(target_modules="all-linear"))
        trainer = sft_trainer(runs[-1], tmp_path / name, save_strategy="steps", save_steps=4)
        assert trainer.model is runs[-1]
        trainer.train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4") if name == "resumed" else None
        )
        assert_whole_run(runs[-1])
    assert same_run(*runs)
    assert (tmp_path / "whole" / "checkpoint-8" / "adapter_model.safetensors").is_file()
    loaded = rw.PeftModel.from_pretrained(llama(), tmp_path / "whole" / "checkpoint-8")
    assert loaded.rank_summary().total_rank == runs[0].rank_summary().total_rank < 56
    assert runs[0].allocation_state.reached_target


def test_sft_trainer_trains_an_output_layer_that_trains_whole(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["lm_head"])
    before = model.lm_head.modules_to_save["default"].weight.detach().clone()
    sft_trainer(model, tmp_path).train()
    assert_whole_run(model)
    assert not torch.equal(model.lm_head.modules_to_save["default"].weight, before)


def test_an_adapter_that_the_loss_bypasses_is_reported_by_name(tmp_path: Path) -> None:
    """TRL computes its loss from the output layer's weight, without calling the layer."""
    model = adapted(target_modules=["q_proj", "lm_head"])
    with told() as messages:
        sft_trainer(model, tmp_path).train()
    (message,) = [each for each in messages if "has had no gradient" in each]
    assert "'lm_head'" in message and "q_proj" not in message


# --- sentence-transformers -----------------------------------------------------------------------------------------


def sentence_model(folder: Path) -> Any:
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling, Transformer

    if not folder.exists():
        bert().bert.save_pretrained(folder)
        words_tokenizer().save_pretrained(folder)
    transformer = Transformer(str(folder))
    pooling = Pooling(transformer.get_word_embedding_dimension())
    return library.SentenceTransformer(modules=[transformer, pooling], device="cpu")


def train_sentences(model: Any, folder: Path, resume_from: Path | None = None) -> None:
    import sentence_transformers
    from datasets import Dataset
    from sentence_transformers.losses import CosineSimilarityLoss

    pairs = {"one": WORDS * 2, "other": WORDS[::-1] * 2, "score": [i % 3 / 2 for i in range(2 * len(WORDS))]}
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        str(folder), **{**ARGUMENTS, "save_strategy": "steps"}, save_steps=4
    )
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model, arguments, Dataset.from_dict(pairs), loss=CosineSimilarityLoss(model)
    )
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)


@pytest.mark.parametrize("which", ["the whole", "the encoder"])
def test_sentence_transformers_trainer_resumes_bit_for_bit(which: str, tmp_path: Path) -> None:
    runs = []
    for name in ("run", "resumed"):
        model = sentence_model(tmp_path / "base")
        runs.append(
            (adapted(model if which == "the whole" else model[0].auto_model, target_modules=None), model)
        )
        train_sentences(
            model, tmp_path / name, tmp_path / "run" / "checkpoint-4" if name == "resumed" else None
        )
        assert_whole_run(runs[-1][0])
    assert same_run(runs[0][1], runs[1][1])
    last, model = tmp_path / "run" / "checkpoint-8", runs[0][1]
    fresh = sentence_model(tmp_path / "base")
    rw.PeftModel.from_pretrained(fresh if which == "the whole" else fresh[0].auto_model, last)
    torch.testing.assert_close(torch.tensor(fresh.encode(WORDS)), torch.tensor(model.encode(WORDS)))


# --- Accelerate ----------------------------------------------------------------------------------------------------


def test_accelerate_accumulates_clips_saves_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")

    def run(first: int, save_at: int | None = None) -> Any:
        accelerator = fresh_accelerator(gradient_accumulation_steps=2)
        model = with_length()
        optimizer = adamw(model)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=STEPS)
        data = torch.utils.data.DataLoader(sentences() * 2, batch_size=4)
        prepared, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, schedule)
        assert prepared is model
        if first:
            accelerator.load_state(str(tmp_path / "state"))
        for number, batch in enumerate(data):
            if number < first:
                continue
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if number + 1 == save_at:
                accelerator.save_state(str(tmp_path / "state"))
        assert_whole_run(accelerator.unwrap_model(prepared))
        return model

    assert same_run(run(0, save_at=6), run(6))


PLACES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "one device": lambda folder: {"device_map": {"": "cpu"}, "force_hooks": True},
    "layers on disk": lambda folder: {
        "device_map": {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu",
                       "model.rotary_emb": "cpu"},
        "offload_dir": str(folder), "main_device": "cpu",
    },
}  # fmt: skip


@pytest.mark.parametrize("places", PLACES)
def test_a_base_that_accelerate_has_dispatched_trains_and_detaches(places: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain = with_length()
    base = accelerate.dispatch_model(llama(), **PLACES[places](tmp_path / "weights"))
    batch = token_batches(1)[0]
    untouched = base(**batch).logits
    model = with_length(base)
    assert {parameter.device.type for parameter in trainable(model)} == {"cpu"}
    losses = loop(model, adamw(model))
    assert losses == pytest.approx(loop(plain, adamw(plain)), abs=1e-5)
    assert_whole_run(model)
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
    model.save_pretrained(tmp_path / "adapter")
    if places == "layers on disk":
        with pytest.raises(ValueError, match="offloaded"):
            model.merge_and_unload()
    base = model.unload()
    torch.testing.assert_close(base(**batch).logits, untouched)
    loaded = rw.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(loaded(**batch).logits, plain(**batch).logits)


def test_hooks_put_on_and_off_while_an_adapter_is_there_keep_it_acting() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = with_length()
    loop(model, adamw(model))
    batch = token_batches(1)[0]
    expected = model(**batch).logits
    dispatched = accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    assert torch.equal(dispatched(**batch).logits, expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(**batch).logits, expected)
    base = model.unload()
    assert torch.equal(base(**batch).logits, llama()(**batch).logits)


def test_factors_that_accelerate_has_offloaded_are_not_computed_with() -> None:
    """Accelerate takes them away, and only brings back what belongs to modules that are called."""
    accelerate = pytest.importorskip("accelerate")
    model, batch = with_length(), token_batches(1)[0]
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for training in (False, True):
        with pytest.raises(ValueError, match="Offload the base model first"):
            model.train(training)(**batch)


def test_a_head_that_trains_whole_can_be_one_that_accelerate_has_dispatched() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, options = bert(), {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    base = accelerate.dispatch_model(bert(), device_map={"": "cpu"}, force_hooks=True)
    runs = [with_length(each, **options) for each in (plain, base)]
    for model in runs:
        optimizer = adamw(model)
        for batch in token_batches(STEPS):
            model(input_ids=batch["input_ids"], labels=batch["labels"][:, 0] % 3).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_whole_run(model)
    ids = token_batches(1)[0]["input_ids"]
    torch.testing.assert_close(runs[1](ids).logits, runs[0](ids).logits)
    assert not torch.equal(runs[0](ids).logits, bert()(ids).logits)


@pytest.mark.parametrize("which", ["a layer", "a head"])
def test_a_layer_whose_forward_has_been_replaced_is_refused_by_name(which: str) -> None:
    model = bert()
    layer = model.bert.encoder.layer[1].attention.self.query if which == "a layer" else model.classifier
    layer.forward = lambda x: x
    with pytest.raises(ValueError, match="`forward` of this Linear has been replaced"):
        with_length(model, target_modules=["query", "value"], task_type="SEQ_CLS")
    assert not isinstance(model, rw.PeftModel)


def test_from_pretrained_with_a_device_map(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(tmp_path)
    for device_map in ("cpu", {"": "cpu"}, "auto"):
        model = with_length(AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map))
        loop(model, adamw(model))
        assert_whole_run(model)


# --- Lightning -----------------------------------------------------------------------------------------------------


def lightning_module(model: nn.Module, library: Any, manual: bool = False) -> Any:
    class Task(library.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.model(**batch).loss
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = adamw(self)
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=1e-2, total_steps=self.trainer.estimated_stepping_batches
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Task()


def lightning_trainer(library: Any, folder: Path, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "default_root_dir": str(folder),
        **quiet,
    }
    return library.Trainer(**{**settings, **options})


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def lightning(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param)


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_lightning_fills_in_the_length_and_logs(lightning: Any, manual: bool, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    model = adapted()
    logger = lightning.loggers.TensorBoardLogger(str(tmp_path), name="", version="")
    clipping = (
        {} if manual else {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "precision": "bf16-mixed"}
    )
    trainer = lightning_trainer(lightning, tmp_path, logger=logger, log_every_n_steps=1, **clipping)
    data = torch.utils.data.DataLoader(sentences(), batch_size=8 if manual else 4)
    trainer.fit(lightning_module(model, lightning, manual), data)
    assert trainer.global_step == STEPS
    assert_whole_run(model)
    logged = scalars(tmp_path)
    assert logged["rank_phase"][0] == 0 and logged["rank_phase"][-1] == 2
    assert logged["budget"][-1] == model.allocation_state.target


def test_lightning_resumes_bit_for_bit_from_its_own_checkpoint(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    data = torch.utils.data.DataLoader(sentences(), batch_size=8)
    runs = []
    for checkpoint in (None, tmp_path / "after-first-epoch.ckpt"):
        runs.append(lightning_module(adapted(), lightning))
        saver = lightning.callbacks.ModelCheckpoint(
            str(tmp_path), filename="after-first-epoch", every_n_epochs=1, save_top_k=-1, monitor=None,
            enable_version_counter=False,
        )  # fmt: skip
        saver.on_train_epoch_end = _only_first_epoch(saver.on_train_epoch_end)
        callbacks = [] if checkpoint else [saver]
        trainer = lightning_trainer(
            lightning, tmp_path, enable_checkpointing=not checkpoint, callbacks=callbacks
        )
        trainer.fit(runs[-1], data, ckpt_path=checkpoint and str(checkpoint))
        assert_whole_run(runs[-1].model)
    assert same_run(*runs)


def _only_first_epoch(original: Callable[..., None]) -> Callable[..., None]:
    def on_train_epoch_end(trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 0:
            original(trainer, module)

    return on_train_epoch_end


def test_lightning_without_an_end_gets_an_error_with_the_option_to_pass(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    module = lightning_module(adapted(), lightning)
    module.configure_optimizers = lambda: adamw(module)
    trainer = lightning_trainer(lightning, tmp_path, max_epochs=-1)
    with pytest.raises(ValueError, match="`max_epochs` or `max_steps`"):
        trainer.fit(module, torch.utils.data.DataLoader(sentences(), batch_size=8))


def test_lightning_module_that_is_adapted_itself(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    module = adapted(lightning_module(llama(), lightning))
    assert isinstance(module, lightning.LightningModule)
    lightning_trainer(lightning, tmp_path).fit(module, torch.utils.data.DataLoader(sentences(), batch_size=8))
    assert_whole_run(module)


def test_fabric(tmp_path: Path) -> None:
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", precision="bf16-mixed")
    model = with_length()
    module, optimizer = fabric.setup(model, adamw(model))
    for batch in token_batches(STEPS):
        fabric.backward(module(**batch).loss)
        fabric.clip_gradients(module, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert_whole_run(model)
