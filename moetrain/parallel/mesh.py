"""Which rank does what: the axes dp_replicate x dp_shard x ep, ep innermost so that ranks which exchange tokens are neighbours.

Every rank has data of its own. Dense parameters are sharded over dp_shard x ep, taken as one axis; experts are sharded over ep by expert and,
inside, over dp_shard. dp_replicate holds copies of both.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moetrain.config import ParallelConfig


@dataclass(frozen=True)
class Meshes:
    """dense: where dense parameters are sharded, (dp_replicate,) dp_shard x ep. experts: where a rank's experts are sharded further,
    (dp_replicate,) dp_shard; None when those axes have one rank. ep: None with one rank."""

    dense: DeviceMesh
    experts: DeviceMesh | None
    ep: DeviceMesh | None

    @property
    def ep_group(self) -> dist.ProcessGroup | None:
        return None if self.ep is None else self.ep.get_group()


def start_processes(timeout_seconds: float) -> torch.device:
    """Join the launcher's process group (torchrun, deepspeed or anything that sets RANK, WORLD_SIZE and LOCAL_RANK), or do without one.

    Returns this rank's device: its CUDA device when CUDA is usable, else the CPU. Raises ValueError if there are fewer devices than ranks.
    """
    local_rank, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"local rank {local_rank} has no GPU of its own ({torch.cuda.device_count()} found); start fewer processes per node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_seconds))
    return device


def build_meshes(parallel: ParallelConfig, device: torch.device) -> Meshes | None:
    """parallel: with dp_shard filled in (`config.check_world`). None for one rank."""
    sizes = (parallel.dp_replicate, parallel.dp_shard, parallel.ep)
    if sizes == (1, 1, 1):
        return None
    root = init_device_mesh(device.type, sizes, mesh_dim_names=("dp_replicate", "dp_shard", "ep"))
    shard = root["dp_shard", "ep"]._flatten("dense_shard")
    replicas = parallel.dp_replicate > 1
    dense = _join(root, parallel, "dense_shard") if replicas else shard
    experts = None
    if replicas:
        experts = root["dp_replicate", "dp_shard"]
    elif parallel.dp_shard > 1:
        experts = root["dp_shard"]
    return Meshes(dense, experts, root["ep"] if parallel.ep > 1 else None)


def limit_collectives(meshes: Meshes | None, timeout_seconds: float) -> None:
    """From now on a collective over all ranks or over an axis ends with an error after so long. A group made for an axis else has its backend's own
    limit (gloo: 30 minutes), whatever the whole group was given."""
    if meshes is None:
        return
    groups = {dist.group.WORLD}
    for mesh in (meshes.dense, meshes.experts, meshes.ep):
        groups |= set() if mesh is None else set(mesh.get_all_groups())
    for group in groups:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)


def _join(root: DeviceMesh, parallel: ParallelConfig, name: str) -> DeviceMesh:
    # A mesh of its own: slicing a flattened axis together with a plain one is not possible in every torch from 2.10 on.
    return init_device_mesh(root.device_type, (parallel.dp_replicate, parallel.dp_shard * parallel.ep), mesh_dim_names=("dp_replicate", name))
