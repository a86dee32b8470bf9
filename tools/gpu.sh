#!/usr/bin/env bash
# Measures what the docs report for a GPU, in one go on a machine with a CUDA GPU:
#     bash tools/gpu.sh DATA_DIR OUT_DIR
# Trains the GPU preset, evaluates it, times the step, and runs the tests that need a GPU (these and
# the loss curve only where requirements-dev.txt is installed). A second call resumes the run.
set -euo pipefail
data=$(realpath -m "${1:?usage: bash tools/gpu.sh DATA_DIR OUT_DIR}")
out=$(realpath -m "${2:?usage: bash tools/gpu.sh DATA_DIR OUT_DIR}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=output/gpu
mkdir -p "$out"
nvidia-smi --query-gpu=name,memory.total --format=csv | tee "$out/gpu.txt"
resume=$([ -e "$run" ] && echo --resume || true)
python train_mnist.py --data-dir "$data" --out "$run" $resume 2>&1 | tee -a "$out/train.txt"
for s in 1 1.25 1.5 1.75 2; do   # the better the model, the less guidance it needs
    python -m tools.evaluate "$run" --data-dir "$data" --images 10000 --cfg-scale "$s" \
        --json "$out/guidance-$s.json" --force
done 2>&1 | tee "$out/evaluate.txt"
python sample.py "$run" --out "$out/samples-gpu.png" --gif "$out/samples-gpu.gif" --force
cp "$run"/loss.png "$run"/metrics.jsonl "$run"/config.json "$out/" || echo "no loss.png: pip install matplotlib"
python -m tools.export "$run" "$out/mnist-gpu.pt" --force
python -m pytest -q tests -k "gpu" -rs 2>&1 | tee "$out/tests.txt" || echo "tests failed: see tests.txt"
python -m tools.benchmark --model DiT-Mini/2 --batch-size 256 --compile 2>&1 | tee "$out/benchmark.txt"
