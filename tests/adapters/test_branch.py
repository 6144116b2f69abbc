"""The adapter's branch of a linear layer: dtypes, costs, saved memory, and the triplets that it computes."""

from __future__ import annotations

import copy
import functools
import gc
import io
import weakref
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from costs import Operations, saved_for_backward
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import rankwise as rw
from rankwise.adapters import branch
from rankwise.adapters.linear import reference
from tiny import llama, token_batches

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {"hidden_size": 64, "intermediate_size": 128}
LAYERS = 2 * len(TARGETS)
IDS = token_batches(1, size=4, length=64)[0]["input_ids"]
PRECISIONS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "float32, autocast": (torch.float32, True),
    "bfloat16, autocast": (torch.bfloat16, True),
}


FORMS = [
    rw.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False),
    rw.AdaLoraConfig(
        init_r=4, target_r=2, total_step=100, tfinal=10, target_modules=["0"], init_lora_weights=True
    ),
]


# --- costs ---------------------------------------------------------------------------------------------------------


def step(model: Any, autocast: bool) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()


def cost(model: Any, autocast: bool) -> tuple[int, int]:
    """The operations of a step, and the bytes that it saves for its backward pass, without parameters."""
    step(model, autocast)  # the first pass prepares what later passes reuse
    model.zero_grad()
    with saved_for_backward(model) as saved:
        step(model, autocast)
    model.zero_grad()
    with Operations() as operations:
        step(model, autocast)
    return operations.count, saved.bytes


def frozen(model: Any) -> Any:
    model.requires_grad_(False).enable_input_require_grads()
    return model


def lora(model: Any) -> Any:
    return rw.get_peft_model(model, rw.LoraConfig(r=8, target_modules=TARGETS))


def pruning(model: Any, **form: Any) -> Any:
    fields = {
        "init_r": 12,
        "target_r": 8,
        "total_step": 100,
        "tinit": 1,
        "tfinal": 10,
        "orth_reg_weight": 0.0,
    }
    return rw.get_peft_model(model, rw.AdaLoraConfig(**fields, target_modules=TARGETS, **form))


def final(model: Any, **form: Any) -> Any:
    """All layers have had triplets pruned: the last ones are off."""
    model = pruning(model, **form)
    for module in model.modules():
        if hasattr(module, "lora_E"):
            module.lora_A["default"].data[8:] = 0
            module.lora_B["default"].data[:, 8:] = 0
            module.kept["default"] = 8
    return model


