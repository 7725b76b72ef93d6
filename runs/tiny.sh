#!/usr/bin/env bash
# From nothing to a finished vlv-tiny: several hours on two cores.
# Every step goes on where it was interrupted: run the script again. Steps that are done cost nothing.
set -euo pipefail
OUT=${OUT:-out/tiny}
SEED=${SEED:-0}

vlv toyworld render "$OUT/data/train" --split train --num 40000 --seed "$SEED"
vlv toyworld render "$OUT/data/val" --split val --num 1000 --seed "$SEED"

for part in inspector vae text unet vision florence llm vae_decoder; do
  vlv toyworld pretrain "$part" --data "$OUT/data/train" --models "$OUT/parts" \
    --run "$OUT/runs/$part" --seed "$SEED"
done

for stage in stage1 stage2; do
  vlv train "tiny-$stage" --run-dir "$OUT/runs/$stage" --seed "$SEED"
done
vlv train tiny-captions-stage2 --run-dir "$OUT/runs/captions" --seed "$SEED"

# The control of the paper's Table 7, without stage 1: a fresh encoder learns from captions alone, from the first step.
vlv train tiny-stage2 --run-dir "$OUT/runs/control" --seed "$SEED" \
  --set model.encoder=null --set model.florence="$OUT/parts/florence" \
  --set "model.prompt=List what is shown in the image." --set data.latents=null \
  --set stage2.frozen_encoder_steps=0 --set stage2.denoising_weight=0 --set stage2.timesteps=uniform

vlv eval toyworld --model "$OUT/runs/captions/model" --inspector "$OUT/parts/inspector" \
  --stage1 "$OUT/runs/stage1/model" --control "$OUT/runs/control/model" \
  --num 2000 --seed 1 --json "$OUT/evaluation.json"
vlv toyworld ship --model "$OUT/runs/captions/model" --parts "$OUT/parts" --runs "$OUT/runs" \
  --results "$OUT/evaluation.json" "$OUT/vlv-tiny"
