"""Configurations: early refusals that name the field and the remedy, and PEFT's JSON in both directions."""

from __future__ import annotations

import copy
import dataclasses
import enum
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.config import CONFIG_NAME, TASK_TYPES, AdaLoraConfig, LoraConfig
from rankwise.method.schedule import BudgetSchedule

SCHEDULE = {"tinit": 10, "tfinal": 20, "total_step": 100}
# Fields that PEFT writes and rankwise does not use, with PEFT's default values.
NEUTRAL = {
    "alora_invocation_tokens": None,
    "auto_mapping": None,
    "ensure_weight_tying": False,
    "layer_replication": None,
    "loftq_config": {},
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "use_dora": False,
}


def ada_file(**fields: Any) -> dict[str, Any]:
    return {"peft_type": "ADALORA", "r": 8, "init_r": 4, "target_r": 2, **SCHEDULE, **NEUTRAL, **fields}


def lora_file(**fields: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 8, "target_modules": ["q", "v"], **NEUTRAL, **fields}


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# Names


@pytest.mark.parametrize(
    ("cls", "wrong", "right"),
    [
        (AdaLoraConfig, "delta_r", "deltaT"),
        (AdaLoraConfig, "delta_t", "deltaT"),
        (AdaLoraConfig, "DeltaT", "deltaT"),
        (AdaLoraConfig, "rank", "init_r"),
        (AdaLoraConfig, "t_init", "tinit"),
        (AdaLoraConfig, "total_steps", "total_step"),
        (AdaLoraConfig, "orth_weight", "orth_reg_weight"),
        (LoraConfig, "rank", "r"),
        (LoraConfig, "alpha", "lora_alpha"),
        (LoraConfig, "dropout", "lora_dropout"),
        (LoraConfig, "target_module", "target_modules"),
        (LoraConfig, "lora_aplha", "lora_alpha"),
    ],
)
def test_misspelt_field_is_refused_with_the_nearest_real_one(cls: Any, wrong: str, right: str) -> None:
    with pytest.raises(TypeError, match=rf"has no field `{wrong}`\. Did you mean `{right}`\?"):
        cls(**{wrong: 4})


def test_field_unlike_any_other_is_refused_with_the_list_of_fields() -> None:
    with pytest.raises(TypeError, match=r"no field `xyzzy`\. Its fields are .*lora_alpha"):
        LoraConfig(xyzzy=1)  # type: ignore[call-arg]


def test_fields_of_the_other_class_and_of_peft_are_distinguished_from_misspellings() -> None:
    with pytest.raises(TypeError, match="`init_r`.* AdaLoraConfig's"):
        LoraConfig(init_r=12)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="`use_dora`.* PEFT's"):
        LoraConfig(use_dora=True)  # type: ignore[call-arg]


def test_positional_arguments_are_refused_because_their_order_is_not_pefts() -> None:
    with pytest.raises(TypeError, match="keyword arguments only"):
        LoraConfig(8)  # type: ignore[misc]


def test_setting_an_unknown_attribute_is_refused() -> None:
    with pytest.raises(AttributeError, match="`total_step`"):
        AdaLoraConfig().total_steps = 5  # type: ignore[attr-defined]


# `r` of AdaLoRA


def test_r_given_to_adalora_is_warned_about_by_name_with_what_to_set_instead() -> None:
    with pytest.warns(UserWarning, match=r"`r=16` has no effect .* set target_r=16 and init_r=32") as caught:
        config = AdaLoraConfig(r=16)
    assert caught[0].filename == __file__
    assert (config.init_r, config.target_r) == (16, 8)
    assert config == AdaLoraConfig()


def test_r_is_not_warned_about_when_nobody_gave_it() -> None:
    config = AdaLoraConfig(init_r=6, target_r=3, deltaT=1)
    for made in (
        dataclasses.replace(config, deltaT=5),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert dataclasses.replace(made, deltaT=1) == config
    assert config.r == 8
    assert LoraConfig.from_dict(ada_file()).r == 8


# Values


@pytest.mark.parametrize("field", ["init_r", "target_r", "deltaT", "total_step"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5, "8", float("nan"), 10**30])
def test_adalora_counts_that_are_not_positive_integers_are_refused(field: str, value: Any) -> None:
    if (field, value) == ("target_r", 1.5):
        assert AdaLoraConfig(target_r=value).target_r == 1.5  # an average may be fractional
        return
    with pytest.raises((TypeError, ValueError), match=f"`{field}`"):
        AdaLoraConfig(**{field: value})


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "8", None])
def test_ranks_of_lora_that_are_not_positive_integers_are_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="`r`"):
        LoraConfig(r=value)
    with pytest.raises((TypeError, ValueError), match="rank_pattern"):
        LoraConfig(rank_pattern={"q": value})


