"""Images moved by a pixel or more, for one pass of a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.models.predict import moved_images


class Echo(nn.Module):
    """Returns its input."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


@pytest.mark.parametrize(("size", "pixels"), [(8, 1), (32, 1), (96, 2), (224, 4)])
def test_images_move_right_and_down_with_their_edges_repeated(size: int, pixels: int) -> None:
    images, model = torch.rand(2, 3, size, size), Echo()
    with moved_images(model):
        moved = model(images)
    assert moved.shape == images.shape
    assert torch.equal(moved[..., pixels:, pixels:], images[..., :-pixels, :-pixels])
    for row in range(pixels):
        assert torch.equal(moved[..., row, pixels:], images[..., 0, :-pixels])
        assert torch.equal(moved[..., pixels:, row], images[..., :-pixels, 0])
    assert torch.equal(model(images), images)


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = Echo()
    with pytest.raises(RuntimeError, match="stop"), moved_images(model):
        raise RuntimeError("stop")
    images = torch.rand(1, 1, 4, 4)
    assert torch.equal(model(images), images)
