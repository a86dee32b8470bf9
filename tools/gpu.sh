#!/usr/bin/env bash
# Measures what the docs report for a GPU, in slots of ten minutes on a machine with a CUDA GPU:
#     bash tools/gpu.sh DATA_DIR OUT_DIR
# DATA_DIR holds the four MNIST files, gzipped or not, in itself or in MNIST/raw/. Every part has a
# time limit. Parts that are done are marked beside the run folder; a second call does the others
# and resumes the training. OUT_DIR gets at most eight files, each below 16 MB.
#
# Environment: DEVICE (cuda), PYTHON (python), DATASET (mnist; glyphs need no data), RUN (the run
# folder, output/gpu), SLOT (seconds for all parts, 570), TESTS, SCALES, AGAINST (FILE.py:FACTORY
# for tools.benchmark), and the seconds of each part, for instance TRAINING_LIMIT. STEPS shortens
# the training and what follows: DEVICE=cpu STEPS=20 bash tools/gpu.sh DATA_DIR OUT_DIR
set -uo pipefail
data=$(realpath -m "${1:?usage: bash tools/gpu.sh DATA_DIR OUT_DIR}")
out=$(realpath -m "${2:?usage: bash tools/gpu.sh DATA_DIR OUT_DIR}")
run=$(realpath -m "${RUN:-$(dirname "${BASH_SOURCE[0]}")/../output/gpu}")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python} device=${DEVICE:-cuda} dataset=${DATASET:-mnist} slot=${SLOT:-570}
steps=${STEPS:-} marks=$run.parts mark=yes unfinished=""
mkdir -p "$out" "$marks" || exit 1

part() {    # part NAME LIMIT COMMAND...: run it under a time limit, unless it is marked as done
    local name=$1 limit=$2 left=$((slot - SECONDS)) since=$SECONDS status
    shift 2
    [ -e "$marks/$name" ] && { echo "== $name: done before"; return 0; }
    [ "$left" -lt "$limit" ] && limit=$left
    [ "$limit" -gt 0 ] || { echo "== $name: no time left"; unfinished+=" $name"; return 1; }
    echo "== $name: at most $limit s"
    # SIGINT asks train_mnist.py for a checkpoint, a second one would stop it at once: --foreground
    timeout --foreground -s INT -k 15 "$limit" "$@"
    status=$?
    echo "== $name: status $status after $((SECONDS - since)) s"
    [ $status = 0 ] && [ $mark = yes ] && touch "$marks/$name"
    [ $status = 0 ] || unfinished+=" $name"
    return $status
}

keep() {    # keep FILE [NAME]: copy it into OUT_DIR, unless it is missing or too large
    [ -f "$1" ] || return 0
    if [ "$(wc -c < "$1")" -lt 16000000 ]; then cp "$1" "$out/${2:-${1##*/}}"
    else echo "not kept, 16 MB or more: $1"; fi
}

unpack() {  # let $data be a folder with MNIST as torchvision has it
    local name found=$data raw=$run.data/MNIST/raw
    [ -d "$data/MNIST/raw" ] && found=$data/MNIST/raw
    mkdir -p "$raw"
    for name in {train-images-idx3,train-labels-idx1,t10k-images-idx3,t10k-labels-idx1}-ubyte; do
        if [ -f "$found/$name" ]; then cp "$found/$name" "$raw/"
        elif [ -f "$found/$name.gz" ]; then gzip -dc "$found/$name.gz" > "$raw/$name"
        else echo "error: there is neither $found/$name nor $name.gz"; return 1; fi
    done
    data=$run.data
}

measure() {
    local flags=(--device "$device") start=() evaluated=(--images 10000) timed=(--compile) trained
    local lengths=(--steps 400 800 1600)
    if [ -n "$steps" ]; then
        evaluated=(--images 20 --steps 2) timed=(--rounds 1 --steps-per-round 1)
        lengths=(--steps "$steps" --seeds 1)
    fi
    if [ "$dataset" = mnist ]; then unpack || return 1; fi
    date
    [ "$device" = cpu ] || nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
    # shellcheck disable=SC2086  # TESTS may be several
    part tests "${TESTS_LIMIT:-150}" "$python" -m pytest -q -rs \
        ${TESTS:-tests/test_gpu.py tests/test_fake_gpu.py}
    part profile "${PROFILE_LIMIT:-60}" "$python" -m tools.benchmark "${flags[@]}" \
        --profile "$out/profile.txt" --force

    if compgen -G "$run/step_*.pt" > /dev/null; then start=(--resume)
    else start=(--dataset "$dataset" ${steps:+--steps "$steps"}); fi
    part training "${TRAINING_LIMIT:-180}" "$python" train_mnist.py "${flags[@]}" \
        --data-dir "$data" --out "$run" "${start[@]}"
    trained=$?
    keep "$run/metrics.jsonl"
    # of the checkpoint at hand; again in the next call unless it is the last one
    [ $trained = 0 ] || mark=no
    part export "${EXPORT_LIMIT:-30}" "$python" -m tools.export "$run" "$marks/ema.pt" --force
    keep "$marks/ema.pt" "$dataset-$device.pt"
    part samples "${SAMPLES_LIMIT:-40}" "$python" sample.py "$run" "${flags[@]}" --force \
        --out "$out/samples.png" --gif "$marks/samples.gif"
    keep "$marks/samples.gif"
    for scale in ${SCALES:-1 1.25 1.5 1.75 2}; do   # the better the model, the less it needs
        part "guidance-$scale" "${EVALUATE_LIMIT:-45}" "$python" -m tools.evaluate "$run" \
            "${flags[@]}" --data-dir "$data" --cfg-scale "$scale" "${evaluated[@]}"
        keep "$run/evaluations.jsonl"
    done
    part classifier "${CLASSIFIER_LIMIT:-120}" "$python" -m tools.evaluate "$run" "${flags[@]}" \
        --data-dir "$data" --train-on-samples "${evaluated[@]}"
    keep "$run/evaluations.jsonl"

    mark=yes
    part speed-run "${SPEED_LIMIT:-300}" "$python" -m tools.speed_run "${lengths[@]}" -- \
        "${flags[@]}" --dataset "$dataset" --data-dir "$data" --no-compile
    [ "$dataset" = mnist ] && timed+=(--data-dir "$data")
    part benchmark "${BENCHMARK_LIMIT:-150}" "$python" -m tools.benchmark "${flags[@]}" \
        "${timed[@]}" --sample ${steps:+2} --json "$out/benchmark.json" --force
    [ -z "${AGAINST:-}" ] || part against "${BENCHMARK_LIMIT:-150}" "$python" -m tools.benchmark \
        "${flags[@]}" "${timed[@]}" --sample ${steps:+2} --against "$AGAINST"
    echo "== unfinished:${unfinished:- nothing}"
    [ -z "$unfinished" ]
}

measure 2>&1 | tee -a "$out/log.txt"
