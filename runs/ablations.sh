#!/usr/bin/env bash
# The paper's ablations and the discrete bottleneck in the toy world. Run it again after an interruption: what is done stays.
# Every training starts from the shipped model's frozen decoder and from a Florence-2 and language models that are pretrained here
# first, where runs/tiny.sh has not left them (PARTS=out/tiny/parts DATA=out/tiny/data takes its own).
# Every variant gets the best of RATES on validation scenes, then SEEDS trainings that are reported.
# Days on two cores; NUM=48 SEEDS=1 RATES=1 makes it shorter.
set -euo pipefail
OUT=${OUT:-out/ablations}
DATA=${DATA:-$OUT/data}
PARTS=${PARTS:-$OUT/parts}
NUM=${NUM:-1000}
SEEDS=${SEEDS:-3}
RATES=${RATES:-0.5 1 2}

vlv toyworld render "$DATA/train" --split train --num 40000
vlv toyworld render "$DATA/val" --split val --num 1000
if [ ! -d "$PARTS" ]; then
  shipped=$(python -c 'from vlv.models.folder import shipped_models; print(shipped_models()["vlv-tiny"])')
  mkdir -p "$OUT"
  cp -r "$shipped" "$PARTS.copying"
  rm -r "$PARTS.copying"/{encoder,caption_decoder}
  mv "$PARTS.copying" "$PARTS"
fi

pretrain() { vlv toyworld pretrain "$@" --precision bf16 --data "$DATA/train" --models "$PARTS"; }
for part in vision florence; do
  [ -d "$PARTS/florence" ] || pretrain "$part" --run-dir "$OUT/parts-runs/$part"
done
for size in medium small large; do
  name=llm-$size
  [ -d "$PARTS/${name%-medium}" ] || pretrain llm --size "$size" --run-dir "$OUT/parts-runs/$name"
done

rates=()
for rate in $RATES; do rates+=(--rate "$rate"); done
data="data.inputs=[$DATA/train]" held_out="data.held_out=[$DATA/val]"
mkdir -p "$OUT/results"
names=(warm queries data bottleneck control unfreezing decoder drift)
for name in "${names[@]}"; do
  vlv eval ablation "$name" --run-dir "$OUT/$name" --trained "$OUT/trained" --parts "$PARTS" --num "$NUM" --seeds "$SEEDS" "${rates[@]}" \
    --set1 "$data" --set1 "$held_out" --set2 "$data" --set2 "$held_out"
  cp "$OUT/$name/result.json" "$OUT/results/ablation-$name.json"
done
vlv eval report "${names[@]/#/$OUT/}" --output "$OUT/report.html"
