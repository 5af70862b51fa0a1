"""N ranks compute what one rank computes: loss, every gradient, gradient norm and weights after three AdamW steps, against the loop reference
on one process, in float64, for every layout; and again after save -> another layout -> load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moetrain.config import Config, ConfigError, ScheduleConfig, config_from_dict
from moetrain.data.dataset import IGNORE, BlendedDataset, Source
from moetrain.data.indexed import IndexedWriter
from moetrain.model import Transformer, init_weights
from moetrain.moe.losses import coefficients
from moetrain.moe.routing import StepCounts, TokenContext
from moetrain.parallel.parallelize import copy_whole, wholes
from moetrain.train import Trainer, learning_rate_factor
from tests.distributed import run
from tests.reference import ReferenceMoE

STEPS = 3
ROUTERS = {
    "exact": {"type": "sigmoid_ste"},
    "sampled": {"type": "sigmoid_ste", "ste": "sampled", "probe_rate": 0.3},
    "off": {"type": "sigmoid_ste", "ste": "off"},
    "topk": {"type": "topk", "top_k": 2, "z_coef": 1e-3},
    "switch": {"type": "topk", "top_k": 1, "normalize": False, "jitter": 0.1, "capacity_factor": 1.0, "balance_over": "sequence"},
    "gshard": {"type": "topk", "top_k": 2, "second": "random", "capacity_factor": 0.7, "balance_count": "first", "balance_over": "global_batch"},
    "llama_moe": {
        "type": "topk", "top_k": 3, "gate": "mlp", "noise": True, "output_scale": 8 / 3, "balance_coef": 0.0, "cv_coef": 0.5,
        "capacity_factor": 0.8, "drop": "random",
    },
    "deepseek": {
        "type": "topk", "top_k": 4, "score": "sigmoid", "output_scale": 2.5, "selection_bias": True, "bias_rate": 0.05, "num_groups": 4,
        "top_groups": 2, "balance_over": "sequence",
    },
    # Jitter, since equal tokens at the start of documents have equal scores, of which rounding would choose the larger.
    "cosine": {
        "type": "topk", "top_k": 2, "gate": "cosine", "jitter": 0.1, "capacity_factor": 0.6, "drop": "probability", "balance_over": "global_batch",
    },
}  # fmt: skip
# dp_replicate, dp_shard, ep
LAYOUTS = [(1, 1, 1), (1, 1, 2), (1, 1, 4), (1, 2, 1), (1, 2, 2), (2, 1, 2), (1, 2, 4), (2, 2, 1), (2, 1, 1)]


def write_data(prefix: Path, documents: int = 40, vocab: int = 50, seed: int = 0) -> None:
    generator = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            writer.add_document(generator.integers(0, vocab, generator.integers(3, 40)).astype(np.uint16))


def make_config(folder: Path, router: str = "exact", layout: tuple[int, int, int] = (1, 1, 1), **changes: Any) -> Config:
    world = layout[0] * layout[1] * layout[2]
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {
            "vocab_size": 50, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 16,
            "max_position_embeddings": 64, "init_std": 0.3,
            "moe": {"num_experts": 8, "expert_dim": 6, "router": {**ROUTERS[router], "init_std": 0.7}},
        },
        "data": {"seq_len": 12, "train": [{"name": "a", "path": str(folder / "a")}, {"name": "b", "path": str(folder / "b")}], "prefetch": 0},
        "parallel": {"dp_replicate": layout[0], "dp_shard": layout[1], "ep": layout[2]},
        "train": {
            "steps": STEPS, "global_batch_size": 16, "micro_batch_size": 8 // world, "lr": 1e-2, "router_lr": 2e-2, "expert_lr": 5e-3,
            "dtype": "float64", "grad_clip": 0.5, "schedule": {"warmup_steps": 2}, "seed": 3,
        },
        "log": {"every": 1000},
    }  # fmt: skip
    for key, value in changes.items():
        node = tree
        *path, last = key.split("__")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return config_from_dict(tree)


def reference(config: Config, how: str) -> dict[str, Any]:
    """Loss, gradients and norm of each step and the last weights, by the loop, on one process, without our trainer's code."""
    model_config, train = config.model, config.train
    model = Transformer(model_config).double()
    for i, block in enumerate(model.layers):
        block.ffn = ReferenceMoE(model_config, i).double()
    init_weights(model, train.seed)
    plant(model, how)
    dataset = BlendedDataset([Source(s.name, s.path) for s in config.data.train], config.data.seq_len, train.seed, vocab_size=50)
    names = dict(model.named_parameters())
    groups = []
    for name, p in names.items():
        decay = 0.0 if p.ndim < 2 or "router" in name else train.weight_decay
        lr = train.expert_lr if "experts" in name else train.router_lr if "router" in name else train.lr
        groups.append({"params": [p], "weight_decay": decay, "peak": lr})
    optimizer = torch.optim.AdamW(groups, betas=(train.beta1, train.beta2), eps=train.eps, foreach=False)
    found: dict[str, Any] = {"loss": [], "norm": [], "grads": []}
    for step in range(STEPS):
        samples = [dataset[step * train.global_batch_size + i] for i in range(train.global_batch_size)]
        labels = torch.from_numpy(np.stack([s.labels for s in samples]))
        count = (labels != IGNORE).sum().double()
        total = torch.zeros((), dtype=torch.float64)
        so_far, loads = StepCounts(), [torch.zeros(8, dtype=torch.float64) for _ in model.layers]
        for half in range(2):  # micro-batches of 8 samples over all ranks
            part = slice(half * 8, half * 8 + 8)
            keys = torch.stack([s.index * 12 + torch.arange(12) for s in samples[part]]) + train.seed * 0x632BE59BD9B4E019 % 2**62
            valid = (labels[part] != IGNORE).flatten()
            context = TokenContext(keys=keys.flatten(), valid=valid, num_tokens=count, sequence=12, counts=so_far)
            fields = {f: torch.from_numpy(np.stack([getattr(s, f) for s in samples[part]])) for f in ("tokens", "positions", "document_ids")}
            output = model(**fields, labels=labels[part], context=context)
            loss = output.loss_sum / count
            for load, report in zip(loads, output.reports):
                load += report.stats["load"]
                for name, (factor, *_) in coefficients(model_config, None).items():
                    loss = loss + factor * report.losses[name]
            loss.backward()
            total += loss.detach()
        for g in optimizer.param_groups:
            g["lr"] = g["peak"] * learning_rate_factor(step, train.steps, train.schedule)
        found["loss"].append(total.item())
        found["grads"].append({n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in names.items()})
        found["norm"].append(torch.nn.utils.clip_grad_norm_(names.values(), train.grad_clip).item())
        optimizer.step()
        optimizer.zero_grad()
        for block, load in zip(model.layers, loads):
            if getattr(block.ffn.router, "selection_bias", None) is not None:  # DeepSeek-V3: b += gamma sign(mean load - load)
                for e in range(8):
                    block.ffn.router.selection_bias.data[e] += 0.05 * (int(load[e] < load.mean()) - int(load[e] > load.mean()))
    found["weights"] = {n: p.detach().clone() for n, p in names.items()}
    return found


