#!/usr/bin/env bash
# Everything the README's GPU column needs, in one go on a machine with a CUDA GPU:
#     bash gpu.sh DATA_DIR OUT_DIR
# trains the GPU preset, measures it, times the step, and runs the tests that need a GPU (these and
# the loss curve where requirements-dev.txt is installed). Called again, it goes on with the run.
set -euo pipefail
data=${1:?usage: bash gpu.sh DATA_DIR OUT_DIR}
out=${2:?usage: bash gpu.sh DATA_DIR OUT_DIR}
run=output/gpu
mkdir -p "$out"
nvidia-smi --query-gpu=name,memory.total --format=csv | tee "$out/gpu.txt"
resume=$([ -e "$run" ] && echo --resume || true)
python train_mnist.py --data-dir "$data" --out "$run" $resume 2>&1 | tee -a "$out/train.txt"
for s in 1 1.25 1.5 1.75 2; do   # the better the model, the less guidance it wants
    python evaluate.py "$run" --data-dir "$data" --images 10000 --cfg-scale "$s" --json "$out/guidance-$s.json" --force
done 2>&1 | tee "$out/evaluate.txt"
python sample.py "$run" --out "$out/samples-gpu.png" --gif "$out/samples-gpu.gif" --force
cp "$run"/loss.png "$run"/metrics.jsonl "$run"/config.json "$out/" || echo "no loss.png: pip install matplotlib"
python export.py "$(ls "$run"/step_*.pt | tail -n 1)" "$out/mnist-gpu.pt" --force
python -m pytest -q tests -k "gpu" -rs 2>&1 | tee "$out/tests.txt" || echo "the tests did not pass: see tests.txt"
python benchmark.py --model DiT-Mini/2 --batch-size 256 --compile 2>&1 | tee "$out/benchmark.txt"
