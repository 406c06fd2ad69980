#!/usr/bin/env bash
# Everything that one GPU is asked for, in under 9 minutes: the kernels checked against float64, then their times, steps
# of training, scaling curves and the steps of retraining. A part that fails or runs out of its budget stops no other.
#   bench/gpu.sh [--dry-run]     OUT: folder of the results (runs/gpu). PYTHON: interpreter (python3).
#   --dry-run                    toy sizes on the CPU: shows that every part runs.
# Exit code: 0, 1 where a part failed or a kernel of ours is wrong, 2 without a GPU. Missed targets are no failure.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

PYTHON="${PYTHON:-python3}"
OUT="${OUT:-runs/gpu}"
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Set for all parts: retrain-cost takes the device from its settings.
device=cuda
dry=()
case "${1:-}" in
"") ;;
--dry-run) device=cpu dry=(--quick) ;;
*)
    echo "usage: bench/gpu.sh [--dry-run]" >&2
    exit 2
    ;;
esac
if [[ $device == cuda ]] && ! "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    echo "no CUDA device is here; bench/gpu.sh --dry-run runs every part on the CPU" >&2
    exit 2
fi
mkdir -p "$OUT"
rm -f "$OUT"/*.json "$OUT/parts.tsv" # of an earlier run: they would pass for this one's

# part NAME SECONDS ARGUMENTS...: `python -m bench ARGUMENTS --json OUT/NAME.json`, ended after so many seconds.
part() {
    local name=$1 budget=$2 began=$SECONDS code=0
    shift 2
    echo "=== $name: python -m bench $*, at most $budget s"
    timeout --signal=INT --kill-after=10 "$budget" "$PYTHON" -m bench "$@" --json "$OUT/$name.json" || code=$?
    printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - began))" "$budget" >>"$OUT/parts.tsv"
}

part check 60 kernels --device "$device" --quick
part kernels-rollout 75 kernels --device "$device" --only rollout "${dry[@]}"
part kernels-info_nce 60 kernels --device "$device" --only info_nce "${dry[@]}"
part kernels-mask 20 kernels --device "$device" --only mask "${dry[@]}"
part train 200 train --device "$device" --minutes 2.7 "${dry[@]}"
part unlearn 60 unlearn --device "$device" --only forget --only retain --only resolution --only model --only info_nce \
    "${dry[@]}"
part retrain-cost 50 retrain-cost --no-digits --set "device=$device" "${dry[@]}"

"$PYTHON" -m bench.kernel_speed.gpu_summary "$OUT"
