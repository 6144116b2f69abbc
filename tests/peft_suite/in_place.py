"""A pytest plugin that runs PEFT's tests of LoRA and AdaLoRA on rankwise, and records the outcome of each test.

Every name that has a counterpart in rankwise is replaced in all modules of the installed PEFT, before any test is
imported. PEFT's tests also look inside adapted layers. What they read there gets PEFT's name if it has the same
meaning, so that the rest of the test can run.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import datasets
import numpy as np
import peft
import peft.utils.save_and_load
import pytest
import torch
from PIL import Image
from torch import nn

import rankwise
from rankwise.adapters import AdapterLayer, ParameterSlot
from rankwise.adapters.conv import Conv2dAdapters
from rankwise.adapters.embedding import EmbeddingAdapters
from rankwise.adapters.linear import LinearAdapters
from rankwise.adapters.saved import SavedModule
from rankwise.attach.targets import find_targets

torch.set_num_threads(1)


class NotOffered(NotImplementedError):
    """A function of PEFT that rankwise does not have."""


def _not_offered(name: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotOffered(f"rankwise has no {name}")

    return refuse


def check_target_module_exists(config: Any, key: str) -> bool:
    """Whether a configuration selects a linear layer at ``key``."""
    if not key or key.startswith("."):
        raise NotOffered("rankwise has no check_target_module_exists of no path")
    root = nn.Module()
    parent = root
    *outer, last = key.split(".")
    for name in outer:
        parent.add_module(name, nn.Module())
        parent = parent.get_submodule(name)
    parent.add_module(last, nn.Linear(2, 2))
    try:
        return key in find_targets(root, config)
    except ValueError:
        return False


# Replacements

SAME_NAME = """
    AdaLoraConfig LoraConfig PeftConfig PeftModel get_peft_model get_peft_model_state_dict set_peft_model_state_dict
    get_base_model_state_dict set_base_model_state_dict inject_adapter_in_model prepare_model_for_kbit_training
    AutoPeftModel AutoPeftModelForCausalLM
    AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM
    AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification
""".split()
NOT_OFFERED = """
    cast_mixed_precision_params get_layer_status get_model_status
    load_peft_weights replace_lora_weights_loftq convert_to_lora save_as_lora hotswap_adapter
    hotswap_adapter_from_state_dict prepare_model_for_compiled_hotswap get_eva_state_dict initialize_lora_eva_weights
    preprocess_corda preprocess_loraga rescale_adapter_scale delete_adapter set_adapter PeftMixedModel get_peft_config
