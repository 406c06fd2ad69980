"""The hot path of unlearning, one operation a file: formula, reference, eager path, public function.

Another distribution on PyPI installs a package called `kernels` too; `DISTRIBUTION` tells which one
this is.
"""

from kernels._backend import resolve_backend, triton_problems
from kernels.info_nce import info_nce
from kernels.mask import mask_patches, mask_tokens
from kernels.rollout import attention_rollout, rollout_topk_mask
from kernels.rollout_stream import StreamedRollout

DISTRIBUTION = "lethe-unlearning"

__all__ = [
    "DISTRIBUTION",
    "StreamedRollout",
    "attention_rollout",
    "info_nce",
    "mask_patches",
    "mask_tokens",
    "resolve_backend",
    "rollout_topk_mask",
    "triton_problems",
]
