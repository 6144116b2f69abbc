"""Adapters travel between rankwise and PEFT: each loads the other's, with the same logits, merged or not."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rankwise as rw
from rankwise.attach.attachment import adapter_layers
from tiny import bert, llama

peft = pytest.importorskip("peft")

TOKENS = torch.arange(24).reshape(2, 12) * 5 % 64
SINGLE, HALF = 2e-5, 2e-2  # largest difference of two logits, with float32 and with half-precision bases
MERGED_HALF = 0.3  # in either library, merging rounds a half-precision weight
WIDE: dict[str, Any] = {"initializer_range": 0.2}  # large enough that logits and differences are not tiny
LLAMA_LINEAR = ["q_proj", "v_proj", "down_proj"]


# Models: each function returns a model, always with the same weights, and its inputs.


class Pictures(nn.Module):
    """A module of no library: convolutions of several kinds, an embedding, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), bias=False)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.label = nn.Embedding(10, 8, padding_idx=0)
        self.head = nn.Linear(8, 5)

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        x = self.entry(pixels).relu()
        x = self.pointwise(self.middle(x)).relu()
        x = self.dilated(self.grouped(x)).relu().mean((2, 3))
        return self.head(x + self.label(labels).mean(1))


def _llama(**changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    return llama(**WIDE, **changes), {"input_ids": TOKENS}


def _llama_classifier() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import LlamaForSequenceClassification

    config = llama(**WIDE).config
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config), {"input_ids": TOKENS}


def _bert() -> tuple[nn.Module, dict[str, Any]]:
    return bert(**WIDE), {"input_ids": TOKENS}


def _bert_with_head(name: str) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    config = bert(labels=2, **WIDE).config
    torch.manual_seed(0)
    return getattr(transformers, f"BertFor{name}")(config), {"input_ids": TOKENS}


def _distilbert() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4, num_labels=3,
                              max_position_embeddings=64, dropout=0.0, attention_dropout=0.0, **WIDE)  # fmt: skip
    return DistilBertForSequenceClassification(config), {"input_ids": TOKENS}


def _gpt2() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **WIDE)  # fmt: skip
    return GPT2LMHeadModel(config), {"input_ids": TOKENS}


def _t5() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0)
    return T5ForConditionalGeneration(config), {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :6]}


def _whisper() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(vocab_size=64, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
                           encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, dropout=0.0,
                           decoder_ffn_dim=48, max_source_positions=16, max_target_positions=32, pad_token_id=0,
                           bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, init_std=0.2)  # fmt: skip
    sound = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(3))
    return WhisperForConditionalGeneration(config), {
        "input_features": sound,
        "decoder_input_ids": TOKENS[:, :6],
    }


def _pictures() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(3))
    return Pictures(), {"pixels": pixels, "labels": torch.tensor([[1, 0, 2], [9, 1, 3]])}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "llama": _llama,
    "llama-tied": functools.partial(_llama, tie_word_embeddings=True),
    "llama-classifier": _llama_classifier,
    "bert": _bert,
    "bert-tokens": functools.partial(_bert_with_head, "TokenClassification"),
    "bert-answers": functools.partial(_bert_with_head, "QuestionAnswering"),
    "distilbert": _distilbert,
    "gpt2": _gpt2,
    "t5": _t5,
    "whisper": _whisper,
    "pictures": _pictures,
}


@functools.cache
def _made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    return MODELS[name]()


# Cases: a model, and options for its adapter that both libraries understand.


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32
    mergeable: bool = True
    peft_says: tuple[str, ...] = field(default=())  # the only warnings that PEFT may give on loading

    def base(self) -> nn.Module:
        return copy.deepcopy(_made(self.model)[0]).to(self.dtype).eval()

    def inputs(self) -> dict[str, Any]:
        return {
            key: value.to(self.dtype) if value.is_floating_point() else value
            for key, value in _made(self.model)[1].items()
        }

    def adapted(self, library: Any) -> Any:
        """The model with a fresh adapter of ``library``, rankwise or PEFT, with visible values."""
        torch.manual_seed(1)
        kind = library.AdaLoraConfig if "init_r" in self.options else library.LoraConfig
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.get_peft_model(self.base(), kind(**self.options), **self.computes(library))
        return model

    def computes(self, library: Any) -> dict[str, Any]:
        """Options for computing as PEFT does, in float32 whatever the base, so that logits can be compared."""
        half = self.dtype != torch.float32
        return {"adapter_compute_dtype": torch.float32} if library is rw and half else {}


