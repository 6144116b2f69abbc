"""The modules that a configuration selects: the same as PEFT selects, but with warnings where PEFT is silent."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import rankwise
from rankwise.adapters import prepare_layer
from rankwise.attach.defaults import ADALORA_DEFAULTS, DEFAULTS
from rankwise.attach.matching import pattern_value
from rankwise.attach.targets import find_targets, find_tied, modules_to_save_paths
from rankwise.config import AdaLoraConfig, LoraConfig


def same_names(names: Any) -> Any:
    return names if isinstance(names, str) else set(names)


@functools.cache
def _tiny(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    small = {"vocab_size": 32, **size}
    builders = {
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**small, num_key_value_heads=2, tie_word_embeddings=True)
        ),
        "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**small)),
        "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**small)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=32, n_embd=8, n_layer=3, n_head=2)
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
        ),
        "whisper": lambda: transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(
                vocab_size=32,
                d_model=8,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=16,
                decoder_ffn_dim=16,
                num_mel_bins=4,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )
        ),
        "distilbert": lambda: transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(vocab_size=32, dim=8, hidden_dim=16, n_layers=2, n_heads=2)
        ),
        "vit": lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**size, image_size=8, patch_size=4)
        ),
        "modernbert": lambda: transformers.ModernBertForSequenceClassification(
            transformers.ModernBertConfig(**small, pad_token_id=0, cls_token_id=1, sep_token_id=2)
        ),
        "wav2vec2": lambda: transformers.Wav2Vec2ForCTC(
            transformers.Wav2Vec2Config(
                **small,
                conv_dim=(8,),
                conv_stride=(2,),
                conv_kernel=(3,),
                num_feat_extract_layers=1,
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
            )
        ),
        "wavlm": lambda: transformers.WavLMForCTC(
            transformers.WavLMConfig(
                **small,
                conv_dim=(8,),
                conv_stride=(2,),
                conv_kernel=(3,),
                num_feat_extract_layers=1,
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
            )
        ),
        "mamba": lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=2, state_size=4)
        ),
    }
    torch.manual_seed(0)
    return builders[kind]()


def tiny(kind: str) -> nn.Module:
    return copy.deepcopy(_tiny(kind))


class Own(nn.Module):
    """A user's own module, without a Transformers configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.conv = nn.Conv2d(1, 4, 2)
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}) for _ in range(3)]
        )
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 8, bias=False)


# As PEFT matches


