"""The training run: build, step, evaluate, save, go on.

A step computes what one rank would compute: losses are sums over this rank's tokens divided by the token count of the whole step, gradients
are added over ranks, the gradient norm is one number, and a bad step is skipped on all ranks together. Nothing draws from a generator with
state: start weights come from names, samples from their index, probes from their token's key. So a run that was killed goes on with the same
numbers as one that was not.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain import config as schema
from moetrain import preempt, restarts
from moetrain.attention import describe_backends
from moetrain.build import DTYPES, build_model, check_meta, compile_parts, empty_model, need, use_sonicmoe
from moetrain.checkpoint import Checkpoints
from moetrain.config import Config, ConfigError, ScheduleConfig, check_world
from moetrain.convert.huggingface import parameter_shapes
from moetrain.data.dataset import IGNORE, BatchIterator, BlendedDataset, EvalSet, Source
from moetrain.data.indexed import read_meta
from moetrain.data.kinds import TokenKinds
from moetrain.evaluate import evaluate, routing_sets
from moetrain.files import check_own
from moetrain.guard import Guard
from moetrain.metrics import Metrics, relative_load, write_routing
from moetrain.microbatch import Batch, Sums, forward, source_classes, source_tags
from moetrain.model import Transformer
from moetrain.moe.losses import build_controller, coefficients
from moetrain.moe.routers import changes_after_step
from moetrain.moe.routing import StepCounts
from moetrain.parallel.grads import gradient_norm, scale_gradients
from moetrain.parallel.mesh import build_meshes, limit_collectives, start_processes
from moetrain.parallel.parallelize import add_whole, choose_exchange, clear_where
from moetrain.records import EVENTS, METRICS, ROUTING
from moetrain.stragglers import StepTimes
from moetrain.watchdog import Watchdog


def learning_rate_factor(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """Share of the peak learning rate in step 0, 1, ... of `steps`: linear warm-up, then cosine, WSD or constant."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    low = schedule.min_lr_ratio
    if schedule.type == "cosine":
        progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if schedule.type == "wsd":
        left = (steps - step) / schedule.decay_steps
        return low + (1 - low) * min(1.0, max(0.0, left))
    return 1.0


