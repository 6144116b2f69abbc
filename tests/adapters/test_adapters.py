"""Every kind of adapted layer computes ``base + scaling * B diag(E) A``, checked in closed form in float64."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rankwise as rw
from rankwise.adapters import AdapterLayer

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {}


def _kind(name: str, layer: Callable[[], nn.Module], *shape: int) -> None:
    if isinstance(layer(), nn.Embedding):
        LAYERS[name] = layer, lambda: torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(1))
    else:
        LAYERS[name] = layer, lambda: torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(5, 6)  # outputs, inputs
    nn.init.normal_(layer.bias)
    return layer


class Doubled(nn.Linear):
    """A user's own linear layer with another forward pass than nn.Linear's."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


_kind("linear", lambda: nn.Linear(6, 5), 3, 6)
_kind("linear-no-bias", lambda: nn.Linear(6, 5, bias=False), 2, 3, 6)
_kind("linear-of-one-vector", lambda: nn.Linear(6, 5), 6)
_kind("linear-many-dimensions", lambda: nn.Linear(6, 5), 2, 3, 1, 2, 6)
_kind("linear-of-nothing", lambda: nn.Linear(6, 5), 0, 6)
_kind("linear-one-output", lambda: nn.Linear(6, 1), 3, 6)
_kind("linear-of-a-users-class", lambda: Doubled(6, 5), 3, 6)
_kind("conv1d", _conv1d, 2, 3, 6)
_kind("conv1d-of-one-sequence", _conv1d, 3, 6)
_kind("conv2d", lambda: nn.Conv2d(3, 4, 3), 2, 3, 6, 6)
_kind("conv2d-pointwise", lambda: nn.Conv2d(3, 4, 1), 2, 3, 6, 6)
_kind("conv2d-stride", lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), 2, 3, 6, 6)
_kind("conv2d-dilation", lambda: nn.Conv2d(3, 4, 3, dilation=2, padding=2, bias=False), 2, 3, 6, 6)
_kind("conv2d-same", lambda: nn.Conv2d(3, 4, 3, padding="same", dilation=2), 2, 3, 6, 6)
_kind("conv2d-circular", lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), 2, 3, 6, 6)
_kind("conv2d-reflect", lambda: nn.Conv2d(3, 4, (3, 5), padding=(1, 2), padding_mode="reflect"), 2, 3, 6, 6)
_kind("conv2d-groups", lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), 2, 4, 6, 6)
_kind("conv2d-depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4, stride=2), 2, 4, 6, 6)
_kind("conv-of-sequences", lambda: nn.Conv1d(3, 4, 3), 2, 3, 9)
_kind(
    "conv-of-sequences-stride",
    lambda: nn.Conv1d(3, 4, 4, stride=2, padding=3, dilation=2, bias=False),
    2,
    3,
    9,
)
_kind("conv-of-sequences-same", lambda: nn.Conv1d(3, 4, 3, padding="same", padding_mode="reflect"), 2, 3, 9)
_kind("conv-of-one-sequence", lambda: nn.Conv1d(3, 4, 3), 3, 9)
_kind(
    "conv-of-videos", lambda: nn.Conv3d(3, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), 2, 3, 2, 4, 5
)
_kind("conv2d-of-one-picture", lambda: nn.Conv2d(3, 4, 3), 3, 6, 6)
_kind("embedding", lambda: nn.Embedding(7, 5), 2, 3)
_kind("embedding-padding", lambda: nn.Embedding(7, 5, padding_idx=0), 4, 6)
_kind("embedding-of-one-entry", lambda: nn.Embedding(7, 5))
_kind("embedding-frequencies", lambda: nn.Embedding(7, 5, scale_grad_by_freq=True), 9)

RANK, ALPHA = 4, 6


def _adapted(
    name: str, adalora: bool, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Any, Any, Tensor]:
    """A model of one layer with random factors, its unchanged copy, and an input."""
    torch.manual_seed(0)
    make_layer, make_input = LAYERS[name]
    model = nn.Sequential(make_layer()).to(dtype)
    base, x = copy.deepcopy(model), make_input()
    if adalora:
        # The paper's form, whose E trains, too.
        options = {"init_lora_weights": True, **options}
        config = rw.AdaLoraConfig(
            init_r=RANK, target_r=2, total_step=10, lora_alpha=ALPHA, target_modules=["0"], **options
        )
    else:
        config = rw.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], **options)
    rw.get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model, base, x.to(dtype) if x.is_floating_point() else x


def _delta(layer: AdapterLayer, adalora: bool) -> Tensor:
    """The update by its formula, (d_out, d_in)."""
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    if adalora:
        return ALPHA / (RANK + 1e-5) * B @ torch.diag(layer.lora_E["default"].flatten()) @ A
    return ALPHA / RANK * B @ A