MATCHES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": ["model.layers.1.mlp.up_proj", "self_attn.k_proj"]}),
    ("llama", {"target_modules": r".*layers\.[02]\..*_proj"}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0.*"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["h", "layers"]}),
    ("llama", {"target_modules": ["q_proj", "model.layers.0.self_attn.v_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": None}),
    ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    (
        "llama",
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"], "inference_mode": True},
    ),
    ("bert", {"target_modules": None}),
    ("bert", {"target_modules": ["dense"], "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"}),
    ("roberta", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    ("gpt2", {"target_modules": None}),
    (
        "gpt2",
        {"target_modules": ["c_attn", "mlp.c_proj"], "layers_to_transform": [0, 1], "layers_pattern": "h"},
    ),
    ("gpt2", {"target_modules": "all-linear"}),
    ("t5", {"target_modules": None}),
    ("t5", {"target_modules": ["q", "wo"], "layers_to_transform": [1], "layers_pattern": "block"}),
    ("t5", {"target_modules": "all-linear"}),
    ("whisper", {"target_modules": ["q_proj", "fc1"]}),
    ("whisper", {"target_modules": r".*decoder.*encoder_attn\.(q|v)_proj"}),
    ("whisper", {"target_modules": "all-linear"}),
]


@pytest.mark.parametrize(("kind", "fields"), MATCHES)
@pytest.mark.filterwarnings("ignore")
def test_targets_are_those_of_peft(kind: str, fields: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    ours = find_targets(tiny(kind), LoraConfig(**copy.deepcopy(fields)))
    theirs = peft.get_peft_model(tiny(kind), peft.LoraConfig(**copy.deepcopy(fields)))
    assert list(ours) == theirs.base_model.targeted_module_names


@pytest.mark.parametrize("kind", ["llama", "bert", "roberta", "gpt2", "t5"])
@pytest.mark.filterwarnings("ignore")
def test_default_targets_of_adalora_are_those_of_peft(kind: str) -> None:
    peft = pytest.importorskip("peft")
    task = "SEQ_CLS" if kind in ("bert", "roberta") else None
    ours = find_targets(tiny(kind), AdaLoraConfig(task_type=task))
    theirs = peft.get_peft_model(tiny(kind), peft.AdaLoraConfig(total_step=10, task_type=task))
    assert list(ours) == theirs.base_model.targeted_module_names


def test_default_names_agree_with_peft_for_every_architecture_that_it_knows() -> None:
    constants = pytest.importorskip("peft.utils.constants")
    for theirs, ours in [
        (constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, DEFAULTS),
        (constants.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING, ADALORA_DEFAULTS),
    ]:
        for kind, names in theirs.items():
            assert same_names(ours[kind]) == same_names(names), kind


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("whisper", {"q_proj", "v_proj"}),
        ("distilbert", {"q_lin", "v_lin"}),
        ("vit", {"q_proj", "v_proj"}),
        ("modernbert", {"Wqkv"}),
        ("wav2vec2", {"q_proj", "v_proj"}),
        ("wavlm", {"intermediate_dense", "output_dense"}),
    ],
)
def test_architectures_that_peft_does_not_know_have_defaults(kind: str, names: set[str]) -> None:
    model = tiny(kind)
    found = {path.rpartition(".")[2] for path in find_targets(model, LoraConfig())}
    if kind == "vit":  # before Transformers 5.2 they were called query and value
        assert found in (names, {"query", "value"})
    else:
        assert found == names


def test_defaults_are_found_in_a_model_inside_a_users_own_module() -> None:
    wrapper = nn.ModuleDict({"encoder": tiny("bert"), "pool": nn.Linear(8, 8)})
    found = find_targets(wrapper, LoraConfig())
    assert found and all(path.startswith("encoder.bert.") for path in found)
    assert "lm.lm_head" not in find_targets(
        nn.ModuleDict({"lm": tiny("llama")}), LoraConfig(target_modules="all-linear")
    )


@pytest.mark.parametrize("path", ["model.layers.1.q", "layers.1.q", "q", "model.layers.11.q", "a.q.b"])
@pytest.mark.parametrize(
    "keys", [["q"], [r"layers\.1\.q"], ["^model.*"], [r"layers.\d+.q", "q"], ["q.b", "a+"], []]
)
def test_pattern_values_are_those_of_peft(path: str, keys: list[str]) -> None:
    other = pytest.importorskip("peft.utils.other")
    patterns = {key: index for index, key in enumerate(keys)}
    assert pattern_value(patterns, path, -1) == patterns.get(other.get_pattern_key(keys, path), -1)


def test_layers_are_counted_in_a_model_without_a_prefix() -> None:
    model = Own()
    config = LoraConfig(target_modules=["up"], layers_to_transform=[1])
    assert list(find_targets(model, config)) == ["layers.1.up"]


# Kinds of layers


def test_every_supported_kind_is_found_with_its_module() -> None:
    model = Own()
    found = find_targets(model, LoraConfig(target_modules=["embed", "conv", "layers.0.up", "head"]))
    assert list(found) == ["embed", "conv", "layers.0.up", "head"]
    assert found["conv"] is model.conv


def test_subclasses_of_linear_are_linear() -> None:
    class Quantized(nn.Linear):
        pass

    model = nn.Sequential(Quantized(4, 4), nn.ReLU())
    assert list(find_targets(model, LoraConfig(target_modules="all-linear"))) == ["0"]


def test_layer_that_cannot_be_adapted_is_refused_with_its_path_and_type() -> None:
    with pytest.raises(ValueError, match=r"'norm' is a LayerNorm: only Linear"):
        find_targets(Own(), LoraConfig(target_modules=["up", "norm"]))


def test_container_is_refused_with_the_layers_in_it() -> None:
    with pytest.raises(ValueError, match=r"'layers.0' is a ModuleDict, which holds .* instead: up, down"):
        find_targets(Own(), LoraConfig(target_modules=["up", "layers.0"]))


def test_expression_that_matches_containers_too_is_refused_with_a_narrower_one() -> None:
    with pytest.raises(ValueError, match="which holds other modules") as caught:
        find_targets(Own(), LoraConfig(target_modules=r"layers\..*"))
    proposed = re.search(r"r'(.*)'", str(caught.value))
    assert proposed
    assert len(find_targets(Own(), LoraConfig(target_modules=proposed[1]))) == 6


def test_lazy_layer_is_refused_until_it_has_a_shape() -> None:
    with pytest.raises(ValueError, match="'0' has no shape yet"):
        find_targets(nn.Sequential(nn.LazyLinear(3)), LoraConfig(target_modules=["0"]))


# Layers whose weight is used without calling them


def test_output_projection_of_torch_attention_is_refused_because_it_is_never_called() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "out": nn.Linear(4, 4)})
    with pytest.raises(
        ValueError, match=r"'attn.out_proj' can't be adapted: MultiheadAttention reads its weight"
    ):
        find_targets(model, LoraConfig(target_modules=["out_proj"]))
    with pytest.warns(UserWarning, match=r"'attn.out_proj' can't be adapted"):
        assert list(find_targets(model, LoraConfig(target_modules="all-linear"))) == ["out"]


