"""Which modules of a model a configuration means.

Names match as in PEFT: a name in a list is a whole path or its last parts, a string is a regular expression
for whole paths. What PEFT passes over in silence (a name that matches nothing, a layer whose weight is read
without calling the layer, so that an adapter would do nothing) is said or refused.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from rankwise.adapters import AdapterLayer, adapters_for, kinds_in_words
from rankwise.adapters.saved import SavedModule
from rankwise.config import AdaLoraConfig, LoraConfig
from rankwise.config.suggest import suggestion

_T = TypeVar("_T")

# The heads that a task type implies, which train whole.
_HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def _table(*rows: tuple[str, str]) -> dict[str, list[str] | str]:
    return {kind: names.split() for names, kinds in rows for kind in kinds.split()}


# Default targets by `model.config.model_type`: PEFT's where it has any. Names that a model lacks are passed over,
# which allows for the names of several Transformers versions in one row.
_DEFAULTS: dict[str, list[str] | str] = {
    **_table(
        (
            "q_proj v_proj",
            "arcee bart bigbird_pegasus biogpt blenderbot blenderbot-small chameleon clip clip_text_model "
            "clip_vision_model cohere cohere2 data2vec-audio dinov3_vit ernie4_5 eurobert exaone4 gemma "
            "gemma2 gemma3_text glm glm4 gpt_neo gpt_oss gptj granite helium hubert hunyuan_v1_dense jamba "
            "lfm2 llama llama4 llama4_text m2m_100 marian mbart ministral mistral mixtral moonshine nemotron "
            "nllb-moe nomic_bert olmo olmo2 olmo3 opt pegasus plbart qwen2 qwen2_moe qwen3 qwen3_moe "
            "qwen3_next seed_oss siglip siglip2 siglip_text_model siglip_vision_model smollm3 speech_to_text "
            "speecht5 stablelm starcoder2 trocr unispeech unispeech-sat wav2vec2 whisper xglm",
        ),
        (
            "query value",
            "albert bert bert-generation big_bird camembert convbert data2vec-text electra ernie esm "
            "layoutlm layoutlmv3 luke megatron-bert mobilebert nystromformer rembert roberta "
            "roberta-prelayernorm roc_bert roformer splinter tapas videomae xlm-roberta xlm-roberta-xl xmod "
            "yolos",
        ),
        (
            "query value q_proj v_proj",
            "audio-spectrogram-transformer beit deit dinov2 dinov2_with_registers ijepa led swin swinv2 vit "
            "vit_mae vit_msn vivit",
        ),
        ("query value query_global value_global", "longformer"),
        (
            "query_key_value",
            "bloom chatglm falcon gpt_neox gpt_neox_japanese persimmon RefinedWeb RefinedWebModel",
        ),
        ("q v", "longt5 mpnet mt5 switch_transformers t5 umt5"),
        ("q v q_proj v_proj", "blip-2"),
        ("Wqkv", "modernbert modernbert-decoder mpt"),
        ("c_attn", "gpt2 gpt_bigcode imagegpt"),
        ("c_proj c_attn", "btlm"),
        ("qkv_proj", "codegen phi3"),
        ("q_proj v_proj fc1 fc2", "phi"),
        ("q_proj k_proj v_proj o_proj", "nemotron_h"),
        ("q_lin v_lin", "distilbert flaubert xlm"),
        ("query_proj value_proj", "deberta-v2"),
        ("in_proj", "deberta"),
        ("q_head v_head", "funnel"),
        ("linear_q linear_v", "wav2vec2-bert wav2vec2-conformer"),
        ("intermediate_dense output_dense", "wavlm"),  # its attention reads the weights, and calls no layer
        ("key value receptance output", "rwkv"),
        ("r_proj k_proj v_proj o_proj key value", "rwkv7"),
    ),
    "gemma3": r".*language_model\..*\.(q_proj|v_proj)",
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
}

# Where PEFT's AdaLoRA has others.
_ADALORA_DEFAULTS = {
    **_DEFAULTS,
    **_table(
        ("q k v o wi wo", "t5"),
        ("q k v o wi_0 wi_1 wo", "mt5"),
        ("q_proj k_proj v_proj out_proj fc1 fc2", "bart opt"),
        ("query key value dense", "roberta"),
        ("query_proj key_proj value_proj dense", "deberta-v2"),
    ),
}


def find_targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The layers that ``config`` adapts in ``model``, by path, in the model's order.

    A layer reachable by several paths is found once, by the first. Layers in ``modules_to_save``, or in the
    heads that ``task_type`` implies, are never among them.

    Raises:
        ValueError: nothing matches, or something does that can't be adapted; with what to write instead.

    Warns:
        UserWarning: a name that matches nothing, while others do.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> list(find_targets(model, LoraConfig(target_modules=["0"])))
        ['0']
        >>> list(find_targets(model, LoraConfig(target_modules="all-linear")))
        ['0', '2']
    """
    modules = own_modules(model)
    names, chosen_by_user = _target_names(model, config)
    if chosen_by_user and not config.inference_mode:
        _check_names(modules, config)
    saved = modules_to_save_paths(model, config)
    _check_heads(model, saved, config)
    matches = frozenset(names).__contains__ if config.target_modules == "all-linear" else _matcher(names)
    excluded = _matcher(config.exclude_modules or [])
    matched = [path for path in modules if matches(path) and _in_layers(path, names, config)]
    free = [path for path in matched if not _within(path, saved) and not excluded(path)]
    targets = {path: modules[path] for path in free}
    if chosen_by_user:
        for path, module in targets.items():
            _check_layer(model, path, module, config)
    else:
        targets = dict(_adaptable(model, targets, config))
    if not targets:
        raise ValueError(_nothing_found(modules, matched, saved, names, config))
    _check_patterns(targets, config)
    return targets


