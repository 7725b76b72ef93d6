#!/usr/bin/env bash
# All eight experiments in the toy world, with the shipped model. Run it again after an interruption: what is done stays.
# NUM=48 GUIDANCES=2 ABLATIONS=0 runs/evaluate.sh tries it in minutes; figures to publish take NUM=1000 or more, and the ablations hours.
# DTYPE=bfloat16 draws the pictures faster, also on a processor; the result says so.
set -euo pipefail
OUT=${OUT:-out/evaluation}
NUM=${NUM:-1000}
SEED=${SEED:-1}
MODEL=${MODEL:-vlv-tiny}
GUIDANCES=${GUIDANCES:-1 2 3 4}
DTYPE=${DTYPE:-auto}
ABLATIONS=${ABLATIONS:-1}
# RIVAL=out/tiny/parts/florence sets the captions of the Florence-2 that the encoder was made from beside ours.
RIVAL=${RIVAL:-}

guidances=()
for guidance in $GUIDANCES; do guidances+=(--guidance "$guidance"); done

rival=() against=()
if [ -n "$RIVAL" ]; then rival=(--from "rival=florence:$RIVAL") against=(--against rival); fi

# 1, 2 and 6: pictures from captions and from z, their claims and their 3-D boxes
vlv eval predict reconstruction --run-dir "$OUT/reconstruction" --num "$NUM" --seed "$SEED" --generator "model:$MODEL" --dtype "$DTYPE" \
  --from true --from "ours=model:$MODEL" "${rival[@]}" --from "z=z:$MODEL" --from words --from other "${guidances[@]}"
vlv eval judge "$OUT/reconstruction" --judge pixels --judge "toy=inspector:$MODEL"
vlv eval score "$OUT/reconstruction"

# what images of plain sentences show, beside those of complete captions
vlv eval toyworld --model "$MODEL" --sections plain,teacher --num "$NUM" --seed "$SEED" --json "$OUT/plain.json"

# 3: ratings, and choices in both orders; BLEU, ROUGE-L, CIDEr-D and claims of the same captions
vlv eval predict arena --run-dir "$OUT/arena" --num "$NUM" --seed "$SEED" \
  --from true --from again --from "ours=model:$MODEL" "${rival[@]}" --from words --from other
vlv eval judge "$OUT/arena" --judge exact --judge linear --judge references --judge claims
vlv eval judge "$OUT/arena" --judge choice=exact --pairs
vlv eval score "$OUT/arena" "${against[@]}"

# 4: questions answered from captions alone
vlv eval predict vqa --run-dir "$OUT/vqa" --num "$NUM" --seed "$SEED" \
  --from true --from "ours=model:$MODEL" "${rival[@]}" --from words --from other
vlv eval judge "$OUT/vqa" --judge parser
vlv eval score "$OUT/vqa" "${against[@]}"

# 7: mixes of embeddings
vlv eval predict mixes --run-dir "$OUT/mixes" --num "$NUM" --seed "$SEED" --model "$MODEL" --dtype "$DTYPE"
vlv eval judge "$OUT/mixes" --judge "toy=inspector:$MODEL"
vlv eval score "$OUT/mixes"

# 5 and 8: ablations and the discrete bottleneck, which train models of their own
ablations=()
if [ "$ABLATIONS" = 1 ]; then
  OUT="$OUT/ablations" "$(dirname "$0")/ablations.sh"
  ablations=("$OUT"/ablations/{warm,queries,data,bottleneck,control,unfreezing,decoder,drift})
fi

# what the paper's training would cost, from rates measured on a GPU
python "$(dirname "$0")/../benchmarks/cost.py" --run-dir "$OUT/cost"

mkdir -p "$OUT/results"
for run in reconstruction arena vqa mixes cost; do cp "$OUT/$run/result.json" "$OUT/results/$run.json"; done
for run in "${ablations[@]}"; do cp "$run/result.json" "$OUT/results/ablation-$(basename "$run").json"; done
# what vlv eval toyworld measured of the model stands beside it, where its folder has that
folder=$(python -c 'import sys; from vlv.models.folder import find_folder; print(find_folder(sys.argv[1]))' "$MODEL")
measured=("$folder"/evaluation.json)
[ -f "${measured[0]}" ] || measured=()
vlv eval report "$OUT"/{reconstruction,arena,vqa,mixes} "${ablations[@]}" "${measured[@]}" --output "$OUT/report.html"
