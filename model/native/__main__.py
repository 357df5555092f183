"""``python -m model.native``: compile the kernels now instead of at the first start."""

from __future__ import annotations

from model.native.compiler import NativeUnavailable, build

try:
    print(build())
except NativeUnavailable as error:
    print(f"no compiled kernels, the plain path will run: {error}")
