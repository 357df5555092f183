"""The compiled row-wise kernels: built once with the machine's C++ compiler, called through ctypes.

Their promise is that a row's bits depend on that row alone, so private rows need no tiles of constant shape; they are
also what makes few rows and few groups run at the speed of memory. CPU only. Everything that they do has a plain form
in torch, which runs where there is no compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.layers import Projection
from model.mixing import ACTIVATION_FUNCTIONS, Activation

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-std=c++17", "-fno-math-errno", "-ffp-contract=off")
_KINDS = {
    ACTIVATION_FUNCTIONS["gelu"]: 0,
    ACTIVATION_FUNCTIONS["gelu_new"]: 1,
    F.relu: 2,
    F.silu: 3,
}


_FEW_GROUPS = 8  # until measured: about level with torch.bmm
_TRIED_GROUPS = (2, 4, 8, 12, 16, 24, 32)


def computes_in_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself (AVX512-BF16 or AMX)."""
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("amx"))


class NativeUnavailable(Exception):
    """Why there are no compiled kernels here."""


class _PrivateLayer(ctypes.Structure):
    """Mirrors ``PrivateLayer`` in kernels.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "D", "E", "S", "places", "members")),
        *((name, ctypes.c_int32) for name in ("activation", "over_experts", "discrete", "gated", "half")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "x", "own", "crowd", "crowd_scores", "positions", "temperatures", "skip_below", "live", "lin1", "lin2",
                "out", "entropy", "used",
            )
        ),
        ("groups", ctypes.c_int64),
        ("mixes", ctypes.c_void_p),
        ("outputs", ctypes.c_void_p),
    ]  # fmt: skip


def activation_kind(activation: Activation) -> int:
    """The kernels' number of an activation. Raises NativeUnavailable for one that they lack."""
    if activation not in _KINDS:
        raise NativeUnavailable("the kernels lack this activation")
    return _KINDS[activation]


