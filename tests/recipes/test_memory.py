"""The memory that `rankwise plan` estimates is the memory that training takes. It needs neither data nor weights."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.recipes import load_recipe, plan, plan_memory
from rankwise.recipes.memory.activations import FakeRun, LiveBytes
from rankwise.recipes.memory.batches import speech_batch, text_batch
from rankwise.recipes.memory.estimate import Memory, estimate_memory, frozen_bytes, optimizer_bytes
from rankwise.recipes.recipe import TrainingSection
from recipe_world import save_tiny_model, write_recipe, write_table
from tiny import bert, llama

GIB = 2**30
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"


def adapted(model: nn.Module, targets: list[str] | str, **changes: Any) -> nn.Module:
    config = {
        "init_r": 4,
        "target_r": 2,
        "total_step": 10,
        "tinit": 0,
        "tfinal": 0,
        "target_modules": targets,
    }
    return rw.get_peft_model(model, rw.AdaLoraConfig(**{**config, **changes}))


def adapted_on_meta(make: Any, targets: list[str] | str, **changes: Any) -> nn.Module:
    with torch.device("meta"):
        model = make()
    return adapted(model, targets, **changes)


def estimate(model: nn.Module, batch: dict[str, torch.Tensor] | None = None, **training: Any) -> Memory:
    return estimate_memory(model, batch, TrainingSection.model_validate(training))


# --- activations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_run_on_the_meta_device_holds_as_much_as_a_real_run(
    checkpointing: bool, autocast: torch.dtype | None
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 500}
    batch = text_batch(3, 24)
    without = FakeRun(adapted_on_meta(lambda: llama(**sizes), ["q_proj", "v_proj"]), autocast)
    peak = without.training_peak(batch, checkpointing=checkpointing)

    model = adapted(llama(**sizes), ["q_proj", "v_proj"]).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        inputs = {name: torch.ones(each.shape, dtype=each.dtype) for name, each in batch.items()}
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(**inputs).loss
        loss.backward()
    assert peak == pytest.approx(live.peak, rel=0.1)


def test_checkpointing_saves_activations_and_eager_attention_costs_some() -> None:
    def activations(attention: str = "sdpa", **training: Any) -> int:
        make = lambda: llama(num_hidden_layers=6, attn_implementation=attention)  # noqa: E731
        found = estimate(adapted_on_meta(make, ["q_proj"]), text_batch(4, 64), **training).activations
        assert found is not None
        return found

    plain = activations()
    assert activations(gradient_checkpointing=True) < 0.6 * plain
    assert activations(attention="eager") > 1.2 * plain


def test_gradients_of_earlier_batches_count_when_they_accumulate() -> None:
    def total(**training: Any) -> int:
        return estimate(adapted_on_meta(bert, ["query"]), text_batch(8, 32, "classes"), **training).training

    assert total(gradient_accumulation_steps=2) > total()


def test_evaluation_holds_the_caches_of_a_model_that_writes() -> None:
    model = adapted_on_meta(llama, ["q_proj"])
    found = estimate_memory(model, text_batch(1, 16), TrainingSection(), evaluation_batch=text_batch(32, 16))
    caches = (
        2 * 32 * 16 * 16 * 2 * 4
    )  # keys and values of 32 texts of 16 tokens, 2 heads of 8, 2 layers, float32
    assert found.evaluation is not None and found.evaluation > caches
    assert found.total == found.evaluating > found.training


def test_a_model_whose_forward_cannot_be_traced_still_gets_the_other_estimates() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, input_ids: torch.Tensor, **rest: Any) -> None:
            raise RuntimeError("only on Sundays\nand then")

        def get_output_embeddings(self) -> None:
            return None

    found = estimate(adapted_on_meta(Stubborn, ["fc"]), text_batch(1, 4))
    assert found.activations is None
    assert found.notes == ("The estimate lacks the activations of Stubborn: only on Sundays",)
    assert found.weights == {"float32": 72 * 4}


# --- estimates from shapes alone -----------------------------------------------------------------------------------


def test_weights_adapters_gradients_and_scores_are_those_of_a_loaded_model() -> None:
    model = adapted(bert().to(torch.bfloat16), ["query", "value"], modules_to_save=["classifier"])
    found = estimate(model)

    factors = [p for n, p in model.named_parameters() if "lora_" in n]
    copies = [p for n, p in model.named_parameters() if ".modules_to_save." in n]
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = set(model.parameters()) - set(factors) - set(trained)
    assert found.weights["bfloat16"] == sum(p.numel() * 2 for p in frozen)
    assert found.adapters == sum(p.numel() * 4 for p in factors)
    assert found.modules_to_save == sum(p.numel() * 4 for p in copies) > 0
    assert found.gradients == sum(p.numel() * 4 for p in trained)
    scores = [buffer for name, buffer in model.named_buffers() if name.startswith("rankwise_")]
    assert found.run_state == sum(each.numel() * each.element_size() for each in scores)


def test_tied_weights_count_once() -> None:
    tied, untied = (
        frozen_bytes(llama(tie_word_embeddings=tie).requires_grad_(False))[0] for tie in (True, False)
    )
    assert untied["float32"] - tied["float32"] == 64 * 32 * 4


SHAPES = [(64, 128), (128, 64), (80,), (4, 1)]


OPTIMIZERS = ("adamw_torch", "sgd", "adagrad", "rmsprop", "adafactor", "schedule_free_adamw")
PACKED = ("adamw_8bit", "paged_adamw_8bit", "lion_8bit", "ademamix_8bit", "rmsprop_bnb_8bit")


@pytest.mark.parametrize("optim", [*OPTIMIZERS, *PACKED])
def test_the_estimated_optimizer_state_is_the_real_one(optim: str) -> None:
    pytest.importorskip("schedulefree" if "free" in optim else "bitsandbytes" if "8bit" in optim else "torch")
    parameters = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = optimizer_of_trainer(optim, parameters)
    getattr(optimizer, "train", bool)()  # schedule-free optimizers have two modes
    optimizer.step()
    real = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for name, value in state.items()
        if torch.is_tensor(value) and value.dim() and not name.startswith("qmap")  # all share one table
    )
    assert optimizer_bytes(optim, SHAPES) == real


def test_every_common_optimizer_of_transformers_is_known() -> None:
    from transformers.training_args import OptimizerNames

    unknown = {each.value for each in OptimizerNames if optimizer_bytes(each.value, SHAPES) is None}
    special = ("galore", "apollo", "adalomo", "adamw_anyprecision")
    assert {name for name in unknown if not name.startswith(special)} == set()
    assert "counted as AdamW's" in " ".join(
        estimate(adapted_on_meta(bert, ["query"]), optim="apollo_adamw").notes
    )


def optimizer_of_trainer(optim: str, parameters: list[nn.Parameter]) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir="unused", optim=optim, report_to="none")
    made, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return made(parameters, **options)


def test_several_processes_have_copies_of_the_gradients_to_send() -> None:
    alone, many = (
        estimate_memory(adapted_on_meta(bert, ["query"]), None, TrainingSection(), count) for count in (1, 4)
    )
    assert many.training - alone.training == many.buckets == alone.gradients


@pytest.mark.parametrize(
    ("packing", "bits"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 4.127),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4.156),
    ],
)
def test_packed_linear_layers_count_by_their_bits(packing: dict[str, Any], bits: float) -> None:
    plain = adapted_on_meta(llama, ["q_proj"])
    linear = sum(
        module.weight.numel()
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    )
    packed = adapted_on_meta(llama, ["q_proj"])
    packed.config.quantization_config = packing
    saved = sum(frozen_bytes(plain)[0].values()) - sum(frozen_bytes(packed)[0].values())
    assert saved == pytest.approx(linear * (4 - bits / 8), rel=0.001)


def test_bitsandbytes_layers_are_as_large_as_counted() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    packed = bnb.nn.Linear4bit(256, 128, bias=False, compress_statistics=False, quant_type="nf4")
    packed.load_state_dict({"weight": torch.randn(128, 256)})
    packed = packed.to("cpu")
    packed(torch.zeros(1, 256))  # a forward pass packs the weights
    state = packed.weight.quant_state
    real = packed.weight.numel() * packed.weight.element_size() + state.absmax.numel() * 4
    model = adapted_on_meta(llama, ["q_proj"])
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    sizes, _ = frozen_bytes(model)
    linear = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    )
    assert sizes["4 bits packed"] / linear == pytest.approx(real / (128 * 256), rel=0.01)


# --- recipes -------------------------------------------------------------------------------------------------------


def test_a_plan_shows_the_memory(tmp_path: Path) -> None:
    write_table(tmp_path / "reviews.csv")
    recipe = load_recipe(write_recipe(tmp_path, save_tiny_model(tmp_path / "model")))
    told = plan(recipe).to_dict()["memory"]
    assert told["total"]["training"] > told["activations"] > 0
    assert told["batch"]["input_ids"] == [4, 32]  # the largest number of tokens that the model takes
    assert told["evaluation_batch"]["input_ids"] == [32, 32]
    assert told["notes"] == []


LARGE_LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 4, "intermediate_size": 11008,
    "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048, "pad_token_id": 0,
}  # fmt: skip


def test_a_config_alone_gives_the_memory_of_a_large_model(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LARGE_LLAMA))
    path = write_recipe(
        tmp_path, folder, dtype="bfloat16", data={"train": "not-there.csv"}, training__gradient_checkpointing=True,
        training__per_device_train_batch_size=1, adapter__target_modules=["q_proj", "v_proj"],
    )  # fmt: skip
    found = plan_memory(load_recipe(path, data_needed=False))
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    head = 2 * 4096  # a copy of it trains
    assert found.weights["bfloat16"] == 2 * (32000 * 4096 + 4 * layer + 4096 + head)
    assert found.notes == ()
    assert found.activations is not None and 0.2 * GIB < found.activations < 2 * GIB


def test_the_command_shows_the_memory_without_data_and_weights(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from rankwise.cli import app

    folder = save_tiny_model(tmp_path / "model")
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    path = str(write_recipe(tmp_path, folder, data={"train": "not-there.csv"}))
    shown = CliRunner().invoke(app, ["plan", path, "--memory"])
    assert shown.exit_code == 0, shown.output
    assert "memory: about" in shown.output and "base weights, float32" in shown.output
    told = CliRunner().invoke(app, ["plan", path, "--memory", "--json"], env={"WORLD_SIZE": "4"})
    assert json.loads(told.stdout)["processes"] == 4
    assert json.loads(told.stdout)["buckets"] == json.loads(told.stdout)["gradients"] > 0
    wrong = CliRunner().invoke(app, ["plan", path, "--memory", "adapter.target_modules=[nothing]"])
    assert wrong.exit_code == 2


# --- against real runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    if not BENCHMARK.exists():
        pytest.skip("benchmarks/ is not part of this copy")
    if sys.platform != "linux":
        pytest.skip("peaks are measured with Linux's /proc")
    spec = importlib.util.spec_from_file_location("memory_benchmark", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_models_take_the_estimated_memory(benchmark: ModuleType) -> None:
    for name, case in benchmark.CASES.items():
        real = benchmark.measured(name)[name]
        assert benchmark.estimate(case).training == pytest.approx(real, rel=0.25), name


def test_speech_and_images_are_shaped_by_the_configuration() -> None:
    from transformers import ResNetConfig, ViTConfig, WhisperConfig

    from rankwise.recipes.memory.batches import image_batch

    clips = speech_batch(2, WhisperConfig(num_mel_bins=128), tokens=7)
    assert clips["input_features"].shape == (2, 128, 3000) and clips["labels"].shape == (2, 7)
    assert image_batch(3, ResNetConfig())["pixel_values"].shape == (3, 3, 224, 224)
    assert image_batch(3, ViTConfig(image_size=32))["pixel_values"].shape == (3, 3, 32, 32)
