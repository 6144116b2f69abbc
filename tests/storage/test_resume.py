"""A run that was stopped and resumed is, bit for bit, the run that was never stopped."""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankwise as rw
from tiny import bert, llama, token_batches

STEPS = 20
SCHEDULE: dict[str, Any] = {
    "init_r": 4, "target_r": 1, "tinit": 4, "tfinal": 5, "deltaT": 3, "lora_alpha": 16, "lora_dropout": 0.1,
}  # fmt: skip
# Allocations are at steps 6, 9, 12 and 15.
STOPS = {
    "before the first step": 0,
    "warm-up": 2,
    "end of warm-up": 4,
    "right after an allocation": 9,
    "between allocations, pruned triplets have regrown": 11,
    "last allocation": 15,
    "final phase, layers at rank 0": 17,
    "finished": STEPS,
}
TARGETS = ["q_proj", "v_proj", "down_proj"]

at_every_stop = pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS.keys())


def lively(model: nn.Module) -> Any:
    """Make gradients of a tiny random model large enough that E grows from 0."""
    return model.train()


def adalora(total_step: int | None = STEPS, **changes: Any) -> Any:
    config = rw.AdaLoraConfig(**{**SCHEDULE, "target_modules": TARGETS, "total_step": total_step, **changes})
    return lively(rw.get_peft_model(llama(attention_dropout=0.1), config))


def lora() -> Any:
    config = rw.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules=TARGETS)
    return lively(rw.get_peft_model(llama(attention_dropout=0.1), config))


def adalora_with_head(total_step: int | None = STEPS) -> Any:
    schedule = {**SCHEDULE, "target_r": 0.75}  # small enough that a layer ends at rank 0
    config = rw.AdaLoraConfig(**schedule, target_modules=["query", "value"], task_type="SEQ_CLS", bias="lora_only",
                              total_step=total_step)  # fmt: skip
    return lively(rw.get_peft_model(bert(hidden_dropout_prob=0.1), config))


def lora_with_head() -> Any:
    config = rw.LoraConfig(
        r=4, lora_alpha=16, lora_dropout=0.1, target_modules=["query", "value"], task_type="SEQ_CLS"
    )
    return lively(rw.get_peft_model(bert(hidden_dropout_prob=0.1), config))


MAKERS: dict[str, Callable[[], Any]] = {
    "adalora": adalora,
    "adalora of the paper": functools.partial(adalora, init_lora_weights=True),
    "adalora, counted by hand": adalora,
    "adalora with a head and biases": adalora_with_head,
    "adalora, nothing to prune": functools.partial(adalora, target_r=4, total_step=None),
    "adalora, two optimizers": functools.partial(adalora, init_lora_weights=True),
    "lora": lora,
    "lora with a head": lora_with_head,
}


def batches(model: nn.Module) -> list[dict[str, Tensor]]:
    """One batch for each step."""
    made = token_batches(STEPS)
    if hasattr(model, "classifier"):
        return [{"input_ids": batch["input_ids"], "labels": batch["input_ids"][:, 0] % 3} for batch in made]
    return made


