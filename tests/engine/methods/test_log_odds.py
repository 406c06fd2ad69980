"""Log-odds, their maps by quantiles, and small shifts of images."""

from __future__ import annotations

import torch

from engine.methods.common.log_odds import log_odds, quantiles_in_order, quantiles_of, with_log_odds
from engine.methods.common.shifts import shifts


def test_shifts_are_the_image_moved_with_mirrored_edges() -> None:
    image = torch.arange(32.0 * 32).view(1, 1, 32, 32)
    views = [view[0, 0] for view in shifts(image)]
    assert len(views) == 12
    assert len({tuple(view.flatten().tolist()) for view in views}) == 12
    row, column = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")

    def moved(down: int, across: int) -> torch.Tensor:
        def mirrored(index: torch.Tensor) -> torch.Tensor:
            index = index.abs()
            return torch.where(index > 31, 62 - index, index)

        return image[0, 0][mirrored(row + down), mirrored(column + across)]

    wanted = [(2, 0), (-2, 0), (0, 2), (0, -2), (4, 0), (-4, 0), (0, 4), (0, -4), (3, 3), (3, -3), (-3, 3), (-3, -3)]
    for view, step in zip(views, wanted, strict=True):
        assert torch.equal(view, moved(*step)), step
    assert len(list(shifts(torch.rand(1, 1, 8, 8)))) == 8, "steps that are the same pixel count once"


def test_log_odds_are_those_of_the_probability() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    p = logits.double().softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(log_odds(logits, labels), (p / (1 - p)).log())


def test_log_odds_are_set_and_other_logits_stay() -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    labels, wanted = torch.tensor([2, 0, 2]), torch.tensor([1.5, -4.0, 0.0], dtype=torch.float64)
    changed = with_log_odds(logits, labels, wanted)
    torch.testing.assert_close(log_odds(changed, labels), wanted, atol=1e-6, rtol=1e-6)
    for row, label in enumerate(labels.tolist()):
        others = [c for c in range(4) if c != label]
        assert torch.equal(changed[row, others], logits[row, others])


def test_log_odds_are_mapped_by_quantiles_around_class_means() -> None:
    """By hand, a mean counting as 10 samples of each class.

    Before: class 0 has {2, 4}, class 1 {6}, all 4; means (6 + 40) / 12 = 23/6 and 46/11; residuals -1.83, 0.17, 1.82.
    After: class 0 has {-1, 1}, class 1 {3}, all 1; means 10/12 and 13/11; residuals -1.83, 0.17, 1.82 as well.
    """
    before = (torch.tensor([4.0, 2.0, 6.0]), torch.tensor([0, 0, 1]))
    after = (torch.tensor([1.0, -1.0, 3.0]), torch.tensor([0, 0, 1]))
    low, middle, high = -1 - 10 / 12, 1 - 10 / 12, 3 - 13 / 11
    mapped = quantiles_of((torch.tensor([9.0, 3.0, 0.0, 9.0]), torch.tensor([0, 1, 1, 2])), before, after)
    # Ranks (3.5, 1.5, 0.5, 3.5) / 4 among three; of n values, quantile q is at position q (n - 1).
    expected = [
        10 / 12 + middle + 0.75 * (high - middle),
        13 / 11 + low + 0.75 * (middle - low),
        13 / 11 + low + 0.25 * (middle - low),
        1 + middle + 0.75 * (high - middle),  # a class that has no samples: the mean of all
    ]
    torch.testing.assert_close(mapped, torch.tensor(expected, dtype=torch.float64))


def test_true_classes_take_the_quantiles_of_others_in_their_own_order() -> None:
    """By hand: two samples of class 0 get the quartiles of {-2, 0, 2, 4}; class 1 has none of its own and takes all."""
    odds, classes = torch.tensor([4.0, -2.0, 2.0, 0.0, 9.0]), torch.tensor([0, 0, 0, 0, 2])
    found = quantiles_in_order(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([0, 0, 1]), odds, classes)
    torch.testing.assert_close(found, torch.tensor([2.5, -0.5, 2.0], dtype=torch.float64))
