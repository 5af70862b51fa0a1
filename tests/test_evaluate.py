"""Evaluation: what many ranks and large batches say is what a plain loop over the file says."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moetrain.config import Config, ParallelConfig
from moetrain.data.dataset import IGNORE, EvalSet
from moetrain.data.kinds import KINDS, TokenKinds
from moetrain.data.tokenizer import ByteTokenizer
from moetrain.evaluate import cost, evaluate
from moetrain.model import Transformer, init_weights
from moetrain.moe.routing import TokenContext
from moetrain.train import Trainer
from tests.distributed import run
from tests.test_train import make_config, write_data


def on_ranks(config: Config, path: str, by_kind: bool = False) -> dict:
    trainer = Trainer(config, console=False)
    sets = {"held out": EvalSet("held out", path, config.data.seq_len)}
    result = evaluate(
        trainer.model, sets, batch_size=2, dtype=torch.float64, isolate_documents=True, device=trainer.device,
        group=dist.group.WORLD if dist.is_initialized() else None,
        kinds=TokenKinds(ByteTokenizer(), 50, trainer.device) if by_kind else None,
    )  # fmt: skip
    trainer.close()
    return result["held out"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("a", "b", "c")):
        write_data(folder / name, documents=7, seed=seed)
    return folder


def test_equals_a_plain_loop_on_any_number_of_ranks(data, tmp_path):
    """The last batch is not full on one rank and blank on others; no token is lost or counted twice."""
    config = make_config(data, "exact", run_dir=str(tmp_path / "one"))
    model = Transformer(config.model).double()
    init_weights(model, config.train.seed)
    model.eval()
    dataset = EvalSet("held out", data / "c", config.data.seq_len)
    total, tokens, routes = 0.0, 0, 0.0
    kinds, by_kind = TokenKinds(ByteTokenizer(), 50, torch.device("cpu")), {}
    decided: list[torch.Tensor] = []
    for layer in model.layers:
        layer.ffn.router.register_forward_hook(lambda _, inputs, routing: decided.append(routing.decision.active))
    for i in range(len(dataset)):
        sample = dataset[i]
        inputs = {k: torch.from_numpy(np.array(getattr(sample, k)))[None] for k in ("tokens", "positions", "document_ids")}
        logits = model(**inputs).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(sample.labels), ignore_index=IGNORE, reduction="sum")
        total, tokens = total + loss.item(), tokens + int((sample.labels != IGNORE).sum())
        decided.clear()
        labelled = torch.from_numpy(sample.labels != IGNORE)
        model(**inputs, context=TokenContext(valid=labelled))
        of = kinds.of(inputs["tokens"], inputs["positions"])[0]
        for kind, name in enumerate(KINDS):
            loads = by_kind.setdefault(name, [0, torch.zeros(len(decided), 8)])
            loads[0] += int((labelled & (of == kind)).sum())
            loads[1] += torch.stack([active[of == kind].sum(0) for active in decided])
    for layout in ((1, 1, 1), (1, 1, 2), (1, 2, 2)):
        world = math.prod(layout)
        ranks = make_config(data, "exact", layout, run_dir=str(tmp_path / str(layout)))
        results = [on_ranks(ranks, str(data / "c"), True)] if world == 1 else run(on_ranks, world, ranks, str(data / "c"), True)
        for result in results:
            assert result["tokens"] == tokens
            assert result["loss"] == pytest.approx(total / tokens, rel=1e-9)
            assert result["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-9)
            assert result["active"] == pytest.approx(sum(result["active_by_layer"]) / config.model.num_layers)
            routes = routes or result["active"]
            assert result["active"] == routes
            assert result["load_by_layer"] == sum(load for _, load in by_kind.values()).tolist()
            assert result["kinds"].keys() == {name for name, (count, _) in by_kind.items() if count} and len(result["kinds"]) >= 4
            for name, found in result["kinds"].items():
                count, load = by_kind[name]
                assert found["tokens"] == count and found["active_by_layer"] == pytest.approx((load.sum(1) / count).tolist())
    assert isinstance(config.parallel, ParallelConfig) and 0 < routes < 8


def test_cost_goes_by_the_sizes_that_tokens_use(data, tmp_path):
    """Experts of different sizes, some without neurons, in one layer of two: parameters and FLOPs are those of the routes that were taken."""
    moe = {"num_experts": 4, "expert_dim": [6, 0, 2, 6], "router": {"type": "topk", "top_k": 1, "init_std": 0.7}, "layers": [1]}
    config = make_config(data, run_dir=str(tmp_path / "run"), model__moe=moe)
    result = on_ranks(config, str(data / "c"))
    model = Transformer(config.model).double()
    init_weights(model, config.train.seed)
    model.eval()
    dataset, width, tokens = EvalSet("held out", data / "c", config.data.seq_len), 0.0, 0
    for i in range(len(dataset)):
        sample = dataset[i]
        valid = torch.from_numpy(sample.labels != IGNORE)
        inputs = {k: torch.from_numpy(np.array(getattr(sample, k)))[None] for k in ("tokens", "positions", "document_ids")}
        load = model(**inputs, context=TokenContext(valid=valid)).reports[1].stats["load"].tolist()
        width, tokens = width + load[0] * 6 + load[2] * 2 + load[3] * 6, tokens + int(valid.sum())
    assert result["active"] == 1.0 and len(result["active_by_layer"]) == 1
    found = cost(config.model, result["mean_sized"], 12)
    least = cost(config.model, 0.0, 12)
    assert 0.5 < width / tokens < 6
    assert found["active_params"] - least["active_params"] == pytest.approx(3 * 8 * width / tokens, rel=1e-9)
    assert found["flops_per_token"] - least["flops_per_token"] == pytest.approx(2 * 3 * 8 * width / tokens, rel=1e-9)