@pytest.mark.parametrize("field", ["beta1", "beta2"])
@pytest.mark.parametrize("value", [0, 1, -0.5, 1.5, float("nan"), float("inf"), "0.9", None, True])
def test_betas_outside_of_0_to_1_are_refused(field: str, value: Any) -> None:
    if (field, value) == ("target_r", 1.5):
        assert AdaLoraConfig(target_r=value).target_r == 1.5  # an average may be fractional
        return
    with pytest.raises((TypeError, ValueError), match=f"`{field}`"):
        AdaLoraConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_alpha", 0),
        ("lora_alpha", -8),
        ("lora_alpha", float("nan")),
        ("lora_alpha", "16"),
        ("lora_alpha", True),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("lora_dropout", float("inf")),
        ("lora_dropout", None),
        ("orth_reg_weight", -0.1),
        ("orth_reg_weight", float("nan")),
        ("bias", "some"),
        ("bias", True),
        ("fan_in_fan_out", 1),
        ("inference_mode", "no"),
        ("modules_to_save", "classifier"),
        ("modules_to_save", [1]),
        ("target_modules", []),
        ("target_modules", ""),
        ("target_modules", ["q", 3]),
        ("target_modules", ["q", ""]),
        ("target_modules", {"q": 1}),
        ("target_modules", 7),
        ("target_modules", "(q"),
        ("exclude_modules", "*q"),
        ("layers_to_transform", -1),
        ("layers_to_transform", [0, True]),
        ("layers_to_transform", "3"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", 1),
        ("alpha_pattern", ["q"]),
        ("rank_pattern", {"model.q.lora_E": 3}),
        ("rank_pattern", {"model.q.lora_E": [True]}),
        ("rank_pattern", {"model.q.lora_E": [1] * 12}),
        ("rank_pattern", {"model.q": [True] * 12}),
        ("rank_pattern", {5: [True] * 12}),
        ("tinit", 1.0),
        ("tinit", -1),
        ("tfinal", float("nan")),
        ("tfinal", "0.3"),
        ("base_model_name_or_path", 3),
    ],
)
def test_values_out_of_range_and_of_wrong_types_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=field):
        AdaLoraConfig(**{field: value})


def test_target_rank_above_the_initial_one_is_refused_and_an_equal_one_is_fine() -> None:
    with pytest.raises(ValueError, match="`target_r`=16 is greater than `init_r`=12"):
        AdaLoraConfig(init_r=12, target_r=16)
    assert AdaLoraConfig(target_r=16).init_r == 32
    assert AdaLoraConfig(init_r=8, target_r=8).target_r == 8


def test_task_type_takes_members_of_enumerations_and_names_the_nearest() -> None:
    class TaskType(str, enum.Enum):
        SEQ_CLS = "SEQ_CLS"

    assert LoraConfig(task_type=TaskType.SEQ_CLS).task_type == "SEQ_CLS"
    assert type(LoraConfig(task_type=TaskType.SEQ_CLS).task_type) is str
    with pytest.raises(ValueError, match="Did you mean 'SEQ_CLS'"):
        LoraConfig(task_type="seq_clf")
    for task in TASK_TYPES:
        assert LoraConfig(task_type=task).task_type == task


def test_layers_that_cannot_be_counted_are_refused() -> None:
    with pytest.raises(ValueError, match="`layers_to_transform` needs `target_modules` to be a list"):
        LoraConfig(target_modules=".*q", layers_to_transform=[1])
    with pytest.raises(ValueError, match="`layers_pattern`='h' needs `layers_to_transform`"):
        LoraConfig(target_modules=["q"], layers_pattern="h")


