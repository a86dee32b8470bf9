#!/usr/bin/env bash
# Everything the README's GPU column needs, in one go on a machine with a CUDA GPU:
#     bash gpu.sh DATA_DIR OUT_DIR
# trains the GPU preset, measures it, times the step, and runs the tests that need a GPU.
set -euo pipefail
data=${1:?usage: bash gpu.sh DATA_DIR OUT_DIR}
out=${2:?usage: bash gpu.sh DATA_DIR OUT_DIR}
mkdir -p "$out"
nvidia-smi --query-gpu=name,memory.total --format=csv | tee "$out/gpu.txt"
python -m pytest -q tests -k "gpu" -rs 2>&1 | tee "$out/tests.txt"
python benchmark.py --model DiT-Mini/2 --batch-size 256 --compile 2>&1 | tee "$out/benchmark.txt"
python train_mnist.py --data-dir "$data" --out output/gpu 2>&1 | tee "$out/train.txt"
for s in 1 1.25 1.5 1.75 2; do   # the better the model, the less guidance it wants
    python evaluate.py output/gpu --data-dir "$data" --images 10000 --cfg-scale "$s" --json "$out/guidance-$s.json"
done 2>&1 | tee "$out/evaluate.txt"
python sample.py output/gpu --out "$out/samples-gpu.png" --gif "$out/samples-gpu.gif" --force
cp output/gpu/loss.png output/gpu/metrics.jsonl output/gpu/config.json "$out/"
python export.py "$(ls output/gpu/step_*.pt | tail -n 1)" "$out/mnist-gpu.pt"
