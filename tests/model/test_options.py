"""Options of PEFT's functions are used, refused with the nearest name, or reported as without effect; never ignored."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.adapters.inplace import InPlace
from rankwise.storage import PICKLE_NAME, WEIGHTS_NAME


def layers(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype)


def config(**fields: Any) -> rw.LoraConfig:
    return rw.LoraConfig(**{"r": 2, "target_modules": ["0"], "init_lora_weights": False, **fields})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rw.get_peft_model(layers(), config(modules_to_save=["2"])).save_pretrained(tmp_path)
    return tmp_path


# Names

MISSPELT: list[tuple[str, str, Any, Callable[[Path, dict[str, Any]], Any]]] = [
    ("is_trainble", "is_trainable", True, lambda p, o: rw.PeftModel.from_pretrained(layers(), p, **o)),
    ("adapter_nam", "adapter_name", "a", lambda p, o: rw.PeftModel.from_pretrained(layers(), p, **o)),
    ("autocast_dtype", "autocast_adapter_dtype", 1, lambda p, o: rw.PeftModel.from_pretrained(layers(), p, **o)),
    ("revison", "revision", "x", lambda p, o: rw.get_peft_model(layers(), config(), "a").load_adapter(p, **o)),
    ("sub_folder", "subfolder", "x", lambda p, o: rw.LoraConfig.from_pretrained(p, **o)),
    ("low_cpu_mem_usag", "low_cpu_mem_usage", 1, lambda p, o: rw.get_peft_model(layers(), config(), **o)),
    ("autocast_adapter_type", "autocast_adapter_dtype", 1,
     lambda p, o: rw.get_peft_model(layers(), config(), "a").add_adapter("b", config(), **o)),
    ("save_embeding_layers", "save_embedding_layers", True,
     lambda p, o: rw.get_peft_model(layers(), config()).save_pretrained(p / "new", **o)),
    ("selected_adapter", "selected_adapters", ["default"],
     lambda p, o: rw.get_peft_model(layers(), config()).save_pretrained(p / "new", **o)),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "right", "value", "call"), MISSPELT)
def test_misspelt_options_are_refused_with_the_nearest_name(
    wrong: str, right: str, value: Any, call: Callable[[Path, dict[str, Any]], Any], folder: Path
) -> None:
    with pytest.raises(TypeError, match=rf"no argument '{wrong}'\. Did you mean '{right}'\?"):
        call(folder, {wrong: value})
    assert not (folder / "new").exists()


def test_every_option_of_pefts_functions_is_taken_at_its_default(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    calls: list[tuple[Any, Callable[..., Any]]] = [
        (peft.get_peft_model, lambda **o: rw.get_peft_model(layers(), config(), **o)),
        (peft.PeftModel.__init__, lambda **o: rw.PeftModel(layers(), config(), **o)),
        (peft.PeftModel.from_pretrained, lambda **o: rw.PeftModel.from_pretrained(layers(), folder, **o)),
        (
            peft.PeftModel.load_adapter,
            lambda **o: rw.get_peft_model(layers(), config(), "a").load_adapter(folder, "b", **o),
        ),
        (
            peft.PeftModel.add_adapter,
            lambda **o: rw.get_peft_model(layers(), config(), "a").add_adapter("b", config(), **o),
        ),
        (
            peft.PeftModel.save_pretrained,
            lambda **o: rw.get_peft_model(layers(), config()).save_pretrained(folder / "new", **o),
        ),
        (peft.PeftConfig.from_pretrained, lambda **o: rw.PeftConfig.from_pretrained(folder, **o)),
        (
            peft.inject_adapter_in_model,
            lambda **o: rw.inject_adapter_in_model(config(), layers(), **o),
        ),
        (
            peft.get_peft_model_state_dict,
            lambda **o: rw.get_peft_model_state_dict(rw.get_peft_model(layers(), config()), **o),
        ),
    ]
    required = ("model", "model_id", "peft_config", "save_directory", "adapter_name")
    for original, call in calls:
        for name, parameter in inspect.signature(original).parameters.items():
            plain = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if plain and name not in required and parameter.default is not parameter.empty:
                call(**{name: parameter.default})


def test_every_field_of_pefts_configurations_is_taken_at_its_default_and_refused_at_another() -> None:
    peft = pytest.importorskip("peft")
    for theirs, ours in ((peft.LoraConfig, rw.LoraConfig), (peft.AdaLoraConfig, rw.AdaLoraConfig)):
        own = {each.name for each in dataclasses.fields(ours)}
        for each in dataclasses.fields(theirs):
            made: Any = each.default_factory
            default = each.default if each.default is not dataclasses.MISSING else made()
            if each.name in own:
                continue
            made = ours(target_modules=["0"], **{each.name: default})
            setattr(made, each.name, default)
            getattr(made, each.name)
            data = ours(target_modules=["0"]).to_dict() | {
                each.name: None if "config" in each.name else default
            }
            assert ours.from_dict({**data, "peft_type": made.peft_type.value}).target_modules == ["0"]
            if each.name not in ("peft_version", "auto_mapping"):
                with pytest.raises(TypeError, match=f"`{each.name}`"):
                    ours(target_modules=["0"], **{each.name: {"ephemeral_gpu_offload": True}})


def test_missing_features_name_an_alternative() -> None:
    with pytest.raises(TypeError, match=r"`use_dora`.*PEFT.*`rankwise\.adapt_ranks`"):
        rw.LoraConfig(use_dora=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"`use_doora`.*PEFT's `use_dora`"):
        rw.LoraConfig(use_doora=False)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="`peft_type` of a LoraConfig is 'LORA'"):
        rw.LoraConfig(peft_type="ADALORA")  # type: ignore[call-arg]


def test_unknown_newer_fields_are_reported_and_kept() -> None:
    data = {**config().to_dict(), "warp": 9}
    with pytest.warns(UserWarning, match=r"here\.json: rankwise does not know `warp`=9") as caught:
        read = rw.LoraConfig.from_dict(data, source="here.json")
    assert len(caught) == 1 and read.to_dict()["warp"] == 9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dataclasses.replace(read, r=4).r == 4  # the warning is given once


# Values


def test_a_given_configuration_takes_the_place_of_the_folders(folder: Path) -> None:
    x = torch.ones(1, 8)
    plain = layers()(x)
    update = rw.PeftModel.from_pretrained(layers(), folder)(x) - plain
    given = config(lora_alpha=16, modules_to_save=["2"])  # twice the folder's value
    double = rw.PeftModel.from_pretrained(layers(), folder, config=given)
    assert double.peft_config["default"].lora_alpha == 16 and double.peft_config["default"].inference_mode
    delta = double[0].delta_weight("default")
    single = rw.PeftModel.from_pretrained(layers(), folder)[0].delta_weight("default")
    assert torch.allclose(delta, 2 * single) and update.abs().max() > 0
    (folder / "adapter_config.json").unlink()
    again = rw.PeftModel.from_pretrained(layers(), folder, config=given)
    assert torch.equal(again[0].delta_weight("default"), delta)
    with pytest.raises(ValueError, match=r"rank 2.*`config` was given, and replaces .*adapter_config"):
        rw.PeftModel.from_pretrained(layers(), folder, config=config(r=4, modules_to_save=["2"]))
    with pytest.raises(TypeError, match="`config` must be a rankwise LoraConfig"):
        rw.PeftModel.from_pretrained(layers(), folder, config={"r": 2})


def test_a_given_configuration_may_leave_the_head_to_its_task(tmp_path: Path) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.score = nn.Linear(4, 4), nn.Linear(4, 2)

    own = rw.LoraConfig(r=2, target_modules=["body"], task_type="SEQ_CLS")
    rw.get_peft_model(Classifier(), own).save_pretrained(tmp_path)
    loaded = rw.PeftModel.from_pretrained(Classifier(), tmp_path, config=own)
    assert loaded.peft_config["default"].modules_to_save == ["score"] and own.modules_to_save is None


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_the_adapter_has_the_precision_of_the_base_if_asked_for(
    dtype: torch.dtype, kind: str, tmp_path: Path
) -> None:
    made = config(modules_to_save=["2"])
    if kind == "adalora":
        made = rw.AdaLoraConfig(
            init_r=4, target_r=2, total_step=20, target_modules=["0"], modules_to_save=["2"]
        )

    def dtypes(model: Any, name: str) -> set[torch.dtype]:
        own = [p for key, p in model.named_parameters() if f".{name}" in key]
        assert len(own) >= 4
        return {p.dtype for p in own}

    model = rw.get_peft_model(layers(dtype), made, autocast_adapter_dtype=False)
    assert dtypes(model, "default") == {dtype}
    assert model(torch.ones(2, 8, dtype=dtype)).dtype == dtype
    model.save_pretrained(tmp_path, training_state=False)
    for casts, expected in ((False, dtype), (True, torch.float32)):
        loaded = rw.PeftModel.from_pretrained(layers(dtype), tmp_path, autocast_adapter_dtype=casts)
        assert dtypes(loaded, "default") == {expected}
        loaded.load_adapter(tmp_path, "more", autocast_adapter_dtype=casts)
        assert dtypes(loaded, "more") == {expected}
        assert torch.equal(loaded[0].lora_A["more"].float(), model[0].lora_A["default"].float())
    again = rw.get_peft_model(layers(dtype), config(), "a")
    again.add_adapter("b", config(), autocast_adapter_dtype=False)
    assert (again[0].lora_A["a"].dtype, again[0].lora_A["b"].dtype) == (torch.float32, dtype)
    with pytest.raises(TypeError, match="`autocast_adapter_dtype` must be True or False"):
        rw.get_peft_model(layers(dtype), config(), autocast_adapter_dtype="no")


def test_values_beyond_half_precision_are_refused_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = rw.get_peft_model(layers(), config())
    with torch.no_grad():
        model[0].lora_A["default"].mul_(1e6)
    model.save_pretrained(tmp_path)
    base = layers(torch.float16)
    with pytest.raises(ValueError, match="lora_A of '0' has values beyond what torch.float16 can hold"):
        rw.PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    assert type(base) is nn.Sequential and type(base[0]) is nn.Linear


def test_an_adapter_in_half_precision_trains() -> None:
    fields: dict[str, Any] = dict(init_r=4, target_r=2, total_step=12, tinit=2, tfinal=4, deltaT=1)
    made = rw.AdaLoraConfig(**fields, target_modules=["0", "2"])
    model = rw.get_peft_model(layers(torch.bfloat16), made, autocast_adapter_dtype=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, y = torch.randn(32, 8).bfloat16(), torch.randn(32, 2).bfloat16()
    losses = []
    for _ in range(12):
        loss = (model(x) - y).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] and model.allocation_state.phase == "final"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_options_of_the_base_model_are_reported_to_have_no_effect(folder: Path) -> None:
    with pytest.warns(UserWarning, match="`device_map`, `torch_dtype` belongs to loading the base model"):
        rw.PeftModel.from_pretrained(layers(), folder, torch_dtype=torch.float16, device_map="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rw.PeftModel.from_pretrained(
            layers(), folder, low_cpu_mem_usage=True, torch_device="cpu", device_map=None
        )


def test_options_for_the_hub_reach_it_without_those_of_the_base(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    seen: dict[str, Any] = {}

    def snapshot_download(
        name: str, *, allow_patterns: list[str], revision: Any = None, token: Any = None
    ) -> str:
        seen.update(name=name, patterns=allow_patterns, revision=revision, token=token)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = dict(
            torch_dtype=torch.float16, device_map="cpu", low_cpu_mem_usage=True, use_auth_token="t"
        )
        rw.PeftModel.from_pretrained(layers(), "me/adapter", revision="v2", **options)  # type: ignore[arg-type]
    assert (seen["name"], seen["revision"], seen["token"]) == ("me/adapter", "v2", "t")
    assert rw.PeftConfig.from_pretrained("me/adapter", revision="v3").r == 2
    assert (seen["revision"], seen["patterns"]) == ("v3", ["adapter_config.json"])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda p: rw.PeftModel.from_pretrained(layers(), p, key_mapping={"a": "b"}), "rename the tensors"),
        (
            lambda p: rw.PeftModel.from_pretrained(layers(), p, ignore_mismatched_sizes=True),
            "that it was trained on",
        ),
        (lambda p: rw.get_peft_model(layers(), config(), mixed=True), "may be mixed without it"),
        (lambda p: rw.get_peft_model(layers(), config()).save_pretrained(p, push_to_hub=True), "push_to_hub"),
        (
            lambda p: rw.get_peft_model(layers(), config()).save_pretrained(p, variant="fp16"),
            "another folder",
        ),
    ],
)
def test_options_that_are_not_offered_name_an_alternative(call: Any, said: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=said):
        call(folder)


def test_revision_is_noted_in_the_configuration() -> None:
    own = config()
    model = rw.get_peft_model(layers(), own, revision="v2")
    assert model.peft_config["default"].revision == "v2" and own.revision is None


def test_a_pickle_is_written_on_demand_and_read_again(tmp_path: Path) -> None:
    model = rw.get_peft_model(layers(), config())
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / PICKLE_NAME).is_file() and not (tmp_path / WEIGHTS_NAME).exists()
    x = torch.randn(3, 8)
    assert torch.equal(rw.PeftModel.from_pretrained(layers(), tmp_path)(x), model.eval()(x))
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(layers(), tmp_path)
    assert torch.allclose(theirs(x), model(x), atol=1e-6)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / PICKLE_NAME).exists() and (tmp_path / WEIGHTS_NAME).is_file()


# The model's class


def test_the_class_of_an_adapted_model_makes_and_loads_plain_ones(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    kind = transformers.LlamaForCausalLM
    settings = transformers.LlamaConfig(**sizes, num_key_value_heads=2)
    kind(settings).save_pretrained(tmp_path)
    model = rw.get_peft_model(kind.from_pretrained(tmp_path), rw.LoraConfig(r=2, modules_to_save=["lm_head"]))
    loaded = type(model).from_pretrained(tmp_path)
    for plain in (loaded, type(model)(settings), type(model)._from_config(settings)):
        assert type(plain) is kind and not hasattr(plain, "peft_config")
    adapted = rw.get_peft_model(loaded, rw.LoraConfig(r=2))
    assert adapted.active_adapters == ["default"]
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, InPlace) and type(type(layer)(3, 4)) is nn.Linear
    assert type(type(model.lm_head)(3, 4)) is nn.Linear


def test_pefts_constructor_attaches() -> None:
    base = layers()
    model = rw.PeftModel(base, config(), "own")
    assert model is base and model.active_adapters == ["own"]
    with pytest.raises(TypeError):
        rw.PeftModel(base)  # type: ignore[call-arg]


# Names of adapters


@pytest.mark.parametrize("name", ["train", "keys", "forward", "parameters", "training", "_modules"])
def test_a_name_that_every_module_has_is_refused_for_that_reason(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"'{name}' can't name an adapter: every module of PyTorch has an attribute"
    ):
        rw.get_peft_model(layers(), config(), name)


def test_attaching_twice_names_unload() -> None:
    model = rw.get_peft_model(layers(), config())
    with pytest.raises(ValueError, match=r"a notebook's cell is run again, call `model = model\.unload\(\)`"):
        rw.get_peft_model(model, config())
    assert rw.get_peft_model(model.unload(), config()).active_adapters == ["default"]