@pytest.mark.parametrize("precision", PRECISIONS)
def test_operations_and_saved_bytes_of_a_step_stay_within_bounds(precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    made = {
        each: cost(each(llama(**SIZES).to(dtype)).train(), autocast)
        for each in (frozen, lora, pruning, final)
    }
    operations = {each: (count - made[frozen][0]) / LAYERS for each, (count, _) in made.items()}
    saved = {each: size - made[frozen][1] for each, (_, size) in made.items()}
    most = {"float32": 6.5, "float32, autocast": 6.5}.get(precision, 7.0)
    assert max(operations.values()) <= most
    assert operations[final] <= operations[pruning] and operations[lora] <= operations[pruning]
    assert saved[final] <= saved[pruning]
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        llama(**SIZES).to(dtype), peft.LoraConfig(r=8, target_modules=TARGETS)
    ).train()
    count, size = cost(theirs, autocast)
    assert operations[final] <= (count - made[frozen][0]) / LAYERS - (1.5 if precision == "float32" else 4)
    if precision == "bfloat16":  # a float32 copy of each input is not needed
        assert made[lora][1] <= 0.66 * size
    else:
        assert made[lora][1] <= size


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_papers_form_stays_within_bounds_though_its_gates_train(precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    floor, _ = cost(frozen(llama(**SIZES).to(dtype)), autocast)
    for phase in (pruning, final):
        count, _ = cost(phase(llama(**SIZES).to(dtype), init_lora_weights=True).train(), autocast)
        assert (count - floor) / LAYERS <= (8 if precision == "float32" else 10)


def test_layers_with_the_same_input_save_it_once_and_layers_at_rank_0_nothing() -> None:
    layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
    rw.get_peft_model(
        layers,
        rw.AdaLoraConfig(init_r=2, target_r=1, total_step=100, tfinal=10, target_modules=["0", "1", "2"]),
    )
    x, saved = torch.randn(500, 64, requires_grad=True), set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() >= x.numel():
            saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    def run() -> int:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            made = [layer(x) for layer in layers]
        return len(saved) if made[0].requires_grad else -1

    assert run() == 1
    for layer in layers:
        layer.kept["default"] = 0
    assert run() == 0


class Steps(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes each cast of a tensor of this many numbers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.casts = size, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.casts += "_to_copy" in str(function) and args[0].numel() == self.size
        return function(*args, **(kwargs or {}))


def three(x: Tensor) -> tuple[nn.ModuleList, Any]:
    """Three layers that read one input, as q, k and v do, and a model that calls them."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(x.shape[-1], 8) for _ in range(3))
            self.between: Any = lambda x: x

        def forward(self, x: Tensor) -> Tensor:
            made = self.layers[0](x) + self.layers[1](x)
            return made + self.layers[2](self.between(x))

    torch.manual_seed(2)
    model = rw.get_peft_model(
        Three(), rw.LoraConfig(r=2, target_modules=["0", "1", "2"], init_lora_weights=False)
    )
    return model.layers, model


@pytest.mark.parametrize("evaluates", [False, True])
def test_under_autocast_layers_with_the_same_input_cast_it_once_for_themselves_and_their_adapters(
    evaluates: bool,
) -> None:
    x = torch.randn(7, 33)
    _, model = three(x)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.set_grad_enabled(not evaluates),
        Steps(x.numel()) as steps,
    ):
        model(x)
    assert steps.casts == 1


def test_under_autocast_an_input_that_changes_between_two_layers_is_read_as_it_is_then() -> None:
    x = torch.randn(7, 33)
    layers, model = three(x)
    model.between = lambda x: x.mul_(-1)
    before = x.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = model(x)
        expected = layers[0](before) + layers[1](before) + layers[2](-before)
    torch.testing.assert_close(made, expected, rtol=0.02, atol=0.05)


def test_under_autocast_an_input_that_is_detached_between_two_layers_gets_the_gradient_of_the_second() -> (
    None
):
    x = torch.randn(7, 33)
    layers, model = three(x)
    model.between = lambda x: x.detach_().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = x.requires_grad_() * 1
        model(hidden).sum().backward()
        alone = x.detach().clone().requires_grad_()
        layers[2](alone).sum().backward()
    torch.testing.assert_close(hidden.grad, alone.grad, rtol=0, atol=0)


def test_under_autocast_training_and_evaluation_compute_the_same() -> None:
    x = torch.randn(7, 33)
    _, model = three(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = model(x.requires_grad_())
        with torch.no_grad():
            torch.testing.assert_close(model(x), trained, rtol=0, atol=0)
        with torch.inference_mode():
            torch.testing.assert_close(model(x.clone()), trained, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_autocast_checkpointed_layers_give_the_same_gradients(reentrant: bool) -> None:
    x = torch.randn(7, 33)
    layers, model = three(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(model, x)
        forward = layers[1].forward
        layers[1].forward = lambda x: checkpoint(forward, x, use_reentrant=reentrant)
        made = gradients(model, x)
    assert (made[1] - expected[1]).norm() < 0.02 * expected[
        1
    ].norm()  # the shares in it are added in another order
    del made[1], expected[1]
    torch.testing.assert_close(made, expected, rtol=0, atol=0)


# --- results -------------------------------------------------------------------------------------------------------


class Own(nn.Linear):
    """A user's layer. It is not computed in one autograd step with its adapter, but before and after it."""


KINDS = pytest.mark.parametrize("kind", [nn.Linear, Own], ids=["one step", "two steps"])


def layer_of(dtype: torch.dtype = torch.float64, kind: type[nn.Linear] = nn.Linear, **fields: Any) -> Any:
    """A linear layer with an adapter of the paper's form with random factors."""
    torch.manual_seed(0)
    model = nn.Sequential(kind(6, 5)).to(dtype)
    config = rw.AdaLoraConfig(
        init_r=4,
        target_r=2,
        total_step=100,
        tfinal=10,
        init_lora_weights=True,
        target_modules=["0"],
        **fields,
    )
    rw.get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


def gradients(model: Any, x: Tensor, compute: Any = None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    output = (compute or model)(x)
    (output.float() if output.dtype != torch.float64 else output).square().sum().backward()
    made = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    model.zero_grad()
    return [output.detach(), *made]


@KINDS
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_output_gradients_and_second_derivatives_are_those_of_the_reference(
    kind: type[nn.Linear], gated: bool, rate: float
) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(kind(6, 5)).double()
    config: Any = rw.LoraConfig(r=3, target_modules=["0"], lora_dropout=rate, init_lora_weights=False)
    if gated:
        model = layer_of(kind=kind, lora_dropout=rate)
    else:
        rw.get_peft_model(model, config)
    layer, x = model[0], torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    if rate:  # the reference has none
        model.eval()
    held = [layer.factor(key, "default") for key in ("lora_A", "lora_E", "lora_B")]
    factors = [each for each in held if each is not None]

    def composed(x: Tensor) -> Tensor:
        return reference(x, layer.weight, layer.bias, *held, layer.scaling["default"])

    made, expected = model(x), composed(x)
    torch.testing.assert_close(made, expected)
    direction = torch.randn_like(made)
    found = []
    for output in (made, expected):
        first = torch.autograd.grad((output * direction).tanh().sum(), [x, *factors], create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in first), [x, *factors])
        found.append([*first, *second])
    torch.testing.assert_close(*found)


SLICES = pytest.mark.parametrize("least", [0, branch._WORTH_CUTTING], ids=["sliced", "whole"])


@SLICES
@KINDS
@pytest.mark.parametrize("kept", [1, 3, torch.tensor([1, 3])], ids=["first", "most", "some"])
@pytest.mark.parametrize("trains", [True, False], ids=["gates train", "gates are frozen"])
def test_only_the_kept_triplets_act_and_the_others_get_gradients_of_zero(
    kept: Any, trains: bool, kind: type[nn.Linear], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branch, "_WORTH_CUTTING", least)
    model = layer_of(kind=kind)
    layer, x = model[0], torch.randn(7, 6, dtype=torch.float64)
    E = layer.lora_E["default"].requires_grad_(trains)
    closed = torch.ones(4, dtype=torch.bool)
    closed[slice(kept) if isinstance(kept, int) else kept] = False
    if not trains:
        E.data[closed] = 0  # as closing gates leaves them; gates that train may have moved since
    layer.kept["default"] = kept
    A, B = layer.lora_A["default"], layer.lora_B["default"]

    def composed(x: Tensor) -> Tensor:
        gates = E * (~closed)[:, None]
        return layer.base_forward(x) + layer.scaling["default"] * x @ (B @ (gates * A)).T

    torch.testing.assert_close(gradients(model, x), gradients(model, x, composed))
    model(x).sum().backward()
    assert not A.grad[closed].any() and not B.grad[:, closed].any() and A.grad[~closed].all()
    with torch.no_grad():
        torch.testing.assert_close(model(x), composed(x))


@pytest.mark.parametrize(("width", "slices"), [(16, 0), (1024, 4)], ids=["narrow", "wide"])
def test_only_wide_layers_slice_the_factors_in_the_final_phase(
    width: int, slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two slices for the output, and two for the input's gradient. In narrow layers they cost more than they save."""
    model = rw.get_peft_model(
        nn.Sequential(nn.Linear(width, width)), rw.LoraConfig(r=12, target_modules=["0"])
    )
    model[0].kept["default"] = 8
    taken, narrow = [], Tensor.narrow
    monkeypatch.setattr(Tensor, "narrow", lambda *args: taken.append(args) or narrow(*args))
    model(torch.randn(256, width, requires_grad=True)).sum().backward()
    assert len(taken) == slices


@KINDS
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_is_as_near_to_the_exact_gradients_as_half_precision_is(
    dtype: torch.dtype, autocast: bool, kind: type[nn.Linear]
) -> None:
    model, x = layer_of(dtype, kind), torch.randn(50, 6).to(dtype)
    exact = gradients(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        made = gradients(model, x)
    assert [each.dtype for each in made[2:]] == [torch.float32] * 3
    for one, other in zip(made, exact, strict=True):
        assert (one - other).norm() < (0.02 if dtype == torch.bfloat16 or autocast else 1e-5) * other.norm()


TURNED = {  # dtype, rank, tokens, whether the products with few columns are turned
    "float32": (torch.float32, 8, 512, True),
    "few tokens": (torch.float32, 8, 16, False),
    "rank 1": (torch.float32, 1, 512, False),
    "rank 16": (torch.float32, 16, 512, False),
    "bfloat16": (torch.bfloat16, 8, 512, False),
}


@KINDS
@pytest.mark.parametrize(("dtype", "rank", "tokens", "turned"), TURNED.values(), ids=TURNED.keys())
def test_products_with_few_columns_are_turned_where_that_saves_time_and_B_gets_its_gradient_in_its_layout(
    dtype: torch.dtype,
    rank: int,
    tokens: int,
    turned: bool,
    kind: type[nn.Linear],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The results differ only by rounding. One operation of a layer is added, the copy into B's layout."""
    monkeypatch.setattr(branch, "_HAS_MKL", True)
    torch.manual_seed(0)
    model = rw.get_peft_model(
        nn.Sequential(kind(64, 48)).to(dtype),
        rw.LoraConfig(r=rank, target_modules=["0"], init_lora_weights=False),
    )
    x, arrived = torch.randn(2, tokens // 2, 64).to(dtype), []
    B = model[0].lora_B["default"]
    B.register_hook(lambda gradient: arrived.append(gradient.is_contiguous()))

    def made() -> tuple[list[Tensor], Operations]:
        with Operations() as operations:
            found = gradients(model, x)
        return found, operations

    found, operations = made()
    model(x).float().sum().backward()
    assert B.grad.is_contiguous() and B.grad.dtype == torch.float32 and all(arrived)
    model.zero_grad()
    monkeypatch.setattr(branch, "_FEW_COLUMNS", range(0))
    expected, before = made()
    assert operations.count - before.count == turned
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-4 * float(expected[1].abs().max())} if turned else {"rtol": 0, "atol": 0}
    )
    torch.testing.assert_close(found, expected, **tolerance)


def test_computing_in_float32_is_asked_for_by_name_and_nearer_to_exact(tmp_path: Any) -> None:
    base, x = nn.Sequential(nn.Linear(64, 64)).bfloat16(), torch.randn(50, 64).bfloat16()
    config = rw.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    torch.manual_seed(3)
    model = rw.get_peft_model(base, config, adapter_compute_dtype=torch.float32)
    own = model[0].lora_A["default"], model[0].lora_B["default"]
    exact = own[1].double() @ own[0].double()
    exact = x.double() @ exact.T * model[0].scaling["default"] + model[0].base_forward(x).double()
    near = (model(x).double() - exact).norm()
    model.save_pretrained(tmp_path)
    for dtype in (None, torch.float32):
        loaded = rw.PeftModel.from_pretrained(
            nn.Sequential(_plain(base)), tmp_path, adapter_compute_dtype=dtype
        )
        assert torch.equal(loaded(x), model(x)) == (dtype is not None)
        assert dtype is not None or near <= (loaded(x).double() - exact).norm()
    with pytest.raises(TypeError, match="adapter_compute_dtype.*torch.int8"):
        rw.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config, adapter_compute_dtype=torch.int8)


def _plain(model: Any) -> nn.Linear:
    plain = nn.Linear(64, 64).bfloat16()
    plain.weight.data, plain.bias.data = model[0].weight.data.clone(), model[0].bias.data.clone()
    return plain


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_checkpointing_with_dropout_gives_the_same_gradients(dtype: torch.dtype, reentrant: bool) -> None:
    model, x = layer_of(dtype, lora_dropout=0.4).train(), torch.randn(20, 6).to(dtype)
    torch.manual_seed(7)
    straight = gradients(model, x)
    torch.manual_seed(7)
    again = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    torch.testing.assert_close(straight, again, rtol=0, atol=0)


@pytest.mark.parametrize("kept", ["mm", "_to_copy", ""], ids=["products", "casts", "everything"])
@pytest.mark.parametrize("adapted", ["own", "speed_up"])
def test_selective_checkpointing_may_keep_what_any_operation_makes(adapted: str, kept: str) -> None:
    def policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saves = kept in str(operation)
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(33, 33) for _ in range(3))
            self.checkpointed = False

        def inner(self, x: Tensor) -> Tensor:
            return self.q(x).tanh() * self.k(x) + self.v(x)

        def forward(self, x: Tensor) -> Tensor:
            if not self.checkpointed:
                return self.inner(x)
            contexts = functools.partial(create_selective_checkpoint_contexts, policy)
            made: Tensor = checkpoint(self.inner, x, use_reentrant=False, context_fn=contexts)
            return made

    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 7, 33)
    library: Any = rw if adapted == "own" else peft
    config = library.LoraConfig(r=2, target_modules=["q", "k", "v"], init_lora_weights=False)
    model = library.get_peft_model(nn.Sequential(block), config)
    if adapted == "speed_up":
        rw.speed_up(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients(model, x)
        expected = gradients(model, x)
        block.checkpointed = True
        made = gradients(model, x)
    for one, other in zip(made, expected, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("kept", ["", "copy"], ids=["everything", "copies"])
@pytest.mark.parametrize("form", [0, 1], ids=["plain", "gates"])
def test_selective_checkpointing_of_a_whole_model_gives_the_same_gradients(form: int, kept: str) -> None:
    """Its two passes need the same operations, whatever the model's last pass has used."""

    def policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saves = kept in str(operation)
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).bfloat16()
    model = rw.get_peft_model(layers, replace(FORMS[form], target_modules=["0", "1"]))
    x, contexts = (
        torch.randn(9, 6).bfloat16(),
        functools.partial(create_selective_checkpoint_contexts, policy),
    )
    for layer in model:
        nn.init.normal_(layer.lora_B["default"])
    for _ in range(2):  # nothing is prepared for the first pass
        made = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts))
        torch.testing.assert_close(made, gradients(model, x), rtol=0, atol=0)