def test_lora_options_that_adalora_would_ignore_are_refused() -> None:
    with pytest.raises(ValueError, match="`use_rslora` does not work with the paper's form"):
        AdaLoraConfig(use_rslora=True, init_lora_weights=True)
    with pytest.raises(ValueError, match="`alpha_pattern` belongs to LoraConfig"):
        AdaLoraConfig(alpha_pattern={"q": 4})


def test_values_come_out_in_plain_forms() -> None:
    np = pytest.importorskip("numpy")
    config = LoraConfig(
        r=np.int64(4), target_modules=("v", "q", "v"), exclude_modules={"b", "a"}, modules_to_save=[]
    )
    assert type(config.r) is int
    assert (config.target_modules, config.exclude_modules, config.modules_to_save) == (
        ["v", "q"],
        ["a", "b"],
        None,
    )
    assert LoraConfig(target_modules="All-Linear").target_modules == "all-linear"
    assert LoraConfig(rank_pattern=None, alpha_pattern=None).rank_pattern == {}  # type: ignore[arg-type]


# Schedules


def test_schedule_that_contradicts_itself_is_refused_when_the_configuration_is_made() -> None:
    with pytest.raises(ValueError, match=r"tinit=6000 .* 13500 - 11000 = 2500\. Nearest that works"):
        AdaLoraConfig(tinit=6000, tfinal=11000, total_step=13500)
    AdaLoraConfig(tinit=2000, tfinal=10000, total_step=13500)


def test_fractions_that_leave_no_pruning_are_refused_before_the_number_of_steps_is_known() -> None:
    with pytest.raises(ValueError, match="less than 1 together"):
        AdaLoraConfig(tinit=0.5, tfinal=0.5)


def test_schedule_is_fitted_to_the_trainers_number_of_steps() -> None:
    config = AdaLoraConfig(tinit=0.1, tfinal=0.3, deltaT=5)
    with pytest.raises(ValueError, match="set_total_step"):
        config.resolved_schedule()
    fitted = config.with_total_step(1000)
    assert fitted.resolved_schedule() == BudgetSchedule(100, 300, 1000, 5)
    assert fitted.with_total_step(10).resolved_schedule() == BudgetSchedule(1, 3, 10, 5)
    assert config.total_step is None


def test_with_total_step_refuses_a_run_too_short_for_the_schedule() -> None:
    with pytest.raises(ValueError, match="no step for pruning"):
        AdaLoraConfig(tinit=10, tfinal=20).with_total_step(30)


def test_a_configuration_stays_valid_when_fields_are_set() -> None:
    config = AdaLoraConfig(**SCHEDULE, init_r=12)
    before = copy.copy(config)
    for field, value in [("tinit", 80), ("target_r", 13), ("beta1", 2.0), ("target_modules", [])]:
        with pytest.raises(ValueError, match=field):
            setattr(config, field, value)
    assert config == before
    config.inference_mode = True
    assert config != before


# JSON


