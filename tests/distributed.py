"""Real processes for tests: gloo on this machine, one thread each (two busy threads on shared cores are many times slower than one)."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _enter(rank: int, function: Callable[..., Any], world: int, port: int, args: tuple, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
        results.put((rank, True, function(*args)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise SystemExit(1) from None


def run(function: Callable[..., Any], world: int, *args: Any, timeout: float = 120) -> list[Any]:
    """function(*args) in `world` processes of one process group; their results in the order of ranks. Results are plain numbers, lists or
    numpy arrays. The first failing rank's traceback is raised."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "torch.distributed.fsdp", "torch._dynamo", "moetrain.ops"])
    results = context.Queue()
    processes = [context.Process(target=_enter, args=(r, function, world, port, args, results), daemon=True) for r in range(world)]
    for p in processes:
        p.start()
    found: dict[int, Any] = {}
    try:
        for _ in range(world):
            rank, ok, value = results.get(timeout=timeout)
            if not ok:
                raise AssertionError(f"rank {rank} of {world} failed:\n{value}")
            found[rank] = value
        for p in processes:
            p.join(timeout=30)
    finally:
        for p in processes:
            if p.is_alive():
                p.kill()
    return [found[r] for r in range(world)]
