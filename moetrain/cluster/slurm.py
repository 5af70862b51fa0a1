"""sbatch script: one task per node, torchrun in it.

Before the time limit Slurm sends `slurm.signal` to every process of the step (not to the batch script, hence no `B:`), torchrun among them, which
would die of it: so it starts with the signal ignored, which passes through exec, and only the ranks listen. They save together and end well, and
`status.json` tells this script that there is more to do. SIGTERM (scancel, preemption, `scontrol requeue`) goes to all processes, this script
included: the ranks save as well, and whether the job comes back is Slurm's business.
"""

from __future__ import annotations

from moetrain.cluster.job import ENDED, LINT, PREEMPTED, Job, preflight_words, quote, quoted, surroundings, train_words
from moetrain.cluster.options import ClusterConfig
from moetrain.config import ConfigError

_ADDRESS = r"""# The others find the first node by its address: a node's name need not resolve inside the cluster.
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
address="$(timeout 120 srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | tr ' ' '\n' | grep -m 1 -E '^[0-9]+(\.[0-9]+){3}$')"
if [ -z "$address" ]; then
    echo "moetrain: node $head names no IPv4 address (hostname --ip-address)" >&2
    exit 1
fi
endpoint="$address:$((20000 + SLURM_JOB_ID % 20000))"
# A restarted job must not meet what is left of its last start.
attempt="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
"""

_SECONDS_TO_SEE = 90


def render(cluster: ClusterConfig, job: Job) -> str:
    """Text for `sbatch`. Raises ConfigError for a folder that sbatch can't write logs to."""
    options = cluster.slurm
    assert options is not None, "the caller chose by cluster.kind"
    if "\\" in job.folder:
        raise ConfigError(f"folder {job.folder}: Slurm does not write logs to a path with a backslash; choose another run_dir")
    directives: dict[str, str | int | None] = {
        "job-name": job.name,
        "nodes": cluster.num_nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": cluster.gpus_per_node or None,
        "cpus-per-task": options.cpus_per_node,
        "mem": options.memory_per_node,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "reservation": options.reservation,
        "constraint": options.constraint,
        "exclude": options.exclude,
        "time": options.time,
        "signal": f"{options.signal}@{options.notice_seconds}",
        # %% is a percent sign to Slurm, %j the job's number.
        "output": job.folder.replace("%", "%%") + "/slurm-%j.log",
        "open-mode": "append",
        **options.options,
    }
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{name}={_directive(value)}" for name, value in directives.items() if value is not None]
    lines += ["#SBATCH --exclusive"] if options.exclusive else []
    lines += ["#SBATCH --requeue" if options.requeue else "#SBATCH --no-requeue"]
    lines += ["# Written by `moetrain submit`: one task per node, torchrun in it.", LINT, ""]
    lines += [f"module load {quoted(list(options.modules))}"] if options.modules else []
    # set comes after them: modules and the user's file may not stand it.
    lines += [*surroundings(cluster, job.workdir), "set -uo pipefail", "", _ADDRESS]
    srun = ["srun", "--kill-on-bad-exit=1", "--label"]
    srun += [f"--cpus-per-task={options.cpus_per_node}"] if options.cpus_per_node else []  # not handed down by sbatch since Slurm 22.05
    lines += [
        "# $0 is the interpreter, $1 and $2 endpoint and id of the rendezvous; the rest are torchrun's words.",
        "node='endpoint=$1 id=$2; shift 2",
        f'trap "" {options.signal}',
        'exec "$0" -m torch.distributed.run --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$id" \\',
        f'    --rdzv-conf "is_host=$((SLURM_NODEID == 0))" --nnodes {cluster.num_nodes} --nproc-per-node {cluster.ranks_per_node} "$@"\'',
        f"python={quote(job.python)}",
        "",
    ]
    if cluster.preflight:
        words = quoted(["--max-restarts", "0", *preflight_words(job.config_file)])
        lines += [f'{quoted(srun)} bash -c "$node" "$python" "$endpoint" "preflight-$attempt" \\', f"    {words} || exit", ""]
    words = quoted(["--max-restarts", str(cluster.max_restarts), *train_words(job.config_file)])
    status = quote(job.status_file)
    lines += [
        f"rm -f -- {status}",
        f'{quoted(srun)} bash -c "$node" "$python" "$endpoint" "$attempt" \\',
        f"    {words}",
        "code=$?",
    ]
    if options.requeue:
        lines += [
            "# The ranks have written how it ended; a network file system may be late to show it.",
            f"for _ in {{1..{_SECONDS_TO_SEE}}}; do",
            f"    if [ \"$code\" -ne 0 ] || grep -qsE -- '{ENDED}' {status}; then break; fi",
            "    sleep 1",
            "done",
            f"if grep -qs -- {quote(PREEMPTED)} {status}; then",
            f"    if grep -qs -- '\"steps_done\": 0,' {status}; then",
            '        echo "moetrain: asked to stop before the first step was done; not requeued: raise cluster.slurm.time" >&2',
            "        exit 1",
            "    fi",
            '    echo "moetrain: saved and asked to stop; requeueing job $SLURM_JOB_ID" >&2',
            '    scontrol requeue "$SLURM_JOB_ID"',
            "    exit",
            "fi",
        ]
    lines += ['exit "$code"', ""]
    return "\n".join(lines)


def _directive(value: str | int) -> str:
    """A value behind `#SBATCH --name=`: sbatch takes quotes off itself, reads a backslash as an escape everywhere and `#` as a comment."""
    if isinstance(value, int) or (value.isascii() and all(c.isalnum() or c in "._-/:,@+%=" for c in value)):
        return str(value)
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
