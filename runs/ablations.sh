#!/usr/bin/env bash
# The paper's ablations and the discrete bottleneck in the toy world, after runs/tiny.sh has rendered the data and pretrained the parts.
# Run it again after an interruption: what is done stays. Many hours on two cores; NUM=48 SEEDS=1 tries it.
set -euo pipefail
OUT=${OUT:-out/tiny}
NUM=${NUM:-500}
SEEDS=${SEEDS:-3}

for size in small large; do
  vlv toyworld pretrain llm --size "$size" --data "$OUT/data/train" --models "$OUT/parts" --run "$OUT/runs/llm-$size"
done

mkdir -p "$OUT/ablations/results"
for name in queries unfreezing data decoder control bottleneck; do
  vlv eval ablation "$name" --run "$OUT/ablations/$name" --parts "$OUT/parts" --num "$NUM" --seeds "$SEEDS" \
    --set1 "data.inputs=[$OUT/data/train]" --set1 "data.held_out=[$OUT/data/val]" \
    --set2 "data.inputs=[$OUT/data/train]" --set2 "data.held_out=[$OUT/data/val]"
  cp "$OUT/ablations/$name/result.json" "$OUT/ablations/results/ablation-$name.json"
done
vlv eval report "$OUT"/ablations/{queries,unfreezing,data,decoder,control,bottleneck} --output "$OUT/ablations/report.html"
