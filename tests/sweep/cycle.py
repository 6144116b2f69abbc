"""The cycle for every model type: adapted, saved, loaded into a fresh base, compared, merged."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

import rankwise as rw
from sweep.shrunk import linear_layers, outputs_of, quiet, shrunk_model, tensors_in, working_inputs

RANK = 2
SCALE = 0.2
# Types whose forward pass takes seconds, because they process a sequence step by step or have hundreds of layers.
SLOW = (
    "EvollaModel",
    "bark",
    "falcon_h1",
    "mamba2",
    "nemo_speechlm",
    "pegasus_x",
    "pocket_tts_audio_tokenizer",
    "vits",
)


class Differs(AssertionError):
    """The loaded adapter differs from the saved one."""


class NothingToAdapt(LookupError):
    """The model has no linear layers."""


class Library(Protocol):
    """The operations of an adapter library that the cycle uses."""

    def attach(self, model: Any) -> Any: ...

    def save(self, model: Any, folder: str) -> None: ...

    def load(self, base: Any, folder: str) -> Any: ...

    def deltas(self, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """The base weight of each adapted layer, and the change that its adapter adds to it, by path."""

    def merged(self, model: Any) -> Any: ...

    def bypassed(self, model: Any, inputs: dict[str, Any]) -> list[str]:
        """The adapted layers whose weights affect the outputs, but whose adapters don't."""


