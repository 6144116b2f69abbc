"""rankwise's own layers under TRL: a wrong reference model is refused, and so is an adapter of PEFT on top.

All tests use the real TRL and PEFT.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw
from tiny import llama, token_batches, told, words_tokenizer
from trl_world import NEEDS_A_REFERENCE, TRAINERS, base_for, data, logged, trl_trainer

pytest.importorskip("trl")
peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj"]


def config(**changes: Any) -> rw.AdaLoraConfig:
    return rw.AdaLoraConfig(**{"init_r": 4, "target_r": 2, "target_modules": TARGETS, **changes})


def continued(kind: str = "dpo", **changes: Any) -> Any:
    """A model whose adapter has been trained before."""
    torch.manual_seed(5)
    model = rw.get_peft_model(base_for(kind), config(**changes))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


# --- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NEEDS_A_REFERENCE)
def test_a_trainer_that_would_load_a_bare_base_as_the_reference_is_refused_when_it_is_made(
    kind: str, tmp_path: Path
) -> None:
    way = "precompute_ref_log_probs=True" if kind in ("dpo", "kto") else "beta=0.0"
    with pytest.raises(ValueError, match="wrong reference.*peft.LoraConfig.*rankwise.AdaptRanks") as refusal:
        trl_trainer(kind, tmp_path, continued())
    assert way in str(refusal.value)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_plain_lora_of_rankwise_is_refused_in_the_same_way(kind: str, tmp_path: Path) -> None:
    model = rw.get_peft_model(llama(), rw.LoraConfig(r=4, target_modules=TARGETS))
    with pytest.raises(ValueError, match="wrong reference"):
        trl_trainer(kind, tmp_path, model)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize("way", ["precomputed", "given"])
def test_with_the_right_reference_preferences_start_at_no_difference_and_train(
    kind: str, way: str, tmp_path: Path
) -> None:
    model = continued()
    reference = copy.deepcopy(model) if way == "given" else None
    trainer = trl_trainer(
        kind, tmp_path, model, ref_model=reference, precompute_ref_log_probs=way == "precomputed"
    )
    trainer.train()
    first = logged(trainer, "loss")[0]
    assert first == pytest.approx(math.log(2) if kind == "dpo" else 0.5, abs=1e-6)
    assert logged(trainer, "rewards/chosen")[0] == 0
    assert model.allocation_state.reached_target


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_reference_that_follows_a_model_whose_ranks_adapt_is_refused(kind: str, tmp_path: Path) -> None:
    model = continued()
    with pytest.raises(ValueError, match=r"sync_ref_model=False.*rankwise\.LoraConfig"):
        trl_trainer(kind, tmp_path, model, ref_model=copy.deepcopy(model), sync_ref_model=True)
    fixed = rw.get_peft_model(llama(), rw.LoraConfig(r=4, target_modules=TARGETS))
    trl_trainer(kind, tmp_path, fixed, ref_model=copy.deepcopy(fixed), sync_ref_model=True)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_without_a_kl_term_no_reference_is_needed(kind: str, tmp_path: Path) -> None:
    model = continued()
    trl_trainer(kind, tmp_path, model, beta=0.0).train()
    assert model.allocation_state.reached_target


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_parameters_that_vllm_has_no_names_for_are_not_sent_to_it(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no names of rankwise's own layers.*rankwise\.AdaptRanks"):
        trl_trainer(kind, tmp_path, continued(), beta=0.0, use_vllm=True)


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_trainers_without_a_reference_take_the_model(kind: str, tmp_path: Path) -> None:
    model = continued(kind)
    trl_trainer(kind, tmp_path, model).train()
    assert model.allocation_state.reached_target


def test_a_subclass_with_a_constructor_of_its_own_is_refused_as_well(tmp_path: Path) -> None:
    import trl

    class Mine(trl.DPOTrainer):  # type: ignore[misc]
        def __init__(self, policy: Any, **options: Any) -> None:
            super().__init__(policy, **options)

    with pytest.raises(ValueError, match="Mine would load a bare base"):
        Mine(
            continued(),
            args=trl.DPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False),
            train_dataset=data("dpo"),
            processing_class=words_tokenizer(),
        )


def test_a_reference_that_a_trainer_made_in_another_way_is_refused_before_it_is_used(tmp_path: Path) -> None:
    trainer = trl_trainer("dpo", tmp_path, continued(), precompute_ref_log_probs=True)
    trainer.ref_model = llama()  # as in a trainer that rankwise does not know
    with pytest.raises(ValueError, match="wrong reference"):
        trainer.train()


ORDERS = {
    "rankwise first": "import rankwise; import trl",
    "TRL first": "import trl; import rankwise",
    "trainers first": "from trl import DPOTrainer; import rankwise",
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_imports_makes_no_difference(order: str, tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    path = [str(Path(rw.__file__).parents[1]), str(tests), str(tests / "integrations")]
    code = f"""
        import sys
        sys.path[:0] = {path!r}
        import conftest, pathlib
        {ORDERS[order]}
        from test_trl import continued
        from trl_world import trl_trainer
        model = continued()
        try:
            trl_trainer("dpo", pathlib.Path({str(tmp_path)!r}), model)
        except ValueError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert "wrong reference" in done.stdout, done.stderr


