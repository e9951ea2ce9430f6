"""Double precision throughout: the zoo's estimators take the type of their inputs, but for constants times
booleans."""

import pytest
import torch


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
