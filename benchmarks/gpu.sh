#!/usr/bin/env bash
# Everything that a machine with a GPU can say about this repository, in one command:
#
#     bash benchmarks/gpu.sh [--small] [FOLDER]           (FOLDER: runs/gpu)
#
# It runs the gate of the kernels, four benchmarks, and one pre-training on the demo set. Each step
# writes FOLDER/STEP.log. A step whose log is there is skipped, so run it again after a stop: it
# goes on. At the end it lists the files to send. --small tries all of it on tiny inputs, on any
# machine; where there is no GPU, the interpreter of Triton runs the kernels of the gate.
set -uo pipefail
trap 'echo "stopped; the same command goes on" >&2; exit 130' INT TERM
cd "$(dirname "$0")/.."

small=()
if [ "${1:-}" = --small ]; then
    small=(--small --turns 1)
    shift
fi
folder=${1:-runs/gpu}
case "$folder" in
-* | "") echo "error: $folder is no folder; usage: bash benchmarks/gpu.sh [--small] [FOLDER]" >&2; exit 2 ;;
esac
mkdir -p "$folder" || exit 2
failed=()

# step NAME COMMAND...: the log gets its name when the command has succeeded.
step() {
    local log="$folder/$1.log"
    if [ -e "$log" ]; then
        echo "== $1: $log is there, skipped"
        return
    fi
    echo "== $1: ${*:2}"
    if { echo "\$ ${*:2}"; "${@:2}"; } 2>&1 | tee "$log.part"; then
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

# The run goes on where it was stopped. On the demo set a GPU's epoch takes seconds, so evaluations
# are rare. A tiny run: a CPU's network with one block, one epoch, no guidance.
pretrain() {
    local run="$folder/run" tiny=(--model nano:depth=1 --epochs 1 --mask random)
    if [ -e "$run/state.pt" ]; then
        python pretrain.py --resume "$run"
    elif [ ${#small[@]} -gt 0 ]; then
        python pretrain.py "${tiny[@]}" --out "$run"
    else
        python pretrain.py --mask attn_high --ratio 0.75 --eval-every 100 --out "$run"
    fi
}

gpu=$(python -c 'import torch; print(int(torch.cuda.is_available()))') || exit 2
if [ "$gpu" = 0 ] && [ ${#small[@]} -eq 0 ]; then
    echo "error: torch sees no GPU here; bash benchmarks/gpu.sh --small tries all steps without one" >&2
    exit 2
fi
interpret=$((1 - gpu)) # without a GPU

step machine facts
for dtype in fp32 bf16; do # a speed is never reported where the kernels are wrong
    step "gate-$dtype" env TRITON_INTERPRET=$interpret python -m benchmarks.kernels --gate --dtype $dtype || {
        echo "error: the gate is red, so nothing is timed. Send $folder/machine.log and $folder/gate-$dtype.log.part" >&2
        exit 2
    }
done
step kernels python -m benchmarks.kernels "${small[@]}" --out "$folder"
step step python -m benchmarks.step "${small[@]}" --out "$folder"
step data python -m benchmarks.data --device auto "${small[@]}" --out "$folder"
step pack python -m benchmarks.data --pack "$([ ${#small[@]} -gt 0 ] && echo 20 || echo 10000)" --out "$folder"
step latency python -m benchmarks.latency "${small[@]}" --out "$folder"
step pretrain pretrain

echo
echo "Send these files:"
ls "$folder"/*.log "$folder"/*.log.part "$folder"/*.csv "$folder"/run/log.jsonl "$folder"/run/*.png 2> /dev/null
if [ ${#failed[@]} -gt 0 ]; then
    echo "error: these steps failed, and run again with the same command: ${failed[*]}" >&2
    exit 1
fi
