"""Every model type of Transformers, made small from its own configuration. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import io
import itertools
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

MOST_PARAMETERS = 30_000_000
_VOCABULARY = 128  # a power of two, as codebooks require
_LARGEST_IMAGE = 512

# The class for a model type is taken from the first of these mappings that has one. Classes with heads come first,
# because people train these, and because they have tied weights and output embeddings.
_MAPPINGS = (
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "CTC",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "DEPTH_ESTIMATION",
    "TEXT_TO_SPECTROGRAM",
)


def model_types() -> list[str]:
    """All model types, in alphabetical order."""
    return sorted(CONFIG_MAPPING_NAMES)


def model_classes(model_type: str) -> list[type[PreTrainedModel]]:
    """The classes of a model type, in the order in which they are tried; none if it has no class of its own.

    A class may need another configuration than the type's own, such as that of the text model inside.
    """
    found: dict[type[PreTrainedModel], None] = {}
    for name in [*(f"MODEL_FOR_{each}_MAPPING_NAMES" for each in _MAPPINGS), "MODEL_MAPPING_NAMES"]:
        names = getattr(modeling_auto, name).get(model_type)
        for each in [names] if isinstance(names, str) else names or ():
            if (cls := getattr(transformers, each, None)) is not None:
                found[cls] = None
    if not found and (own := _class_of_module(CONFIG_MAPPING[model_type])) is not None:
        found[own] = None
    return list(found)


def _class_of_module(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel] | None:
    """The first public class in the configuration's own module that accepts it."""
    package = config_class.__module__.rpartition(".")[0]
    name = config_class.__module__.rpartition(".")[2].replace("configuration_", "modeling_")
    try:
        module = importlib.import_module(f"{package}.{name}")
    except ImportError:
        return None
    own = [
        each
        for each in vars(module).values()
        if inspect.isclass(each)
        and issubclass(each, PreTrainedModel)
        and each.__module__ == module.__name__
        and getattr(each, "config_class", None) is config_class
        and each.forward is not PreTrainedModel.__dict__.get("forward")
        and not each.__name__.endswith("PreTrainedModel")
    ]
    return own[-1] if own else None


class TooLarge(Exception):
    """The model type has too many parameters even at its smallest."""


def shrunk_model(model_type: str) -> PreTrainedModel:
    """A small model of this type, in evaluation mode.

    Raises:
        LookupError: there is no class for it.
        TooLarge: it has too many parameters.
        Exception: the error of its class in the last attempt.
    """
    return made(*_recipe(model_type))


@functools.lru_cache(maxsize=4)
def _recipe(model_type: str) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    classes = model_classes(model_type)
    if not classes:
        raise LookupError("has no class of its own")
    first: Exception | None = None
    for cls, layers, shrink in itertools.product(classes, (2, 6), (16, 8, 4, 2, 1)):
        try:
            config = shrunk_config(model_type, shrink, layers)
            if parameters_of(cls, config) > MOST_PARAMETERS:
                raise TooLarge(f"has more than {MOST_PARAMETERS / 1e6:.0f} million parameters")
            made(cls, config)
            return cls, config
        except (ImportError, TooLarge):
            raise
        except Exception as error:  # any constructor may raise it
            first = first or error
    assert first is not None
    raise first


def parameters_of(cls: type[PreTrainedModel], config: PreTrainedConfig) -> int:
    """The number of parameters that the model would have. They are not made."""
    with quiet(), torch.device("meta"):
        model = cls(copy.deepcopy(config))
    return sum(parameter.numel() for parameter in model.parameters())


