#!/usr/bin/env bash
# Stage 2 of the paper: 100,000 steps of 64 images with captions; psi first, then the language model, then the encoder.
# It says what it will do, and does it; run it again to go on after an interruption.
#
#   DATA=/data/captioned runs/paper-stage2.sh
#   DATA=/data/captioned STAGE1=runs/stage1/model GPUS=8 USD_PER_GPU_HOUR=2.5 runs/paper-stage2.sh
#   DATA=/data/captioned DRY_RUN=1 runs/paper-stage2.sh            only says it
#   DATA=/data/captioned runs/paper-stage2.sh --set base=paper-1.5b       any option of vlv train
#
# DATA and HELD_OUT: folders, globs, shards, separated by commas. STAGE1: the model of stage 1. RUN: the run folder.
# CONFIG: another preset or file, such as official-stage2. GPUS, NODES, HEAD, ACCELERATE, PYTHON: see launch.sh.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
: "${DATA:?name the images with captions: DATA=/data/captioned $0}"
RUN=${RUN:-runs/stage2}
options=("${CONFIG:-paper-stage2}" --run-dir "$RUN" --set "data.inputs=[$DATA]")
options+=(--set "model.encoder=${STAGE1:-runs/stage1/model}")
[[ -z ${HELD_OUT:-} ]] || options+=(--set "data.held_out=[$HELD_OUT]")
[[ -z ${USD_PER_GPU_HOUR:-} ]] || options+=(--usd-per-gpu-hour "$USD_PER_GPU_HOUR")

"${PYTHON:-python}" -m vlv train "${options[@]}" "$@" --dry-run --processes $((${GPUS:-1} * ${NODES:-1}))
[[ -n ${DRY_RUN:-} ]] || exec "$here/launch.sh" train "${options[@]}" "$@"
