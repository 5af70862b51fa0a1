"""The page of a run: what each section shows, and what it says where there is nothing to show."""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.report import charts
from moetrain.report.charts import Mark, Series, short, text
from moetrain.report.read import Curve, Run, encode_load, number, relative_share
from moetrain.report.routing import divergence, has_w_shape

_HERE = Path(__file__).parent
_EVENT_ROWS = 300
_COMPARED = 48  # sets between which divergence is taken: their pairs grow with the square
_BAD = frozenset({
    "skipped", "fallback", "guard", "checkpoint_failed", "collective_failed", "peer_ended", "watchdog", "no_progress", "metrics_lost",
})  # fmt: skip
_TIMES = {"data_s": "waiting for data", "forward_backward_s": "forward, backward, all-to-all", "optimizer_s": "optimizer"}
# Curves with a place of their own on the page; every other one is drawn among the router's.
_KNOWN = frozenset({"loss", "lm", "grad_norm", "lr", "tokens_per_s", "step_s", "eval_s", "memory_bytes", "host_memory_bytes", *_TIMES})


def page(run: Run) -> str:
    """The whole file. Its policy lets no script run but its own, by hash, and nothing be loaded, whatever a name in the run may hold."""
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    name = text(run.folder.resolve().name)
    sections = [_missing(run), _losses(run), *_mixture(run), _speed(run), _events(run), _config(run)]
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{content}</section>' for key, title, content in sections if content)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{name} · moetrain report</title><style>{style}</style></head>'
        f"<body><header><h1>{name}</h1>{_summary(run)}</header><main>{body}</main>"
        f"<footer>moetrain report. Curves of long runs show the mean and the range of neighbouring steps.</footer>"
        f"<script>{script}</script></body></html>\n"
    )


Part = tuple[str, str, str]
"""id, title, content."""


def _summary(run: Run) -> str:
    last, planned = run.last, None if run.config is None or run.config.train is None else run.config.train.steps
    tiles: list[tuple[str, str, bool]] = [(f"{last.get('step', 0):,}" + (f" of {planned:,}" if planned else ""), "steps", False)]
    if run.curves:
        tiles.append((short(number(last.get("lm", last.get("loss")))), "training loss, last step", False))
        tiles.append((short(number(last.get("tokens"))), "tokens seen", False))
    for name, points in list(run.evals.items())[:4]:
        tiles.append((short(points[-1][1]), f"loss on {name}", False))
    if run.num_layers:
        tiles.append((short(float(_mean(_late(run, "active")))), "experts per token, late mean", False))
        dead = sum(number(n) for n in (last.get("moe") or {}).get("dead", []))
        tiles.append((short(dead), "experts without a token, last step", dead > 0))
    if "tokens_per_s" in run.curves:
        speed = run.curves["tokens_per_s"].mean
        tiles.append((short(float(np.nanmedian(speed))) if np.isfinite(speed).any() else "-", "tokens per second, median", False))
    counts = Counter(event["event"] for event in run.events)
    tiles += [(str(counts[kind]), name, counts[kind] > 0) for kind, name in (("skipped", "skipped steps"), ("fallback", "damaged checkpoints"))]
    tiles.append((str(counts["resume"]), "restarts", False))
    return '<ul class="tiles">' + "".join(f'<li{" class=bad" * bad}><b>{text(v)}</b><span>{text(n)}</span></li>' for v, n, bad in tiles) + "</ul>"