def _lora(name: str, model: str = "llama", *, dtype: Any = torch.float32, mergeable: bool = True,
          peft_says: tuple[str, ...] = (), **options: Any) -> Case:  # fmt: skip
    return Case(name, model, {"r": 4, "lora_alpha": 8, **options}, dtype, mergeable, peft_says)


def _adalora(name: str, model: str = "llama", *, dtype: Any = torch.float32, **options: Any) -> Case:
    schedule = dict(init_r=4, target_r=2, tinit=2, tfinal=3, deltaT=2, total_step=12, lora_alpha=16)
    return Case(name, model, {**schedule, **options}, dtype)


LORA = [
    _lora("list", target_modules=LLAMA_LINEAR),
    _lora("whole-paths", target_modules=["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]),
    _lora("regex", target_modules=r".*\.1\..*(k_proj|o_proj)"),
    _lora("all-linear", target_modules="all-linear"),
    _lora("all-linear-with-head", "bert", target_modules="all-linear", task_type="SEQ_CLS"),
    _lora("defaults"),
    _lora("defaults-bert", "bert"),
    _lora("defaults-gpt2", "gpt2"),
    _lora("defaults-t5", "t5"),
    _lora("whisper", "whisper", target_modules=["q_proj", "v_proj"]),
    _lora("exclude-list", target_modules=LLAMA_LINEAR, exclude_modules=["v_proj", "layers.0.mlp.down_proj"]),
    _lora("exclude-regex", target_modules="all-linear", exclude_modules=r".*\.0\..*proj"),
    _lora("one-layer", target_modules=LLAMA_LINEAR, layers_to_transform=1),
    _lora("layers", target_modules=LLAMA_LINEAR, layers_to_transform=[0, 1], layers_pattern="layers"),
    _lora("layers-of-defaults", layers_to_transform=[1], layers_pattern=["layers"]),
    _lora("layers-bert", "bert", target_modules=["query"], layers_to_transform=[0], layers_pattern=["layer"]),
    _lora("rank-pattern", target_modules=LLAMA_LINEAR, rank_pattern={r"layers\.1\..*": 2, "0.mlp.down_proj": 7}),
    _lora("alpha-pattern", target_modules=LLAMA_LINEAR, alpha_pattern={"q_proj": 3, r"layers\.1\.mlp.*": 20}),
    _lora("patterns-rslora", target_modules=LLAMA_LINEAR, use_rslora=True, rank_pattern={"q_proj": 2},
          alpha_pattern={"q_proj": 3.5}),
    _lora("rslora", target_modules=LLAMA_LINEAR, use_rslora=True),
    _lora("dropout", target_modules=LLAMA_LINEAR, lora_dropout=0.4),
    _lora("bias-all", "bert", target_modules=["query", "value"], bias="all"),
    _lora("bias-all-with-head", "bert", target_modules=["query", "value"], bias="all", task_type="SEQ_CLS"),
    _lora("bias-lora-only", "bert", target_modules=["query", "value"], bias="lora_only"),
    _lora("bias-lora-only-gpt2", "gpt2", target_modules=["c_attn", "c_fc"], bias="lora_only", fan_in_fan_out=True),
    _lora("fan-in-fan-out", "gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    _lora("fan-in-fan-out-left-out", "gpt2", target_modules=["c_attn"]),
    _lora("fan-in-fan-out-mistaken", target_modules=["q_proj"], fan_in_fan_out=True,
          peft_says=("fan_in_fan_out is set to True but the target module is `torch.nn.Linear`",)),
    _lora("head-saved", target_modules=["q_proj"], modules_to_save=["lm_head"]),
    _lora("embedding-saved", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    _lora("norm-saved", target_modules=["q_proj"], modules_to_save=["input_layernorm"]),
    _lora("block-saved", target_modules=["q_proj", "v_proj"], modules_to_save=["layers.1.self_attn"]),
    _lora("head-SEQ_CLS", "bert", target_modules=["query"], task_type="SEQ_CLS"),
    _lora("head-SEQ_CLS-llama", "llama-classifier", task_type="SEQ_CLS"),
    _lora("head-SEQ_CLS-distilbert", "distilbert", task_type="SEQ_CLS", target_modules=["q_lin"]),
    _lora("head-TOKEN_CLS", "bert-tokens", task_type="TOKEN_CLS"),
    _lora("head-QUESTION_ANS", "bert-answers", task_type="QUESTION_ANS"),
    _lora("task-CAUSAL_LM", task_type="CAUSAL_LM"),
    _lora("task-SEQ_2_SEQ_LM", "t5", task_type="SEQ_2_SEQ_LM", target_modules=["q", "wo"]),
    _lora("task-FEATURE_EXTRACTION", "bert", task_type="FEATURE_EXTRACTION"),
    _lora("start-random", target_modules=LLAMA_LINEAR, init_lora_weights=False),
    _lora("start-gaussian", target_modules=LLAMA_LINEAR, init_lora_weights="gaussian"),
    _lora("inference-mode", target_modules=LLAMA_LINEAR, inference_mode=True),
    _lora("embedding", target_modules=["embed_tokens", "q_proj"]),
    _lora("embedding-and-head", target_modules=["embed_tokens", "lm_head"]),
    _lora("embedding-gpt2", "gpt2", target_modules=["wpe", "c_attn"], fan_in_fan_out=True),
    _lora("embedding-regex", target_modules=r".*(embed_tokens|v_proj)"),
    _lora("convolutions", "pictures", target_modules=["entry", "middle", "pointwise", "label", "head"]),
    _lora("convolution-groups", "pictures", target_modules=["entry", "grouped"], mergeable=False,
          peft_says=("LoRA adapter added to ConvNd layer with groups > 1",)),
    _lora("convolution-head", "pictures", target_modules=["entry"], modules_to_save=["head"], bias="all"),
    _lora("bfloat16", target_modules=LLAMA_LINEAR, dtype=torch.bfloat16),
    _lora("float16", target_modules=LLAMA_LINEAR, dtype=torch.float16),
    _lora("bfloat16-embeddings", target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"],
          dtype=torch.bfloat16),
    _lora("bfloat16-saved-embedding", target_modules=["q_proj"], modules_to_save=["embed_tokens"],
          dtype=torch.bfloat16),
    _lora("bfloat16-head", "bert", task_type="SEQ_CLS", dtype=torch.bfloat16),
    _lora("bfloat16-gpt2", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True, dtype=torch.bfloat16),
]  # fmt: skip

ADALORA = [
    _adalora("list", target_modules=LLAMA_LINEAR),
    _adalora("all-linear", target_modules="all-linear", task_type="CAUSAL_LM"),
    _adalora("defaults-t5", "t5", task_type="SEQ_2_SEQ_LM"),
    _adalora("whisper", "whisper", target_modules=["q_proj", "v_proj", "fc1"]),
    _adalora("head", "bert", target_modules=["query", "dense"], task_type="SEQ_CLS"),
    _adalora("bias", "bert", target_modules=["query"], bias="lora_only"),
    _adalora("bias-all-with-head", "bert", target_modules=["query"], bias="all", task_type="SEQ_CLS"),
    _adalora("gpt2", "gpt2", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    _adalora("layers", target_modules=LLAMA_LINEAR, layers_to_transform=[1], lora_dropout=0.2),
    _adalora("start-random", target_modules=LLAMA_LINEAR, init_lora_weights=False),
    _adalora("inference-mode", target_modules=LLAMA_LINEAR, inference_mode=True),
    _adalora("convolutions", "pictures", target_modules=["entry", "middle", "pointwise", "dilated", "head"]),
    _adalora("bfloat16", target_modules=LLAMA_LINEAR, dtype=torch.bfloat16),
    _adalora("float16", target_modules=LLAMA_LINEAR, dtype=torch.float16),
    _adalora("bfloat16-head", "bert", target_modules=["query"], task_type="SEQ_CLS", dtype=torch.bfloat16),
    _adalora("bfloat16-gpt2", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True, dtype=torch.bfloat16),
]

CASES = [pytest.param(case, id=f"{kind}-{case.name}") for kind, cases in (("lora", LORA), ("adalora", ADALORA))
         for case in cases]  # fmt: skip


def _of_the_paper(case: Case) -> Case:
    """The case in the paper's form, the only form of AdaLoRA that PEFT has."""
    start = {} if case.name == "start-random" else {"init_lora_weights": True}
    return dataclasses.replace(case, options={**case.options, **start})


def _in_the_default_form(case: Case) -> Case:
    """The case in the default form, which is saved as plain LoRA. Its scale is that of the other cases with E.

    The dilated convolution is left out, because PEFT's plain LoRA computes it differently.
    """
    options = {**case.options, "lora_alpha": 4}
    if isinstance(options.get("target_modules"), list):
        options["target_modules"] = [name for name in options["target_modules"] if name != "dilated"]
    return dataclasses.replace(case, options=options)


WRITTEN = [
    *(pytest.param(case, id=f"lora-{case.name}") for case in LORA),
    *(pytest.param(_of_the_paper(case), id=f"adalora of the paper-{case.name}") for case in ADALORA),
    *(
        pytest.param(_in_the_default_form(case), id=f"adalora-{case.name}")
        for case in ADALORA
        if "init_lora_weights" not in case.options
    ),
]


# Code that all tests use.


class Exchange:
    """Compares logits, and keeps the largest difference in each direction."""

    def __init__(self) -> None:
        self.largest: dict[tuple[str, str, str], float] = {}

    def report(self) -> str:
        lines = [
            f"largest logit difference, {direction}, {how}, {bases} bases: {value:.2e}"
            for (direction, how, bases), value in sorted(self.largest.items())
        ]
        return "\n".join(["", *lines])

    def same(self, direction: str, how: str, case: Case, one: Tensor, other: Tensor) -> None:
        difference = float((one.float() - other.float()).abs().max())
        single = case.dtype == torch.float32
        key = (direction, how, "float32" if single else "half-precision")
        self.largest[key] = max(difference, self.largest.get(key, 0.0))
        allowed = SINGLE if single else HALF if how == "unmerged" else MERGED_HALF
        assert difference <= allowed, (
            f"{how}: the logits differ by {difference:.2e}, of {float(one.abs().max()):.1f} at most"
        )

    def same_everywhere(self, direction: str, case: Case, ours: Any, theirs: Any) -> None:
        """Compare the two models unmerged, both merged, and merged with unmerged."""
        here, there = _logits(ours, case), _logits(theirs, case)
        base = _logits(case.base(), case)
        assert (here - base).abs().max() > 5e-3, "the adapter should show, or the test shows nothing"
        self.same(direction, "unmerged", case, here, there)
        if case.mergeable:
            merged_here, merged_there = (_logits(model.merge_and_unload(), case) for model in (ours, theirs))
            self.same(direction, "both merged", case, merged_here, merged_there)
            self.same(direction, "one merged", case, merged_here, there)
            self.same(direction, "one merged", case, here, merged_there)


@pytest.fixture(scope="module")
def exchange() -> Iterator[Exchange]:
    kept = Exchange()
    yield kept
    print(kept.report())  # pytest shows it with -s


@torch.no_grad()
def _logits(model: nn.Module, case: Case) -> Tensor:
    output = model.eval()(**case.inputs())
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "start_logits", "last_hidden_state"):
        if name in output:
            return output[name]
    raise AssertionError(f"{type(output).__name__} has no logits")


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Set all trained parameters to values that clearly change the logits."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "ranknum" in name:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if ".lora_" in f".{name}":
            parameter.copy_(noise * 0.25)
        elif parameter.requires_grad:
            parameter.add_(noise * 0.1)


def _peft_loads(folder: Path, case: Case, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load with PEFT. No tensor may be missing or left over, and there may be no warning."""
    results = []
    original = peft.peft_model.set_peft_model_state_dict

    def recording(*args: Any, **kwargs: Any) -> Any:
        results.append(original(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(peft.peft_model, "set_peft_model_state_dict", recording)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(case.base(), folder)
    for warning in said:
        if issubclass(warning.category, FutureWarning):  # a matter of other libraries
            continue
        assert str(warning.message).startswith(case.peft_says or ("nothing",)), (
            f"PEFT says: {warning.message}"
        )
    (result,) = results
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    return model


def _check_loaded_by_peft(
    ours: Any, case: Case, folder: Path, exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours.save_pretrained(folder)
    exchange.same_everywhere("rankwise to PEFT", case, ours, _peft_loads(folder, case, monkeypatch))


def _check_loaded_by_rankwise(theirs: Any, case: Case, folder: Path, exchange: Exchange) -> None:
    _saved_by_peft(theirs, folder)
    exchange.same_everywhere("PEFT to rankwise", case, _rankwise_loads(folder, case), theirs)


def _saved_by_peft(theirs: Any, folder: Path, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(folder, **options)


def _rankwise_loads(folder: Path, case: Case, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return rw.PeftModel.from_pretrained(case.base(), folder, **case.computes(rw), **options)


def _their_paths(model: nn.Module) -> set[str]:
    layer = peft.tuners.tuners_utils.BaseTunerLayer
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, layer)
    }


def _trains(model: nn.Module) -> set[tuple[str, tuple[int, ...]]]:
    """The names, as in an adapter file, and the shapes of all trained parameters."""
    found = set()
    for name, parameter in model.named_parameters():
        if (
            parameter.requires_grad and "ranknum" not in name
        ):  # PEFT trains it by mistake on half-precision bases
            for infix in ("base_layer.", "default.", "modules_to_save.", "embedding_"):
                name = name.replace(infix, "")
            shape = parameter.shape if parameter.dim() < 4 else parameter.flatten(1).shape
            found.add(
                (
                    name.removeprefix("base_model.model.").removesuffix(".default").replace(".weight", ""),
                    tuple(shape),
                )
            )
    return found


# The tests.


@pytest.mark.parametrize("case", WRITTEN)
def test_peft_loads_what_rankwise_writes(
    case: Case, tmp_path: Path, exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = case.adapted(rw)
    _randomise(ours)
    _check_loaded_by_peft(ours, case, tmp_path, exchange, monkeypatch)


@pytest.mark.parametrize("case", CASES)
def test_rankwise_loads_what_peft_writes(case: Case, tmp_path: Path, exchange: Exchange) -> None:
    theirs = case.adapted(peft)
    _randomise(theirs)
    _check_loaded_by_rankwise(theirs, case, tmp_path, exchange)


@pytest.mark.parametrize("case", CASES)
def test_the_same_options_adapt_and_train_the_same(case: Case) -> None:
    if "init_r" in case.options:
        case = _of_the_paper(case)
    ours, theirs = case.adapted(rw), case.adapted(peft)
    assert set(adapter_layers(ours)) == _their_paths(theirs)
    assert _trains(ours) == _trains(theirs)
    trained, total = ours.get_nb_trainable_parameters()
    their_trained, their_total = theirs.get_nb_trainable_parameters()
    counters = [p.requires_grad for name, p in theirs.named_parameters() if ".ranknum." in name]
    assert (trained, total) == (their_trained - sum(counters), their_total - len(counters))


# AdaLoRA at the stages of a run.


TINY_BUDGET = _adalora("trained", target_modules=LLAMA_LINEAR, target_r=1, orth_reg_weight=0.1)
WITH_HEAD = _adalora(
    "trained-head", "bert", target_modules=["query", "value"], target_r=0.5, task_type="SEQ_CLS"
)
CONVOLUTIONS = _adalora(
    "trained-conv", "pictures", target_modules=["entry", "middle", "pointwise", "head"], target_r=1
)
STAGES = {"warm-up": 2, "pruning": 6, "end": 12}  # steps; ranks are pruned at 4, 6, 8 and 9
PRUNED = "The following rank_pattern keys did not match"  # PEFT gives this warning for its own pruned adapters, too


def _train(model: Any, case: Case, steps: int) -> None:
    """Take some optimizer steps towards random logits. PEFT must be told of each step."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-1)
    target = torch.randn(_logits(model, case).shape, generator=torch.Generator().manual_seed(5))
    for step in range(1, steps + 1):
        output = model.train()(**case.inputs())
        loss = ((output if isinstance(output, Tensor) else output.logits) - target).square().mean()
        loss.backward()
        optimizer.step()
        if not isinstance(model, rw.PeftModel):
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


def _ranks_in(folder: Path) -> list[int]:
    """The ranks in a folder of the paper's form."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    return [tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_E")]


def _lora_ranks_in(folder: Path) -> list[int]:
    """The ranks in a folder of plain LoRA, and 0 for each further layer that its history names."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    ranks = [len(tensor) for name, tensor in tensors.items() if name.endswith("lora_A.weight")]
    layers = json.loads((folder / "rank_history.json").read_text())["layers"]
    return ranks + [0] * (len(layers) - len(ranks))


@pytest.mark.parametrize(
    ("stage", "paper"),
    [(stage, paper) for stage in [*STAGES, "finalized"] for paper in (False, True)] + [("grown back", True)],
)
@pytest.mark.parametrize("case", [TINY_BUDGET, WITH_HEAD, CONVOLUTIONS], ids=lambda case: case.name)
def test_peft_loads_a_trained_adalora_adapter(
    case: Case, stage: str, paper: bool, tmp_path: Path, exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = (
        {"init_lora_weights": True} if paper else {"target_r": 0.5}
    )  # so few ranks that some layers must end at rank 0
    case = dataclasses.replace(case, options={**case.options, **fields})
    ours = case.adapted(rw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the adapter is saved before the end of its run
        _train(ours, case, STAGES.get(stage, 7))
        if stage == "finalized":
            ours.finalize_ranks()
        ours.save_pretrained(tmp_path)
        whole = stage in ("warm-up", "grown back")  # a triplet that has grown back since the last cut acts
        said = () if whole or not paper else (PRUNED,)
        _check_loaded_by_peft(
            ours, dataclasses.replace(case, peft_says=said), tmp_path, exchange, monkeypatch
        )
    ranks = _ranks_in(tmp_path) if paper else _lora_ranks_in(tmp_path)
    if stage in ("end", "finalized"):
        assert sum(ranks) == case.options["target_r"] * len(ranks) or not paper
        assert 0 in ranks, "a layer should end at rank 0, or the test shows less"
    else:
        assert (sum(ranks) == 4 * len(ranks)) == whole


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", [TINY_BUDGET, WITH_HEAD, CONVOLUTIONS], ids=lambda case: case.name)
def test_rankwise_loads_an_adalora_adapter_trained_by_peft(
    case: Case, stage: str, tmp_path: Path, exchange: Exchange
) -> None:
    theirs = case.adapted(peft)
    _train(theirs, case, STAGES[stage])
    _check_loaded_by_rankwise(theirs, case, tmp_path, exchange)
    assert stage != "end" or 0 in _ranks_in(tmp_path), "a layer should end at rank 0, or the test shows less"


def test_an_adapter_that_the_other_library_pruned_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = dataclasses.replace(TINY_BUDGET, peft_says=(PRUNED,))
    ours, theirs = case.adapted(rw), case.adapted(peft)
    for model, folder in ((ours, tmp_path / "ours"), (theirs, tmp_path / "theirs")):
        _train(model, case, 12)
        _saved_by_peft(model, folder)
    here = _rankwise_loads(tmp_path / "theirs", case, is_trainable=True)
    before = _logits(here, case)
    ranks = [row.rank for row in here.rank_summary().layers]
    assert sorted(ranks) == sorted(_ranks_in(tmp_path / "theirs"))
    _train(here, case, 12)
    assert [row.rank for row in here.rank_summary().layers] == ranks
    assert not torch.equal(_logits(here, case), before)
    here.save_pretrained(tmp_path / "again")
    again = _peft_loads(tmp_path / "again", case, monkeypatch)
    torch.testing.assert_close(_logits(again, case), _logits(here, case), atol=SINGLE, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = peft.PeftModel.from_pretrained(case.base(), tmp_path / "ours", is_trainable=True)
    before = _logits(there, case)
    there.train()(**case.inputs()).logits.square().mean().backward()
    torch.optim.SGD([p for p in there.parameters() if p.requires_grad], lr=0.1).step()
    assert not torch.equal(_logits(there, case), before)


# Files of other shapes.


def test_saved_base_embeddings_travel(
    tmp_path: Path, exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT writes the weights of adapted embeddings, or of all if asked, because they may have new random rows."""
    for number, (model, targets, option) in enumerate([
        ("llama", ["embed_tokens", "q_proj"], "auto"),
        ("llama", ["q_proj"], True),
        ("llama-tied", ["q_proj"], True),
    ]):  # fmt: skip
        case = _lora("embeddings", model, target_modules=targets, mergeable=False)
        for library in (peft, rw):
            folder = tmp_path / f"{number}-{library.__name__}"
            changed = case.base()
            with torch.no_grad():
                changed.get_input_embeddings().weight[3:] += 0.5
            kind = library.LoraConfig(**case.options)
            adapted = library.get_peft_model(changed, kind)
            _randomise(adapted)
            _saved_by_peft(adapted, folder, save_embedding_layers=option)
            loaded = (
                _rankwise_loads(folder, case) if library is peft else _peft_loads(folder, case, monkeypatch)
            )
            direction = "PEFT to rankwise" if library is peft else "rankwise to PEFT"
            exchange.same(direction, "unmerged", case, _logits(adapted, case), _logits(loaded, case))


@pytest.mark.parametrize("adalora", [False, True])
def test_embeddings_that_are_multiplied_by_a_number_are_as_in_peft(tmp_path: Path, adalora: bool) -> None:
    """Gemma, M2M100, mBART and others multiply the rows of their embedding by the root of its width."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding as OfTensor
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100ScaledWordEmbedding as OfFloat

    torch.manual_seed(0)
    base = nn.ModuleList([OfTensor(9, 4, 0, 3.0), OfFloat(9, 4, 0, 5.0)])
    x = torch.tensor([[1, 2], [7, 1]])

    def outputs(model: Any) -> list[Tensor]:
        return [layer(x) for layer in model]

    config: Any = rw.LoraConfig(r=2, target_modules=["0", "1"])
    if adalora:
        config = rw.AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=["0", "1"])
    ours = rw.get_peft_model(copy.deepcopy(base), config)
    _randomise(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).base_model.model
    found = outputs(ours)
    for one, two in zip(found, outputs(theirs), strict=True):
        torch.testing.assert_close(one, two)
    for one, two in zip(found, outputs(ours.merge_and_unload()), strict=True):
        torch.testing.assert_close(one, two)


class Padded(nn.Sequential):
    """Convolutions for which PEFT's unmerged and merged adapters differ."""

    def __init__(self) -> None:
        dilated = nn.Conv2d(3, 4, 3, padding="same", dilation=2)
        super().__init__(dilated, nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"))


def test_rankwise_equals_pefts_merged_weights_even_if_peft_unmerged_differs(tmp_path: Path) -> None:
    """PEFT's unmerged plain LoRA ignores the dilation, and pads with zeros in all of its convolutions."""
    torch.manual_seed(0)
    base, x = Padded(), torch.randn(2, 3, 8, 8)
    for options in ({"r": 4}, {"init_r": 4, "target_r": 2, "total_step": 9}):
        kind = "AdaLoraConfig" if "init_r" in options else "LoraConfig"
        theirs = peft.get_peft_model(
            copy.deepcopy(base), getattr(peft, kind)(target_modules=["0", "2"], **options)
        )
        _randomise(theirs)
        folder = tmp_path / kind
        _saved_by_peft(theirs, folder)
        with torch.no_grad():
            ours = rw.PeftModel.from_pretrained(copy.deepcopy(base), folder)(x)
            unmerged, merged = theirs(x), theirs.merge_and_unload()(x)
        torch.testing.assert_close(ours, merged, atol=SINGLE, rtol=0)
        assert (unmerged - merged).abs().max() > 1e-3, "PEFT has been mended: say so in the documentation"


def test_the_first_of_several_patterns_counts_also_after_saving(
    tmp_path: Path, exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT sorts the patterns when it writes them, and then can't read its own adapter."""
    case = _lora(
        "order", target_modules=LLAMA_LINEAR, rank_pattern={"v_proj": 2, "layers.1.*": 6},
        alpha_pattern={"v_proj": 20, "q_proj": 1, r"layers\.1\..*": 3},
    )  # fmt: skip
    ours = case.adapted(rw)
    _randomise(ours)
    ours.save_pretrained(tmp_path)
    torch.testing.assert_close(_logits(_rankwise_loads(tmp_path, case), case), _logits(ours, case))
    _check_loaded_by_peft(ours, case, tmp_path, exchange, monkeypatch)


@pytest.mark.parametrize("adalora", [False, True])
def test_a_file_of_peft_with_the_compilers_names_fits_the_plain_model(adalora: bool, tmp_path: Path) -> None:
    """PEFT keeps ``_orig_mod`` in the names, and then finds none of the layers in a model that is not compiled."""
    options: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"]}
    config = peft.AdaLoraConfig(total_step=10, **options) if adalora else peft.LoraConfig(**options)
    model = peft.get_peft_model(torch.compile(llama(), backend="eager"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.2)
        expected = model.eval()(TOKENS).logits
    model.save_pretrained(tmp_path)
    assert any("_orig_mod" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = rw.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(loaded(TOKENS).logits, expected, rtol=1e-4, atol=SINGLE)


@pytest.mark.parametrize("adalora", [False, True])
def test_an_adapter_of_another_kind_of_model_is_refused_for_that_reason(
    adalora: bool, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"target_modules": ["query"]}
    config = rw.AdaLoraConfig(total_step=10, **options) if adalora else rw.LoraConfig(**options)
    rw.get_peft_model(bert(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapts 'bert\..*', which the model does not have"):
        rw.PeftModel.from_pretrained(llama(), tmp_path)


def test_layers_that_a_file_holds_but_its_configuration_does_not_select_are_reported(tmp_path: Path) -> None:
    config = rw.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    rw.get_peft_model(llama(), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": ["q_proj"]}))
    with pytest.warns(
        UserWarning, match=r"adapts 'model.layers.0.mlp.up_proj' and more, which .* PEFT leaves"
    ):
        loaded = rw.PeftModel.from_pretrained(llama(), tmp_path)
    assert len(loaded.targeted_module_names) == 4


def test_rankwise_reads_pefts_pickled_files(tmp_path: Path) -> None:
    case = LORA[0]
    theirs = case.adapted(peft)
    _randomise(theirs)
    _saved_by_peft(theirs, tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    ours = _rankwise_loads(tmp_path, case)
    torch.testing.assert_close(_logits(ours, case), _logits(theirs, case), atol=SINGLE, rtol=0)


def test_several_adapters_are_saved_where_peft_saves_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = _lora("several", target_modules=["q_proj"])
    ours, theirs = case.adapted(rw), case.adapted(peft)
    for library, model in ((rw, ours), (peft, theirs)):
        model.add_adapter("second", library.LoraConfig(r=2, target_modules=["v_proj", "q_proj"]))
        _randomise(model)
        folder = tmp_path / library.__name__
        _saved_by_peft(model, folder)
    written = [
        {str(path.relative_to(folder)) for path in folder.rglob("adapter_*")}
        for folder in (tmp_path / "rankwise", tmp_path / "peft")
    ]
    assert written[0] == written[1]
    for folder, name in (("", "default"), ("second", "second")):
        for model in (ours, theirs):
            model.set_adapter(name)
        loaded = _peft_loads(tmp_path / "rankwise" / folder, case, monkeypatch)
        torch.testing.assert_close(_logits(loaded, case), _logits(ours, case), atol=SINGLE, rtol=0)
        loaded = _rankwise_loads(tmp_path / "peft" / folder, case)
        torch.testing.assert_close(_logits(loaded, case), _logits(theirs, case), atol=SINGLE, rtol=0)
        monkeypatch.undo()


def test_writing_an_adapter_again_changes_nothing(tmp_path: Path) -> None:
    """An adapter read from PEFT and written again has the same tensors, and PEFT reads the same configuration."""
    from safetensors.torch import load_file

    for case in (LORA[12], LORA[17], TINY_BUDGET, WITH_HEAD):
        first, second = tmp_path / case.name, tmp_path / f"{case.name}-again"
        theirs = case.adapted(peft)
        if case in (TINY_BUDGET, WITH_HEAD):
            _train(theirs, case, 12)
        _saved_by_peft(theirs, first)
        _rankwise_loads(first, case).save_pretrained(second)
        tensors, again = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
        assert tensors.keys() == again.keys()
        assert all(torch.equal(tensors[name], again[name]) for name in tensors)
        configs = [peft.PeftConfig.from_pretrained(folder).to_dict() for folder in (first, second)]
        assert configs[0] == configs[1]


@pytest.mark.parametrize("form", [True, "principal"])
def test_adapters_that_peft_does_not_know_come_back(form: Any, tmp_path: Path) -> None:
    """PEFT's AdaLoRA supports neither embeddings nor grouped convolutions."""
    targets = ["grouped", "label", "head", "entry"]
    case = _adalora("own", "pictures", target_modules=targets, target_r=0.5, init_lora_weights=form)
    ours = case.adapted(rw)
    _train(ours, case, 12)
    ours.save_pretrained(tmp_path)
    assert 0 in (_ranks_in(tmp_path) if form is True else _lora_ranks_in(tmp_path))
    loaded = _rankwise_loads(tmp_path, case)
    torch.testing.assert_close(_logits(loaded, case), _logits(ours, case), atol=SINGLE, rtol=0)
    merged = _logits(loaded.merge_and_unload(), case)
    torch.testing.assert_close(merged, _logits(ours, case), atol=SINGLE, rtol=0)


def test_an_adapter_saved_before_its_length_was_known_trains_on_without_a_schedule(tmp_path: Path) -> None:
    fields = {"tinit": 0.1, "tfinal": 0.3, "init_lora_weights": True}
    config = rw.AdaLoraConfig(init_r=4, target_r=2, **fields, target_modules=["q_proj"])
    rw.get_peft_model(llama(), config).save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(llama(), tmp_path)  # PEFT rejects an adapter without a schedule
    model = rw.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert model.allocation_state.total_step is None
