"""The mathematics against float64: values, every gradient, the norm, and what is kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dora_core.adapters.functional import adapted_linear, effective_weight_, gain, row_norm

NAMES = ("x", "bias", "lora_A", "lora_B", "magnitude")


def make(seed: int, tokens: int, inner: int, out: int, rank: int, dtype: torch.dtype = torch.float64) -> dict:
    """Return x, W, bias in ``dtype`` and A, B, m in fp32 or wider; the update is as large as the weight."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = 0.1 * draw(out, inner)
    return {
        "x": draw(tokens, inner).to(dtype),
        "weight": weight.to(dtype),
        "bias": draw(out).to(dtype),
        "lora_A": draw(rank, inner).to(wide) if rank else None,
        "lora_B": (0.1 * draw(out, rank) / max(1, rank) ** 0.5).to(wide) if rank else None,
        "magnitude": (weight.norm(dim=1) * (1 + 0.3 * draw(out))).to(wide),
    }


def widen(tensors: dict) -> dict:
    return {name: None if t is None else t.detach().double() for name, t in tensors.items()}


def definition(t: dict, scale: float, dropped: Tensor | None, update: bool, full: bool) -> Tensor:
    """Eq. 5 in row form as the paper writes it, for autograd to differentiate: eq. 6 if ``full``, else eq. 11."""
    low_rank = scale * t["lora_B"] @ t["lora_A"] if t["lora_A"] is not None else torch.zeros_like(t["weight"])
    direction = t["weight"] + low_rank
    if t["magnitude"] is None:
        g = torch.ones(len(direction), 1, dtype=direction.dtype)
    else:
        norm = direction.norm(dim=1)
        g = (t["magnitude"] / (norm if full else norm.detach()))[:, None]
    low_input = t["x"] if dropped is None else dropped
    if update:
        y = t["x"] @ t["weight"].T + low_input @ (g * direction - t["weight"]).T
    else:
        y = t["x"] @ (g * t["weight"]).T + low_input @ (g * low_rank).T
    return y if t["bias"] is None else y + t["bias"]


def run_both(t: dict, scale: float, mask: Tensor | None, update: bool, full: bool) -> tuple[dict, dict]:
    """Return output and gradients of the fast form in its types, and of the definition in float64."""
    results = []
    for tensors, fast in ((t, True), (widen(t), False)):
        leaves = {k: v if v is None or k == "weight" else v.detach().requires_grad_() for k, v in tensors.items()}
        dropped = None if mask is None else leaves["x"] * mask.to(leaves["x"].dtype)
        if fast:
            norm = None
            if leaves["magnitude"] is not None:
                norm = row_norm(leaves["weight"], leaves["lora_A"], leaves["lora_B"], scale)
            y = adapted_linear(
                **leaves, norm=norm, scale=scale, dropped=dropped, update_dropout=update, full_norm_gradient=full
            )
        else:
            y = definition(leaves, scale, dropped, update and mask is not None, full)
        weights = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).to(t["x"].dtype)
        y.backward(weights.to(y.dtype))
        results.append({"y": y.detach()} | {n: leaves[n].grad for n in NAMES if leaves[n] is not None})
    return results[0], results[1]


def worst_error(fast: dict, exact: dict) -> float:
    """The largest error of any result, relative to that result's largest element or 0.1 (some cancel to zero)."""
    errors = []
    for name, value in exact.items():
        if value is None:
            assert fast[name] is None or not fast[name].any(), name
            continue
        errors.append(float((fast[name].double() - value).abs().max() / value.abs().max().clamp_min(0.1)))
    return max(errors)


CASES = {
    "seed": st.integers(0, 10_000),
    "tokens": st.integers(1, 9),
    "inner": st.integers(1, 17),
    "out": st.integers(1, 13),
    "rank": st.integers(1, 8),
    "dora": st.booleans(),
    "bias": st.booleans(),
    "full": st.booleans(),
    "dropout": st.sampled_from([None, "lowrank", "update"]),
    "scale": st.sampled_from([0.25, 1.0, 2.0]),
}