def test_dropout_saves_only_its_input_and_its_mask() -> None:
    model, x = layer_of(torch.float32, lora_dropout=0.4).train(), torch.randn(500, 6, requires_grad=True)
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() == x.numel():
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    assert sorted(tensor.element_size() for tensor in saved.values()) == [1, 4]


@KINDS
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)], ids=str)
def test_a_batch_without_tokens_gives_gradients_of_zero(
    shape: tuple[int, ...], kind: type[nn.Linear]
) -> None:
    output, *made = gradients(layer_of(kind=kind), torch.randn(shape, dtype=torch.float64))
    assert output.shape == (*shape[:-1], 5)
    assert not any(each.any() for each in made) and [each.shape for each in made] == [
        shape,
        (4, 6),
        (5, 4),
        (4, 1),
    ]


@KINDS
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)], ids=str)
def test_the_next_layer_may_change_the_output_in_place(shape: tuple[int, ...], kind: type[nn.Linear]) -> None:
    model, x = layer_of(kind=kind), torch.randn(shape, dtype=torch.float64)
    expected = gradients(model, x, lambda x: model(x).relu())
    torch.testing.assert_close(gradients(model, x, lambda x: model(x).relu_()), expected)


@KINDS
def test_a_weight_that_is_exchanged_after_the_forward_pass_is_not_in_its_backward_pass(
    kind: type[nn.Linear],
) -> None:
    """A weight may be replaced by ``model.half()``, or by tools that swap layers out of a GPU's memory."""
    model, x = layer_of(kind=kind), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    output = model(x)
    model[0].weight.data = torch.zeros(5, 6)
    (made,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(made, expected)


def test_a_factor_is_asked_for_in_a_way_that_tools_can_answer() -> None:
    """DeepSpeed ZeRO-3 replaces modules' dictionaries by ones that fetch a parameter when it is read."""
    asked = []

    class Bringing(dict):  # type: ignore[type-arg]
        def __getitem__(self, name: str) -> Any:
            asked.append(name)
            return super().__getitem__(name)

    model = layer_of()
    factors = (model[0].lora_A, model[0].lora_E, model[0].lora_B)
    for held in factors:
        held._parameters = Bringing(held._parameters)
    model(torch.randn(3, 6, dtype=torch.float64))
    assert len(asked) >= len(factors)
    asked.clear()
    assert model[0].acts("default") and asked == ["default"]


class Shared(nn.Linear):
    """A user's layer that returns a tensor which it also keeps, so that nobody may write into it."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x + super().forward(x)
        return self.seen


def test_the_output_of_a_users_layer_is_not_written_into() -> None:
    model = nn.Sequential(Shared(6, 6)).double()
    rw.get_peft_model(model, rw.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    layer, x = model[0], torch.randn(4, 6, dtype=torch.float64)
    update = layer.delta_weight("default").detach()
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            output = model(x)
            torch.testing.assert_close(output - layer.seen, x @ update.T)

    def composed(x: Tensor) -> Tensor:
        delta = layer.scaling["default"] * layer.lora_B["default"] @ layer.lora_A["default"]
        return x + nn.functional.linear(x, layer.weight + delta, layer.bias)

    torch.testing.assert_close(gradients(model, x), gradients(model, x, composed))


# --- factors that are prepared once per pass -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fused", "data", "part"])
def test_a_changed_factor_acts_at_once_however_it_was_changed(how: str) -> None:
    """Neither a fused optimizer nor ``.data`` increments a parameter's version."""
    model, x = layer_of(torch.bfloat16), torch.randn(50, 6).bfloat16()
    for _ in range(2):
        before = gradients(model, x)[0]
    if how == "fused":
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.5, fused=True)
        model(x).square().sum().backward()
        optimizer.step()
    else:
        model[0].lora_B["default"].data.mul_(-1)
    after = model[0](x) if how == "part" else model(x)
    A, B, E = (model[0].adapter_parameters("default")[key] for key in ("lora_A", "lora_B", "lora_E"))
    exact = model[0].base_forward(x) + model[0].scaling["default"] * x.float() @ (B @ (E * A)).T
    torch.testing.assert_close(after.float(), exact, atol=0.3, rtol=0.05)
    assert (after - before).norm() > 0.1 * before.norm()


