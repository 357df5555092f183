"""The compiled row-wise kernels, called through ctypes.

Their promise is that a row's bits depend on that row alone, so private rows need no tiles of constant shape; they are
also what makes few rows and few groups run at the speed of memory. CPU only. Everything that they do has a plain form
in torch, which runs where there is no compiler.
"""

from __future__ import annotations

import ctypes
import time
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from model.layers import Projection
from model.memory import Workspace
from model.mixing import Activation, ExpertBank
from model.native.binding import (
    BY_INPUT,
    BY_OUTPUT,
    IN_TILES,
    TILES,
    TYPES,
    PrivateLayer,
    activation_kind,
    alike,
    experts_at,
    function,
    is_half,
)
from model.native.compiler import NativeUnavailable as NativeUnavailable
from model.native.compiler import build

_FEW_GROUPS = 8  # until measured: about level with torch.bmm
_TRIED_GROUPS = (2, 4, 8, 12, 16, 24, 32)
_FEW_MEMBERS = 2**18  # numbers of a step's groups that stay in a core's own caches (1 MB)
_MANY_MEMBERS = 2**20  # the same where they are mixed in tiles: a fifth faster at half of that
_TILED_MEMBERS = 16  # of a group, at least, for that: group_tiles.h
_FEW_ROWS = 64  # until measured: about level with torch in float32
_TRIED_ROWS = (4, 8, 16, 32, 64, 128, 256)
_MEASURED_BYTES = 2**26  # of experts: beyond caches, and quickly done with


