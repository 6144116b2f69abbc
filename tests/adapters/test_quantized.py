"""Quantized bases: bitsandbytes, torchao and packed layers train, save, load, and merge or refuse to."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from costs import Operations
from torch import nn
from trainings import Setting, frozen, rankwise_lora, small, training_of

import rankwise as rw
from rankwise.adapters import branch
from tiny import bert, llama, token_batches

STEPS = 8
SIZES = {"hidden_size": 64, "intermediate_size": 64}
BNB = ["4-bit", "8-bit"]
KINDS = [*BNB, "torchao int8", "torchao int4"]
X = {"input_ids": token_batches(1)[0]["input_ids"]}


# --- bases and runs ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*inputs will be cast.*")
        yield


def quantization(kind: str) -> Any:
    import transformers

    if kind in BNB:
        pytest.importorskip("bitsandbytes")
        if kind == "8-bit":
            return transformers.BitsAndBytesConfig(load_in_8bit=True)
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    torchao = pytest.importorskip("torchao.quantization")
    if kind == "torchao int8":
        return transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    return transformers.TorchAoConfig(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("base")
    llama(**SIZES).save_pretrained(made)
    return made


def base(kind: str, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization(kind), device_map="cpu"
    )


def adapted(model: Any, **changes: Any) -> Any:
    options = {
        "init_r": 4,
        "target_r": 2,
        "tinit": 1,
        "tfinal": 2,
        "deltaT": 1,
        "target_modules": ["q_proj", "o_proj"],
    }
    torch.manual_seed(5)
    return rw.get_peft_model(model, rw.AdaLoraConfig(**{**options, "total_step": STEPS, **changes}))


def train(model: Any, steps: range = range(STEPS)) -> Any:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-2)
    batches = token_batches(steps.stop)
    for step in steps:
        model(**batches[step]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_whole_run(model: Any) -> None:
    state, budgets = model.allocation_state, [record.budget for record in model.rank_history.records]
    assert (state.step, state.phase) == (STEPS, "final")
    assert state.budget == state.target == state.initial // 2
    assert 0 < model.rank_summary().total_rank < state.initial
    assert budgets[0] == state.initial and any(state.target < budget < state.initial for budget in budgets)


def logits(model: nn.Module) -> torch.Tensor:
    """The logits in training mode: in evaluation, bitsandbytes may use other kernels, which round differently."""
    was = model.training
    with torch.no_grad():
        made = model.train()(**X).logits
    model.train(was)
    return made


def evaluate(model: nn.Module) -> None:
    with torch.no_grad():
        assert model.eval()(**X).logits.isfinite().all()


def base_values(model: Any) -> list[torch.Tensor]:
    """The packed weights, in the order of the model."""
    held = [layer.weight for name, layer in model.named_modules() if name.endswith(("q_proj", "o_proj"))]
    return [w.dequantize() if type(w).__module__.startswith("torchao") else w.data.clone() for w in held]


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_trains_saves_and_resumes_on_a_quantized_base(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": ids, "labels": ids} for batch in token_batches(STEPS) for ids in batch["input_ids"]]
    states = []
    for name in ("whole", "resumed"):
        model = adapted(rw.prepare_model_for_kbit_training(base(kind, folder)), total_step=None)
        assert {p.dtype for n, p in model.named_parameters() if ".lora_" in n} == {torch.float32}
        arguments = TrainingArguments(
            str(tmp_path / name), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=5e-2,
            report_to="none", save_steps=4, use_cpu=True, disable_tqdm=True, eval_strategy="steps", eval_steps=4,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4])
        trainer.train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4") if name == "resumed" else None
        )
        assert_whole_run(model)
        states.append(
            {key: value for key, value in model.state_dict().items() if "lora_" in key or "rankwise" in key}
        )
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    loaded = rw.PeftModel.from_pretrained(base(kind, folder), tmp_path / "whole" / "checkpoint-8")
    torch.testing.assert_close(logits(loaded), logits(model.eval()))
    assert not torch.allclose(logits(loaded), logits(base(kind, folder)), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_a_quantized_base_come_and_go_and_can_be_switched_off(kind: str, folder: Path) -> None:
    model = base(kind, folder)
    before, weights = logits(model.eval()), base_values(model)
    adapted(model)
    model.train()
    train(model)
    assert model._hf_peft_config_loaded and model.is_quantized
    with model.eval().disable_adapter():
        torch.testing.assert_close(logits(model), before)
    model.unload()
    torch.testing.assert_close(logits(model), before)
    assert not model._hf_peft_config_loaded and all(map(torch.equal, base_values(model), weights))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_learns_the_same_on_a_quantized_base_as_on_its_dequantized_values(
    kind: str, folder: Path
) -> None:
    model = train(adapted(base(kind, folder), init_lora_weights=True))
    plain = llama(**SIZES)
    quantized = dict(base(kind, folder).named_modules())
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = dense(quantized[name])
    train(adapted(plain, init_lora_weights=True))
    tolerance = 1e-2 if kind == "8-bit" else 1e-3  # bitsandbytes computes 8-bit layers in float16
    torch.testing.assert_close(logits(model.train()), logits(plain.train()), atol=tolerance, rtol=tolerance)


def dense(layer: Any) -> torch.Tensor:
    """A layer's weight as plain numbers, obtained from the layer itself."""
    weight = layer.weight
    if hasattr(weight, "dequantize") and type(weight).__module__.startswith("torchao"):
        return weight.dequantize().float()
    with torch.no_grad():
        return layer.train()(torch.eye(layer.in_features)).T.float()