@pytest.mark.parametrize("form", FORMS, ids=["plain", "gates"])
def test_factors_that_a_hook_exchanges_when_the_pass_has_begun_act_at_once(form: Any) -> None:
    """Accelerate's hooks move a model to the GPU there, and its parameters stay the same objects."""
    torch.manual_seed(0)
    model, x = (
        rw.get_peft_model(nn.Sequential(nn.Linear(6, 5)).bfloat16(), form),
        torch.randn(50, 6).bfloat16(),
    )
    for factor in model[0].adapter_parameters("default").values():
        nn.init.normal_(factor)
    before = [model(x) for _ in range(2)][0]
    B = model[0].lora_B["default"]
    other = -B.detach()
    model.register_forward_pre_hook(lambda *_: setattr(B, "data", other))
    torch.testing.assert_close(before + model(x), 2 * model[0].base_forward(x), atol=0.3, rtol=0.05)


@pytest.mark.parametrize("first", FORMS, ids=["plain", "gates"])
@pytest.mark.parametrize("second", FORMS, ids=["plain", "gates"])
def test_a_model_may_lose_its_adapters_and_get_others_between_two_passes(first: Any, second: Any) -> None:
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).bfloat16(), torch.randn(3, 6).bfloat16()
    base = model(x)
    for form, targets in ((first, ["0", "1"]), (second, ["1"]), (first, ["1"])):
        model = rw.get_peft_model(model, replace(form, target_modules=targets))
        for _ in range(2):
            model(x)
        model = model.unload()
    assert torch.equal(model(x), base)