CONFIGS: list[LoraConfig] = [
    LoraConfig(),
    LoraConfig(
        r=4,
        target_modules={"q", "v"},
        exclude_modules=["v"],
        lora_alpha=3.5,
        lora_dropout=0.1,
        bias="lora_only",
        use_rslora=True,
        modules_to_save=["score"],
        init_lora_weights="gaussian",
        layers_to_transform=[0, 2],
        layers_pattern="h",
        rank_pattern={"0.q": 2},
        alpha_pattern={"0.q": 1.5},
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path="some/model",
        revision="main",
    ),
    LoraConfig(target_modules=r".*\.(q|v)", init_lora_weights=False, fan_in_fan_out=True),
    AdaLoraConfig(**SCHEDULE, target_modules="all-linear", task_type="SEQ_CLS"),
    AdaLoraConfig(
        **SCHEDULE,
        init_r=3,
        target_r=1,
        deltaT=7,
        beta1=0.9,
        beta2=0.8,
        orth_reg_weight=0,
        target_modules=["q"],
        rank_pattern={"model.0.q.lora_E": [True, False, False], "model.1.q.lora_E": [False] * 3},
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_written_configurations_read_back_equal(config: LoraConfig, tmp_path: Path) -> None:
    assert config.save_pretrained(tmp_path / "new") == tmp_path / "new" / CONFIG_NAME
    assert LoraConfig.from_pretrained(tmp_path / "new") == config
    assert [path.name for path in (tmp_path / "new").iterdir()] == [CONFIG_NAME]


@pytest.mark.parametrize("config", CONFIGS)
def test_peft_reads_written_configurations_without_a_warning(config: LoraConfig, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftConfig.from_pretrained(str(tmp_path))
    written = config.to_dict()
    for name, value in theirs.to_dict().items():
        if name in written:
            assert (sorted(value) if isinstance(value, set) else value) == written[name], name
    assert type(theirs).__name__ == type(config).__name__
    assert set(written) <= set(theirs.to_dict())


@pytest.mark.parametrize("kind", ["LoraConfig", "AdaLoraConfig"])
def test_defaults_are_pefts(kind: str) -> None:
    peft = pytest.importorskip("peft")
    theirs = getattr(peft, kind)(**({"total_step": 100} if kind == "AdaLoraConfig" else {}))
    ours = LoraConfig.from_dict(theirs.to_dict())
    paper = AdaLoraConfig(total_step=100, init_lora_weights=True)
    assert ours == {"LoraConfig": LoraConfig(), "AdaLoraConfig": paper}[kind]


def test_everything_in_a_peft_file_is_written_again(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    peft.AdaLoraConfig(target_modules=["q"], total_step=100, init_r=4, target_r=2).save_pretrained(tmp_path)
    before = json.loads((tmp_path / CONFIG_NAME).read_text())
    LoraConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_NAME).read_text()) == before


def test_fractions_are_written_as_steps_that_peft_understands() -> None:
    data = AdaLoraConfig(tinit=0.1, tfinal=0.25, total_step=200).to_dict()
    assert (data["tinit"], data["tfinal"], data["r"]) == (20, 50, 8)
    assert AdaLoraConfig(tinit=0.1).to_dict()["tinit"] == 0.1


@pytest.mark.parametrize(
    "field",
    [
        {"new_thing": None},
        {"new_thing": False},
        {"new_thing": {}},
        {"new_thing": []},
        {"peft_version": "9.0"},
    ],
)
def test_unknown_fields_that_change_nothing_are_kept(field: dict[str, Any]) -> None:
    config = LoraConfig.from_dict(lora_file(**field))
    assert config.to_dict().items() >= field.items()
    assert dataclasses.replace(config, r=2).to_dict().items() >= field.items()
    assert config == LoraConfig(target_modules=["q", "v"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [5]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("megatron_config", {"tp": 2}),
        ("kasa_config", {"beta": 1}),
        ("ensure_weight_tying", True),
    ],
)
def test_fields_that_change_the_result_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^here\.json: `{field}`"):
        LoraConfig.from_dict(lora_file(**{field: value}), source="here.json")


@pytest.mark.parametrize("start", ["eva", "mica"])
def test_starts_without_consequence_are_read_and_written_again(start: str) -> None:
    config = LoraConfig.from_dict(lora_file(init_lora_weights=start))
    assert config.init_lora_weights is True
    assert config.to_dict()["init_lora_weights"] == start


def test_orthogonal_start_is_read_but_not_written_because_peft_refuses_it_for_odd_ranks() -> None:
    config = LoraConfig.from_dict(lora_file(init_lora_weights="orthogonal"))
    assert dataclasses.replace(config, r=3).to_dict()["init_lora_weights"] is True


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "new"])
def test_starts_that_change_the_base_weights_are_refused_by_name(start: str) -> None:
    with pytest.raises(ValueError, match=f"`init_lora_weights` is '{start}'"):
        LoraConfig.from_dict(lora_file(init_lora_weights=start))


@pytest.mark.parametrize("peft_type", ["IA3", "lora", None, 3, ["LORA"]])
def test_other_kinds_of_adapters_are_refused_by_name(peft_type: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^adapter_config\.json: `peft_type`"):
        LoraConfig.from_dict({"peft_type": peft_type})


def test_adalora_class_refuses_the_file_of_a_lora_adapter() -> None:
    with pytest.raises(ValueError, match="LORA adapter"):
        AdaLoraConfig.from_dict(lora_file())
    assert type(LoraConfig.from_dict(ada_file())) is AdaLoraConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [("init_r", "12"), ("tinit", "10"), ("lora_alpha", [8]), ("target_modules", 3), ("rank_pattern", [1])],
)
def test_wrong_types_in_a_file_are_refused_naming_file_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^folder/a\.json: `{field}`.*{str(value)[:2].strip('[')}"):
        LoraConfig.from_dict(ada_file(**{field: value}), source="folder/a.json")


