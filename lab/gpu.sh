#!/usr/bin/env bash
# Everything that a machine with a GPU can say about this repository, in one command:
#
#     bash lab/gpu.sh [--small] [FOLDER]           (FOLDER: runs/gpu)
#
# It runs the tests on a GPU, the gate of the kernels, benchmarks, one pre-training on the demo set,
# and LoRA on it, in at most 30 minutes. Each step writes FOLDER/STEP.log. A step whose log is there
# is skipped, so run it again after a stop: it goes on. A step that takes too long is stopped, and
# keeps the rows that it has. At the end FOLDER/summary.md holds what to send. --small tries all of
# it on tiny inputs, on any Linux; without a GPU, the interpreter of Triton runs the gate.
set -uo pipefail
trap 'echo "stopped; the same command goes on" >&2; exit 130' INT TERM
cd "$(dirname "$0")/.."

small=()
if [ "${1:-}" = --small ]; then
    small=(--small)
    shift
fi
folder=${1:-runs/gpu}
case "$folder" in
-* | "") echo "error: $folder is no folder; usage: bash lab/gpu.sh [--small] [FOLDER]" >&2; exit 2 ;;
esac
mkdir -p "$folder" || exit 2
failed=()

# step NAME SECONDS COMMAND...: the log gets its name when the command has succeeded.
step() {
    local log="$folder/$1.log" command=("${@:3}")
    if [ -e "$log" ]; then
        echo "== $1: $log is there, skipped"
        return
    fi
    echo "== $1: ${command[*]}"
    if { echo "\$ ${command[*]}"; timeout --foreground -s INT "$2" "${command[@]}"; } 2>&1 | tee "$log.part"; then
        mv "$log.part" "$log"
    else
        failed+=("$1")
        return 1
    fi
}

facts() {
    date -u
    git describe --always --dirty
    nvidia-smi || echo "no nvidia-smi here"
    lscpu | head -n 20
    python -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())'
    python -m pip list | grep -iE '^(torch|triton|transformers|timm|onnxruntime|numpy|nvidia-[a-z]+) '
    return 0
}

export -f facts # `timeout` starts it

gpu=$(python -c 'import torch; print(int(torch.cuda.is_available()))') || exit 2
if [ "$gpu" = 0 ] && [ ${#small[@]} -eq 0 ]; then
    echo "error: torch sees no GPU here; bash lab/gpu.sh --small tries all steps without one" >&2
    exit 2
fi
interpret=$((1 - gpu)) # without a GPU

# Training goes on where it was stopped. A tiny run: a CPU's network with one block, no guidance.
train=(--mask attn_high --ratio 0.75)
lora=(--method lora)
many=10000
if [ ${#small[@]} -gt 0 ]; then
    train=(--model nano:depth=1,image_size=32 --epochs 1 --mask random)
    lora+=(--epochs 1)
    many=20
fi
pretrain=(python pretrain.py "${train[@]}" --out "$folder/run")
if [ -e "$folder/run/state.pt" ]; then
    pretrain=(python pretrain.py --resume "$folder/run")
fi

step machine 30 bash -c facts
for dtype in fp32 bf16; do # a speed is never reported where the kernels are wrong
    step "gate-$dtype" 120 env TRITON_INTERPRET=$interpret python -m lab.bench_kernels --gate --dtype $dtype || {
        echo "error: the gate is red, so nothing is timed. Send $folder/machine.log and $folder/gate-$dtype.log.part" >&2
        exit 2
    }
done
step pretrain 420 "${pretrain[@]}"
step lora 180 python finetune_lora.py "$folder/run" "${lora[@]}" --out "$folder/lora"
step kernels 180 python -m lab.bench_kernels "${small[@]}" --turns 2 --out "$folder"
step step 360 python -m lab.bench_step "${small[@]}" --turns 2 --out "$folder"
step data 60 python -m lab.bench_data --device auto "${small[@]}" --turns 2 --out "$folder"
step pack 60 python -m lab.bench_data --pack $many --out "$folder"
step latency 60 python -m lab.bench_latency "${small[@]}" --turns 2 --out "$folder"
if [ ${#small[@]} -eq 0 ]; then
    step tests 180 python -m pytest -q -n 0 tests/lesson/test_gpu.py tests/lesson/test_kernels.py
fi

{
    head -n 2 "$folder/machine.log"
    tail -qn 4 "$folder/pretrain.log" "$folder/lora.log" 2> /dev/null
    tail -n +1 "$folder"/*.csv
} > "$folder/summary.md"
echo "Send $folder/summary.md; the logs beside it say more"
if [ ${#failed[@]} -gt 0 ]; then
    echo "error: these steps failed, and run again with the same command: ${failed[*]}" >&2
    exit 1
fi