def _moved_base(base: nn.Sequential, delta: Tensor) -> nn.Sequential:
    """The base layer with ``delta`` added to its weight."""
    moved = copy.deepcopy(base)
    weight = moved[0].weight
    turned = isinstance(moved[0], nn.Embedding) or type(moved[0]).__name__ == "Conv1D"
    weight.data += delta.T if turned else delta.reshape(weight.shape)
    return moved


def _mergeable(name: str, adalora: bool) -> bool:
    return adalora or name not in ("conv2d-groups", "conv2d-depthwise")


BOTH = [
    pytest.param(name, adalora, id=f"{'adalora' if adalora else 'lora'}-{name}")
    for name, adalora in itertools.product(LAYERS, (False, True))
]


@pytest.mark.parametrize(("name", "adalora"), BOTH)
def test_output_is_that_of_the_base_plus_the_update(name: str, adalora: bool) -> None:
    model, base, x = _adapted(name, adalora)
    if name == "linear-of-a-users-class":  # the adapter adds its part to the layer's own output
        expected = base(x) + x @ _delta(model[0], adalora).T
    elif _mergeable(name, adalora):
        expected = _moved_base(base, _delta(model[0], adalora))(x)
    else:
        expected = base(x) + _two_convolutions(model[0], x)
    torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=1e-10)
    if x.numel():
        assert (model(x) - base(x)).abs().max() > 1e-3


@pytest.mark.parametrize("adalora", [False, True])
def test_inputs_may_have_any_memory_layout(adalora: bool) -> None:
    model, base, _ = _adapted("linear", adalora)
    moved = _moved_base(base, _delta(model[0], adalora))
    x = torch.randn(6, 4, 3, 2, dtype=torch.float64)
    turned, cut = x.permute(3, 2, 1, 0), x.movedim(0, -1)[::2, :, 1:]
    for odd in (turned, turned[0], cut, x[:, 0, 0, 0].expand(5, 2, 6)):
        here, there = odd.clone().requires_grad_(), odd.detach().requires_grad_()
        torch.testing.assert_close(model(there), moved(here), atol=1e-10, rtol=1e-10)
        model(there).square().sum().backward()
        moved(here).square().sum().backward()
        torch.testing.assert_close(there.grad, here.grad, atol=1e-10, rtol=1e-10)


def _two_convolutions(layer: Any, x: Tensor) -> Tensor:
    """Plain LoRA of a grouped convolution: a dense convolution to r channels, then a grouped one with kernel size 1."""
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    A = A.reshape(RANK, layer.in_channels, *layer.kernel_size)
    hidden = F.conv2d(x, A, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
    return ALPHA / RANK * F.conv2d(hidden, B.reshape(*B.shape, 1, 1), groups=layer.groups)


@pytest.mark.parametrize(("name", "adalora"), BOTH)
def test_merging_gives_the_same_output_and_unmerging_the_old_weight(name: str, adalora: bool) -> None:
    model, base, x = _adapted(name, adalora)
    if not _mergeable(name, adalora):
        with pytest.raises(ValueError, match="groups="):
            model.merge_adapter()
        assert torch.equal(model[0].weight, base[0].weight)
        return
    if name == "linear-of-a-users-class":  # its forward pass would double a merged update, too
        with pytest.raises(ValueError, match="Doubled is a linear layer by its class"):
            model.merge_adapter()
        return
    before = model(x)
    torch.testing.assert_close(
        model[0].delta_weight("default"), model[0].shape_like_weight(_delta(model[0], adalora))
    )
    model.merge_adapter()
    torch.testing.assert_close(model(x), before, atol=1e-10, rtol=1e-10)
    merged = model[0].weight.clone()
    model.merge_adapter()
    assert torch.equal(model[0].weight, merged), "merging twice adds the update once"
    model.unmerge_adapter()
    torch.testing.assert_close(model[0].weight, base[0].weight, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(model(x), before, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("name", "adalora"), BOTH)
def test_gradients_are_the_derivatives(name: str, adalora: bool) -> None:
    model, _, x = _adapted(name, adalora)
    if not x.numel():
        return
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert {key.split(".")[1] for key in trained} == {"lora_A", "lora_B"} | ({"lora_E"} if adalora else set())
    inputs = tuple(p.detach().clone().requires_grad_() for p in trained.values())
    if x.is_floating_point():
        inputs += (x.clone().requires_grad_(),)

    def call(*values: Tensor) -> Tensor:
        named = dict(zip(trained, values, strict=False))
        return torch.func.functional_call(model, named, (values[-1] if x.is_floating_point() else x,))

    # The gradients of these kinds deliberately differ from the derivatives.
    if name not in ("embedding-padding", "embedding-frequencies"):
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("adalora", [False, True])
def test_function_transforms_work(adalora: bool) -> None:
    """Per-sample gradients and forward-mode derivatives, as in torch.func."""
    model, _, x = _adapted("linear", adalora)
    trained = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (sample,)).square().sum()

    torch.testing.assert_close(torch.func.vmap(model)(x), model(x))
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, x)
    loss(trained, x)
    model(x).square().sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(per_sample[key].sum(0), parameter.grad)
    zero = model(torch.zeros_like(x))
    torch.testing.assert_close(torch.func.jvp(model, (x,), (x,))[1], model(x) - zero, msg="it is linear")


