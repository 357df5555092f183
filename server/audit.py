"""The leak audit: one tenant's requests attack another's, through the engine that serves them.

A *victim* and an *attacker* run side by side; the attacker sees its own log probabilities and, between attacks, may
run whatever it likes on the same server. Four attacks, each over many trials:

(a) distinguish: which of two secret tokens did the victim send?
(b) recover: which token of the vocabulary did it send? The attacker matches what it saw against its own simulations.
(c) probe: was my guess of the victim's token right? Equal tokens tie, and what breaks a tie is the order of arrival
    (Yona et al., arXiv 2410.22884): the attacker sends its guess before and after the victim.
(d) integrity: does the victim's greedy text change with what the attacker sends (Hayes et al., arXiv 2402.05526)?

Trials run side by side in pairs, each in tenants of its own. Knows engines and token ids, no HTTP.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from server.config import Settings
from server.engine.engine import Engine
from server.engine.request import Delta, EngineRequest, Privacy, SamplingParams
from server.loading import load

Mode = Literal["shared", "one_hot_shared", "across_tenants", "private", "private_unmixed"]
MODES: tuple[Mode, ...] = ("shared", "one_hot_shared", "across_tenants", "private", "private_unmixed")
ISOLATED = frozenset[Mode]({"across_tenants", "private", "private_unmixed"})

_TOP = 20  # alternatives that the attacker sees, as many as the HTTP interface gives
_KNOWN = 3  # tokens of the victim's prompt before the secret, which the attacker knows
_CONTINUED = 6  # tokens of the victim's text that the integrity attack looks at
_PAIRS = 48  # trials side by side
_NOTICED = 1e-4  # nats; what a probe takes for a change rather than for rounding
_SURE = 1e-4  # p-value below which a result is not chance

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class AuditResult:
    """Of one mode. ``max_abs_logprob_change`` (nats) is of the attacker's log probabilities, over the victim's two
    secrets; the rates are of trials; ``chance`` is that of a recovery, for the other two it is one half."""

    mode: Mode
    trials: int
    max_abs_logprob_change: float
    distinguish_accuracy: float
    token_recovery_rate: float
    chance: float
    victim_text_changed: float
    probe_accuracy: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def isolated(self) -> bool:
        """Nothing moved, and no guess is better than chance."""
        return self.max_abs_logprob_change == 0 and self.victim_text_changed == 0 and not any(self._beaten().values())

    @property
    def broken(self) -> bool:
        """The attacker both tells secrets apart and recovers tokens."""
        beaten = self._beaten()
        return beaten["distinguish"] and beaten["recover"]

    def _beaten(self) -> dict[str, bool]:
        rates = {
            "distinguish": (self.distinguish_accuracy, 0.5),
            "recover": (self.token_recovery_rate, self.chance),
            "probe": (self.probe_accuracy, 0.5),
        }
        return {
            name: binomial_tail(round(rate * self.trials), self.trials, chance) < _SURE
            for name, (rate, chance) in rates.items()
        }


def binomial_tail(successes: int, trials: int, chance: float) -> float:
    """Probability of at least so many successes by chance alone, exactly."""
    if successes <= 0 or chance >= 1:
        return 1.0
    logs = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(chance) + (trials - k) * math.log1p(-chance)
        for k in range(successes, trials + 1)
    ]  # fmt: skip
    return min(1.0, sum(math.exp(value) for value in logs))


def verdict(results: Sequence[AuditResult]) -> tuple[int, str]:
    """An exit status and a sentence. 0: every isolated mode held; 1: one leaks; 2: the attacks have no power here (they
    did not break mixing itself), so that their failure elsewhere means nothing."""
    leaking = [result.mode for result in results if result.mode in ISOLATED and not result.isolated]
    if leaking:
        return 1, f"LEAK: {', '.join(leaking)}"
    shared = [result for result in results if result.mode not in ISOLATED]
    if any(not result.broken for result in shared if result.mode == "shared"):
        return 2, "INCONCLUSIVE: the attacks did not break shared groups, so they prove nothing; try more trials"
    held = [result.mode for result in results if result.mode in ISOLATED]
    power = f"; the same attacks break {', '.join(r.mode for r in shared if r.broken)}" if shared else ""
    return 0, f"ISOLATED: {', '.join(held)}{power}" if held else f"broken as expected: {power.removeprefix('; ')}"


@dataclass(frozen=True)
class _Pair:
    """A victim and an attacker that run at the same time."""

    victim: Tokens
    attacker: Tokens
    attacker_first: bool = False
    continued: int = 1


@dataclass(frozen=True)
class _Seen:
    """What came of a pair: the attacker's alternatives and their log probabilities after its prompt and after each
    further token, and the victim's greedy tokens."""

    tops: tuple[tuple[tuple[int, float], ...], ...]
    text: Tokens


