"""Building the compiled kernels: once, with the machine's C++ compiler, for this processor."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("kernels.cpp")
_PARTS = sorted(_SOURCE.parent.glob("*.h"))
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-std=c++17", "-fno-math-errno", "-ffp-contract=off")


class NativeUnavailable(Exception):
    """Why there are no compiled kernels here."""


def cache_folder() -> Path:
    """Where built libraries are kept: ``$XDG_CACHE_HOME/motserve`` or ``~/.cache/motserve``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "motserve"


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return name
    raise NativeUnavailable("there is no C++ compiler (g++ or clang++)")


def _machine() -> str:
    """What decides which instructions a native build may contain."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.machine())


def build(*flags: str) -> Path:
    """The library, compiled unless it is there already; ``flags`` for the compiler follow the usual ones. Raises
    NativeUnavailable with the reason."""
    compiler = _compiler()
    sources = (path.read_text() for path in (_SOURCE, *_PARTS))
    key = hashlib.sha256("\0".join((*sources, compiler, *_FLAGS, *flags, _machine())).encode()).hexdigest()[:16]
    library = cache_folder() / f"kernels-{key}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            command = [compiler, *_FLAGS, *flags, "-o", str(made), str(_SOURCE)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            made.replace(library)  # whole or not at all, whoever else is building
    except subprocess.CalledProcessError as error:
        raise NativeUnavailable(f"{compiler} failed: {(error.stderr or '').strip()[-300:]}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(str(error)) from None
    return library