def generated(case: dict, dtype: torch.dtype) -> tuple[dict, dict]:
    t = make(case["seed"], case["tokens"], case["inner"], case["out"], case["rank"], dtype)
    if not case["dora"]:
        t["magnitude"] = None
    if not case["bias"]:
        t["bias"] = None
    mask = None
    if case["dropout"]:
        keep = torch.rand(t["x"].shape, generator=torch.Generator().manual_seed(case["seed"])) < 0.75
        mask = keep.double() * 2  # a power of two: no rounding of its own
    return run_both(t, case["scale"], mask, case["dropout"] == "update", case["full"] and case["dora"])


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(**CASES)
def test_values_and_every_gradient_equal_autograd_of_the_definition_in_float64(**case: object) -> None:
    fast, exact = generated(case, torch.float64)
    assert worst_error(fast, exact) < 1e-11


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1.6e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)])
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(**CASES | {"tokens": st.integers(4, 9), "inner": st.integers(4, 17), "out": st.integers(4, 13)})
def test_narrow_types_stay_within_a_stated_bound_of_float64(dtype: torch.dtype, bound: float, **case: object) -> None:
    fast, exact = generated(case, dtype)
    assert worst_error(fast, exact) < bound


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_a_layer_of_magnitude_alone_equals_its_definition(update: bool, full: bool) -> None:
    t = make(3, 5, 7, 6, 0)
    mask = torch.tensor([2.0, 0.0, 2.0, 2.0, 0.0, 2.0, 0.0], dtype=torch.float64)
    fast, exact = run_both(t, 0.0, mask, update, full)
    assert worst_error(fast, exact) < 1e-12


def test_a_frozen_tensor_gets_no_gradient_and_changes_no_other() -> None:
    t = make(4, 5, 7, 6, 3)
    norm = row_norm(t["weight"], t["lora_A"], t["lora_B"], 2.0)
    want, _ = run_both(t, 2.0, None, False, False)
    for name in NAMES:
        leaves = {k: v.detach().clone().requires_grad_(k == name) for k, v in t.items()}
        adapted_linear(**leaves, norm=norm, scale=2.0).backward(
            torch.cos(torch.arange(30, dtype=torch.float64)).reshape(5, 6)
        )
        assert torch.equal(leaves[name].grad, want[name])
        assert all(leaf.grad is None for k, leaf in leaves.items() if k != name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_nearly_cancelling_update_is_right_to_1e_4(dtype: torch.dtype) -> None:
    # Full rank: s B A = -0.999 W, so V = 1e-3 W.
    weight = make(5, 1, 48, 48, 1, dtype)["weight"]
    lora_A, lora_B = torch.eye(48), -0.999 * weight.float() / 2
    exact = (weight.double() + 2 * lora_B.double() @ lora_A.double()).norm(dim=1)
    assert float((exact / weight.double().norm(dim=1)).max()) < 1.01e-3
    norm = row_norm(weight, lora_A, lora_B, 2.0)
    assert norm.dtype == torch.float32
    assert float(((norm.double() - exact) / exact).abs().max()) < 1e-4


@pytest.mark.parametrize("shape", [(1, 5), (2, 3), (5, 1), (7, 1), (64, 64), (129, 33)])
def test_the_norm_is_right_over_shapes_and_ranks(shape: tuple[int, int]) -> None:
    for rank in (0, 1, 4):
        t = make(6, 1, shape[1], shape[0], rank, torch.float32)
        wide = widen(t)
        low = 0 if not rank else 0.5 * wide["lora_B"] @ wide["lora_A"]
        exact = (wide["weight"] + low).norm(dim=1)
        norm = row_norm(t["weight"], t["lora_A"], t["lora_B"], 0.5)
        torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)


