"""Values that no loader accepts are not written: NaN, infinities, and numbers that overflow a smaller dtype."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rankwise as rw
from rankwise.storage.finite import converted, last_finite
from tiny import bert, llama, mix_ranks, token_batches

BAD = [math.nan, math.inf, -math.inf]


class WithHead(nn.Module):
    """A model whose head holds a mask with infinities, as in many models."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)
        self.head.register_buffer("mask", torch.full((3,), -math.inf).masked_fill(torch.arange(3) < 2, 0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x)))


def adapted(kind: str) -> Any:
    options: dict[str, Any] = {"target_modules": ["body"], "modules_to_save": ["head"]}
    if kind == "lora":
        config: Any = rw.LoraConfig(r=3, init_lora_weights=False, **options)
    else:
        config = rw.AdaLoraConfig(
            init_r=3,
            target_r=1,
            total_step=9,
            init_lora_weights=True if kind == "paper" else "principal",
            **options,
        )
    return rw.get_peft_model(WithHead(), config)


def train_a_step(model: Any) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(torch.ones(2, 6))[:, :2].sum().backward()
    torch.optim.SGD(trained, lr=0.1).step()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("kind", ["lora", "principal", "paper"])
@pytest.mark.parametrize("where", ["lora_A", "lora_B", "head"])
def test_a_broken_adapter_is_not_saved_over_a_good_one(
    tmp_path: Path, kind: str, where: str, value: float
) -> None:
    model = adapted(kind)
    train_a_step(model)
    model.save_pretrained(tmp_path / "adapter")
    before = content(tmp_path)
    name = next(n for n, p in model.named_parameters() if where in n and p.requires_grad)
    parameter = model.get_parameter(name)
    good = parameter.detach().clone()
    with torch.no_grad():
        parameter.view(-1)[0] = value
    with pytest.raises(ValueError, match=rf"'.*{where}.*' holds NaN or infinite.*adapter'. go on from there"):
        model.save_pretrained(tmp_path / "adapter")
    assert content(tmp_path) == before
    with pytest.raises(ValueError, match="no earlier checkpoint"):
        model.save_pretrained(tmp_path / "new")
    assert content(tmp_path) == before and not (tmp_path / "new").exists()
    with torch.no_grad():
        parameter.copy_(good)
    model.save_pretrained(tmp_path / "adapter")  # the infinite mask is accepted
    rw.PeftModel.from_pretrained(WithHead(), tmp_path / "adapter", is_trainable=True)


def test_the_state_of_a_run_must_be_finite_even_if_the_adapter_is(tmp_path: Path) -> None:
    """Scores, and triplets that are off, are only in the state of the run."""
    model = adapted("paper")
    train_a_step(model)
    model.save_pretrained(tmp_path / "checkpoint-1")
    model.get_buffer("rankwise_sensitivity")[0] = math.nan
    with pytest.raises(ValueError, match=r"'rankwise_sensitivity' holds NaN.*checkpoint-1'"):
        model.save_pretrained(tmp_path / "checkpoint-2")


def test_the_last_finite_adapter_is_found_among_checkpoints_and_in_folders(tmp_path: Path) -> None:
    model = adapted("lora")
    for step in (9, 10, 100):
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-200").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert last_finite(tmp_path / "checkpoint-300") == tmp_path / "checkpoint-100"
    assert last_finite(tmp_path / "checkpoint-300" / "other") == tmp_path / "checkpoint-100"
    assert last_finite(tmp_path) == tmp_path / "checkpoint-100"
    path = tmp_path / "checkpoint-100" / "adapter_model.safetensors"
    save_file({key: tensor * math.nan for key, tensor in load_file(path).items()}, path)
    assert last_finite(tmp_path / "checkpoint-300") == tmp_path / "checkpoint-10"
    path.write_bytes(path.read_bytes()[:100])
    assert last_finite(tmp_path / "checkpoint-300") == tmp_path / "checkpoint-10"
    assert last_finite(tmp_path / "elsewhere") is None


