"""Large pages: the same numbers, in memory that the system was advised to hold so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model.memory import in_large_pages, move_to_large_pages


def advised(tensor: Tensor) -> bool:
    """Whether the system notes the advice for the middle of a tensor's memory."""
    middle, inside = tensor.data_ptr() + tensor.numel() * tensor.element_size() // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= middle < end
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return False


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 700, 1000)])
def test_the_same_numbers(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    assert torch.equal(in_large_pages(tensor), tensor)
    assert torch.equal(in_large_pages(tensor, torch.bfloat16), tensor.bfloat16())


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or not Path("/proc/self/smaps").exists(),
    reason="needs Linux with large pages",
)
def test_the_system_is_advised() -> None:
    assert advised(in_large_pages(torch.ones(4, 2**20)))


def test_a_whole_model() -> None:
    model = nn.Linear(30, 40).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    move_to_large_pages(model, torch.float64)
    assert all(torch.equal(before[name].double(), tensor) for name, tensor in model.state_dict().items())