def parameter_groups(model: Transformer, config: Config) -> list[dict[str, Any]]:
    """Groups for AdamW by kind: matrices, experts, routers (without decay), and vectors (without decay). "peak_lr" holds each one's rate."""
    train = config.train
    assert train is not None, "checked by need()"
    groups = {
        "matrices": {"peak_lr": train.lr, "weight_decay": train.weight_decay},
        "experts": {"peak_lr": train.expert_lr or train.lr, "weight_decay": train.weight_decay},
        "routers": {"peak_lr": train.router_lr or train.lr, "weight_decay": 0.0},
        "vectors": {"peak_lr": train.lr, "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue  # moved by `routers.changes_after_step`
        kind = "experts" if ".experts." in name else "routers" if ".router." in name else "vectors" if parameter.ndim < 2 else "matrices"
        groups[kind].setdefault("params", []).append(parameter)
    return [{"lr": g["peak_lr"], **g} for g in groups.values() if "params" in g]


class Trainer:
    """One rank's part of a run. Every rank makes one with the same config."""

    def __init__(self, config: Config, *, console: bool = True, watchdog: Watchdog | None = None) -> None:
        """watchdog: is told what the run is doing. Raises ConfigError or ValueError for whatever can't work: layout, data, weights, checkpoint."""
        need(config, "model", "train")
        self.config, self.train_config, self.model_config = config, config.train, config.model
        assert self.train_config is not None and self.model_config is not None, "checked by need()"
        if not config.data.train:
            raise ConfigError("data.train: no source to train on; give at least one name and path")
        # Until the first step is done, ranks may be as far apart as the start may take.
        self.device = start_processes(max(config.parallel.timeout_seconds, config.watchdog.start_seconds))
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.watchdog = watchdog or Watchdog(config.watchdog, config.run_dir, rank=self.rank, world=self.world)
        self.parallel = check_world(config, self.world)
        self.group = dist.group.WORLD if self.world > 1 else None
        self.dtype = DTYPES[self.train_config.dtype]

        self.checkpoints = Checkpoints(Path(config.run_dir) / "checkpoints", config.checkpoint)
        self.watchdog.saving = lambda: self.checkpoints.saving
        resume_step = self._together(self.checkpoints.latest)
        if resume_step is not None and not config.resume:
            raise ConfigError(
                f"run_dir {config.run_dir} has a checkpoint of step {resume_step}; set resume: true to go on, or choose another run_dir"
            )
        self.starts = self._together(lambda: restarts.count_start(config.run_dir, resume_step or 0))
        if 0 < config.watchdog.max_starts < self.starts and (resume_step or 0) < self.train_config.steps:
            restarts.refuse(config.run_dir, resume_step or 0, config.watchdog.max_starts, self.rank)

        data = config.data
        vocab_size = self.model_config.vocab_size
        self.dataset = BlendedDataset(
            [Source(s.name, s.path, s.weight) for s in data.train], data.seq_len, self.train_config.seed,
            temperature=data.temperature, isolate_documents=data.isolate_documents, vocab_size=vocab_size,
        )  # fmt: skip
        self.eval_sets = {
            s.name: EvalSet(s.name, s.path, data.seq_len, data.isolate_documents, self.train_config.eval_sequences, vocab_size=vocab_size)
            for s in data.eval
        }
        self.tags = source_tags(self.model_config, [s.name for s in data.train], self.device)
        self.tokenizer = ((read_meta(data.train[0].path) or {}).get("tokenizer") or {}).get("spec")

        every = config.log.load_every
        self.load_every = max(1, self.train_config.steps // 100) if every is None else every
        self.keep_routing = config.log.routing and self.model_config.num_moe_layers > 0
        self.kinds = TokenKinds.of_tokenizer(self.tokenizer, vocab_size, self.device) if self.keep_routing and self.eval_sets else None
        self.seconds: dict[str, float] = {}
        """Where the time of the last step went, on this rank."""
        self.waited = 0.0  # of them, in the first collective

        self.meshes = meshes = build_meshes(self.parallel, self.device)
        if resume_step is None:
            self.model = build_model(config, self.device, meshes)
        else:
            self._check_same_model(resume_step)
            self.model = empty_model(self.model_config, self.train_config, self.device, meshes)
        self.exchange = choose_exchange(self.model, meshes, self.parallel.exchange, self.device)
        if self.train_config.compile:
            compile_parts(self.model, self.device)
        if self.train_config.experts_backend == "sonicmoe":
            use_sonicmoe(self.model, self.device)
        self.parameters = dict(self.model.named_parameters())
        train = self.train_config
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config), lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, fused=True
        )
        self.controller = build_controller(self.model_config)
        self.step = self.consumed_samples = self.tokens = self.updates = self.bad_in_a_row = self.skipped = 0
        self.told_of_room = False
        self.mean_active: float | None = None
        self.saved = -1  # step of the last checkpoint that this process began
        self.unsaved = 0  # checkpoints in a row that could not be written
        self.told: OSError | None = None  # the last of them that an event has told of
        self.times = StepTimes(self.group, self.device)
        self.stopped: str | None = None  # signal that ended the run before its last step
        self.fingerprint = self.dataset.fingerprint()
        damaged: dict[int, str] = {}
        if resume_step is not None:
            self._resume()
            damaged = self.checkpoints.damaged
        if self.rank == 0:
            check_own(config.run_dir, ("config.yaml", preempt.STATUS, METRICS, EVENTS, ROUTING))
            try:
                Path(config.run_dir).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"run_dir {config.run_dir}: can't be made a folder: {error.strerror}; choose another run_dir") from None
            written = Path(config.run_dir) / "config.yaml.tmp"
            written.write_text(schema.to_yaml(config), encoding="utf-8")
            written.replace(Path(config.run_dir) / "config.yaml")
        self.metrics = Metrics(config.run_dir, config.log, resolved=schema.to_dict(config), resume_step=self.step, rank=self.rank, console=console)
        guard = config.guard
        self.guard = None if guard.every is None else Guard(self.model, guard, train, self.parallel, self.group, self.metrics)
        for step, reason in damaged.items():
            self.metrics.event("fallback", step=step, reason=reason)
        if self.step:
            self.metrics.event("resume", step=self.step, ranks=self.world, start=self.starts)
        elif self.starts > 1:
            self.metrics.event("restart", step=0, ranks=self.world, start=self.starts)
        if console and self.rank == 0:
            print(self.describe(), flush=True)
        caution = None if self.model_config.moe is None else self.model_config.moe.router.caution()
        if caution is not None and self.rank == 0:
            warnings.warn(f"model.moe.router: {caution}", stacklevel=2)

    def describe(self) -> str:
        """What runs and what it runs on, in a few lines: printed once at the start."""
        model, train, layout = self.model_config, self.train_config, self.parallel
        experts = ""
        if model.moe:
            some = "" if model.num_moe_layers == model.num_layers else f" in {model.num_moe_layers} of {model.num_layers} layers"
            experts = f", {model.moe.num_experts} experts per layer{some}"
        used = next(f"{name} ({why})" for name, why in describe_backends() if why.startswith("used"))
        unused = "; ".join(f"{name}: {why}" for name, why in describe_backends() if not why.startswith("used"))
        grouped = self.device.type == "cuda" and train.dtype == "bfloat16"
        lines = [
            f"{model.num_params() / 1e6:.2f}M parameters{experts}, {train.dtype}, "
            + (f"going on from step {self.step}" if self.step else f"from {self.config.init_from or 'random weights'}"),
            f"{self.world} ranks on {self.device.type} = dp_replicate {layout.dp_replicate} x dp_shard {layout.dp_shard} x ep {layout.ep}; "
            f"{train.global_batch_size} samples of {self.config.data.seq_len} tokens per step",
            f"attention: {used}" + (f"; not {unused}" if unused else ""),
        ]
        if model.moe:
            ours = "grouped_mm" if grouped else "a GEMM per expert (grouped_mm is for bfloat16 on CUDA)"
            lines.append("experts: " + ("SonicMoE" if train.experts_backend == "sonicmoe" else ours))
        if self.exchange is not None:
            lines.append(f"exchange: {self.exchange}")
        return "\n".join(lines)

    def _together(self, read: Any) -> Any:
        """Rank 0's answer, on all ranks: they may see a shared folder at different moments."""
        answer = [read() if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(answer, src=0, device=self.device if self.device.type == "cuda" else None)
        return answer[0]

    # ------------------------------------------------------------------------------------------------------------ state

    def _state(self) -> dict[str, Tensor]:
        """Parameters and AdamW's moments under flat names; the moments are made (zero) if there was no update yet."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            state[f"model.{name}"] = parameter.detach()
            if not parameter.requires_grad:
                continue
            moments = self.optimizer.state[parameter]
            if not moments:
                moments["step"] = torch.tensor(0.0, device=self.device)
                moments["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                moments["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state[f"optim.exp_avg.{name}"] = moments["exp_avg"].detach()
            state[f"optim.exp_avg_sq.{name}"] = moments["exp_avg_sq"].detach()
        return state

    def save(self, *, wait: bool = False) -> None:
        """A checkpoint of the step just done. Raises OSError when `checkpoint.max_failures` in a row could not be written."""
        meta = {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "tokens": self.tokens,
            "updates": self.updates,
            "skipped": self.skipped,
            "bad_in_a_row": self.bad_in_a_row,
            "mean_active": self.mean_active,
            "controller": None if self.controller is None else self.controller.state(),
            "data_fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer,
            "config": schema.to_dict(self.config),
        }
        self.watchdog.enter("checkpoint", self.step)
        began = time.perf_counter()
        if self._written():
            self.unsaved = 0
        self.saved = self.step
        try:
            self.checkpoints.save(self.step, self._state(), meta, wait=wait)
        except OSError as error:
            self._not_written(error)
            return
        if wait:
            self.unsaved = 0
        self.metrics.event("checkpoint", step=self.step, seconds=time.perf_counter() - began)  # that training waited, not that writing took

    def _written(self) -> bool:
        """Wait for the save under way; whether there was one and it is whole."""
        try:
            return self.checkpoints.wait()
        except OSError as error:
            self._not_written(error)
            return False

    def _not_written(self, error: OSError) -> None:
        """A checkpoint that can't be written (disk full, read-only) leaves the older ones as they were; the run goes on, if these are not too many
        in a row. The same on all ranks."""
        limit = self.config.checkpoint.max_failures
        self._tell(error)
        self.unsaved += 1
        self.saved = -1
        if self.unsaved >= limit:
            raise OSError(f"{self.unsaved} checkpoints in a row could not be written (checkpoint.max_failures), the last for this reason: {error}")

    def _tell(self, error: BaseException | None) -> None:
        """Once for each failure; by the thread's own word before the next save asks for it."""
        if isinstance(error, OSError) and error is not self.told:
            self.told = error
            self.metrics.event("checkpoint_failed", step=self.saved, error=str(error))
            if self.rank == 0:
                warnings.warn(f"the checkpoint of step {self.saved} could not be written: {error}; older ones are untouched", stacklevel=2)

    def _save_last(self) -> None:
        """The step at which the run ends: there is no next time, so a save that fails is tried again after a pause."""
        pause = 1.0
        while True:
            if self._written():
                self.unsaved = 0
            if self.saved != self.step:
                self.save(wait=True)
            if self.saved == self.step:
                return
            time.sleep(pause)
            pause *= 2

    def _check_same_model(self, step: int) -> None:
        """Before anything is loaded, so that the message names options and not shapes. A damaged checkpoint is left to `load`."""

        def read() -> dict[str, Any] | None:
            try:
                # Through the schema: an option that is newer than the checkpoint has its default there.
                old = schema.config_from_dict({"model": self.checkpoints.read_meta(step)["config"]["model"]}).model
                return None if old is None else schema.to_dict(old)
            except (ValueError, OSError, KeyError, TypeError):
                return None

        old, new = self._together(read), schema.to_dict(self.model_config)
        changed = [] if old is None else _differences(old, new, "model")
        moe = self.model_config.moe
        training = frozenset() if moe is None else moe.TRAINING | moe.router.TRAINING
        fixed = [line for line in changed if line.split(":")[0].rpartition(".")[2] not in training]
        if not fixed and old is not None:
            # An option of training may bring parameters with it: a trimmed router has thresholds.
            before = schema.config_from_dict({"model": old}).model
            assert before is not None, "it was read"
            fixed = [] if parameter_shapes(before).keys() == parameter_shapes(self.model_config).keys() else changed
        if fixed:
            raise ConfigError(f"run_dir {self.config.run_dir}: its checkpoint is of another model: {'; '.join(fixed)}. Use another run_dir")

    def _resume(self) -> None:
        meta = check_meta(self.checkpoints.load(self._state()), f"checkpoint in {self.checkpoints.folder}: meta.json")
        if meta["data_fingerprint"] != self.fingerprint:
            raise ConfigError(
                f"run_dir {self.config.run_dir}: its checkpoint was trained on other data (sources, weights, seq_len or seed differ), so the run "
                f"can't go on with the same samples; use another run_dir and init_from to start from its weights"
            )
        self.step, self.consumed_samples, self.tokens = meta["step"], meta["consumed_samples"], meta["tokens"]
        self.updates, self.skipped, self.bad_in_a_row = meta["updates"], meta["skipped"], meta["bad_in_a_row"]
        self.mean_active = meta["mean_active"]
        for moments in self.optimizer.state.values():
            moments["step"].fill_(self.updates)
        if self.controller is not None and meta["controller"] is not None:
            self.controller.load(meta["controller"])

    # ------------------------------------------------------------------------------------------------------------- step

    def train_step(self, batches: list[Batch]) -> dict[str, Any]:
        """One optimizer step over this rank's micro-batches; returns the record of the step, equal on all ranks."""
        train = self.train_config
        assert train is not None
        began = time.perf_counter()
        self.watchdog.part("forward and backward")
        num_sources = len(self.config.data.train)
        with_load = self.load_every > 0 and ((self.step + 1) % self.load_every == 0 or self.step + 1 == train.steps)
        batches = [{k: v.to(self.device, non_blocking=True) for k, v in batch.items()} for batch in batches]
        count = torch.stack([(b["labels"] != IGNORE).sum() for b in batches]).sum().double()
        sent = time.perf_counter()
        if self.group is not None:
            dist.all_reduce(count)
        waited = time.perf_counter() - sent
        count = count.clamp(min=1)
        factors = coefficients(self.model_config, self.controller)
        factor = learning_rate_factor(self.step, train.steps, train.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

        self.model.train()
        watched = self.guard is not None and self.guard.begin(self.step + 1)
        counts = StepCounts()
        sums = Sums(list(factors), num_sources, self.device)
        for batch in batches:
            classes = source_classes(batch, num_sources) if with_load and self.keep_routing else None
            output = forward(
                self.model, batch, self.dtype, self.config.data.isolate_documents, count, train.seed, self.group, counts, self.tags, classes
            )
            loss = output.loss_sum / count.to(output.loss_sum.dtype)
            for layer, report in enumerate(r for r in output.reports if r.stats):
                for name, value in report.losses.items():
                    loss = loss + factors[name][layer] * value
            loss.backward()
            sums.add(output, batch)
        totals = sums.reduce(self.group)
        health = self.guard.finish(totals.loads) if self.guard is not None and watched else None

        norm = gradient_norm(self.parameters.values())
        numbers = torch.stack([norm, count]).tolist()
        grad_norm, tokens = numbers[0], int(numbers[1])
        computed = time.perf_counter()  # .tolist() has waited for the device
        self.watchdog.part("optimizer")
        losses = {"lm": totals.lm / tokens, **{name: sum(values) for name, values in totals.losses.items()}}
        total = losses["lm"] + sum(f * v for name in factors for f, v in zip(factors[name], totals.losses[name]))
        good = math.isfinite(grad_norm) and math.isfinite(total)
        if good:
            if train.grad_clip is not None:
                scale_gradients(self.parameters.values(), (train.grad_clip / (norm + 1e-6)).clamp(max=1.0))
            self.optimizer.step()
            for name, change in changes_after_step(self.model, totals.loads, totals.sums):
                add_whole(self.parameters[name], change)
                # What was set from outside has no past: AdamW's moments of these entries are of what was there before.
                for moment in ("exp_avg", "exp_avg_sq") if self.parameters[name].requires_grad else ():
                    clear_where(self.optimizer.state[self.parameters[name]][moment], change)
            self.updates += 1
        self.optimizer.zero_grad(set_to_none=True)

        self.step += 1
        self.tokens += tokens
        self.consumed_samples += train.global_batch_size
        self.bad_in_a_row = 0 if good else self.bad_in_a_row + 1
        self.skipped += not good
        record = {"step": self.step, "loss": total, **losses, "grad_norm": grad_norm, "lr": train.lr * factor, "tokens": self.tokens}
        record["skipped"] = not good
        if self.controller is not None:
            used = factors[self.controller.loss]
            record[f"{self.controller.loss}_coef"] = used if len(set(used)) > 1 else used[0]
        record["moe"] = totals.moe
        self._warn_of_room(totals.moe.get("no_room", []))
        if totals.mean_active is not None and good:
            self.mean_active = totals.mean_active
            if self.controller is not None:
                self.controller.update(totals.moe["active"], totals.sums)
        record["guard"] = health
        if with_load:
            record["load"] = relative_load(totals.loads)
        if with_load and self.keep_routing and self.rank == 0:
            found = zip(self.config.data.train, totals.class_tokens, totals.class_loads)
            self._write_routing("train", {s.name: {"tokens": n, "load": load} for s, n, load in found if n})
        self.watchdog.loads = totals.loads
        self.waited = waited
        self.seconds = {"forward_backward_s": computed - began, "optimizer_s": time.perf_counter() - computed}
        record["sources"] = {s.name: v for s, v in zip(self.config.data.train, totals.sources) if v["tokens"]}
        return {k: v for k, v in record.items() if v not in ({}, [], None)}

    def _warn_of_room(self, shares: list[float]) -> None:
        """shares: of each layer's routes, those for which there was no room."""
        if any(shares) and not self.told_of_room and self.rank == 0:
            assert self.model_config.moe is not None, "layers with routes"
            layer = self.model_config.moe_layers[shares.index(max(shares))]
            warnings.warn(
                f"step {self.step}: {max(shares):.2%} of the routes of layer {layer} had no room in model.moe.route_budget "
                f"({self.model_config.moe.route_budget}) and were dropped; give it more. Said once; `no_room` in the metrics has every step",
                stacklevel=3,
            )
            self.told_of_room = True

    # ------------------------------------------------------------------------------------------------------------- run

    def train(self) -> dict[str, Any]:
        """To the last step, or to the one at which all ranks agree that a signal asks to save and end (`stopped`).

        Returns the last record (an empty dict if there was nothing left to do)."""
        config, train = self.config, self.train_config
        assert train is not None
        record: dict[str, Any] = {}
        with self._batches(self.dataset, train.global_batch_size, start_sample=self.consumed_samples, prefetch=config.data.prefetch) as batches:
            first = self.step
            while self.step < train.steps:
                if self.step > first:  # the first step belongs to the start
                    self.watchdog.enter("step", self.step + 1, "data")
                if self.step == first + 1:
                    limit_collectives(self.meshes, config.parallel.timeout_seconds)
                self.stopped = preempt.agreed(self.group, self.device)
                if self.stopped is not None:
                    self.metrics.event("preempted", step=self.step, signal=self.stopped)
                    break
                began = time.perf_counter()
                batch = next(batches)
                loaded = time.perf_counter()
                before = self.tokens
                record = self.train_step(batch)
                seconds = time.perf_counter() - began
                record |= {"step_s": seconds, "data_s": loaded - began, **self.seconds, "tokens_per_s": (self.tokens - before) / seconds}
                record["host_memory_bytes"] = peak_memory()
                self.times.add(seconds, loaded - began, self.waited)
                if record["skipped"]:
                    self.metrics.event("skipped", step=self.step, loss=record["loss"], grad_norm=record["grad_norm"])
                if self.eval_sets and train.eval_every and (self.step % train.eval_every == 0 or self.step == train.steps):
                    record["eval"] = self.evaluate()
                    record["eval_s"] = time.perf_counter() - began - seconds
                if self.step % config.log.every == 0 or self.step == train.steps:
                    record |= {"ranks": times} if (times := self.times.report()) else {}
                self.metrics.log(record)
                self._tell(self.checkpoints.failure)
                if self.bad_in_a_row >= train.max_bad_steps:
                    raise RuntimeError(
                        f"step {self.step}: loss or gradient was not finite in {self.bad_in_a_row} steps in a row (loss {record['loss']}, "
                        f"gradient norm {record['grad_norm']}); lower train.lr, or look at the data of these steps"
                    )
                if config.checkpoint.every and self.step % config.checkpoint.every == 0 and self.step < train.steps:
                    self.save()
        if record:
            self._save_last()
        return record

    def _batches(self, dataset: BlendedDataset, batch_size: int, **options: Any) -> BatchIterator:
        assert self.train_config is not None
        micro = self.train_config.micro_batch_size
        return BatchIterator(dataset, global_batch_size=batch_size, micro_batch_size=micro, dp_rank=self.rank, dp_world=self.world, **options)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """`evaluate.evaluate` on the sets of `data.eval`, without the figures by layer. Collective."""
        assert self.train_config is not None
        results = evaluate(
            self.model, self.eval_sets, batch_size=self.train_config.micro_batch_size, dtype=self.dtype,
            isolate_documents=self.config.data.isolate_documents, device=self.device, group=self.group,
            tasks=self.config.data.eval_tasks, kinds=self.kinds, progress=lambda: self.watchdog.enter("step", self.step, "evaluation"),
        )  # fmt: skip
        if self.keep_routing and self.rank == 0:
            self._write_routing("eval", routing_sets(results))
        return {name: {k: v for k, v in result.items() if not isinstance(v, (list, dict))} for name, result in results.items()}

    def _write_routing(self, part: str, sets: dict[str, dict[str, Any]]) -> None:
        try:
            write_routing(self.config.run_dir, part, self.step, sets)
        except OSError as error:  # a full disk: the next picture takes its place
            warnings.warn(f"{error.filename}: {error.strerror}; the picture of the routing is that of an earlier step", stacklevel=2)

    def close(self) -> None:
        """Wait for writing threads and leave the process group."""
        self.watchdog.enter("checkpoint", self.step, "end")
        self.checkpoints.close()
        self.metrics.close()


def peak_memory() -> int:
    """Bytes of main memory that this process has used at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _differences(old: Any, new: Any, name: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for k in {**old, **new} for line in _differences(old.get(k), new.get(k), f"{name}.{k}")]
    return [] if old == new else [f"{name}: {old} there, {new} here"]


def run(config: Config) -> None:
    """`moetrain train`: the run of this rank, from launch to the last checkpoint."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    watchdog = Watchdog(config.watchdog, config.run_dir, rank=rank, world=world, collective_seconds=config.parallel.timeout_seconds)
    watchdog.start()
    try:
        with restarts.alone(config.run_dir) if rank == 0 else contextlib.nullcontext():
            _run(config, watchdog)
    except BaseException as error:
        watchdog.failed(error)
        raise
    finally:
        watchdog.close()


def _run(config: Config, watchdog: Watchdog) -> None:
    try:
        trainer = Trainer(config, watchdog=watchdog)
    except Exception as error:
        watchdog.failed(error)
        if watchdog.rank == 0:
            with contextlib.suppress(OSError):
                again = {"retry": False} if isinstance(error, restarts.NoProgress) else {}
                preempt.write_status(config.run_dir, "failed", step=0, steps_done=0, **again, error=preempt.first_line(error))
        raise
    with preempt.reporting(config.run_dir, trainer):
        try:
            if trainer.step >= trainer.train_config.steps:
                if trainer.rank == 0:
                    print(f"nothing to do: {config.run_dir} has already done {trainer.step} of {trainer.train_config.steps} steps")
            trainer.train()
            if trainer.stopped is not None and trainer.rank == 0:
                print(f"{trainer.stopped}: saved at step {trainer.step} of {trainer.train_config.steps}; the same command goes on from here")
        except BaseException as error:
            watchdog.failed(error)  # before `close`, which would wait for ranks that are gone
            raise
        finally:
            trainer.close()
    if dist.is_initialized():
        dist.destroy_process_group()