def test_a_trainer_that_diverges_stops_at_its_next_checkpoint_and_resumes_from_the_last_good_one(
    tmp_path: Path,
) -> None:
    transformers = pytest.importorskip("transformers")

    class Breaks(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
            if state.global_step == 5:
                next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(math.nan)

    def trainer(*callbacks: Any) -> Any:
        config = rw.AdaLoraConfig(init_r=3, target_r=1, target_modules="all-linear")
        arguments = transformers.TrainingArguments(
            tmp_path,
            max_steps=8,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            save_total_limit=2,
            disable_tqdm=True,
        )
        rows = [{"input_ids": ids} for batch in token_batches(4) for ids in batch["input_ids"]]
        rows = [{**row, "labels": row["input_ids"]} for row in rows]
        return transformers.Trainer(
            model=rw.get_peft_model(llama(), config),
            args=arguments,
            train_dataset=rows,
            callbacks=list(callbacks),
        )

    with pytest.raises(ValueError, match=r"not saved to '.*checkpoint-6'.*lora_B.*NaN.*checkpoint-4'"):
        trainer(Breaks()).train()
    # If the folder had been left behind empty, the next line would resume from it.
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    again = trainer()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8 and (tmp_path / "checkpoint-8" / "adapter_config.json").exists()


# --- smaller dtypes ------------------------------------------------------------------------------------------------


def mixed(large: float = 1.0, **changes: Any) -> Any:
    config = rw.AdaLoraConfig(
        init_r=3, target_r=1, total_step=9, target_modules=["q_proj", "down_proj"], **changes
    )
    model = rw.get_peft_model(llama(), config)
    mix_ranks(model, lambda number, path: 1 + number % 3)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "1.mlp.down_proj.lora_B" in n)[0, 0] = large
    return model


@pytest.mark.parametrize("to", ["save_as_lora", "peft-lora", "vllm", "sglang", "gguf", "compress"])
@pytest.mark.parametrize(
    ("dtype", "large", "better"),
    [
        (torch.float16, 70000.0, "bfloat16"),
        (torch.float8_e4m3fn, 1000.0, "bfloat16"),
        (torch.float16, math.nan, ""),
    ],
)
def test_a_smaller_dtype_that_would_be_infinite_is_refused_by_layer_and_value(
    tmp_path: Path, to: str, dtype: torch.dtype, large: float, better: str
) -> None:
    if to == "gguf":
        pytest.importorskip("gguf")
        if dtype == torch.float8_e4m3fn:
            pytest.skip("GGUF has no such numbers, and that is refused elsewhere.")
    model = mixed(large)
    base = tmp_path / "base"
    llama().save_pretrained(base)
    output = tmp_path / ("adapter.gguf" if to == "gguf" else "adapter")

    def write(dtype: torch.dtype | None, overwrite: bool = False) -> Any:
        if to == "save_as_lora":
            return rw.save_as_lora(output, model, dtype=dtype, overwrite=overwrite)
        if to == "compress":
            return rw.compress_adapter(output, model, keep=1.0, dtype=dtype, overwrite=overwrite)
        kind: Any = to
        return rw.export_adapter(output, model, kind, base=base, dtype=dtype, overwrite=overwrite)

    if math.isnan(large):
        with pytest.raises(ValueError, match="NaN or infinite values"):
            write(dtype)
        assert not output.exists()
        return
    if to == "compress":  # both its factors have one size, so that more is needed for an overflow
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "down_proj.lora_" in name and "lora_E" not in name:
                    parameter *= 1e4
    with pytest.raises(ValueError, match=rf"(lora_|blk\.).*has the number \d.*ends at .*{better}") as refused:
        write(dtype)
    assert "down_proj" in str(refused.value) or "ffn_down" in str(refused.value)
    assert not output.exists()
    write(torch.bfloat16)
    if output.is_dir():
        written = load_file(output / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in written.values())
    before = content(tmp_path)
    with pytest.raises(ValueError, match="has the number"):
        write(dtype, overwrite=True)
    assert content(tmp_path) == before


def test_merging_into_a_half_precision_base_refuses_weights_that_would_be_infinite(tmp_path: Path) -> None:
    base = tmp_path / "base"
    llama().half().save_pretrained(base)
    model = mixed(5e8)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight, merged, has the number"):
        rw.export_adapter(tmp_path / "merged", model, "merged", base=base)
    assert not (tmp_path / "merged").exists()
    rw.export_adapter(tmp_path / "merged", mixed(1.0), "merged", base=base)


