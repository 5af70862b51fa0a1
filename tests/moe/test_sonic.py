"""SonicMoE as the experts' back end.

The package needs a GPU of its own kind, so `stand_in` is what its source says `moe_general_routing_inputs` does, written as a loop: these tests hold
what we hand over to that reading, and can't tell whether the reading is right. The last test can, where there is such a GPU and the package."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor

from moetrain.config import ConfigError
from moetrain.moe import sonic
from moetrain.moe.experts import GroupedExperts
from moetrain.train import Trainer
from tests.moe.test_layer import ROUTERS, model_config, pair
from tests.moe.test_room import assert_equal, inputs, results
from tests.test_train import data, make_config  # noqa: F401  (data is a fixture)

SWIGLU = "swiglu"


def stand_in(
    x: Tensor, router_scores: Tensor, token_indices: Tensor, expert_indices: Tensor, w1: Tensor, b1: None, w2: Tensor, b2: None, E: int,
    stream_id: int, activation_type: str, is_inference_mode_enabled: bool = False, concat_layout: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x: (T, H). One score, token and expert per route, by ascending token. w1: (2 I, H, E), gate before up with concat_layout; w2: (H, I, E); in
    memory E outermost and the second innermost. -> (T, H), and the routes of each expert."""
    assert b1 is None and b2 is None and activation_type == SWIGLU and concat_layout and isinstance(stream_id, int)
    assert token_indices.dtype == expert_indices.dtype == torch.int32
    assert router_scores.shape == token_indices.shape == expert_indices.shape and (token_indices.diff() >= 0).all()
    assert x.is_contiguous() and w1.permute(2, 0, 1).is_contiguous() and w2.permute(2, 0, 1).is_contiguous()
    assert w1.shape == (2 * w2.shape[1], x.shape[1], E) and w2.shape[2] == E
    assert is_inference_mode_enabled != torch.is_grad_enabled()
    rows = [torch.zeros_like(x[0]) for _ in x]
    for score, token, expert in zip(router_scores, token_indices.tolist(), expert_indices.tolist()):
        gate, up = (w1[:, :, expert] @ x[token]).chunk(2)
        rows[token] = rows[token] + score * (w2[:, :, expert] @ (torch.nn.functional.silu(gate) * up))
    return torch.stack(rows), torch.bincount(expert_indices, minlength=E).int()


@pytest.fixture
def package(monkeypatch):
    monkeypatch.setattr(sonic, "_package", lambda: (stand_in, SWIGLU))


@pytest.mark.parametrize("name", ["exact", "sampled", "off", "topk", "top1", "remoe", "base_layers"])
def test_the_layer_is_the_same(name, package):
    """Outputs, losses and every gradient, those of probes included, against our own products in float64; tokens and experts without routes."""
    layer = pair(model_config(ROUTERS[name], num_experts=7))[0]
    expected, _ = results(layer, *inputs(torch.float64))
    layer.experts.backend = sonic.compute
    found, _ = results(layer, *inputs(torch.float64))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    layer.eval()
    (x, _, context), outputs = inputs(torch.float64), []
    for layer.experts.backend in (None, sonic.compute):
        with torch.no_grad():
            outputs.append(layer(x, context, x)[0])
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)


def test_without_a_route(package):
    """Kernels are not called for nothing; probes are computed all the same."""
    layer = pair(model_config(ROUTERS["exact"]), scale=0.1, shift=-9.0)[0]
    x, grad, context = inputs(torch.float64)
    x[:, 0] = 1.0
    expected, stats = results(layer, x, grad, context)
    assert stats["load"].sum() == 0 < stats["probes"]
    layer.experts.backend = sonic.compute
    assert_equal(results(layer, x, grad, context)[0], expected)


def test_weights_are_handed_over_as_they_lie(package, monkeypatch):
    """No copy of the experts' matrices."""
    seen = []
    monkeypatch.setattr(sonic, "_package", lambda: (lambda *a, **k: (seen.append((a[4].data_ptr(), a[6].data_ptr())), stand_in(*a, **k))[1], SWIGLU))
    layer = pair(model_config(ROUTERS["topk"]))[0]
    layer.experts.backend = sonic.compute
    x, _, context = inputs(torch.float64)
    layer(x, context, x)
    assert seen == [(layer.experts.gate_up.data_ptr(), layer.experts.down.data_ptr())]