# --- PEFT on top of rankwise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_peft_config_for_an_adapted_model_is_refused_when_the_trainer_is_made(
    kind: str, tmp_path: Path
) -> None:
    on_top = peft.LoraConfig(r=4, target_modules=TARGETS)
    with pytest.raises(ValueError, match="PEFT has put an adapter on top.*AdaptRanks"):
        trl_trainer(kind, tmp_path, continued(kind), peft_config=on_top)


@pytest.mark.parametrize("targets", [TARGETS, ["k_proj"]], ids=["the same layers", "other layers"])
def test_in_a_plain_loop_peft_over_an_adapted_model_is_reported_at_the_first_step(targets: list[str]) -> None:
    model = peft.get_peft_model(continued(total_step=8), peft.LoraConfig(r=4, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with told() as messages:
        for batch in token_batches(3):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    (message,) = [each for each in messages if "PEFT has put an adapter on top" in each]
    assert "adapt_ranks" in message


def test_a_frozen_adapter_of_rankwise_may_have_one_of_peft_on_top(tmp_path: Path) -> None:
    """It is used as it is, so nothing is lost when PEFT freezes it."""
    frozen = rw.LoraConfig(r=4, target_modules=TARGETS, inference_mode=True)
    model = rw.get_peft_model(llama(), frozen)
    on_top = peft.LoraConfig(r=4, target_modules=["k_proj"])
    with told() as messages:
        trl_trainer("sft", tmp_path, model, peft_config=on_top).train()
    assert not [each for each in messages if "on top" in each]


def test_adapt_ranks_is_refused_on_rankwises_own_layers_when_the_trainer_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rankwise's own layers"):
        trl_trainer("sft", tmp_path, continued(), callbacks=[rw.AdaptRanks(target_r=2)])


# --- rankwise's configurations where PEFT's belong ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "cls"), [*((kind, rw.AdaLoraConfig) for kind in TRAINERS), ("sft", rw.LoraConfig)]
)
def test_a_configuration_of_rankwise_as_peft_config_is_refused_with_the_way_that_works(
    kind: str, cls: Any, tmp_path: Path
) -> None:
    from transformers import Trainer  # noqa: F401 - as in scripts that make a trainer

    with pytest.raises(TypeError, match=f"{cls.__name__}.*peft.LoraConfig.*AdaptRanks"):
        trl_trainer(kind, tmp_path, peft_config=cls(target_modules=TARGETS))


@pytest.mark.parametrize("way", ["get_peft_model", "inject_adapter_in_model"])
def test_pefts_own_functions_say_what_to_do_with_a_configuration_of_rankwise(way: str) -> None:
    call = {
        "get_peft_model": lambda own: peft.get_peft_model(llama(), own),
        "inject_adapter_in_model": lambda own: peft.inject_adapter_in_model(own, llama()),
    }[way]
    with pytest.raises(TypeError, match="peft.LoraConfig.*adapt_ranks.*AdaptRanks"):
        call(config())


def test_a_configuration_has_none_of_pefts_attributes_for_hasattr() -> None:
    assert config().is_prompt_learning is False and config().is_adaption_prompt is False
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = config().nonsense
