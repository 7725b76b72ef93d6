#!/usr/bin/env bash
# From pictures to a caption decoder that has learnt from a teacher's captions: filter, caption, stats, check, train.
# As it stands it needs nothing but what is shipped, and a few minutes on two cores: the pictures are rendered scenes, the
# teacher is vlv-tiny. Your own: IMAGES="/data/photos /data/shards", and a real teacher such as
# TEACHER="--endpoint http://127.0.0.1:8000/v1 --model Qwen/Qwen2.5-VL-7B-Instruct --prompt exhaustive".
# Every step goes on where it was interrupted: run the script again.
set -euo pipefail
OUT=${OUT:-out/dataset}
SEED=${SEED:-0}
NUM=${NUM:-200}      # scenes to render
STEPS=${STEPS:-20}   # of training
IMAGES=${IMAGES:-}   # more pictures, or pictures instead when NUM is 0
TEACHER=${TEACHER:---model vlv-tiny}

if [ "$NUM" -gt 0 ]; then
  vlv toyworld render "$OUT/scenes" --split train --num "$NUM" --seed "$SEED"
  IMAGES="$OUT/scenes $IMAGES"
fi
vlv toyworld render "$OUT/held-out" --split val --num 16 --seed "$SEED"

# shellcheck disable=SC2086  # several inputs and options
{
  vlv data filter $IMAGES --output "$OUT/filtered" --config relaxed
  vlv data caption "$OUT/filtered" --output "$OUT/captioned" --format parquet --format jsonl --seed "$SEED" $TEACHER
}
vlv data stats "$OUT/captioned/*.parquet" --output "$OUT/stats.html" --seed "$SEED"
vlv data check "$OUT/captioned/*.parquet"

vlv train tiny-captions-stage2 --run-dir "$OUT/run" --seed "$SEED" \
  --set model.encoder=vlv-tiny --set model.decoder=vlv-tiny --set model.caption_decoder=vlv-tiny \
  --set "data.inputs=[$OUT/captioned/*.parquet]" --set "data.held_out=[$OUT/held-out]" \
  --set loop.steps="$STEPS" --set loop.batch_size=8 --set optim.warmup_steps=2