@pytest.mark.parametrize("adalora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_layer_computes_the_same_for_inputs_of_other_sizes(
    dtype: torch.dtype, adalora: bool
) -> None:
    model, _, x = _adapted("linear", adalora)
    model, x = model.to(dtype).eval(), x.detach().to(dtype)
    model(x)
    traced = torch.jit.trace(model, (x,))  # it traces twice, and compares
    for other in (torch.randn(7, 6).to(dtype), torch.randn(2, 3, 6).to(dtype)):
        torch.testing.assert_close(
            traced(other), model(other), atol=1e-2 if dtype == torch.bfloat16 else 1e-6, rtol=2e-2
        )


@pytest.mark.parametrize("adalora", [False, True])
def test_padding_entries_of_an_embedding_get_no_gradient(adalora: bool) -> None:
    model, _, x = _adapted("embedding-padding", adalora)
    model(x).square().sum().backward()
    gradient = model[0].lora_A["default"].grad
    assert (x == 0).any() and not gradient[:, 0].any() and gradient[:, 1:].any()


@pytest.mark.parametrize("frozen", ["input", "everything"])
@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "embedding"])
def test_no_graph_is_made_for_frozen_parameters(name: str, frozen: str) -> None:
    model, _, x = _adapted(name, adalora=True)
    if frozen == "everything":
        model.requires_grad_(False)
        assert not model(x).requires_grad
        return
    model(x).sum().backward()
    assert model[0].weight.grad is None and x.grad is None
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["lora", "adalora"])
@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d-groups", "embedding"])
def test_a_fresh_adapter_changes_nothing(name: str, kind: str) -> None:
    torch.manual_seed(0)
    make_layer, make_input = LAYERS[name]
    model, x = nn.Sequential(make_layer()), make_input()
    expected = model(x)
    options: dict[str, Any] = {"target_modules": ["0"], "lora_dropout": 0.3}
    if kind == "lora":
        rw.get_peft_model(model, rw.LoraConfig(r=4, **options))
    else:
        rw.get_peft_model(model, rw.AdaLoraConfig(init_r=4, target_r=2, total_step=9, **options))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "conv2d-groups", "embedding"])
def test_a_layer_at_rank_0_is_its_base_layer(name: str) -> None:
    model, base, x = _adapted(name, adalora=True, dtype=torch.float32)
    model[0].kept["default"] = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(model(x), base(x))
    assert model(x).requires_grad is False or name == "never", "nothing is saved for a backward pass"
    model.merge_adapter()
    assert torch.equal(model[0].weight, base[0].weight)
    assert torch.equal(model.merge_and_unload()(x), base(x))


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "conv2d-groups", "embedding"])
def test_only_the_kept_triplets_act_once_ranks_are_fixed(name: str) -> None:
    model, base, x = _adapted(name, adalora=True)
    layer = model[0]
    layer.kept["default"] = torch.tensor([1, 3])
    with torch.no_grad():
        E = layer.lora_E["default"].clone()
        masked = copy.deepcopy(layer.lora_E["default"])
        masked[[0, 2]] = 0
        output = model(x)
        layer.lora_E["default"].copy_(masked)
        expected = _moved_base(base, _delta(layer, True))(x)
        layer.lora_E["default"].copy_(E)
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=1e-10)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=1e-10)


# Dropout.