def test_the_memory_of_factors_is_free_after_unloading() -> None:
    model = layer_of(torch.bfloat16)
    model(torch.randn(3, 6).bfloat16())
    B = weakref.ref(model[0].lora_B["default"])
    base = model.unload()
    gc.collect()
    assert B() is None and type(base[0]) is nn.Linear


def test_the_memory_of_factors_is_free_after_their_adapter_is_deleted() -> None:
    model = layer_of(torch.bfloat16)
    model.add_adapter("other", rw.LoraConfig(r=2, target_modules=["0"]))
    model.set_adapter("other")
    for _ in range(2):
        model(torch.randn(3, 6).bfloat16())
    B = weakref.ref(model[0].lora_B["other"])
    model.delete_adapter("other")
    gc.collect()
    assert B() is None


def test_the_memory_of_a_model_is_free_though_a_hook_of_its_layer_holds_it() -> None:
    model = layer_of(torch.bfloat16)
    model[0].register_forward_hook(lambda *_, model=model: None)
    for _ in range(2):
        model(torch.randn(3, 6).bfloat16())
    held = weakref.ref(model)
    del model
    gc.collect()
    assert held() is None


def test_copies_and_pickles_of_a_model_do_not_hold_what_its_last_pass_used() -> None:
    model, x = layer_of(torch.bfloat16), torch.randn(3, 6).bfloat16()
    expected = [model(x) for _ in range(2)][0]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert not other._rankwise_last_pass
        torch.testing.assert_close(other(x), expected)
        model[0].lora_B["default"].data.neg_()
        torch.testing.assert_close(other(x), expected)
        model[0].lora_B["default"].data.neg_()


