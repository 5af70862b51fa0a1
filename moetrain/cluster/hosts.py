"""A list of hosts over ssh, without a scheduler: torchrun on each, or the deepspeed launcher with a hostfile.

What a host runs goes to the standard input of its bash: nothing is quoted twice on the way, and a secret is in no argument list and no file.
"""

from __future__ import annotations

import re

from moetrain.cluster.job import LINT, OVER, Job, preflight_words, quote, quoted, surroundings, train_words
from moetrain.cluster.options import ClusterConfig
from moetrain.config import ConfigError

_END = "END_OF_NODE"

# torchrun starts its ranks again, but dies itself where it loses the rendezvous on the first host, by a link that is down for over a minute.
_LAUNCH = r"""asked=0 child=
trap 'asked=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM
launch() {
    [ "$asked" -eq 0 ] || return 143
    "$@" </dev/null &
    child=$!
    [ "$asked" -eq 0 ] || kill -TERM "$child" 2>/dev/null
    while :; do
        wait "$child"
        code=$?
        kill -0 "$child" 2>/dev/null || return "$code"
    done
}"""

_WATCH = r"""nodes=() others=() stopping=0 code=0
# ssh without a terminal hands no signal on, so each node has left the process number of its launcher.
stop() {
    local i # apart from that of the loops in whose middle this runs
    [ "$stopping" -eq 0 ] || return 0
    stopping=1
    for i in "${!hosts[@]}"; do
        printf 'for _ in {1..30}; do read -r pid < %q && kill -TERM "$pid" && break; sleep 1; done\n' "$folder/node-$i.pid" |
            "${ssh[@]}" "${hosts[i]}" bash -s 2>/dev/null &
        others+=("$!")
    done
}
trap stop TERM INT HUP
rm -f -- "$folder"/node-*.pid
for i in "${!hosts[@]}"; do
    node "$i" &
    nodes[i]=$!
done
# The first that fails ends the others: they would wait for it. (`wait -n` does not see one that has ended before it is called.)
while [ "${#nodes[@]}" -gt 0 ]; do
    for i in "${!nodes[@]}"; do
        kill -0 "${nodes[i]}" 2>/dev/null && continue
        wait "${nodes[i]}" || { code=$?; echo "moetrain: host ${hosts[i]} ended with status $code" >&2; stop; }
        unset "nodes[i]"
    done
    sleep 1 &
    wait "$!" # not `sleep 1` alone: a trap waits for that
done
[ "${#others[@]}" -eq 0 ] || wait "${others[@]}"
exit "$code"
"""


def render(cluster: ClusterConfig, job: Job) -> str:
    """Text for bash on the machine that submits; it lives as long as the run. Raises ConfigError for a path that the deepspeed launcher,
    which quotes poorly, can't be given."""
    options = cluster.hosts
    assert options is not None, "the caller chose by cluster.kind"
    lines = ["#!/bin/bash", "# Written by `moetrain submit`; it lives as long as the run does.", LINT, "set -uo pipefail"]
    if options.launcher == "deepspeed":
        return "\n".join([*lines, *_deepspeed(cluster, job), ""])
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=30"]
    ssh += ["-p", str(options.ssh_port)] if options.ssh_port else []
    ssh += ["-i", options.ssh_key] if options.ssh_key else []
    address = options.address or options.hosts[0].rpartition("@")[2]
    torchrun = [
        "-m", "torch.distributed.run", "--nnodes", str(cluster.num_nodes), "--nproc-per-node", str(cluster.ranks_per_node),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:{options.port}",
    ]  # fmt: skip
    torchrun = f'"$python" {quoted(torchrun)} --rdzv-conf "is_host=$((node == 0))"'
    lines += [
        f"hosts=({quoted(list(options.hosts))})",
        f"folder={quote(job.folder)}",
        f"ssh=({quoted([*ssh, '--'])})",
        *(f': "${{{name}:?named in cluster.secrets, but not set}}"' for name in cluster.secrets),
        f"rm -f -- {quote(job.status_file if job.status_file.startswith('/') else f'{job.workdir}/{job.status_file}')}",
        "",
        "node() {",
        "    {",
        "        printf 'node=%d\\n' \"$1\"",
        *(f"        printf 'export {name}=%q\\n' \"${name}\"" for name in cluster.secrets),
        f"        cat <<'{_END}'",
        *surroundings(cluster, job.workdir),
        f"printf '%s\\n' \"$$\" >{quote(job.folder)}\"/node-$node.pid\"",
        "trap '' USR1 USR2",
        f"python={quote(job.python)}",
        *_LAUNCH.splitlines(),
    ]
    if cluster.preflight:
        lines += [f"launch {torchrun} --rdzv-id preflight --max-restarts 0 {quoted(preflight_words(job.config_file))} || exit"]
    lines += [
        f"for ((left = {cluster.max_restarts}; ; left--)); do",
        f"    launch {torchrun} --rdzv-id moetrain --max-restarts {cluster.max_restarts} {quoted(train_words(job.config_file))}",
        "    code=$?",
        f"    if [ \"$code\" -eq 0 ] || [ \"$asked\" -eq 1 ] || [ \"$left\" -eq 0 ] || grep -qsE -- '{OVER}' {quote(job.status_file)}; then",
        '        exit "$code"',
        "    fi",
        '    echo "moetrain: host $node: its launcher has ended with status $code; starting another" >&2',
        "    sleep 5",
        "done",
        _END,
        '    } | "${ssh[@]}" "${hosts[$1]}" bash -s',
        "}",
        _WATCH,
    ]
    return "\n".join(lines)


def hostfile(cluster: ClusterConfig) -> str:
    """DeepSpeed's list of hosts."""
    assert cluster.hosts is not None, "the caller chose by cluster.kind"
    return "".join(f"{host} slots={cluster.ranks_per_node}\n" for host in cluster.hosts.hosts)


def _deepspeed(cluster: ClusterConfig, job: Job) -> list[str]:
    options = cluster.hosts
    assert options is not None, "the caller chose by cluster.kind"
    for name, path in (("run_dir", job.folder), ("folder of the submission", job.workdir), ("python", job.python)):
        if not re.fullmatch(r"[A-Za-z0-9._/-]+", path):
            raise ConfigError(f"{name} {path}: the deepspeed launcher quotes poorly; use letters, digits, . _ - and /, or launcher: torchrun")
    flags = ["--hostfile", f"{job.folder}/hostfile", "--force_multi", "--no_local_rank", "--master_port", str(options.port)]
    flags += ["--master_addr", options.address or options.hosts[0].rpartition("@")[2]]
    flags += ["--ssh_port", str(options.ssh_port)] if options.ssh_port else []
    runner = [job.python, "-m", "deepspeed.launcher.runner", *flags, "--module", "moetrain", "train", "--config", job.config_file]
    return [
        f"cd -- {quote(job.workdir)} || exit",
        f"rm -f -- {quote(job.status_file)}",
        f"cat >{quote(job.folder)}/hostfile <<'{_END}'",
        hostfile(cluster).rstrip("\n"),
        _END,
        f"exec {quoted(runner)}",
    ]
