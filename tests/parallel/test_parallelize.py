"""Where parameters lie, how whole tensors get into them, and that half precision keeps what must stay exact. (That N ranks compute what one
rank computes is tests/test_train.py.)"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moetrain.build import build_model
from moetrain.config import check_world
from moetrain.parallel.grads import gradient_norm, scale_gradients
from moetrain.parallel.mesh import build_meshes
from moetrain.parallel.parallelize import copy_whole, wholes
from moetrain.train import Trainer
from tests.distributed import run
from tests.test_train import make_config, write_data


def layout_of(layout: tuple[int, int, int], folder) -> dict[str, str]:
    config = make_config(folder, "exact", layout)
    model = build_model(config, torch.device("cpu"), build_meshes(check_world(config, dist.get_world_size()), torch.device("cpu")))
    assert all(torch.isfinite(w).all() for _, w in wholes(model.named_parameters()))
    return {n: f"{tuple(p.to_local().shape)} {[str(x) for x in p.placements]}" for n, p in model.named_parameters() if isinstance(p, DTensor)}


def test_experts_lie_on_their_own_axes(tmp_path):
    """8 experts of (12, 8) and (8, 6): by expert over ep, by dim 1 over dp_shard; dense parameters by dim 0 over both together."""
    found = run(layout_of, 4, (1, 2, 2), tmp_path)[0]
    assert found["layers.0.ffn.experts.gate_up"].startswith("(4, 6, 8)") and found["layers.0.ffn.experts.down"].startswith("(4, 4, 6)")
    assert found["layers.0.attn.q_proj.weight"] == "(2, 8) ['S(0)']" and found["layers.0.ffn.router.weight"] == "(2, 8) ['S(0)']"
    found = run(layout_of, 4, (1, 1, 4), tmp_path)[0]
    assert found["layers.1.ffn.experts.down"] == "(2, 8, 6) ['S(0)']"
    found = run(layout_of, 4, (2, 2, 1), tmp_path)[0]
    assert found["layers.1.ffn.experts.down"] == "(8, 4, 6) ['R', 'S(1)']" and found["embed.weight"] == "(25, 8) ['R', 'S(0)']"


def filled() -> bool:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    whole = torch.arange(7 * 6, dtype=torch.float64).view(7, 6)
    for placements in ([Shard(0), Shard(1)], [Shard(1), Shard(0)], [Shard(0), Shard(0)]):
        ours, theirs = distribute_tensor(torch.zeros(7, 6, dtype=torch.float64), mesh, placements), distribute_tensor(whole, mesh, placements)
        copy_whole(ours, whole)
        assert torch.equal(ours.to_local(), theirs.to_local()), placements
        assert torch.equal(next(wholes(iter([("x", ours)])))[1], whole)
    with pytest.raises(ValueError, match=r"\(3, 6\) given, \(7, 6\) wanted"):
        copy_whole(ours, torch.zeros(3, 6))
    return True


def test_whole_tensors_go_to_their_places():
    """Against torch's own distribution, also where 7 rows are split unevenly, and twice."""
    assert all(run(filled, 4))


def norms() -> tuple[float, float]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    generator = torch.Generator().manual_seed(0)
    parameters, squares = [], 0.0
    laid: list = [([Shard(0), Shard(1)], (7, 6), None), ([Shard(0)], (5,), "a"), ([Shard(1)], (4, 8), "b"), (None, (3, 3), None)]
    laid += [([Replicate(), Shard(0)], (6, 2), None)]  # a replica counts once
    for placements, shape, sub in laid:
        whole = torch.randn(shape, dtype=torch.float64, generator=generator)
        squares += whole.square().sum().item()
        p = torch.nn.Parameter(whole.clone() if placements is None else distribute_tensor(whole, mesh if sub is None else mesh[sub], placements))
        p.grad = p.detach().clone()
        parameters.append(p)
    norm = gradient_norm(parameters)
    scale_gradients(parameters, torch.tensor(0.5))
    assert gradient_norm(parameters).item() == pytest.approx(norm.item() / 2, rel=1e-12)
    return norm.item(), squares**0.5


def test_one_norm_over_all_meshes():
    for got, want in run(norms, 4):
        assert got == pytest.approx(want, rel=1e-12)


def half(config) -> tuple[list[float], str, str]:
    trainer = Trainer(config, console=False)
    losses, seen = [], {}
    trainer.model.layers[0].ffn.router.register_forward_pre_hook(lambda m, _: seen.update(router=str(m.weight.dtype)))
    trainer.model.layers[0].attn.q_proj.register_forward_pre_hook(lambda m, _: seen.update(dense=str(m.weight.dtype)))
    with trainer._batches(trainer.dataset, config.train.global_batch_size, prefetch=0) as batches:
        for _ in range(4):
            losses.append(trainer.train_step(next(batches))["loss"])
    assert all(p.dtype == torch.float32 for p in trainer.parameters.values())
    trainer.close()
    return losses, seen["router"], seen["dense"]


def test_half_precision_on_many_ranks(tmp_path):
    """bfloat16: losses of 4 ranks within its rounding of those of 1 rank; the router is gathered in float32, dense weights in bfloat16."""
    for name in ("a", "b"):
        write_data(tmp_path / name)
    options = {"train__dtype": "bfloat16", "train__steps": 4}
    one = half(make_config(tmp_path, "sampled", run_dir=str(tmp_path / "one"), **options))
    four = run(half, 4, make_config(tmp_path, "sampled", (1, 2, 2), run_dir=str(tmp_path / "four"), **options))[0]
    assert four[0] == pytest.approx(one[0], rel=1e-2)
    assert one[1:] == ("torch.float32", "torch.float32") and four[1:] == ("torch.float32", "torch.bfloat16")