@pytest.mark.parametrize("adalora", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d"])
def test_dropout_acts_on_the_adapters_input_and_only_in_training(name: str, adalora: bool) -> None:
    model, base, x = _adapted(name, adalora, lora_dropout=0.5)
    model.eval()
    still = model(x)
    assert torch.equal(model(x), still)
    torch.testing.assert_close(still, _moved_base(base, _delta(model[0], adalora))(x), atol=1e-10, rtol=1e-10)
    model.train()
    torch.manual_seed(7)
    dropped = model(x)
    assert not torch.allclose(dropped, still)
    torch.manual_seed(7)
    thinned = F.dropout(x, 0.5)
    moved = _moved_base(base, _delta(model[0], adalora))
    torch.testing.assert_close(dropped, base(x) + moved(thinned) - base(thinned), atol=1e-10, rtol=1e-10)


def test_dropout_keeps_the_output_on_average() -> None:
    model, _, x = _adapted("linear", adalora=False, lora_dropout=0.3)
    still = model.eval()(x)
    with torch.no_grad():
        mean = model.train()(x.expand(20_000, *x.shape)).mean(0)
    torch.testing.assert_close(mean, still, atol=0.2, rtol=0.05)


# Precision.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("adalora", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "embedding"])
def test_adapters_of_half_precision_layers_are_float32_and_outputs_half(
    name: str, adalora: bool, dtype: torch.dtype
) -> None:
    model, base, x = _adapted(name, adalora, dtype)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert model[0].weight.dtype == dtype
    output = model(x)
    assert output.dtype == dtype
    exact = _moved_base(base.double(), _delta(model[0], adalora).double())
    expected = exact(x.double() if x.is_floating_point() else x)
    step = torch.finfo(dtype).eps
    assert (output.double() - expected).abs().max() < 4 * step * expected.abs().max()
    output.float().square().mean().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad
    )
    model.merge_adapter()
    assert model[0].weight.dtype == dtype
    assert (model(x).double() - expected).abs().max() < 8 * step * expected.abs().max()


@pytest.mark.parametrize("adalora", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "conv2d-groups", "embedding"])
def test_autocast_computes_the_adapter_in_half_precision(name: str, adalora: bool) -> None:
    model, base, x = _adapted(name, adalora, torch.float32)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        output, usual = model(x), base(x)
    assert output.dtype == usual.dtype
    assert (output.float() - exact).abs().max() < 0.05 * exact.abs().max()
    output.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)


def test_autocast_over_a_half_precision_base() -> None:
    model, base, x = _adapted("linear", adalora=True, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x.float())
    assert output.dtype == torch.bfloat16
    expected = _moved_base(base.float(), _delta(model[0], True))(x.float())
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()


# Merging.


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_safe_merge_refuses_values_that_are_not_finite(bad: float) -> None:
    model, base, x = _adapted("linear", adalora=True)
    model[0].lora_B["default"].data[0, 0] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model[0].weight, base[0].weight)
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(model[0].weight, base[0].weight) and isinstance(model, rw.PeftModel)


def test_a_weight_that_is_computed_is_not_merged_into() -> None:
    """weight_norm computes the weight again in every call, so that a merged update would be lost silently."""
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    model: Any = nn.Sequential(OrderedDict(plain=nn.Linear(4, 4), normed=normed))
    rw.get_peft_model(model, rw.LoraConfig(r=2, target_modules=["plain", "normed"], init_lora_weights=False))
    x = torch.randn(2, 4)
    before, weight = model(x), model.plain.weight.clone()
    with pytest.raises(ValueError, match="'normed'.*computed"):
        model.merge_and_unload()
    assert torch.equal(model.plain.weight, weight)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "embedding"])
def test_unloading_leaves_no_trace(name: str) -> None:
    model, base, x = _adapted(name, adalora=True)
    model(x)
    assert model.unload() is model
    assert type(model[0]) is type(base[0]) and type(model) is type(base)
    assert vars(model[0]).keys() == vars(base[0]).keys()
    assert model[0]._modules.keys() == base[0]._modules.keys()
    assert model.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(model(x), base(x))


# Several adapters on one layer.


def test_active_adapters_add_up() -> None:
    model, base, x = _adapted("linear", adalora=False)
    model.add_adapter(
        "other", rw.LoraConfig(r=3, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
    )
    delta = _delta(model[0], False)
    other = model[0].lora_B["other"] @ model[0].lora_A["other"]
    for names, update in (("default", delta), ("other", other), (["default", "other"], delta + other)):
        model.set_adapter(names)
        expected = _moved_base(base, update)(x)
        torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=1e-10)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=1e-10)
        model.unmerge_adapter()


# Layers that can't be adapted.


def test_a_rank_that_groups_do_not_divide_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    with pytest.raises(ValueError, match="groups=2.*r=3"):
        rw.get_peft_model(model, rw.LoraConfig(r=3, target_modules=["0"]))
    assert type(model) is nn.Sequential and type(model[0]) is nn.Conv2d


def test_layers_keep_their_kind_and_names() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make_layer, _ in LAYERS.values():
            layer = make_layer()
            kind, keys = type(layer), set(layer.state_dict())
            model = nn.Sequential(layer)
            rw.get_peft_model(model, rw.LoraConfig(r=4, target_modules=["0"]))
            assert model[0] is layer and isinstance(layer, kind) and type(layer).__name__ == kind.__name__
            assert keys < set(layer.state_dict())
