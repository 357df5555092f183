"""What holds for every test: one thread a process, no CUDA test where there is no CUDA, and no property that fails
because the machine was busy."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

settings.register_profile("motserve", deadline=None)
settings.load_profile("motserve")

# Before anything imports torch. The models here are so small that more threads only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cuda_tests = [item for item in items if item.get_closest_marker("cuda")]
    if not cuda_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in cuda_tests:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
