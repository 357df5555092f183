"""The Mixture-of-Tokens layer: mixing weights, experts, redistribution (Antoniak et al., arXiv 2310.15961).

Expert Choice routing (``gated``) is its limit T = 0 but for two things: scores are a softmax over experts, and an
answer counts by its token's score, so that routing is learnt.

Knows groups of activations and nothing of requests, positions or KV. ``ExpertBank`` holds one layer's weights;
``mix_groups`` is the plain form that training and evaluation use and that the serving forms are tested against.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import tiles
from model.config import ModelConfig
from model.memory import empty_in_large_pages

Activation = Callable[[Tensor], Tensor]
_BETWEEN = 0.25  # how far from a whole number a weight must lie to be rounded away from it


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATION_FUNCTIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


class ExpertBank(nn.Module):
    """Weights of one layer of experts: ``controller [D, E]``, ``lin1 [E, D, S]``, ``lin2 [E, S, D]``, no biases.

    How rows meet the experts is up to the ``mix`` that is handed in: this module's and ``model.groups``' for MoT and
    Expert Choice, ``model.token_choice``'s for ``switch`` and ``top-k``, whose shared experts follow the routed ones
    in ``lin1`` and ``lin2``.

    ``quantize`` turns the experts to int8 with ``scale1 [E, S]`` and ``scale2 [E, D]``, one scale an output channel:
    a weight is its integer times its channel's scale.

    ``put_in_tiles`` turns the experts of a model in bfloat16 to the order that compiled kernels may want; all here
    understand both. Then ``lin1`` and ``lin2`` may have more hidden units than ``size``, such as weigh nothing.
    """

    scale1: Tensor | None
    scale2: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, e, s = config.n_embd, config.n_expert + config.n_shared_expert, config.expert_size
        self.size = s
        self.controller = nn.Parameter(torch.empty(d, config.n_expert))
        self.lin1 = nn.Parameter(torch.empty(e, d, s))
        self.lin2 = nn.Parameter(torch.empty(e, s, d))
        self.activation = ACTIVATION_FUNCTIONS[config.activation_function]
        self.over_experts = config.emit_softmax_over_experts
        self.discrete = config.use_discrete_routing
        self.register_buffer("scale1", None)
        self.register_buffer("scale2", None)
        self.in_tiles = False
        self.gated = config.model_type == "expert-choice"
        self.per_token = config.experts_per_token
        self.shared = config.n_shared_expert
        self.normalize = config.normalize_gates

    def initialize(self, std: float, residual_std: float) -> None:
        nn.init.normal_(self.controller, std=std)
        nn.init.normal_(self.lin1, std=std)
        nn.init.normal_(self.lin2, std=residual_std)

    def scores(self, products: Tensor) -> Tensor:
        """``x @ controller [..., E]`` to scores: MoT's are the products, Expert Choice's their softmax over experts."""
        return torch.softmax(products, -1) if self.gated else products

    def experts(self, mixes: Tensor) -> Tensor:
        """``mixes [E, n, D]`` to ``[E, n, D]``: every expert on its own rows."""
        first, second = self._in_order(self.lin1, self.lin2)
        if self.scale1 is None or self.scale2 is None:
            return torch.bmm(self.activation(torch.bmm(mixes, first)), second)
        scale1, scale2 = (scale[:, None].to(mixes.dtype) for scale in (self.scale1[:, : self.size], self.scale2))
        hidden = self.activation(torch.bmm(mixes, first.to(mixes.dtype)) * scale1)
        return torch.bmm(hidden, second.to(mixes.dtype)) * scale2

    def expert(self, number: int) -> tuple[Tensor, Tensor]:
        """One expert's two matrices ``[D, S]`` and ``[S, D]``, in the type of the controller."""
        first, second = self._in_order(self.lin1[number], self.lin2[number])
        if self.scale1 is None or self.scale2 is None:
            return first, second
        dtype, scale1 = self.controller.dtype, self.scale1[number, : self.size]
        return (first * scale1).to(dtype), (second * self.scale2[number]).to(dtype)

    def part(self, count: int) -> ExpertBank:
        """The first ``count`` experts by themselves, on the same memory. Not to be trained."""
        part = ExpertBank.__new__(ExpertBank)
        nn.Module.__init__(part)
        for name in ("lin1", "lin2"):
            setattr(part, name, nn.Parameter(getattr(self, name)[:count], requires_grad=False))
        part.controller = nn.Parameter(self.controller[:, :count].contiguous(), requires_grad=False)
        for name in ("scale1", "scale2"):
            scale = getattr(self, name)
            part.register_buffer(name, None if scale is None else scale[:count])
        for name in (
            "size", "activation", "over_experts", "discrete", "gated", "per_token", "shared", "normalize", "in_tiles"
        ):  # fmt: skip
            setattr(part, name, getattr(self, name))
        return part

    def quantize(self, common: Tensor | None = None) -> None:
        """Round the experts to int8, symmetric about zero, in place. Not to be trained afterwards. ``common [D]``: what
        all tokens have in common, such as the bias of the layer norm before; then the errors of rounding, which it
        would add up, cancel along it."""
        self.lin1, self.scale1 = _to_int8(self.lin1, common)
        self.lin2, self.scale2 = _to_int8(self.lin2, None)

    def widen(self, dtype: torch.dtype) -> None:
        """Undo ``quantize``, but for its rounding. Not for experts in tiles."""
        assert not self.in_tiles
        if self.scale1 is not None and self.scale2 is not None:
            for lin, scale in ((self.lin1, self.scale1), (self.lin2, self.scale2)):
                lin.data = (lin * scale[:, None]).to(dtype)
            self.scale1 = self.scale2 = None

    def put_in_tiles(self) -> None:
        """The experts' weights, where they fit. Not to be trained afterwards."""
        if self.in_tiles or self.controller.dtype is not torch.bfloat16 or not tiles.experts_fit(self.lin1):
            return
        self.lin1.data, self.lin2.data = tiles.side_by_side(self.lin1, self.lin2)
        if self.scale1 is not None:
            self.scale1 = F.pad(self.scale1, (0, self.lin1.shape[2] - self.size))
        self.in_tiles = True

    def put_in_order(self) -> None:
        """Undo ``put_in_tiles``."""
        self.lin1.data, self.lin2.data = self._in_order(self.lin1.data, self.lin2.data)
        if self.scale1 is not None:
            self.scale1 = self.scale1[:, : self.size].contiguous()
        self.in_tiles = False

    @property
    def filled_up(self) -> int:
        """Weights of the hidden units that tiles were filled up with."""
        return self.lin1.numel() + self.lin2.numel() - 2 * self.lin1[..., : self.size].numel()

    def _in_order(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Of one expert or several."""
        if not self.in_tiles:
            return first, second
        first, second = tiles.from_tiles(first), tiles.from_tiles(second)
        return first[..., : self.size].contiguous(), second[..., : self.size, :].contiguous()


def _to_int8(weight: Tensor, common: Tensor | None) -> tuple[nn.Parameter, Tensor]:
    """``weight [E, in, out]`` to integers from -127 to 127 and float32 scales ``[E, out]``."""
    scale = weight.detach().abs().amax(1).float().clamp_(min=1e-30) / 127
    if weight.is_cpu:
        rounded = empty_in_large_pages(tuple(weight.shape), torch.int8)
    else:
        rounded = torch.empty_like(weight, dtype=torch.int8)
    if common is None:
        for whole, one, by in zip(rounded, weight.detach(), scale, strict=True):
            whole.copy_((one.float() / by).round_())
    else:
        _round_along(weight.detach(), scale, common.detach().float(), rounded)
    return nn.Parameter(rounded, requires_grad=False), scale


def _round_along(weight: Tensor, scale: Tensor, common: Tensor, rounded: Tensor) -> None:
    """Into ``rounded``: each column so that its product with ``common [in]`` stays what it was. Mixing weights sum to
    1, so every mix contains ``common`` whole, and where that is many times what tells tokens apart, plain rounding
    errs by as many times more. Inputs take turns, the largest of ``common`` first; one that lies between two integers
    takes the one that brings the error so far back towards 0."""
    error = torch.zeros_like(scale)
    for place in common.abs().argsort(descending=True, stable=True).tolist():
        exact = weight[:, place].float() / scale
        nearest = exact.round()
        other = nearest + torch.where(nearest > exact, -1.0, 1.0)
        with_nearest, with_other = (error + (whole - exact) * common[place] for whole in (nearest, other))
        between = ((exact - nearest).abs() > _BETWEEN) & (other.abs() <= 127)
        turned = between & (with_other.abs() < with_nearest.abs())
        error = torch.where(turned, with_other, with_nearest)
        rounded[:, place] = torch.where(turned, other, nearest).to(torch.int8)


def _one_hot_at_maximum(values: Tensor, dim: int) -> Tensor:
    """One at the (first) maximum along ``dim``, zero elsewhere."""
    return torch.zeros_like(values).scatter_(dim, values.argmax(dim, keepdim=True), 1.0)


def mixing_weights(
    scores: Tensor, temperature: float | Tensor, *, over_experts: bool, discrete: bool, gated: bool = False
) -> tuple[Tensor, Tensor]:
    """``scores [n, G, E]`` to the weights that mix and the weights that redistribute, both ``[n, G, E]``.

    ``w[t, e] = softmax over t of s[t, e] / T``; redistribution uses the same or, ``over_experts``, a softmax over
    ``e``. ``discrete`` or T = 0 turn both into one-hot at their maximum. ``gated``: Expert Choice (Zhou et al.,
    arXiv 2202.09368) with room for one token of a group: each expert takes the token that scores best, and its answer
    counts by that score.
    """
    if gated:
        merge = _one_hot_at_maximum(scores, 1)
        return merge, torch.where(merge > 0, scores, 0.0)
    if discrete or (not isinstance(temperature, Tensor) and temperature == 0):
        merge = _one_hot_at_maximum(scores, 1)
        return merge, _one_hot_at_maximum(scores, 2) if over_experts else merge
    merge = torch.softmax(scores / temperature, dim=1)
    return merge, torch.softmax(scores / temperature, dim=2) if over_experts else merge


def exact_products(x: Tensor, controller: Tensor) -> Tensor:
    """``x [..., D] @ controller [D, E]`` in float32 at least, under autocast too: a temperature near 0 multiplies what
    rounding to bfloat16 would make of a score."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return x.to(dtype) @ controller.to(dtype)


def mix_groups(
    bank: ExpertBank, members: Tensor, temperature: float | Tensor, watch: Callable[[Tensor], None] | None = None
) -> Tensor:
    """``members [n, G, D]``, n groups of G tokens after the layer norm, to ``[n, G, D]``. ``temperature`` is one for
    all experts or ``[1 or E]``; ``watch`` is shown the mixing weights ``[n, G, E]``."""
    merge, emit = mixing_weights(
        bank.scores(exact_products(members, bank.controller)), temperature,
        over_experts=bank.over_experts, discrete=bank.discrete, gated=bank.gated,
    )  # fmt: skip
    if watch is not None:
        watch(merge)
    mixes = torch.bmm(merge.transpose(1, 2).to(members.dtype), members)  # [n, E, D]
    outputs = bank.experts(mixes.transpose(0, 1).to(bank.controller.dtype))  # [E, n, D]
    return torch.bmm(emit.to(outputs.dtype), outputs.transpose(0, 1))


def mixing_entropy(merge: Tensor) -> Tensor:
    """Entropy over the members of ``merge [n, G, E]``, mean over experts, over its maximum ``log G``: ``[n]``,
    from 0 (each expert takes one token) to 1 (each takes the plain mean)."""
    size = merge.shape[1]
    if size == 1:
        return merge.new_zeros(merge.shape[0])
    entropy: Tensor = torch.special.entr(merge).sum(1).mean(1)
    return entropy / math.log(size)


def of_layer(temperature: float | Tensor, layer: int) -> float | Tensor:
    """One temperature for all layers, or that layer's of ``[layers, 1 or E]``."""
    return temperature[layer] if isinstance(temperature, Tensor) else temperature


class WholeSequences:
    """``mix`` for B whole sequences of equal length: groups are consecutive sequences of the batch at one position.

    The last group is filled up to G with zero vectors, as the public Hugging Face ``mot`` model does. ``pad=False``
    does not fill: a batch below G is one smaller group, and ValueError says that a larger one must be a multiple of G.
    ``temperature`` is one for all or ``[layers, 1 or E]``; ``watch`` is shown every layer's mixing weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        *,
        temperature: float | Tensor | None = None,
        pad: bool = True,
        watch: Callable[[Tensor], None] | None = None,
    ) -> None:
        if not pad and batch > config.group_size and batch % config.group_size:
            raise ValueError(f"without padding, {batch} sequences are no groups of {config.group_size}")
        self.group_size = config.group_size
        self.batch = batch
        self.temperature = config.temperature if temperature is None else temperature
        self.pad = pad
        self.watch = watch

    def __call__(self, layer: int, bank: ExpertBank, x: Tensor) -> Tensor:
        rows, width = x.shape
        length = rows // self.batch
        size = self.group_size if self.pad else min(self.group_size, self.batch)
        full = -(-self.batch // size) * size
        if full != self.batch:
            x = torch.cat((x, x.new_zeros((full - self.batch) * length, width)))
        groups = x.view(full // size, size, length, width).transpose(1, 2).reshape(-1, size, width)
        out = mix_groups(bank, groups, of_layer(self.temperature, layer), self.watch)
        return out.view(full // size, length, size, width).transpose(1, 2).reshape(-1, width)[:rows]