class Rankwise:
    def attach(self, model: Any) -> Any:
        config = rw.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
        return rw.get_peft_model(model, config)

    def save(self, model: Any, folder: str) -> None:
        model.save_pretrained(folder)

    def load(self, base: Any, folder: str) -> Any:
        return rw.PeftModel.from_pretrained(base, folder)

    def deltas(self, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
        from rankwise.attach.attachment import adapter_layers

        return {
            path: (layer.weight.detach().clone(), layer.delta_weight("default").detach())
            for path, layer in adapter_layers(model).items()
        }

    def merged(self, model: Any) -> Any:
        return model.merge_and_unload()

    def bypassed(self, model: Any, inputs: dict[str, Any]) -> list[str]:
        from rankwise.attach.attachment import adapter_layers

        layers = adapter_layers(model)
        weights = [layer.weight for layer in layers.values()]
        factors = [layer.lora_B["default"] for layer in layers.values()]
        for weight in weights:
            weight.requires_grad_(True)
        try:
            with quiet():
                outputs = list(tensors_in(model(**{name: value.clone() for name, value in inputs.items()})))
            total = sum(output.double().square().sum() for output in outputs if output.requires_grad)
            if not isinstance(total, Tensor):
                return []
            found = torch.autograd.grad(total, [*weights, *factors], allow_unused=True)
        except (
            NotImplementedError,
            RuntimeError,
        ):  # no backward pass exists, or a tensor is changed in place
            return []
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        pairs = zip(layers, found[: len(weights)], found[len(weights) :], strict=True)
        return [path for path, of_weight, of_B in pairs if of_weight is not None and of_B is None]


class Peft:
    def attach(self, model: Any) -> Any:
        import peft

        config = peft.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
        return peft.get_peft_model(model, config)

    def save(self, model: Any, folder: str) -> None:
        model.save_pretrained(folder)

    def load(self, base: Any, folder: str) -> Any:
        import peft

        return peft.PeftModel.from_pretrained(base, folder)

    def deltas(self, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
        from peft.tuners.lora import LoraLayer

        found = {}
        for path, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                path = path.removeprefix("base_model.model.").replace(".base_layer", "")
                stack = hasattr(layer, "get_param")  # a stack of experts
                weight = layer.get_param() if stack else layer.get_base_layer().weight
                name = f"{path}.{layer.parameter_name}" if stack else path
                found[name] = (weight.detach().clone(), layer.get_delta_weight("default").detach())
        return found

    def merged(self, model: Any) -> Any:
        return model.merge_and_unload()

    def bypassed(self, model: Any, inputs: dict[str, Any]) -> list[str]:
        return []


def cycle(model_type: str, library: Library, base: Callable[[str], Any] = shrunk_model) -> str:
    """Take a model type through the whole cycle.

    Returns:
        "outputs" if outputs were compared, "weights" if only weights were.

    Raises:
        NothingToAdapt: the model has no linear layers.
        Differs: the loaded adapter or the merged model is wrong.
        Exception: any error on the way.
    """
    model = base(model_type)
    if not linear_layers(model):
        raise NothingToAdapt("has no linear layers")
    inputs = None if model_type in SLOW else working_inputs(model)
    plain = None if inputs is None else outputs_of(model, inputs)
    if plain is not None and not _same(plain, outputs_of(model, inputs)):  # type: ignore[arg-type]
        inputs = None  # the model draws random numbers
    kind, state = type(model), copy.deepcopy(model.state_dict())

    def fresh() -> Any:
        made = base(model_type)
        made.load_state_dict(state)  # some constructors leave weights uninitialized
        return made

    torch.manual_seed(1)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.attach(model)
        model.eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:  # large updates make values grow until rounding shows
                    parameter.mul_(SCALE)
        wanted = library.deltas(model)
        if not wanted:
            raise Differs("nothing was adapted")
        adapted = None if inputs is None else outputs_of(model, inputs)
        with tempfile.TemporaryDirectory() as folder:
            library.save(model, folder)
            held = load_file(f"{folder}/adapter_model.safetensors")
            if len(held) < 2 * len({id(weight) for weight, _ in wanted.values()}) or not all(
                tensor.isfinite().all() for tensor in held.values()
            ):
                raise Differs(f"the file has {len(held)} tensors of {len(wanted)} layers")
            loaded = library.load(fresh(), folder)
        loaded.eval()
        found = library.deltas(loaded)
    _compare_layers(wanted, found)
    if adapted is not None:
        assert inputs is not None and plain is not None
        passed_by = library.bypassed(model, inputs)
        if passed_by:
            raise Differs(f"{passed_by[0]} and {len(passed_by) - 1} more are read without their adapters")
        if not _close(adapted, outputs_of(loaded, inputs), 1e-4):
            raise Differs("the loaded model gives other outputs")
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = library.merged(loaded)
    _compare_merged(kind, state, merged, wanted)
    if adapted is not None:
        assert inputs is not None
        if not _close(adapted, outputs_of(merged, inputs), 2e-3):
            raise Differs("the merged model gives other outputs")
        return "outputs"
    return "weights"


def _compare_layers(wanted: dict[str, Any], found: dict[str, Any]) -> None:
    if wanted.keys() != found.keys():
        raise Differs(f"other layers are adapted: {sorted(wanted.keys() ^ found.keys())[:3]}")
    for path, (weight, delta) in wanted.items():
        if not torch.equal(delta, found[path][1]) or not torch.equal(weight, found[path][0]):
            raise Differs(f"{path} came back otherwise")
        if delta.numel() and not delta.any():
            raise Differs(f"{path} is adapted by nothing")


def _compare_merged(
    kind: type, before: Mapping[str, Any], merged: Any, wanted: dict[str, tuple[Tensor, Tensor]]
) -> None:
    """Check that the merged model has the base's class, and that exactly the adapted weights have changed."""
    if type(merged) is not kind:
        raise Differs(f"merged, it is a {type(merged).__name__}")
    after = merged.state_dict()
    if before.keys() != after.keys():
        raise Differs(f"merged, it has other weights: {sorted(before.keys() ^ after.keys())[:3]}")
    held = dict(merged.named_parameters(remove_duplicate=False))
    changed = {
        id(held[path] if path in held else held[f"{path}.weight"]): (path, delta)
        for path, (_, delta) in wanted.items()
    }
    for key, value in before.items():
        path_and_delta = changed.get(id(held.get(key)))
        expected = value if path_and_delta is None else value + path_and_delta[1]
        if not torch.allclose(after[key].double(), expected.double(), rtol=1e-4, atol=1e-5, equal_nan=True):
            raise Differs(f"merged, {key} is not what it should be")


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def _close(one: list[Tensor], other: list[Tensor], tolerance: float) -> bool:
    if len(one) != len(other):
        return False
    for left, right in zip(one, other, strict=True):
        if left.shape != right.shape:
            return False
        scale = max(float(left.abs().nan_to_num(0, 0, 0).max()) if left.numel() else 0.0, 1e-3)
        if not torch.allclose(left / scale, right / scale, rtol=tolerance, atol=tolerance, equal_nan=True):
            return False
    return True