def test_a_half_precision_adapter_whose_scale_is_large_is_exported_exactly(tmp_path: Path) -> None:
    config = rw.LoraConfig(r=2, lora_alpha=2000, target_modules=["q_proj"], init_lora_weights=False)
    model = rw.get_peft_model(llama(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 100).half().float()
    model.save_pretrained(tmp_path / "own")
    path = tmp_path / "own" / "adapter_model.safetensors"
    save_file(
        {key: tensor.half() for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"}
    )
    rw.export_adapter(tmp_path / "exported", tmp_path / "own", "peft-lora")
    ids = token_batches(1)[0]["input_ids"]
    ours, theirs = (
        rw.PeftModel.from_pretrained(llama(), tmp_path / name)(input_ids=ids).logits
        for name in ("own", "exported")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="has the number"):
        rw.export_adapter(tmp_path / "small", tmp_path / "own", "peft-lora", dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_a_dtype_that_is_not_floating_point_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"`dtype` must be floating point.*bfloat16"):
        rw.save_as_lora(tmp_path / "adapter", mixed(), dtype=dtype)
    assert not (tmp_path / "adapter").exists()


def test_factors_that_would_vanish_are_refused_and_single_small_numbers_are_not() -> None:
    with pytest.raises(ValueError, match=r"no number above 1e-09.*float16.*written as 0.*bfloat16"):
        converted("lora_B of 'q'", torch.full((2, 3), 1e-9), torch.float16)
    with pytest.raises(ValueError, match="has the number 7"):
        converted("lora_B", torch.tensor([70000.0]).bfloat16(), torch.float16)
    for fine in (torch.zeros(2, 3), torch.tensor([1.0, 1e-9]), torch.zeros(0, 3)):
        assert torch.equal(converted("lora_B", fine, torch.float16), fine.half())


# --- the same bytes ------------------------------------------------------------------------------------------------

SAVES = """
import sys, torch, rankwise as rw
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
sets = {"target_modules": {"0", "2"}, "exclude_modules": {"x", "y", "z"}}
config = rw.AdaLoraConfig(init_r=3, target_r=1, total_step=9, **sets)
model = rw.get_peft_model(model, config)
optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01)
for _ in range(5):
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained(sys.argv[1] + "/adapter")
rw.save_as_lora(sys.argv[1] + "/lora", model)
rw.compress_adapter(sys.argv[1] + "/cut", model, keep=0.9)
"""


@pytest.mark.slow
def test_saved_again_or_by_another_process_an_adapter_has_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for seed in ("0", "3"):
        folder = tmp_path / seed
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SAVES, str(folder)], check=True, env=environment
        )
        written.append({name: hashlib.sha256(each).hexdigest() for name, each in content(folder).items()})
    assert len(written[0]) == 9 and all(each == written[0] for each in written)
    model = adapted("principal")
    train_a_step(model)
    contents = []
    for number in range(8):  # the library's order of metadata is random
        model.save_pretrained(tmp_path / f"again-{number}")
        contents.append(content(tmp_path / f"again-{number}"))
    assert all(each == contents[0] for each in contents)


def test_ordered_metadata_can_be_read_by_the_library_and_keep_their_checksum(tmp_path: Path) -> None:
    from safetensors import safe_open

    from rankwise.files.tensors import CHECKSUM, checksum, read_tensor_file, write_tensor_file

    tensors = {"ä.lora_A": torch.randn(3, 2), "b": torch.arange(3), "c": torch.zeros(0, 4)}
    for number in range(6):
        path = tmp_path / f"{number}.safetensors"
        write_tensor_file(path, tensors)
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt", CHECKSUM: checksum(tensors)}
        assert all(torch.equal(each, tensors[name]) for name, each in read_tensor_file(path).items())
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_a_broken_model_is_refused_on_reading_as_on_writing(tmp_path: Path) -> None:
    model = rw.get_peft_model(bert(), rw.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "1.attention.self.query.lora_A" in n)[0, 0] = math.nan
    for broken in (
        lambda: rw.compress_adapter(tmp_path / "cut", model, rank=1),
        lambda: rw.compression_curve(model),
        lambda: rw.export_adapter(tmp_path / "out", model, "peft-lora"),
    ):
        with pytest.raises(ValueError, match=r"lora_A of '.*layer\.1\.attention\.self\.query' holds NaN"):
            broken()
    assert not any(tmp_path.iterdir())


def test_double_precision_factors_of_any_size_are_cut_as_others_are(tmp_path: Path) -> None:
    losses = []
    for by in (1e-120, 1.0, 1e120):
        config = rw.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)
        torch.manual_seed(0)
        model = rw.get_peft_model(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double(), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter *= by
        assert all(each.dtype == torch.float64 for each in model.parameters())
        compression = rw.compress_adapter(tmp_path / f"{by}", model, rank=2)
        losses.append([(layer.path, layer.rank, round(layer.lost, 9)) for layer in compression.layers])
    assert losses[0] == losses[1] == losses[2]
