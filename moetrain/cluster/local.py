"""This machine: one torchrun. SIGTERM to the script's process group makes the ranks save and end."""

from __future__ import annotations

from moetrain.cluster.job import LINT, Job, preflight_words, quote, quoted, surroundings, train_words
from moetrain.cluster.options import ClusterConfig


def render(cluster: ClusterConfig, job: Job) -> str:
    """Text for bash, to be started in a session of its own."""
    torchrun = f'"$python" -m torch.distributed.run --standalone --nproc-per-node {cluster.ranks_per_node} --max-restarts'
    lines = [
        "#!/bin/bash",
        "# Written by `moetrain submit`.",
        LINT,
        *surroundings(cluster, job.workdir),
        "# A notice to save is for the ranks; torchrun, which would die of it, inherits that it is ignored.",
        "trap '' USR1 USR2",
        f"rm -f -- {quote(job.status_file)}",
        f"python={quote(job.python)}",
    ]
    if cluster.preflight:
        lines += [f"{torchrun} 0 {quoted(preflight_words(job.config_file))} || exit"]
    return "\n".join([*lines, f"exec {torchrun} {cluster.max_restarts} {quoted(train_words(job.config_file))}", ""])
