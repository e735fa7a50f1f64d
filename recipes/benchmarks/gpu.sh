#!/usr/bin/env bash
# Prove the package on a GPU: all losses, their time, a training step in each label mode, and two epochs on WordNet.
#
#   recipes/benchmarks/gpu.sh runs/gpu          # on one A100 or H100: meant to take less than eight minutes
#   recipes/benchmarks/gpu.sh runs/gpu --tiny   # on a CPU, to test this script
#
# A step that fails does not stop the next ones. The folder gets a log of each step, and gpu.json.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:?usage: gpu.sh FOLDER [--tiny]}
python=${PYTHON:-python}
mkdir -p "$out"
: > "$out/steps.txt"

step() { # name, seconds at most, command
    local name=$1 limit=$2
    shift 2
    echo "$name: $*"
    [ -z "${tiny[*]}" ] || limit=250 # a busy CPU may be slow
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    echo "$name $?" >> "$out/steps.txt"
}

if [ "${2:-}" = --tiny ]; then
    tiny=(--tiny) device=cpu
    inputs=(--num_labels 60 --num_queries 40)
    loss=(--labels 300 --batch_size 8 --dim 16 --repeats 1 --peak_tflops 0.1 --peak_gbs 10 --no-bf16)
    large=(--labels 500 --batch_size 8 --dim 16 --repeats 1 --budgets 1 --no-bf16)
    modes=(--batch_size 8 --batches 1 --seeds 1 --shares 0.5 --num_random 10)
    data="$out/inputs/data"
    epochs=(--max_steps 2 --per_device_train_batch_size 8 --use_cpu true)
else
    tiny=() device=cuda inputs=()
    loss=(--labels 16384 131072 --batch_size 1024 --dim 768 --repeats 3)
    large=(--labels 1305265 --batch_size 1024 --dim 384 --repeats 3 --max_dense_gb 1)
    modes=(--batch_size 1024 --batches 1 --seeds 1 --shares 0.05 --num_random 20000 --chunk_tokens 65536 --bf16)
    data=recipes/data/wordnet-hypernyms
    epochs=(--num_train_epochs 2 --per_device_train_batch_size 512 --bf16 true)
fi

step inputs 60 "$python" recipes/benchmarks/gpu_inputs.py --output_dir "$out/inputs" "${inputs[@]}" "${tiny[@]}"
step losses 100 "$python" recipes/benchmarks/gpu_losses.py --device $device --json "$out/losses.json" "${tiny[@]}"
step loss 60 "$python" recipes/benchmarks/loss.py --device $device --json "$out/loss.json" "${loss[@]}"
step loss_1300k 60 "$python" recipes/benchmarks/loss.py --device $device --json "$out/loss_1300k.json" "${large[@]}"
step step 100 "$python" recipes/benchmarks/step.py --data "$out/inputs/data" --model "$out/inputs/distilbert" \
    --json "$out/step.json" "${modes[@]}"
step minilm 100 "$python" recipes/train.py --data "$data" --model "$out/inputs/minilm" --output_dir "$out/minilm" \
    --temperature 0.05 --learning_rate 1e-4 --label_mode fresh "${epochs[@]}"
"$python" recipes/benchmarks/gpu_report.py "$out"