class LargestWideTensor(TorchDispatchMode):
    """Records the elements of the largest fp32 or fp64 tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.dtype in (torch.float32, torch.float64):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [0, 4])
def test_norm_and_merge_make_no_dense_temporary(dtype: torch.dtype, rank: int) -> None:
    t = make(7, 1, 64, 96, rank, dtype)
    parts = (t["weight"].clone(), t["lora_A"], t["lora_B"])
    dense = t["weight"].numel()
    with LargestWideTensor() as mode:
        row_norm(*parts, 1.0)
        norm_size = mode.largest
        if dtype != torch.float32:  # an fp32 weight is itself dense
            effective_weight_(*parts, t["magnitude"], 1.0)
    assert 0 < norm_size <= dense // 4
    assert mode.largest <= dense // 4


def test_the_gain_of_a_row_without_a_norm_is_one() -> None:
    norm = torch.tensor([0.0, 1e-40, 2.0])
    assert gain(torch.tensor([5.0, 1e-40, 1.0]), norm).tolist() == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_effective_weight_is_rounded_once(dtype: torch.dtype) -> None:
    t = make(8, 1, 24, 36, 4, dtype)
    wide = widen(t)
    direction = wide["weight"] + 0.5 * wide["lora_B"] @ wide["lora_A"]
    exact = wide["magnitude"][:, None] * direction / direction.norm(dim=1, keepdim=True)
    got = effective_weight_(t["weight"].clone(), t["lora_A"], t["lora_B"], t["magnitude"], 0.5)
    unit = torch.finfo(dtype).eps * (0.51 if dtype == torch.bfloat16 else 8)
    assert float(((got.double() - exact).abs() / exact.abs().clamp_min(1e-2)).max()) < unit
    plain = effective_weight_(t["weight"].clone(), t["lora_A"], t["lora_B"], None, 0.5)
    assert float(((plain.double() - direction).abs() / direction.abs().clamp_min(1e-2)).max()) < unit


def test_the_empty_batch_has_an_output_and_gradients() -> None:
    t = make(9, 0, 5, 4, 2)
    fast, _ = run_both(t, 1.0, None, False, True)
    assert fast["y"].shape == (0, 4)
    assert not fast["lora_B"].any() and not fast["magnitude"].any()


@pytest.mark.parametrize("dropout", [None, "lowrank", "update"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_most_one_output_sized_tensor_and_nothing_weight_sized_is_kept(
    dropout: str | None, full: bool, dtype: torch.dtype
) -> None:
    tokens, inner, out, rank = 11, 24, 36, 3
    t = make(10, tokens, inner, out, rank, dtype)
    leaves = {k: v.requires_grad_(k != "weight") for k, v in t.items()}
    known = {leaf.data_ptr() for leaf in leaves.values()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            kept.append(tensor)
        return tensor

    dropped = F.dropout(leaves["x"], 0.5) if dropout else None
    norm = row_norm(t["weight"].detach(), t["lora_A"].detach(), t["lora_B"].detach(), 1.0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = adapted_linear(
            **leaves, norm=norm, dropped=dropped, update_dropout=dropout == "update", full_norm_gradient=full
        )
    assert not [value for value in vars(y.grad_fn).values() if isinstance(value, Tensor)]  # nothing past the hooks
    y.sum().backward()
    assert all(tensor.numel() < out * inner for tensor in kept)
    outputs = [tensor for tensor in kept if tensor.numel() == tokens * out]
    assert len(outputs) == 1 and outputs[0].dtype == dtype
    inputs = [tensor for tensor in kept if tensor.numel() == tokens * inner]
    assert len(inputs) == (1 if dropout else 0)


@pytest.mark.parametrize("with_magnitude", [False, True])
def test_lora_and_a_frozen_magnitude_keep_no_output_sized_tensor(with_magnitude: bool) -> None:
    tokens, inner, out = 11, 24, 36
    t = make(11, tokens, inner, out, 3, torch.float32)
    leaves = {k: v.requires_grad_(k in ("x", "lora_A", "lora_B")) for k, v in t.items()}
    norm = row_norm(t["weight"], t["lora_A"].detach(), t["lora_B"].detach(), 1.0) if with_magnitude else None
    leaves["magnitude"] = leaves["magnitude"] if with_magnitude else None
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapted_linear(**leaves, norm=norm)
    assert sizes and tokens * out not in sizes