def test_a_factor_that_two_adapters_of_a_layer_share_acts_with_the_gates_of_each() -> None:
    config = replace(FORMS[1], inference_mode=True)
    model, x = (
        rw.get_peft_model(nn.Sequential(nn.Linear(6, 6)).bfloat16(), config),
        torch.randn(3, 6).bfloat16(),
    )
    model.add_adapter("other", config)
    layer = model[0]
    nn.init.normal_(layer.lora_B["default"])
    layer.lora_A["other"], layer.lora_B["other"] = layer.lora_A["default"], layer.lora_B["default"]
    nn.init.constant_(layer.lora_E["default"], 1.0)
    nn.init.constant_(layer.lora_E["other"], -2.0)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        alone = layer(x)  # without a pass of the whole model, the layer prepares its own factors
        for _ in range(2):
            assert torch.equal(model(x), alone)


def test_gates_that_a_layer_gets_between_two_passes_act_at_once() -> None:
    model, x = (
        rw.get_peft_model(nn.Sequential(nn.Linear(6, 6)).bfloat16(), FORMS[0]),
        torch.randn(3, 6).bfloat16(),
    )
    for _ in range(2):
        plain = model(x)
    model[0].lora_E["default"] = nn.Parameter(torch.full((4, 1), -3.0))
    alone = model[0](x)
    assert not torch.equal(alone, plain)
    for _ in range(2):
        assert torch.equal(model(x), alone)


