#!/usr/bin/env bash
# From nothing to the page; run it in the repository's root. Every step goes on where it was interrupted: run it again.
# pip install -e ".[train,data,pictograms]"; npm and pip fetch the packages from the registries they are set up for.
# SAMPLES is the part of the training shards that both stages see, the decoder sees one more: all take twice the time.
set -euo pipefail
OUT=out/pictograms
SAMPLES=${SAMPLES:-"$OUT/pictures/train/train-0000[0-3].tar"}
here=examples.pictograms

python -m $here.fetch $OUT/packages
python -m $here.render $OUT/packages $OUT/pictures
python -m $here.backbone $OUT/packages $OUT/backbone

python -m $here.decoder vae --data $OUT/pictures/train --parts $OUT/parts --run-dir $OUT/runs/vae
python -m $here.decoder unet --data "$OUT/pictures/train/train-0000[0-5].tar" --parts $OUT/parts --run-dir $OUT/runs/unet
python -m $here.writer $OUT/packages $OUT/llm --run-dir $OUT/runs/llm

stages=examples/pictograms
vlv data cache-latents "$SAMPLES" --config $stages/stage1.yaml --output $OUT/latents
vlv data cache-features "$SAMPLES" --config $stages/stage1.yaml --output $OUT/features --batch-size 64
for stage in stage1 stage2 stage2-drawn; do
  vlv train $stages/$stage.yaml --run-dir $OUT/runs/$stage --set "data.inputs=['$SAMPLES']"
done

python -m $here.measure $OUT/runs/stage2-drawn/model --root $OUT --samples "$SAMPLES" \
  --json $OUT/figures.json --sheets $OUT/sheets
python -m $here.page $OUT/figures.json $OUT/sheets
