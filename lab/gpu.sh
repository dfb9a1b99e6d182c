#!/usr/bin/env bash
# What a machine with a GPU can say about this repository, in ten to twenty-five minutes:
#
#     bash lab/gpu.sh [--small] [FOLDER]           (FOLDER: runs/gpu)
#     TOTAL=540 bash lab/gpu.sh                    ends by itself after so many seconds
#
# In order of value: the gate of the kernels, 150 steps of three ways to run the loop, the default
# pre-training to its end, a probe and LoRA on it, tests, kernels alone, and a step beside
# transformers, which takes ten minutes itself. Each step writes FOLDER/STEP.log. A step whose log is
# there is skipped, so run it again after a stop: it goes on. A step that takes too long is stopped,
# and keeps the rows that it has. FOLDER/send is what to send, written anew after each step: logs and
# tables, and the weights in 16 bits, in pieces (cat weights.* | tar x). --small tries all of it on
# tiny inputs, on any Linux; without a GPU, the interpreter of Triton runs the gate.
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
mkdir -p "$folder/send" || exit 2
failed=()

send() {
    tar -czf "$folder/send/logs.tar.gz" -C "$folder" --exclude=send --exclude="*.pt" --exclude="*.safetensors" .
    if [ -e "$folder/half" ]; then
        tar -c -C "$folder" half | split -b 15M -d -a 1 - "$folder/send/weights."
    fi
}

# step NAME SECONDS COMMAND...: the log gets its name when the command has succeeded.
step() {
    local log="$folder/$1.log" command=("${@:3}")
    if [ -e "$log" ]; then
        echo "== $1: $log is there, skipped"
        return
    fi
    local left=$((${TOTAL:-86400} - SECONDS))
    if [ "$left" -lt 15 ]; then
        failed+=("$1")
        return 1
    fi
    echo "== $1, after $SECONDS s: ${command[*]}"
    if { echo "\$ ${command[*]}"; timeout -k 5 -s INT $(($2 < left ? $2 : left)) "${command[@]}" < /dev/null; } 2>&1 | tee "$log.part" | tail -n 4; then
        mv "$log.part" "$log"
    else
        failed+=("$1")
    fi
    send
    [ -e "$log" ]
}

facts() {
    date -u
    git describe --always --dirty
    nvidia-smi || echo "no nvidia-smi here"
    lscpu | head -n 20
    python3 -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())'
    python3 -m pip list | grep -iE '^(torch|triton|transformers|numpy|nvidia-[a-z]+) '
    return 0
}

export -f facts

gpu=$(python3 -c 'import torch; print(int(torch.cuda.is_available()))') || exit 2
if [ "$gpu" = 0 ] && [ ${#small[@]} -eq 0 ]; then
    echo "error: torch sees no GPU here; bash lab/gpu.sh --small tries all steps without one" >&2
    exit 2
fi

# Training goes on where it was stopped. A tiny run: a CPU's network with one block, no guidance.
train=(--mask attn_high --ratio 0.75)
lora=(--method lora)
if [ ${#small[@]} -gt 0 ]; then
    train=(--model nano:depth=1,image_size=32 --epochs 1 --mask random)
    lora+=(--epochs 1)
fi
pretrain=(pretrain.py "${train[@]}" --out "$folder/run")
if [ -e "$folder/run/state.pt" ]; then
    pretrain=(pretrain.py --resume "$folder/run")
fi

lora=(finetune_lora.py "$folder/run" "${lora[@]}" --out "$folder/lora")
if [ -e "$folder/lora/state.pt" ]; then
    lora=(finetune_lora.py --resume "$folder/lora")
fi

step machine 30 bash -c facts
# A speed is never reported where the kernels are wrong.
step gate 300 env TRITON_INTERPRET=$((1 - gpu)) python3 -m pytest -q -n 4 tests/lesson/test_kernels.py || {
    echo "error: the gate is not green, so nothing is timed. Send $folder/send" >&2
    exit 2
}
# What decides: do graphs give the losses of a plain loop, and what do they and cuDNN's attention bring?
step loop 300 python3 -m lab.bench_loop "${small[@]}" --out "$folder"
if step pretrain 330 python3 "${pretrain[@]}"; then
    step weights 30 python3 -m apps.export "$folder/run" --to half --out "$folder/half"
    step probe 40 python3 probe.py "$folder/run" --headline
    step lora 150 python3 "${lora[@]}"
fi
if [ ${#small[@]} -eq 0 ]; then
    step tests 200 python3 -m pytest -q -n 4 --dist load tests/lesson/test_gpu.py
fi
step kernels 100 python3 -m lab.bench_kernels "${small[@]}" --turns 2 --out "$folder"
step peers 900 python3 -m lab.bench_step "${small[@]}" --turns 1 --out "$folder"

echo "Send $folder/send, after $SECONDS s"
if [ ${#failed[@]} -gt 0 ]; then
    echo "error: these steps failed, and run again with the same command: ${failed[*]}" >&2
    exit 1
fi
