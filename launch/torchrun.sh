#!/usr/bin/env bash
# Train on one or several nodes with torchrun: the same line on every node.
#
#   one node:      bash launch/torchrun.sh --config my.yaml
#   several nodes: NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash launch/torchrun.sh --config my.yaml     (NODE_RANK=1, 2, 3 elsewhere)
#
# NPROC: processes per node (default: its GPUs, or 1). MASTER_PORT (29500), RUN_ID (moetrain), MAX_RESTARTS (0).
set -euo pipefail
nodes=${NNODES:-1}
processes=${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
if [ "$nodes" -eq 1 ]; then
    rendezvous=(--standalone)
else
    : "${MASTER_ADDR:?set MASTER_ADDR to the address of node 0}" "${NODE_RANK:?set NODE_RANK to 0 on the first node, 1 on the next}"
    # Said outright who hosts the rendezvous: a node does not always recognise its own address.
    is_host=0
    [ "$NODE_RANK" -eq 0 ] && is_host=1
    rendezvous=(--nnodes "$nodes" --node-rank "$NODE_RANK" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}"
        --rdzv-id "${RUN_ID:-moetrain}" --rdzv-conf "is_host=$is_host")
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A store of its own for each start of the ranks: in a shared one they find each other's addresses of the start before.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun "${rendezvous[@]}" --nproc-per-node "$processes" --max-restarts "${MAX_RESTARTS:-0}" -m moetrain train "$@"