def packed_layer(kind: str, dtype: torch.dtype, **options: Any) -> Any:
    """A packed layer of 64 by 32 on the CPU, with an adapter of random factors."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(3)
    if kind == "8-bit":
        layer = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=dtype, quant_type="nf4", **options)
    model = nn.Sequential(layer.to("cpu"))
    config = rw.AdaLoraConfig(
        init_r=4, target_r=2, total_step=100, tfinal=10, init_lora_weights=True, target_modules=["0"]
    )
    rw.get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def nodes(output: torch.Tensor) -> set[str]:
    """The kinds of steps in the graph of a tensor."""
    found, todo = {}, [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and id(node) not in found:
            found[id(node)] = node
            todo += [each for each, _ in node.next_functions]
    return {type(node).__name__ for node in found.values()} - {"AccumulateGrad"}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BNB)
def test_a_packed_layer_and_its_adapter_are_one_step_with_the_same_output_and_gradients(
    kind: str, given: torch.dtype, autocast: bool
) -> None:
    model = packed_layer(kind, torch.bfloat16)
    layer, x = model[0], torch.randn(2, 20, 64).to(given).requires_grad_()
    factors = [layer.factor(key, "default") for key in ("lora_A", "lora_E", "lora_B")]
    A, E, B = factors
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = model(x)
        assert len([name for name in nodes(output) if not name.startswith("ToCopy")]) == 1
        assert output.dtype == layer.base_forward(x).dtype
        composed = layer.base_forward(x).float() + layer.scaling["default"] * x.float() @ (B @ (E * A)).T
    direction = torch.randn_like(composed)
    torch.testing.assert_close(output.float(), composed, rtol=0.03, atol=0.3)
    made = torch.autograd.grad(output, [x, *factors], direction.to(output.dtype))
    expected = torch.autograd.grad(composed, [x, *factors], direction)
    for one, other in zip(made, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one.float() - other.float()).norm() < 0.02 * other.float().norm()


@pytest.mark.parametrize("least", [0, branch._WORTH_CUTTING], ids=["sliced", "whole"])
@pytest.mark.parametrize("kind", BNB)
def test_a_packed_layer_computes_with_the_kept_triplets(
    kind: str, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branch, "_WORTH_CUTTING", least)
    model = packed_layer(kind, torch.float32)
    layer, x = model[0], torch.randn(2, 20, 64, requires_grad=True)
    layer.kept["default"] = 3
    factors = [layer.factor(key, "default") for key in ("lora_A", "lora_E", "lora_B")]
    A, E, B = factors
    output = model(x)
    composed = layer.base_forward(x) + layer.scaling["default"] * x @ (B[:, :3] @ (E * A)[:3]).T
    torch.testing.assert_close(output, composed, rtol=1e-3, atol=1e-3)
    made = torch.autograd.grad(output.square().sum(), [x, *factors])
    expected = torch.autograd.grad(composed.square().sum(), [x, *factors])
    torch.testing.assert_close(made, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BNB)
def test_the_output_of_a_packed_layer_and_the_gradient_of_its_input_are_exactly_its_own(
    kind: str, dtype: torch.dtype
) -> None:
    model = packed_layer(kind, dtype)
    layer, x = model[0], torch.randn(20, 64, dtype=dtype, requires_grad=True)
    model(x)  # after which the layer is as it stays
    layer.lora_B["default"].data.zero_()
    for output in (model(x), layer.base_forward(x)):
        (gradient,) = torch.autograd.grad(output.square().sum(), x)
        assert output.equal(layer.base_forward(x))
        assert gradient.equal(torch.autograd.grad(layer.base_forward(x).square().sum(), x)[0])


def test_operations_of_4_bit_layers_stay_within_bounds() -> None:
    """Above the frozen model's. Its weights are packed from float32, and unpacked in bfloat16 without a cast."""
    pytest.importorskip("bitsandbytes")
    model, counts = small(2, 64), []
    for attach in (frozen, rankwise_lora):
        training = training_of(attach, model, Setting(precision="4-bit"))
        training.step()  # the first pass prepares what later passes reuse
        with Operations() as operations:
            training.gradients()
        counts.append(operations.count)
    assert (counts[1] - counts[0]) / (2 * len(model.targets)) <= 6


