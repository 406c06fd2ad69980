"""Comparison of features: are a model's features those of the original, or those of a model not trained on the forget
set?

A method that changes nothing but the head predicts like a retrained model and still holds all that it learned, one
linear layer away. So the features are compared layer by layer, with the original's and with those of retrained models:

* Linear CKA (Kornblith et al. 2019, arXiv 1905.00414): similarity of two sets of features of the same samples, for any
  rotation and scale of each; 1 = the same. With few samples and many features it is near 1 for any two models, so the
  debiased form (unbiased HSIC of Song et al. 2012, used in CKA by Nguyen et al. 2021, arXiv 2010.15327) is reported
  too: 0 for unrelated features, however few the samples.
* Cosine k-NN (k = 5) in the features at the input of the head: the class that the nearest retain samples vote for. Its
  accuracy on the forget set needs no head; and two models with the same neighbours have the same geometry.
* The distance of each layer's weights from the original's.

Every layer is read in the way of the head: the class token if the model pools that, else the mean of the patch tokens.
The patch embedding is always the mean of its patch tokens: its class token is the same for all images.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import t as student_t
from torch import Tensor, nn

from engine.data import Batch, Loader, Preprocessing, Samples
from engine.data.samples import evenly_spaced
from engine.errors import UserError, nearest
from engine.evaluate.intervals import Interval, bootstrap, proportion
from engine.evaluate.options import MOST_SAMPLES
from engine.models.info import ModelInfo, classifiers
from engine.models.preprocessing import preprocessing_of
from engine.models.vit import ViTInfo, describe, outputs
from engine.runtime.device import autocast, resolve_device, resolve_precision

NEIGHBOURS = 5

# The denominator of the debiased CKA is zero for three samples.
_LEAST_SAMPLES = 4
# Groups that the jackknife leaves out in turn.
_GROUPS = 20

FEATURES = "features"  # input of the head
EMBEDDING = "patch embedding"

DIRECTION = {
    "cka": "linear CKA in [0, 1]; 1 = the same features up to rotation and scale; target: that between two retrained "
    "models; near 1 for any two models where samples are few",
    "cka_debiased": "the same without that bias; 0 = unrelated",
    "share_of_way": "d_o / (d_o + d_r) with d = 1 - debiased CKA to the original and (mean) to the references; 0 = the "
    "original, 0.5 = as far from it as from the references, which is where an independent retrain stands, 1 = a "
    "reference",
    "knn_accuracy": "share of samples whose 5 nearest retained samples vote for their class; target: the references'",
    "neighbours": "share of the 5 nearest retained samples that both models have in common; 1 = the same geometry",
    "distance": "||w - w_original|| / ||w_original|| of each layer; 0 = untouched; null where the original's are 0",
    "changed": "share of the weights outside the head that differ from the original's",
}


def compare_features(
    models: Mapping[str, nn.Module],
    sets: Mapping[str, Samples],
    *,
    original: str = "original",
    references: Sequence[str] = (),
    bank: str = "retain",
    max_samples: int = MOST_SAMPLES,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "fp32",
    batch_size: int = 250,
    seed: int = 0,
    **loading: Any,
) -> dict[str, Any]:
    """Compare models of one architecture, each with the original and with the references; ready for JSON.

    Intervals are 95%, over samples: of shares Jeffreys', of neighbours bootstrapped, of CKA see `cka_interval`.

    Args:
        models: Models by name.
        sets: Forget, retain and test samples by name; of each at most `max_samples` are used, at equal distances, once
            a model.
        original: Name of the original in `models`.
        references: Names of the references in `models`.
        bank: Name of the set whose samples vote in the k-NN; a sample of it is not its own neighbour.
        max_samples: Most samples of each set.
        device, precision, batch_size: Of the forward passes.
        seed: Seed of the intervals.
        **loading: Further options of `engine.data.Loader` (workers, decode, on_bad_image, max_bad_share).

    Returns:
        layers (names, in the order of every list), samples (used of each set), k, direction, and by model: identical
            (every weight is the original's), untouched_backbone (every weight outside the head is), changed, distance
            (by part), and by set: knn_accuracy, share_of_way of each layer (None for the original, or without
            references), and `to`: by other model (the original and the references) cka and cka_debiased of each layer,
            and neighbours.

    Raises:
        UserError: A name does not exist, there are too few samples, or a model has another architecture.
    """
    for name in (original, *references):
        if name not in models:
            raise UserError(f"compare_features: no model {name!r}{nearest(name, models)}")
    if bank not in sets:
        raise UserError(f"compare_features: no set {bank!r}, whose samples vote in the k-NN{nearest(bank, sets)}")
    read = {name: evenly_spaced(samples, max_samples, name) for name, samples in sets.items()}
    for name, samples in read.items():
        least = NEIGHBOURS + 1 if name == bank else _LEAST_SAMPLES
        if len(samples) < least:
            raise UserError(f"compare_features: the {name} set has {len(samples)} samples, at least {least} are needed")
    where = resolve_device(device)
    precision = resolve_precision(precision, where)
    found: dict[str, dict[str, Any]] = {
        name: {**compare_weights(model, models[original], name), "sets": {}} for name, model in models.items()
    }
    layers: list[str] = []
    votes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for set_name in (bank, *(name for name in read if name != bank)):
        inside: dict[str, dict[str, np.ndarray]] = {}
        near: dict[str, np.ndarray] = {}
        loaders: dict[Preprocessing, Loader] = {}
        for name, model in models.items():
            preprocessing = preprocessing_of(model)
            if preprocessing not in loaders:  # decoded images are kept between models
                loaders[preprocessing] = Loader(
                    read[set_name], preprocessing, batch_size=batch_size, device=where, **loading
                )
            inside[name], labels = layer_features(model.to(where), loaders[preprocessing], precision)
            if set_name == bank:
                votes[name] = inside[name][FEATURES], labels
            near[name] = nearest_neighbours(inside[name][FEATURES], votes[name][0], leave_one_out=set_name == bank)
        layers = list(inside[original])
        for name in models:
            right = vote(near[name], votes[name][1]) == labels
            to = {
                other: _pair(inside[name], inside[other], near[name], near[other], seed)
                for other in (original, *references)
                if other != name
            }
            found[name]["sets"][set_name] = {
                "knn_accuracy": proportion(int(right.sum()), len(right)).to_dict(),
                "to": to,
                "share_of_way": _share_of_way(to, original, [r for r in references if r != name]),
            }
    return {
        "layers": layers,
        "samples": {name: len(samples) for name, samples in read.items()},
        "k": NEIGHBOURS,
        "direction": DIRECTION,
        "models": found,
    }


def _pair(
    mine: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    near_mine: np.ndarray,
    near_theirs: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    return {
        "cka": [cka_interval(mine[layer], theirs[layer], seed=seed).to_dict() for layer in mine],
        "cka_debiased": [linear_cka(mine[layer], theirs[layer], debiased=True) for layer in mine],
        "neighbours": bootstrap(np.mean, shared_neighbours(near_mine, near_theirs), seed=seed).to_dict(),
    }


def _share_of_way(to: Mapping[str, Any], original: str, references: Sequence[str]) -> list[float | None] | None:
    if original not in to or not references:
        return None
    far = {name: np.maximum(0, 1 - np.array(to[name]["cka_debiased"])) for name in (original, *references)}
    from_original = far[original]
    from_references = np.mean([far[name] for name in references], axis=0)
    whole = from_original + from_references
    # All three have the same features, so the share is not defined.
    return [float(o / w) if w > 1e-9 else None for o, w in zip(from_original, whole, strict=True)]


# --- features ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def layer_features(
    model: nn.Module, loader: Loader, precision: str = "fp32"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return features [n, width of the layer], float32, of every layer, and labels [n], from one pass in eval mode, in
    order.

    Layers: `patch embedding`, then `block 1` ... (Swin: `stage 1 block 1` ...), then `features`, the input of the head;
    `features` alone for models whose attention cannot be read. Unreadable images that the loader skips are left out.

    Args:
        model: The model.
        loader: Loader of the samples.
        precision: Precision of the forward pass.
    """
    info = describe(model)
    model.eval()
    named = _layers(model, info)
    kept: dict[str, Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for name, module in named.items():
            handle = module.register_forward_hook(functools.partial(_keep, kept, name, info))
            hooks.callback(handle.remove)

        def of(batch: Batch) -> tuple[Tensor, ...]:
            with autocast(loader.device, precision):
                kept[FEATURES] = outputs(model, batch.images, "features").float()
            return (*(kept[name] for name in (*named, FEATURES)), batch.labels)

        *rows, labels = loader.rows(of)
    found = labels >= 0
    features = {name: each[found].numpy() for name, each in zip((*named, FEATURES), rows, strict=True)}
    return features, labels[found].numpy()


@torch.no_grad()
def head_features(model: nn.Module, loader: Loader, precision: str = "fp32") -> tuple[np.ndarray, np.ndarray]:
    """Return the head's input [n, width], float32, and labels [n]: the last layer of `layer_features` alone."""
    model.eval()

    def of(batch: Batch) -> tuple[Tensor, Tensor]:
        with autocast(loader.device, precision):
            return outputs(model, batch.images, "features").float(), batch.labels

    rows, labels = loader.rows(of)
    found = labels >= 0
    return rows[found].numpy(), labels[found].numpy()


def _layers(model: Any, info: ModelInfo) -> dict[str, nn.Module]:
    """Return the layers before the features, by name; none if the model is not a ViT: the layouts would differ."""
    if not isinstance(info, ViTInfo) or not hasattr(model, "patch_embed"):
        return {}
    if info.windowed:
        blocks = {
            f"stage {i} block {j}": block
            for i, stage in enumerate(model.layers, 1)
            for j, block in enumerate(stage.blocks, 1)
        }
    else:
        blocks = {f"block {i}": block for i, block in enumerate(model.blocks, 1)}
    return {EMBEDDING: model.patch_embed, **blocks}


def _keep(kept: dict[str, Tensor], name: str, info: Any, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
    tokens_BND = output.flatten(1, -2).float()  # Swin's lie on a grid [B, H, W, D]
    if name == EMBEDDING:
        kept[name] = tokens_BND.mean(1)
    elif info.pool == "token":
        kept[name] = tokens_BND[:, 0]
    else:
        kept[name] = tokens_BND[:, info.num_prefix_tokens :].mean(1)


# --- CKA --------------------------------------------------------------------------------------------------------------


def linear_cka(first: np.ndarray, second: np.ndarray, *, debiased: bool = False) -> float:
    """Return the linear CKA of features of the same samples: 1 = the same up to rotation and scale; 0 if one is
    constant.

    ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F), columns centred, in float64: memory O((n + d) d), no [n, n] matrix is made.

    Args:
        first, second: Features [n, d1] and [n, d2].
        debiased: Use the unbiased HSIC of Song et al. 2012 in place of each norm; in [-1, 1], 0 expected for unrelated
            features. Its Gram matrices without diagonals reduce to the same products: with k_i = ||x_i||^2, l_i =
            ||y_i||^2 of centred rows, HSIC is proportional to ||Y'X||_F^2 - n/(n-2) sum k_i l_i + sum k_i sum l_i /
            ((n-1)(n-2)).

    Raises:
        UserError: The lengths differ, or there are fewer than 4 samples.
    """
    x, y = _centred(first, second)
    hsic = _unbiased_hsic if debiased else _biased_hsic
    return _ratio(hsic(x, y), hsic(x, x), hsic(y, y))


def cka_interval(first: np.ndarray, second: np.ndarray, *, level: float = 0.95, seed: int = 0) -> Interval:
    """Return the linear CKA with the interval of a jackknife that leaves out a random twentieth of the samples at a
    time.

    It is not a bootstrap: samples that are drawn twice are equal to themselves, which raises CKA in every draw, and
    with many features the whole interval would lie above the value. The groups left out are subtracted from the
    products, so it costs about two CKAs.
    """
    x, y = _centred(first, second)
    products = {"xy": x.T @ y, "xx": x.T @ x, "yy": y.T @ y}
    value = _ratio(*(float((p**2).sum()) for p in products.values()))
    count = len(x)
    parts = np.array_split(np.random.default_rng(seed).permutation(count), min(_GROUPS, count))
    left = []
    for part in parts:
        a, b = x[part], y[part]
        sizes = [
            float(((products[key] - p.T @ q - np.outer(p.sum(0), q.sum(0)) / (count - len(part))) ** 2).sum())
            for key, p, q in (("xy", a, b), ("xx", a, a), ("yy", b, b))
        ]
        left.append(_ratio(*sizes))
    error = np.sqrt((len(parts) - 1) * np.var(left))
    half = float(student_t.ppf(0.5 + level / 2, len(parts) - 1) * error)
    return Interval(value, max(0.0, value - half), min(1.0, value + half))


def _centred(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(first) != len(second) or len(first) < _LEAST_SAMPLES:
        raise UserError(
            f"linear CKA: features of {len(first)} and {len(second)} samples; give those of the same samples, at least "
            f"{_LEAST_SAMPLES}"
        )
    return _without_mean(first), _without_mean(second)


def _without_mean(features: np.ndarray) -> np.ndarray:
    values = features.astype(np.float64)
    centred = values - values.mean(0)
    # Features that are the same for all samples differ by float32's rounding alone, which must not be compared.
    return centred if np.linalg.norm(centred) > 1e-6 * np.linalg.norm(values) else np.zeros_like(centred)


def _biased_hsic(x: np.ndarray, y: np.ndarray) -> float:
    return float(((x.T @ y) ** 2).sum())


def _unbiased_hsic(x: np.ndarray, y: np.ndarray) -> float:
    n, k, m = len(x), (x**2).sum(1), (y**2).sum(1)
    return _biased_hsic(x, y) - n / (n - 2) * float(k @ m) + float(k.sum() * m.sum()) / ((n - 1) * (n - 2))


def _ratio(xy: float, xx: float, yy: float) -> float:
    return xy / float(np.sqrt(xx * yy)) if xx > 0 and yy > 0 else 0.0


# --- k-NN -------------------------------------------------------------------------------------------------------------


def nearest_neighbours(
    queries: np.ndarray, bank: np.ndarray, *, k: int = NEIGHBOURS, leave_one_out: bool = False
) -> np.ndarray:
    """Return the rows of the bank that are nearest to each query by cosine, nearest first: int64 [n, k].

    Args:
        queries: Features [n, d].
        bank: Features [m, d].
        k: Number of neighbours; ties go to the lowest row.
        leave_one_out: The queries are the bank itself, and none is its own neighbour.
    """
    similarity = _unit(queries) @ _unit(bank).T
    if leave_one_out:
        np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :k]


def _unit(features: np.ndarray) -> np.ndarray:
    values = features.astype(np.float64)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def vote(near: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the class [n] of most neighbours [n, k]; a tie goes to the class of the nearest among them."""
    votes = np.zeros((len(near), int(labels.max()) + 1))
    for rank in range(near.shape[1]):
        # The terms added to 1 sum to less than 1: they decide between equal counts alone, and the nearest outweighs
        # the rest.
        votes[np.arange(len(near)), labels[near[:, rank]]] += 1 + 2.0 ** -(rank + 1)
    return votes.argmax(1)


def shared_neighbours(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the share [n] of each sample's neighbours [n, k] that two models have in common."""
    return (first[:, :, None] == second[:, None, :]).any(2).mean(1)


# --- weights ----------------------------------------------------------------------------------------------------------


def compare_weights(model: nn.Module, original: nn.Module, name: str = "model") -> dict[str, Any]:
    """Return identical, untouched_backbone, changed and distance of a model, see DIRECTION; ready for JSON.

    Parts of `distance`: patch embedding (with position embeddings and prefix tokens), the blocks, head, other (norms,
    Swin's merging of patches), and all.

    Raises:
        UserError: The architecture differs from the original's.
    """
    mine, theirs = model.state_dict(), original.state_dict()
    if {key: value.shape for key, value in mine.items()} != {key: value.shape for key, value in theirs.items()}:
        raise UserError(
            f"{name} has other weights than the original (names or shapes); give models of one architecture and head"
        )
    heads = _head_parameters(model)
    differing = {key: _differing(mine[key], theirs[key]) for key in mine}
    outside = [key for key in mine if key not in heads]
    parts: dict[str, list[float]] = {}
    for key, parameter in original.named_parameters():
        before = parameter.detach().double().cpu()
        moved = float((mine[key].double().cpu() - before).square().sum())
        for part in (_part_of(key, heads), "all"):
            sums = parts.setdefault(part, [0.0, 0.0])
            sums[0] += moved
            sums[1] += float(before.square().sum())
    return {
        "identical": not any(differing.values()),
        "untouched_backbone": not any(differing[key] for key in outside),
        "changed": sum(differing[key] for key in outside) / max(1, sum(mine[key].numel() for key in outside)),
        "distance": {part: (moved / size) ** 0.5 if size else None for part, (moved, size) in parts.items()},
    }


def _differing(first: Tensor, second: Tensor) -> int:
    """Return the number of elements that are not equal; NaN is not equal to itself, so it counts as changed."""
    return int((first.cpu() != second.cpu()).sum())


def _head_parameters(model: Any) -> set[str]:
    inside = {id(parameter) for head in classifiers(model) for parameter in head.parameters()}
    return {key for key, parameter in model.named_parameters() if id(parameter) in inside}


def _part_of(key: str, heads: set[str]) -> str:
    if key in heads:
        return "head"
    if match := re.match(r"(?:layers\.(\d+)\.)?blocks\.(\d+)\.", key):
        stage, block = match[1], int(match[2]) + 1
        return f"block {block}" if stage is None else f"stage {int(stage) + 1} block {block}"
    if match := re.match(
        r"model\.\w+\.(?:encoder\.)?layers?\.(\d+)\.(?!downsample)(?:blocks\.(\d+)\.)?", key
    ):  # of transformers
        first, inner = int(match[1]) + 1, match[2]
        return f"block {first}" if inner is None else f"stage {first} block {int(inner) + 1}"
    if key.startswith(("patch_embed.", "pos_embed", "cls_token", "reg_token", "dist_token")):
        return EMBEDDING
    if re.match(r"model\.\w+\.embeddings\.", key):
        return EMBEDDING
    return "other"