_Play = Callable[[Sequence[_Pair]], list[_Seen]]


class Auditor:
    """Runs attacks against ``engine``, which nobody else uses."""

    def __init__(self, engine: Engine, default: Privacy, *, trials: int, candidates: int, seed: int) -> None:
        self._engine, self._default = engine, default
        self._vocabulary = engine.config.vocab_size
        self._trials, self._seed = trials, seed
        self._candidates = min(candidates, self._vocabulary)
        self._top = min(_TOP, self._vocabulary)
        self._runs = 0

    def run(self, mode: Mode, progress: Callable[[float], None] = lambda _: None) -> AuditResult:
        """All four attacks. ``progress`` gets the fraction done."""
        rng = random.Random(f"{self._seed}:{mode}")
        done, total = 0, 7 * self._trials + self._candidates

        def play(pairs: Sequence[_Pair]) -> list[_Seen]:
            nonlocal done
            seen: list[_Seen] = []
            for begin in range(0, len(pairs), _PAIRS):
                seen += self._side_by_side(mode, pairs[begin : begin + _PAIRS])
                done += len(pairs[begin : begin + _PAIRS])
                progress(done / total)
            return seen

        change, accuracy, changed = self._distinguish(rng, play)
        return AuditResult(
            mode=mode,
            trials=self._trials,
            max_abs_logprob_change=change,
            distinguish_accuracy=accuracy,
            token_recovery_rate=self._recover(rng, play),
            chance=1 / self._candidates,
            victim_text_changed=changed,
            probe_accuracy=self._probe(rng, play),
        )

    def _tokens(self, rng: random.Random, count: int) -> Tokens:
        return tuple(rng.randrange(self._vocabulary) for _ in range(count))

    def _distinguish(
        self, rng: random.Random, play: Callable[[Sequence[_Pair]], list[_Seen]]
    ) -> tuple[float, float, float]:
        """Attacks (a) and (d): largest change of a log probability, accuracy, share of victims' texts changed."""
        first, second, other = [], [], []
        for _ in range(self._trials):
            known, mine, theirs = (self._tokens(rng, count) for count in (_KNOWN, _KNOWN + 1, _KNOWN + 1))
            secrets = rng.sample(range(self._vocabulary), 2)
            first.append(_Pair((*known, secrets[0]), mine, continued=_CONTINUED))
            second.append(_Pair((*known, secrets[1]), mine, continued=_CONTINUED))
            other.append(_Pair((*known, secrets[0]), theirs, continued=_CONTINUED))
        expected = play(first), play(second)
        change = max(_change(one, two) for one, two in zip(*expected, strict=True))
        texts = zip(expected[0], play(other), strict=True)
        changed = sum(one.text != two.text for one, two in texts) / self._trials
        # The attack itself, in another order than the attacker's simulations: neighbours differ.
        order = rng.sample(range(self._trials), self._trials)
        coins = [rng.randrange(2) for _ in order]
        attacked = play([(first, second)[coin][trial] for trial, coin in zip(order, coins, strict=True)])
        right = 0
        for trial, coin, seen in zip(order, coins, attacked, strict=True):
            distances = self._distances([expected[0][trial], expected[1][trial]], seen)
            right += _nearest(distances, rng) == coin
        return change, right / self._trials, changed

    def _recover(self, rng: random.Random, play: _Play) -> float:
        """Attack (b). The attacker simulates every candidate once, then meets victims who drew theirs at random."""
        known, mine = self._tokens(rng, _KNOWN), self._tokens(rng, _KNOWN + 1)
        candidates = rng.sample(range(self._vocabulary), self._candidates)
        table = play([_Pair((*known, candidate), mine) for candidate in candidates])
        secrets = [rng.randrange(self._candidates) for _ in range(self._trials)]
        attacked = play([_Pair((*known, candidates[secret]), mine) for secret in secrets])
        guesses = [_nearest(self._distances(table, seen), rng) for seen in attacked]
        return sum(guess == secret for guess, secret in zip(guesses, secrets, strict=True)) / self._trials

    def _probe(self, rng: random.Random, play: _Play) -> float:
        """Attack (c), on the first token of a prompt, where nothing before it differs."""
        coins = [rng.randrange(2) == 1 for _ in range(self._trials)]
        pairs = []
        for right in coins:
            secret, wrong = rng.sample(range(self._vocabulary), 2)
            pairs.append(_Pair((secret,), (secret if right else wrong,)))
        after = play(pairs)
        before = play([_Pair(pair.victim, pair.attacker, attacker_first=True) for pair in pairs])
        noticed = [_change(one, two) > _NOTICED for one, two in zip(after, before, strict=True)]
        return sum(told == right for told, right in zip(noticed, coins, strict=True)) / self._trials

    def _distances(self, table: Sequence[_Seen], seen: _Seen) -> np.ndarray:
        """Mean difference of log probabilities (nats, at most 1) between ``seen`` and each simulation."""
        values = np.full(self._vocabulary, np.inf)
        for token, value in seen.tops[0]:
            values[token] = value
        simulated = np.array([entry.tops[0] for entry in table])  # [table, top, 2]
        differences = np.abs(values[simulated[:, :, 0].astype(np.int64)] - simulated[:, :, 1])
        means: np.ndarray = np.minimum(differences, 1.0).mean(1)
        return means

    def _side_by_side(self, mode: Mode, pairs: Sequence[_Pair]) -> list[_Seen]:
        """Run the pairs together; only victim and attacker of a pair could ever meet."""
        self._runs += 1
        roles: dict[str, tuple[int, bool]] = {}
        for number, pair in enumerate(pairs):
            for attacks in sorted((True, False), reverse=pair.attacker_first):
                request = self._request(mode, f"audit-{self._runs}-{number}-{attacks}", number, pair, attacks=attacks)
                roles[request.request_id] = (number, attacks)
                self._engine.check(request)
                self._engine.add(request)
        seen: dict[tuple[int, bool], list[Delta]] = {role: [] for role in roles.values()}
        while not self._engine.idle:
            for request_id, delta in self._engine.step():
                seen[roles[request_id]].append(delta)
        return [_seen(seen[number, True], seen[number, False]) for number in range(len(pairs))]

    def _request(self, mode: Mode, request_id: str, number: int, pair: _Pair, *, attacks: bool) -> EngineRequest:
        privacy = None
        if not attacks and mode in ("private", "private_unmixed"):
            privacy = self._default if mode == "private" else Privacy(0.0, 0.0)
        side = "attacker" if attacks and mode == "across_tenants" else "pair"
        sampling = SamplingParams(
            max_tokens=pair.continued, temperature=0, logprobs=self._top if attacks else None, ignore_eos=True
        )
        prompt = pair.attacker if attacks else pair.victim
        return EngineRequest(request_id, (prompt,), sampling, privacy=privacy, tenant=f"{side}-{number}")


