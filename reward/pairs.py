"""Scored completions of one prompt to preference pairs; the offline stage `pair` and online DPO both use it.

Four rules: best against worst, the Qwen2 report's (arXiv:2407.10671, 4.3); best against a random other one, Zephyr's
(arXiv:2310.16944); all, which is every winner with a loser, cycling the shorter list, where a verifier spoke (IRPO,
arXiv:2404.19733, 2), and every two completions with a margin where only rewards are known; and a pair drawn at random,
the control.

What holds for all of them: an error is never paired, since nothing is known of it; a tie is dropped and never trained
on; a truncated completion is never chosen, or the policy learns not to stop; two equal texts are never a pair.

A penalty (of length, say) is heard among completions of one verdict and never between two verdicts: the right answer
beats the wrong one however long it is, and of two right ones the shorter is better.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from align.core.records import VerdictName

Strategy = Literal["max_min", "max_random", "random", "all"]


@dataclass(frozen=True, slots=True)
class Scored:
    """One completion as pairing sees it.

    Attributes:
        text: its text; two completions of equal text (ends stripped) count once.
        reward: higher is better; None (or not a finite number) counts as an error.
        verdict: of a verifier, where one spoke; None for scores of a reward model or a person.
        truncated: it ended for want of tokens, and so is never chosen.
        choosable: false for one that may only be rejected (a right answer by a wrong way, say).
        runs: code that compiles and runs, right or wrong; of equally bad completions one that runs is rejected first.
        rejectable: false for one that may only be chosen (one that is wrong in part, say).
        penalty: what is taken off its reward among completions of the same verdict.
    """

    text: str
    reward: float | None
    verdict: VerdictName | None = None
    truncated: bool = False
    choosable: bool = True
    runs: bool = True
    rejectable: bool = True
    penalty: float = 0.0

    @property
    def net(self) -> float | None:
        """The reward less the penalty."""
        return None if self.reward is None else self.reward - self.penalty


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference: places in the list that was given, and the chosen's reward minus the rejected's.

    Of two completions of one verdict these are rewards less penalties; of a passed and a failed one they are as given.
    """

    chosen: int
    rejected: int
    margin: float


def make_pairs(
    scored: Sequence[Scored],
    strategy: Strategy = "max_min",
    *,
    min_margin: float = 0.0,
    max_pairs: int = 10,
    chosen_passes: bool = True,
    seed: int | str = 0,
) -> tuple[list[Pair], Counter[str]]:
    """Pairs of one prompt's completions, and what became of the prompt and of the completions left out.

    The counts are for the log of the yield. One of a prompt: `paired`, or why it gave no pair: `too_few` (fewer than
    two usable completions), `tie`, `below_margin`, `none_chosen` (no completion may be chosen), `none_rejected`,
    `one_sided` (`all` only: no winner, or no loser), `at_odds` (a failed completion has the higher reward). Of
    completions: `dropped_error`, `dropped_identical`.

    Args:
        scored: the completions of one prompt, in any order.
        strategy: max_min; max_random (the best, and one drawn of those it beats); random (one pair among all that are
            allowed); or all (winners passed, losers failed; without verdicts any two, the greatest margins first).
        min_margin: a pair's margin must be above 0 and at least this.
        max_pairs: most pairs of the prompt under `all`.
        chosen_passes: whether a completion that a verifier failed is never chosen, however well it is graded.
        seed: decides between equal rewards, and the draws of `random` and `max_random`.
    """
    left_out = _left_out(scored)
    counts = Counter(f"dropped_{why}" for why in left_out.values())
    usable = [place for place in range(len(scored)) if place not in left_out]
    if len(usable) < 2:
        counts["too_few"] += 1
        return [], counts

    rng = random.Random(f"{seed}/pairs")
    shuffled = rng.sample(usable, len(usable))
    may_win = [i for i in shuffled if _choosable(scored[i], chosen_passes)]
    may_lose = [i for i in shuffled if scored[i].rejectable]
    if strategy == "all" and any(scored[i].verdict for i in usable):
        winners = [i for i in usable if _choosable(scored[i], chosen_passes) and scored[i].verdict == "passed"]
        losers = [i for i in usable if scored[i].verdict == "failed" and scored[i].rejectable]
        winners.sort(key=lambda i: scored[i].penalty)
        losers.sort(key=lambda i: (not scored[i].runs, -scored[i].penalty))
        candidates = _walk(winners, losers)
        reason = "tie" if candidates else "one_sided"
    elif not may_win:
        reason, candidates = "none_chosen", []
    elif not may_lose:
        reason, candidates = "none_rejected", []
    else:
        best = max(may_win, key=lambda i: _worth(scored[i]))
        worst = min(may_lose, key=lambda i: (_worth(scored[i]), not scored[i].runs))
        reason, candidates = "tie", [(best, worst)]
        if strategy == "max_random":
            candidates = [(best, j) for j in may_lose]
        elif strategy == "random":
            candidates = [(i, j) for i in may_win for j in may_lose]
            rng.shuffle(candidates)
        elif strategy == "all":
            candidates = [(i, j) for i in may_win for j in may_lose]
            candidates.sort(key=lambda both: -_margin(scored[both[0]], scored[both[1]]))

    limit = max_pairs if strategy == "all" else 1
    pairs: list[Pair] = []
    for chosen, rejected in candidates:
        margin = _margin(scored[chosen], scored[rejected])
        if margin < 0 and strategy == "max_min":
            reason = "at_odds"
        if margin <= 0:
            continue
        if margin < min_margin:
            reason = "below_margin"
        elif len(pairs) < limit:
            pairs.append(Pair(chosen, rejected, margin))
    counts["paired" if pairs else reason] += 1
    return pairs, counts