def modules_to_save_paths(model: nn.Module, config: LoraConfig) -> list[str]:
    """The modules that train whole: those in ``modules_to_save``, and the heads that ``task_type`` implies.

    A name matches the end of a path, as in PEFT: "classifier" takes "pre_classifier", too.

    Raises:
        ValueError: a listed name matches nothing, or a mere list of modules.

    Example:
        >>> model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "score": nn.Linear(4, 2)})
        >>> modules_to_save_paths(model, LoraConfig(task_type="SEQ_CLS"))
        ['score']
    """
    modules = own_modules(model)
    paths = list(modules)
    implied = _HEADS.get(config.task_type or "", ())
    for name in config.modules_to_save or ():
        if name not in implied and not any(path.endswith(name) for path in paths):
            raise ValueError(
                f"`modules_to_save` names {name!r}, but the model has no such module.{_nearest_name(name, paths)}"
            )
    names = (*(config.modules_to_save or ()), *implied)
    found: list[str] = []
    for path in paths:
        if path.endswith(names) and not _within(path, found):
            found.append(path)
    for path in found:
        if isinstance(modules[path], _CONTAINERS):
            raise ValueError(
                f"`modules_to_save` takes {path!r}, a {type(modules[path]).__name__}, which is never called as a "
                "module: name the modules in it."
            )
    return found


def find_tied(model: nn.Module, targets: Iterable[str]) -> dict[str, list[str]]:
    """For each target whose parameters other modules share, the paths of those modules.

    Example:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
        >>> model["head"].weight = model["embed"].weight
        >>> find_tied(model, ["head"])
        {'head': ['embed']}
    """
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path)
    tied: dict[str, list[str]] = {}
    for path in targets:
        held = model.get_submodule(path).parameters(recurse=False)
        others = dict.fromkeys(other for each in held for other in owners[id(each)] if other != path)
        if others:
            tied[path] = list(others)
    return tied


def pattern_value(patterns: Mapping[str, _T], path: str, default: _T) -> _T:
    r"""What ``rank_pattern`` or ``alpha_pattern`` says of ``path``: the first key that matches the path's end.

    Example:
        >>> pattern_value({"layers.0.q": 4, r"layers\.\d+\.q": 2}, "model.layers.0.q", 8)
        4
        >>> pattern_value({"layers.0.q": 4, r"layers\.\d+\.q": 2}, "model.layers.1.q", 8)
        2
        >>> pattern_value({"q": 4}, "model.layers.1.qq", 8)
        8
    """
    for key, value in patterns.items():
        if _pattern_matches(key, path):
            return value
    return patterns.get(path, default)


