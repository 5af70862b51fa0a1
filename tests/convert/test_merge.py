"""Several models into one: averages, TIES and DARE against plain loops; experts where they belong; mixtures side by side."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from moetrain.config import SigmoidSteRouter, TopKRouter, UpcycleConfig
from moetrain.convert.copy import step_0_factor
from moetrain.convert.huggingface import read_config, read_tensors
from moetrain.convert.merge import aggregate, dare, merge, ties
from moetrain.convert.split import generator
from moetrain.convert.upcycle import upcycle
from tests.convert.test_huggingface import FAMILIES, load_ours, logits, random_tokens, save_stock


def draws():
    return generator(1, "x")


def tensors(folder):
    return dict(read_tensors(folder, read_config(folder)))


def perturbed(folder, seed, stock, size=0.05):
    """A model of the same make, as if trained on from `stock`."""
    torch.manual_seed(seed)
    other = hf.AutoModelForCausalLM.from_pretrained(stock)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p) * size)
    other.save_pretrained(folder)
    return str(folder)


def test_average_and_base():
    torch.manual_seed(0)
    base, *others = (torch.randn(4, 5, dtype=torch.float64) for _ in range(4))
    assert torch.allclose(merge(base, others, "average", 1.0, None, draws()), sum(others) / 3, rtol=0, atol=1e-15)
    assert torch.equal(merge(base, others, "base", 1.0, None, draws()), base)
    same = [torch.randn(7, 3).bfloat16()] * 3
    assert torch.equal(merge(same[0] * 2, same, "average", 1.0, None, draws()), same[0])


@pytest.mark.parametrize("density", [0.01, 0.4, 1.0])
def test_ties(density):
    """Entry by entry: keep the largest of each model, elect the sign of what is left, add what agrees. Ties in size: the earlier entry."""
    torch.manual_seed(0)
    differences = torch.randn(3, 4, 5, dtype=torch.float64)
    differences[1] = differences[1].sign()  # all equal in size
    flat = differences.flatten(1)
    count = max(1, round(density * 20))
    expected = torch.zeros(20, dtype=torch.float64)
    kept = [sorted(range(20), key=lambda j, row=row: (-abs(float(row[j])), j))[:count] for row in flat]
    for j in range(20):
        values = [float(flat[i, j]) for i in range(3) if j in kept[i]]
        elected = sum(values)
        expected[j] = sum(v for v in values if v * elected > 0)
    assert torch.allclose(ties(differences, density).flatten(), expected, rtol=0, atol=1e-12)


def test_dare_is_unbiased_and_drops():
    differences = torch.ones(2, 300, 300, dtype=torch.float64)
    found = dare(differences, 0.25, draws())
    assert set(found.unique().tolist()) == {0.0, 4.0, 8.0} and found.mean().item() == pytest.approx(2.0, rel=0.02)
    assert torch.equal(dare(differences, 1.0, draws()), differences.sum(0))


@pytest.mark.parametrize("how", ["ties", "dare"])
def test_sign_and_scale_of_the_differences(how):
    """density 1 and lambda 1 / N: the mean of the models; one model and lambda 1: that model. Not the mirror image that the paper's printed
    theta_base - theta_i would give."""
    torch.manual_seed(0)
    base = torch.randn(6, 6, dtype=torch.float64)
    others = [base + torch.rand(6, 6, dtype=torch.float64) for _ in range(3)]
    assert torch.allclose(merge(base, others, how, 1.0, None, draws()), sum(others) / 3, rtol=0, atol=1e-14)
    assert torch.allclose(merge(base, others[:1], how, 1.0, 1.0, draws()), others[0], rtol=0, atol=1e-14)
    far = merge(base, others[:1], how, 1.0, 2.0, draws())
    assert torch.allclose(far, base + 2 * (others[0] - base), rtol=0, atol=1e-14)
    assert merge(base.bfloat16(), others, how, 0.5, None, draws()).dtype == torch.bfloat16


@pytest.mark.parametrize("how", ["average", "base", "ties", "dare"])
def test_branch_train_mix(how, tmp_path):
    """The experts are the models' FFNs to the last bit, the rest is merged, the router is new; it exports as Mixtral."""
    save_stock("llama", tmp_path / "seed")
    models = [perturbed(tmp_path / f"m{i}", i, tmp_path / "seed") for i in range(3)]
    options = {"merge_density": 0.5} if how in ("ties", "dare") else {}
    report = upcycle(
        UpcycleConfig(dense=str(tmp_path / "seed"), output=str(tmp_path / "moe"), method="btx", models=models, merge=how, seed=4, **options)
    )
    assert report.model_type == "mixtral" and report.config.moe.num_experts == 3 and report.config.moe.router == TopKRouter(top_k=2)
    base, moe, parts = tensors(tmp_path / "seed"), tensors(tmp_path / "moe"), [tensors(m) for m in models]
    for name, tensor in moe.items():
        if name.endswith("experts.gate_up"):
            prefix = name.removesuffix("experts.gate_up")
            for e, part in enumerate(parts):
                assert torch.equal(tensor[e], torch.cat((part[prefix + "gate_proj.weight"], part[prefix + "up_proj.weight"])))
                assert torch.equal(moe[prefix + "experts.down"][e], part[prefix + "down_proj.weight"])
        elif ".ffn." not in name:
            expected = merge(base[name], [p[name] for p in parts], how, 0.5, None, generator(4, f"{name}/{how}"))
            assert torch.equal(tensor, expected)
    exported = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    assert (logits(exported, random_tokens()) - logits(load_ours(tmp_path / "moe"), random_tokens())).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "router", [None, TopKRouter(top_k=2, normalize=False, init_std=1e-13), SigmoidSteRouter(bias=True, bias_init=1.0, init_std=1e-13)]
)
def test_equal_models_mix_to_themselves(router, tmp_path):
    stock = save_stock("llama", tmp_path / "seed")
    report = upcycle(
        UpcycleConfig(
            dense=str(tmp_path / "seed"), output=str(tmp_path / "moe"), method="btx", models=[str(tmp_path / "seed")] * 4, router=router
        )
    )
    assert (logits(load_ours(tmp_path / "moe"), random_tokens()) - logits(stock, random_tokens())).abs().max() <= 1e-5
    assert report.receipt.logits <= 1e-5


