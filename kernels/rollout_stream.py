"""Attention rollout from the attention maps of a forward pass, each read once and not stored.

A model with explicit attention computes every map A_l [B, H, N, N] anyway, but in the order 1..L, while the row of
`lethe_kernels.rollout` runs from L to 1. So the product is carried instead, from the first layer on:

    R_l = A~_l R_(l-1),  R_0 = I        scores = start R_L on the patch tokens

Legend, formulas and source are those of `lethe_kernels.rollout`.

Cost: 2 B N^3 flops a layer except for the first and the last, which need no product; no q k^T, since the model
has computed it. Memory: 3 B N^2 floats, 3 / (L H) of all maps (2% for ViT-B), while q and k of all layers take as
much as the maps. That is less than q and k cost as long as N is small compared with H d, as at 224 pixels. On a GPU
attention is fused and there are no maps: use `lethe_kernels.attention_rollout` there.
"""

import torch
from torch import Tensor

from ._backend import check_float, check_int, check_tensor, compute_dtype, without_autocast
from .rollout import HeadFusion, Mode, Pool, check_rollout, start_row


class StreamedRollout:
    """Compute `attention_rollout` from maps that come one layer at a time.

    Call `add` with the map of each layer, first layer first, then `scores`.

    Args:
        num_prefix_tokens: Tokens before the first patch; 1 or more for pool="token".
        mode: "rollout", "last" or "mean", as for `lethe_kernels.attention_rollout`.
        head_fusion: "mean", "max" or "min".
        residual: Weight of the identity, from 0 to 1.
        pool: "token" or "avg".

    Raises:
        ValueError: An option or, in `add`, a map does not fit.
    """

    def __init__(
        self,
        *,
        num_prefix_tokens: int = 1,
        mode: Mode = "rollout",
        head_fusion: HeadFusion = "mean",
        residual: float = 0.5,
        pool: Pool = "token",
    ) -> None:
        check_rollout("StreamedRollout", mode, head_fusion, residual, pool)
        least = 1 if pool == "token" else 0
        self.prefix = check_int(
            "StreamedRollout", "num_prefix_tokens", num_prefix_tokens, least, 1 << 30, f"for pool={pool!r}"
        )
        self.mode, self.head_fusion, self.residual, self.pool = mode, head_fusion, float(residual), pool
        self.layers = 0
        self._shape: tuple[int, int] | None = None  # B, N
        self._row_BN: Tensor | None = None  # last: of the newest layer; mean: summed over the layers
        self._newest_BNN: Tensor | None = None
        self._product_BNN: Tensor | None = None
        self._spare_BNN: Tensor | None = None

    @torch.no_grad()
    def add(self, attention: Tensor) -> None:
        """Add the attention of the next layer, float [B, H, N, N] with rows that sum to one; it is not stored."""
        op = "StreamedRollout.add"
        check_tensor(op, "attention", attention, "B, H, N, N")
        check_float(op, "attention", attention)
        batch, _, tokens, columns = attention.shape
        if columns != tokens or tokens <= self.prefix:
            raise ValueError(
                f"{op}: attention has shape {tuple(attention.shape)}, expected (B, H, N, N)"
                f" with N above num_prefix_tokens={self.prefix}"
            )
        if self._shape not in (None, (batch, tokens)):
            raise ValueError(
                f"{op}: attention has shape {tuple(attention.shape)}, expected B and N to be {self._shape}"
                " as in the layers before it"
            )
        self._shape = batch, tokens
        self.layers += 1
        with without_autocast(attention.device):
            if self.mode == "rollout":
                self._fold()
                self._newest_BNN = self._fused(attention)
                return
            rows = slice(0, 1) if self.pool == "token" else slice(self.prefix, None)
            row_BN = self._fused(attention[:, :, rows]).mean(dim=1)
            self._row_BN = row_BN if self.mode == "last" or self._row_BN is None else self._row_BN + row_BN

    @torch.no_grad()
    def scores(self) -> Tensor:
        """Return scores [B, P] float32 of the layers added so far, at least one."""
        if self.layers == 0:
            raise ValueError("StreamedRollout.scores: no layer was added, expected at least one")
        row_BN = self._rollout_row() if self._row_BN is None else self._row_BN
        if self.mode == "mean":
            row_BN = row_BN / self.layers
        if not bool(row_BN.sum().isfinite()):
            raise ValueError("StreamedRollout.scores: attention holds NaN or infinity, expected finite values")
        return row_BN[:, self.prefix :].to(torch.float32)

    def _fused(self, attention_BHRN: Tensor) -> Tensor:
        attention_BHRN = attention_BHRN.to(compute_dtype(attention_BHRN.dtype))
        if self.head_fusion == "mean":
            return attention_BHRN.mean(dim=1)
        fused_BRN = attention_BHRN.amax(dim=1) if self.head_fusion == "max" else attention_BHRN.amin(dim=1)
        sums_BR1 = fused_BRN.sum(dim=-1, keepdim=True)
        # The minimum of sharp heads can be a row of zeros, whose sum cannot be a divisor.
        return torch.where(sums_BR1 == 0, 1 / fused_BRN.shape[-1], fused_BRN / sums_BR1)

    def _rollout_row(self) -> Tensor:  # [B, N]
        assert self._newest_BNN is not None
        start_N = start_row(self._newest_BNN[:, 0], self.prefix, self.pool)
        with without_autocast(self._newest_BNN.device):
            row_BN = self.residual * start_N + (1 - self.residual) * (start_N @ self._newest_BNN)
            return row_BN if self._product_BNN is None else (row_BN.unsqueeze(1) @ self._product_BNN).squeeze(1)

    def _fold(self) -> None:
        """Multiply the newest layer's map into the product, R <- A~ R, when a later layer follows."""
        mixed_BNN = self._newest_BNN
        if mixed_BNN is None:
            return
        mixed_BNN.mul_(1 - self.residual).diagonal(dim1=1, dim2=2).add_(self.residual)
        if self._product_BNN is None:
            self._product_BNN = mixed_BNN
            return
        if self._spare_BNN is None:
            self._spare_BNN = torch.empty_like(mixed_BNN)
        torch.bmm(mixed_BNN, self._product_BNN, out=self._spare_BNN)
        self._product_BNN, self._spare_BNN = self._spare_BNN, self._product_BNN