@torch.no_grad()
def plant(model: torch.nn.Module, how: str) -> None:
    """Start weights of the awkward cases: feature 0 of the residual stream large and positive, and routers that look at little else."""
    if how == "mixed":
        return
    for name, p in model.named_parameters():
        whole = next(wholes(iter([(name, p)])))[1].clone()
        if name == "embed.weight":
            whole[:, 0] = 3.0
        if name.endswith("router.weight"):
            whole[:, 0] = -5.0
            if how == "one expert":
                whole[5, 0] = 5.0
            if how == "one rank":
                whole[len(whole) // 2 :, 0] = 0.0
        copy_whole(p, whole)


def rank_main(config: Config, how: str, steps: int = STEPS, save: bool = False) -> dict[str, Any]:
    trainer = Trainer(config, console=False)
    if trainer.step == 0:
        plant(trainer.model, how)
    grads: list[dict[str, np.ndarray]] = []
    step = trainer.optimizer.step

    def note_then_step(*args: Any) -> None:
        # As the optimizer sees them, that is clipped.
        grads.append({n: g.numpy().copy() for n, g in wholes((n, p.grad) for n, p in trainer.parameters.items() if p.requires_grad)})
        step(*args)

    trainer.optimizer.step = note_then_step
    records = []
    with trainer._batches(trainer.dataset, config.train.global_batch_size, start_sample=trainer.consumed_samples, prefetch=0) as batches:
        while trainer.step < steps:
            records.append(trainer.train_step(next(batches)))
    if save:
        trainer.save(wait=True)
    weights = {n: w.numpy().copy() for n, w in wholes(iter(trainer.parameters.items()))}
    trainer.close()
    keep = not dist.is_initialized() or dist.get_rank() == 0
    return {"records": records, "grads": grads, "weights": weights} if keep else {}


def start(configs: list[Config], how: str, **options: Any) -> list[dict[str, Any]]:
    """The runs of several configs of one layout, one after the other in the same processes: starting processes is what takes time."""
    parallel = configs[0].parallel
    world = parallel.dp_replicate * parallel.dp_shard * parallel.ep
    return _spread(configs, how, options) if world == 1 else run(_spread, world, configs, how, options, timeout=120 + 20 * len(configs))[0]


def _spread(configs: list[Config], how: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    return [rank_main(config, how, **options) for config in configs]


def assert_same(got: dict[str, Any], want: dict[str, Any], clip: float, first: int = 0) -> None:
    tolerance = dict(rtol=1e-9, atol=1e-11)
    for i, record in enumerate(got["records"], first):
        np.testing.assert_allclose(record["loss"], want["loss"][i], rtol=1e-9, err_msg=f"loss of step {i}")
        np.testing.assert_allclose(record["grad_norm"], want["norm"][i], rtol=1e-9, err_msg=f"norm of step {i}")
        factor = min(1.0, clip / (want["norm"][i] + 1e-6))
        for name, grad in want["grads"][i].items():
            if name.endswith("selection_bias"):
                assert not grad.any() and name not in got["grads"][i - first]
                continue
            np.testing.assert_allclose(got["grads"][i - first][name], grad.numpy() * factor, **tolerance, err_msg=f"gradient of {name} in step {i}")
    for name, weight in want["weights"].items():
        np.testing.assert_allclose(got["weights"][name], weight.numpy(), **tolerance, err_msg=f"weight {name}")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder / "a", seed=1)
    write_data(folder / "b", documents=20, seed=2)
    return folder


_references: dict[tuple[str, str], dict[str, Any]] = {}


def wanted(config: Config, router: str, how: str) -> dict[str, Any]:
    if (router, how) not in _references:
        _references[router, how] = reference(config, how)
    return _references[router, how]


def layout_id(layout: tuple[int, int, int]) -> str:
    return "replicate{}-shard{}-ep{}".format(*layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_ranks_equal_one_rank(layout, data, tmp_path):
    # Messages and shared memory by turns.
    ways = [("collective", "peers")[i % 2] if layout[2] > 1 else "auto" for i in range(len(ROUTERS))]
    configs = [
        make_config(data, router, layout, run_dir=str(tmp_path / router), parallel__exchange=way) for router, way in zip(ROUTERS, ways)
    ]
    for router, config, got in zip(ROUTERS, configs, start(configs, "mixed")):
        assert_same(got, wanted(config, router, "mixed"), config.train.grad_clip)


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 1, 4), (1, 2, 2)], ids=layout_id)
@pytest.mark.parametrize("how", ["closed", "one expert", "one rank"])
def test_awkward_routes(how, layout, data, tmp_path):
    """Tokens without an expert, experts without a token, ranks without a token, all tokens on one expert."""
    routers = ["exact", "sampled", "off"]
    configs = [make_config(data, router, layout, run_dir=str(tmp_path / router)) for router in routers]
    for router, config, got in zip(routers, configs, start(configs, how)):
        assert_same(got, wanted(config, router, how), config.train.grad_clip)
        moe = got["records"][0]["moe"]
        if how == "closed":
            assert moe["empty"][0] == 1.0 and moe["dead"][0] == 8
        if how == "one expert":
            assert moe["dead"][0] == 7 and moe["active"][0] == 1.0
        if how == "one rank":
            assert moe["dead"][0] >= 4 and moe["active"][0] > 0