# What is in the model


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by path, without the model itself and what adapters have put into it."""
    own: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        parent, _, last = path.rpartition(".")
        holder = own.get(parent, model)
        inside_adapter = parent and parent not in own
        factors = isinstance(holder, AdapterLayer) and last in ("lora_A", "lora_B", "lora_E")
        copies = isinstance(holder, SavedModule) and last == "modules_to_save"
        if path and not (inside_adapter or factors or copies):
            own[path] = module
    return own


def _is_linear(module: nn.Module) -> bool:
    kind = adapters_for(module)
    return kind is not None and kind.in_all_linear


def output_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """The output layer of the model, or of models inside a model of the user's own."""
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            try:
                found = getter()
            except (NotImplementedError, AttributeError):
                continue
            if isinstance(found, nn.Module):
                yield found


def _model_type(model: nn.Module) -> str | None:
    """``config.model_type`` of the model, or of the first model inside a model of the user's own."""
    kinds = (getattr(getattr(module, "config", None), "model_type", None) for module in model.modules())
    return next((kind for kind in kinds if isinstance(kind, str) and kind), None)


# Matching


def _target_names(model: nn.Module, config: LoraConfig) -> tuple[list[str] | str, bool]:
    """The names or the expression to match, and whether the user chose them himself."""
    if config.target_modules == "all-linear":
        heads = {id(module) for module in output_embeddings(model)}
        own = own_modules(model).items()
        return [path for path, module in own if _is_linear(module) and id(module) not in heads], False
    if config.target_modules is not None:
        return config.target_modules, True
    kind = _model_type(model)
    known = _ADALORA_DEFAULTS if isinstance(config, AdaLoraConfig) else _DEFAULTS
    if kind not in known:
        about = f"the architecture {kind!r}" if kind else "a model without `config.model_type`"
        raise ValueError(
            f"There are no default targets for {about}: set `target_modules`, for example to "
            f"'all-linear' or to some of its linear layers: {_linear_names(own_modules(model))}."
        )
    return known[kind], False


def _matcher(names: list[str] | str) -> Callable[[str], bool]:
    """Whether a path is, or ends with, one of the names; or matches the expression as a whole."""
    if isinstance(names, str):
        expression = re.compile(names)
        return lambda path: expression.fullmatch(path) is not None
    exact, ends = frozenset(names), tuple(f".{name}" for name in names)
    return lambda path: path in exact or path.endswith(ends)


def _by_ends(paths: Iterable[str]) -> dict[str, list[str]]:
    """The paths by everything that a name in a list could match: the whole path, and each of its ends."""
    found: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split(".")
        for first in range(len(parts)):
            found.setdefault(".".join(parts[first:]), []).append(path)
    return found


def _in_layers(path: str, names: list[str] | str, config: LoraConfig) -> bool:
    """Whether ``path`` lies in one of ``layers_to_transform``, or is named in full."""
    wanted = config.layers_to_transform
    if wanted is None or (isinstance(names, list) and path in names):
        return True
    if config.layers_pattern is None:
        expressions = [r".*?\.[^.]*\.(?P<index>\d+)\.", r"[^.]*\.(?P<index>\d+)\."]
    else:
        given = config.layers_pattern
        expressions = [
            rf"(?:^|.*?\.){each}\.(?P<index>\d+)\." for each in ([given] if isinstance(given, str) else given)
        ]
    found = next((match for each in expressions if (match := re.match(each, path))), None)
    return found is not None and int(found["index"]) in ([wanted] if isinstance(wanted, int) else wanted)


def _within(path: str, outer: Iterable[str]) -> bool:
    return any(path == each or path.startswith(f"{each}.") for each in outer)


@functools.lru_cache(maxsize=16384)
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def _pattern_matches(key: str, path: str) -> bool:
    return _compiled(key).match(path) is not None


# Refusing


def _check_names(modules: Mapping[str, nn.Module], config: LoraConfig) -> None:
    """Each name in a list must match something, outside of ``modules_to_save`` if that names it, too."""
    targets = config.target_modules if isinstance(config.target_modules, list) else []
    excluded = config.exclude_modules if isinstance(config.exclude_modules, list) else []
    matches = _by_ends(modules)
    implied = _HEADS.get(config.task_type or "", ())
    listed = tuple(name for name in config.modules_to_save or () if name not in implied)
    saved = [path for path in modules if listed and path.endswith(listed)]
    for name in targets:
        if name in matches and all(_within(path, saved) for path in matches[name]):
            raise ValueError(
                f"`target_modules` names {name!r}, but all that it matches is in `modules_to_save` and trains "
                f"whole (such as {matches[name][0]!r}): take it out of one of them."
            )
    missing = [name for name in targets if name not in matches]
    if len(missing) < len(targets):
        _warn_of_missing("target_modules", missing, modules)
    _warn_of_missing("exclude_modules", [name for name in excluded if name not in matches], modules)


