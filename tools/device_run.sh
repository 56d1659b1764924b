#!/usr/bin/env bash
# Measures batch norm and ResNet-50's step on one accelerator, then runs S5 and S6 at the sources' length and width, in
# twelve minutes at most.
#
#   tools/device_run.sh OUT          on the accelerator: OUT/operation.json and OUT/resnet.json get ratios to Flax's and
#                                    PyTorch's, and the errors of the device's sums; OUT/smoothness and OUT/cifar get
#                                    results.json, curves and figures
#   tools/device_run.sh OUT --tiny   the same with a few steps of narrow networks, on any machine, to try it
#   tools/device_run.sh DIR --pack   beforehand, for a machine without a network: the packages that are not JAX's, and
#                                    CIFAR-10 from $TFDS_DATA_DIR, into DIR; there, set BNJAX_PACKED=DIR
#
# What is not done in its share of the time is left with its checkpoints: the same command goes on from there. Python is
# $PYTHON (python3); DATASET is cifar10, or cifar100 where it is at hand.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?say where the results go: tools/device_run.sh OUT [--tiny | --pack]}
python=${PYTHON:-python3}
mkdir -p "$out"

if [[ ${2:-} == --pack ]]; then
    "$python" -m pip install -q -c constraints.txt --target "$out/site" --upgrade ".[studies,data]" || exit 1
    rm -rf "$out"/site/{jax,jaxlib,numpy,scipy}*    # the machine's own, made for its accelerator
    mkdir -p "$out/data" && cp -rL "${TFDS_DATA_DIR:?}/cifar10" "$out/data/"
    du -sh "$out"
    exit
fi

if [[ -n ${BNJAX_PACKED:-} ]]; then
    export TFDS_DATA_DIR="$BNJAX_PACKED/data" PYTHONPATH="$PWD:$BNJAX_PACKED/site"
fi
export PYTHONUNBUFFERED=1 BNJAX_CACHE="${BNJAX_CACHE:-$out/cache}" XLA_PYTHON_CLIENT_PREALLOCATE=false
dataset=${DATASET:-cifar10}
if [[ ${2:-} == --tiny ]]; then
    seeds=2 smoothness=(--steps 20 --other-steps 20 --width 1) cifar=(--epochs 4 --steps-per-epoch 2 --width 2)
    operation=(--shapes 8x7x7x16 --rounds 3) resnet=(--batch 2 --side 32 --rounds 2 --compilations 1)
    shares=(600 600 600 600)
else
    seeds=${SEEDS:-3} smoothness=(--steps 15000 --width 64) cifar=(--steps-per-epoch 2000 --width 60)
    operation=(--shapes 64x56x56x64,256x7x7x2048,4096x1024,65536x256 --rounds 7)
    resnet=(--batch 128 --rounds 7 --compilations 1)
    shares=(90 150 220 240)
fi
peers=("flax linen" "flax linen, two-pass")
"$python" -c 'import torch' 2>/dev/null && peers+=(torch "torch, channels last")
common=(--seeds "$seeds" --dataset "$dataset" --resume --quiet --checkpoint-every 60)

status=0
measure() {  # NAME SECONDS ARGUMENT…
    local name=$1 seconds=$2 began=$SECONDS
    shift 2
    timeout --kill-after=20 "$seconds" "$python" "benchmarks/bench_$name.py" --json "$out/$name.json" "$@" || status=$?
    echo "$name: $((SECONDS - began)) s, status $status"
}
study() {  # NAME SECONDS ARGUMENT…
    local name=$1 seconds=$2 began=$SECONDS
    shift 2
    timeout --signal=TERM --kill-after=20 "$seconds" \
        "$python" -m bnjax run "$name" --out "$out/$name" "${common[@]}" "$@" || status=$?
    echo "$name: $((SECONDS - began)) s, status $status; $(ls "$out/$name" 2>/dev/null | tr '\n' ' ')"
}

"$python" -c 'import jax; print(jax.__version__, jax.devices())'
measure operation "${shares[0]}" --peers "${peers[@]}" "${operation[@]}"
measure resnet "${shares[1]}" "${resnet[@]}"
study smoothness "${shares[2]}" --variants none,bn "${smoothness[@]}"
study cifar "${shares[3]}" --variants sigmoid_none,sigmoid_bn,relu_none,relu_bn --devices 1 "${cifar[@]}"
exit "$status"
