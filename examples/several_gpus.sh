#!/usr/bin/env bash
# The same unlearning on two ranks by the DeepSpeed launcher. Without a GPU the ranks are two processes on the CPU.
set -euo pipefail
LETHE=${LETHE:-lethe}
DEEPSPEED=${DEEPSPEED:-deepspeed}
out=${1:-runs/examples/several_gpus}
rm -rf "$out"
mkdir -p "$out"

if ! command -v "$DEEPSPEED" > /dev/null; then
    echo "this example needs DeepSpeed: pip install 'lethe-unlearning[distributed]'"
    exit 0
fi

$LETHE train --data digits --arch vit_tiny_patch16_224 --model-arg img_size=8 --model-arg patch_size=2 \
    --model-arg in_chans=1 --model-arg embed_dim=64 --model-arg depth=2 --model-arg num_heads=2 \
    --set lr=2e-3 --set batch_size=50 --set precision=fp32 --epochs 20 --out "$out/original"

# --8<-- [start:unlearn]
cat > "$out/zero2.json" << 'JSON'
{
  "train_micro_batch_size_per_gpu": "auto",
  "gradient_accumulation_steps": "auto",
  "train_batch_size": "auto",
  "gradient_clipping": "auto",
  "bf16": {"enabled": "auto"},
  "zero_optimization": {"stage": 2}
}
JSON
# 2 ranks with 25 samples each take the same steps as one process with 50.
$DEEPSPEED --num_gpus 2 --module engine unlearn --checkpoint "$out/original" \
    --data digits --forget random:0.1@0 --set batch_size=25 --set precision=fp32 \
    --set retain_epochs=3 --out "$out/unlearned" --deepspeed "$out/zero2.json"
# --8<-- [end:unlearn]