def _check_heads(model: nn.Module, saved: list[str], config: LoraConfig) -> None:
    implied = _HEADS.get(config.task_type or "", ())
    if implied and not saved and not config.inference_mode:
        held = [name for name, _ in model.named_children()]
        warnings.warn(
            f"`task_type` is {config.task_type}, but the model has no module called {' or '.join(implied)}: no "
            f"head will train. If it has one, name it in `modules_to_save`; the model holds {_some(held, 12)}.",
            UserWarning,
            stacklevel=3,
        )


def _warn_of_missing(field: str, names: list[str], modules: Mapping[str, nn.Module]) -> None:
    for name in names:
        warnings.warn(
            f"`{field}` names {name!r}, but the model has no such module.{_nearest_name(name, modules)}",
            UserWarning,
            stacklevel=5,
        )


def _check_layer(model: nn.Module, path: str, module: nn.Module, config: LoraConfig) -> None:
    if adapters_for(module) is None:
        raise ValueError(_cannot_adapt(path, module, config))
    if any(isinstance(each, UninitializedParameter) for each in module.parameters(recurse=False)):
        raise ValueError(f"{path!r} has no shape yet: run the model once before it is adapted.")
    reason = _why_ignored(model, path, config)
    if reason:
        raise ValueError(f"{path!r} can't be adapted: {reason} Name it in `exclude_modules`.")
    _check_fast_path(model, path)


def _adaptable(
    model: nn.Module, targets: Mapping[str, nn.Module], config: LoraConfig
) -> Iterator[tuple[str, nn.Module]]:
    """Of targets that nobody named, those that can be adapted; it is said if others look as if they could."""
    left_out: dict[str, list[str]] = {}
    for path, module in targets.items():
        reason = _why_ignored(model, path, config) if adapters_for(module) is not None else None
        if reason:
            left_out.setdefault(reason, []).append(path)
        elif adapters_for(module) is not None:
            _check_layer(model, path, module, config)
            yield path, module
    for reason, paths in left_out.items():
        warnings.warn(f"{_some(paths)} can't be adapted: {reason} Left out.", UserWarning, stacklevel=3)


def _cannot_adapt(path: str, module: nn.Module, config: LoraConfig) -> str:
    kind = type(module).__name__
    inner = Counter(
        name.rpartition(".")[2] for name, each in module.named_modules() if name and _is_linear(each)
    )
    if not inner:
        return (
            f"{path!r} is a {kind}: only {kinds_in_words()} layers can be adapted. Narrow `target_modules`, or use "
            "`exclude_modules`."
        )
    names = [name for name, _ in inner.most_common(8)]
    if isinstance(config.target_modules, str):
        mend = f"make {config.target_modules!r} match only layers, for example r'.*\\.({'|'.join(names)})'"
    else:
        mend = f"name the layers in it instead: {', '.join(names)}"
    return f"{path!r} is a {kind}, which holds other modules: {mend}."


def _nothing_found(
    modules: Mapping[str, nn.Module],
    matched: list[str],
    saved: list[str],
    names: list[str] | str,
    config: LoraConfig,
) -> str:
    shown = repr(names) if isinstance(names, str) else _some(names)
    if matched:
        why = [f"`exclude_modules`={config.exclude_modules!r}"] if config.exclude_modules else []
        why += [f"the modules that train whole ({_some(saved)})"] if saved else []
        left = f"{' and '.join(why)} leave nothing of it" if why else "nothing of it can be adapted"
        return f"`target_modules` ({shown}) matches {_some(matched)}, but {left}."
    if any(map(_matcher(names), modules)):
        return (
            f"`target_modules` ({shown}) matches layers, but none in `layers_to_transform`="
            f"{config.layers_to_transform!r} with `layers_pattern`={config.layers_pattern!r}."
        )
    if isinstance(names, str):
        what, hints = f"the expression {shown} matches no whole path in the model", ""
    else:
        what = f"{shown} matches no module of the model"
        hints = "".join(_nearest_name(name, modules) for name in names[:4])
    return f"`target_modules`: {what}.{hints} Its linear layers are called {_linear_names(modules)}."


