"""`moetrain bench layer`: forward and backward of one sparse layer against the dense FFN of the same FLOPs and the installed rivals."""

from __future__ import annotations

from typing import Any

import torch

from moetrain.bench import measure
from moetrain.bench.contestants import Contestant, Unavailable, dense, loop, ours
from moetrain.bench.measure import Table
from moetrain.bench.problem import Problem, Shape, make
from moetrain.bench.rivals import RIVALS
from moetrain.config import ConfigError

SHAPES = {
    "coarse": Shape(2048, 1024, 512, 8, 2),
    "medium": Shape(2048, 512, 256, 64, 8),
    "fine": Shape(4096, 1024, 128, 64, 8),
    "dsmoe": Shape(4096, 1024, 512, 8, 3, variable=True),
}
ROUTINGS = ("router", "balanced", "skew")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS, LOOP, DENSE = "moetrain", "moetrain, loop", "dense limit"
_COLUMNS = [
    "shape T,D,F,E,k", "dtype", "routing", "layer", "ms", "spread %", "GFLOP/s", "of dense", "of GEMM peak", "kept / bound", "peak / bound",
]  # fmt: skip


def parse_shape(word: str) -> Shape:
    """A name of `SHAPES`, or T,D,F,E,k; with a ~ before k, each expert takes each token with probability k / E."""
    if word in SHAPES:
        return SHAPES[word]
    parts = word.split(",")
    variable = len(parts) == 5 and parts[4].startswith("~")
    try:
        sizes = [int(p.removeprefix("~") if i == 4 else p) for i, p in enumerate(parts)]
        if len(sizes) != 5 or min(sizes) < 1:
            raise ValueError
    except ValueError:
        raise ConfigError(f"--shapes: {word!r} is neither one of {', '.join(SHAPES)} nor T,D,F,E,k such as 2048,1024,512,8,2") from None
    shape = Shape(*sizes, variable=variable)
    if shape.k > shape.experts:
        raise ConfigError(f"--shapes: {word!r} wants {shape.k} routes per token of {shape.experts} experts; k must not be above E")
    return shape


def bound_bytes(problem: Problem, routes: int) -> int:
    """What a layer must keep from forward to backward if it computes nothing twice but the activation: its input, the pre-activations of the
    routes, and the route list (token, place, weight)."""
    shape, element = problem.shape, problem.x.element_size()
    return shape.tokens * shape.hidden * element + routes * 2 * shape.expert_dim * element + routes * 12 + (shape.tokens + shape.experts) * 4


def count_routes(problem: Problem) -> int:
    """Of the layer's own router, or the forced ones."""
    if problem.active is not None:
        return int(problem.active.sum())
    if not problem.shape.variable:
        return problem.shape.tokens * problem.shape.k
    logits = problem.x.float() @ problem.router.float().T
    threshold = torch.special.ndtri(torch.tensor(1 - problem.shape.k / problem.shape.experts, dtype=torch.float64))
    return int((logits > threshold).sum())


def run(
    shapes: list[Shape], dtypes: list[torch.dtype], routings: list[str], rounds: int, rivals: bool = True, device: torch.device = measure.CPU
) -> list[Table]:
    """One table of layers; with a variable shape and the real router, another of what the straight-through estimator costs."""
    roof = measure.roofline(dtypes, device=device)
    table = Table(_title(roof, device), _COLUMNS)
    title = "Straight-through estimator: forward and backward of the layer, by what is probed"
    steps = Table(title, ["shape T,D,F,E,k", "dtype", "ste", "ms", "of off"])
    missing: dict[str, set[str]] = {}
    for shape in shapes:
        for dtype in dtypes:
            for routing in routings:
                measure.progress(f"{shape} {measure.name_of(dtype)} {routing}")
                table.rows += _row(make(shape, dtype, routing, device=device), routing, rounds, rivals, roof.gemm[measure.name_of(dtype)], missing)
            if shape.variable and "router" in routings:
                measure.progress(f"{shape} {measure.name_of(dtype)} ste")
                steps.rows += _ste(make(shape, dtype, "router", device=device), rounds)
    measure.progress("")
    table.notes = [f"{name}: {'; '.join(sorted(reasons))}" for name, reasons in missing.items()]
    table.notes += [
        "of dense: FLOP rate over that of a dense SwiGLU FFN on the same tokens whose intermediate size is routes per token x F, same round.",
        "kept, peak: bytes held from forward to backward, and the most held at once in forward, both with the input and without the output;",
        "bound: input + pre-activations of the routes + route list.",
    ]
    return [table, *([steps] if steps.rows else [])]


