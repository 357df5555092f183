"""A whole pass through the decoder in one call of the kernels, where all rows attend one by one.

The parts called one after the other (``Transformer.forward`` with the kernels' arithmetic, ``PagedAttention`` and
``groups``) are its twin: a private row has the same bits either way. Knows rows, places and positions, nothing of
requests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.groups import Fill
from model.kv_cache import PagedKVCache, SingleRows
from model.layers import Projection
from model.memory import Workspace
from model.mixing import ExpertBank
from model.native import Kernels
from model.native.binding import BY_INPUT, IN_TILES, activation_kind, experts_at, is_half
from model.transformer import Block, Transformer

_wide, _number, _pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
_Fields = list[tuple[str, type]]


def _fields(kind: type, names: str) -> _Fields:
    return [(name, kind) for name in names.split()]


# These mirror the structures of the same names in decoder.h.
class _Affine(ctypes.Structure):
    _fields_ = [*_fields(_pointer, "weight bias"), ("order", _wide)]

    @classmethod
    def of(cls, projection: Projection) -> _Affine:
        order = IN_TILES if projection.in_tiles else BY_INPUT
        return cls(projection.weight.data_ptr(), projection.bias.data_ptr(), order)


class _Layer(ctypes.Structure):
    _fields_ = [
        *_fields(_pointer, "norm1 norm1_bias norm2 norm2_bias"),
        *_fields(_Affine, "attention projection"),
        *_fields(_pointer, "keys values"),
        *_fields(_Affine, "first second"),
        *_fields(_pointer, "controller lin1 lin2 scale1 scale2 crowd crowd_scores"),
    ]


class _Decoder(ctypes.Structure):
    _fields_ = [
        *_fields(
            _wide, "vocabulary length layers D heads block_size hidden E G places rivals routed per_token normalize"
        ),
        *_fields(_number, "activation experts half crowd_half"),
        *_fields(ctypes.c_double, "epsilon temperature"),
        *_fields(_pointer, "layer tokens positions norm norm_bias"),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *_fields(_wide, "rows shared"),
        *_fields(_pointer, "ids positions slots lengths tables"),
        *_fields(_wide, "table_width groups"),
        *_fields(_pointer, "members places temperatures skip_below live shared_entropy private_entropy used room out"),
    ]


@dataclass(frozen=True)
class Company:
    """Who mixes with whom in a pass. Public rows by ``members [groups, G]``: a row, or -1 where the crowd stands, that
    of the group's position in ``places [groups]``. Private rows by ``temperatures`` and ``skip_below``, both
    ``[private]`` in float32. Entropies are summed over the layers."""

    members: Tensor
    places: Tensor
    temperatures: Tensor
    skip_below: Tensor
    shared_entropy: Tensor
    private_entropy: Tensor

    @classmethod
    def of(
        cls, members: Sequence[Sequence[int]], places: Sequence[int], temperatures: Tensor, skip_below: Tensor
    ) -> Company:
        """``members`` of each group, as many each."""
        return cls(
            torch.tensor(members, dtype=torch.int64), torch.tensor(places, dtype=torch.int64), temperatures, skip_below,
            torch.zeros(len(places)), torch.zeros(temperatures.shape[0]),
        )  # fmt: skip


class NativeDecoder:
    """Addresses are taken once: weights and cache must stay where they are."""

    def __init__(self, model: Transformer, fill: Fill, cache: PagedKVCache, kernels: Kernels) -> None:
        assert self.knows(model)
        config, self._kernels, self._model, self._fill = model.config, kernels, model, fill
        self._workspace = Workspace()
        self._bank = model.banks[0] if model.banks else None
        loose = (m.weight for m in model.blocks[0].modules() if isinstance(m, Projection) and not m.in_tiles)
        self._loose = next(loose, None)
        self._layers = (_Layer * config.n_layer)(
            *(self._layer(number, block, cache) for number, block in enumerate(model.blocks))
        )
        crowd, bank, mlp = fill.crowd, self._bank, model.blocks[0].mlp
        self._decoder = _Decoder(
            vocabulary=config.vocab_size, length=config.n_positions, layers=config.n_layer, D=config.n_embd,
            heads=config.n_head, block_size=cache.block_size,
            hidden=config.hidden_size if bank is None else bank.lin1.shape[2],
            E=0 if bank is None else bank.lin1.shape[0], G=config.group_size,
            places=1 if crowd is None else crowd.places.shape[1], rivals=0 if crowd is None else crowd.rivals,
            routed=0 if bank is None else bank.controller.shape[1],
            per_token=bank.per_token if bank is not None and config.is_token_choice else 0,
            normalize=bank is not None and bank.normalize,
            activation=activation_kind(mlp.activation), experts=0 if bank is None else kernels.weights_kind(bank),
            half=is_half(model.wte.weight), crowd_half=crowd is not None and is_half(crowd.places),
            epsilon=config.layer_norm_epsilon, temperature=config.temperature,
            layer=ctypes.addressof(self._layers), tokens=model.wte.weight.data_ptr(),
            positions=model.wpe.weight.data_ptr(), norm=model.ln_f.weight.data_ptr(),
            norm_bias=model.ln_f.bias.data_ptr(),
        )  # fmt: skip

    @staticmethod
    def knows(model: Transformer) -> bool:
        """Dense models, token choice, and MoT as it is trained; what mixes in other ways goes part by part."""
        config = model.config
        if not config.has_experts or config.is_token_choice:
            return True
        plain = not any(bank.over_experts or bank.discrete or bank.gated for bank in model.banks)
        return config.is_mot and config.temperature > 0 and plain

    def prefers(self, shared: int, groups: int) -> bool:
        """Whether this is the way for so many public rows in so many groups: where all parts are the kernels'."""
        if self._loose is not None and not self._kernels.prefers_rows(shared, self._loose):
            return False
        if self._bank is None or groups == 0:
            return True
        size = self._model.config.group_size
        return self._fill.crowd is not None and self._kernels.prefers_whole(groups, size, self._bank)

    def __call__(self, ids: Tensor, positions: Tensor, slots: Tensor, single: SingleRows, company: Company) -> Tensor:
        """Rows ``ids`` and ``positions [n]``, public ones first, whose keys and values go to ``slots [n]``, to hidden
        states ``[n, D]`` after the last layer norm, float32. ``single``: all rows, in order. Raises IndexError for an
        unknown token or position."""
        rows, private = ids.shape[0], company.temperatures.shape[0]
        assert single.tables.is_contiguous() and single.tables.shape[0] == rows
        out = torch.empty(rows, self._model.config.n_embd)
        live, used = torch.ones(private, dtype=torch.bool), torch.zeros(private, dtype=torch.int64)
        step = _Step(
            rows=rows, shared=rows - private, ids=ids.data_ptr(), positions=positions.data_ptr(),
            slots=slots.data_ptr(), lengths=single.lengths.data_ptr(), tables=single.tables.data_ptr(),
            table_width=single.tables.shape[1], groups=company.places.shape[0], members=company.members.data_ptr(),
            places=company.places.data_ptr(), temperatures=company.temperatures.data_ptr(),
            skip_below=company.skip_below.data_ptr(), live=live.data_ptr(),
            shared_entropy=company.shared_entropy.data_ptr(), private_entropy=company.private_entropy.data_ptr(),
            used=used.data_ptr(), out=out.data_ptr(),
        )  # fmt: skip
        self._kernels.decode(self._decoder, step, self._workspace)
        return out

    def _layer(self, number: int, block: Block, cache: PagedKVCache) -> _Layer:
        keys, values = cache.layer(number)
        layer = _Layer(
            *_addresses(block.ln_1), *_addresses(block.ln_2), _Affine.of(block.attn.c_attn),
            _Affine.of(block.attn.c_proj), keys.data_ptr(), values.data_ptr(),
        )  # fmt: skip
        if isinstance(block.mlp, ExpertBank):
            layer.controller = block.mlp.controller.data_ptr()
            layer.lin1, layer.lin2, layer.scale1, layer.scale2 = experts_at(block.mlp)
            if self._fill.crowd is not None:
                layer.crowd = self._fill.crowd.places[number].data_ptr()
                layer.crowd_scores = self._fill.crowd.scores[number].data_ptr()
        else:
            layer.first, layer.second = _Affine.of(block.mlp.c_fc), _Affine.of(block.mlp.c_proj)
        return layer


def _addresses(norm: nn.LayerNorm) -> tuple[int, int]:
    return norm.weight.data_ptr(), norm.bias.data_ptr()
