"""The schema: what people write is read as they mean it, what can't work is refused with the field's name, what is printed reads back, and the
sizes that are computed from a config are those of the model that is built from it."""

# ruff: noqa: E501  (tables: one case per line)

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moetrain import config as schema
from moetrain.config import Config, ConfigError, ModelConfig, check_world, config_from_dict, load_config, parse_overrides, parse_yaml, to_yaml
from moetrain.config.routers import ROUTERS, BudgetOptions
from moetrain.model import Transformer, init_weights

ROOT = Path(__file__).resolve().parents[1]


def model(**changes: Any) -> dict[str, Any]:
    return {"vocab_size": 50, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "intermediate_size": 16, "max_position_embeddings": 64, **changes}


MOE_OPTIONS = ("num_experts", "layers", "shared", "expert_dim", "strata", "route_budget")


def moe(router: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A mixture; changes named in MOE_OPTIONS are options of `model.moe`, the others of `model`."""
    inner = {name: changes.pop(name) for name in MOE_OPTIONS if name in changes}
    return model(moe={"num_experts": 8, "expert_dim": 6, "router": router or {"type": "sigmoid_ste"}, **inner}, **changes)


def train(**changes: Any) -> dict[str, Any]:
    return {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2, **changes}


def error(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(tree)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("3E-4", 3e-4), ("1e6", 1_000_000), ("1_000", 1000), ("-1", -1), ("+2", 2), (".5", 0.5), ("1.", 1.0), ("2.0", 2.0), ("010", 10),
        ("1.5e3", 1500.0), ("no", "no"), ("on", "on"), ("Yes", "Yes"), ("12:30", "12:30"), ("1:2:3", "1:2:3"), ("2026-11-20", "2026-11-20"),
        ("0x10", "0x10"), ("1e", "1e"), ("1-2", "1-2"), ("_1", "_1"), ("'3e-4'", "3e-4"), ("true", True), ("False", False), ("null", None), ("~", None),
        ("", None), ("[1, 2.5, a]", [1, 2.5, "a"]), ("9007199254740993", 9007199254740993),
    ],
)  # fmt: skip
def test_values(text: str, value: Any) -> None:
    """Numbers are numbers however they are written; nothing else turns into something it does not look like."""
    found = parse_yaml(f"a: {text}", "here")["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: not valid YAML: key 'a' is given twice"),
        ("a: {b: 1, b: 2}", "key 'b' is given twice"),
        ("a: [1, 2", "line 1"),
        ("a: !!python/object/apply:os.system [ls]", "tags are not read"),
        ("a: &x [*x]", "recursive"),
        ("? [1]\n: 2", "a key must be a word"),
        ("a: 1e400", "the number '1e400' is too large"),
        ("a: " + "9" * 5000, "too large"),
        ("a: " + "[" * 3000 + "]" * 3000, "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("--- 1\n--- 2", "not valid YAML"),
    ],
)  # fmt: skip
def test_not_yaml(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=r"^here") as caught:
        parse_yaml(text, "here")
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_all_errors_at_once_with_the_nearest_key() -> None:
    message = error(
        {
            "train": train(step=5, lr="3e-4", dtype="fp8", schedule={"type": "cosin"}) | {"micro_batch_size": 0},
            "modle": {},
            "data": {"train": [{"name": "a"}], "seqlen": 4},
            "model": moe({"type": "top_k"}),
            "parallel": {"ep": True},
            "lr": 3e-4,
            "log": 3,
        }
    )
    lines = message.splitlines()
    assert lines[0] == "config given: 12 errors" and len(lines) == 13
    for part in (
        "train.step: unknown key; did you mean train.steps?",
        "train.lr: input should be a valid number, found '3e-4'",
        "train.dtype: input should be 'float32', 'bfloat16' or 'float64', found 'fp8'",
        "train.schedule.type: input should be 'cosine', 'wsd' or 'constant', found 'cosin'",
        "train.micro_batch_size: input should be greater than 0, found 0",
        "modle: unknown key; did you mean model?",
        "data.train.0.path: missing; it has no default",
        "data.seqlen: unknown key; did you mean data.seq_len?",
        f"model.moe.router.type: found 'top_k'; one of {', '.join(ROUTERS)}",
        "parallel.ep: input should be a valid integer, found True",
        "lr: unknown key; did you mean train.lr?",
        "log: must be a section with keys of its own, found 3",
    ):
        assert f"  {part}" in lines
    assert "model.moe.router.threshhold: unknown key; did you mean model.moe.router.threshold?" in error(
        {"model": moe({"type": "sigmoid_ste", "threshhold": 0.5})}
    )
    assert "zzzzqqq: unknown key; `moetrain config --schema` lists all keys" in error({"zzzzqqq": 1})
    assert "train.steps: input should be a valid integer, found 10.0" in error({"train": train(steps=10.0)})


def test_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "run_dir: a\n"
        "train: {steps: 10, global_batch_size: 8, micro_batch_size: 2, lr: 1e-3}\n"
        "data: {train: [{name: x, path: p}, {name: y, path: q}]}\n"
    )
    words = [
        "--train.lr",
        "3e-4",
        "--train.schedule.warmup_steps=3",
        "--data.train.1.path",
        "r",
        "--resume=false",
        "--data.eval",
        "[{name: e, path: f}]",
    ]
    words += ["--parallel.dp_shard", "-1", "--train.grad_clip=null", "--generate.prompt", "def f(): # x", "--run_dir", "2024", "--init_from=null"]
    config = load_config(file, parse_overrides(words))
    assert config.train.lr == 3e-4 and config.train.steps == 10 and config.train.schedule.warmup_steps == 3 and config.train.grad_clip is None
    assert [s.path for s in config.data.train] == ["p", "r"] and config.data.eval[0].name == "e" and config.resume is False
    # Text is taken as it stands, though it would be a mapping, a number or a comment in YAML.
    assert config.generate.prompt == "def f(): # x" and config.run_dir == "2024" and config.init_from is None
    assert load_config(None, parse_overrides(["--generate.prompt=--x=1", "--run_dir=a=b"])).generate.prompt == "--x=1"
    assert load_config(None, parse_overrides(["--generate.prompt", ""])).generate.prompt == ""
    for words, problem in (
        (["train.lr", "1"], "unexpected argument 'train.lr'; an override is --section.key VALUE"),
        (["--train.lr"], "--train.lr: a value is missing"),
        (["--train.lr", "--resume", "false"], "--train.lr: a value is missing"),
        (["--train.lr", "[1"], "--train.lr line 1"),
        (["--train.lr.x", "1"], "--train.lr.x: train.lr is a value, not a section"),
        (["--data.train.2.path", "p"], "--data.train.2.path: data.train is a list of 2; '2' is no place in it"),
        (["--data.train.first.path", "p"], "'first' is no place in it"),
        (["--train.rl", "1"], "train.rl: unknown key; did you mean train.lr?"),
        (["--=1"], ": unknown key"),
        (["--train.lr", "1_e"], "train.lr: input should be a valid number, found '1_e'"),
    ):
        with pytest.raises(ConfigError, match=re.escape(problem)):
            load_config(file, parse_overrides(words))


def test_model_of_the_start_weights_is_the_default(tmp_path: Path) -> None:
    """Keys of the file are laid on the folder's model; another type of router replaces the folder's whole; nothing that a user did not write
    is held against him."""
    router = {"type": "sigmoid_ste", "target_active": 3.0, "controller_factor": 1.5, "ste": "sampled", "probe_rate": 0.5}
    read = {"folder": moe(router)}

    def load(tree: dict[str, Any]) -> ModelConfig:
        file = tmp_path / "c.yaml"
        file.write_text(json.dumps({"init_from": "folder", **tree}))
        return load_config(file, model_from=lambda folder, run_dir: json.loads(json.dumps(read[folder]))).model

    assert load({}).moe.router.controller_factor == 1.5
    assert load({"model": {"moe": {"router": {"threshold": 0.25}}}}).moe.router.target_active == 3.0
    changed = load({"model": {"moe": {"router": {"target_active": None, "ste": "exact"}}}})
    assert changed.moe.router.target_active is None and changed.hidden_size == 8
    assert load({"model": {"moe": {"router": {"type": "topk", "top_k": 2}}}}).moe.router.top_k == 2
    with pytest.raises(ConfigError, match="probe_rate .* only with ste: sampled"):
        load({"model": {"moe": {"router": {"ste": "exact", "probe_rate": 0.5}}}})
    read["folder"] = moe({"type": "topk", "top_k": 2, "gate": "cosine", "cosine_temperature": 0.1, "capacity_factor": 1.0, "drop": "random"})
    changed = load({"model": {"moe": {"router": {"capacity_factor": None}}}}).moe.router
    assert changed.capacity_factor is None and changed.cosine_temperature == 0.1
    for wrong in ("x", 3, [1]):
        with pytest.raises(ConfigError, match="model: must be a section"):
            load({"model": wrong})


# ------------------------------------------------------------------------------------------------------------- round trip

_text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
_positive = st.floats(0, exclude_min=True, allow_nan=False, allow_infinity=False)
_count = st.integers(1, 10**12)


def _some(**fields: st.SearchStrategy) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


@st.composite
def _sigmoid(draw: st.DrawFn) -> dict[str, Any]:
    router = draw(
        _some(
            threshold=st.floats(0, 1, exclude_min=True, exclude_max=True), zero_routes=st.sampled_from(["skip", "top1"]), sparsity_coef=_positive,
            sparsity_on=st.sampled_from(["active", "all"]), init_std=_positive, input=st.sampled_from(["normed", "residual"]),
        )
    )  # fmt: skip
    dependent = [
        ({"ste": "sampled"}, {"probe_rate": st.floats(0, 1, exclude_min=True)}),
        ({"bias": True}, {"bias_init": st.floats(allow_nan=False, allow_infinity=False)}),
        ({"target_active": draw(st.floats(0.5, 8))}, {"controller_factor": st.floats(1, 9, exclude_min=True)}),
        ({"rescale": "count"}, {"rescale_in_eval": st.booleans(), "rescale_gradient": st.sampled_from(["detached", "straight_through"])}),
    ]
    for switch, options in dependent:
        if draw(st.booleans()):
            router |= switch | draw(_some(**options))
    if draw(st.booleans()) and not {"rescale", "rescale_in_eval", "rescale_gradient"} & router.keys():
        router["rescale"] = "none"
    return {"type": "sigmoid_ste", **router}


_variable = st.sampled_from(
    [
        {"type": "remoe"}, {"type": "remoe", "target_active": 2.0, "controller_factor": 1.3, "target_over": "layer"}, {"type": "xmoe", "threshold": 0.0},
        {"type": "xmoe", "target_active": 1.5, "max_experts": 4, "capacity_factor": 2.0, "normalize": True}, {"type": "dynmoe", "norm_coef": 0.0},
        {"type": "dynmoe", "adapt_every": 5, "record_steps": 2, "start_experts": 3}, {"type": "moepp", "top_k": 3, "capacity_factor": None, "num_zero": 0},
    ]
)  # fmt: skip
_topk = st.fixed_dictionaries(
    {"type": st.just("topk"), "top_k": st.integers(1, 8)},
    optional={
        "normalize": st.booleans(), "output_scale": _positive, "balance_coef": _positive, "z_coef": _positive, "init_std": _positive,
        "cv_coef": _positive, "jitter": st.floats(0, 0.9), "balance_over": st.sampled_from(["micro_batch", "sequence", "global_batch"]),
        "balance_count": st.sampled_from(["all", "first"]),
    },
)  # fmt: skip
_topk_more = st.sampled_from(
    [
        {}, {"gate": "mlp", "noise": True}, {"gate": "cosine"}, {"gate": "cosine", "cosine_temperature": 0.1}, {"top_k": 2, "second": "random"},
        {"capacity_factor": 1.25}, {"capacity_factor": 2.0, "drop": "random"}, {"score": "sigmoid", "num_groups": 4, "top_groups": 4},
        {"score": "sigmoid", "selection_bias": True}, {"score": "sigmoid", "selection_bias": True, "bias_rate": 0.0, "top_k": 2, "num_groups": 4},
    ]
)  # fmt: skip
_assigned = st.sampled_from(
    [
        {"type": "base_layers", "init_std": 0.1},
        {"type": "task", "tasks": ["no", "b", "a"], "top_k": 1, "normalize": False, "balance_coef": 0.0},
        {"type": "task", "branches": {"no": [7, 0], "1": [1]}},
        {"type": "hash", "num_hashes": 3, "frequencies": "a.json", "seed": 2**62},
        {"type": "nexus", "domain_dim": 5, "projection_dim": 3, "embeddings": "d.safetensors", "balance_coef": 0.0},
        {"type": "language_family", "languages": {"é": 7, "a b": 0, "no": 1}, "top_k": 8, "balance_coef": 0.5},
        {"type": "expert_choice", "capacity_factor": 1.5, "over": "micro_batch", "evaluation": "choice"},
        {"type": "expert_choice", "training": "threshold", "warmup_steps": 0, "cut_rate": 1.0, "score": "sigmoid"},
    ]
)  # fmt: skip
_rope = st.one_of(
    st.fixed_dictionaries({"type": st.just("linear"), "factor": _positive}),
    st.fixed_dictionaries(
        {
            "type": st.just("llama3"),
            "factor": _positive,
            "low_freq_factor": _positive,
            "high_freq_factor": _positive,
            "original_max_position_embeddings": _count,
        }
    ),
    st.fixed_dictionaries(
        {"type": st.just("yarn"), "factor": _positive, "original_max_position_embeddings": _count},
        optional={"beta_fast": _positive, "beta_slow": _positive, "attention_factor": _positive},
    ),
)
_schedule = st.one_of(
    _some(type=st.just("cosine"), warmup_steps=st.integers(0, 5), min_lr_ratio=st.floats(0, 1)),
    st.fixed_dictionaries({"type": st.just("constant")}, optional={"warmup_steps": st.integers(0, 5)}),
    st.fixed_dictionaries({"type": st.just("wsd"), "decay_steps": st.integers(1, 5)}, optional={"min_lr_ratio": st.floats(0, 1)}),
)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """What a user might write, valid by construction."""
    tree = draw(_some(run_dir=_text, init_from=st.none() | _text, resume=st.booleans()))
    sources = st.lists(st.fixed_dictionaries({"name": _text, "path": _text}), max_size=3, unique_by=lambda s: s["name"])
    data = draw(
        _some(train=sources, eval=sources, isolate_documents=st.booleans(), prefetch=st.integers(0, 9), temperature=st.none() | st.floats(0, 1))
    )
    if data.get("train") and data.get("temperature") is None and draw(st.booleans()):
        data["train"] = [{**s, "weight": draw(_positive)} for s in data["train"]]
    tree["data"] = {**data, "seq_len": draw(st.integers(2, 64))}
    if draw(st.booleans()):
        mixture = draw(st.none() | st.one_of(_sigmoid(), _assigned, st.builds(dict.__or__, _topk, _topk_more), _variable))
        if mixture is not None and mixture["type"] in ("task", "language_family"):  # they name sources
            tree["data"] |= {"train": [], "eval": []}
        tree["model"] = model(
            **draw(_some(rope_theta=_positive, rope_scaling=st.none() | _rope, norm_eps=_positive, init_std=_positive, qk_norm=st.booleans()))
        )
        tree["model"] |= draw(
            _some(tie_embeddings=st.booleans(), qkv_bias=st.booleans(), o_bias=st.booleans(), num_kv_heads=st.sampled_from([None, 1, 2]))
        )
        if draw(st.booleans()):
            tree["model"] |= {"sliding_window": draw(_count), **draw(_some(sliding_layers=st.none() | st.lists(st.integers(0, 1))))}
        if mixture is not None:
            tree["model"]["moe"] = {"num_experts": 8, "expert_dim": draw(_count), "router": mixture}
            tree["model"]["moe"] |= draw(_some(expert_dim=st.sampled_from([[1, 2] * 4, [0, 5, 5, 5] * 2])))
            tree["model"]["moe"] |= draw(_some(shared=st.sampled_from([None, {"dim": 3}, {"dim": 4, "combine": "coefficient"}])))
            tree["model"]["moe"] |= draw(_some(layers=st.sampled_from([None, [1], [1, 0], {"first": 1}, {"every": 2}, {"first": -1, "every": 3}])))
    if draw(st.booleans()):
        tree["train"] = train(
            **draw(
                _some(
                    lr=_positive,
                    schedule=_schedule,
                    grad_clip=st.none() | _positive,
                    seed=st.integers(0, 2**62),
                    eps=_positive,
                    beta1=st.floats(0, 0.99),
                )
            )
        )
    tree |= draw(
        _some(
            log=_some(every=_count, wandb_name=st.none() | _text, wandb_project=_text),
            prepare=st.fixed_dictionaries({"inputs": st.lists(_text, min_size=1, max_size=3), "output": _text}, optional={"exclude": st.lists(_text), "text_key": _text}),
            upcycle=st.fixed_dictionaries({"dense": _text, "output": _text}, optional={"router": st.none() | _sigmoid()}),
            generate=_some(prompt=st.text(st.characters(codec="utf-8"), max_size=40), temperature=_positive),
            checkpoint=_some(every=st.none() | _count, keep_every=st.none() | _count, asynchronous=st.booleans()),
            eval=_some(sequences=st.none() | _count, output=st.none() | _text),
        )
    )  # fmt: skip
    return tree


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trees())
def test_resolved_yaml_reads_back_to_an_equal_config(tree: dict[str, Any]) -> None:
    config = config_from_dict(tree)
    text = to_yaml(config)
    again = config_from_dict(parse_yaml(text, "resolved"))
    assert again == config and to_yaml(again) == text
    # As checkpoints and exported folders keep it.
    assert config_from_dict(json.loads(json.dumps(schema.to_dict(config)))) == config


def test_file_reads_back(tmp_path: Path) -> None:
    config = config_from_dict({"generate": {"prompt": "a\r\nb\tc\u2028 é \\ # : - ' \" null\n"}, "run_dir": "1e3", "log": {"wandb_name": "no"}})
    (tmp_path / "c.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml") == config


# ------------------------------------------------------------------------------------------------------------------- schema


def test_json_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    document = json.loads(schema.schema())
    jsonschema.Draft202012Validator.check_schema(document)
    validator = jsonschema.Draft202012Validator(document)
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert files
    for file in files:
        tree = parse_yaml(file.read_text(encoding="utf-8"), str(file))
        found = [e for e in validator.iter_errors(tree) if not _model_is_elsewhere(tree, e)]
        assert not found, (file, found)
        validator.validate(
            json.loads(json.dumps(schema.to_dict(config_from_dict({k: v for k, v in tree.items() if k != "model" or "init_from" not in tree}))))
        )
        assert not validator.is_valid({**tree, "run_dirr": "x"})
    for wrong in ({"train": {"step": 1}}, {"model": moe({"type": "topk", "topk": 2})}, {"log": {"every": 0}}, {"resume": "yes"}):
        assert not validator.is_valid(wrong)
    # What an editor shows beside a key.
    assert "by default" not in document["$defs"]["TrainConfig"]["properties"]["micro_batch_size"]["description"]
    assert document["$defs"]["MoEConfig"]["properties"]["num_experts"]["description"] == "E, over all ranks."


def _model_is_elsewhere(tree: dict[str, Any], problem: Any) -> bool:
    # With init_from the model section only has what differs from the folder's; a schema can't know that.
    return "init_from" in tree and list(problem.absolute_path)[:1] == ["model"]


# --------------------------------------------------------------------------------------------------------- cross-field rules

_OPEN = {"type": "sigmoid_ste"}
_TOP2 = {"type": "topk", "top_k": 2}
_SONIC = {"experts_backend": "sonicmoe", "dtype": "bfloat16"}
_MLA = {"kv_lora_rank": 5, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 4}
_YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
_TASKS = {"type": "task", "tasks": ["en", "de"]}
_LANGUAGES = {"type": "language_family", "languages": {"en": 0, "de": 7}}


def _upcycle(method: str = "dsmoe", **options: Any) -> dict[str, Any]:
    return {"upcycle": {"dense": "a", "output": "b", "method": method, **options}}


RULES: list[tuple[dict[str, Any], str]] = [
    ({"parallel": {"dp_shard": 0}}, "parallel.dp_shard: 0 ranks; use -1"),
    ({"train": train(global_batch_size=7)}, "train.global_batch_size (7) must be a multiple of train.micro_batch_size (2)"),
    ({"train": train(schedule={"warmup_steps": 11})}, "train.schedule.warmup_steps (11) is more than train.steps (10)"),
    ({"train": train(schedule={"decay_steps": 3})}, "train.schedule.decay_steps (3) has an effect only with type: wsd, not cosine"),
    ({"train": train(schedule={"type": "constant", "min_lr_ratio": 0.1})}, "train.schedule.min_lr_ratio (0.1) has no effect with type: constant"),
    ({"train": train(schedule={"type": "wsd"})}, "train.schedule.decay_steps: type wsd needs"),
    ({"train": train(schedule={"type": "wsd", "warmup_steps": 6, "decay_steps": 5})}, "warmup_steps (6) + decay_steps (5) is more than train.steps (10)"),
    ({"train": train(router_lr=1e-3), "model": model()}, "train.router_lr (0.001) has an effect only with model.moe"),
    ({"guard": {"action": "stop"}}, "guard.action (stop) has an effect only with guard.every"),
    ({"train": train(eval_every=5)}, "train.eval_every (5) needs at least one set in data.eval"),
    ({"model": model(), "data": {"seq_len": 65, "eval": [{"name": "a", "path": "p"}]}}, "data.seq_len (65) is more than model.max_position_embeddings (64)"),
    ({"data": {"train": [{"name": "a", "path": "p", "weight": 1}, {"name": "b", "path": "q"}]}}, "give a weight to every source or to none; missing for b"),
    ({"data": {"temperature": 0.5, "train": [{"name": "a", "path": "p", "weight": 1}]}}, "data.temperature (0.5) excludes weights"),
    ({"data": {"train": [{"name": "a", "path": "p"}] * 2}}, "data.train: the name 'a' is given 2 times"),
    ({"model": model(num_heads=3)}, "model.hidden_size (8) is no multiple of model.num_heads (3)"),
    ({"model": model(head_dim=5)}, "model.head_dim (5) must be even"),
    ({"model": model(num_heads=4, num_kv_heads=3)}, "model.num_heads (4) must be a multiple of model.num_kv_heads (3)"),
    ({"model": model(qk_norm_over="all")}, "model.qk_norm_over (all) has an effect only with qk_norm: true"),
    ({"model": model(sliding_layers=[0])}, "model.sliding_layers has an effect only with model.sliding_window"),
    ({"model": model(sliding_window=4, sliding_layers=[0, 2])}, "model.sliding_layers: [2] outside 0..1"),
    ({"model": model(rope_scaling={"type": "yarn", "factor": 2.0})}, "model.rope_scaling.original_max_position_embeddings: missing; type yarn needs it"),
    ({"model": model(rope_scaling={"type": "linear", "factor": 2.0, "beta_fast": 3.0})}, "model.rope_scaling.beta_fast (3.0) has no effect with type: linear"),
    ({"model": model(), "parallel": {"ep": 2}}, "parallel.ep (2) needs model.moe"),
    ({"model": moe(), "parallel": {"exchange": "peers"}}, "parallel.exchange (peers) has an effect only with parallel.ep above 1; use auto, or"),
    ({"model": moe(mlp_bias=True)}, "model.mlp_bias: experts have no bias"),
    ({"model": moe(num_experts=65536, num_layers=4000)}, "model.moe.num_experts (65536) in 4000 sparse layers are more than 1,048,576 experts"),
    ({"model": moe(), "parallel": {"ep": 3}}, "model.moe.num_experts (8) must be a multiple of parallel.ep (3); nearest: 2"),
    ({"model": moe(), "parallel": {"dp_shard": 3}}, "parallel.dp_shard (3) must divide model.hidden_size (8) and twice model.moe.expert_dim (12)"),
    ({"model": moe({"type": "topk", "top_k": 9})}, "model.moe.router.top_k (9) is more than num_experts (8)"),
    ({"model": moe({**_OPEN, "probe_rate": 0.5})}, "model.moe.router.probe_rate (0.5) has an effect only with ste: sampled, not exact"),
    ({"model": moe({**_OPEN, "bias_init": 4.0})}, "model.moe.router.bias_init (4.0) has an effect only with bias: true"),
    ({"model": moe({**_OPEN, "controller_factor": 1.5})}, "model.moe.router.controller_factor (1.5) has an effect only with target_active"),
    ({"model": moe({**_OPEN, "trim": False})}, "router.trim (false) has an effect only with target_active"),
    ({"model": moe({**_OPEN, "target_active": 9.0})}, "model.moe.router.target_active (9.0) is more than num_experts (8)"),
    ({"model": moe({**_OPEN, "target_active": 2, "sparsity_coef": 0})}, "model.moe.router.sparsity_coef: 0 can't be adapted"),
    ({"model": moe({**_OPEN, "rescale": "none", "rescale_in_eval": True})}, "rescale_gradient and rescale_in_eval have an effect only with rescale: count"),
    ({"model": moe(layers=[0, 2])}, "model.moe.layers: [2] outside 0..1"),
    ({"model": moe(layers=[])}, "model.moe.layers: [] must name one layer or more, each once"),
    ({"model": moe(layers=[1, 1])}, "model.moe.layers: [1, 1] must name one layer or more, each once"),
    ({"model": moe(layers={"first": 2})}, "model.moe.layers.first (2) is outside -2..1"),
    ({"model": moe(layers={"evry": 2})}, "model.moe.layers.evry: unknown key; did you mean model.moe.layers.every?"),
    ({"model": moe(layers=[0, 1.5])}, "model.moe.layers.1: input should be a valid integer, found 1.5"),
    ({"model": moe(route_budget=9.0)}, "model.moe.route_budget (9.0) is more than num_experts (8)"),
    ({"model": moe(_TOP2, route_budget=1.5)}, "model.moe.route_budget (1.5) has no room for the 2 routes per token of model.moe.router.top_k (2); use more"),
    ({"model": moe({"type": "topk", "top_k": 8}, route_budget=7.5)}, "model.moe.route_budget (7.5) has no room for the 8 routes per token of model.moe.router.top_k (8)"),
    ({"model": moe({**_OPEN, "target_active": 3.5}, route_budget=3)}, "(3.0) has no room for the 3.5 routes per token of model.moe.router.target_active (3.5)"),
    ({"model": moe({"type": "base_layers"}, route_budget=0.5)}, "(0.5) has no room for the 1 routes per token of model.moe.router.type (base_layers)"),
    ({"model": moe(_TOP2, route_budget=2), "parallel": {"ep": 2}}, "model.moe.route_budget (2.0) does not go with parallel.ep (2): ranks tell each other"),
    ({"model": moe(_TOP2, route_budget=2, strata={"sizes": [4, 4]})}, "(2.0) is for one dispatch per layer, and model.moe.strata makes several"),
    ({"model": moe(_TOP2, route_budget=2, expert_dim=[6, 3] * 4)}, "(2.0) is for one dispatch per layer, and model.moe.expert_dim makes several"),
    ({"train": train(experts_backend="sonicmoe"), "model": model()}, "train.experts_backend (sonicmoe) has an effect only with model.moe"),
    ({"train": train(experts_backend="sonicmoe"), "model": moe(expert_dim=16)}, "(sonicmoe) computes in bfloat16, not float32; set train.dtype: bfloat16"),
    ({"train": train(**_SONIC), "model": moe(_TOP2, expert_dim=16, route_budget=2)}, "model.moe.route_budget (2.0) does not go with train.experts_backend (sonicmoe), which knows no padding"),
    ({"train": train(**_SONIC), "model": moe()}, "model.moe.expert_dim (6) must be a multiple of 8 for train.experts_backend (sonicmoe)"),
    ({"train": train(**_SONIC), "model": moe(expert_dim=16, hidden_size=12)}, "model.hidden_size (12) must be a multiple of 8 for train.experts_backend (sonicmoe)"),
    ({"model": moe(layers=2)}, "model.moe.layers: must be a section with keys of its own, found 2"),
    ({"model": model(mla=_MLA, head_dim=4)}, "model.head_dim (4) does not go with model.mla"),
    ({"model": model(mla=_MLA, num_kv_heads=1)}, "model.num_kv_heads (1) does not go with model.mla"),
    ({"model": model(mla={**_MLA, "qk_rope_head_dim": 3})}, "model.mla.qk_rope_head_dim (3) must be even"),
    ({"model": model(rope_scaling={**_YARN, "mscale_all_dim": 1.0})}, "mscale_all_dim (1.0) has no effect with type: yarn and without model.mla"),
    ({"model": model(mla=_MLA, rope_scaling={**_YARN, "mscale": 1.0})}, "mscale (1.0) has an effect only with mscale_all_dim"),
    ({"model": moe(expert_dim=[4, 4])}, "model.moe.expert_dim: 2 sizes for num_experts (8); give one for each"),
    ({"model": moe(expert_dim=[0] * 8)}, "model.moe.expert_dim: every expert has size 0"),
    ({"model": moe(expert_dim=[4] * 7 + [-1])}, "model.moe.expert_dim.7: input should be greater than or equal to 0, found -1"),
    ({"model": moe(expert_dim=0)}, "model.moe.expert_dim: input should be greater than 0, found 0"),
    ({"model": moe(expert_dim=[4] * 5 + [6, 6, 0]), "parallel": {"ep": 2}}, "5 experts of size 4 can't be shared equally by parallel.ep (2) ranks"),
    ({"model": moe(expert_dim=[4] * 6 + [3, 3]), "parallel": {"dp_shard": 4}}, "parallel.dp_shard (4) must divide model.hidden_size (8) and twice"),
    ({"model": moe(_TOP2, strata={"sizes": [4, 3]})}, "model.moe.strata.sizes: [4, 3] add up to 7, not to num_experts (8)"),
    ({"model": moe(_TOP2, strata={"sizes": [8]})}, "model.moe.strata.sizes: list should have at least 2 items"),
    ({"model": moe(strata={"sizes": [4, 4]})}, "model.moe.strata: a token goes on from its best expert, so the router is topk, not sigmoid_ste"),
    ({"model": moe({**_TOP2, "capacity_factor": 1.0}, strata={"sizes": [4, 4]})}, "router.capacity_factor (1.0) does not go with model.moe.strata"),
    ({"model": moe({**_TOP2, "score": "sigmoid", "num_groups": 2, "top_groups": 2}, strata={"sizes": [4, 4]})}, "num_groups (2) does not go with"),
    ({"model": moe(_TOP2, strata={"sizes": [7, 1]})}, "model.moe.router.top_k (2) is more than the last stratum has experts (1)"),
    ({"model": model(finedeep={"sublayers": 3, "experts": 2})}, "model.intermediate_size (16) must be a multiple of model.finedeep.sublayers x experts (3 x 2"),
    ({"model": model(finedeep={"sublayers": 2, "experts": 2}, mlp_bias=True)}, "model.mlp_bias: the experts of model.finedeep have no bias"),
    ({"model": moe(finedeep={"sublayers": 2, "experts": 2})}, "model.finedeep is the kind of FFN of dense layers"),
    ({"prepare": {"inputs": ["a"], "output": "b", "extensions": [".txt", "py"]}}, "prepare.extensions: 'py' would match every name that ends so; write .py"),
    ({"model": moe({**_TOP2, "cosine_temperature": 0.1})}, "router.cosine_temperature (0.1) has an effect only with gate: cosine, not linear"),
    ({"model": moe({**_TOP2, "score": "sigmoid", "noise": True})}, "router.noise: noisy top-k is for score: softmax, not sigmoid"),
    ({"model": moe({**_TOP2, "top_k": 3, "second": "random"})}, "router.second: random needs top_k: 2, not 3"),
    ({"model": moe({**_TOP2, "selection_bias": True})}, "router.selection_bias needs score: sigmoid, not softmax"),
    ({"model": moe({**_TOP2, "bias_rate": 0.1})}, "router.bias_rate (0.1) has an effect only with selection_bias: true"),
    ({"model": moe({**_TOP2, "num_groups": 4})}, "router.num_groups (4) needs score: sigmoid, not softmax"),
    ({"model": moe({**_TOP2, "score": "sigmoid", "num_groups": 3})}, "router.num_groups (3) must divide num_experts (8)"),
    ({"model": moe({**_TOP2, "score": "sigmoid", "top_groups": 1})}, "router.top_groups (1) has an effect only with num_groups above 1"),
    ({"model": moe({**_TOP2, "score": "sigmoid", "num_groups": 2, "top_groups": 3})}, "router.top_groups (3) is more than num_groups (2)"),
    ({"model": moe({**_TOP2, "score": "sigmoid", "num_groups": 8})}, "router.top_groups (1) groups have 1 experts, fewer than top_k (2)"),
    ({"model": moe({**_TOP2, "drop": "random"})}, "router.drop (random) has an effect only with capacity_factor"),
    ({"model": moe({"type": "expert_choice", "capacity_factor": 9.0})}, "router.capacity_factor (9.0) is more than num_experts (8)"),
    ({"model": moe({"type": "expert_choice", "warmup_steps": 9})}, "router.warmup_steps (9) has an effect only with training: threshold, not choice"),
    ({"model": moe(_LANGUAGES), "data": {"seq_len": 32, "train": [{"name": "en", "path": "p"}, {"name": "fr", "path": "q"}]}}, "model.moe.router: 'de' is no source in data.train; its names are en, fr"),
    ({"model": moe({**_LANGUAGES, "languages": {}})}, "router.languages names no source"),
    ({"model": moe({**_LANGUAGES, "languages": {"en": 8}})}, "router.languages: the expert of en (8) must be below num_experts (8)"),
    ({"model": moe({**_LANGUAGES, "top_k": 9})}, "router.top_k (9) is more than num_experts (8)"),
    ({"model": moe({"type": "nexus", "domain_dim": 3, "top_k": 9})}, "router.top_k (9) is more than num_experts (8)"),
    ({"model": moe({"type": "hash", "num_hashes": 9})}, "router.num_hashes (9) is more than num_experts (8)"),
    ({"model": moe({"type": "task"})}, "model.moe.router: give either tasks, whose experts are learned, or branches"),
    ({"model": moe({"type": "task", "branches": {"en": [0]}, "normalize": False})}, "router.normalize (False) has an effect only with tasks"),
    ({"model": moe({"type": "task", "tasks": ["en"], "top_k": 9})}, "router.top_k (9) is more than num_experts (8)"),
    ({"model": moe({"type": "task", "tasks": ["en", "en"]})}, "router.tasks: a name is given twice in en, en"),
    ({"model": moe({"type": "task", "branches": {"en": [0, 8]}})}, "router.branches: en must have one or more different experts below num_experts (8), found [0, 8]"),
    ({"model": moe(_TASKS), "data": {"seq_len": 32, "train": [{"name": n, "path": n} for n in ("en", "de", "fr")]}}, "data.train: 'fr' is no task of model.moe.router; its tasks are en, de"),
    ({"model": moe(_TASKS), "data": {"seq_len": 32, "eval": [{"name": "en_valid", "path": "p"}]}}, "data.eval: 'en_valid' is no task of model.moe.router; give en_valid a task, one of en, de"),
    ({"model": moe(), "data": {"seq_len": 32, "eval": [{"name": "en", "path": "p", "task": "en"}]}}, "data.eval: the task of en (en) has an effect only with"),
    ({"model": moe({"type": "remoe", "controller_factor": 1.5})}, "model.moe.router.controller_factor (1.5) has an effect only with target_active"),
    ({"model": moe({"type": "xmoe", "max_experts": 9})}, "router.max_experts (9) is more than num_experts (8)"),
    ({"model": moe({"type": "xmoe", "max_experts": 2, "target_active": 3.0})}, "router.target_active (3.0) is more than the 2 experts that a token can take"),
    ({"model": moe({"type": "xmoe", "threshold": 1.0, "target_active": 3.0})}, "router.threshold (1.0) can't be moved to hold target_active"),
    ({"model": moe({"type": "dynmoe", "start_experts": 4})}, "router.start_experts (4) has an effect only with adapt_every"),
    ({"model": moe({"type": "dynmoe", "adapt_every": 4, "record_steps": 5})}, "router.record_steps (5) is more than adapt_every (4)"),
    ({"model": moe({"type": "dynmoe", "adapt_every": 4, "start_experts": 9})}, "router.start_experts (9) is more than num_experts (8)"),
    ({"model": moe({"type": "moepp", "num_zero": 0, "num_copy": 0, "num_constant": 0})}, "router: num_zero, num_copy and num_constant are 0"),
    ({"model": moe({"type": "moepp", "top_k": 13})}, "router.top_k (13) is more than the 8 FFN experts and the 4 others"),
    ({"upcycle": {"dense": "a", "output": "b", "method": "llama_moe", "router": _OPEN}}, "upcycle.router.type (sigmoid_ste) does not belong to upcycle.method (llama_moe); use topk"),
    ({"upcycle": {"dense": "a", "output": "b", "method": "llama_moe", "router": {"type": "topk", "top_k": 9}}}, "upcycle.router.top_k (9) is more than num_experts (8)"),
    (_upcycle(granularity=2), "upcycle.granularity (2) has no effect with method: dsmoe; it is for virtual_groups"),
    (_upcycle("btx", num_experts=4, models=["c", "d"]), "upcycle.num_experts (4) has no effect with method: btx"),
    (_upcycle("to_dense", router=_OPEN), "upcycle.router (SigmoidSteRouter"),
    (_upcycle("aggregate", models=["c"], merge_density=0.5), "upcycle.merge_density (0.5) has no effect with method: aggregate; it is for btx"),
    (_upcycle("btx", models=["c", "d"], merge_scale=0.5), "upcycle.merge_scale (0.5) has an effect only with merge: ties or dare, not average"),
    (_upcycle(cluster_on="up"), "upcycle.cluster_on (up) has no effect with split: contiguous"),
    (_upcycle(split="cluster", calibration="c"), "upcycle.calibration (c) has no effect with split: cluster"),
    (_upcycle(split="importance"), "upcycle.calibration: split: importance needs the prefix of a prepared data set"),
    (_upcycle(shared_dim=8), "upcycle.calibration: shared_dim needs the prefix of a prepared data set"),
    (_upcycle("copy", shared_dim=8), "upcycle.shared_dim (8) has no effect with method: copy; it is for slices, dsmoe, llama_moe"),
    (_upcycle("btx", models=["c"]), "upcycle.models: method btx needs 2 or more Hugging Face folders, found 1"),
    (_upcycle("aggregate", models=["c"], merge="ties"), "upcycle.merge (ties) needs a common start, which mixtures don't name; use average or base"),
    (_upcycle("virtual_groups", granularity=3), "upcycle.num_experts (8) must be a multiple of upcycle.granularity (3)"),
    (_upcycle("virtual_groups", router={"type": "topk", "top_k": 3}), "upcycle.router.top_k (3) must be a multiple of upcycle.granularity (2)"),
    (_upcycle("virtual_groups", router={"type": "expert_choice"}), "upcycle.router.type (expert_choice) can't route virtual groups"),
    (_upcycle("btx", models=["c", "d"], router={"type": "topk", "top_k": 3}), "upcycle.router.top_k (3) is more than num_experts (2)"),
    (_upcycle("copy", router={**_OPEN, "input": "residual"}), "upcycle.weight_scaling: with router.input: residual the size of what the gates see"),
]  # fmt: skip
WORLDS: list[tuple[dict[str, Any], int, str]] = [
    ({"parallel": {"ep": 2}, "model": moe()}, 3, "dp_replicate (1) x ep (2) = 2 does not divide the number of ranks (3); start 4 ranks"),
    ({"parallel": {"ep": 4}, "model": moe()}, 1, "does not divide the number of ranks (1); start 4 ranks"),
    ({"parallel": {"dp_shard": 2}}, 3, "dp_replicate (1) x dp_shard (2) x ep (1) = 2, but 3 ranks were started; start 2, or set dp_shard: -1"),
    ({"train": train(global_batch_size=8)}, 3, "train.global_batch_size (8) must be a multiple of train.micro_batch_size (2) x ranks (3) = 6; nearest: 6"),
    ({"model": moe()}, 3, "parallel.dp_shard (3) must divide"),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "message"), RULES, ids=[m for _, m in RULES])
def test_rules(tree: dict[str, Any], message: str) -> None:
    found = error(tree)
    assert message in found and "\n" not in found


@pytest.mark.parametrize(("tree", "world", "message"), WORLDS, ids=[m for *_, m in WORLDS])
def test_world_rules(tree: dict[str, Any], world: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_world(config_from_dict(tree), world)
    assert message in str(caught.value)


def test_worlds_that_fit() -> None:
    config = config_from_dict({"model": moe(), "train": train(), "parallel": {"dp_replicate": 2, "ep": 2}})
    assert check_world(config, 4).dp_shard == 1 and config.parallel.dp_shard == -1
    assert check_world(config_from_dict({}), 5).dp_shard == 5


def test_every_rule_has_a_case() -> None:
    """The messages in the source of the checks, with anything for their placeholders: each is one that a case above brings about."""
    said = [error(tree) for tree, _ in RULES]
    for tree, world, _ in WORLDS:
        with pytest.raises(ConfigError) as caught:
            check_world(config_from_dict(tree), world)
        said.append(str(caught.value))
    rules = 0
    for file in ("rules.py", "routers.py"):
        for function in ast.walk(ast.parse((Path(schema.__file__).parent / file).read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef) or function.name not in ("check", "check_world", "problems", "_check_model", "_check_upcycle", "_check_mla", "_check_strata"):
                continue
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and ast.unparse(call.func) in ("bad.append", "ConfigError"):
                    template = _template(call.args[0])
                    if template == "":
                        continue  # raises what was collected
                    rules += 1
                    assert any(re.search(template, text, re.DOTALL) for text in said), f"{file}:{call.lineno} has no case: {template}"
    assert rules >= 36


def _template(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(re.escape(v.value) if isinstance(v, ast.Constant) else ".*" for v in node.values)
    if isinstance(node, ast.BinOp):
        return _template(node.left) + _template(node.right)
    return ""


# ---------------------------------------------------------------------------------------------------- every option is read

_BUDGETED = [cls for cls in ROUTERS.values() if issubclass(cls, BudgetOptions)]

# Section.option -> (file, expression in it that reads the option).
READ: dict[str, tuple[str, str]] = {
    "Config.run_dir": ("train.py", "config.run_dir"),
    "Config.init_from": ("build.py", "config.init_from"),
    "Config.resume": ("train.py", "config.resume"),
    "RopeScaling.type": ("attention.py", "scaling.type"),
    "RopeScaling.factor": ("attention.py", "scaling.factor"),
    "RopeScaling.original_max_position_embeddings": ("attention.py", "scaling.original_max_position_embeddings"),
    "RopeScaling.low_freq_factor": ("attention.py", "scaling.low_freq_factor"),
    "RopeScaling.high_freq_factor": ("attention.py", "scaling.high_freq_factor"),
    "RopeScaling.beta_fast": ("attention.py", "scaling.beta_fast"),
    "RopeScaling.beta_slow": ("attention.py", "scaling.beta_slow"),
    "RopeScaling.attention_factor": ("attention.py", "scaling.attention_factor"),
    # A router's options are read by its module as `options.x` or by its own section as `self.x`; these few are read elsewhere.
    **{f"{cls.__name__}.type": ("moe/routers/__init__.py", "router.type") for cls in ROUTERS.values()},
    **{f"{cls.__name__}.init_std": ("model.py", "router.init_std") for cls in ROUTERS.values() if "init_std" in cls.model_fields},
    **{f"{cls.__name__}.{n}": ("moe/losses.py", f"router.{n}") for cls in _BUDGETED for n in ("target_active", "target_over", "controller_factor")},
    "SigmoidSteRouter.bias_init": ("model.py", "getattr(config.moe.router, 'bias_init', 0.0)"),
    "SigmoidSteRouter.input": ("moe/layer.py", "getattr(router, 'input', 'normed')"),
    "MoEConfig.num_experts": ("moe/layer.py", "moe.num_experts"),
    "MoEConfig.expert_dim": ("config/model.py", "self.expert_dim"),
    "MoEConfig.route_budget": ("moe/room.py", "moe.route_budget"),
    **{f"MLAConfig.{n}": ("attention.py", f"m.{n}") for n in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
    "MLAConfig.rope_interleave": ("attention.py", "mla.rope_interleave"),
    "RopeScaling.mscale": ("attention.py", "scaling.mscale"),
    "RopeScaling.mscale_all_dim": ("attention.py", "rope_scaling.mscale_all_dim"),
    "StrataConfig.sizes": ("moe/strata.py", "strata.sizes"),
    "StrataConfig.norm": ("moe/strata.py", "strata.norm"),
    "FinedeepConfig.sublayers": ("moe/finedeep.py", "finedeep.sublayers"),
    "FinedeepConfig.experts": ("moe/finedeep.py", "finedeep.experts"),
    "SharedConfig.dim": ("moe/shared.py", "options.dim"),
    "SharedConfig.combine": ("moe/shared.py", "options.combine"),
    "LayerRange.first": ("config/model.py", "choice.first"),
    "LayerRange.every": ("config/model.py", "choice.every"),
    "ModelConfig.vocab_size": ("model.py", "config.vocab_size"),
    "ModelConfig.hidden_size": ("model.py", "config.hidden_size"),
    "ModelConfig.num_layers": ("model.py", "config.num_layers"),
    "ModelConfig.num_heads": ("attention.py", "config.num_heads"),
    "ModelConfig.num_kv_heads": ("attention.py", "config.kv_heads"),
    "ModelConfig.head_dim": ("attention.py", "config.head_size"),
    "ModelConfig.intermediate_size": ("model.py", "config.intermediate_size"),
    "ModelConfig.max_position_embeddings": ("generate.py", "config.max_position_embeddings"),
    "ModelConfig.rope_theta": ("attention.py", "config.rope_theta"),
    "ModelConfig.norm_eps": ("model.py", "config.norm_eps"),
    "ModelConfig.tie_embeddings": ("model.py", "config.tie_embeddings"),
    "ModelConfig.qkv_bias": ("attention.py", "config.qkv_bias"),
    "ModelConfig.o_bias": ("attention.py", "config.o_bias"),
    "ModelConfig.mlp_bias": ("model.py", "config.mlp_bias"),
    "ModelConfig.qk_norm": ("attention.py", "config.qk_norm"),
    "ModelConfig.qk_norm_over": ("attention.py", "config.qk_norm_over"),
    "ModelConfig.sliding_window": ("attention.py", "config.sliding_window"),
    "ModelConfig.sliding_layers": ("attention.py", "config.sliding_layers"),
    "ModelConfig.init_std": ("model.py", "config.init_std"),
    "Source.name": ("train.py", "Source(s.name, s.path, s.weight)"),
    "Source.path": ("train.py", "Source(s.name, s.path, s.weight)"),
    "Source.weight": ("train.py", "Source(s.name, s.path, s.weight)"),
    "EvalSource.task": ("config/sections.py", "s.task"),
    "GenerateConfig.task": ("generate.py", "config.task"),
    "ExportConfig.task": ("cli.py", "options.task"),
    "EvalSource.name": ("evaluate.py", "s.name"),
    "EvalSource.path": ("evaluate.py", "s.path"),
    "DataConfig.seq_len": ("train.py", "data.seq_len"),
    "DataConfig.temperature": ("train.py", "data.temperature"),
    "DataConfig.isolate_documents": ("train.py", "data.isolate_documents"),
    "DataConfig.prefetch": ("train.py", "data.prefetch"),
    "PrepareConfig.inputs": ("cli.py", "options.inputs"),
    "PrepareConfig.output": ("cli.py", "options.output"),
    "PrepareConfig.tokenizer": ("cli.py", "options.tokenizer"),
    "PrepareConfig.text_key": ("cli.py", "options.text_key"),
    "PrepareConfig.extensions": ("cli.py", "options.extensions"),
    "PrepareConfig.exclude": ("cli.py", "options.exclude"),
    "PrepareConfig.workers": ("cli.py", "options.workers"),
    "PrepareConfig.validation_fraction": ("cli.py", "options.validation_fraction"),
    "PrepareConfig.max_documents": ("cli.py", "options.max_documents"),
    "PrepareConfig.strict": ("cli.py", "options.strict"),
    "PrepareConfig.counts": ("cli.py", "options.counts"),
    "PrepareConfig.seed": ("cli.py", "options.seed"),
    "ParallelConfig.dp_replicate": ("parallel/mesh.py", "parallel.dp_replicate"),
    "ParallelConfig.dp_shard": ("parallel/mesh.py", "parallel.dp_shard"),
    "ParallelConfig.ep": ("parallel/mesh.py", "parallel.ep"),
    "ParallelConfig.exchange": ("train.py", "parallel.exchange"),
    "ParallelConfig.timeout_seconds": ("train.py", "parallel.timeout_seconds"),
    "ScheduleConfig.type": ("train.py", "schedule.type"),
    "ScheduleConfig.warmup_steps": ("train.py", "schedule.warmup_steps"),
    "ScheduleConfig.min_lr_ratio": ("train.py", "schedule.min_lr_ratio"),
    "ScheduleConfig.decay_steps": ("train.py", "schedule.decay_steps"),
    **{
        f"TrainConfig.{name}": ("train.py", f"train.{name}")
        for name in (
            "steps", "global_batch_size", "lr", "router_lr", "expert_lr", "beta1", "beta2", "eps", "weight_decay", "grad_clip", "seed",
            "max_bad_steps", "eval_every",
        )
    },
    "TrainConfig.micro_batch_size": ("train.py", "train_config.micro_batch_size"),
    "TrainConfig.eval_sequences": ("train.py", "train_config.eval_sequences"),
    "TrainConfig.dtype": ("train.py", "train_config.dtype"),
    "TrainConfig.activation_checkpointing": ("parallel/parallelize.py", "train.activation_checkpointing"),
    "TrainConfig.compile": ("train.py", "train_config.compile"),
    "TrainConfig.experts_backend": ("train.py", "train_config.experts_backend"),
    "CheckpointConfig.every": ("train.py", "checkpoint.every"),
    "CheckpointConfig.keep_last": ("checkpoint.py", "config.keep_last"),
    "CheckpointConfig.keep_every": ("checkpoint.py", "config.keep_every"),
    "CheckpointConfig.asynchronous": ("checkpoint.py", "config.asynchronous"),
    "CheckpointConfig.signals": ("cli.py", "config.checkpoint.signals"),
    "CheckpointConfig.max_failures": ("train.py", "checkpoint.max_failures"),
    **{f"WatchdogConfig.{n}": ("watchdog.py", f"config.{n}") for n in ("start_seconds", "step_seconds", "checkpoint_seconds")},
    "WatchdogConfig.max_starts": ("train.py", "config.watchdog.max_starts"),
    **{f"LogConfig.{n}": ("train.py", f"log.{n}") for n in ("load_every", "routing")},
    **{f"LogConfig.{n}": ("metrics.py", f"config.{n}") for n in ("every", "tensorboard", "wandb", "wandb_project", "wandb_name", "wandb_mode")},
    "GuardConfig.every": ("guard.py", "options.every"),
    "GuardConfig.action": ("guard.py", "options.action"),
    "GuardConfig.dead_after": ("guard.py", "options.dead_after"),
    "UpcycleConfig.dense": ("convert/upcycle.py", "config.dense"),
    "UpcycleConfig.output": ("convert/upcycle.py", "config.output"),
    "UpcycleConfig.method": ("convert/upcycle.py", "upcycle.method"),
    "UpcycleConfig.num_experts": ("convert/upcycle.py", "upcycle.num_experts"),
    "UpcycleConfig.seed": ("convert/upcycle.py", "config.seed"),
    **{
        f"UpcycleConfig.{n}": ("convert/upcycle.py", f"config.{n}")
        for n in (
            "split", "shared_dim", "cluster_on", "cluster_metric", "granularity", "noise", "drop_ratio", "drop_shared", "models", "merge", "merge_density",
            "merge_scale", "join", "receipt",
        )
    },
    **{f"UpcycleConfig.{n}": ("convert/calibrate.py", f"config.{n}") for n in ("calibration", "calibration_sequences", "calibration_seq_len")},
    "UpcycleConfig.weight_scaling": ("config/sections.py", "self.weight_scaling"),
    "UpcycleConfig.max_shard_bytes": ("convert/upcycle.py", "config.max_shard_bytes"),
    "EvalConfig.sequences": ("evaluate.py", "eval.sequences"),
    "EvalConfig.batch_size": ("evaluate.py", "eval.batch_size"),
    "EvalConfig.output": ("evaluate.py", "eval.output"),
    "EvalConfig.routing": ("evaluate.py", "eval.routing"),
    "GenerateConfig.prompt": ("cli.py", "generate.prompt"),
    "GenerateConfig.max_new_tokens": ("generate.py", "config.max_new_tokens"),
    "GenerateConfig.temperature": ("generate.py", "config.temperature"),
    "GenerateConfig.top_p": ("generate.py", "config.top_p"),
    "GenerateConfig.seed": ("generate.py", "config.seed"),
    "ExportConfig.output": ("cli.py", "options.output"),
    "ReportConfig.output": ("cli.py", "report.output"),
    "ExportConfig.dtype": ("cli.py", "options.dtype"),
    "ExportConfig.max_shard_bytes": ("cli.py", "options.max_shard_bytes"),
}  # fmt: skip


def _read_by_router(option: str) -> tuple[str, str]:
    section, name = option.split(".")
    type_ = next(type_ for type_, cls in ROUTERS.items() if cls.__name__ == section)
    source = ast.parse((ROOT / "moetrain/config/routers.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in source.body if isinstance(node, ast.ClassDef)}
    for base in next(cls for cls in ROUTERS.values() if cls.__name__ == section).__mro__:
        for function in classes[base.__name__].body if base.__name__ in classes else []:
            if isinstance(function, ast.FunctionDef) and function.name not in ("idle", "problems") and f"self.{name}" in ast.unparse(function):
                return "config/routers.py", f"self.{name}"
    return f"moe/routers/{type_}.py", f"options.{name}"


def test_every_option_is_read() -> None:
    """An option that nothing reads fails here, and so does one that this table does not know."""
    options, todo, seen = set(), [Config], set()
    while todo:
        section = todo.pop()
        if section in seen:
            continue
        seen.add(section)
        for name, field in section.model_fields.items():
            inner = [cls for cls, _ in schema.inner_sections(field.annotation)]
            todo += inner
            if not inner:
                options.add(f"{section.__name__}.{name}")
    read = READ | {name: _read_by_router(name) for name in options - READ.keys() if name.split(".")[0] in {cls.__name__ for cls in ROUTERS.values()}}
    assert options == read.keys()
    expressions: dict[str, set[str]] = {}
    for option, (file, expression) in read.items():
        if file not in expressions:
            tree = ast.parse((ROOT / "moetrain" / file).read_text(encoding="utf-8"))
            expressions[file] = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, (ast.Attribute, ast.Call))}
        found = any(text == expression or text.endswith(f".{expression}") for text in expressions[file])
        assert found, f"{option}: {file} does not read {expression}"


# --------------------------------------------------------------------------------------------------------------------- sizes

_ALL_OPEN = {"type": "sigmoid_ste", "bias": True, "bias_init": 60.0}
MODELS = {
    "plain": model(),
    "tied": model(tie_embeddings=True, num_kv_heads=1),
    "biases": model(qkv_bias=True, o_bias=True, mlp_bias=True),
    "qk_norm": model(qk_norm=True, head_dim=6, num_heads=4, num_kv_heads=2),
    "qk_norm_all": model(qk_norm=True, qk_norm_over="all", head_dim=6, num_heads=4, num_kv_heads=2),
    "sigmoid": moe(),
    "sigmoid_moved": moe({"type": "sigmoid_ste", "target_active": 2.0}),
    "sigmoid_bias": moe(_ALL_OPEN, qkv_bias=True, num_kv_heads=1, tie_embeddings=True),
    "topk": moe({"type": "topk", "top_k": 8}, qk_norm=True),
    "topk_mlp_noise": moe({"type": "topk", "top_k": 8, "gate": "mlp", "noise": True}),
    "budget": moe({"type": "budget", "target_active": 8.0}),
    "topk_bias": moe({"type": "topk", "top_k": 8, "score": "sigmoid", "selection_bias": True}),
    "shared": moe(_ALL_OPEN, shared={"dim": 5}),
    "shared_gate": moe(_ALL_OPEN, shared={"dim": 5, "combine": "gate"}, layers=[1]),
    "shared_coefficient": moe({"type": "topk", "top_k": 8}, shared={"dim": 5, "combine": "coefficient"}),
    "mla": model(mla={**_MLA, "q_lora_rank": 6}, num_heads=3),
    "mla_plain": model(mla=_MLA, qkv_bias=True, o_bias=True),
    "mla_bias": moe({"type": "topk", "top_k": 8}, mla={**_MLA, "q_lora_rank": 6}, qkv_bias=True, o_bias=True, layers=[1]),
    "unequal": moe(_ALL_OPEN, expert_dim=[6, 0, 3, 6, 3, 0, 1, 5]),
    "strata": moe({"type": "topk", "top_k": 2, "noise": True}, strata={"sizes": [3, 3, 2], "norm": True}),
    "finedeep": model(finedeep={"sublayers": 2, "experts": 4}),
    "some_sparse": moe(_ALL_OPEN, layers={"first": 1, "every": 2}, num_layers=5, intermediate_size=20),
    "base_layers": moe({"type": "base_layers"}),
    "task": moe({"type": "task", "tasks": ["a", "b"], "top_k": 8}),
    "task_branches": moe({"type": "task", "branches": {"a": [0, 1], "b": [2]}}),
    "hash": moe({"type": "hash", "num_hashes": 8}),
    "nexus": moe({"type": "nexus", "domain_dim": 5, "projection_dim": 12}),
    "language_family": moe({"type": "language_family", "top_k": 8, "languages": {"en": 0}}),
    "expert_choice": moe({"type": "expert_choice", "capacity_factor": 8.0}),
    "remoe": moe({"type": "remoe"}),
    "xmoe": moe({"type": "xmoe", "threshold": 1.0}),
    "xmoe_target": moe({"type": "xmoe", "target_active": 2.0}),
    "dynmoe": moe({"type": "dynmoe"}),
    "dynmoe_slots": moe({"type": "dynmoe", "adapt_every": 10}),
    "moepp": moe({"type": "moepp", "top_k": 12, "tau": 1.0}),
    "moepp_plain": moe({"type": "moepp", "num_constant": 0, "gating_residual": False}),
}


@pytest.mark.parametrize("name", MODELS)
def test_num_params(name: str) -> None:
    config = ModelConfig.model_validate(MODELS[name])
    with torch.device("meta"):
        built = {n: p.numel() for n, p in Transformer(config).named_parameters()}
    assert config.num_params() == sum(built.values())
    if config.moe is None:
        assert config.num_active_params() == config.num_params()
        return
    experts = sum(n for name, n in built.items() if ".experts." in name)
    for active in (0, 1, 2.5, 8):
        assert config.num_active_params(active) == sum(built.values()) - experts * (1 - active / 8)


@pytest.mark.parametrize("name", ["plain", "tied", "qk_norm", "sigmoid_bias", "topk", "budget", "topk_mlp_noise", "topk_bias", "xmoe", "moepp", "language_family", "hash", "some_sparse", "shared_gate", "shared_coefficient", "mla", "mla_plain", "unequal", "finedeep"])
@pytest.mark.parametrize("length", [8, 64])
def test_flops_per_token(name: str, length: int) -> None:
    """Against torch's count of a forward pass in which every expert is active, number for number.

    torch counts attention as plain matrix products (it does not know the CPU's fused kernel), the whole score matrix, 4 S^2 H C per layer; a
    causal kernel computes half of it, which is what `flops_per_token` says, so the difference is exactly that half. Norms, rotary positions
    and softmax count for nothing in both.
    """
    config = ModelConfig.model_validate(MODELS[name])
    network = Transformer(config)
    init_weights(network, 0)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = network.eval()(torch.arange(length)[None] % 50)
    for report in output.reports:
        assert not report.stats or report.stats["load"].tolist() == [length] * 8
    upper_half = config.num_layers * length * config.num_heads * (config.head_size + config.value_size)
    assert counter.get_total_flops() == length * (config.flops_per_token(length) + upper_half)


def test_flops_by_active_experts() -> None:
    """Each expert more costs its three matrices."""
    config = ModelConfig.model_validate(MODELS["sigmoid"])
    assert config.flops_per_token(8, 3) - config.flops_per_token(8, 2) == 2 * config.num_layers * 3 * 8 * 6
    assert config.flops_per_token(8) == config.flops_per_token(8, 8)
    assert ModelConfig.model_validate(moe({"type": "topk", "top_k": 2})).flops_per_token(8) == config.flops_per_token(8, 2)