@pytest.mark.parametrize("kind", BNB)
def test_second_derivatives_reach_through_a_packed_layer(kind: str) -> None:
    model = packed_layer(kind, torch.float32)
    layer, x = model[0], torch.randn(20, 64, requires_grad=True)
    factors = [layer.factor(key, "default") for key in ("lora_A", "lora_E", "lora_B")]
    A, E, B = factors
    weight = layer.base_weight().float()

    def penalty(output: torch.Tensor) -> Any:
        (gradient,) = torch.autograd.grad(output.tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [x, *factors])

    update = layer.scaling["default"] * x @ (B @ (E * A)).T
    made = penalty(model(x))
    expected = penalty(nn.functional.linear(x, weight, layer.bias) + update)
    for one, other in zip(made, expected, strict=True):
        assert (one - other).norm() < 0.01 * other.norm()


def test_gradients_reach_through_4_bit_layers_after_evaluation(folder: Path) -> None:
    """In evaluation on some CPUs, bitsandbytes repacks 4-bit weights, and no gradient flows through these."""
    runs = []
    for evaluates in (False, True):
        model = base("4-bit", folder)
        if evaluates:
            evaluate(model)
        adapted(model, target_modules=["q_proj"], init_lora_weights=True)
        for step in range(STEPS):
            if evaluates:
                evaluate(model)
            train_one(model.train(), step)
        runs.append({name: parameter for name, parameter in model.named_parameters() if ".lora_" in name})
    for name, parameter in runs[0].items():
        torch.testing.assert_close(parameter, runs[1][name], atol=1e-3, rtol=1e-2)


def train_one(model: Any, step: int) -> None:
    if not hasattr(model, "_test_optimizer"):
        model.__dict__["_test_optimizer"] = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=1.0
        )
    optimizer = model.__dict__["_test_optimizer"]
    model(**token_batches(step + 1)[step]).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if ".lora_E." in n)
    optimizer.step()
    optimizer.zero_grad()


def test_4_bit_layers_are_fast_in_evaluation_again_when_the_adapter_is_gone(folder: Path) -> None:
    model = base("4-bit", folder)
    flags = [vars(module).get("support_avx512bf16_for_cpu") for module in model.modules()]
    adapted(model).unload()
    assert [vars(module).get("support_avx512bf16_for_cpu") for module in model.modules()] == flags


@pytest.mark.parametrize("kind", BNB)
def test_a_copy_of_a_quantized_model_trains_on_by_itself(kind: str, folder: Path) -> None:
    model = adapted(base(kind, folder))
    train(model, range(4))
    twin = copy.deepcopy(model)
    for each in (model, twin):
        train(each, range(4, STEPS))
        assert_whole_run(each)
    torch.testing.assert_close(logits(model), logits(twin))


# --- merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BNB)
def test_merging_into_bitsandbytes_layers_requantizes_with_a_warning(kind: str, folder: Path) -> None:
    model = train(adapted(base(kind, folder))).eval()
    expected, weights = logits(model), base_values(model)
    plain = logits(base(kind, folder))
    with pytest.warns(UserWarning, match="quantized again"):
        model.merge_adapter()
    moved, lost = (expected - plain).norm(), (logits(model) - expected).norm()
    assert lost < (0.8 if kind == "4-bit" else 0.2) * moved
    merged = logits(model)
    model.unmerge_adapter()
    assert all(map(torch.equal, base_values(model), weights))
    torch.testing.assert_close(logits(model), expected)
    with pytest.warns(UserWarning, match="quantized again"):
        alone = model.merge_and_unload()
    torch.testing.assert_close(logits(alone), merged)
    assert type(alone.model.layers[0].self_attn.q_proj).__name__ in ("Linear4bit", "Linear8bitLt")
    assert alone.model.layers[0].self_attn.q_proj.weight.dtype in (torch.uint8, torch.int8)


