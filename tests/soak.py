"""Random faults in one run of two ranks, whose experts are spread over both, and what becomes of it:

    python -m tests.soak --faults 100 --seed 1 --table table.md

Nothing in the program under test knows of this: ranks and launcher are killed, stopped and asked to end from outside, files are changed, the
checkpoints' file system is filled, and a weight is made not-a-number by a wrapper around `Trainer.train_step` (this file is the ranks' program, too).
After each fault the run must come further within a bound, from no older checkpoint than the last whole one, and tell in its events or its log what
happened. At the end every number of every step and every weight must equal, bit for bit, those of a run that has skipped the same steps and met no
other fault.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from moetrain.checkpoint import find_damage, find_steps, read_full
from moetrain.cluster.job import FRESH_STORE
from moetrain.config import to_yaml
from moetrain.metrics import deterministic_fields, read_records
from moetrain.preempt import read_status
from tests.test_resume import Run, inode, last_step
from tests.test_train import make_config, write_data

STEPS_PER_FAULT, SAVE_EVERY = 12, 6
COLLECTIVE_SECONDS, STEP_SECONDS = 6, 20
LIMIT = 180.0  # seconds until a run must have come further after a fault: limits, the launcher's own 30 s, a start on a busy machine
NANS = "MOETRAIN_SOAK_NANS"  # {step: rank}, for the ranks' program below
PROGRAM = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "50", "-m", "tests.soak"]


def rank_program(words: list[str]) -> int:
    """`moetrain`, with a weight of one rank's not-a-number in the chosen steps."""
    from moetrain import cli
    from moetrain.train import Trainer

    chosen = {int(step): rank for step, rank in json.loads(os.environ[NANS]).items()}
    step_of = Trainer.train_step

    def poisoned(self: Trainer, batches: Any) -> dict[str, Any]:
        if chosen.get(self.step + 1) != self.rank:
            return step_of(self, batches)
        weight = next(p for name, p in self.parameters.items() if name.endswith("norm.weight"))
        local = (weight.to_local() if isinstance(weight, DTensor) else weight).detach()
        before = local[0].clone()
        local[0] = float("nan")
        try:
            return step_of(self, batches)
        finally:
            local[0] = before

    Trainer.train_step = poisoned  # type: ignore[method-assign]
    return cli.main(words)


