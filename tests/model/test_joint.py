"""Training both ways to decode at once, against the definitions, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.attention import attend_whole_sequences
from model.joint import JointSequences, joint_losses
from model.mixing import WholeSequences
from model.transformer import Transformer
from tests.model.runs import CONFIG, STREAM


def _joint_by_hand(model: Transformer, ids: torch.Tensor, copies: int, temperature: float, count: int) -> torch.Tensor:
    """Logits of the copies, token by token: a copy's group is itself alone, and an expert is its own when it beats
    the next ``count`` members of the mixed group at that place."""
    batch, length = ids.shape
    mixed: list[torch.Tensor] = []

    def record(layer: int, bank: Any, x: torch.Tensor) -> torch.Tensor:
        mixed.append(x)
        return WholeSequences(CONFIG, batch, temperature=temperature)(layer, bank, x)

    def unmixed(layer: int, bank: Any, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        size = CONFIG.group_size
        for copy in range(copies):
            first = copy // size * size
            rivals = [first + (copy - first + ahead) % size for ahead in range(1, count + 1)]
            for place in range(length):
                row = x[copy * length + place]
                scores = row @ bank.controller
                others = torch.stack([mixed[layer][other * length + place] @ bank.controller for other in rivals])
                for expert in (scores > others.amax(0)).nonzero().flatten().tolist():
                    hidden = bank.activation(row @ bank.lin1[expert])
                    out[copy * length + place] += hidden @ bank.lin2[expert]
        return out

    positions = torch.arange(length)
    model(
        ids.reshape(-1), positions.repeat(batch),
        lambda _, qkv: attend_whole_sequences(qkv, batch, CONFIG.n_head), record,
    )  # fmt: skip
    hidden = model(
        ids[:copies].reshape(-1), positions.repeat(copies),
        lambda _, qkv: attend_whole_sequences(qkv, copies, CONFIG.n_head), unmixed,
    )  # fmt: skip
    return model.logits(hidden)


@pytest.mark.parametrize("rivals", [None, 1, 2])
def test_joint_copies_decode_as_by_hand(rivals: int | None) -> None:
    model = Transformer(CONFIG)
    model.initialize(3)
    for block in model.blocks:
        block.mlp.initialize(0.02, 0.01)  # few wins of one expert in the second layer hang on the first's rounding
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    ids = torch.from_numpy(STREAM[: 8 * 10].astype(np.int64)).view(8, 10)
    copies = 3
    mix = JointSequences(CONFIG, 8, copies, temperature=0.5, rivals=rivals)
    both = torch.cat((ids, ids[:copies]))
    with torch.no_grad():
        hidden = model(
            both.reshape(-1), torch.arange(10).repeat(11),
            lambda _, qkv: attend_whole_sequences(qkv, 11, CONFIG.n_head), mix,
        )  # fmt: skip
        found = model.logits(hidden)[8 * 10 :]
        expected = _joint_by_hand(model, ids, copies, 0.5, CONFIG.group_size - 1 if rivals is None else rivals)
        plain = model.logits(
            model(
                ids.reshape(-1),
                torch.arange(10).repeat(8),
                lambda _, qkv: attend_whole_sequences(qkv, 8, CONFIG.n_head),
                WholeSequences(CONFIG, 8, temperature=0.5),
            )
        )
        together = model.logits(hidden)[: 8 * 10]
    torch.testing.assert_close(together, plain, atol=1e-4, rtol=1e-4)
    same = (found - expected).abs().amax(1) < 1e-4
    assert same.float().mean() > 0.9  # the weakest of very many wins of one expert are dropped


def test_the_joint_losses_against_their_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, 11, generator=generator)  # 3 mixed, 2 copies of the first two
    targets = torch.randint(0, 11, (3, 7), generator=generator)
    loss, private, learnt = joint_losses(logits, targets, 2, distill=0.25)
    mixed = F.cross_entropy(logits[:3].reshape(-1, 11), targets.reshape(-1))
    copied = logits[3:].log_softmax(-1)
    teacher = logits[:2].softmax(-1)
    hard = -copied.gather(-1, targets[:2, :, None]).mean()
    soft = -(teacher * copied).sum(-1).mean()
    torch.testing.assert_close((loss, private, learnt), (mixed, hard, 0.75 * hard + 0.25 * soft))


def test_clear_losers_at_a_low_temperature_leave_numbers() -> None:
    model = Transformer(CONFIG)
    model.initialize(0)
    with torch.no_grad():
        for bank in model.banks:
            bank.controller.mul_(100)
    mix = JointSequences(CONFIG, 8, 4, temperature=0.001)
    out = mix(0, model.banks[0], torch.randn(12 * 10, CONFIG.n_embd, generator=torch.Generator().manual_seed(0)))
    out.square().sum().backward()  # type: ignore[no-untyped-call]
    gradient = model.banks[0].controller.grad
    assert out.isfinite().all() and gradient is not None and gradient.isfinite().all()