def test_mixed_experts_are_scaled_by_the_merged_norm(tmp_path):
    save_stock("llama", tmp_path / "seed")
    models = [perturbed(tmp_path / f"m{i}", i, tmp_path / "seed", 0.5) for i in range(2)]
    router = SigmoidSteRouter(init_std=0.4)
    upcycle(UpcycleConfig(dense=str(tmp_path / "seed"), output=str(tmp_path / "moe"), method="btx", models=models, router=router))
    moe, part = tensors(tmp_path / "moe"), tensors(models[1])
    factor = step_0_factor(router, 2, 1, moe["layers.1.ffn_norm.weight"])
    assert factor != pytest.approx(step_0_factor(router, 2, 1, tensors(tmp_path / "seed")["layers.1.ffn_norm.weight"]), rel=1e-3)
    assert torch.allclose(moe["layers.1.ffn.experts.down"][1], part["layers.1.ffn.down_proj.weight"] * factor**0.5, rtol=1e-6)


def test_models_of_another_make_are_refused(tmp_path):
    save_stock("llama", tmp_path / "a")
    save_stock("llama_head_dim", tmp_path / "b")
    save_stock("mixtral", tmp_path / "c")
    for other, message in (("b", "head_dim 16"), ("c", "norm_eps|max_position|rope_theta|moe")):
        with pytest.raises(ValueError, match=f"upcycle.models: .*{other} has .*({message})"):
            upcycle(
                UpcycleConfig(
                    dense=str(tmp_path / "a"), output=str(tmp_path / "out"), method="btx", models=[str(tmp_path / "a"), str(tmp_path / other)]
                )
            )
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------------- aggregation


def mixture(folder, kind):
    """A mixture whose routers spread their scores."""
    if kind == "mixtral":
        save_stock("mixtral", folder)
        return str(folder)
    save_stock("llama", folder.with_name(folder.name + "_dense"))
    router = SigmoidSteRouter(init_std=0.4, rescale="none" if kind == "plain" else "count", bias=kind == "count")
    upcycle(UpcycleConfig(dense=str(folder.with_name(folder.name + "_dense")), output=str(folder), num_experts=4, router=router, receipt=False))
    return str(folder)


@pytest.mark.parametrize("kind", ["mixtral", "count", "plain"])
def test_equal_mixtures_aggregate_to_themselves(kind, tmp_path):
    """Twice the same: sigmoid gates as they are; top-k with twice the k, since each route has its double."""
    first = mixture(tmp_path / "a", kind)
    router = TopKRouter(top_k=4) if kind == "mixtral" else None
    report = upcycle(UpcycleConfig(dense=first, output=str(tmp_path / "both"), method="aggregate", models=[first], router=router))
    assert report.config.moe.num_experts == 8
    difference = logits(load_ours(tmp_path / "both"), random_tokens()) - logits(load_ours(first), random_tokens())
    assert difference.abs().max() <= 1e-5 and report.receipt.logits <= 1e-5


@pytest.mark.parametrize("how", ["average", "base"])
def test_aggregate_puts_experts_and_router_rows_side_by_side(how, tmp_path):
    first = mixture(tmp_path / "a", "mixtral")
    second = perturbed(tmp_path / "b", 1, first)
    upcycle(UpcycleConfig(dense=first, output=str(tmp_path / "both"), method="aggregate", models=[second], merge=how))
    a, b, both = tensors(first), tensors(second), tensors(tmp_path / "both")
    for name, tensor in both.items():
        if ".ffn." in name:
            assert torch.equal(tensor, torch.cat((a[name], b[name])))
        else:
            assert torch.equal(tensor, a[name]) if how == "base" else torch.allclose(tensor, (a[name] + b[name]) / 2, atol=1e-7)
    assert read_config(tmp_path / "both").moe.router.top_k == FAMILIES["mixtral"][1]["num_experts_per_tok"]
    assert aggregate("layers.0.ffn.router.weight", [a["layers.0.ffn.router.weight"]], read_config(first), how, draws()).shape == (4, 32)


def test_aggregate_refusals(tmp_path):
    dense = tmp_path / "dense"
    save_stock("llama", dense)
    first = mixture(tmp_path / "a", "mixtral")
    other = mixture(tmp_path / "b", "count")
    for options, message in (
        (dict(dense=str(dense), models=[first]), "is dense; method aggregate wants mixtures"),
        (dict(dense=first, models=[str(dense)]), "upcycle.models: .*dense has"),
        (dict(dense=first, models=[other]), "upcycle.models: .*b has"),
        (dict(dense=first, models=[first], router=TopKRouter(top_k=9)), r"top_k \(9\) is more than the experts of all mixtures \(8\)"),
        (dict(dense=first, models=[first], router=SigmoidSteRouter()), "upcycle.router.type is sigmoid_ste, but topk in the mixtures"),
    ):
        with pytest.raises(ValueError, match=message):
            upcycle(UpcycleConfig(output=str(tmp_path / "out"), method="aggregate", **options))
    assert not (tmp_path / "out").exists()