class Soak:
    """The run that the faults fall on. Each kind of fault is a method: it does the harm, looks at what follows, and returns the outcome in words."""

    def __init__(self, folder: Path, faults: int, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.tmpfs = os.geteuid() == 0 and shutil.which("mount") is not None
        kinds = [k for k in KINDS if k != "full tmpfs" or self.tmpfs]
        # As many of each kind, in a random order.
        self.kinds = [kinds[i % len(kinds)] for i in range(faults)]
        self.random.shuffle(self.kinds)
        if self.kinds and self.kinds[0] == "flipped byte":  # there must be a checkpoint before the damaged one
            self.kinds.append(self.kinds.pop(0))
        self.targets = [STEPS_PER_FAULT * (i + 1) + self.random.randrange(STEPS_PER_FAULT // 2) for i in range(faults)]
        self.steps = STEPS_PER_FAULT * (faults + 2) + SAVE_EVERY
        self.nans = {t: self.random.randrange(2) for t, k in zip(self.targets, self.kinds) if k == "NaN on one rank"}
        os.environ[FRESH_STORE] = "1"  # as the scripts of `moetrain submit` have it
        os.environ[NANS] = json.dumps(self.nans)
        self.files = {}
        write_data(folder / "a", seed=1)
        write_data(folder / "b", documents=20, seed=2)
        for name in ("whole", "harmed"):
            config = make_config(
                folder, "sampled", (1, 1, 2), run_dir=str(folder / name), train__steps=self.steps, train__dtype="float32", data__prefetch=2,
                checkpoint={"every": SAVE_EVERY}, parallel__timeout_seconds=COLLECTIVE_SECONDS, model__moe__router__target_active=2.5,
                watchdog={"start_seconds": 150.0, "step_seconds": float(STEP_SECONDS), "checkpoint_seconds": float(STEP_SECONDS)},
            )  # fmt: skip
            self.files[name] = folder / f"{name}.yaml"
            self.files[name].write_text(to_yaml(config))
        self.run_dir = folder / "harmed"
        self.checkpoints, self.metrics = self.run_dir / "checkpoints", self.run_dir / "metrics.jsonl"
        self.checkpoints.mkdir(parents=True)
        self.rows: dict[str, list[tuple[str, float, int]]] = defaultdict(list)
        """Kind -> (outcome, seconds until the run was further than before, steps that were done again) of each fault."""
        self.run: Run

    # ---------------------------------------------------------------------------------------------------------- the course

    def go(self) -> None:
        reference = Run(self.files["whole"], 2, PROGRAM)
        with self._mounted():
            self.run = reference
            self._until(reference.ended, "end of the undisturbed run", 120 + 3 * self.steps)
            reference.finish()
            self.run = Run(self.files["harmed"], 2, PROGRAM)
            try:
                for kind, target in zip(self.kinds, self.targets):
                    self._until(lambda t=target: last_step(self.metrics) >= t, f"step {target}")
                    self._harm(kind, target)
                self._until(self.run.ended, "end", LIMIT + 3 * self.steps)
                assert self.run.process.returncode == 0, self.said()[-3000:]
            finally:
                self.run.kill()
            self._compare()

    def _harm(self, kind: str, target: int) -> None:
        self.before, self.file, self.old_events = last_step(self.metrics), inode(self.metrics), len(self.events())
        self.whole, self.began = max(find_steps(self.checkpoints), default=0), time.monotonic()
        outcome = KINDS[kind](self)
        # A start replaces the file, and its lines after the checkpoint are gone.
        self._until(lambda: last_step(self.metrics) > max(self.before, target), f"step beyond {self.before} after {kind}")
        resumed = [e["step"] for e in self.new_events() if e["event"] in ("resume", "restart")]
        lost = max(0, self.before - min(resumed)) if resumed else 0
        assert all(step >= self.whole for step in resumed), f"{kind}: resumed from {resumed}, though step {self.whole} was whole"
        self.rows[kind].append((outcome, time.monotonic() - self.began, lost))
        print(f"{kind} at step {self.before}: {outcome}, {self.rows[kind][-1][1]:.1f} s, {lost} steps again", flush=True)

    def _compare(self) -> None:
        numbers = {}
        for name in self.files:
            # As text, since not-a-number does not equal itself.
            numbers[name] = [json.dumps(deterministic_fields(r)) for r in read_records(self.folder / name)]
        assert len(numbers["whole"]) == len(numbers["harmed"]) == self.steps
        for step, (want, got) in enumerate(zip(numbers["whole"], numbers["harmed"]), 1):
            assert want == got, f"step {step} differs:\n{want}\n{got}"
        skipped = [r["step"] for r in read_records(self.run_dir) if r["skipped"]]
        assert skipped == sorted(self.nans), f"skipped {skipped}, not-a-number in {sorted(self.nans)}"
        weights = [dict(read_full(self.folder / name / f"checkpoints/step-{self.steps:08d}")) for name in self.files]
        assert weights[0].keys() == weights[1].keys()
        for name, tensor in weights[0].items():
            assert torch.equal(tensor.view(torch.uint8), weights[1][name].view(torch.uint8)), f"{name} differs"
        assert not list(self.checkpoints.glob("*.tmp"))

    # ---------------------------------------------------------------------------------------------------------- the faults

    def kill_rank(self) -> str:
        os.kill(self._pid(self.random.randrange(2)), signal.SIGKILL)
        self._restarted()
        return "restarted by torchrun"

    def kill_launcher(self) -> str:
        self.run.process.kill()
        # The ranks see that they are alone, save and end.
        self._until(lambda: not self.run.processes(), "end of the ranks without a launcher", 60)
        status = read_status(self.run_dir)
        self.run.kill()
        self._start()
        assert status["state"] == "preempted" and self._newest("launcher_gone"), status
        self.whole = status["step"]
        return "ranks saved and ended; started again"

    def stop_short(self) -> str:
        pid = self._pid(self.random.randrange(2))
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self.random.uniform(0.2, 0.3 * COLLECTIVE_SECONDS))
        os.kill(pid, signal.SIGCONT)
        self._until(lambda: last_step(self.metrics) > self.before, "step after a short stop")
        assert inode(self.metrics) == self.file, "restarted after a stop shorter than the limits\n" + self.said()[-3000:]
        return "went on"

    def stop_long(self) -> str:
        rank = self.random.randrange(2)
        pid = self._pid(rank)
        os.kill(pid, signal.SIGSTOP)
        try:
            self._until(lambda: self._newest("collective_failed", "watchdog"), "end of the peer", STEP_SECONDS + 15)
            event = self._newest("collective_failed", "watchdog")
            assert event["rank"] == 1 - rank, event
            line = next(x for x in reversed(self.said().splitlines()) if x.startswith(f"moetrain rank {1 - rank}: error:"))
            # Where it waited, and for whom.
            assert ("failed: " in line or "over watchdog." in line) and f"rank {rank} (" in line, line
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._restarted()
        return f"peer named it and ended ({event['event']}); restarted by torchrun"

    def flip_byte(self) -> str:
        self._until(lambda: len(find_steps(self.checkpoints)) > 1, "two checkpoints")
        self.run.kill()
        *_, before, newest = find_steps(self.checkpoints)
        folder = self.checkpoints / f"step-{newest:08d}"
        path = self.random.choice(sorted(folder.iterdir()))
        with open(path, "r+b") as file:
            place = self.random.randrange(path.stat().st_size)
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << self.random.randrange(8)]))
        # A bit that makes another letter of an unused word of JSON's is no damage.
        damaged, self.whole = find_damage(folder) is not None, before
        self._start()
        self._restarted()
        if damaged:
            self._until(lambda: self._newest("fallback"), "word of the damaged checkpoint", 30)
            assert self._newest("fallback")["step"] == newest, path
        return "fell back to the one before" if damaged else "no damage to what is read"

    def cut_data(self) -> str:
        path = self.folder / self.random.choice(["a.bin", "b.bin"])
        whole, size = path.read_bytes(), len(self.said())
        os.truncate(path, self.random.randrange(len(whole) // 2))
        try:
            self._until(lambda: f"{path.name}: cut short" in self.said()[size:], "word of the cut file", LIMIT)
        finally:
            # The same file, for a run that has it mapped.
            with open(path, "r+b") as file:
                file.write(whole)
        self._restarted()
        return "named the file; restarted when it was whole"

    def nan(self) -> str:
        self._until(lambda: any(e["event"] == "skipped" for e in self.new_events()) or self._skipped(), "skipped step")
        return "skipped on both ranks"

    def term_in_save(self) -> str:
        self._until(lambda: any(self.checkpoints.glob("step-*.tmp")), "save under way")
        self.run.process.send_signal(signal.SIGTERM)
        self._until(lambda: not self.run.processes(), "end after SIGTERM", 90)
        status = read_status(self.run_dir)
        assert status["state"] == "preempted" and find_damage(self.checkpoints / f"step-{status['step']:08d}") is None, status
        self.whole = status["step"]
        self.run.kill()
        self._start()
        return "saved and ended; started again"

    def fill(self) -> str:
        ballast = self.checkpoints / "ballast"
        with open(ballast, "wb", buffering=0) as file:
            with suppress(OSError):
                while True:
                    file.write(bytes(4096))
        try:
            self._until(lambda: self._newest("checkpoint_failed"), "failed checkpoint")
            assert max(find_steps(self.checkpoints)) >= self.whole
        finally:
            ballast.unlink()
        newest = max(find_steps(self.checkpoints))
        assert find_damage(self.checkpoints / f"step-{newest:08d}") is None
        self._until(lambda: max(find_steps(self.checkpoints)) > newest, "checkpoint after there was room again")
        assert inode(self.metrics) == self.file, "restarted because of a full disk\n" + self.said()[-3000:]
        return "went on; the next checkpoint was written"

    # ------------------------------------------------------------------------------------------------------------- helpers

    def _start(self) -> None:
        self.run = Run(self.files["harmed"], 2, PROGRAM)

    def _restarted(self) -> None:
        self._until(lambda: inode(self.metrics) not in (None, self.file), "restart")

    def _pid(self, rank: int) -> int:
        self._until(lambda: len(self.run.processes(f"RANK={rank}")) == 1, f"rank {rank}")
        return self.run.processes(f"RANK={rank}")[0]

    def _skipped(self) -> bool:
        return any(r["skipped"] and r["step"] >= self.before for r in read_records(self.run_dir))

    def _until(self, true: Callable[[], Any], what: str, limit: float = LIMIT) -> None:
        end = time.monotonic() + limit
        while not true():
            assert time.monotonic() < end, f"no {what} in {limit:.0f} s\n" + self.said()[-6000:]
            code = self.run.process.poll()
            assert code in (None, 0) or "end" in what, f"the launcher ended with {code} before {what}\n" + self.said()[-6000:]
            time.sleep(0.02)

    def events(self) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in (self.run_dir / "events.jsonl").read_text().splitlines()]
        except OSError:
            return []

    def new_events(self) -> list[dict[str, Any]]:
        return self.events()[self.old_events :]

    def _newest(self, *kinds: str) -> dict[str, Any] | None:
        return next((e for e in reversed(self.new_events()) if e["event"] in kinds), None)

    def said(self) -> str:
        log = self.run_dir.with_suffix(".log")
        return log.read_text(errors="replace") if log.exists() else ""

    @contextmanager
    def _mounted(self) -> Iterator[None]:
        """A small file system for the checkpoints, that can be filled."""
        if not self.tmpfs:
            print("no tmpfs: mounting needs root; the fault `full tmpfs` is left out", flush=True)
            yield
            return
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "soak", str(self.checkpoints)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", str(self.checkpoints)], check=True)

    def table(self) -> str:
        """Markdown: a row for each kind of fault."""
        lines = ["| fault | count | outcome | seconds to be further: median, worst | steps done again: median, worst |", "|---|---|---|---|---|"]
        for kind in KINDS:
            rows = self.rows.get(kind)
            if rows:
                outcomes = "; ".join(f"{n} {text}" for text, n in Counter(o for o, _, _ in rows).most_common())
                seconds, lost = [s for _, s, _ in rows], [n for _, _, n in rows]
                cells = f"{median(seconds):.1f}, {max(seconds):.1f} | {median(lost):.0f}, {max(lost)}"
                lines.append(f"| {kind} | {len(rows)} | {outcomes} | {cells} |")
        return "\n".join(lines) + "\n"


KINDS: dict[str, Callable[[Soak], str]] = {
    "kill -9 of a rank": Soak.kill_rank,
    "kill -9 of the launcher": Soak.kill_launcher,
    "stop of a rank, shorter than the limit": Soak.stop_short,
    "stop of a rank, longer": Soak.stop_long,
    "flipped byte": Soak.flip_byte,
    "cut data file": Soak.cut_data,
    "NaN on one rank": Soak.nan,
    "SIGTERM during a save": Soak.term_in_save,
    "full tmpfs": Soak.fill,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--faults", type=int, default=len(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(Path(folder), options.faults, options.seed)
        began = time.monotonic()
        try:
            soak.go()
        finally:
            text = soak.table()
            print(text)
    told = f"{options.faults} faults, seed {options.seed}, {soak.steps} steps, {time.monotonic() - began:.0f} s in all; every step's numbers and the "
    told += f"last weights equal bit for bit. torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores."
    print(told)
    if options.table:
        options.table.write_text(f"{text}\n{told}\n")
    return 0


if __name__ == "__main__":
    sys.exit(rank_program(sys.argv[1:]) if "LOCAL_RANK" in os.environ else main())