def computes_in_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself (AVX512-BF16 or AMX)."""
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("amx"))


class Kernels:
    """The kernels of one library. Weights are float32 or bfloat16, contiguous, on the CPU; activations are float32."""

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        self._fast_bfloat16 = computes_in_bfloat16()
        self._few_groups, self._few_rows = _FEW_GROUPS, _FEW_ROWS
        self._scratch = Workspace()
        wide, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
        self._linear = function(loaded, "motserve_linear", [pointer] * 5 + [wide] * 3 + [number] * 3)
        self._bank = function(loaded, "motserve_bank", [pointer] * 6 + [wide] * 6 + [number] * 2)
        self._mix_weights = function(loaded, "motserve_mix_weights", [pointer] + [wide] * 3 + [ctypes.c_float, pointer])
        self._private = function(loaded, "motserve_private_layer", [ctypes.POINTER(PrivateLayer)])
        self._private_rows = function(loaded, "motserve_private_rows", [], wide)
        self._gates = function(loaded, "motserve_gates", [pointer] * 2 + [wide] * 4 + [number])
        self._routed = function(loaded, "motserve_routed", [pointer] * 7 + [wide] * 4 + [number] * 2)
        self._keep = function(loaded, "motserve_keep", [pointer] * 4 + [wide] * 2 + [number])
        self._attend = function(loaded, "motserve_attend", [pointer, wide] + [pointer] * 5 + [wide] * 5 + [number])
        self._normalize = function(
            loaded, "motserve_normalize", [pointer] * 3 + [ctypes.c_double, pointer] + [wide] * 2 + [number]
        )
        self._draw = function(loaded, "motserve_draw", [pointer, wide, wide] + [pointer] * 6)
        self._score = function(loaded, "motserve_score", [pointer, wide, wide, pointer, wide] + [pointer] * 3)
        self._activate = function(loaded, "motserve_activate", [pointer, wide, number])
        self._decoder_room = function(loaded, "motserve_decoder_room", [pointer] * 2, wide)
        self._decode = function(loaded, "motserve_decode", [pointer] * 2, number)
        self.tiles = bool(loaded.motserve_tiles())  # whether it multiplies bfloat16 in tiles

    def arrange(self, model: nn.Module) -> None:
        """Put a model's weights in the order that these kernels compute fastest in, in place: tiles where the processor
        has them and the model is in bfloat16, its experts in that or in int8. What fits in no tiles stays as it is."""
        if self.tiles:
            for module in model.modules():
                if isinstance(module, (Projection, ExpertBank)):
                    module.put_in_tiles()

    def prefers(self, groups: int, bank: ExpertBank) -> bool:
        """Whether ``bank`` is the faster way for so many groups: weights are read at the speed of memory for few;
        many are computed at the speed of torch's batched product, where the processor computes in that type. In tiles
        they are both."""
        return groups <= self._few_groups or self._torch_is_slow(bank)

    def weights_kind(self, bank: ExpertBank) -> int:
        """The kernels' number of the type and order of a bank's experts."""
        assert self.tiles or not bank.in_tiles, "weights were put in tiles for another processor"
        return TYPES[bank.lin1.dtype] + (TILES if bank.in_tiles else 0)

    def _torch_is_slow(self, bank: ExpertBank) -> bool:
        dtype = bank.lin1.dtype
        return dtype is torch.int8 or bank.in_tiles or (dtype is torch.bfloat16 and not self._fast_bfloat16)

    def measure(self, bank: ExpertBank) -> int:
        """Find out up to how many groups ``bank`` is the faster way for such experts on this machine: by halving, as
        its advantage shrinks with their number."""
        if self._torch_is_slow(bank):
            return self._few_groups
        sample = measurable_part(bank)

        def ours_is_slower(groups: int) -> bool:
            mixes = torch.zeros(sample.lin1.shape[0], groups, sample.lin1.shape[1])
            theirs = _fastest(partial(sample.experts, mixes.to(sample.controller.dtype)))
            return _fastest(partial(self.bank, mixes, sample)) > theirs

        place = bisect_left(_TRIED_GROUPS, True, key=ours_is_slower)
        self._few_groups = _TRIED_GROUPS[place - 1] if place else 1
        return self._few_groups

    def prefers_rows(self, rows: int, weight: Tensor) -> bool:
        """Whether ``linear`` is the faster way to multiply so many rows by a weight that is not in tiles, where either
        would do."""
        return rows <= self._few_rows or (weight.dtype is torch.bfloat16 and not self._fast_bfloat16)

    def dots_in_tiles(self, weight: Tensor) -> bool:
        """Whether ``linear`` takes ``weight [N, K]`` as tiles as it lies: then it is the way for any number of rows."""
        return self.tiles and weight.dtype is torch.bfloat16 and weight.shape[1] % 32 == 0 and weight.shape[0] >= 32

    def measure_rows(self, weight: Tensor, bias: Tensor) -> int:
        """Find out up to how many rows ``linear`` is the faster way for such a ``weight [K, N]`` on this machine."""
        if weight.dtype is torch.bfloat16 and not self._fast_bfloat16:
            return self._few_rows

        def ours_is_slower(rows: int) -> bool:
            x = torch.ones(rows, weight.shape[0], dtype=weight.dtype)
            theirs = _fastest(partial(torch.addmm, bias, x, weight))
            return _fastest(partial(self.linear, x, weight, bias)) > theirs

        place = bisect_left(_TRIED_ROWS, True, key=ours_is_slower)
        self._few_rows = _TRIED_ROWS[place - 1] if place else 1
        return self._few_rows

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *, by_output: bool = False, in_tiles: bool = False,
        exact: bool = False, onto: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """``x [n, K]`` times ``weight [K, N]`` (``by_output``: ``[N, K]``) plus ``bias [N]`` of the same type and
        float32 ``onto [n, N]``: float32 ``[n, N]``. Where the processor multiplies bfloat16, ``x`` is rounded to it for
        such weights, unless ``exact``, which weights ``in_tiles`` do not allow."""
        x = x.float().contiguous()
        rows, inner = x.shape
        outer = weight.shape[0 if by_output else 1]
        assert weight.is_contiguous() and weight.shape == ((outer, inner) if by_output else (inner, outer))
        assert not in_tiles or (self.tiles and not by_output and not exact)
        order = IN_TILES if in_tiles else BY_OUTPUT if by_output else BY_INPUT
        assert bias is None or bias.dtype is weight.dtype
        assert onto is None or (onto.shape == (rows, outer) and onto.dtype is torch.float32 and onto.is_contiguous())
        out = torch.empty(rows, outer)
        self._linear(
            x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(),
            None if onto is None else onto.data_ptr(), out.data_ptr(), rows, inner, outer, order, exact,
            is_half(weight),
        )  # fmt: skip
        return out

    def normalize(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """``x [n, D]`` normalised row by row: float32 ``[n, D]``."""
        x = x.float().contiguous()
        out = torch.empty_like(x)
        assert norm.weight.shape == norm.bias.shape == x.shape[1:]
        self._normalize(
            x.data_ptr(), norm.weight.data_ptr(), norm.bias.data_ptr(), norm.eps, out.data_ptr(), *x.shape,
            is_half(norm.weight),
        )  # fmt: skip
        return out

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """In place on float32 ``x``."""
        self._activate(x.data_ptr(), x.numel(), activation_kind(activation))
        return x

    def mix_weights(self, scores: Tensor, temperature: float, entropy: Tensor) -> Tensor:
        """``scores [n, G, E]`` (float32) to the weights that mix, in place; as ``mixing_weights`` of MoT above
        temperature 0. Adds to ``entropy [n]`` as ``mixing_entropy``."""
        assert scores.is_contiguous() and scores.dtype is entropy.dtype is torch.float32 and temperature > 0
        self._mix_weights(scores.data_ptr(), *scores.shape, temperature, entropy.data_ptr())
        return scores

    def bank(self, mixes: Tensor, bank: ExpertBank, workspace: Workspace | None = None) -> Tensor:
        """``mixes [E, n, D]`` through their experts: float32 ``[E, n, D]``, as ``ExpertBank.experts`` does, laid out as
        ``mixes`` is and, with a ``workspace``, there."""
        mixes, out = alike(mixes, workspace)
        experts, rows, width = mixes.shape
        lin1, lin2, scale1, scale2 = experts_at(bank)
        assert bank.lin1.shape[:2] == (experts, width)
        self._bank(
            mixes.data_ptr(), lin1, lin2, scale1, scale2, out.data_ptr(), *mixes.stride()[:2],
            experts, rows, width, bank.lin1.shape[2], activation_kind(bank.activation), self.weights_kind(bank),
        )  # fmt: skip
        return out

    def prefers_whole(self, groups: int, size: int, bank: ExpertBank) -> bool:
        """Whether a layer of so many groups of ``size`` members is best mixed, computed and redistributed expert by
        expert, rather than in three steps: while they stay in a core's cache, or tiles make up for it."""
        most = _MANY_MEMBERS if bank.in_tiles and size >= _TILED_MEMBERS else _FEW_MEMBERS
        return groups * size * bank.lin1.shape[1] <= most and self.prefers(groups, bank)

    def private_layer(
        self, x: Tensor, bank: ExpertBank, crowd: tuple[Tensor, Tensor] | None, *, rivals: int, positions: Tensor,
        temperatures: Tensor, skip_below: Tensor, live: Tensor, entropy: Tensor, used: Tensor, mixes: Tensor,
        workspace: Workspace | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One MoT or (``gated``) Expert Choice layer for private rows ``x [n, D]``; ``groups.PrivateRows`` is its plain
        twin. ``crowd``: one layer's ``[P, G, D]`` and float32 scores ``[P, E, G]``; a row at temperature 0 must beat
        those at places 1 to ``rivals``. Adds to ``entropy`` and ``used [n]``; float32 ``[n, D]``. Beside them ``bank``
        for ``mixes [E, groups, D]``, groups may be 0, while the weights are at hand."""
        x = x.float().contiguous()
        mixes, outputs = alike(mixes, workspace)
        own = self.linear(x, bank.controller, None, exact=True)
        if bank.gated:
            own = torch.softmax(own, 1)  # row by row
        out = torch.empty_like(x)
        members, scores = crowd if crowd is not None else (own, own)
        assert members.is_contiguous() and scores.is_contiguous() and scores.dtype is torch.float32
        lin1, lin2, scale1, scale2 = experts_at(bank)
        rows, width = x.shape
        room = (min(rows, self._private_rows()) * bank.lin1.shape[0], width)
        layer = PrivateLayer(
            n=rows, D=width, E=bank.lin1.shape[0], S=bank.lin1.shape[2],
            places=members.shape[0] if crowd is not None else 1,
            members=members.shape[1] if crowd is not None else 0, rivals=rivals,
            activation=activation_kind(bank.activation), over_experts=bank.over_experts, discrete=bank.discrete,
            gated=bank.gated, weights=self.weights_kind(bank), half=is_half(members),
            x=x.data_ptr(), own=own.data_ptr(), crowd=members.data_ptr(), crowd_scores=scores.data_ptr(),
            positions=positions.data_ptr(), temperatures=temperatures.data_ptr(), skip_below=skip_below.data_ptr(),
            live=live.data_ptr(), lin1=lin1, lin2=lin2, scale1=scale1, scale2=scale2,
            out=out.data_ptr(), entropy=entropy.data_ptr(), used=used.data_ptr(),
            groups=mixes.shape[1], experts_apart=mixes.stride(0), groups_apart=mixes.stride(1),
            mixes=mixes.data_ptr(), outputs=outputs.data_ptr(), answers=self._scratch.take("answers", room).data_ptr(),
            mixed=self._scratch.take("mixed", room).data_ptr() if bank.in_tiles else None,
        )  # fmt: skip
        self._private(ctypes.byref(layer))
        return out, outputs

    def gates(self, scores: Tensor, bank: ExpertBank) -> Tensor:
        """``scores [n, routed]`` (float32) to gates ``[n, E]``; as ``token_choice.gates_of`` the best of each row."""
        assert scores.is_contiguous() and scores.dtype is torch.float32 and scores.shape[1] == bank.controller.shape[1]
        gates = torch.empty(scores.shape[0], scores.shape[1] + bank.shared)
        self._gates(scores.data_ptr(), gates.data_ptr(), *scores.shape, bank.shared, bank.per_token, bank.normalize)
        return gates

    def routed(self, x: Tensor, gates: Tensor, bank: ExpertBank) -> Tensor:
        """``x [n, D]`` through the experts whose ``gates [n, E]`` (float32) are above 0, answers weighted by them and
        added up in order of experts: float32 ``[n, D]``. Each expert's weights are read once."""
        x, gates = x.float().contiguous(), gates.contiguous()
        rows, width = x.shape
        lin1, lin2, scale1, scale2 = experts_at(bank)
        experts, size = bank.lin1.shape[0], bank.lin1.shape[2]
        assert bank.lin1.shape[1] == width and gates.shape == (rows, experts) and gates.dtype is torch.float32
        out = torch.empty_like(x)
        self._routed(
            x.data_ptr(), gates.data_ptr(), lin1, lin2, scale1, scale2, out.data_ptr(),
            rows, experts, width, size, activation_kind(bank.activation), self.weights_kind(bank),
        )  # fmt: skip
        return out

    def decode(self, decoder: ctypes.Structure, step: ctypes.Structure, workspace: Workspace) -> None:
        """A pass, as ``decoder.NativeDecoder`` describes it. Raises IndexError for a row that the model has no
        embedding for."""
        at = ctypes.addressof(decoder), ctypes.addressof(step)
        step.room = workspace.take("pass", (self._decoder_room(*at),)).data_ptr()
        if not self._decode(*at):
            raise IndexError("a token or a position outside the model's")

    def keep(self, qkv: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write what follows the queries in float32 ``qkv [n, 3D]`` to ``slots [n]`` of ``keys`` and ``values [blocks,
        block_size, H, hd]``."""
        assert qkv.dtype is torch.float32 and qkv.is_contiguous() and keys.is_contiguous() and values.is_contiguous()
        self._keep(
            qkv.data_ptr(), slots.data_ptr(), keys.data_ptr(), values.data_ptr(), qkv.shape[0], qkv.shape[1] // 3,
            is_half(keys),
        )  # fmt: skip

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
        """``queries [n, H, hd]``, each over the first ``lengths [n]`` places of its ``tables [n, b]``, in ``keys`` and
        ``values [blocks, block_size, H, hd]``: float32 ``[n, H, hd]``."""
        rows, heads, size = queries.shape
        if queries.dtype is not torch.float32 or queries.stride()[1:] != (size, 1):
            queries = queries.float().contiguous()
        assert keys.is_contiguous() and values.is_contiguous() and tables.is_contiguous()
        out = torch.empty(rows, heads, size)
        self._attend(
            queries.data_ptr(), queries.stride(0), keys.data_ptr(), values.data_ptr(), tables.data_ptr(),
            lengths.data_ptr(), out.data_ptr(), rows, heads, size, tables.shape[1], keys.shape[1], is_half(keys),
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


def _fastest(work: Callable[[], object]) -> float:
    """Seconds, the best of a few after one that does not count."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def measurable_part(bank: ExpertBank) -> ExpertBank:
    """As many experts as tell the time of all of them by their share."""
    one = (bank.lin1[0].numel() + bank.lin2[0].numel()) * bank.lin1.element_size()
    return bank.part(min(bank.lin1.shape[0], -(-_MEASURED_BYTES // one)))


def open_kernels(*flags: str) -> Kernels:
    """As ``build`` compiles them. Raises NativeUnavailable with the reason."""
    try:
        return Kernels(build(*flags))
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(str(error)) from None
