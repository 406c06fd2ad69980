"""The table of `tests/mutation/mutation.py`: ways to break the code, and the tests that must notice.

To add one: a line in the group of its file, `old` an exact text that occurs there once. `new` must still be valid
Python, since a module that does not load proves nothing.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutant:
    """name: group-what is broken. old becomes new in `file`; one of `targets` (pytest paths) must then go red."""

    name: str
    file: str
    old: str
    new: str
    targets: tuple[str, ...]


def group(prefix: str, file: str, targets: tuple[str, ...], *mutants: tuple[str, str, str]) -> list[Mutant]:
    """Mutants (name, old, new) of one file, which the same tests cover."""
    return [Mutant(f"{prefix}-{name}", file, old, new, targets) for name, old, new in mutants]


MASK_TESTS = ("tests/kernels/test_mask_triton.py", "tests/kernels/test_mask_patches.py")
ROLLOUT_TESTS = ("tests/kernels/test_rollout_triton.py", "tests/kernels/test_rollout_ops.py")
INFO_NCE_TESTS = ("tests/kernels/test_info_nce_triton.py",)

MUTANTS = [
    *group(
        "paired",
        "kernels/_triton/info_nce.py",
        INFO_NCE_TESTS,
        ("temperature-dropped", "logits = logits * (a_inverse / temperature)", "logits = logits * a_inverse"),
        ("negatives-not-normalised", "logits = logits * n_inverse", "logits = logits * 1.0"),
        ("eps-dropped", "1 / tl.maximum(tl.sqrt(squares), EPS)", "1 / tl.sqrt(squares)"),
        (
            "padded-negatives-count",
            'logits = tl.where(negatives < K, logits, -float("inf"))',
            "logits = tl.where(negatives < K, logits, 0.0)",
        ),
        ("no-maximum-taken-off", "higher = tl.maximum(peak, tl.max(logits, 0))", "higher = tl.full([], 0.0, dtype)"),
        ("running-sum-not-rescaled", "total = total * tl.exp(peak - higher) +", "total = total +"),
        ("positive-not-normalised", "positive = positive * p_inverse", "positive = positive * 1.0"),
        ("series-one-term-off", "1.0 / (2 * (TERMS - term) - 1)", "1.0 / (2 * (TERMS - term) + 1)"),
        (
            "negative-stride-of-anchor",
            "negatives_ptr + row * stride_nb + negatives[:, None] * stride_nk + features[None, :] * stride_nd,\n"
            "                mask=(negatives",
            "negatives_ptr + row * stride_ab + negatives[:, None] * stride_nk + features[None, :] * stride_nd,\n"
            "                mask=(negatives",
        ),
        (
            "weight-without-sigmoid",
            "tl.load(grad_ptr + row * stride_g) / (1 + tl.exp(positive - lse))",
            "tl.load(grad_ptr + row * stride_g)",
        ),
        ("upstream-stride-ignored", "tl.load(grad_ptr + row * stride_g) /", "tl.load(grad_ptr + row) /"),
        ("anchor-gradient-without-pull", "a_grad -= pull * p + radial", "a_grad -= radial"),
        ("anchor-gradient-not-projected", "radial * _inward(a_inverse, COSINE, LONG_INVERSE) * a", "0 * a"),
        (
            "positive-gradient-not-projected",
            "weight * positive * _inward(p_inverse, COSINE, LONG_INVERSE) * p - pull * a",
            "-pull * a",
        ),
        (
            "negative-gradient-not-projected",
            "push[:, None] * a[None, :] - inward[:, None] * n",
            "push[:, None] * a[None, :]",
        ),
        ("short-rows-projected", "tl.where(inverse < LONG_INVERSE, inverse * inverse, 0)", "inverse * inverse"),
        ("temperature-gradient-without-positive", "radial = -weight * positive", "radial = 0 * positive"),
        ("temperature-gradient-sign", "return -radial_B.sum() / temperature", "return radial_B.sum() / temperature"),
    ),
    *group(
        "shared",
        "kernels/_triton/info_nce_shared.py",
        INFO_NCE_TESTS,
        ("temperature-dropped", "other=0.0) / tl.load(temperature_ptr)\n    peak", "other=0.0)\n    peak"),
        (
            "itself-not-skipped",
            "((skip < 0) | (negatives[None, :] != anchors[:, None] + skip))",
            "(negatives[None, :] >= 0)",
        ),
        (
            "skip-off-by-one",
            "((skip < 0) | (negatives[None, :] != anchors[:, None] + skip))",
            "((skip < 0) | (negatives[None, :] != anchors[:, None] + skip + 1))",
        ),
        ("padded-negatives-count", "seen = (negatives < M)[None, :] &", "seen = (negatives >= 0)[None, :] &"),
        ("all-skipped-is-nan", 'tl.where(higher == -float("inf"), 0.0, higher)', "higher"),
        ("running-sum-not-rescaled", "total = total * tl.exp(peak - finite) +", "total = total +"),
        ("last-share-dropped", "for _ in range(0, S):\n        peak", "for _ in range(0, S - 1):\n        peak"),
        ("shares-not-rescaled", "* tl.exp(share_peak - peak)", "* 1.0"),
        ("push-scale-dropped", "grad *= tl.load(push_scale_ptr)", "grad *= 1.0"),
        (
            "push-skips-the-other-way",
            "(rows[:, None] != columns[None, :] + skip)",
            "(rows[:, None] + skip != columns[None, :])",
        ),
        (
            "push-weight-of-the-row",
            "weight = tl.load(weight_ptr + columns, mask=columns < C, other=0.0)[None, :]",
            "weight = tl.load(weight_ptr + rows, mask=rows < R, other=0.0)[:, None]",
        ),
        (
            "columns-not-normalised",
            "push = _dot(share * inverse[None, :], y, push, PRECISION, WIDEN)",
            "push = _dot(share, y, push, PRECISION, WIDEN)",
        ),
        ("pull-dropped", "HAS_PULL=pulled_to is not None", "HAS_PULL=False"),
        (
            "strides-swapped",
            "*rows_RD.stride(),\n            *columns_CD.stride(),",
            "*columns_CD.stride(),\n            *rows_RD.stride(),",
        ),
        (
            "last-tiles-dropped",
            "return triton.cdiv(tiles, tiles_each), tiles_each",
            "return max(1, tiles // tiles_each), tiles_each",
        ),
        ("feature-bound-dropped", "(features < D - first_feature)[None, :]", "(features >= 0)[None, :]"),
    ),
    *group(
        "info-nce",
        "kernels/_info_nce_eager.py",
        ("tests/kernels/test_info_nce.py",),
        ("itself-not-skipped", "logits.diagonal(skip + rows.start - columns.start).fill_(-torch.inf)", "pass"),
        ("skip-of-a-chunk-wrong", "logits.diagonal(skip + rows.start - columns.start)", "logits.diagonal(skip)"),
        ("eps-dropped", "clamp_min_(EPS).reciprocal_()", "reciprocal_()"),
        (
            "not-projected",
            "grad.addcmul_(normalised, radial.unsqueeze(-1), value=-1).mul_(inverse.unsqueeze(-1))",
            "grad.mul_(inverse.unsqueeze(-1))",
        ),
        ("chunks-not-added-up", "lse_B[rows] = torch.logaddexp(lse_B[rows], total)", "lse_B[rows] = total"),
        (
            "no-maximum-taken-off",
            "largest = logits.amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(logits.dtype).min)",
            "largest = logits.new_zeros(len(logits), 1)",
        ),
        ("whole-similarities", "side = _chunk(anchors_BD.device)", "side = 10**6"),
        ("temperature-gradient-sign", "grads[3] = -(anchors_push_BD", "grads[3] = (anchors_push_BD"),
    ),
    *group(
        "rollout",
        "kernels/_triton/rollout_kernel.py",
        ROLLOUT_TESTS,
        (
            "scale-dropped",
            "unit_factor = factor if FUSION == _MEAN else 1.0\n    head_lse_ptr",
            "unit_factor = 1.0\n    head_lse_ptr",
        ),
        (
            "scale-dropped-from-lse",
            "unit_factor = factor if FUSION == _MEAN else 1.0\n    for block",
            "unit_factor = 1.0\n    for block",
        ),
        ("residual-dropped", "columns += residual * _row(", "columns += 0 * _row("),
        ("residual-in-every-part", "if part == 0:  # the identity", "if part >= 0:  # the identity"),
        ("gain-dropped", "columns = tl.sum(weights, 0) * gain", "columns = tl.sum(weights, 0)"),
        ("padded-keys-count", 'tl.where((cols < N)[None, :], logits, float("-inf"))', "logits"),
        (
            "rows-from-limit-on-are-read",
            "mask=(tokens < limit)[:, None] & (features < D)[None, :]",
            "mask=(features < D)[None, :] & (tokens >= 0)[:, None]",
        ),
        (
            "features-past-the-width-are-read",
            "mask=(tokens < limit)[:, None] & (features < D)[None, :]",
            "mask=(tokens < limit)[:, None] & (features >= 0)[None, :]",
        ),
        (
            "no-maximum-taken-off",
            "attention = tl.exp2(tile * unit_factor - peak[:, None])",
            "attention = tl.exp2(tile * unit_factor)",
        ),
        (
            "no-maximum-taken-off-in-lse",
            "higher = tl.maximum(peak, tl.max(tile, 1) * unit_factor)",
            "higher = tl.zeros([BI], tl.float32)",
        ),
        ("running-sum-not-rescaled", "total = total * tl.exp2(peak - higher) +", "total = total +"),
        ("rows-not-normalised", "share /= tl.sum(attention, 1)", "share /= 1.0"),
        (
            "heads-not-normalised",
            "tile = tl.maximum(tile, logits * factor - lse[:, None]",
            "tile = tl.maximum(tile, logits * factor",
        ),
        (
            "nan-hidden-by-max",
            "tl.maximum(tile, logits * factor - lse[:, None], propagate_nan=tl.PropagateNan.ALL)",
            "tl.maximum(tile, logits * factor - lse[:, None])",
        ),
        (
            "nan-hidden-by-min",
            "tl.minimum(tile, logits * factor - lse[:, None], propagate_nan=tl.PropagateNan.ALL)",
            "tl.minimum(tile, logits * factor - lse[:, None])",
        ),
        ("max-is-min", 'float("-inf") if FUSION == _MAX else float("inf"), tl.float32)', 'float("-inf"), tl.float32)'),
        (
            "last-part-dropped",
            "for part in range(1, parts):\n            total",
            "for part in range(1, parts - 1):\n            total",
        ),
        (
            "start-of-average-counts-prefix",
            "(tokens >= PREFIX) & (tokens < N), 1.0 / (N - PREFIX), 0.0)",
            "(tokens >= 0) & (tokens < N), 1.0 / N, 0.0)",
        ),
        ("start-is-token-1", "start = tl.where(tokens == 0, 1.0, 0.0)", "start = tl.where(tokens == 1, 1.0, 0.0)"),
        (
            "mean-forgets-earlier-layers",
            "mask=cols < tl.where(first != 0, 0, N), other=0.0)",
            "mask=cols < 0, other=0.0)",
        ),
        (
            "mean-adds-what-was-there-before",
            "mask=cols < tl.where(first != 0, 0, N), other=0.0)",
            "mask=cols < N, other=0.0)",
        ),
        ("layers-first-to-last", "index = LAYERS - 1 - (step - step_low)", "index = step - step_low"),
        (
            "halves-not-swapped",
            "rows_ptr + (((step + 1) % 2) * B + image) * parts * N,\n            lse_ptr",
            "rows_ptr + ((step % 2) * B + image) * parts * N,\n            lse_ptr",
        ),
        (
            "finished-row-from-the-other-half",
            "rows_ptr + ((step_high % 2) * B + image) * parts * N,",
            "rows_ptr + (((step_high + 1) % 2) * B + image) * parts * N,",
        ),
        ("image-0-for-all", "_pick(keys, index, LAYERS) + image * stride_kb", "_pick(keys, index, LAYERS) + image * 0"),
        (
            "token-strides-swapped",
            "stride_qh, stride_qn, stride_qd, stride_kh, stride_kn, stride_kd = strides",
            "stride_qh, stride_kn, stride_qd, stride_kh, stride_qn, stride_kd = strides",
        ),
        ("k-one-more", "room = k - tl.sum(above.to(tl.int32), 0)", "room = k + 1 - tl.sum(above.to(tl.int32), 0)"),
        ("ties-to-the-highest-index", "tl.cumsum(tied, 0) <= room", "tl.sum(tied, 0) - tl.cumsum(tied, 0) < room"),
        (
            "prefix-tokens-may-win",
            "bits = tl.where(patch, row.to(tl.int32, bitcast=True), -1)",
            "bits = row.to(tl.int32, bitcast=True)",
        ),
        ("ties-not-counted", "(bits >= higher).to(tl.int32)", "(bits > higher).to(tl.int32)"),
        ("lowest-bit-not-looked-at", "for step in range(31):", "for step in range(30):"),
        ("finite-always", '(tl.abs(total) < float("inf")).to(tl.int8)', "(total == total).to(tl.int8) * 0 + 1"),
        (
            "row-block-dropped",
            "share_h, share_i = tl.cdiv(units, parts_h), tl.cdiv(tl.cdiv(N, BI), parts_i)",
            "share_h, share_i = tl.cdiv(units, parts_h), tl.cdiv(N, BI) // parts_i",
        ),
    ),
    *group(
        "rollout",
        "kernels/_triton/rollout.py",
        ROLLOUT_TESTS,
        ("one-stride-for-all-layers", "if chosen.persistent and alike:", "if chosen.persistent:"),
        (
            "empty-parts",
            "parts_h = triton.cdiv(heads, triton.cdiv(heads, min(heads, wanted)))",
            "parts_h = min(heads, wanted)",
        ),
        ("last-takes-first-layer", "queries, keys = queries[-1:], keys[-1:]", "queries, keys = queries[:1], keys[:1]"),
        ("scale-in-natural-units", "scale * math.log2(math.e)", "scale"),
    ),
    *group(
        "rollout",
        "kernels/rollout.py",
        ("tests/kernels/test_rollout.py", "tests/kernels/test_rollout_ops.py", "tests/kernels/test_rollout_triton.py"),
        ("chunk-one-image-short", "for low in range(0, batch, images)", "for low in range(0, batch - 1, images)"),
        ("fake-has-prefix-too", "(batch, tokens - num_prefix_tokens), dtype=dtype", "(batch, tokens), dtype=dtype"),
        ("not-finite-unseen", "if not bool((finite.isfinite() & (finite != 0)).all()):", "if False:"),
        (
            "ties-unstable",
            "torch.sort(scores_BP, dim=1, descending=True, stable=True).indices",
            "torch.sort(scores_BP.flip(1), dim=1, descending=True).indices",
        ),
    ),
    *group(
        "stream",
        "kernels/rollout_stream.py",
        ("tests/kernels/test_rollout_stream.py",),
        ("order-of-products", "bmm(mixed_BNN, self._product_BNN, out", "bmm(self._product_BNN, mixed_BNN, out"),
        ("residual-dropped", "diagonal(dim1=1, dim2=2).add_(self.residual)", "diagonal(dim1=1, dim2=2).add_(0)"),
        (
            "start-dropped",
            "self.residual * start_N + (1 - self.residual) * (start_N @ self._newest_BNN)",
            "start_N @ self._newest_BNN",
        ),
        (
            "newest-counted-twice",
            "                self._fold()\n                self._newest_BNN = self._fused(attention)\n",
            "                self._newest_BNN = self._fused(attention)\n                self._fold()\n",
        ),
        ("mean-not-divided", "row_BN = row_BN / self.layers", "pass"),
        (
            "zero-row-divided",
            "torch.where(sums_BR1 == 0, 1 / fused_BRN.shape[-1], fused_BRN / sums_BR1)",
            "fused_BRN / sums_BR1",
        ),
        ("map-kept", "self._shape = batch, tokens\n", "self._shape = batch, tokens\n        self.kept = attention\n"),
        ("half-sums", "attention_BHRN = attention_BHRN.to(compute_dtype(attention_BHRN.dtype))", "pass"),
    ),
    *group(
        "mask",
        "kernels/_triton/mask.py",
        MASK_TESTS,
        ("mask-inverted", "tl.where(masked_RC, fill, pixels_RC)", "tl.where(masked_RC, pixels_RC, fill)"),
        ("mask-ignored", "tl.where(masked_RC, fill, pixels_RC)", "pixels_RC"),
        ("value-dropped", "tl.where(masked_RC, fill, pixels_RC)", "tl.where(masked_RC, 0, pixels_RC)"),
        ("value-of-channel-0", "fill_ptr + channel * fill_c", "fill_ptr + channel * 0"),
        ("value-stride-ignored", "fill_ptr + channel * fill_c", "fill_ptr + channel"),
        ("patch-sizes-swapped", "(y // patch_h).to", "(y // patch_w).to"),
        ("patch-row-off-by-one", "(y // patch_h).to", "((y + 1) // patch_h).to"),
        ("mask-strides-swapped", "patch_y * mask_h + patch_x * mask_w", "patch_y * mask_w + patch_x * mask_h"),
        ("mask-of-image-0", "mask_ptr + image * mask_b +", "mask_ptr + image * 0 +"),
        ("image-0-for-all", "images_ptr + image * image_b", "images_ptr + image * 0"),
        ("image-strides-swapped", "y * image_h + x * image_w", "y * image_w + x * image_h"),
        ("result-strides-swapped", "y * out_h + x * out_w", "y * out_w + x * out_h"),
        ("reads-as-the-result-lies", "*_strides(images_BCHW),", "*_strides(out_BCHW),"),
        ("row-bound-dropped", "(row_R1 < rows) & (col_1C < cols)", "(row_R1 >= 0) & (col_1C < cols)"),
        ("column-bound-dropped", "(row_R1 < rows) & (col_1C < cols)", "(row_R1 < rows) & (col_1C >= 0)"),
        ("last-column-dropped", "(col_1C < cols)", "(col_1C < cols - 1)"),
        (
            "planar-rows-as-inside",
            "row_R1 % height, col_1C, row_R1 // height",
            "row_R1 % channels, col_1C, row_R1 // channels",
        ),
        ("inside-columns-as-planar", "col_1C // channels, col_1C % channels", "col_1C // width, col_1C % width"),
        ("image-index-wrong", "(tile // (row_tiles * col_tiles))", "(tile // row_tiles)"),
        ("row-tile-wrong", "(tile // col_tiles) % row_tiles * ROWS", "tile % row_tiles * ROWS"),
        (
            "pixel-offsets-32-bit",
            "y, x, channel = y.to(tl.int64), x.to(tl.int64), channel.to(tl.int64)",
            "y, x, channel = y, x, channel",
        ),
        ("image-offset-32-bit", "(tile // (row_tiles * col_tiles)).to(tl.int64)", "tile // (row_tiles * col_tiles)"),
        ("mask-offset-32-bit", "(x // patch_w).to(tl.int64)", "x // patch_w"),
        (
            "exchange-forgets-the-mask",
            "images_BCHW.mT, mask_Bgg.mT, out_BCHW.mT",
            "images_BCHW.mT, mask_Bgg, out_BCHW.mT",
        ),
        ("exchange-forgets-the-patch", "(patch_size[1], patch_size[0])", "(patch_size[0], patch_size[1])"),
        ("too-few-tiles", "tiles = batch * triton.cdiv(rows, tile_rows)", "tiles = batch * max(1, rows // tile_rows)"),
        (
            "layout-always-contiguous",
            'torch.empty_like(images_BCHW, device="meta").stride()',
            'torch.empty(images_BCHW.shape, device="meta").stride()',
        ),
    ),
    *group(
        "mask",
        "kernels/mask.py",
        MASK_TESTS,
        (
            "fake-always-contiguous",
            ") -> Tensor:\n    return torch.empty_like(images_BCHW)\n",
            ") -> Tensor:\n    return torch.empty(images_BCHW.shape, dtype=images_BCHW.dtype)\n",
        ),
        ("eager-lays-out-as-where-would", ", out=torch.empty_like(images_BCHW))", ")"),
        (
            "gradient-passes-masked-pixels",
            "grad_images = _mask_patches_op(grad_BCHW, mask_BP, zero_C, patch_h, patch_w, backend)",
            "grad_images = grad_BCHW.clone()",
        ),
        ("value-gradient-of-all-patches", "torch.where(mask_BP.reshape(batch, 1, *grid), sums_BCgg, 0)", "sums_BCgg"),
        (
            "value-gradient-by-product",
            "torch.where(mask_BP.reshape(batch, 1, *grid), sums_BCgg, 0)",
            "mask_BP.reshape(batch, 1, *grid) * sums_BCgg",
        ),
        ("value-gradient-in-half", "dtype=compute_dtype(grad_BCHW.dtype))", "dtype=grad_BCHW.dtype)"),
        ("triton-never-runs", 'if backend == "triton":', 'if backend == "none":'),
        ("tokens-across", "tokens.transpose(1, 2).unsqueeze(3)", "tokens.unsqueeze(3)"),
        ("token-dtype-unchecked", 'check_dtype(op, "token", token, tokens.dtype, "tokens")', "pass"),
        ("mask-device-unchecked", 'check_device(op, "mask", mask, tokens.device, "tokens")', "pass"),
    ),
    *group(
        "tokens",
        "engine/models/masked_tokens.py",
        ("tests/engine/models/test_masked_tokens.py",),
        ("norm-left-out", "embed(image).flatten(0, -2)[0]", "embed.proj(image)[0, :, 0, 0]"),
        ("value-zero", "value.to(embed.proj.weight)", "(value * 0).to(embed.proj.weight)"),
        ("hook-not-removed", "        handle.remove()\n", "        pass\n"),
        (
            "overlap-accepted",
            "projection.kernel_size == projection.stride == tuple(embed.patch_size)",
            "projection.stride == tuple(embed.patch_size)",
        ),
        ("padding-accepted", "        and projection.padding == (0, 0)\n", ""),
        (
            "swin-accepted",
            "        not attention_modules(model)  # Swin has none that is over all patches\n        or getattr",
            "        getattr",
        ),
    ),
    *group(
        "tokens",
        "engine/models/vit.py",
        ("tests/engine/models/test_masked_tokens.py",),
        ("forward-not-restored", "        del module.forward\n", "        pass\n"),
    ),
    *group(
        "pool",
        "engine/pool/references.py",
        ("tests/engine/pool/test_pool_references.py",),
        (
            "models-that-saw-the-sample",
            "unseen = np.ones((len(self.test), self.pool.models), dtype=bool)",
            "unseen = np.eye(self.pool.models, dtype=bool)[np.zeros(len(self.test), dtype=int)]",
        ),
        (
            "seen-for-unseen",
            "return self._of(samples, self.pool.unseen(samples.ids),",
            "return self._of(samples, ~self.pool.unseen(samples.ids),",
        ),
        ("old-pool-accepted", "if self.coverage.out_of_date:", "if False:"),
        ("any-size-accepted", "if mine != size:", "if mine == -size:"),
        ("knowledge-not-compared", "if value < expected - _SURE * error:", "if value < -expected:"),
    ),
    *group(
        "pool-store",
        "engine/pool/store.py",
        ("tests/engine/pool/test_pool_store.py",),
        ("edited-file-accepted", 'if facts["sha256"] != pool._checksum():', "if False:"),
        ("other-labels-accepted", "        if len(differing):\n", "        if False:\n"),
        ("other-images-accepted", "if found != expected[digest]:", "if False:"),
        ("later-samples-by-the-draw", "found[later, model - 1] = True", "pass"),
        ("any-record-accepted", "found.samples_sha256 != state.trained_on[str(number)]:", "False:"),
    ),
    *group(
        "simulation",
        "engine/pool/simulation.py",
        ("tests/engine/pool/test_pool_simulation.py",),
        (
            "test-samples-out-of-order",
            "order = np.argsort(_divided(len(references.test), len(found)))",
            "order = np.arange(len(references.test))",
        ),
        ("one-seed-for-all", '"seed": procedure.seed + number}', '"seed": procedure.seed}'),
        (
            "requests-overlap",
            "indices = rng.permutation(len(train))[: size * count]",
            "indices = rng.integers(0, len(train), size * count)",
        ),
    ),
    *group(
        "certificate",
        "engine/pool/certificate.py",
        ("tests/engine/pool/test_certificate.py",),
        ("edit-accepted", "    if not whole:\n", "    if False:\n"),
        ("never-expires", "if now >= expires:", "if False:"),
        ("any-size", "if not low <= covered.size <= high:", "if False:"),
        ("granted-without-power", '"granted": verdict.status == PASS and not powerless,', '"granted": True,'),
        ("one-run-more-forgotten", "* (1 + 1 / len(known)) ** 0.5", "* (1 / len(known)) ** 0.5"),
    ),
    *group(
        "pool-proof",
        "engine/requests/pool_proof.py",
        ("tests/engine/requests/test_requests_pool.py",),
        (
            "figures-not-compared",
            "for name, (value, allowed) in certificate.like(figures, len(part.forget)).items():",
            "for name, (value, allowed) in ():",
        ),
        ("certificate-for-any-run", "if not reason:", "if True:"),
    ),
]
