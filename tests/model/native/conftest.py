"""The kernels: this processor's, and what other processors get."""

from __future__ import annotations

import pytest

from model.native import Kernels, NativeUnavailable, open_kernels

# As far as this processor can run it.
VARIANTS = {
    "native": (),
    "no tiles": ("-mno-amx-bf16",),
    "no pairs": ("-mno-avx512bf16", "-mno-avx512vnni"),
    "avx2": ("-march=x86-64-v3",),
    "portable": ("-march=x86-64",),
}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return _opened()


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> Kernels:
    return _opened(*VARIANTS[request.param])


def _opened(*flags: str) -> Kernels:
    try:
        return open_kernels(*flags)
    except NativeUnavailable as error:
        pytest.skip(str(error))