def _check_patterns(targets: Mapping[str, nn.Module], config: LoraConfig) -> None:
    """Keys of rank_pattern and alpha_pattern that match no target are told: they have no effect."""
    ranks: dict[str, Any] = {} if isinstance(config, AdaLoraConfig) else config.rank_pattern
    ends = _by_ends(targets)
    for field, patterns in (("rank_pattern", ranks), ("alpha_pattern", config.alpha_pattern)):
        for key in patterns:
            if key not in ends and not any(_pattern_matches(key, path) for path in targets):
                warnings.warn(
                    f"`{field}` has {key!r}, which matches no adapted layer.{_nearest_name(key, targets)}",
                    UserWarning,
                    stacklevel=4,
                )


# Layers whose weight is used behind their back


def _why_ignored(model: nn.Module, path: str, config: LoraConfig) -> str | None:
    """Why an adapter on the layer would do nothing, if so: its parent takes the weight and calls no layer."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    called, read = _uses(type(parent))  # type: ignore[arg-type]
    kind = type(parent).__name__
    if name in read and name not in called:
        return f"{kind} reads its weight without calling it, so an adapter would do nothing."
    if name in read and hasattr(parent, "A_log") and not config.inference_mode:
        return (
            f"the fused kernels of {kind} read its weight without calling it, so an adapter would not train."
        )
    return None


def _check_fast_path(model: nn.Module, path: str) -> None:
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise ValueError(
            f"{path!r} can't be adapted as it is: in evaluation, nn.TransformerEncoderLayer takes a fast path "
            "that reads its weight without calling it. Call `torch.backends.mha.set_fastpath_enabled(False)` "
            "first, also where the adapter is loaded."
        )


@functools.lru_cache(maxsize=512)
def _uses(cls: type[nn.Module]) -> tuple[frozenset[str], frozenset[str]]:
    """Names of submodules that ``cls``'s methods use as a whole, and of those whose weight they compute with."""
    called: set[str] = set()
    read: set[str] = set()
    for method in _methods(cls):
        try:
            source = textwrap.dedent(inspect.getsource(method))
            tree = ast.parse(source) if ".weight" in source else None
        except (OSError, TypeError, SyntaxError, ValueError):
            continue
        if tree is None:
            called.update(re.findall(r"\bself\.(\w+)", source))
        else:
            _walk(tree, None, None, called, read)
    return frozenset(called), frozenset(read)


def _methods(cls: type[nn.Module]) -> Iterator[Any]:
    seen: set[str] = {"__init__", "__repr__", "extra_repr", "__setstate__"}
    for each in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, method in vars(each).items():
            if name not in seen and "init_" not in name and "reset_" not in name and callable(method):
                seen.add(name)
                yield inspect.unwrap(method)


_ONLY_ASKED = frozenset(
    "device dtype shape size dim ndim numel requires_grad is_cuda is_meta data_ptr".split()
)


def _walk(node: ast.AST, parent: ast.AST | None, call: str | None, called: set[str], read: set[str]) -> None:
    """Collect ``self.x`` used as a whole, and ``self.x.weight`` used for more than its dtype, device or shape."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        if not isinstance(parent, ast.Attribute):
            called.add(node.attr)
        return
    owner = node.value if isinstance(node, ast.Attribute) and node.attr == "weight" else None
    if isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name) and owner.value.id == "self":
        asked = isinstance(parent, ast.Attribute) and parent.attr in _ONLY_ASKED
        if not asked and call not in ("isinstance", "hasattr", "getattr", "type"):
            read.add(owner.attr)
        return
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        call = node.func.id
    elif isinstance(node, ast.Call):
        call = None
    for child in ast.iter_child_nodes(node):
        _walk(child, node, call, called, read)


# Words for messages


def _nearest_name(name: str, paths: Iterable[str]) -> str:
    """A suggestion among the paths' ends that have as many parts as ``name``."""
    parts = name.count(".") + 1
    return suggestion(name, dict.fromkeys(".".join(path.split(".")[-parts:]) for path in paths))


def _linear_names(modules: Mapping[str, nn.Module], most: int = 12) -> str:
    counts = Counter(path.rpartition(".")[2] for path, module in modules.items() if _is_linear(module))
    return ", ".join(name for name, _ in counts.most_common(most)) or "nothing: it has none"


def _some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
