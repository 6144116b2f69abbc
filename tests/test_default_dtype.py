"""Nothing depends on PyTorch's default dtype: results are bit for bit those under float32."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw
from tiny import llama, token_batches

PACKAGE = Path(rw.__file__).parent
DTYPES = [torch.float64, torch.bfloat16, torch.float16]
FORMS = ["paper", "lora", "principal"]
TARGETS = ["q_proj", "down_proj"]


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def config_of(form: str, targets: list[str] = TARGETS) -> Any:
    if form == "lora":
        return rw.LoraConfig(r=3, target_modules=targets)
    start: Any = True if form == "paper" else form
    return rw.AdaLoraConfig(
        init_r=4,
        target_r=2,
        total_step=6,
        tinit=1,
        tfinal=2,
        deltaT=1,
        target_modules=targets,
        init_lora_weights=start,
    )


class Block(nn.Module):
    """Plain layers, because Transformers' layers themselves make tensors of the default dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, 8)
        self.q_proj = nn.Linear(8, 12)
        self.down_proj = nn.Linear(12, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.words(ids) + self.down_proj(torch.tanh(self.q_proj(self.words(ids))))


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 16, (4, 5), generator=generator) for _ in range(6)]


def trained(form: str, base: nn.Module) -> Any:
    torch.manual_seed(0)
    model: Any = rw.get_peft_model(base, config_of(form, [*TARGETS, "words"]))
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.03)
    for ids in batches():
        (model(ids) - ids[..., None].float() / 16).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if value.numel()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def whole_life(form: str, base: nn.Module, folder: Path) -> tuple[Any, ...]:
    """The results when an adapter is trained, cut, saved, loaded, trained on, compressed, exported and merged."""
    model = trained(form, copy.deepcopy(base))
    model.save_pretrained(folder / "own")
    model.save_pretrained(folder / "checkpoint-6")
    rw.compress_adapter(folder / "cut", model, keep=0.8)
    rw.export_adapter(folder / "plain", model, "peft-lora")
    loaded: Any = rw.PeftModel.from_pretrained(copy.deepcopy(base), folder / "own")
    rw.PeftModel.from_pretrained(copy.deepcopy(base), folder / "checkpoint-6", is_trainable=True)
    states = [state_of(model), state_of(loaded), state_of(loaded.merge_and_unload())]
    written = [files(folder / name) for name in ("own", "checkpoint-6", "cut", "plain")]
    return states, written, str(model.rank_summary())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_lives_the_same_life_under_every_default(
    tmp_path: Path, form: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    base = Block()
    states, written, summary = whole_life(form, base, tmp_path / "usual")
    with default(dtype):
        others, other_written, other_summary = whole_life(form, base, tmp_path / "other")
    assert summary == other_summary
    for one, other in zip(states, others, strict=True):
        assert {name: value.dtype for name, value in one.items()} == {
            name: value.dtype for name, value in other.items()
        }
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert written == other_written


@pytest.mark.parametrize("form", FORMS)
def test_a_model_made_under_a_double_default_trains_saves_and_loads(tmp_path: Path, form: str) -> None:
    with default(torch.float64):
        model: Any = rw.get_peft_model(llama(), config_of(form))
        parameters = [each for each in model.parameters() if each.requires_grad]
        assert {each.dtype for each in parameters} == {torch.float64}
        optimizer = torch.optim.AdamW(parameters, lr=0.01)
        for batch in token_batches(6):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(tmp_path)
        loaded = rw.PeftModel.from_pretrained(llama(), tmp_path)
        ids = token_batches(1)[0]["input_ids"]
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_probing_finds_the_same_under_every_default(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = Block()

    def loss(model: Any, ids: Any) -> Any:
        return model(ids).square().mean()

    config = rw.LoraConfig(target_modules=TARGETS)
    usual = rw.probe(base, batches(), config, loss=loss, max_rank=1).to_dict()
    with default(dtype):
        assert rw.probe(base, batches(), config, loss=loss, max_rank=1).to_dict() == usual


# --- code that would bring the fault back ----------------------------------------------------------------------------

MAKES = {"zeros", "ones", "empty", "eye", "full", "rand", "randn", "linspace", "tensor", "arange"}
# `options` contain a dtype and a device. Empty tensors hold no values. DDP only looks for the graph behind its tensor.
FINE = {
    "method/penalty.py": ["torch.empty(0)"],
    "method/spectrum.py": ["torch.randn(d_in", "torch.zeros(d_out"],
    "adapters/summed.py": ["torch.empty(0)"],
    "parallel/sharded.py": ["torch.empty(0)"],
    "parallel/ddp.py": ["torch.zeros(())"],
    "attach/attachment.py": ["torch.empty(shape_A", "torch.empty(shape_B", "torch.empty(len(A), 1"],
}


def tensors_made_without(argument: str) -> Iterator[tuple[str, str, str]]:
    """The calls that make a tensor without this argument: the file, the function of PyTorch, and the line and text."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        source = path.read_text(encoding="utf-8")
        for call in ast.walk(ast.parse(source)):
            function = call.func if isinstance(call, ast.Call) else None
            if not (isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)):
                continue
            given = {keyword.arg for keyword in call.keywords}  # type: ignore[attr-defined]
            text = ast.get_source_segment(source, call) or ""
            known = any(text.startswith(each) for each in FINE.get(name, ()))
            if (
                function.value.id == "torch"
                and function.attr in MAKES
                and argument not in given
                and not known
            ):
                yield name, function.attr, f"{name}:{function.lineno}: {text}"


def test_no_tensor_is_made_in_the_default_dtype() -> None:
    """Numbers in a list may be integers, which have a dtype of their own."""
    found = [where for _, makes, where in tensors_made_without("dtype") if makes not in ("tensor", "arange")]
    assert not found, "Give these a dtype."
