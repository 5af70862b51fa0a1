"""This machine: one torchrun. SIGTERM to the script's process group makes the ranks save and end."""

from __future__ import annotations

import shlex

from moetrain.cluster.job import Job, preflight_words, quoted, surroundings, train_words
from moetrain.cluster.options import ClusterConfig


def render(cluster: ClusterConfig, job: Job) -> str:
    """Text for bash, to be started in a session of its own."""
    torchrun = [job.python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cluster.ranks_per_node), "--max-restarts"]
    lines = [
        "#!/bin/bash",
        "# Written by `moetrain submit`.",
        *surroundings(cluster, job.workdir),
        "# A notice to save is for the ranks; torchrun, which would die of it, inherits that it is ignored.",
        "trap '' USR1 USR2",
        f"rm -f -- {shlex.quote(job.status_file)}",
    ]
    if cluster.preflight:
        lines += [f"{quoted([*torchrun, '0', *preflight_words(job.config_file)])} || exit"]
    return "\n".join([*lines, f"exec {quoted([*torchrun, str(cluster.max_restarts), *train_words(job.config_file)])}", ""])