def _missing(run: Run) -> Part:
    said = list(run.missing)
    if run.records:
        if not run.evals:
            said.append("No evaluation: set data.eval and train.eval_every.")
        if not run.num_layers:
            said.append("No mixture of experts in this run: nothing on routing.")
        elif not run.frames:
            said.append("No load of each expert: log.load_every is 0, or the run is older than that option.")
        if not set(_TIMES) <= run.curves.keys():
            said.append("Where the time of a step goes was not measured.")
        if not {"memory_bytes", "host_memory_bytes"} & run.curves.keys():
            said.append("Memory was not measured.")
        if run.records == 1:
            said.append("Only one step has been done: curves are a point.")
    if run.not_finite:
        steps = ", ".join(map(str, run.not_finite[:10])) + (", ..." if len(run.not_finite) > 10 else "")
        said.append(f"The loss was not a finite number at step {steps}; curves have gaps there.")
    if not said:
        return "missing", "", ""
    return "missing", "What is not here", '<ul class="missing">' + "".join(f"<li>{text(line, 600)}</li>" for line in said) + "</ul>"


def _losses(run: Run) -> Part:
    if not run.records:
        return "loss", "", ""
    marks = _marks(run)
    trained = "lm" if "lm" in run.curves else "loss"
    series = [_series(run, "training", run.curves[trained], band=True)] if trained in run.curves else []
    content = charts.curves([*series, *_evals(run)], x="step", y="cross-entropy, nats per token", marks=marks)
    content += _mark_key(marks)
    if run.evals:
        rows = [(name, len(p), p[-1][0], p[-1][1], _exp(p[-1][1]), min(v for _, v in p)) for name, p in run.evals.items()]
        content += charts.table(["evaluation set", "times", "last step", "loss", "perplexity", "least loss"], rows)
    parts = []
    if len(run.sources) > 1:
        by_source = [_series(run, name, curve) for name, curve in run.sources.items()]
        parts.append(("Training loss by source", charts.curves(by_source, x="step", y="nats per token", marks=marks)))
    for name, title, log in (("grad_norm", "Gradient norm", True), ("lr", "Learning rate", False)):
        if name in run.curves:
            parts.append((title, charts.curves([_series(run, name, run.curves[name], band=log)], x="step", y=title.lower(), marks=marks, log=log)))
    others = [_series(run, name, curve) for name, curve in run.curves.items() if name not in _KNOWN]
    if others:
        parts.append(("Router losses and coefficients", charts.curves(others, x="step", y="value", marks=marks, log=True)))
    return "loss", "Loss", content + _pair(parts)


def _mixture(run: Run) -> list[Part]:
    return [_active(run), _kinds(run), _load(run), _sources(run)] if run.num_layers else []


def _active(run: Run) -> Part:
    names, active = run.layer_names, run.layers["active"]
    by_layer = _late(run, "active")
    places = list(range(run.num_layers))
    series = [Series("training", places, by_layer.tolist(), dots=True)]
    for name, found in (run.routing.get("eval") or {"sets": {}})["sets"].items():
        series.append(Series(f"evaluation {name}", places, (found["load"].sum(-1) / max(1.0, found["tokens"])).tolist(), dots=True))
    if run.num_layers < 5:
        shape = "Too few sparse layers for the W shape of DSMoE (many experts in the first and last layers, a bump in the middle)."
    else:
        there = [s.name for s in series if has_w_shape(s.y)]
        shape = "The W shape of DSMoE (many experts in the first and last layers, a bump in the middle) is " + (
            f"there: {', '.join(there[:8])}." if there else "not there."
        )
    top = float(np.nanmax(active)) if np.isfinite(active).any() else 1.0
    steps = [str(step) for step in run.layer_steps]
    heat = charts.heat([charts.encode_value(active, top)], ["all"], rows=names, columns=steps, row="layer", column="step", choose="list", top=top)
    mean = Series("mean of the layers", run.layer_steps, _mean(active).tolist())
    over_time = charts.curves([mean], x="step", y="experts per token", marks=_marks(run))
    rows = []
    for i, name in enumerate(names):
        rows.append((name, float(by_layer[i]), *(float(_late(run, key)[i]) for key in _LAYER_TABLE if len(run.layers.get(key, [])) > i)))
    head = ["layer", "experts per token", *(title for key, title in _LAYER_TABLE.items() if len(run.layers.get(key, [])) == run.num_layers)]
    content = f"<p>{text(shape, 600)} Training: mean of the last tenth of the run.</p>"
    content += charts.curves(series, x="layer", y="experts per token", ticks=names)
    content += _pair([("Over time", over_time), ("Over time, by layer", heat)])
    return "active", "Experts per token", content + f"<details><summary>By layer, late in the run</summary>{charts.table(head, rows)}</details>"


