"""Operations of the unlearning step, one a file: formula, reference, eager path and public function.

The distribution installs them as `lethe_kernels`, because `kernels` is the package of another distribution. In a
checkout this folder can be imported as `kernels` too, which gives the same module: see `_checkout.py`.
"""

if __name__ == "lethe_kernels":
    from ._backend import resolve_backend, triton_problems
    from .info_nce import info_nce
    from .mask import mask_patches, mask_tokens
    from .rollout import attention_rollout, rollout_topk_mask
    from .rollout_stream import StreamedRollout
else:
    from ._checkout import share_name

    share_name(__name__)

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