def made(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model whose weights depend only on its configuration."""
    with quiet():
        torch.manual_seed(0)
        model = cls(copy.deepcopy(config)).float()
    model.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # some are left uninitialized
            if not parameter.isfinite().all():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def shrunk_config(model_type: str, by: int, layers: int) -> PreTrainedConfig:
    """The type's default configuration with few ``layers``, a small vocabulary, and widths divided by ``by``."""
    with quiet():
        config = CONFIG_MAPPING[model_type]()
        _shrink(config, by, layers)
    return config


_WIDTH = re.compile(
    r"(hidden|embed|embedding|intermediate|ffn|feature|projection|proj|inner|model|conv|mlp|latent|lora|state|"
    r"head|encoder|decoder|classifier|bottleneck|channel|output|expand|d)\w*(size|dim|dims|width|rank|sizes|"
    r"channels|features)$|^(dim|d_model|d_ff|d_kv|n_embd|n_inner|width|hidden|head_dim|kv_lora_rank|q_lora_rank|"
    r"embed_dim|ffn_dim|units|backbone_channels|channels|widths|rnn_hidden|time_step_rank|conv_dim)$"
)
_LAYER_COUNT = re.compile(
    r"^(num|n|encoder|decoder|dec|enc|text|vision|bbox|prior|depth|local|global|first|mtp)?\w*(layers|n_layer|n_layers|"
    r"num_blocks|depth|depths|num_hidden_groups|num_prompt_layers)$"
)
_NOT_LAYERS = re.compile(
    r"index|indices|ids|which|num_feat_extract_layers|num_conv|num_nextn|feature_layer|kernel|drop|skip"
)
_VOCAB = re.compile(r"(vocab_size|codebook_size|num_codes|num_embeddings|n_words|max_n_words)$")
_TOKEN = re.compile(r"(_id|_ids|_index|_idx|_token)$")


def _shrink(config: Any, by: int, layers: int) -> None:
    for value in list(vars(config).values()):
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(each, PreTrainedConfig) and each is not config:
                _shrink(each, by, layers)
    if "vocab_size" in vars(config) and config.vocab_size is None:
        config.vocab_size = _VOCABULARY
    for name, value in (("prediction_length", 4), ("context_length", 8)):
        if name in vars(config) and getattr(config, name) is None:
            setattr(config, name, value)
    before = dict(vars(config))
    counted = _layers_of(before)
    for name, value in before.items():
        if name.startswith("_") or isinstance(value, bool):
            continue
        try:
            new = _shrunk_value(name, value, by, layers, counted)
            if new is not value:
                setattr(config, name, new)
        except Exception:  # a property without a setter
            continue
    _fill_in(config)


def _fill_in(config: Any) -> None:
    """Fill in values that some classes need although their configuration's default is None."""
    held = vars(config)
    heads, width = held.get("num_attention_heads"), held.get("hidden_size")
    if isinstance(heads, int) and isinstance(width, int):
        if held.get("head_dim", 0) is None:
            config.head_dim = width // heads
        if held.get("num_key_value_heads", 0) is None:
            config.num_key_value_heads = heads


def _layers_of(values: dict[str, Any]) -> bool:
    """Whether a configuration gives its number of layers, so that it needs as many kinds of layers."""
    names = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers")
    return any(isinstance(values.get(name), int) for name in names)


def _shrunk_value(name: str, value: Any, by: int, layers: int, counted: bool) -> Any:
    if name == "layer_types" or (
        name.endswith(("_layer_types", "_layers_type", "layers_block_type")) and isinstance(value, list)
    ):
        return value[:layers] if isinstance(value, list) and counted else value
    if _LAYER_COUNT.search(name) and not _NOT_LAYERS.search(name):
        if isinstance(value, int):
            return min(value, layers)
        if isinstance(value, (list, tuple)) and all(isinstance(each, int) for each in value):
            return type(value)(min(each, 1) if len(value) > 2 else min(each, layers) for each in value)
    if _VOCAB.search(name) and isinstance(value, int):
        return min(value, _VOCABULARY)
    if _TOKEN.search(name) and "layer" not in name:
        if isinstance(value, int):
            return value if value < _VOCABULARY else value % (_VOCABULARY // 2) + 40
        if isinstance(value, list) and value and all(isinstance(each, int) for each in value):
            return [each if each < _VOCABULARY else each % (_VOCABULARY // 2) + 40 for each in value]
    if re.search(
        r"max_position|max_source_pos|max_target_pos|n_positions|max_seq|max_length", name
    ) and isinstance(value, int):
        return min(value, 512)
    if re.search(
        r"num_(local_)?experts$|n_routed_experts|moe_num_experts|num_experts_total", name
    ) and isinstance(value, int):
        return min(value, 8)
    if _WIDTH.search(name) and not re.search(
        r"kernel|drop|patch|image|window|pool|num_channels|in_channels|max_|vocab", name
    ):
        if isinstance(value, int):
            return _divided(value, by)
        if isinstance(value, (list, tuple)) and value and all(isinstance(each, int) for each in value):
            return type(value)(_divided(each, by) for each in value)
    return value


def _divided(value: int, by: int) -> int:
    while by > 1 and (value % by or value // by < 4):
        by //= 2
    return value // by


def forward_inputs(model: PreTrainedModel) -> Sequence[dict[str, Any]]:
    """Inputs to try. The first that the model accepts are used."""
    config = model.config
    text = {"input_ids": torch.arange(3, 15).view(2, 6)}
    named: dict[str, list[dict[str, Any]]] = {
        "input_ids": [text, {**text, "decoder_input_ids": text["input_ids"]}],
        "pixel_values": [{"pixel_values": _noise(2, *shape)} for shape in _image_shapes(config)],
        "input_features": [
            {"input_features": _noise(2, *shape), **more}
            for shape in _feature_shapes(config)
            for more in ({}, {"decoder_input_ids": text["input_ids"]})
        ],
        "input_values": [
            {"input_values": _noise(2, 16000)},
            {"input_values": _noise(2, 1, 16000)},
            {"input_values": _noise(2, 1024, 128)},
        ],
        "pixel_values_videos": [
            {"pixel_values_videos": _noise(1, 8, *shape)} for shape in _image_shapes(config)
        ],
        "hidden_states": [{"hidden_states": _noise(2, 6, width)} for width in _widths(config)],
    }
    main = getattr(model, "main_input_name", "input_ids")
    mains = [main] if isinstance(main, str) else list(main)
    order = [*mains, *(name for name in named if name not in mains)]
    found = [each for name in order for each in named.get(name, ())]
    found += [{**text, **each} for each in named["pixel_values"]]
    found += [{"inputs_embeds": _noise(2, 6, width)} for width in _widths(config)]
    takes = set(inspect.signature(model.forward).parameters)
    return [each for each in found if set(each) <= takes]


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.5


def _image_shapes(config: Any) -> list[tuple[int, int, int]]:
    shapes = []
    for each in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)):
        size = getattr(each, "image_size", None)
        if isinstance(size, (list, tuple)):
            size = size[0]
        if isinstance(size, int):
            shapes.append((getattr(each, "num_channels", 3), size, size))
    shapes = [shape for shape in shapes if shape[1] <= _LARGEST_IMAGE]
    return [*dict.fromkeys([*shapes, (getattr(config, "num_channels", 3), 224, 224)])]


def _feature_shapes(config: Any) -> list[tuple[int, int]]:
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None) or 80
    positions = 2 * (getattr(config, "max_source_positions", None) or 50)
    return [(bins, positions), (100, bins)]


def _widths(config: Any) -> list[int]:
    found = [getattr(config, name, None) for name in ("hidden_size", "d_model", "width")]
    return list(dict.fromkeys(each for each in found if isinstance(each, int)))


def outputs_of(model: PreTrainedModel, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """All floating-point tensors that a forward pass returns."""
    torch.manual_seed(3)
    with torch.no_grad(), quiet():
        output = model(**{name: value.clone() for name, value in inputs.items()})
    return list(tensors_in(output))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors in nested values."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)


def working_inputs(model: PreTrainedModel) -> dict[str, Any] | None:
    """Inputs that the model accepts and that give finite numbers; None if none of the simple ones do."""
    for inputs in forward_inputs(model):
        try:
            found = outputs_of(model, inputs)
        except Exception:  # inputs are found by trial
            continue
        if found and all(each.isfinite().all() for each in found):
            return inputs
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress output and warnings while models are made."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def linear_layers(model: nn.Module) -> int:
    """The number of layers that "all-linear" could select."""
    return sum(type(module).__name__ in ("Linear", "Conv1D") for module in model.modules())