def test_awkward_choices(data, tmp_path):
    """First choices of all tokens are one expert, which drops most of them; ranks without a route."""
    routers = ["switch", "gshard", "llama_moe", "deepseek"]
    configs = [make_config(data, router, (1, 1, 4), run_dir=str(tmp_path / router)) for router in routers]
    for router, config, got in zip(routers, configs, start(configs, "one expert")):
        assert_same(got, wanted(config, router, "one expert"), config.train.grad_clip)
        dropped = got["records"][0]["moe"]["dropped"][0]
        assert dropped == 0 if router == "deepseek" else dropped > 0.5


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 2, 2)], ids=layout_id)
def test_checkpointed_blocks_replay_their_routes(layout, data, tmp_path):
    """Activation checkpointing changes no number."""
    routers = ["sampled", "topk", "gshard", "llama_moe", "deepseek"]
    configs = [make_config(data, r, layout, train__activation_checkpointing="block", run_dir=str(tmp_path / r)) for r in routers]
    for router, config, got in zip(routers, configs, start(configs, "mixed")):
        assert_same(got, wanted(config, router, "mixed"), config.train.grad_clip)


@pytest.mark.parametrize(("first", "second"), [((1, 1, 4), (1, 2, 1)), ((1, 2, 2), (1, 1, 1)), ((1, 1, 1), (2, 1, 2))])
def test_save_then_load_under_another_layout(first, second, data, tmp_path):
    """Two steps under one layout, the third under another, equal three steps under one."""
    routers = ["sampled", "topk", "gshard", "llama_moe", "deepseek"]
    start([make_config(data, r, first, run_dir=str(tmp_path / r)) for r in routers], "mixed", steps=2, save=True)
    configs = [make_config(data, r, second, run_dir=str(tmp_path / r)) for r in routers]
    for router, config, got in zip(routers, configs, start(configs, "mixed")):
        assert len(got["records"]) == 1
        assert_same(got, wanted(config, router, "mixed"), config.train.grad_clip, first=2)