def test_attention_of_wavlm_is_refused_because_its_layers_are_never_called() -> None:
    with pytest.raises(ValueError, match="WavLMAttention reads its weight without calling it"):
        find_targets(tiny("wavlm"), LoraConfig(target_modules=["q_proj"]))


def test_users_own_module_that_reads_a_weight_is_recognised() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.asked, self.called = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.linear(x.to(self.asked.weight.dtype), self.read.weight)
            return self.called(x) if isinstance(self.asked.weight, nn.Parameter) else self.asked(x)

    with pytest.raises(ValueError, match="Reads reads its weight"):
        find_targets(Reads(), LoraConfig(target_modules=["read"]))
    assert len(find_targets(Reads(), LoraConfig(target_modules=["asked", "called"]))) == 2


def test_only_what_a_forward_pass_reaches_counts_as_reading() -> None:
    """As in diffusers' attention: a helper calls the layers, and other methods read and join their weights."""

    class Helper:
        def __call__(self, attention: Any, x: torch.Tensor) -> torch.Tensor:
            return attention.to_q(x) + attention.to_k(x)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_k, self.read = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
            self.processor = Helper()

        def fuse_projections(self) -> None:
            self.to_q.weight.data.copy_(torch.cat([self.to_q.weight, self.to_k.weight]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.processor(self, x) + self.inner(x)

        def inner(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.read.weight.T

    class Child(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    class Mended(Attention):
        def inner(self, x: torch.Tensor) -> torch.Tensor:
            return self.read(x)

    for made in (Attention(), Child()):
        assert len(find_targets(made, LoraConfig(target_modules=["to_q", "to_k"]))) == 2
        with pytest.raises(ValueError, match="reads its weight"):
            find_targets(made, LoraConfig(target_modules=["read"]))
    assert len(find_targets(Mended(), LoraConfig(target_modules=["to_q", "read"]))) == 2


class Grouped(nn.Linear):
    """A subclass of a linear layer that multiplies blocks instead."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...gi,goi->...go", x, self.weight.view(2, -1, self.in_features))


class Router(nn.Linear):
    """A subclass that returns choices, and draws random numbers."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = super().forward(x) + torch.rand(())
        return logits, logits.argmax(-1)


class Same(nn.Linear):
    """A subclass that computes a linear layer in its own code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("cls", [Grouped, Router])
def test_a_linear_layer_that_computes_something_else_is_refused_and_left_out(cls: type[nn.Linear]) -> None:
    model = nn.ModuleDict({"odd": cls(4, 4), "same": Same(4, 4), "plain": nn.Linear(4, 4)})
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"'odd' can't be adapted: {cls.__name__} is.*odd\.weight"):
        find_targets(model, LoraConfig(target_modules=["odd"]))
    with pytest.warns(UserWarning, match="'odd' can't be adapted.*Left out"):
        assert list(find_targets(model, LoraConfig(target_modules="all-linear"))) == ["same", "plain"]
    assert torch.equal(torch.get_rng_state(), before), "trying it out draws no number of the user's"
    assert model["odd"].training
    adapted = rankwise.get_peft_model(
        model, LoraConfig(target_modules=[], target_parameters=["odd.weight"], init_lora_weights=False, r=2)
    )
    x = torch.randn(3, 2, 4) if cls is Grouped else torch.randn(3, 4)
    torch.manual_seed(0)
    found = adapted["odd"](x)
    adapted.merge_and_unload()
    torch.manual_seed(0)
    torch.testing.assert_close(found, adapted["odd"](x))


class Causal(nn.Conv1d):
    """A convolution that pads its input, as Transformers' causal ones do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, (self.kernel_size[0] - 1, 0)))


class Doubled(nn.Conv1d):
    """A convolution of another weight than its own, whose output has the plain one's shape."""

    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super()._conv_forward(x, 2 * weight, bias)


class SameConv(nn.Conv2d):
    """A convolution that computes the plain one in its own code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight, self.bias)


class Positions(nn.Embedding):
    """An embedding of positions, which looks up other rows than its input says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.arange(x.shape[1]).expand(x.shape))


class Scaled(nn.Embedding):
    """An embedding that multiplies its output, as Gemma's does."""

    embed_scale = 5.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.embed_scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_or_a_convolution_that_computes_something_else_is_refused(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({
        "causal": Causal(3, 4, 3), "doubled": Doubled(3, 4, (3,), padding="same"),
        "same": SameConv(4, 4, (3, 2), padding=(2, 1), padding_mode="reflect", dilation=2, groups=2),
        "positions": Positions(9, 4), "scaled": Scaled(9, 4), "plain": nn.Embedding(9, 4),
    }).to(dtype)  # fmt: skip
    with torch.no_grad():
        model["positions"].weight.mul_(1e-3)  # small numbers are told apart, too
    for name in ("causal", "doubled"):
        with pytest.raises(ValueError, match=f"'{name}' can't be adapted: .* is a convolution by its class"):
            find_targets(model, LoraConfig(target_modules=[name]))
    with pytest.raises(ValueError, match=r"'positions'.*is an embedding by its class.*positions\.weight"):
        find_targets(model, LoraConfig(target_modules=["positions"]))
    fitting = ["same", "scaled", "plain"]
    assert list(find_targets(model, LoraConfig(target_modules=fitting))) == fitting


def test_all_linear_leaves_out_layers_whose_weight_another_module_has_so_that_merging_works() -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("one", "two", "free")})
    model["two"].weight = model["one"].weight
    with pytest.warns(UserWarning, match="'one', 'two'|'one' won't be adapted.*Left out"):
        assert list(find_targets(model, LoraConfig(target_modules="all-linear"))) == ["free"]
    assert list(find_targets(model, LoraConfig(target_modules=["one"]))) == ["one"], "named, it is adapted"
    twice = nn.ModuleDict({"a": model["free"], "b": model["free"]})
    adapted = rankwise.get_peft_model(
        twice, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    )
    x, found = torch.randn(2, 4), adapted["b"](torch.ones(2, 4))
    assert torch.equal(adapted["a"](x), adapted["b"](x)), "one module, however many paths lead to it"
    torch.testing.assert_close(adapted.merge_and_unload()["b"](torch.ones(2, 4)), found)


@pytest.mark.parametrize("name", ["out_proj", "x_proj", "dt_proj"])
def test_layers_that_mambas_kernels_bypass_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}' can't be adapted: .*MambaMixer"):
        find_targets(tiny("mamba"), LoraConfig(target_modules=["in_proj", name]))
    assert find_targets(tiny("mamba"), LoraConfig(target_modules=["in_proj"]))


def test_fast_path_of_torch_encoder_layers_is_refused_with_the_call_that_turns_it_off() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(True)
        with pytest.raises(ValueError, match=r"set_fastpath_enabled\(False\)"):
            find_targets(model, LoraConfig(target_modules=["linear1"]))
        torch.backends.mha.set_fastpath_enabled(False)
        assert list(find_targets(model, LoraConfig(target_modules=["linear1"]))) == ["linear1"]
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


# Nothing matches, or not everything


def test_names_that_match_nothing_are_refused_with_the_nearest_and_the_linear_layers() -> None:
    with pytest.raises(
        ValueError, match=r"'q_porj' matches no module.* 'q_proj'.* layers are called .*down_proj"
    ):
        find_targets(tiny("llama"), LoraConfig(target_modules=["q_porj"]))


def test_dotted_name_that_matches_nothing_is_compared_with_dotted_names() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'self_attn\.q_proj'"):
        find_targets(tiny("llama"), LoraConfig(target_modules=["attn.q_proj"]))


def test_expression_that_matches_nothing_is_explained_to_match_whole_paths() -> None:
    with pytest.raises(ValueError, match="expression 'q_proj' matches no whole path"):
        find_targets(tiny("llama"), LoraConfig(target_modules="q_proj"))


def test_name_that_matches_nothing_while_others_do_is_reported() -> None:
    with pytest.warns(UserWarning, match=r"`target_modules` names 'v_porj'.* 'v_proj'"):
        assert find_targets(tiny("llama"), LoraConfig(target_modules=["q_proj", "v_porj"]))
    with pytest.warns(UserWarning, match=r"`exclude_modules` names 'k_porj'"):
        find_targets(tiny("llama"), LoraConfig(target_modules=["q_proj"], exclude_modules=["k_porj"]))


def test_layers_that_do_not_exist_are_named() -> None:
    with pytest.raises(ValueError, match=r"none in `layers_to_transform`=7"):
        find_targets(tiny("llama"), LoraConfig(target_modules=["q_proj"], layers_to_transform=7))


def test_exclusion_of_everything_is_named() -> None:
    with pytest.raises(ValueError, match=r"`exclude_modules`=\['q_proj'\] leave nothing"):
        find_targets(tiny("llama"), LoraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"]))


def test_unknown_architecture_is_refused_with_its_linear_layers() -> None:
    with pytest.raises(
        ValueError, match=r"a model without `config.model_type`: set `target_modules`.*up, down"
    ):
        find_targets(Own(), LoraConfig())
    model = tiny("llama")
    model.config.model_type = "novelty"  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="architecture 'novelty'"):
        find_targets(model, LoraConfig())


def test_a_model_without_linear_layers_is_refused_for_that_reason() -> None:
    model = nn.Sequential(nn.LSTM(4, 4))
    with pytest.raises(ValueError, match=r"`target_modules`='all-linear' finds no layer.* no linear layer"):
        find_targets(model, LoraConfig(target_modules="all-linear"))
    for config in (LoraConfig(), LoraConfig(target_modules=["up"])):
        with pytest.raises(ValueError, match=r"The model has no linear layers\.$"):
            find_targets(model, config)


def test_pattern_that_matches_no_adapted_layer_is_reported() -> None:
    config = LoraConfig(target_modules=["q_proj"], rank_pattern={"v_proj": 4})
    with pytest.warns(UserWarning, match=r"`rank_pattern` has 'v_proj'"):
        find_targets(tiny("llama"), config)


# Modules that train in full


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("bert", {"task_type": "SEQ_CLS"}, ["classifier"]),
        ("roberta", {"task_type": "SEQ_CLS"}, ["classifier"]),
        (
            "distilbert",
            {"task_type": "SEQ_CLS", "target_modules": ["q_lin"]},
            ["pre_classifier", "classifier"],
        ),
        ("bert", {"modules_to_save": ["classifier", "pooler"]}, ["bert.pooler", "classifier"]),
        ("llama", {"modules_to_save": ["lm_head"]}, ["lm_head"]),
        ("llama", {}, []),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_saved_modules_are_those_of_peft(kind: str, fields: dict[str, Any], expected: list[str]) -> None:
    peft = pytest.importorskip("peft")
    fields = {"target_modules": "all-linear", **fields}
    assert modules_to_save_paths(tiny(kind), LoraConfig(**fields)) == expected
    theirs = peft.get_peft_model(tiny(kind), peft.LoraConfig(**copy.deepcopy(fields)))
    wrapped = peft.utils.other.ModulesToSaveWrapper
    base = theirs.get_base_model()
    assert [path for path, module in base.named_modules() if isinstance(module, wrapped)] == expected


def test_heads_that_the_task_implies_are_not_targets() -> None:
    for fields in ({"target_modules": "all-linear"}, {"target_modules": ["dense", "query"]}):
        found = find_targets(tiny("roberta"), LoraConfig(task_type="SEQ_CLS", **fields))  # type: ignore[arg-type]
        assert not any("classifier" in path for path in found)


def test_saved_module_that_does_not_exist_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"`modules_to_save` names 'clasifier'.* 'classifier'"):
        find_targets(tiny("bert"), LoraConfig(modules_to_save=["clasifier"]))