@pytest.mark.parametrize("kind", BNB)
def test_a_merged_and_unmerged_model_trains_on_as_if_it_had_never_been_merged(
    kind: str, folder: Path
) -> None:
    runs = []
    for merges in (False, True):
        model = adapted(base(kind, folder))
        train(model, range(4))
        if merges:
            with pytest.warns(UserWarning, match="quantized again"):
                model.merge_adapter()
            model.unmerge_adapter()
        train(model, range(4, STEPS))
        assert_whole_run(model)
        runs.append(logits(model))
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("kind", ["torchao int8", "torchao int4"])
def test_merging_into_torchao_weights_is_refused_with_a_remedy(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    model = train(adapted(base(kind, folder)))
    expected = logits(model)
    with pytest.raises(ValueError, match="without quantization, load the adapter into that"):
        model.merge_and_unload()
    assert torch.equal(logits(model), expected) and isinstance(model, rw.PeftModel)
    model.save_pretrained(tmp_path)
    merged = rw.PeftModel.from_pretrained(llama(**SIZES), tmp_path).merge_and_unload()  # the remedy
    assert (logits(merged) - expected).norm() < 0.3 * expected.norm()


def test_an_8_bit_layer_that_keeps_half_precision_weights_merges_without_packing() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear8bitLt(16, 16, has_fp16_weights=True)
    model = rw.get_peft_model(
        nn.Sequential(layer), rw.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    before = layer.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    assert layer.weight.dtype.is_floating_point and not torch.equal(layer.weight, before)
    model.unmerge_adapter()
    assert torch.equal(layer.weight, before)


def test_a_quantized_head_that_should_train_whole_is_refused_with_the_setting_to_use(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    bert(hidden_size=64).save_pretrained(tmp_path)
    config = quantization("4-bit")
    config.llm_int8_skip_modules = []
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu"
    )
    if model.classifier.weight.is_floating_point():
        pytest.skip("this Transformers leaves heads out of quantization")
    with pytest.raises(ValueError, match="llm_int8_skip_modules"):
        adapted(model, target_modules=["query", "value"], task_type="SEQ_CLS")
    assert not isinstance(model, rw.PeftModel)


# --- packed layers without a weight --------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A substitute for the layers of GPTQ and AWQ: packed integers and scales, without a ``weight``."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scales = layer.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("qweight", (layer.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.qweight * self.scales, self.bias)


def packed_llama() -> Any:
    model = llama()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            model.set_submodule(name, PackedLinear(layer))
    return model


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["named", "all-linear"])
def test_layers_with_packed_weights_and_no_weight_train_save_load_and_refuse_to_merge(
    targets: Any, tmp_path: Path
) -> None:
    model = train(adapted(packed_llama(), target_modules=targets))
    assert_whole_run(model)
    model.save_pretrained(tmp_path)
    loaded = rw.PeftModel.from_pretrained(packed_llama(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model.eval()))
    with pytest.raises(ValueError, match="packed weight \\(PackedLinear\\)"):
        model.merge_and_unload()
    assert torch.equal(logits(model.unload()), logits(packed_llama()))


def test_a_kind_of_quantized_layer_that_is_not_known_is_refused_by_name() -> None:
    class StrangeLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)

    with pytest.raises(ValueError, match="StrangeLinear"):
        adapted(nn.ModuleDict({"q_proj": StrangeLinear()}), target_modules=["q_proj"])


# --- half precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_base_trains_saves_loads_and_merges(dtype: torch.dtype, tmp_path: Path) -> None:
    model = train(adapted(llama(**SIZES).to(dtype)))
    assert_whole_run(model)
    assert {p.dtype for n, p in model.named_parameters() if ".lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if ".lora_" not in n} == {dtype}
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(rw.PeftModel.from_pretrained(llama(**SIZES).to(dtype), tmp_path)), expected
    )
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=3e-2, rtol=3e-2)
