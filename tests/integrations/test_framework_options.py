"""Refusals of options and adapters when a framework's configuration is read."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from rankwise.integrations import axolotl, llama_factory, ms_swift
from rankwise.integrations.options import check_options

DOCS = Path(__file__).parents[2] / "docs"
OPTIONS = {"target_r": 4, "tinit": 0.1, "tfinal": 50, "deltaT": 2}


def of_axolotl(options: Any = None, **more: Any) -> dict[str, Any]:
    return axolotl.check_configuration({"adapter": "lora", "lora_r": 8, "rankwise": options, **more})


def of_llama_factory(options: Any = None, **more: Any) -> dict[str, Any]:
    given = {"stage": "sft", "finetuning_type": "lora", "lora_rank": 8, "rankwise": options, **more}
    return llama_factory.check_configuration(given)


def of_ms_swift(options: Any = None, **more: Any) -> dict[str, Any]:
    given = {"tuner_type": "lora", "lora_rank": 8, "callbacks": ["rankwise"], "init_weights": "true", **more}
    return ms_swift.check_configuration(SimpleNamespace(**given), options)


frameworks = pytest.mark.parametrize("check", [of_axolotl, of_llama_factory, of_ms_swift])


@frameworks
def test_right_options_come_out_as_they_are(check: Any) -> None:
    assert check(OPTIONS) == OPTIONS
    assert check(None) == {} == check({})
    assert check({"target_r": 8, "tinit": None}) == {"target_r": 8}
    assert check({"target_r": 0.5}) == {"target_r": 0.5}


@frameworks
@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"target": 4}, ValueError, r"no option `target`.*target_r, tinit, tfinal, deltaT. Did you mean 'target_r'\?"),
        ({"delta_t": 4}, ValueError, r"no option `delta_t`.*Did you mean 'deltaT'\?"),
        ({"target_r": 9}, ValueError, r"`target_r`=9 is greater than `lora_r(ank)?`=8, and ranks only fall. Set `lora"),
        ({"target_r": 0}, ValueError, "`target_r` must be greater than 0"),
        ({"target_r": "4"}, TypeError, "`target_r` must be a number"),
        ({"tinit": -1}, ValueError, "`tinit`"),
        ({"tinit": 0.6, "tfinal": 0.5}, ValueError, "no step for pruning"),
        ({"deltaT": 0}, ValueError, "`deltaT` must be at least 1"),
        ({"deltaT": 1.5}, TypeError, "`deltaT` must be a whole number"),
        (4, TypeError, "must hold options such as `target_r: 4`, but is 4"),
        (["target_r"], TypeError, "must hold options"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(check: Any, options: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        check(options)
    assert re.match(r"`(rankwise|adapt_ranks)` in ", str(caught.value))


@frameworks
def test_a_schedule_that_does_not_fit_the_steps_is_refused_before_training(check: Any) -> None:
    assert check({"tinit": 60, "tfinal": 50}) == {"tinit": 60, "tfinal": 50}
    with pytest.raises(ValueError, match="total_step"):
        check({"tinit": 60, "tfinal": 50}, max_steps=100)
    check(
        {"tinit": 60, "tfinal": 50}, max_steps=-1
    )  # the framework's value for a run whose length is given in epochs


@pytest.mark.parametrize(
    "check, more, message",
    [
        (of_axolotl, {"adapter": None}, "`adapter` is None"),
        (of_axolotl, {"adapter": "mora"}, "`adapter` is 'mora'"),
        (of_axolotl, {"relora": True}, "`relora` merges LoRA"),
        (of_axolotl, {"peft_init_lora_weights": "pissa"}, "`peft_init_lora_weights: pissa` moves a part"),
        (of_axolotl, {"peft_init_lora_weights": "pissa_niter_4"}, "moves a part of the base weights"),
        (of_axolotl, {"peft": {"loftq_config": {"loftq_bits": 4}}}, "`peft.loftq_config: loftq` moves a part"),
        (of_llama_factory, {"finetuning_type": "full"}, "`finetuning_type: lora`, but it is 'full'"),
        (of_llama_factory, {"finetuning_type": "oft"}, "but it is 'oft'"),
        (of_llama_factory, {"stage": "ppo"}, "can't adapt in `stage: ppo`; they can in pt, sft, rm, dpo, kto"),
        (of_llama_factory, {"pissa_init": True}, "`pissa_init: pissa` moves a part"),
        (of_llama_factory, {"use_mca": True}, "with `use_mca`: Megatron"),
        (of_llama_factory, {"use_kt": True}, "with `use_kt`: KTransformers"),
        (of_ms_swift, {"callbacks": []}, "would train plain LoRA. Add `callbacks: rankwise`"),
        (of_ms_swift, {"callbacks": ["early_stop"]}, "would train plain LoRA"),
        (of_ms_swift, {"tuner_type": "longlora"}, "`tuner_type: lora`, but it is 'longlora'"),
        (of_ms_swift, {"tuner_type": "adalora"}, "but it is 'adalora'"),
        (of_ms_swift, {"use_swift_lora": True}, "`use_swift_lora` has LoRA layers of ms-swift's own"),
        (of_ms_swift, {"rlhf_type": "ppo"}, "can't adapt in `rlhf_type: ppo`"),
        (of_ms_swift, {"init_weights": "olora"}, "`init_weights: olora` moves a part"),
        (of_ms_swift, {"init_weights": "lora-ga"}, "`init_weights: lora-ga` moves a part"),
    ],
)  # fmt: skip
def test_adapters_that_cannot_be_adapted_are_refused_by_name(check: Any, more: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check({"target_r": 4}, **more)


@pytest.mark.parametrize(
    "check, more",
    [
        (of_axolotl, {"adapter": "qlora"}),
        (of_axolotl, {"peft_use_dora": True, "peft_init_lora_weights": "gaussian"}),
        (of_axolotl, {"lora_r": 2, "lora_model_dir": "adapter"}),  # the adapter has a rank of its own
        (of_axolotl, {"lora_r": 2, "lora_rank_pattern": {"q_proj": 64}}),
        (of_axolotl, {"lora_r": None}),
        (of_axolotl, {"rl": "dpo"}),
        (of_llama_factory, {"stage": "dpo", "use_rslora": True}),
        (of_llama_factory, {"lora_rank": 2, "adapter_name_or_path": "adapter"}),
        (of_ms_swift, {"callbacks": "rankwise", "rlhf_type": "dpo"}),
        (of_ms_swift, {"lora_rank": 2, "adapters": ["adapter"]}),
        (of_ms_swift, {"init_weights": "gaussian", "use_dora": True}),
    ],
)
def test_adapters_that_can_be_adapted_are_not_refused(check: Any, more: Any) -> None:
    assert check({"target_r": 4}, **more) == {"target_r": 4}


def test_the_variable_of_an_environment_that_changes_the_trainer_is_refused_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("USE_MCA", "1")
    with pytest.raises(ValueError, match="with `use_mca`"):
        of_llama_factory({"target_r": 4})


# A framework that is not installed, or no longer has what rankwise needs. An ImportError would do harm: axolotl would
# think that the plugin is not installed, and train on.


def test_frameworks_without_their_extension_points_are_refused_and_not_by_an_import_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("llamafactory", "swift"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(axolotl, "_Plugin", object)
    told = "by which rankwise adapts ranks there, so this run would train plain LoRA. rankwise is tested with"
    for start in (
        axolotl.AdaptiveRanks,
        lambda: llama_factory.run_exp({"rankwise": {}}),
        ms_swift.adapt_ranks,
    ):
        with pytest.raises(RuntimeError, match=told):
            start()


def test_a_hook_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plugin:
        def get_input_args(self) -> None: ...

        def post_trainer_create(self, cfg: Any, trainer: Any) -> None: ...

    monkeypatch.setattr(axolotl, "_Plugin", Plugin)
    with pytest.raises(RuntimeError, match="has no `add_callbacks_pre_trainer`"):
        axolotl.AdaptiveRanks()

    tuner = ModuleType("llamafactory.train.tuner")
    for name in ("llamafactory", "llamafactory.train"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "llamafactory.train.tuner", tuner)
    with pytest.raises(RuntimeError, match="has no `run_exp` in `llamafactory.train.tuner`"):
        llama_factory.run_exp({"rankwise": {}})


def test_a_trainer_of_axolotl_without_the_callback_is_refused() -> None:
    from rankwise import AdaptRanks

    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[object()]))
    plugin = object.__new__(axolotl.AdaptiveRanks)
    with pytest.raises(RuntimeError, match="callbacks of plugins in its SimpleNamespace"):
        plugin.post_trainer_create({}, trainer)
    trainer.callback_handler.callbacks.append(AdaptRanks(target_r=2))
    plugin.post_trainer_create({}, trainer)


def test_unknown_ranks_are_left_to_the_trainer() -> None:
    for rank in (None, 0, -1, True, "8"):
        assert check_options({"target_r": 64}, "`rankwise`", rank, "lora_r") == {"target_r": 64}


# The pages


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(
    "page, check",
    [
        ("axolotl.md", axolotl.check_configuration),
        ("llama-factory.md", llama_factory.check_configuration),
        ("ms-swift.md", lambda config: ms_swift.check_configuration(SimpleNamespace(**config), {})),
    ],
)
def test_the_yaml_of_the_page_passes_the_checks(page: str, check: Any) -> None:
    files = [yaml.safe_load(block) for block in blocks(page, "yaml")]
    whole = [config for config in files if "learning_rate" in config]
    assert whole
    for config in whole:
        check(config)