def fates(scored: Sequence[Scored], pairs: Sequence[Pair]) -> list[str]:
    """What became of each completion.

    `chosen`, `rejected`, `chosen_and_rejected` (in different pairs); or why it is in no pair: `error`, `identical` (to
    one before it), `truncated` (and not rejected), `unpaired` (for any other reason).
    """
    found = _left_out(scored)
    for place, one in enumerate(scored):
        sides = [any(pair.chosen == place for pair in pairs), any(pair.rejected == place for pair in pairs)]
        if any(sides):
            found[place] = "_and_".join(name for name, so in zip(("chosen", "rejected"), sides, strict=True) if so)
        elif place not in found:
            found[place] = "truncated" if one.truncated else "unpaired"
    return [found[place] for place in range(len(scored))]


def _left_out(scored: Sequence[Scored]) -> dict[int, str]:
    """The places of completions that can't be paired at all, and why."""
    found: dict[int, str] = {}
    seen: set[str] = set()
    for place, one in enumerate(scored):
        text = one.text.strip()
        if one.reward is None or not math.isfinite(one.reward) or one.verdict == "error":
            found[place] = "error"
        elif text in seen:
            found[place] = "identical"
        else:
            seen.add(text)
    return found


def _walk(winners: Sequence[int], losers: Sequence[int]) -> list[tuple[int, int]]:
    """Both lists side by side, the shorter one from its start again; empty when either is."""
    if not winners or not losers:
        return []
    steps = max(len(winners), len(losers))
    return [(winners[i % len(winners)], losers[i % len(losers)]) for i in range(steps)]


def _choosable(one: Scored, chosen_passes: bool) -> bool:
    return one.choosable and not one.truncated and not (chosen_passes and one.verdict == "failed")


def _worth(one: Scored) -> tuple[bool, float]:
    """By what completions are ordered: the verdict first, then the reward less the penalty."""
    return one.verdict == "passed", _reward(one) - one.penalty


def _margin(chosen: Scored, rejected: Scored) -> float:
    margin = _reward(chosen) - _reward(rejected)
    return margin - (chosen.penalty - rejected.penalty) if chosen.verdict == rejected.verdict else margin


def _reward(one: Scored) -> float:
    """The reward of a usable completion."""
    if one.reward is None:
        raise ValueError("a completion without a reward can't be compared")
    return one.reward
