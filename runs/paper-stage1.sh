#!/usr/bin/env bash
# Stage 1 of the paper: 200,000 steps of 512 images, on one GPU or many. It says what it will do, and does it; run it
# again to go on after an interruption.
#
#   DATA=/data/images runs/paper-stage1.sh
#   DATA=/data/images HELD_OUT=/data/watched GPUS=8 USD_PER_GPU_HOUR=2.5 runs/paper-stage1.sh
#   DATA=/data/images DRY_RUN=1 runs/paper-stage1.sh               only says it
#   DATA=/data/images runs/paper-stage1.sh --set loop.precision=bf16 --set loop.batch_size=64     any option of vlv train
#
# DATA and HELD_OUT: folders, globs, shards, separated by commas. RUN: the run folder. CONFIG: another preset or file,
# such as official-stage1. GPUS, NODES, HEAD, ACCELERATE, PYTHON: see launch.sh.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
: "${DATA:?name the images: DATA=/data/images $0}"
RUN=${RUN:-runs/stage1}
options=("${CONFIG:-paper-stage1}" --run-dir "$RUN" --set "data.inputs=[$DATA]")
[[ -z ${HELD_OUT:-} ]] || options+=(--set "data.held_out=[$HELD_OUT]")
[[ -z ${USD_PER_GPU_HOUR:-} ]] || options+=(--usd-per-gpu-hour "$USD_PER_GPU_HOUR")

"${PYTHON:-python}" -m vlv train "${options[@]}" "$@" --dry-run --processes $((${GPUS:-1} * ${NODES:-1}))
[[ -n ${DRY_RUN:-} ]] || exec "$here/launch.sh" train "${options[@]}" "$@"