def test_adalora_file_with_fields_that_peft_ignores_is_read_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="`use_rslora` in the file has no effect"):
        assert LoraConfig.from_dict(ada_file(use_rslora=True)) == LoraConfig.from_dict(ada_file())
    with pytest.warns(UserWarning, match="`alpha_pattern` in the file has no effect"):
        LoraConfig.from_dict(ada_file(alpha_pattern={"q": 4}))
    with pytest.warns(UserWarning, match="`r=16`"):
        LoraConfig.from_dict(ada_file(r=16))


@pytest.mark.parametrize(
    "wrong", [{"tinit": 90}, {"total_step": None}, {"total_step": 0}, {"target_r": 6}, {"deltaT": 0}]
)
def test_adapter_for_inference_is_read_whatever_its_schedule_and_refused_for_training(
    wrong: dict[str, Any],
) -> None:
    config = AdaLoraConfig.from_dict(ada_file(inference_mode=True, **wrong))
    assert config.to_dict().items() >= wrong.items()
    with pytest.raises(ValueError, match="total_step|target_r|deltaT"):
        dataclasses.replace(config, inference_mode=False).resolved_schedule()


def test_adapter_names_are_taken_off_the_rank_pattern_of_older_files() -> None:
    mask = [True, False, True, False]
    config = AdaLoraConfig.from_dict(ada_file(rank_pattern={"a.b.lora_E.default": mask, "c.lora_E": mask}))
    assert config.rank_pattern == {"a.b.lora_E": mask, "c.lora_E": mask}
    with pytest.raises(ValueError, match="twice"):
        AdaLoraConfig.from_dict(ada_file(rank_pattern={"c.lora_E.default": mask, "c.lora_E": mask}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"peft_type": "LORA", "r": NaN}',
        '{"peft_type": "LORA", "r": 1, "r": 2}',
        '{"peft_type": "LORA", "r": 1' + "0" * 5000 + "}",
        "[" * 100_000,
        '{"peft_type": "LORA", "target_modules": "\udcff"}',
    ],
)
def test_broken_files_are_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises((TypeError, ValueError), match=CONFIG_NAME):
        LoraConfig.from_pretrained(tmp_path)


def test_folder_without_a_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no adapter folder"):
        LoraConfig.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="not the folder of an adapter"):
        LoraConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("left_out", ["tinit", "tfinal", "deltaT"])
def test_a_schedule_with_omitted_fields_is_read_as_it_is_written(left_out: str, inference_mode: bool) -> None:
    data = {
        "peft_type": "ADALORA",
        "init_r": 4,
        "target_r": 2,
        "total_step": 100,
        "inference_mode": inference_mode,
    }
    data |= {"tinit": 10, "tfinal": 20, "deltaT": 2}
    del data[left_out]
    config = LoraConfig.from_dict(data)
    assert LoraConfig.from_dict(config.to_dict()) == config


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = sorted(
    {each.name for each in dataclasses.fields(AdaLoraConfig)} | {"peft_type", "use_dora", "unknown"}
)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([lora_file(), ada_file()]), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_any_json_is_read_or_refused_with_a_value_or_type_error(
    data: dict[str, Any], wrong: dict[str, Any]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = LoraConfig.from_dict({**data, **wrong}, source="a.json")
        except (TypeError, ValueError) as error:
            assert str(error).startswith("a.json: ")
        else:
            assert LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("cls", [LoraConfig, AdaLoraConfig])
@pytest.mark.parametrize("flag", ["fan_in_fan_out", "use_rslora", "inference_mode"])
def test_a_flag_of_null_in_a_file_is_left_out_as_in_peft(cls: Any, flag: str) -> None:
    written = {**cls().to_dict(), "total_step": 100, "inference_mode": False, flag: None}
    if cls is LoraConfig:
        del written["total_step"]
    assert getattr(LoraConfig.from_dict(written), flag) is False
    with pytest.raises(TypeError, match=f"`{flag}` must be True or False, but is None"):
        cls(**{flag: None})
