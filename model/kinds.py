"""The same model with another kind of feed-forward layer, at equal cost. Knows sizes only."""

from __future__ import annotations

from model.config import ModelConfig
from model.errors import TrainingError

FEED_FORWARDS = ("dense", "mot", "switch", "top-k", "expert-choice")


def flop_matched(config: ModelConfig, kind: str) -> ModelConfig:
    """A ``mot`` configuration with feed-forward layers of another kind whose matrix products cost as many FLOPs a
    token. MoT's E experts of S hidden units run once for G tokens: each pays for ``H = E * S / G`` hidden units, which
    is ``4 * n_embd * H`` FLOPs. (Scores, mixing and the choice of experts are not counted; they differ by kind.)

    - ``dense``: one layer of H hidden units, the only kind with fewer parameters.
    - ``switch``: G experts of H hidden units, one a token.
    - ``top-k``: E experts of S hidden units, E / G a token: one shared, the other E / G - 1 of E - 1 routed ones.
    - ``expert-choice``: MoT's sizes; each expert takes one of G tokens, so that a token has E / G experts on average.

    Raises TrainingError naming the reason when sizes do not come out whole.
    """
    if kind not in FEED_FORWARDS:
        raise TrainingError(f"feed_forward must be one of {', '.join(FEED_FORWARDS)}, not {kind!r}")
    assert config.is_mot, "only a MoT model is matched"
    experts, size, group = config.n_expert, config.expert_size, config.group_size
    if kind in ("dense", "switch") and experts * size % group:
        raise TrainingError(
            f"feed_forward: n_expert ({experts}) times expert_size ({size}) must be a multiple of group_size ({group})"
        )
    if kind == "top-k" and (experts % group or experts < 2 * group):
        raise TrainingError(
            f"feed_forward: top-k needs a multiple of group_size ({group}), at least twice, as n_expert, not {experts}"
        )
    hidden = experts * size // group
    if kind == "dense":
        return config.replace(model_type="gpt2", n_inner=hidden)
    if kind == "switch":
        return config.replace(model_type="switch", n_expert=group, expert_size=hidden)
    if kind == "top-k":
        return config.replace(
            model_type="top-k", n_expert=experts - 1, n_shared_expert=1, experts_per_token=experts // group - 1
        )
    return config if kind == "mot" else config.replace(model_type="expert-choice", temperature=0.0)