def test_a_factor_that_two_layers_share_acts_with_the_gates_of_each() -> None:
    config = rw.AdaLoraConfig(
        init_r=4, target_r=2, total_step=100, tfinal=10, target_modules=["0", "1"], init_lora_weights=True
    )
    model = rw.get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).bfloat16(), config)
    x = torch.randn(3, 6).bfloat16()
    for n, layer in enumerate(model):
        nn.init.normal_(layer.lora_B["default"])
        nn.init.constant_(layer.lora_E["default"], n + 1.0)
    model[1].lora_A["default"] = model[0].lora_A["default"]
    alone = model[1](model[0](x))  # without a pass of the whole model, each layer prepares its own factors
    for _ in range(3):
        assert torch.equal(model(x), alone)


def test_a_failed_pass_leaves_nothing_behind() -> None:
    from rankwise.adapters import ready

    model, x = layer_of(torch.bfloat16), torch.randn(3, 6).bfloat16()
    model(x)
    with pytest.raises(RuntimeError):
        model(x[:, :2])
    assert ready._now.current is None


def test_adapters_may_change_between_two_passes() -> None:
    model, x = layer_of(torch.bfloat16), torch.randn(3, 6).bfloat16()
    base = model[0].base_forward(x)
    alone = model(x)
    model.add_adapter("other", rw.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.set_adapter(["default", "other"])
    both = model(x)
    model.set_adapter("other")
    torch.testing.assert_close(both - alone, model(x) - base, atol=0.1, rtol=0.1)
    model.delete_adapter("default")
    torch.testing.assert_close(both - alone, model(x) - base, atol=0.1, rtol=0.1)
    assert torch.equal(model.unload()(x), base)
