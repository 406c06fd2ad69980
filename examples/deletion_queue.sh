#!/usr/bin/env bash
# A deletion queue: requests with deadlines, made into new model versions. LETHE names another command, such as
# "python -m engine"; the argument names the output folder.
set -euo pipefail
LETHE=${LETHE:-lethe}
out=${1:-runs/examples/deletion_queue}
rm -rf "$out"
mkdir -p "$out"

$LETHE train --data digits --arch vit_tiny_patch16_224 --model-arg img_size=8 --model-arg patch_size=2 \
    --model-arg in_chans=1 --model-arg embed_dim=64 --model-arg depth=2 --model-arg num_heads=2 \
    --set lr=2e-3 --set batch_size=50 --set precision=fp32 --epochs 12 --out "$out/model"

# --8<-- [start:queue]
# The store: version 0000 is a copy of the model; these settings hold for every run.
$LETHE request init --store "$out/queue" --checkpoint "$out/model" --data digits \
    --method lethe --set batch_size=50 --set precision=fp32

# Two requests. Ids are checked against the data.
# The deadline is 30 days from receipt unless it is given.
printf '%s\n' 3 14 15 92 653 > "$out/mail.txt"
$LETHE request add --store "$out/queue" --ids "$out/mail.txt" --source "mail of 3 May"
$LETHE request add --store "$out/queue" --id 35 --id 89 --days 7 --source "web form"

# One batch of both. Seven samples are too few for a PASS, so the exit code is 3
# (INSUFFICIENT EVIDENCE): version 0001 is the current one, and its requests are
# unproven until a later verdict passes.
$LETHE request run --store "$out/queue" || test $? -eq 3
$LETHE request status --store "$out/queue"
# --8<-- [end:queue]
