"""`train.compile`: the same training by compiled norms and rotary positions."""

from __future__ import annotations

import numpy as np
import pytest

from moetrain.config import ConfigError
from moetrain.train import Trainer
from tests.test_train import make_config, rank_main, start, write_data


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What one test compiled the next one finds, and nothing from before."""
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def data(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", cache)
    write_data(tmp_path / "a", seed=1)
    write_data(tmp_path / "b", documents=20, seed=2)
    return tmp_path


LATENTS = {"q_lora_rank": 5, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3}


@pytest.mark.parametrize("attention", [{}, {"model__mla": LATENTS, "model__num_kv_heads": None}], ids=["grouped", "latent"])
def test_compiled_parts_compute_the_same(attention, data):
    """Losses, gradients, norms and weights of three steps in float64, with blocks computed again in backward."""

    def run(**changes):
        config = make_config(data, "exact", (1, 1, 1), run_dir=str(data / str(changes["train__compile"])), **attention, **changes)
        return rank_main(config, "mixed")

    plain, compiled = (run(train__activation_checkpointing="block", train__compile=c) for c in (False, True))
    for a, b in zip(plain["records"], compiled["records"], strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-9)
    for expected, found in zip(plain["grads"], compiled["grads"], strict=True):
        for name, grad in expected.items():
            np.testing.assert_allclose(found[name], grad, rtol=1e-9, atol=1e-11, err_msg=name)
    for name, weight in plain["weights"].items():
        np.testing.assert_allclose(compiled["weights"][name], weight, rtol=1e-9, atol=1e-11, err_msg=name)


def test_compiled_ranks_equal_one_rank(data):
    """Losses, gradients, norms and weights of two steps compiled on two ranks and a third, not compiled, on one, after saving and loading."""
    whole = rank_main(make_config(data, "exact", (1, 1, 1), run_dir=str(data / "whole")), "mixed")
    (spread,) = start([make_config(data, "exact", (1, 1, 2), run_dir=str(data / "run"), train__compile=True)], "mixed", steps=2, save=True)
    resumed = rank_main(make_config(data, "exact", (1, 1, 1), run_dir=str(data / "run")), "mixed")
    assert len(spread["records"]) == 2 and len(resumed["records"]) == 1
    for a, b in zip(whole["records"], spread["records"] + resumed["records"], strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-9)
    for expected, found in zip(whole["grads"], spread["grads"] + resumed["grads"], strict=True):
        for name, grad in expected.items():
            np.testing.assert_allclose(found[name], grad, rtol=1e-9, atol=1e-11, err_msg=name)
    for name, weight in whole["weights"].items():
        np.testing.assert_allclose(resumed["weights"][name], weight, rtol=1e-9, atol=1e-11, err_msg=name)


def test_without_a_compiler(data, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="no-such-compiler is not there; install it, name one in CXX, or leave it out"):
        Trainer(make_config(data, "exact", (1, 1, 1), run_dir=str(data / "run"), train__compile=True), console=False)