""".split()
OTHERS: dict[str, Any] = {
    "LoraLayer": AdapterLayer,
    "AdaLoraLayer": AdapterLayer,
    "BaseTunerLayer": AdapterLayer,
    "ModulesToSaveWrapper": SavedModule,
    "AuxiliaryTrainingWrapper": SavedModule,
    "ParamWrapper": ParameterSlot,
    "check_target_module_exists": check_target_module_exists,
}
LAYERS = {"Linear": LinearAdapters, "Embedding": EmbeddingAdapters, "Conv2d": Conv2dAdapters}


def _replace() -> None:
    new = {name: getattr(rankwise, name) for name in SAME_NAME} | OTHERS
    new |= {name: _not_offered(name) for name in NOT_OFFERED if not hasattr(rankwise, name)}
    new |= {name: getattr(rankwise, name) for name in NOT_OFFERED if hasattr(rankwise, name)}
    new |= {name: rankwise.PeftModel for name in vars(peft) if re.fullmatch(r"PeftModelFor\w+", name)}
    for name, module in list(sys.modules.items()):
        if name == "peft" or name.startswith("peft."):
            for each in new.keys() & vars(module).keys():
                setattr(module, each, new[each])
    for name in ("peft.tuners.lora", "peft.tuners.lora.layer"):
        for each, value in LAYERS.items():
            setattr(sys.modules[name], each, value)


def _name_what_is_inside() -> None:
    layer: Any = AdapterLayer
    layer.get_base_layer = lambda self: self
    layer.base_layer = property(lambda self: self)
    layer.get_delta_weight = lambda self, name: self.delta_weight(name)
    layer.merged = property(lambda self: bool(self.merged_adapters))
    layer.disable_adapters = property(lambda self: not self.adapters_enabled)
    layer.active_adapter = property(
        lambda self: self.active_adapters[0] if len(self.active_adapters) == 1 else self.active_adapters
    )
    layer.r = property(_Ranks)
    layer._all_available_adapter_names = lambda self: sorted(self.lora_A)
    layer.enable_adapters = lambda self, enabled: setattr(self, "adapters_enabled", enabled)
    layer.set_adapter = _set_adapter
    saved: Any = SavedModule
    saved.original_module = property(lambda self: self)
    parameter: Any = nn.Parameter
    parameter.weight = property(lambda self: self)  # `lora_A[name].weight`
    model: Any = rankwise.PeftModel
    model.prefix = "lora_"
    model.prepare_model_for_gradient_checkpointing = _prepare_checkpointing
    import transformers

    transformers.PreTrainedModel.prefix = "lora_"  # the prefix of `model.base_model`


class _Ranks(Mapping[str, int]):
    """The current ranks of a layer's adapters."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __getitem__(self, name: str) -> int:
        return int(self.layer.rank_of(self.layer, self.layer.lora_A[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(getattr(self.layer, "lora_A", ()))  # a layer without adapters is a plain layer again

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in list(iter(self))


def _set_adapter(self: Any, names: Any, inference_mode: bool = False) -> None:
    self.active_adapters = [names] if isinstance(names, str) else list(names)


def _prepare_checkpointing(self: Any, model: Any) -> None:
    if hasattr(self, "enable_input_require_grads"):
        self.enable_input_require_grads()


def _write_cards_too() -> None:
    """Write a card with every save, as PEFT does. In rankwise it takes a call of its own."""
    save = rankwise.PeftModel.save_pretrained

    def save_with_cards(self: Any, folder: Any, **options: Any) -> None:
        save(self, folder, **options)
        for name in options.get("selected_adapters") or list(self.peft_config):
            place = os.path.join(folder, "" if name == "default" else name)
            if os.path.isdir(place):
                self.create_or_update_model_card(place)

    rankwise.PeftModel.save_pretrained = save_with_cards  # type: ignore[method-assign]


def _give_a_picture() -> None:
    """Replace the hub's picture of cats by random noise."""
    load = datasets.load_dataset

    def load_dataset(name: str, *args: Any, **options: Any) -> Any:
        if name != "huggingface/cats-image":
            return load(name, *args, **options)
        noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
        return {"test": {"image": [Image.fromarray(noise)]}}

    datasets.load_dataset = load_dataset


_replace()
_write_cards_too()
_give_a_picture()
_name_what_is_inside()

# The tests of LoRA and AdaLoRA

OTHER_METHODS = """
    adamss adaption arrow beft bd_?lora boft bone c3a cartridge corda cpt deft delora dora eva fourier frod
    glora gralora hira hra ia3 kasa layer_replication lily ln_?tuning loftq loha lokr lora_?ga lora_conversion
    megatron mica miss mixed_model monteclora oft olora orthogonal osf p_tuning peanut pissa poly prefix
    prompt psoft pvera qalora randlora road shadow shira supertuning tinylora trainable_tokens unilora
    vb_?lora velora vera waveft xlora (?<!ad)alora
""".split()
_OTHER = re.compile(r"(?<![a-z])(" + "|".join(OTHER_METHODS) + ")", re.IGNORECASE)
VARIANTS = """
    alora_invocation_tokens arrow_config corda_config ensure_weight_tying eva_config kasa_config layer_replication
    layers_to_tie loftq_config lora_bias lora_ga_config megatron_config monteclora_config runtime_config
    trainable_token_indices use_bdlora use_dora use_kasa use_qalora velora_config
""".split()
_STARTS = (True, False, "gaussian", "principal")


def _is_ours(item: pytest.Item) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
    classes = [value for value in parameters if isinstance(value, type) and value.__name__.endswith("Config")]
    if any(cls not in (rankwise.LoraConfig, rankwise.AdaLoraConfig) for cls in classes):
        return False
    for settings in parameters:
        if isinstance(settings, dict):
            if any(settings.get(name) for name in VARIANTS):
                return False
            if settings.get("init_lora_weights", True) not in _STARTS:
                return False
    name = (
        getattr(item, "originalname", item.name)
        if classes
        else f"{getattr(item.cls, '__name__', '')}::{item.name}"
    )
    return not _OTHER.search(name)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests of other methods and of LoRA's variants."""
    chosen = [item for item in items if _is_ours(item)]
    config.hook.pytest_deselected(items=[item for item in items if not _is_ours(item)])
    items[:] = chosen


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Give each test the same random numbers every time."""
    torch.manual_seed(0)


# The outcome of each test

_outcomes: dict[str, str] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Record a test's outcome: "passed", "skipped", or its error with the statement that raised it."""
    report = yield
    name = item.nodeid.removeprefix("tests/test_")
    name = re.sub(r"\.py(?=::)", "", name, count=1).encode("unicode_escape").decode()
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = str(crash.message if crash else report.longrepr)
        statement = str(call.excinfo.traceback[-1].statement).strip() if call.excinfo else ""
        _outcomes[name] = f"{message.replace(chr(10), ' ')[:500]} [{' '.join(statement.split())[:150]}]"
    elif report.skipped and not hasattr(report, "wasxfail"):
        _outcomes[name] = "skipped"
    elif report.when == "call":
        _outcomes[name] = "passed"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the outcomes to a file, unless the tests could not be collected."""
    if session.testscollected:
        with open(os.environ["PEFT_SUITE_RESULTS"], "w") as file:
            json.dump(_outcomes, file, indent=1)
