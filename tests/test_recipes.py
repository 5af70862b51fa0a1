"""The recipes in configs/: each reads without a word, has its paper's routing, and its model can be built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.cli import main
from moetrain.config import (
    ROUTERS,
    BaseLayersRouter,
    ExpertChoiceRouter,
    HashRouter,
    LanguageFamilyRouter,
    ModelConfig,
    RouterOptions,
    UpcycleConfig,
    load_config,
)
from moetrain.convert.huggingface import architecture, read_config, read_tensors, write_model
from moetrain.convert.upcycle import target_config, upcycle
from moetrain.model import Transformer, init_weights

FOLDER = Path(__file__).resolve().parents[1] / "configs"
# Parameters in billions and the router, or the options of a topk router that differ from the defaults; None: a dense model.
RECIPES: dict[str, tuple[float, dict[str, Any] | RouterOptions | None]] = {
    "finedeep": (0.8348, None),
    "switch": (
        3.73, dict(top_k=1, normalize=False, jitter=0.01, capacity_factor=1.25, drop="position", init_std=0.0114),
    ),
    "gshard": (19.6, dict(top_k=2, second="random", capacity_factor=1.0, balance_count="first")),
    "llama_moe": (6.74, dict(top_k=4, gate="mlp", noise=True, cv_coef=0.01, balance_coef=0.0)),
    "deepseek_v3_style": (
        671.0,
        dict(
            top_k=8, score="sigmoid", output_scale=2.5, selection_bias=True, bias_rate=1e-3, num_groups=8, top_groups=4, balance_coef=1e-4,
            balance_over="sequence", init_std=0.006,
        ),
    ),
    "base_layers": (4.344, BaseLayersRouter()),
    "expert_choice": (5.514, ExpertChoiceRouter()),
    "post_moe": (12.1, LanguageFamilyRouter(languages={name: i for i, name in enumerate("ar de en es fr hi it ja ko pt ru zh".split())})),
    "hash": (9.816, HashRouter(frequencies="data/corpus.counts.json")),
    "openmoe": (9.305, dict(top_k=2, capacity_factor=2.0, z_coef=1e-4)),
    "remoe": (0.757, dict(type="remoe", target_active=1.0, sparsity_coef=1e-8, controller_factor=1.2, load_weighted=True, init_std=0.01)),
    "xmoe": (0.7856, dict(type="xmoe", threshold=0.9, capacity_factor=8.0)),
    "dynmoe": (0.7571, dict(type="dynmoe", start_experts=8, adapt_every=1000, record_steps=500)),
    "moepp": (0.5821, dict(type="moepp", top_k=2, num_zero=1, num_copy=1, num_constant=2, tau=0.75, capacity_factor=1.1)),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, capsys):
    path = FOLDER / f"{name}.yaml"
    assert main(["config", "--config", str(path)]) == 0
    assert capsys.readouterr().err == ""
    config = load_config(path)
    billions, router = RECIPES[name]
    if router is not None:
        wanted = router if isinstance(router, RouterOptions) else ROUTERS[router.get("type", "topk")](**router)
        assert config.model.moe.router == wanted
    with torch.device("meta"):
        model = Transformer(config.model)
    count = sum(p.numel() for p in model.parameters())
    assert count == config.model.num_params() and count / 1e9 == pytest.approx(billions, rel=2e-3)


def test_upcycled_qwen2_is_the_recipes_model():
    config = load_config(FOLDER / "post_moe.yaml")
    assert target_config(config.model.model_copy(update={"moe": None}), config.upcycle) == config.model


def test_upcycled_llama_is_the_recipes_model():
    """What `moetrain upcycle` makes of Llama-2-7B by the recipe is the recipe's model, but for the scale that goes into the experts."""
    config = load_config(FOLDER / "llama_moe.yaml")
    dense = config.model.model_copy(update={"moe": None})
    made = target_config(dense, config.upcycle)
    assert made.moe.router.output_scale == 4.0
    folded = made.moe.router.model_copy(update={"output_scale": 1.0})
    assert made.moe.model_copy(update={"router": folded}) == config.model.moe


def test_a_small_llama_upcycled_by_the_recipe_is_read_for_training(tmp_path):
    """The gate's two matrices are drawn, the noise's weights start at 0, and the folder gives a value to every parameter."""
    recipe = load_config(FOLDER / "llama_moe.yaml").upcycle
    dense = ModelConfig(vocab_size=32, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32)
    model = Transformer(dense)
    init_weights(model, 0)
    write_model(tmp_path / "dense", dense, model.named_parameters())
    upcycle(UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "moe"), method="llama_moe", num_experts=16, router=recipe.router))
    config = read_config(tmp_path / "moe")
    assert config.moe.router == recipe.router
    read = dict(read_tensors(tmp_path / "moe", config))
    Transformer(config).load_state_dict(read, strict=True)
    assert not read["layers.1.ffn.router.noise"].any()
    assert read["layers.1.ffn.router.output"].std() > 0.01 and read["layers.1.ffn.router.weight"].std() > 0.01


def test_layers_of_the_recipes():
    """DeepSeek-V3's published sizes, 671B and 37B activated; which layers are sparse; what lies beside the experts."""
    models = {name: load_config(FOLDER / f"{name}.yaml").model for name in RECIPES}
    assert models["deepseek_v3_style"].num_active_params() / 1e9 == pytest.approx(37.55, rel=1e-3)
    assert architecture(models["deepseek_v3_style"]) == "deepseek_v3" and models["deepseek_v3_style"].moe_layers == list(range(3, 61))
    assert models["openmoe"].moe_layers == [5, 11, 17, 23] and models["openmoe"].moe.shared.combine == "sum"
    for name in ("switch", "gshard"):
        assert models[name].moe_layers == [1, 3, 5, 7, 9, 11]
