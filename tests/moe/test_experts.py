"""The two ways to compute the experts on the CPU, the fused block and the loop of matrix products, give the same layer."""

from __future__ import annotations

import pytest
import torch

from moetrain import ops
from moetrain.moe.dispatch import LocalDispatcher
from moetrain.moe.experts import GroupedExperts
from moetrain.moe.routing import Decision, Routing


def results(dtype: torch.dtype, requires: tuple[bool, bool] = (True, True)) -> list[torch.Tensor | None]:
    """Output and gradients of x, both matrices, the routes' and the probes' weights. Expert 2 has nothing, token 0 no route."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 40, generator=generator).to(dtype).requires_grad_(requires[0])
    experts = GroupedExperts(5, 40, 24)
    for parameter in experts.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.2).to(dtype)
        parameter.requires_grad_(requires[1])
    drawn = torch.rand(90, 5, generator=generator)
    drawn[:, 2] = 2
    drawn[0] = 0.7
    probes = ((drawn > 0.5) & (drawn < 0.9)).float() * 1.5
    weights = torch.rand(90, 5, generator=generator).to(ops.acc_dtype(dtype)).requires_grad_()
    dispatcher = LocalDispatcher()
    work, plan = dispatcher.dispatch(x, Routing(Decision(drawn < 0.4, probes.to(weights.dtype)), weights))
    y = dispatcher.combine(experts(work), plan)
    y.backward(torch.randn(90, 40, generator=generator).to(dtype))
    return [y.detach(), x.grad, experts.gate_up.grad, experts.down.grad, weights.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("requires", [(True, True), (False, True), (True, False)])
def test_fused_block_equals_loop(dtype: torch.dtype, requires: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    if not ops.has_experts(torch.device("cpu"), dtype):
        pytest.skip("no brgemm in this torch or for this processor")
    fused = results(dtype, requires)
    monkeypatch.setattr(ops, "has_experts", lambda device, dtype: False)
    loop = results(dtype, requires)
    exact = results(torch.float64, requires)
    for a, b, e in zip(fused, loop, exact):
        assert (a is None) == (b is None) == (e is None)
        if a is not None:
            assert a.dtype == b.dtype
            scale = e.norm()
            # The data differ by their rounding to the dtype from the float64 case.
            assert (a.double() - e).norm() / scale < (1e-5 if dtype == torch.float32 else 2e-2)
            assert (a.double() - b.double()).norm() / scale < (1e-5 if dtype == torch.float32 else 1e-2)
    assert (fused[0][0] == 0).all(), "a token without a route has output 0"