class Run:
    """A plain training loop."""

    def __init__(self, model: Any, kind: str) -> None:
        self.model, self.by_hand = model, kind.endswith("by hand")
        self.batches = batches(model)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups = [list(trained.values())]
        # the first to step holds only the factors that belong to the second one's E
        if kind.endswith("two optimizers"):
            groups = [
                [p for name, p in trained.items() if ("lora_E" in name) == first] for first in (False, True)
            ]
        self.optimizers = [torch.optim.AdamW(group, lr=2e-2, weight_decay=0.1) for group in groups]
        self.schedulers = [
            torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 - 0.02 * step) for each in self.optimizers
        ]

    def train(self, first: int, last: int) -> list[float]:
        """Take steps ``first`` to ``last``. Return their losses."""
        losses = []
        for step in range(first, last + 1):
            loss = self.model(**self.batches[step - 1]).loss
            loss.backward()
            for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
                optimizer.step()
                scheduler.step()
            if self.by_hand:
                self.model.update_and_allocate(step)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    def rest(self) -> dict[str, Any]:
        """Everything except the model that must be saved."""
        return copy.deepcopy({
            "optimizers": [each.state_dict() for each in self.optimizers],
            "schedulers": [each.state_dict() for each in self.schedulers],
            "random": torch.get_rng_state(),
        })  # fmt: skip

    def load_rest(self, rest: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, rest["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for scheduler, state in zip(self.schedulers, rest["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        torch.set_rng_state(rest["random"])


def everything(model: Any, optimizers: list[Any]) -> dict[str, Any]:
    """Everything that must be equal at the end, including scores and history."""
    found: dict[str, Any] = {f"model: {key}": value for key, value in model.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for place, state in optimizer.state_dict()["state"].items():
            found |= {f"optimizer {number}: {place}.{key}": value for key, value in state.items()}
    found["history"] = model.rank_history and model.rank_history.records
    found["state"] = model.allocation_state
    found["ranks"] = [(row.path, row.rank, str(row.importance)) for row in model.rank_summary().layers]
    found["trained"] = [name for name, p in model.named_parameters() if p.requires_grad]
    model.eval()
    with torch.no_grad():
        found["logits"] = model(**batches(model)[0]).logits
    return found


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        same = torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        assert same, f"{key} differs: {value} and {other[key]}"


class Reference:
    """A run that is never stopped, with the files that it would have saved at every stop."""

    def __init__(self, kind: str) -> None:
        self.folder = Path(tempfile.mkdtemp())
        torch.manual_seed(1)
        run = Run(MAKERS[kind](), kind)
        self.losses: list[float] = []
        self.saved: dict[int, bytes] = {}
        self.regrown = 0
        for stop in STOPS.values():
            self.losses += run.train(len(self.losses) + 1, stop)
            kept = io.BytesIO()
            torch.save({"model": run.model.state_dict(), **run.rest()}, kept)
            self.saved[stop] = kept.getvalue()
            run.model.save_pretrained(self.folder / f"checkpoint-{stop}")
            if stop == STOPS["between allocations, pruned triplets have regrown"]:
                self.regrown = _regrown(run.model)
        self.last = everything(run.model, run.optimizers)
        self.ranks = [row.rank for row in run.model.rank_summary().layers]

    def load(self, stop: int) -> dict[str, Any]:
        return torch.load(io.BytesIO(self.saved[stop]), weights_only=True)


def _regrown(model: Any) -> int:
    """The number of triplets that were pruned at the last allocation and have grown back."""
    if model.allocation_state is None or not model.peft_config["default"].form.has_E:
        return 0
    E = torch.cat([p.flatten() for name, p in model.named_parameters() if ".lora_E." in name])
    return int((E != 0)[~model.rankwise_mask].sum())


@functools.cache
def reference(kind: str) -> Reference:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Reference(kind)


@pytest.fixture(autouse=True, scope="module")
def _tidy() -> Iterator[None]:
    yield
    for kind in MAKERS:
        if reference.cache_info().currsize:
            shutil.rmtree(reference(kind).folder, ignore_errors=True)
    reference.cache_clear()


def test_the_reference_run_has_everything_that_makes_resuming_hard() -> None:
    for kind in (
        "adalora",
        "adalora of the paper",
        "adalora, counted by hand",
        "adalora with a head and biases",
    ):
        run = reference(kind)
        assert 0 in run.ranks and len(set(run.ranks)) > 1, f"{kind}: {run.ranks}"
        assert run.regrown > 0 or kind != "adalora of the paper"
        assert len(set(run.losses)) == STEPS
        assert [record.step for record in run.last["history"]] == [0, 6, 9, 12, 15]


# Plain PyTorch.


@at_every_stop
@pytest.mark.parametrize("kind", MAKERS)
def test_plain_state_dictionaries_resume(kind: str, stop: int) -> None:
    whole = reference(kind)
    saved = whole.load(stop)
    torch.manual_seed(99)
    run = Run(MAKERS[kind](), kind)
    run.model.load_state_dict(saved["model"], strict=True)
    run.load_rest(saved)
    assert run.train(stop + 1, STEPS) == whole.losses[stop:]
    assert_same(whole.last, everything(run.model, run.optimizers))


@at_every_stop
@pytest.mark.parametrize("kind", MAKERS)
def test_an_adapter_folder_resumes_on_a_base_model(kind: str, stop: int) -> None:
    whole = reference(kind)
    base = MAKERS[kind]().unload()
    random_state = torch.get_rng_state()
    model = rw.PeftModel.from_pretrained(base, whole.folder / f"checkpoint-{stop}", is_trainable=True)
    assert torch.equal(random_state, torch.get_rng_state()), "loading should draw no random numbers"
    run = Run(lively(model), kind)
    run.load_rest(whole.load(stop))
    assert run.train(stop + 1, STEPS) == whole.losses[stop:]
    assert_same(whole.last, everything(run.model, run.optimizers))


@at_every_stop
def test_a_checkpoint_brings_back_the_same_model(stop: int) -> None:
    whole = reference("adalora")
    run = Run(adalora(), "adalora")
    run.train(1, STEPS)  # past the stop, so that ranks have become final
    run.model.load_checkpoint(whole.folder / f"checkpoint-{stop}")
    run.load_rest(whole.load(stop))
    assert run.train(stop + 1, STEPS) == whole.losses[stop:]
    assert_same(whole.last, everything(run.model, run.optimizers))


def test_a_checkpoint_resumes_under_another_adapter_name() -> None:
    whole = reference("adalora with a head and biases")
    model = adalora_with_head().unload()
    model = rw.PeftModel.from_pretrained(model, whole.folder / "checkpoint-11", "mine", is_trainable=True)
    run = Run(lively(model), "adalora")
    run.load_rest(whole.load(11))
    assert run.train(12, STEPS) == whole.losses[11:]


def test_a_run_past_its_total_step_resumes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = {"total_step": 10, "tinit": 1, "tfinal": 2}
    run = Run(adalora(**config), "adalora")
    with pytest.warns(UserWarning, match="past total_step=10"):
        run.train(1, 14)
    run.model.save_pretrained(tmp_path / "checkpoint-14")
    rest = run.rest()
    losses = run.train(15, STEPS)
    again = Run(adalora(**config), "adalora")
    again.model.load_checkpoint(tmp_path / "checkpoint-14")
    again.load_rest(rest)
    with pytest.warns(UserWarning, match="past total_step=10"):
        assert again.train(15, STEPS) == losses
    assert_same(everything(run.model, run.optimizers), everything(again.model, again.optimizers))


def test_ranks_finalized_early_stay_final(tmp_path: Path) -> None:
    torch.manual_seed(1)
    run = Run(adalora(), "adalora")
    run.train(1, 8)
    run.model.finalize_ranks()
    run.model.save_pretrained(tmp_path)
    rest = run.rest()
    losses = run.train(9, STEPS)
    again = Run(rw.PeftModel.from_pretrained(adalora().unload(), tmp_path, is_trainable=True), "adalora")
    lively(again.model)
    again.load_rest(rest)
    assert again.train(9, STEPS) == losses
    assert_same(everything(run.model, run.optimizers), everything(again.model, again.optimizers))


@pytest.mark.parametrize("kind", ["adalora", "lora"])
def test_other_trained_parameters_and_batch_statistics_resume(kind: str, tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(1)
        base = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(96, 6), nn.LayerNorm(6)
        )
        options = {**SCHEDULE, "total_step": STEPS} if kind == "adalora" else {"r": 2}
        made = rw.AdaLoraConfig if kind == "adalora" else rw.LoraConfig
        adapted = rw.get_peft_model(base, made(**options, target_modules=["0", "3"]))
        adapted[4].requires_grad_(True)
        return adapted

    def train(model: Any, optimizer: Any, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last + 1):
            x = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(step))
            loss = (model(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    def optimizer(model: Any) -> Any:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    one = model()
    first = optimizer(one)
    train(one, first, 1, 8)
    one.save_pretrained(tmp_path / "checkpoint-8")
    state, random_state = first.state_dict(), torch.get_rng_state()
    kept = io.BytesIO()
    torch.save(state, kept)
    losses = train(one, first, 9, STEPS)
    attached, base = model(), model().unload()
    attached.load_checkpoint(tmp_path / "checkpoint-8")
    loaded = rw.PeftModel.from_pretrained(base, tmp_path / "checkpoint-8", is_trainable=True)
    for other in (attached, loaded):
        second = optimizer(other)
        second.load_state_dict(torch.load(io.BytesIO(kept.getvalue()), weights_only=True))
        torch.set_rng_state(random_state)
        assert train(other, second, 9, STEPS) == losses
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key


# Accelerate.


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize(
    "kind", ["adalora", "adalora with a head and biases", "lora", "adalora, tied weights"]
)
def test_accelerate_resumes(kind: str, safe: bool, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def model() -> Any:
        if kind != "adalora, tied weights":
            return MAKERS[kind]()
        tied = llama(attention_dropout=0.1, tie_word_embeddings=True)
        return lively(rw.get_peft_model(tied, adalora().peft_config["default"]))

    def prepared() -> tuple[Any, Run]:
        accelerator = accelerate.Accelerator(cpu=True)
        run = Run(model(), kind)
        run.model, run.optimizers[0], run.schedulers[0] = accelerator.prepare(
            run.model, run.optimizers[0], run.schedulers[0]
        )
        return accelerator, run

    torch.manual_seed(1)
    accelerator, run = prepared()
    losses: list[float] = []
    stops = [2, 11, 15, 17]
    for stop in stops:
        losses += run.train(len(losses) + 1, stop)
        accelerator.save_state(str(tmp_path / str(stop)), safe_serialization=safe)
    losses += run.train(len(losses) + 1, STEPS)
    last = everything(run.model, run.optimizers)
    for stop in stops:
        torch.manual_seed(99)
        accelerator, run = prepared()
        accelerator.load_state(str(tmp_path / str(stop)))
        assert run.train(stop + 1, STEPS) == losses[stop:]
        assert_same(last, everything(run.model, run.optimizers))


# Transformers' Trainer.


class Rows(torch.utils.data.Dataset[Any]):
    def __init__(self, model: nn.Module, count: int = STEPS) -> None:
        self.rows = [
            {key: value[row] for key, value in batch.items()}
            for batch in batches(model)[:count]
            for row in range(4)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def trainer(model: Any, folder: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    usual = {
        "max_steps": STEPS, "save_steps": 1, "learning_rate": 2e-2, "weight_decay": 0.1, "logging_steps": 1, "seed": 3,
        "per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **{**usual, **options})
    evaluation = Rows(model, 2) if "eval_strategy" in options else None
    return Trainer(model, arguments, train_dataset=Rows(model), eval_dataset=evaluation)


def logged(finished: Any) -> list[dict[str, Any]]:
    """The log without durations."""
    return [
        {
            key: value
            for key, value in entry.items()
            if not key.endswith(("runtime", "_per_second", "total_flos"))
        }
        for entry in finished.state.log_history
        if "train_runtime" not in entry
    ]


def in_trainer(model: Any, folder: Path, resumes: bool, **options: Any) -> tuple[Any, dict[str, Any]]:
    made = trainer(model, folder, **options)
    made.train(resume_from_checkpoint=True if resumes else None)
    return made, everything(model, [made.optimizer])


MANY_STOPS = "adalora, total_step left out"  # this kind is slow, because it resumes after each of them

TRAINER_KINDS: dict[str, tuple[Callable[[], Any], list[int]]] = {
    "adalora": (adalora, [2, 11, 17]),
    MANY_STOPS: (functools.partial(adalora, None), [*STOPS.values()][1:]),
    "adalora with a head and biases": (functools.partial(adalora_with_head, None), [4, 9, 15]),
    "lora": (lora, [9]),
    "lora with a head": (lora_with_head, [9]),
    "adalora under another name": (
        lambda: lively(
            rw.get_peft_model(llama(), adalora(None).peft_config["default"], adapter_name="mine"),
        ),
        [11],
    ),
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind == MANY_STOPS)) for kind in TRAINER_KINDS],
)
def test_transformers_trainer_resumes(kind: str, tmp_path: Path) -> None:
    make, stops = TRAINER_KINDS[kind]
    never_stopped, last = in_trainer(make(), tmp_path / "whole", resumes=False)
    for stop in stops:
        shutil.copytree(tmp_path / f"whole/checkpoint-{stop}", tmp_path / f"{stop}/checkpoint-{stop}")
        torch.manual_seed(99)
        resumed, resumed_last = in_trainer(make(), tmp_path / str(stop), resumes=True)
        assert logged(resumed) == logged(never_stopped)
        assert_same(last, resumed_last)


class _PowerCut(BaseException):
    pass


def test_trainer_resumes_with_the_best_model_and_a_limit_of_checkpoints(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Cut(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            if state.global_step == 14:
                raise _PowerCut

    options = {"save_steps": 3, "eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True,
               "metric_for_best_model": "eval_loss", "save_total_limit": 2}  # fmt: skip
    never_stopped, last = in_trainer(adalora_with_head(None), tmp_path / "whole", resumes=False, **options)
    cut = trainer(adalora_with_head(None), tmp_path / "cut", **options)
    cut.add_callback(Cut)
    with pytest.raises(_PowerCut):
        cut.train()
    left = sorted(path.name for path in (tmp_path / "cut").glob("checkpoint-*"))
    assert "checkpoint-12" in left and len(left) <= 2
    resumed, resumed_last = in_trainer(adalora_with_head(None), tmp_path / "cut", resumes=True, **options)
    best = Path(never_stopped.state.best_model_checkpoint).name
    assert Path(resumed.state.best_model_checkpoint).name == best
    assert logged(resumed) == logged(never_stopped)
    assert_same(last, resumed_last)
    assert resumed_last["state"].step == int(best.partition("-")[2]), "the best model's place in its own run"


IN_A_PROCESS = """
import json, sys
from pathlib import Path
from test_resume import adalora, digest, in_trainer, logged

folder, resumes = Path(sys.argv[1]), sys.argv[2] == "resume"
finished, last = in_trainer(adalora(None), folder, resumes)
print(json.dumps([logged(finished), digest(last)]))
"""


def digest(found: dict[str, Any]) -> str:
    """A text that is the same for the same bits."""
    whole = hashlib.sha256()
    for key, value in found.items():
        shown = value.detach().float().numpy().tobytes() if isinstance(value, Tensor) else str(value).encode()
        whole.update(key.encode() + shown)
    return whole.hexdigest()


@pytest.mark.slow
def test_trainer_resumes_in_a_fresh_process(tmp_path: Path) -> None:
    never_stopped, last = in_trainer(adalora(None), tmp_path / "whole", resumes=False)
    shutil.copytree(tmp_path / "whole/checkpoint-11", tmp_path / "copy/checkpoint-11")
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_A_PROCESS, str(tmp_path / "copy"), "resume"],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=True,
    )
    losses, bits = json.loads(done.stdout.splitlines()[-1])
    assert losses == json.loads(json.dumps(logged(never_stopped)))
    assert bits == digest(last)


def test_a_resumed_trainer_of_another_length_gives_a_warning(tmp_path: Path) -> None:
    in_trainer(adalora(None), tmp_path, resumes=False, save_steps=10)
    shutil.rmtree(tmp_path / "checkpoint-20")
    with pytest.warns(UserWarning, match="total_step=20, but this Trainer runs 24"):
        model = adalora(None)
        in_trainer(model, tmp_path, resumes=True, max_steps=24)
    assert model.allocation_state.total_step == 20
    assert model.allocation_state.reached_target


# Another run's state.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_step": 30}, "total_step=20, but here the adapter has total_step=30"),
        ({"total_step": None, "tinit": 3}, "tinit=4, but here the adapter has tinit=3"),
        ({"tfinal": 2, "deltaT": 2}, "tfinal=5, deltaT=3, but here the adapter has tfinal=2, deltaT=2"),
        ({"target_r": 2}, "target_r=1, but here the adapter has target_r=2"),
        ({"lora_alpha": 8}, "lora_alpha=16.0, but here the adapter has lora_alpha=8"),
        ({"init_r": 5}, r"lora_A is \(4, 32\), but here \(5, 32\)"),
        ({"target_modules": ["q_proj"]}, "only the file has 'model.layers.0.mlp.down_proj.lora_A'"),
        (
            {"target_modules": [*TARGETS, "k_proj"]},
            "only the model has 'model.layers.0.self_attn.k_proj.lora_A'",
        ),
        ({"modules_to_save": ["lm_head"]}, "only the model has 'lm_head.modules_to_save.weight'"),
    ],
)
def test_the_state_of_another_run_is_refused_and_changes_nothing(
    changes: dict[str, Any], message: str
) -> None:
    folder = reference("adalora").folder / "checkpoint-11"
    model = adalora(**changes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as refused:
        model.load_checkpoint(folder)
    assert "training_state.safetensors" in str(refused.value)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_plain_loading_of_another_run_is_refused() -> None:
    saved = reference("adalora").load(11)["model"]
    with pytest.raises(ValueError, match="total_step=20, but here the adapter has total_step=30"):
        adalora(total_step=30).load_state_dict(saved)
    with pytest.raises(RuntimeError, match="size mismatch"):
        adalora(init_r=5).load_state_dict(saved)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        lora().load_state_dict(saved)


@pytest.mark.parametrize("stop", [11, 17])
def test_factors_alone_are_not_loaded_in_silence_with_another_scale(stop: int) -> None:
    saved = reference("adalora").load(stop)["model"]
    model = adalora()
    with pytest.warns(UserWarning, match="not the state of the run that made them"):
        model.load_state_dict({key: each for key, each in saved.items() if "lora_" in key}, strict=False)


@pytest.mark.parametrize("name", ["lora_dropout", "beta1", "orth_reg_weight"])
def test_settings_that_only_affect_later_steps_may_change_and_are_reported(name: str) -> None:
    model = adalora(**{name: 0.3})
    with pytest.warns(UserWarning, match=f"goes on with `{name}`=0.3"):
        model.load_checkpoint(reference("adalora").folder / "checkpoint-11")
    assert model.allocation_state.step == 11


def test_a_checkpoint_without_its_training_state_gives_its_values_with_a_warning(tmp_path: Path) -> None:
    whole = reference("adalora")
    shutil.copytree(whole.folder / "checkpoint-17", tmp_path / "copy")
    (tmp_path / "copy/training_state.safetensors").unlink()
    model = adalora()
    with pytest.warns(UserWarning, match="holds no training_state.safetensors"):
        model.load_checkpoint(tmp_path / "copy")
    loaded = rw.PeftModel.from_pretrained(adalora().unload(), tmp_path / "copy")
    model.eval()
    batch = batches(model)[0]
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, loaded(**batch).logits, atol=1e-6)
    assert model.rank_history == loaded.rank_history
    assert [row.rank for row in model.rank_summary().layers] == whole.ranks


def test_a_merged_adapter_takes_no_checkpoint() -> None:
    model = adalora()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.load_checkpoint(reference("adalora").folder / "checkpoint-11")


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path: Path) -> None:
    """Safetensors maps files into memory, and other programs overwrite them in place."""
    shutil.copytree(reference("lora").folder / "checkpoint-9", tmp_path / "copy")
    for trainable in (False, True):
        model = rw.PeftModel.from_pretrained(lora().unload(), tmp_path / "copy", is_trainable=trainable)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        weights = tmp_path / "copy/adapter_model.safetensors"
        good = weights.read_bytes()
        with weights.open("r+b") as file:
            file.seek(len(good) // 2)
            file.write(b"\xff" * (len(good) // 2))
        gc.collect()
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
        weights.write_bytes(good)


@pytest.mark.parametrize("form", ["principal", True])
@pytest.mark.parametrize("way", ["folder", "state dictionary"])
def test_a_run_without_scores_resumes_from_scores_saved_as_empty_tensors(
    form: bool | str, way: str, tmp_path: Path
) -> None:
    """Earlier versions saved them so if nothing is scored."""

    def run_of_fixed_ranks() -> Run:
        fields = {"init_r": 2, "target_r": 2, "total_step": 9, "target_modules": ["q_proj"]}
        torch.manual_seed(1)
        model = rw.get_peft_model(llama(), rw.AdaLoraConfig(**fields, init_lora_weights=form))
        return Run(model, "adalora")

    run = run_of_fixed_ranks()
    run.train(1, 4)
    run.model.save_pretrained(tmp_path)
    other = run_of_fixed_ranks()
    other.load_rest(run.rest())
    empty = dict.fromkeys(("rankwise_sensitivity", "rankwise_uncertainty"), torch.zeros(0))
    if way == "folder":
        file = tmp_path / "training_state.safetensors"
        save_file({**load_file(file), **empty}, file)
        other.model.load_checkpoint(tmp_path)
    else:
        other.model.load_state_dict({**run.model.state_dict(), **empty})
    assert run.train(5, 9) == other.train(5, 9)
    assert_same(everything(run.model, run.optimizers), everything(other.model, other.optimizers))
