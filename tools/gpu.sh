#!/usr/bin/env bash
# Measures what the docs report for a GPU, in some 13 minutes on a machine that has one:
#     bash tools/gpu.sh DATA_DIR OUT_DIR                      DATA_DIR: --data-dir of train_mnist.py
#     PARTS="tests training" bash tools/gpu.sh ...            these parts only
#     DEVICE=cpu STEPS=20 bash tools/gpu.sh ...               a dry run
# Each part has a time limit in seconds. OUT_DIR gets at most eight files, each below 16 MB.
set -uo pipefail
data=$(realpath "${1:?usage: bash tools/gpu.sh DATA_DIR OUT_DIR}") || exit 1
out=$(realpath -m "${2:?usage: bash tools/gpu.sh DATA_DIR OUT_DIR}")
cd "$(dirname "${BASH_SOURCE[0]}")/.." && mkdir -p "$out" || exit 1
device=(--device "${DEVICE:-cuda}") run=output/gpu
failed="" short="" quick="" sampled="--sample 20" lengths="2400 4000"
against=(-m tools.benchmark "${device[@]}" --against --rounds 6)
if [ -n "${STEPS:-}" ]; then
    short="--steps $STEPS --no-compile" lengths="$STEPS --seeds 1"
    quick="--batch-size 2 --rounds 1 --steps-per-round 1" sampled="--sample 2"
else against+=(--compile); fi

part() {    # part NAME SECONDS ARGUMENTS...: run Python with them under a time limit
    local name=$1 limit=$2 since=$SECONDS
    [[ " ${PARTS:-$name} " == *" $name "* ]] || return
    echo "== $name: at most $limit s: python ${*:3}"
    # SIGINT: training saves a checkpoint, and ends
    timeout --foreground -s INT -k 10 "$limit" python "${@:3}" || failed+=" $name"
    echo "== $name: $((SECONDS - since)) s"
}

# shellcheck disable=SC2086  # $short, $quick, $sampled and $lengths are words
measure() {
    part tests 100 -m pytest -q -p no:xdist -o addopts= tests/test_gpu.py
    part training 240 train_mnist.py "${device[@]}" --data-dir "$data" --out "$run" $short
    part export 60 -m tools.convert export "$run" "$out/mnist.pt" --force
    part samples 60 sample.py "$run" "${device[@]}" --out "$out/samples.png" --force
    for scale in 1 1.1 1.2; do
        part evaluations 45 -m tools.evaluate "$run" "${device[@]}" --data-dir "$data" \
            --cfg-scale $scale --images ${STEPS:-10000}
    done
    cp "$run/evaluations.jsonl" "$out"; gzip -c "$run/metrics.jsonl" > "$out/metrics.jsonl.gz"
    part mini 100 "${against[@]}" --model DiT-Mini/2 --batch-size 256 $sampled $quick
    part nano 60 "${against[@]}" --model DiT-Nano/7 --batch-size 128 $sampled $quick
    part latents 150 "${against[@]}" --model DiT-B/2 --image-size 32 --channels 4 \
        --batch-size 256 $quick
    part speed 150 -m tools.speed_run --steps $lengths --cfg-scale 1.6 "${device[@]}" -- \
        --data-dir "$data" --model DiT-Nano/7 --batch-size 128 --warmup 100 --ema-decay 0.99 \
        --no-compile
    echo "== failed:${failed:- none}"
    [ -z "$failed" ]
}

{ date; nvidia-smi --query-gpu=name,driver_version --format=csv; } >> "$out/log.txt" 2>&1
measure 2>&1 | tee -a "$out/log.txt"