def test_saved_module_that_no_one_calls_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`modules_to_save` takes 'layers', a ModuleList"):
        modules_to_save_paths(Own(), LoraConfig(modules_to_save=["layers"]))


def test_target_that_lies_in_a_saved_module_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="`target_modules` names 'lm_head', but all that it matches is in"):
        find_targets(
            tiny("llama"), LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"])
        )


def test_task_without_its_head_is_reported() -> None:
    model = nn.ModuleDict({"up": nn.Linear(4, 4), "logits": nn.Linear(4, 2)})
    with pytest.warns(UserWarning, match=r"no head will train.* holds 'up', 'logits'"):
        find_targets(model, LoraConfig(target_modules=["up"], task_type="SEQ_CLS"))


def test_loading_an_adapter_for_inference_gives_no_warning() -> None:
    config = LoraConfig(target_modules=["q_proj", "absent"], task_type="SEQ_CLS", inference_mode=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(find_targets(tiny("llama"), config)) == 3


# Shared and adapted modules


def test_tied_weights_are_found() -> None:
    assert find_tied(tiny("llama"), ["lm_head", "model.layers.0.self_attn.q_proj"]) == {
        "lm_head": ["model.embed_tokens"]
    }
    assert find_tied(Own(), ["head", "embed"]) == {}


def test_shared_module_is_found_once() -> None:
    model = Own()
    model.layers[1]["up"] = model.layers[0]["up"]  # type: ignore[index, operator]
    assert list(find_targets(model, LoraConfig(target_modules=["up"]))) == ["layers.0.up", "layers.2.up"]


def test_parts_of_an_adapter_are_not_targets_of_the_next() -> None:
    model = Own()
    before = list(find_targets(model, LoraConfig(target_modules=r".*(up|down).*")))
    layer = prepare_layer(model.layers[0]["up"])  # type: ignore[index, operator]
    layer.add_adapter("default", torch.zeros(2, 4), torch.zeros(8, 2), None, 1.0, 0.0)
    assert list(find_targets(model, LoraConfig(target_modules=r".*(up|down).*"))) == before


def test_finding_targets_leaves_the_model_as_it_is() -> None:
    model = tiny("bert")
    before = {name: type(module) for name, module in model.named_modules()}
    find_targets(model, AdaLoraConfig(task_type="SEQ_CLS"))
    assert {name: type(module) for name, module in model.named_modules()} == before