class Kernels:
    """The kernels of one library. Weights are float32 or bfloat16, contiguous, on the CPU; activations are float32."""

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        self._fast_bfloat16 = computes_in_bfloat16()
        self._few_groups = _FEW_GROUPS
        wide, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
        self._linear = _function(loaded, "motserve_linear", [pointer] * 4 + [wide] * 3 + [number] * 2)
        self._bank = _function(loaded, "motserve_bank", [pointer] * 4 + [wide] * 4 + [number] * 2)
        self._private = _function(loaded, "motserve_private_layer", [ctypes.POINTER(_PrivateLayer)])
        self._routed = _function(loaded, "motserve_routed", [pointer] * 5 + [wide] * 4 + [number] * 2)
        self._attend = _function(loaded, "motserve_attend", [pointer] * 6 + [wide] * 5 + [number])
        self._draw = _function(loaded, "motserve_draw", [pointer, wide, wide] + [pointer] * 6)
        self._score = _function(loaded, "motserve_score", [pointer, wide, wide, pointer, wide] + [pointer] * 3)
        self._activate = _function(loaded, "motserve_activate", [pointer, wide, number])

    def prefers(self, groups: int, dtype: torch.dtype) -> bool:
        """Whether ``bank`` is the faster way for so many groups: weights are read at the speed of memory for few;
        many are computed at the speed of torch's batched product, where the processor computes in that type."""
        return groups <= self._few_groups or (dtype is torch.bfloat16 and not self._fast_bfloat16)

    def measure(self, lin1: Tensor, lin2: Tensor, activation: Activation) -> int:
        """Find out up to how many groups ``bank`` is the faster way for such experts on this machine."""
        self._few_groups = 1
        for groups in _TRIED_GROUPS:
            mixes = torch.zeros(lin1.shape[0], groups, lin1.shape[1])
            cast = mixes.to(lin1.dtype)
            ours = _fastest(partial(self.bank, mixes, lin1, lin2, activation))
            theirs = _fastest(partial(_batched, cast, lin1, lin2, activation))
            if ours > theirs:
                break
            self._few_groups = groups
        return self._few_groups

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, by_output: bool) -> Tensor:
        """``x [n, K]`` times ``weight [K, N]`` (``by_output``: ``[N, K]``) plus ``bias [N]``: float32 ``[n, N]``."""
        x = x.float().contiguous()
        rows, inner = x.shape
        outer = weight.shape[0 if by_output else 1]
        assert weight.is_contiguous() and weight.shape == ((outer, inner) if by_output else (inner, outer))
        kept = None if bias is None else bias.float()
        out = torch.empty(rows, outer)
        self._linear(
            x.data_ptr(), weight.data_ptr(), None if kept is None else kept.data_ptr(), out.data_ptr(),
            rows, inner, outer, by_output, _half(weight),
        )  # fmt: skip
        return out

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """In place on float32 ``x``."""
        self._activate(x.data_ptr(), x.numel(), activation_kind(activation))
        return x

    def bank(self, mixes: Tensor, lin1: Tensor, lin2: Tensor, activation: Activation) -> Tensor:
        """``mixes [E, n, D]`` through their experts ``lin1 [E, D, S]``, ``lin2 [E, S, D]``: float32 ``[E, n, D]``."""
        mixes = mixes.float().contiguous()
        experts, rows, width = mixes.shape
        assert lin1.is_contiguous() and lin2.is_contiguous() and lin1.shape[:2] == (experts, width)
        out = torch.empty_like(mixes)
        self._bank(
            mixes.data_ptr(), lin1.data_ptr(), lin2.data_ptr(), out.data_ptr(),
            experts, rows, width, lin1.shape[2], activation_kind(activation), _half(lin1),
        )  # fmt: skip
        return out

    def private_layer(
        self, x: Tensor, controller: Tensor, lin1: Tensor, lin2: Tensor, crowd: tuple[Tensor, Tensor] | None,
        *, positions: Tensor, temperatures: Tensor, skip_below: Tensor, live: Tensor, entropy: Tensor, used: Tensor,
        activation: Activation, over_experts: bool, discrete: bool, mixes: Tensor, gated: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One MoT or (``gated``) Expert Choice layer for private rows ``x [n, D]``; ``groups.PrivateRows`` is its plain
        twin. ``crowd``: one layer's ``[P, G, D]`` and scores ``[P, E, G]``. Adds to ``entropy`` and ``used [n]``;
        float32 ``[n, D]``. Beside them ``bank`` for ``mixes [E, groups, D]``, groups may be 0, while the weights are at
        hand."""
        x = x.float().contiguous()
        mixes = mixes.float().contiguous()
        outputs = torch.empty_like(mixes)
        own = self.linear(x, controller, None, by_output=False)
        if gated:
            own = torch.softmax(own, 1)  # row by row
        out = torch.empty_like(x)
        members, scores = crowd if crowd is not None else (own, own)
        assert lin1.is_contiguous() and lin2.is_contiguous() and members.is_contiguous() and scores.is_contiguous()
        layer = _PrivateLayer(
            n=x.shape[0], D=x.shape[1], E=lin1.shape[0], S=lin1.shape[2],
            places=members.shape[0] if crowd is not None else 1,
            members=members.shape[1] if crowd is not None else 0,
            activation=activation_kind(activation), over_experts=over_experts, discrete=discrete, gated=gated,
            half=_half(lin1),
            x=x.data_ptr(), own=own.data_ptr(), crowd=members.data_ptr(), crowd_scores=scores.data_ptr(),
            positions=positions.data_ptr(), temperatures=temperatures.data_ptr(), skip_below=skip_below.data_ptr(),
            live=live.data_ptr(), lin1=lin1.data_ptr(), lin2=lin2.data_ptr(), out=out.data_ptr(),
            entropy=entropy.data_ptr(), used=used.data_ptr(),
            groups=mixes.shape[1], mixes=mixes.data_ptr(), outputs=outputs.data_ptr(),
        )  # fmt: skip
        self._private(ctypes.byref(layer))
        return out, outputs

    def routed(self, x: Tensor, gates: Tensor, lin1: Tensor, lin2: Tensor, activation: Activation) -> Tensor:
        """``x [n, D]`` through the experts whose ``gates [n, E]`` (float32) are above 0, answers weighted by them and
        added up in order of experts: float32 ``[n, D]``. Each expert's weights are read once."""
        x, gates = x.float().contiguous(), gates.contiguous()
        rows, width = x.shape
        experts, size = lin1.shape[0], lin1.shape[2]
        assert lin1.is_contiguous() and lin2.is_contiguous() and lin1.shape[1] == width
        assert gates.shape == (rows, experts) and gates.dtype is torch.float32
        out = torch.empty_like(x)
        self._routed(
            x.data_ptr(), gates.data_ptr(), lin1.data_ptr(), lin2.data_ptr(), out.data_ptr(),
            rows, experts, width, size, activation_kind(activation), _half(lin1),
        )  # fmt: skip
        return out

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
        """``queries [n, H, hd]``, each over the first ``lengths [n]`` places of its ``tables [n, b]``, in ``keys`` and
        ``values [blocks, block_size, H, hd]``: float32 ``[n, H, hd]``."""
        queries = queries.float().contiguous()
        rows, heads, size = queries.shape
        assert keys.is_contiguous() and values.is_contiguous() and tables.is_contiguous()
        out = torch.empty_like(queries)
        self._attend(
            queries.data_ptr(), keys.data_ptr(), values.data_ptr(), tables.data_ptr(), lengths.data_ptr(),
            out.data_ptr(), rows, heads, size, tables.shape[1], keys.shape[1], _half(keys),
        )  # fmt: skip
        return out

    def draw(self, logits: Tensor, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
             uniform: Tensor) -> Tensor:  # fmt: skip
        """``logits [n, V]`` (float32) to one token a row ``[n]``: the first maximum where ``temperature`` is 0, else by
        inverting the cumulative distribution of what ``top_k`` (0: all, int64), then ``min_p``, then ``top_p`` leave,
        in order of id, at ``uniform`` (float64)."""
        assert logits.is_contiguous() and logits.dtype is torch.float32
        tokens = torch.empty(logits.shape[0], dtype=torch.int64)
        columns = (temperature.float(), top_k, top_p.float(), min_p.float(), uniform)
        self._draw(logits.data_ptr(), *logits.shape, *(column.data_ptr() for column in columns), tokens.data_ptr())
        return tokens

    def score(self, logits: Tensor, tokens: Tensor, best: int) -> tuple[Tensor, Tensor, Tensor]:
        """``logits [n, V]`` (float32) to the log probabilities of ``tokens [n]``, and ids and log probabilities
        ``[n, best]`` of the best tokens, best first, ties to the lowest id."""
        logits = logits.contiguous()
        rows, size = logits.shape
        assert logits.dtype is torch.float32 and 0 <= best <= size
        chosen, values = torch.empty(rows), torch.empty(rows, best)
        ids = torch.empty(rows, best, dtype=torch.int64)
        self._score(
            logits.data_ptr(), rows, size, tokens.data_ptr(), best, chosen.data_ptr(), ids.data_ptr(), values.data_ptr()
        )
        return chosen, ids, values


class NativeArithmetic:
    """``layers.Arithmetic`` by the kernels: a row's bits depend on that row alone. Without gradients."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def affine(self, x: Tensor, projection: Projection) -> Tensor:
        return self._kernels.linear(x, projection.weight, projection.bias, by_output=False).to(x.dtype)

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        return self._kernels.activate(x.float().contiguous(), activation).to(x.dtype)

    def head(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return self._kernels.linear(hidden, weight, None, by_output=True)


def _function(library: ctypes.CDLL, name: str, arguments: Sequence[object]) -> Callable[..., None]:
    found = getattr(library, name)
    found.argtypes, found.restype = arguments, None
    return found  # type: ignore[no-any-return]


def _batched(mixes: Tensor, lin1: Tensor, lin2: Tensor, activation: Activation) -> Tensor:
    """The plain way: ``ExpertBank.experts``."""
    return torch.bmm(activation(torch.bmm(mixes, lin1)), lin2)


def _fastest(work: Callable[[], object]) -> float:
    """Seconds, the best of a few."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _half(weight: Tensor) -> bool:
    assert weight.dtype in (torch.float32, torch.bfloat16), "the kernels know float32 and bfloat16"
    return weight.dtype is torch.bfloat16


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


def build() -> Path:
    """The library, compiled unless it is there already. Raises NativeUnavailable with the reason."""
    compiler = _compiler()
    key = hashlib.sha256("\0".join((_SOURCE.read_text(), compiler, *_FLAGS, _machine())).encode()).hexdigest()[:16]
    library = cache_folder() / f"kernels-{key}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            command = [compiler, *_FLAGS, "-o", str(made), str(_SOURCE)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            made.replace(library)  # whole or not at all, whoever else is building
    except subprocess.CalledProcessError as error:
        raise NativeUnavailable(f"{compiler} failed: {(error.stderr or '').strip()[-300:]}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(str(error)) from None
    return library


def open_kernels() -> Kernels:
    """Raises NativeUnavailable with the reason."""
    try:
        return Kernels(build())
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(str(error)) from None
