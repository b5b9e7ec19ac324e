#!/bin/bash
# A run on a TPU slice by xpk, which writes and submits the JobSet itself.
#
#   CLUSTER=my-cluster IMAGE=registry/readme-jax:1 launch/xpk.sh --gin_file configs/recipes/readme_llama2_7b.gin \
#       --output /runs/llama2_7b
#   DRY_RUN=1 CLUSTER=... IMAGE=... launch/xpk.sh ...      # xpk's own: prints the JobSet, submits nothing
#
# TPU_TYPE is the slice (v5p-128 is 4x4x4, 64 chips), NUM_SLICES how many of them.
set -euo pipefail

: "${CLUSTER:?name the xpk cluster}" "${IMAGE:?name the image that holds this repository}"
arguments=""
for argument in "$@"; do
    arguments+=" $(printf '%q' "$argument")"
done

xpk=(
    xpk workload create
    --cluster "$CLUSTER"
    --workload "${WORKLOAD:-readme-jax}"
    --docker-image "$IMAGE"
    --tpu-type "${TPU_TYPE:-v5p-128}"
    --num-slices "${NUM_SLICES:-1}"
    --max-restarts "${MAX_RESTARTS:-20}"
    --command "python train.py$arguments"
)
if [[ -n ${DRY_RUN:-} ]]; then
    xpk+=(--dry-run)
fi
if [[ -n ${PRINT_ONLY:-} ]]; then
    printf '%q ' "${xpk[@]}"
    printf '\n'
    exit 0
fi
exec "${xpk[@]}"