def _title(roof: measure.Roofline, device: torch.device) -> str:
    rates = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in roof.gemm.items())
    return f"One sparse layer, forward + backward, {measure.where(device)}. This machine: GEMM {rates}, copy {roof.copy:.0f} GB/s"


def _row(problem: Problem, routing: str, rounds: int, rivals: bool, peak: float, missing: dict[str, set[str]]) -> list[dict[str, Any]]:
    shape = problem.shape
    routes = count_routes(problem)
    # A multiple of 16 keeps the limit on its fast path; the rates are compared, not the times.
    width = max(16, round(routes / shape.tokens * shape.expert_dim / 16) * 16)
    contestants: dict[str, Contestant] = {DENSE: dense(problem, width), OURS: ours(problem)}
    for name, build in ({LOOP: loop} | (RIVALS if rivals else {})).items():
        try:
            contestants[name] = build(problem)
        except Unavailable as reason:
            missing.setdefault(name, set()).add(str(reason))
    work = {name: 18 * shape.hidden * shape.expert_dim * routes for name in contestants}
    work[DENSE] = 18 * shape.hidden * width * shape.tokens
    for name, contestant in contestants.items():
        if contestant.fixed_k:
            work[name] = 18 * shape.hidden * shape.expert_dim * shape.tokens * shape.k
            missing.setdefault(name, set()).add(contestant.fixed_k)
    timings = measure.interleave({n: c.step for n, c in contestants.items()}, DENSE, rounds, measure.clock_of(problem.x.device))
    bound = bound_bytes(problem, routes)
    rows = []
    for name, contestant in contestants.items():
        timing = timings[name]
        rate = work[name] / timing.median / 1e9
        row: dict[str, Any] = {
            "shape T,D,F,E,k": str(shape), "dtype": measure.name_of(problem.x.dtype), "routing": routing, "layer": name,
            "ms": timing.median * 1e3, "spread %": 100 * timing.spread, "GFLOP/s": rate,
            "of dense": timing.ratio * work[name] / work[DENSE], "of GEMM peak": rate / peak,
        }  # fmt: skip
        if name != DENSE:
            kept, most = measure.memory(contestant.forward, problem.x.device)
            row["kept / bound"], row["peak / bound"] = ((problem.x.nbytes + held) / bound for held in (kept, most))
        rows.append(row)
    return rows


def _ste(problem: Problem, rounds: int) -> list[dict[str, Any]]:
    contestants = {"off": ours(problem), "sampled, 0.25": ours(problem, "sampled", 0.25), "exact": ours(problem, "exact")}
    timings = measure.interleave({n: c.step for n, c in contestants.items()}, "off", rounds, measure.clock_of(problem.x.device))
    shared = {"shape T,D,F,E,k": str(problem.shape), "dtype": measure.name_of(problem.x.dtype)}
    return [{**shared, "ste": name, "ms": t.median * 1e3, "of off": 1 / t.ratio} for name, t in timings.items()]


def plot(table: Table, path: str) -> None:
    """Bars: share of the dense limit per row, one colour per layer."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'moetrain[report]'") from None

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in table.rows if r["layer"] != DENSE]
    shares = {(r["layer"], f"{r['shape T,D,F,E,k']}\n{r['dtype']}, {r['routing']}"): r["of dense"] for r in rows}
    places = list(dict.fromkeys(place for _, place in shares))
    layers = list(dict.fromkeys(r["layer"] for r in rows))
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.3 * len(places)), 4.5), layout="constrained")
    for i, layer in enumerate(layers):
        width = 0.8 / len(layers)
        left = [p + width * (i + 0.5) - 0.4 for p in range(len(places))]
        axes.bar(left, [shares.get((layer, place), 0) for place in places], width, label=layer)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(places)), places, rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("share of the dense limit (forward + backward)")
    figure.legend(loc="outside upper center", ncols=len(layers), fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