# -------------------------------------------------------------------------------------------------------------- what is missing


def test_without_a_gpu(data, tmp_path):  # noqa: F811
    config = make_config(
        data, "exact", (1, 1, 1), run_dir=str(tmp_path), train__dtype="bfloat16", train__experts_backend="sonicmoe", model__moe__expert_dim=8
    )
    with pytest.raises(ConfigError, match=r"^train.experts_backend .sonicmoe. needs a CUDA device, and the experts are on cpu; or set") as error:
        Trainer(config, console=False)
    assert "\n" not in str(error.value)


def _on(capability: tuple[int, int], monkeypatch) -> str | None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return sonic.missing(torch.device("cuda"))


def test_what_is_missing_is_named(monkeypatch):
    assert _on((8, 0), monkeypatch) == "compute capability 9.x or 10.x, and this device has 8.0"

    def absent():
        raise ModuleNotFoundError("No module named 'sonicmoe'")

    monkeypatch.setattr(sonic, "_package", absent)
    found = _on((9, 0), monkeypatch)
    assert found is not None and "the package sonic-moe" in found and "(pip install 'moetrain[sonicmoe]'): No module named 'sonicmoe'" in found
    monkeypatch.setattr(sonic.sys, "version_info", (3, 11, 7))
    found = _on((10, 0), monkeypatch)
    assert found is not None and "which wants Python 3.12 or later, and this is 3.11" in found
    monkeypatch.setattr(sonic, "_package", lambda: (lambda x, router_scores: None, SWIGLU))
    assert _on((9, 0), monkeypatch) == "a newer sonic-moe, with concat_layout (pip install -U sonic-moe)"
    monkeypatch.setattr(sonic, "_package", lambda: (stand_in, SWIGLU))
    assert _on((10, 3), monkeypatch) is None


def test_where_the_package_keeps_it(monkeypatch):
    """The two names that are asked of it."""
    functions, enums = types.ModuleType("sonicmoe.functional"), types.ModuleType("sonicmoe.enums")
    functions.moe_general_routing_inputs, enums.ActivationType = stand_in, types.SimpleNamespace(SWIGLU=SWIGLU)
    for module in (types.ModuleType("sonicmoe"), functions, enums):
        monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    assert sonic._package.__wrapped__() == (stand_in, SWIGLU)


def test_the_trainer_sets_it(package, data, tmp_path, monkeypatch):  # noqa: F811
    """Every group of experts, and the start says so."""
    monkeypatch.setattr(sonic, "missing", lambda device: None)
    config = make_config(
        data, "exact", (1, 1, 1), run_dir=str(tmp_path), train__dtype="bfloat16", train__experts_backend="sonicmoe", model__moe__expert_dim=8
    )
    trainer = Trainer(config, console=False)
    assert "experts: SonicMoE" in trainer.describe()
    groups = [m for m in trainer.model.modules() if isinstance(m, GroupedExperts)]
    assert len(groups) == 2 and all(m.backend is sonic.compute for m in groups)
    trainer.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or sonic.missing(torch.device("cuda")) is not None, reason="needs sonic-moe and a GPU for it")
@pytest.mark.parametrize("name", ["exact", "off", "topk", "top1"])
def test_the_real_package(name):
    """bfloat16 on the GPU, with both back ends, against float64 on the CPU."""
    config = model_config(ROUTERS[name], num_experts=8, hidden=128, expert_dim=64)
    layer = pair(config, scale=0.1)[0]
    for parameter in layer.parameters():
        parameter.data = parameter.data.bfloat16().double()
    x, grad, context = (t.bfloat16().double() if isinstance(t, Tensor) else t for t in inputs(torch.float64, dim=128, tokens=96))
    expected, _ = results(layer, x, grad, context)
    layer = layer.to("cuda", torch.bfloat16)
    _, _, context = inputs(torch.bfloat16, dim=128, tokens=96, device="cuda")
    for backend in (None, sonic.compute):
        layer.experts.backend = backend
        found, _ = results(layer, x.to("cuda", torch.bfloat16), grad.to("cuda", torch.bfloat16), context)
        for a, b in zip(found, expected, strict=True):
            assert (a.cpu().double() - b).abs().max() <= 0.03 * b.abs().max()
