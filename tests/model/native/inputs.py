"""Numbers and types to try the kernels with."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]
dtypes = st.sampled_from(DTYPES)
types = st.sampled_from([*DTYPES, torch.int8])


def random_of(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
