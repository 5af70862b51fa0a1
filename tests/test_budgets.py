"""Budgets in closed loop: 300 steps of a real, tiny model, and the mean number of experts over the last fifth is the target's, within 2 %; the
controllers' states survive a resume under another layout of ranks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from moetrain.config import config_from_dict, to_dict
from moetrain.convert.huggingface import write_model
from moetrain.data.indexed import IndexedWriter
from moetrain.train import Trainer
from tests.test_ranks import config_of
from tests.test_train import rank_main, start, write_data

STEPS = 300
BUDGETS = {
    "dsmoe": {"type": "sigmoid_ste", "target_active": 3.0},
    "dsmoe_2": {"type": "sigmoid_ste", "target_active": 2.0},
    "dsmoe_by_layer": {"type": "sigmoid_ste", "target_active": 4.0, "target_over": "layer"},
    "remoe": {"type": "remoe", "target_active": 2.0},
    "xmoe": {"type": "xmoe", "target_active": 2.4},
}


def write_text(prefix: Path) -> None:
    """Tokens of which a model can learn most: each follows from two before it with probability 0.7."""
    generator = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(300):
            drawn, free = generator.integers(0, 50, 200), generator.random(200) < 0.3
            text = [int(drawn[0])]
            for i in range(1, 200):
                text.append(int(drawn[i]) if free[i] else (7 * text[-1] + 3 * text[max(0, i - 2)] + 1) % 50)
            writer.add_document(np.array(text, dtype=np.uint16))


@pytest.mark.parametrize("name", BUDGETS)
def test_the_budget_is_held(name, tmp_path):
    write_text(tmp_path / "a")
    config = config_from_dict(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {
                "vocab_size": 50, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 16, "max_position_embeddings": 64,
                "moe": {"num_experts": 8, "expert_dim": 16, "router": BUDGETS[name]},
            },
            "data": {"seq_len": 32, "train": [{"name": "a", "path": str(tmp_path / "a")}], "prefetch": 0},
            "train": {"steps": STEPS, "global_batch_size": 32, "micro_batch_size": 32, "lr": 3e-3, "schedule": {"warmup_steps": 10}, "seed": 1},
            "log": {"every": 1000},
        }
    )  # fmt: skip
    trainer = Trainer(config, console=False)
    means, losses = [], []
    with trainer._batches(trainer.dataset, 32, start_sample=0, prefetch=0) as batches:
        while trainer.step < STEPS:
            record = trainer.train_step(next(batches))
            means.append(float(np.mean(record["moe"]["active"])))
            losses.append(record["lm"])
    trainer.close()
    target, last = BUDGETS[name]["target_active"], means[-STEPS // 5 :]
    print(f"\n{name}: target {target}, mean of the last {len(last)} steps {np.mean(last):.4f} ({np.mean(last) / target - 1:+.2%}),")
    print(f"  single steps {min(last):.2f} .. {max(last):.2f}; every 20th step: {' '.join(f'{m:.2f}' for m in means[::20])}")
    assert abs(np.mean(last) / target - 1) < 0.02
    assert losses[-1] < losses[0] - 0.1, "the model learns meanwhile"


def test_state_survives_resume_and_a_change_of_layout(tmp_path):
    """Two steps on two ranks, the third on one, equal three steps on one: coefficients, running errors, thresholds, and DynMoE's clock, records
    and slots, of which the third step frees and fills some."""
    write_data(tmp_path / "a", seed=1)
    write_data(tmp_path / "b", documents=20, seed=2)
    names = ["dsmoe_by_layer", "dsmoe_threshold", "remoe", "xmoe", "dynmoe"]
    start([config_of(name, tmp_path, (1, 1, 2), tmp_path / name) for name in names], "mixed", steps=2, save=True)
    for name in names:
        whole = rank_main(config_of(name, tmp_path, (1, 1, 1), tmp_path / f"{name}_whole"), "mixed")
        resumed = rank_main(config_of(name, tmp_path, (1, 1, 1), tmp_path / name), "mixed")
        assert len(resumed["records"]) == 1
        for key in ("loss", "sparsity_coef"):
            if key in whole["records"][2]:
                np.testing.assert_allclose(resumed["records"][0][key], whole["records"][2][key], rtol=1e-9)
        if name in ("dsmoe_by_layer", "remoe"):
            assert whole["records"][2]["sparsity_coef"] != whole["records"][1]["sparsity_coef"]
        for parameter, weight in whole["weights"].items():
            np.testing.assert_allclose(resumed["weights"][parameter], weight, rtol=1e-9, atol=1e-11, err_msg=f"{name}: {parameter}")
    assert whole["weights"]["layers.0.ffn.router.mask"].tolist() != [1] * 6 + [0] * 2, "the case must change the experts"


def test_a_slot_used_anew_has_no_moments(tmp_path):
    """AdamW forgets what it had gathered for the row and the threshold of a slot that DynMoE fills, and nothing else."""
    write_data(tmp_path / "a", seed=1)
    write_data(tmp_path / "b", documents=20, seed=2)
    trainer = Trainer(config_of("dynmoe", tmp_path, (1, 1, 1), tmp_path / "run"), console=False)
    name = "layers.0.ffn.router"
    with trainer._batches(trainer.dataset, 16, start_sample=0, prefetch=0) as batches:
        for _ in range(2):
            trainer.train_step(next(batches))
        before = trainer.parameters[f"{name}.mask"].detach().clone()
        for part in ("weight", "threshold"):
            for moment in ("exp_avg", "exp_avg_sq"):
                trainer.optimizer.state[trainer.parameters[f"{name}.{part}"]][moment][6] = 1.0
        trainer.parameters[f"{name}.threshold"].data[6] = 0.1
        trainer.train_step(next(batches))
    trainer.close()
    assert before[6] == 0 and trainer.parameters[f"{name}.mask"][6] == 1
    for part in ("weight", "threshold"):
        moments = trainer.optimizer.state[trainer.parameters[f"{name}.{part}"]]
        assert not moments["exp_avg"][6].any() and not moments["exp_avg_sq"][6].any()
        assert moments["exp_avg"][:6].any() and moments["exp_avg_sq"][:6].all()


def test_a_target_set_after_the_conversion(tmp_path):
    """Weights written without one have no thresholds: these start where the option says. A run that goes on can't get them, and is told so."""
    write_data(tmp_path / "a", seed=1)
    write_data(tmp_path / "b", documents=20, seed=2)
    held = to_dict(config_of("dsmoe_threshold", tmp_path, (1, 1, 1), tmp_path / "run"))

    def started(router: dict, **changes: str) -> Trainer:
        model = held["model"]
        tree = {**held, "model": {**model, "moe": {**model["moe"], "router": {**model["moe"]["router"], **router}}}, **changes}
        return Trainer(config_from_dict(tree), console=False)

    for name in ("trim", "controller_factor", "target_over"):
        held["model"]["moe"]["router"].pop(name, None)
    first = started({"target_active": None})
    write_model(tmp_path / "hf", first.model_config, ((n, p.detach().float()) for n, p in first.parameters.items()))
    first.train()
    first.close()
    second = started({"threshold": 0.4}, run_dir=str(tmp_path / "other"), init_from=str(tmp_path / "hf"))
    second.close()
    assert second.parameters["layers.0.ffn.router.threshold"].item() == pytest.approx(math.log(0.4 / 0.6))
    with pytest.raises(ValueError, match="its checkpoint is of another model: model.moe.router.target_active: None there, 3.0 here"):
        started({})
