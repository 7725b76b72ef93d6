#!/usr/bin/env bash
# Run `vlv ARGUMENTS` on GPUS processes, and on NODES machines where there are several: start it on each of them.
#
#   GPUS=8 runs/launch.sh train paper-stage1 --run-dir runs/stage1
#   GPUS=8 NODES=8 HEAD=node0:29500 runs/launch.sh train ...     HEAD: the same on every node, a free port on one of them
#   GPUS=8 ACCELERATE=my.yaml runs/launch.sh train ...           by `accelerate launch` with that configuration
set -euo pipefail
GPUS=${GPUS:-1}
NODES=${NODES:-1}
PYTHON=${PYTHON:-python}

if [[ -n ${ACCELERATE:-} ]]; then
  exec "$PYTHON" -m accelerate.commands.launch --config_file "$ACCELERATE" -m vlv "$@"
elif ((NODES > 1)); then
  exec "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$GPUS" \
    --rdzv-backend c10d --rdzv-id vlv --rdzv-endpoint "${HEAD:?name the first machine: HEAD=node0:29500}" -m vlv "$@"
elif ((GPUS > 1)); then
  exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" -m vlv "$@"
fi
exec "$PYTHON" -m vlv "$@"
