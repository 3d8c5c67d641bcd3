"""Several reward models that judge as one: what they agree on is harder to exploit than what one of them likes.

Each member renders messages with its own chat template and its own tokenizer. Their scores are put on one scale, where
that was measured, and combined: the mean; the mean less k standard deviations over the members (uncertainty counts
against a completion); or the lowest (Coste and others, arXiv:2310.02743, who call the last two uncertainty-weighted and
worst-case optimisation).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from align.core.errors import ModelError
from align.core.store import ModelRef
from reward.loading import find_file
from reward.model import FILE, Gate, Item, RewardModel, best_and_worst, high_enough, load_reward_model

Combine = Literal["mean", "mean_minus_std", "min"]


class Judge(Protocol):
    """A reward model or an ensemble of them."""

    name: str
    n_judged: Counter[str]
    n_abstain: Counter[str]

    @property
    def gates(self) -> dict[str, Gate] | None:
        """By family; None where there was nothing to calibrate on."""
        ...

    def score_many(self, items: Sequence[Item]) -> list[float]:
        """Rewards of (prompt, completion) pairs, each as messages or as token ids, in their order."""
        ...

    def score_fitting(self, items: Sequence[Item]) -> list[float | None]:
        """The same, with None for what is longer than a model can read."""
        ...

    def judge_group(self, family: str, scores: Sequence[float]) -> tuple[int, int] | None:
        """The places of the best and the worst of one prompt's scores, where they may be believed."""
        ...

    def accepts(self, family: str, score: float) -> bool:
        """Whether a score is high enough to be believed right."""
        ...

    def reads_ids_of(self, tokenizer: Any) -> bool:
        """Whether ids of another tokenizer may be scored as they are."""
        ...


@dataclass(frozen=True, slots=True)
class Member:
    """One model of an ensemble.

    Attributes:
        path: its folder, or its id on the Hub.
        name: for people.
        revision: of a Hub id.
        output: which output is the score, where it has several.
        shift: is taken from its scores, which are then divided by `scale`.
        scale: see there.
    """

    path: str
    name: str
    revision: str | None = None
    output: int | None = None
    shift: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class EnsembleCard:
    """What an ensemble's `reward_model.json` holds.

    Attributes:
        members: in order.
        combine: how many scores become one.
        k: standard deviations taken from the mean (mean_minus_std).
        gates: of the combined score, by family; None where there was nothing to calibrate on.
    """

    members: tuple[Member, ...]
    combine: Combine = "mean"
    k: float = 1.0
    gates: dict[str, Gate] | None = None

    def write(self, folder: Path) -> None:
        """Writes the card, which is all that there is of an ensemble."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def read(file: Path) -> EnsembleCard | None:
        """Reads a card; None where it is that of a single model.

        Raises:
            ModelError: it is neither.
        """
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if "members" not in found:
                return None
            members = tuple(Member(**member) for member in found.pop("members"))
            gates = found.pop("gates")
            gates = None if gates is None else {name: Gate(**gate) for name, gate in gates.items()}
            return EnsembleCard(members, gates=gates, **found)
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            raise ModelError(
                f"{file}: not an ensemble's card ({problem}); make it again (`align ensemble`)"
            ) from problem


@dataclass
class Ensemble:
    """Scores completions by all of its members; see `RewardModel` for what it has in common with one.

    Attributes:
        models: the members, loaded, in the card's order.
        card: how their scores become one.
        name: for people and messages.
    """

    models: list[RewardModel]
    card: EnsembleCard
    name: str = "ensemble"
    n_judged: Counter[str] = field(default_factory=Counter)
    n_abstain: Counter[str] = field(default_factory=Counter)

    @property
    def gates(self) -> dict[str, Gate] | None:
        """See `Judge`."""
        return self.card.gates

    def score_many(self, items: Sequence[Item]) -> list[float]:
        """See `Judge`."""
        return self.combined([model.score_many(items) for model in self.models])

    def score_fitting(self, items: Sequence[Item]) -> list[float | None]:
        """See `Judge`; what one member can't read has no score."""
        by_member = [model.score_fitting(items) for model in self.models]
        return [None if np.isnan(score) else score for score in self.combined(by_member)]

    def combined(self, by_member: Sequence[Sequence[float | None]]) -> list[float]:
        """One score of each completion from those of every member; nan where one has none."""
        scores = np.array(by_member, dtype=float)
        shift, scale = np.array([[m.shift, m.scale] for m in self.card.members]).T
        scores = (scores - shift[:, None]) / scale[:, None]
        found: list[float] = _COMBINED[self.card.combine](scores, self.card.k).tolist()
        return found

    def judge_group(self, family: str, scores: Sequence[float]) -> tuple[int, int] | None:
        """See `Judge`."""
        self.n_judged[family] += 1
        found = best_and_worst(self.card.gates, family, scores)
        if found is None:
            self.n_abstain[family] += 1
        return found

    def accepts(self, family: str, score: float) -> bool:
        """See `Judge`."""
        return high_enough(self.card.gates, family, score)

    def reads_ids_of(self, tokenizer: Any) -> bool:
        """See `Judge`."""
        return all(model.reads_ids_of(tokenizer) for model in self.models)


_COMBINED: dict[Combine, Any] = {
    # of scores by member and completion, (M, N), and k
    "mean": lambda scores, _: scores.mean(axis=0),
    "mean_minus_std": lambda scores, k: scores.mean(axis=0) - k * scores.std(axis=0),
    "min": lambda scores, _: scores.min(axis=0),
}


def load_judge(path_or_ref: str | Path | ModelRef, device: str = "cpu", dtype: str | None = None) -> Judge:
    """Loads a reward model or an ensemble; see `load_reward_model`.

    Raises:
        ModelError: as there, or a member is an ensemble itself.
    """
    ref = path_or_ref if isinstance(path_or_ref, ModelRef) else None
    path, name = (ref.path, ref.name) if ref else (str(path_or_ref), str(path_or_ref))
    file = find_file(path, FILE, ref.revision if ref else None)
    card = None if file is None else EnsembleCard.read(file)
    if card is None:
        return load_reward_model(path_or_ref, device, dtype)
    return load_ensemble(card, name, device, dtype)


def load_ensemble(card: EnsembleCard, name: str, device: str, dtype: str | None = None) -> Ensemble:
    """Loads every member of an ensemble.

    Raises:
        ModelError: as `load_reward_model`, naming the member.
    """
    from align.core.records import Kind

    models = []
    for member in card.members:
        file = find_file(member.path, FILE, member.revision)
        if file is not None and EnsembleCard.read(file) is not None:
            raise ModelError(f"{member.name}: is an ensemble itself; name its members instead")
        ref = ModelRef(member.path, Kind.REWARD_MODEL, member.name, "", member.revision)
        models.append(load_reward_model(ref, device, dtype, member.output))
    return Ensemble(models, card, name)


def on_one_scale(card: EnsembleCard, by_member: Sequence[Sequence[float]]) -> EnsembleCard:
    """The card with each member's shift and scale, so that its scores of these completions have mean 0 and sd 1.

    Raises:
        ModelError: a member gives all completions the same score.
    """
    members = []
    for member, scores in zip(card.members, by_member, strict=True):
        mean, spread = float(np.mean(scores)), float(np.std(scores))
        if not spread > 0:
            raise ModelError(f"{member.name}: it gives all {len(scores)} labelled completions the same score")
        members.append(replace(member, shift=mean, scale=spread))
    return replace(card, members=tuple(members))