def _seen(attacker: Sequence[Delta], victim: Sequence[Delta]) -> _Seen:
    tops = tuple(entry.top for delta in attacker for entry in delta.logprobs)
    return _Seen(tops, tuple(token for delta in victim for token in delta.token_ids))


def _change(one: _Seen, two: _Seen) -> float:
    """Largest difference of a log probability (nats). Of a token that only one of them shows, the other's log
    probability is known to be at most its smallest."""
    largest = 0.0
    for before, after in zip(one.tops, two.tops, strict=True):
        for top, other in ((before, dict(after)), (after, dict(before))):
            least = min(other.values())
            largest = max(largest, *(abs(value - other.get(token, least)) for token, value in top))
    return largest


def _nearest(distances: np.ndarray, rng: random.Random) -> int:
    """The place of the smallest; among equals any."""
    return int(rng.choice(np.flatnonzero(distances == distances.min()).tolist()))


def open_engine(settings: Settings, mode: Mode) -> tuple[Engine, Privacy]:
    """An engine to attack, and its default pair. ``one_hot_shared`` routes one-hot within shared groups: annealing
    without isolation. Raises CheckpointError, and ValueError for a model without groups, which has nothing to audit."""
    loaded = load(settings)
    engine = loaded.engine.direct
    if not engine.config.is_grouped:
        raise ValueError(f"model: {loaded.folder} is a {engine.config.model_type} model: its requests never mix")
    if mode == "one_hot_shared":
        for bank in engine.runner.model.banks:
            bank.discrete = True
    return engine, loaded.engine.info.default_privacy