_LAYER_TABLE = {
    "active_std": "spread between tokens", "load_max_mean": "greatest load / mean load", "dead": "experts without a token",
    "empty": "tokens without an expert", "dropped": "routes dropped",
}  # fmt: skip


def _kinds(run: Run) -> Part:
    sets = {name: found["kinds"] for name, found in (run.routing.get("eval") or {"sets": {}})["sets"].items() if found["kinds"]}
    title = "Experts per token, by kind of token"
    if not sets:
        return "kinds", title, f'<p class="none">Not known: {_KINDS_HINT}</p>' if run.routing else ""
    order = list(dict.fromkeys(kind for kinds in sets.values() for kind in kinds))
    content = '<p>On the evaluation sets, of the token that the router sees. "Beginning of a word": letters after no letter.</p>'
    for name, kinds in sets.items():
        rows, best = [], 0.0
        for kind in order:
            if kind in kinds:
                count, by_layer = kinds[kind]
                rows.append((kind, int(count) if math.isfinite(count) else "-", sum(by_layer) / len(by_layer), *by_layer))
                best = max([best, *filter(math.isfinite, by_layer)])
        content += f"<h3>{text(name)}</h3>"
        content += charts.table(["kind", "tokens", "all layers", *(f"layer {n}" for n in run.layer_names)], rows, shade=best)
    return "kinds", title, content


_KINDS_HINT = "the tokenizer of the data is not known, or was not there when the model was evaluated."


def _load(run: Run) -> Part:
    parts, content = [], ""
    if run.frames:
        load = run.frames[-1].load
        content += "<p>Share of each expert in the routes of its layer, against the even share, on a logarithmic scale.</p>"
        content += charts.heat(
            [f.load for f in run.frames], [str(f.step) for f in run.frames], rows=_rows(run, len(load)), columns=_numbers(load.shape[1]),
            row="layer", column="expert", choose="slider", over_time=True,
        )  # fmt: skip
    marks = _marks(run)
    for key, title, whole in (
        ("load_max_mean", "Greatest load / mean load", np.nanmax), ("dead", "Experts without a token, all layers", np.nansum),
        ("empty", "Tokens without an expert, mean of the layers", np.nanmean), ("dropped", "Routes dropped, mean of the layers", np.nanmean),
    ):  # fmt: skip
        values = run.layers.get(key)
        # Most runs have none of the last two: a line at 0 tells nothing.
        if values is not None and np.isfinite(values).any() and (key == "load_max_mean" or key == "dead" or np.nanmax(values) > 0):
            kept = np.isfinite(values).any(axis=0)
            series = [Series(title.lower(), np.asarray(run.layer_steps)[kept].tolist(), whole(values[:, kept], axis=0).tolist())]
            if key == "load_max_mean":
                series[0].name = "worst layer"
                series.append(Series("mean of the layers", series[0].x, np.nanmean(values[:, kept], axis=0).tolist()))
            parts.append((title, charts.curves(series, x="step", y="value", marks=marks)))
    return "load", "Load of the experts", content + _pair(parts)