def test_a_resumed_router_may_train_otherwise_but_not_compute_otherwise(data, tmp_path):
    """DeepSeek-V3 ends with a bias rate of 0: the bias goes on from the checkpoint and stands still. Other groups are another model."""

    def config(**changes: Any) -> Config:
        return make_config(data, "deepseek", run_dir=str(tmp_path / "run"), **changes)

    before = rank_main(config(), "mixed", steps=2, save=True)["weights"]
    with pytest.raises(ConfigError, match=r"another model: model.moe.router.top_groups: 2 there, 4 here"):
        Trainer(config(model__moe__router__top_groups=4), console=False)
    after = rank_main(config(model__moe__router__bias_rate=0.0), "mixed")["weights"]
    name = "layers.0.ffn.router.selection_bias"
    # Two steps of -0.05, 0 or 0.05 each.
    assert np.abs(before[name]).max() > 0.04 and np.array_equal(before[name], after[name])
    assert not np.array_equal(before["layers.0.ffn.router.weight"], after["layers.0.ffn.router.weight"])


def test_a_bad_step_is_skipped_on_all_ranks(data, tmp_path):
    """NaN on one rank in step 2: no rank updates, the step is counted, and training goes on as if it had not been."""
    config = make_config(data, "exact", (1, 1, 2), run_dir=str(tmp_path / "run"), train__steps=4)
    before, after, records = run(_with_nan, 2, config, [2])[0]
    assert [r["skipped"] for r in records] == [False, True, False, False]
    assert all(np.array_equal(before[n], after[n]) for n in before)
    assert all(np.isfinite(r["loss"]) for i, r in enumerate(records) if i != 1)


def test_bad_steps_in_a_row_end_the_run(data, tmp_path):
    config = make_config(data, "topk", (1, 1, 2), run_dir=str(tmp_path / "run"), train__steps=9, train__max_bad_steps=3)
    assert run(_until_stopped, 2, config) == ["step 5", "step 5"]


def _poison(trainer: Trainer, steps: list[int]) -> None:
    """On the last rank, the loss of these steps is NaN."""
    forward = trainer.model.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if trainer.step + 1 in steps and dist.get_rank() == 1:
            output.loss_sum = output.loss_sum * float("nan")
        return output

    trainer.model.forward = broken


def _with_nan(config: Config, steps: list[int]) -> Any:
    trainer = Trainer(config, console=False)
    _poison(trainer, steps)
    weights, records = [], []
    with trainer._batches(trainer.dataset, config.train.global_batch_size, prefetch=0) as batches:
        for _ in range(config.train.steps):
            records.append(trainer.train_step(next(batches)))
            weights.append({n: w.numpy().copy() for n, w in wholes(iter(trainer.parameters.items()))})
    assert trainer.skipped == 1 and trainer.updates == 3
    trainer.close()
    return weights[0], weights[1], records


def _until_stopped(config: Config) -> str:
    trainer = Trainer(config, console=False)
    _poison(trainer, [3, 4, 5, 6, 7])
    try:
        trainer.train()
    except RuntimeError as error:
        return str(error).partition(":")[0]
    finally:
        trainer.close()
    return "went on"


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_learning_rate(kind):
    """Warm-up reaches the peak in its last step; cosine and WSD end near their least value, and WSD is flat in between."""
    schedule = ScheduleConfig(type=kind, warmup_steps=10, min_lr_ratio=0.1, decay_steps=20 if kind == "wsd" else 0)
    rates = [learning_rate_factor(i, 100, schedule) for i in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and max(rates) == 1.0
    if kind == "constant":
        assert set(rates[9:]) == {1.0}
    if kind == "wsd":
        assert rates[79] == rates[80] == 1.0 and rates[90] == pytest.approx(0.55) and rates[99] == pytest.approx(0.145)
    if kind == "cosine":
        assert rates[55] == pytest.approx(0.55) and 0.1 < rates[99] < 0.101
