#!/usr/bin/env bash
# From nothing to a finished vlv-tiny: several hours on two cores. Of the shipped weights, language model, Florence-2 and all
# stages were made by the commands below; VAE, text tower, U-Net and inspector are older, made in steps that the model card
# names. weights/tiny-stage2 has the model before stage 3.
# Every step goes on where it was interrupted: run the script again. Steps that are done cost nothing.
# PROCESSES trains the stages, one for each core or GPU; their number changes nothing but rounding.
set -euo pipefail
OUT=${OUT:-out/tiny}
SEED=${SEED:-0}
PROCESSES=${PROCESSES:-2}

vlv toyworld render "$OUT/data/train" --split train --num 40000 --seed "$SEED"
vlv toyworld render "$OUT/data/val" --split val --num 1000 --seed "$SEED"
# Scenes with every pair of shape and colour, for the inspector, which must be able to report them, and for the language
# model, which reads of them and sees no picture.
vlv toyworld render "$OUT/data/any" --split any --num 20000 --seed "$SEED"

pretrain() {  # PART DATA
  vlv toyworld pretrain "$1" --data "$OUT/data/$2" --models "$OUT/parts" --run-dir "$OUT/runs/$1" --seed "$SEED"
}
for part in inspector llm; do pretrain "$part" any; done
for part in vae text unet vision florence; do pretrain "$part" train; done

train() {  # PRESET RUN OPTION...
  GPUS=$PROCESSES "$(dirname "$0")/launch.sh" train "$1" --run-dir "$OUT/runs/$2" --seed "$SEED" \
    --set loop.batch_size=$((32 / PROCESSES)) "${@:3}"
}
for stage in stage1 stage2; do train "tiny-$stage" "$stage"; done
train tiny-captions-stage2 captions
# Images alone once more: the frozen decoder judges the captions that the model writes of them.
train tiny-stage3 stage3 --set loop.batch_size=$((16 / PROCESSES)) \
  --set model.encoder="$OUT/runs/captions/model" --set model.caption_decoder="$OUT/runs/captions/model" \
  --set model.decoder="$OUT/parts" --set data.features="$OUT/parts/features" --set data.latents="$OUT/parts/latents"

# The control of the paper's Table 7, without stage 1: a fresh encoder learns from captions alone, from the first step.
train tiny-stage2 control \
  --set model.encoder=null --set model.florence="$OUT/parts/florence" \
  --set "model.prompt=List what is shown in the image." --set data.latents=null \
  --set stage2.frozen_encoder_steps=0 --set stage2.denoising_weight=0 --set stage2.timesteps=uniform

vlv eval toyworld --model "$OUT/runs/stage3/model" --inspector "$OUT/parts/inspector" \
  --stage1 "$OUT/runs/stage1/model" --stage2 "$OUT/runs/captions/model" --control "$OUT/runs/control/model" \
  --num 2000 --seed 1 --json "$OUT/evaluation.json"
vlv toyworld ship --model "$OUT/runs/stage3/model" --parts "$OUT/parts" --runs "$OUT/runs" \
  --results "$OUT/evaluation.json" "$OUT/vlv-tiny"
# What the frozen decoder's evidence about captions is worth, fit where the truth is known.
vlv eval doubts --model "$OUT/vlv-tiny" --split val --seed 7 --num 256 --evidence "$OUT/doubts" --fit "$OUT/vlv-tiny/doubts.json"