def _sources(run: Run) -> Part:
    content = ""
    for part, title in (("eval", "Evaluation sets"), ("train", "Training sources")):
        picture = run.routing.get(part)
        if picture is None:
            continue
        sets = picture["sets"]
        when = f", step {picture['step']}" if picture["step"] is not None else ", newest checkpoint"
        content += f"<h3>{title}{text(when)}</h3>"
        loads = [encode_load(relative_share(found["load"])) for found in sets.values()]
        most = max(1, min(len(loads), 1_000_000 // loads[0].size))
        content += charts.heat(
            loads[:most], list(sets)[:most], rows=run.layer_names, columns=_numbers(loads[0].shape[1]), row="layer", column="expert", choose="list",
        )  # fmt: skip
        content += charts.table(["set", "tokens"], [(name, int(f["tokens"]) if math.isfinite(f["tokens"]) else "-") for name, f in sets.items()])
        content += _divergence(run, dict(itertools.islice(sets.items(), _COMPARED)), len(sets))
    return "sources", "Routing by source", content and content + _DIVERGENCE_NOTE


_DIVERGENCE_NOTE = (
    '<p class="soft">Divergence: Jensen-Shannon divergence between the shares of the experts in the routes of two sets, divided by the entropy '
    "of their mean: 0 the same, 1 nothing in common. After arXiv 2510.04694, whose exact normaliser was not found; there it is between languages, "
    "on router probabilities of parallel text. Small sets diverge by chance: look at their tokens.</p>"
)


def _divergence(run: Run, sets: dict[str, Any], known: int) -> str:
    if len(sets) < 2:
        return "<p>One set: nothing to compare. Give each language or domain a set of its own.</p>"
    pairs = {(a, b): divergence(sets[a]["load"], sets[b]["load"]) for a, b in itertools.combinations(sets, 2)}
    places = list(range(run.num_layers))
    if len(sets) <= 4:
        series = [Series(f"{a} / {b}", places, values.tolist(), dots=True) for (a, b), values in pairs.items()]
        note = ""
    else:
        means = {name: np.mean([v for pair, v in pairs.items() if name in pair], axis=0) for name in sets}
        series = [Series(f"{name} / all others, mean", places, m.tolist()) for name, m in sorted(means.items(), key=lambda item: -np.nansum(item[1]))]
        note = f"<p>Of {len(sets)} sets" + (f" (the first of {known})" if known > len(sets) else "") + ", the most apart first.</p>"
    if not any(np.isfinite(values).any() for values in pairs.values()):
        return "<p>No layer in which two sets have routes.</p>"
    return note + charts.curves(series, x="layer", y="divergence of the routing, 0 to 1", ticks=run.layer_names)


def _speed(run: Run) -> Part:
    if not run.records:
        return "speed", "", ""
    marks, curves, parts, content = _marks(run), run.curves, [], ""
    total = curves["step_s"].sum if "step_s" in curves else 0.0
    if total > 0 and set(_TIMES) <= curves.keys():
        amounts = [(title, curves[key].sum) for key, title in _TIMES.items()]
        amounts.append(("rest of the step", max(0.0, total - sum(a for _, a in amounts))))
        amounts += [("evaluation", curves["eval_s"].sum)] if "eval_s" in curves else []
        saving = sum(s for e in run.events if e["event"] == "checkpoint" and math.isfinite(s := number(e.get("seconds"))))
        amounts.append(("checkpoint (the run waited)", saving))
        content += "<h3>Where the time went</h3>" + charts.shares(amounts, "s")
        content += (
            '<p class="soft">On rank 0. A GPU is not waited for after the optimizer: what it still has to do then counts with the next step. '
            "All-to-all is not measured apart. Time between a kill and the restart is not here.</p>"
        )
    if "tokens_per_s" in curves:
        speed = [_series(run, "tokens/s", curves["tokens_per_s"], band=True)]
        parts.append(("Tokens per second, all ranks", charts.curves(speed, x="step", y="tokens/s", marks=marks)))
    if "step_s" in curves:
        times = [_series(run, title, curves[key]) for key, title in {"step_s": "whole step", **_TIMES}.items() if key in curves]
        parts.append(("Time of a step", charts.curves(times, x="step", y="seconds", marks=marks, log=True)))
    memory = []
    for key, title in (("memory_bytes", "GPU, reserved at most"), ("host_memory_bytes", "main memory of rank 0, at most")):
        if key in curves:
            memory.append(Series(title, run.steps, (curves[key].mean / 2**30).tolist()))
    if memory:
        parts.append(("Memory", charts.curves(memory, x="step", y="GiB", marks=marks)))
    return "speed", "Speed and memory", content + _pair(parts)


def _events(run: Run) -> Part:
    if not run.events:
        return "events", "Events", "<p>None.</p>" if run.records else ""
    shown = [e for e in run.events if e["event"] != "checkpoint"]
    saved = [e for e in run.events if e["event"] == "checkpoint"]
    content = f"<p>Checkpoints: {len(saved)}" + (f", the last at step {text(saved[-1].get('step'))}" if saved else "") + ".</p>"
    if shown:
        rows = []
        for event in shown[-_EVENT_ROWS:]:
            rest = ", ".join(f"{k}: {v}" for k, v in event.items() if k not in ("time", "event", "step"))
            rows.append((str(event.get("time", "")), event["event"], str(event.get("step", "")), rest))
        note = f"<p>The last {_EVENT_ROWS} of {len(shown)}.</p>" if len(shown) > _EVENT_ROWS else ""
        content += note + charts.table(["time", "what", "step", "details"], rows)
    else:
        content += "<p>No restart, no skipped step, no fallback.</p>"
    return "events", "Restarts, skipped steps, fallbacks", content


def _config(run: Run) -> Part:
    if not run.config_text:
        return "config", "", ""
    return "config", "Config", f"<details><summary>the resolved config of the run</summary><pre>{text(run.config_text, 200_000)}</pre></details>"


# --------------------------------------------------------------------------------------------------------------------- helpers


def _series(run: Run, name: str, curve: Curve, band: bool = False) -> Series:
    low, high = ((np.where(curve.count > 0, edge, np.nan).tolist() if band else None) for edge in (curve.low, curve.high))
    places = len(run.steps)
    return Series(name, run.steps, curve.mean[:places].tolist(), low and low[:places], high and high[:places])


def _evals(run: Run) -> list[Series]:
    found = []
    for name, points in run.evals.items():
        every = -(-len(points) // 400)
        kept = points[::-every][::-1]  # with the newest
        found.append(Series(f"evaluation {name}", [s for s, _ in kept], [v for _, v in kept], dots=len(kept) <= 60))
    return found


def _marks(run: Run) -> list[Mark]:
    """Events with a step, no two of a kind closer than a hundredth of the run."""
    near = max(1, (run.steps[-1] if run.steps else 0) // 100)
    found: dict[tuple[str, int], Mark] = {}
    for event in run.events:
        step = event.get("step")
        if event["event"] != "checkpoint" and isinstance(step, int) and abs(step) < 2**53:
            kind = "bad" if event["event"] in _BAD else "note"
            found.setdefault((event["event"], step // near), Mark(step, f"{event['event']} at step {step}", kind))
    return list(found.values())


def _mark_key(marks: list[Mark]) -> str:
    if not marks:
        return ""
    kinds = Counter(mark.name.rpartition(" at step ")[0] for mark in marks)
    return f'<p class="soft">Dashed vertical lines: {text(", ".join(kinds))} (the list is below).</p>'


def _late(run: Run, key: str) -> np.ndarray:
    """(L,) mean over the last tenth of the run."""
    values = run.layers[key]
    return _mean(values[:, -max(1, values.shape[1] // 10) :].T)


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the first dim, of what is finite; NaN where nothing is, without numpy's warning."""
    good = np.isfinite(values)
    return np.divide(np.where(good, values, 0).sum(0), good.sum(0), out=np.full(values.shape[1:], np.nan), where=good.any(0))


def _rows(run: Run, count: int) -> list[str]:
    return run.layer_names if count == run.num_layers else _numbers(count)


def _numbers(count: int) -> list[str]:
    return [str(i) for i in range(count)]


def _pair(parts: list[tuple[str, str]]) -> str:
    return '<div class="pair">' + "".join(f"<div><h3>{text(title)}</h3>{content}</div>" for title, content in parts) + "</div>" if parts else ""


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0)) if math.isfinite(value) else math.nan
