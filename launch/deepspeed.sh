#!/usr/bin/env bash
# Train under the deepspeed launcher; it starts the same program as torchrun.
#
#   one node:      bash launch/deepspeed.sh --config my.yaml
#   several nodes: HOSTFILE=hosts bash launch/deepspeed.sh --config my.yaml      (lines such as "node1 slots=8"; needs ssh to each)
#
# NPROC: processes per node (default: its GPUs, or 1).
set -euo pipefail
processes=${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ -n "${HOSTFILE:-}" ]; then
    where=(--hostfile "$HOSTFILE")
else
    where=(--num_gpus "$processes")
fi
exec deepspeed "${where[@]}" --no_local_rank --module moetrain train "$@"
