"""`adapter_names`: each row of a batch is computed with its own adapter, or an error is raised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw


class Swallows(nn.Module):
    """A model whose forward pass accepts any argument."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.conv = nn.Conv2d(8, 8, (3, 1), padding=(1, 0))
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, **anything: Any) -> Tensor:
        hidden = self.conv(self.embed(x).transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
        return self.head(torch.tanh(self.body(hidden)))


def lora(**fields: Any) -> rw.LoraConfig:
    return rw.LoraConfig(**{"r": 2, "init_lora_weights": False, **fields})


def model(*targets: str) -> Any:
    torch.manual_seed(0)
    adapted = rw.get_peft_model(
        Swallows(), lora(target_modules=list(targets or ("embed", "conv", "body"))), "a"
    )
    more = dict(modules_to_save=["head"])
    adapted.add_adapter("b", lora(r=4, target_modules=["body"], **more))
    adapted.add_adapter("c", rw.AdaLoraConfig(init_r=3, target_r=2, total_step=50, target_modules=["body"]))
    with torch.no_grad():
        adapted.body.lora_B["c"].normal_()
        adapted.head.modules_to_save["b"].weight.add_(1)
    return adapted.eval()


X = torch.arange(20).view(5, 4) % 16


def alone(adapted: Any, x: Tensor, name: str) -> Tensor:
    if name == "__base__":
        with adapted.disable_adapter():
            return adapted(x)
    adapted.set_adapter(name)
    return adapted(x)


@pytest.mark.parametrize(
    "names",
    [["a", "b", "c", "__base__", "a"], ["b", "b", "a", "a", "a"], ["c"] * 5, ["__base__"] * 5],
)
def test_each_row_is_the_output_of_its_adapter_alone(names: list[str]) -> None:
    adapted = model()
    expected = torch.cat([alone(adapted, X[i : i + 1], name) for i, name in enumerate(names)])
    for active in ("a", "b"):
        adapted.set_adapter(active)
        assert torch.allclose(adapted(X, adapter_names=names), expected, atol=1e-6)
        assert adapted.active_adapters == [active]
        assert torch.allclose(adapted(X), alone(adapted, X, active)), "it acts as before"
    with adapted.disable_adapter():
        assert torch.allclose(adapted(X, adapter_names=names), adapted(X))


def test_rows_are_pefts(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    adapted = rw.get_peft_model(Swallows(), lora(target_modules=["embed", "body"]), "a").eval()
    adapted.add_adapter("b", lora(r=4, target_modules=["embed", "body"]))
    adapted.save_pretrained(tmp_path)
    names = ["b", "a", "__base__", "b", "a"]
    base = Swallows()
    base.load_state_dict(rw.get_base_model_state_dict(adapted))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", "b")
    expected = theirs.eval()(X, adapter_names=names)
    assert torch.allclose(adapted(X, adapter_names=names), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "kind", "said"),
    [
        (["a", "b"], ValueError, "5.*one row for each of the 2 `adapter_names`"),
        (["a", "b", "a", "b", "a", "b"], ValueError, "one row for each of the 6"),
        (["a", "b", "a", "b", "z"], ValueError, "no adapter 'z'"),
        ("a", TypeError, "must be a list"),
        ([1, 2, 3, 4, 5], TypeError, "must be a list"),
    ],
)
def test_names_that_do_not_fit_are_refused(names: Any, kind: type[Exception], said: str) -> None:
    adapted = model()
    before = adapted(X)
    with pytest.raises(kind, match=said):
        adapted(X, adapter_names=names)
    assert torch.equal(adapted(X), before) and "forward" not in vars(adapted.body)


def test_models_whose_rows_cannot_be_separated_are_refused() -> None:
    adapted = model()
    names = ["a", "b", "a", "b", "a"]
    adapted.train()
    with pytest.raises(ValueError, match=r"call `model\.eval\(\)`"):
        adapted(X, adapter_names=names)
    adapted.eval().merge_adapter()
    with pytest.raises(ValueError, match="not merged"):
        adapted(X, adapter_names=names)
    adapted.unmerge_adapter()
    adapted.add_adapter("biased", lora(target_modules=["body"], bias="all"))
    with pytest.raises(ValueError, match="biases"):
        adapted(X, adapter_names=["biased", "a", "a", "a", "a"])


def test_a_layer_that_sees_tokens_of_many_rows_is_refused() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.flat = nn.Linear(4, 4)

        def forward(self, x: Tensor, **anything: Any) -> Tensor:
            flat = self.flat(x.flatten(0, 1))
            chosen = flat.sum(-1) > 0
            return torch.where(chosen[:, None], self.experts[0](flat), self.experts[1](flat)).view(x.shape)

    for targets, said in (
        (["experts.0", "experts.1"], "tokens of all rows together"),
        (["flat"], "mixes rows"),
    ):
        adapted = rw.get_peft_model(Routed(), lora(target_modules=targets), "a")
        adapted.add_adapter("b", lora(target_modules=targets))
        x = torch.randn(2, 3, 4)
        with pytest.raises(ValueError, match=said):
            adapted.eval()(x, adapter_names=["a", "b"])
        assert torch.allclose(adapted(x, adapter_names=["b", "b"]), alone(adapted, x, "b")), (
            "one for all can't mix"
        )


@pytest.fixture(scope="module")
def language_model() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, pad_token_id=0, eos_token_id=1))
    adapted = rw.get_peft_model(base, lora(target_modules=["q_proj", "embed_tokens"]), "a")
    adapted.add_adapter("b", lora(r=4, target_modules=["v_proj", "down_proj"]))
    return adapted.eval()


@pytest.mark.parametrize(
    "options", [{}, dict(num_beams=3), dict(num_beams=4, num_return_sequences=2), dict(use_cache=False)]
)
def test_each_row_generates_the_same_as_its_adapter_alone(
    language_model: Any, options: dict[str, Any]
) -> None:
    x = torch.randint(2, 64, (3, 5), generator=torch.Generator().manual_seed(1))
    names = ["a", "__base__", "b"]
    settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)
    expected = []
    for i, name in enumerate(names):
        if name == "__base__":
            with language_model.disable_adapter():
                expected.append(language_model.generate(input_ids=x[i : i + 1], **settings))
            continue
        language_model.set_adapter(name)
        expected.append(language_model.generate(input_ids=x[i : i + 1], **settings))
    mixed = language_model.generate(input_ids=x, adapter_names=names, **settings)
    assert torch.equal(mixed, torch.cat(expected))
    assert not torch.equal(expected[0][:, 5:], expected[2][:, 5:])


def test_a_model_without_generate_gets_none() -> None:
    assert not hasattr(model(), "generate")
