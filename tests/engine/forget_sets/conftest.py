"""Digits, and a model that has memorised them."""

from __future__ import annotations

import pytest
import torch
from planted import fitted_digits

from engine.data import Samples


@pytest.fixture(scope="module")
def digits() -> Samples:
    return fitted_digits()[0]


@pytest.fixture(scope="module")
def fitted() -> torch.nn.Module:
    return fitted_digits()[1]
