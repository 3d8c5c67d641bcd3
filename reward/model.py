"""A reward model: loading it, scoring completions with it, and judging groups of them through its gate.

Two heads. `scalar` is the field's standard: one number read off the last token. `logprob` keeps the policy a language
model and takes coef times the summed log-probability of the completion's tokens; on small models and verifiable tasks
it held where the scalar head did not. Any sequence-classification reward model of the Hub loads as well: it reads its
own chat template and has no gate (`reward.classifiers`). Several models may judge as one (`reward.members`).

What is fixed for models made here: a sequence ends at the end-of-turn token (the newline that ChatML puts after it
moves a score by several units), the pad token is not the end token, and a head that would be newly initialised is
refused instead of scoring at random.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from align.core.chat import IGNORED, encode_demonstrations
from align.core.errors import DataError, ModelError
from align.core.records import Messages, Row
from align.core.store import ModelRef
from reward.batches import Encoded, batch_rewards, batches_to_score
from reward.classifiers import encode_as_trained, encoder_rewards, is_encoder, keep_output, longest_of
from reward.loading import Head, distinct_pad_id, find_file, load_model, load_tokenizer, template_hash

Half = Messages | Sequence[int]

Item = tuple[Half, Half] | tuple[Half, Half, Any]
"""A prompt and a completion, both as messages or both as token ids; third, for messages, the tools that the prompt may
call (JSON schemas, or that as JSON text), which the chat template shows as it did in training."""

FILE = "reward_model.json"
"""Stands beside the weights and says how they are to be read."""


@dataclass(frozen=True, slots=True)
class Gate:
    """When scores of one family may be believed; thresholds found on labelled held-out completions.

    Attributes:
        best_above: the best of a group must score at least this; None if no threshold was precise enough.
        worst_below: the worst must score below this; None likewise.
        gap: best − worst must be more than this.
        closed: why nothing of this family is accepted; empty while the gate is open.
    """

    best_above: float | None
    worst_below: float | None
    gap: float
    closed: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """What `reward_model.json` holds.

    Attributes:
        head: which number is the reward.
        coef: of the summed log-probability (log-prob head).
        gates: by family; None where there was nothing to calibrate on (comparisons only): then every gap counts.
        base: the model it was trained from.
        template: hash of the chat template it was trained with; empty for a model that was made elsewhere.
    """

    head: Head = "scalar"
    coef: float = 1.0
    gates: dict[str, Gate] | None = None
    base: str = ""
    template: str = ""

    def write(self, folder: Path) -> None:
        """Writes the card beside the weights."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def read(file: Path) -> Card:
        """Reads a card.

        Raises:
            ModelError: it is not one.
        """
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            gates = found.pop("gates")
            return Card(gates=None if gates is None else {name: Gate(**gate) for name, gate in gates.items()}, **found)
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            raise ModelError(f"{file}: not a reward model's card ({problem}); train it again") from problem


@dataclass
class RewardModel:
    """Scores completions; higher is better.

    Attributes:
        model: a transformers (or peft) model with the head that the card names.
        tokenizer: its own; ids given to `score_many` are taken to be of this one.
        card: how to read it.
        name: for people and messages.
        output: which output of an encoder is the score.
        n_abstain: how many groups `judge_group` refused, by family; `n_judged` how many it was given.
    """

    model: Any
    tokenizer: Any
    card: Card
    name: str = "reward model"
    output: int = 0
    n_judged: Counter[str] = field(default_factory=Counter)
    n_abstain: Counter[str] = field(default_factory=Counter)

    @property
    def gates(self) -> dict[str, Gate] | None:
        """By family; see `Card`."""
        return self.card.gates

    def score_many(self, items: Sequence[Item]) -> list[float]:
        """Rewards of (prompt, completion) pairs, each as messages or as token ids, in their order.

        Messages are rendered with this model's own chat template. Ids are scored as they are: a completion that was
        cut off has no end token and is not given one.
        """
        return self.score_encoded(self.encode(items))

    def score_fitting(self, items: Sequence[Item]) -> list[float | None]:
        """The same, with None for what is longer than the model can read."""
        encoded = self.encode(items)
        longest = longest_of(self.model, self.tokenizer)
        fits = [longest is None or len(ids) <= longest for ids, _ in encoded]
        scores = iter(self.score_encoded([pair for pair, fit in zip(encoded, fits, strict=True) if fit]))
        return [next(scores) if fit else None for fit in fits]

    def reads_ids_of(self, tokenizer: Any) -> bool:
        """Whether ids that another tokenizer made of messages are what this model would make of them itself."""
        own = self.tokenizer
        alike = own.chat_template == tokenizer.chat_template and own.get_vocab() == tokenizer.get_vocab()
        return bool(self.card.template and alike)  # made elsewhere, it may read what comes after the end of the turn

    def encode(self, items: Sequence[Item]) -> list[Encoded]:
        """Token ids and labels of each pair.

        Raises:
            DataError: an empty pair, or one half as messages and the other as ids.
        """
        encoded: list[Encoded | None] = [None] * len(items)
        rows: list[tuple[int, Row]] = []
        for place, (prompt, completion, *tools) in enumerate(items):
            if not prompt or not completion:
                raise DataError(f"{self.name}: pair {place} has an empty prompt or completion; it can't be scored")
            if isinstance(prompt[0], dict) != isinstance(completion[0], dict):
                raise DataError(f"{self.name}: pair {place} is half messages, half token ids; give both as one of them")
            if isinstance(prompt[0], dict):
                rows.append((place, {"prompt": prompt, "completion": completion, "tools": tools[0] if tools else None}))
            else:
                ids = [*prompt, *completion]
                encoded[place] = (ids, [IGNORED] * len(prompt) + ids[len(prompt) :])
        if self.card.template:
            found = encode_demonstrations(self.tokenizer, [row for _, row in rows])
        else:
            found = (
                encode_as_trained(self.model, self.tokenizer, row["prompt"], row["completion"], self.name, row["tools"])
                for _, row in rows
            )
        for (place, _), pair in zip(rows, found, strict=True):
            encoded[place] = pair
        return [pair for pair in encoded if pair is not None]

    def score_encoded(self, encoded: Sequence[Encoded]) -> list[float]:
        """Rewards of encoded pairs, in their order."""
        scores = [0.0] * len(encoded)
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                if self.card.head == "scalar" and is_encoder(self.model):
                    return encoder_rewards(self.model, encoded, self.output)
                for places in batches_to_score(self.model, self.card.head, encoded):
                    rewards = batch_rewards(self.model, self.card.head, self.card.coef, [encoded[i] for i in places])
                    for i, reward in zip(places, rewards.tolist(), strict=True):
                        scores[i] = reward
        finally:
            self.model.train(training)
        return scores

    def judge_group(self, family: str, scores: Sequence[float]) -> tuple[int, int] | None:
        """The places of the best and the worst of one prompt's scores, or None where the model should not be believed.

        With a gate, the best must lie above and the worst below the family's thresholds, far enough apart; a family
        that the gate has never seen is not judged. Without gates any difference counts; a tie never does.
        """
        self.n_judged[family] += 1
        found = best_and_worst(self.card.gates, family, scores)
        if found is None:
            self.n_abstain[family] += 1
        return found

    def accepts(self, family: str, score: float) -> bool:
        """Whether a score is high enough to be believed right; without gates every score is."""
        return high_enough(self.card.gates, family, score)


def best_and_worst(gates: Mapping[str, Gate] | None, family: str, scores: Sequence[float]) -> tuple[int, int] | None:
    """See `RewardModel.judge_group`."""
    if len(scores) < 2 or not all(math.isfinite(score) for score in scores):
        return None
    best = max(range(len(scores)), key=lambda i: scores[i])
    worst = min(range(len(scores)), key=lambda i: scores[i])
    gap = scores[best] - scores[worst]
    if gates is None:
        return (best, worst) if gap > 0 else None
    gate = gates.get(family)
    if gate is None or gate.closed or gate.best_above is None or gate.worst_below is None:
        return None
    believed = scores[best] >= gate.best_above and scores[worst] < gate.worst_below and gap > gate.gap
    return (best, worst) if believed else None


def high_enough(gates: Mapping[str, Gate] | None, family: str, score: float) -> bool:
    """See `RewardModel.accepts`."""
    if gates is None:
        return True
    gate = gates.get(family)
    return gate is not None and not gate.closed and gate.best_above is not None and score >= gate.best_above


def load_reward_model(
    path_or_ref: str | Path | ModelRef, device: str = "cpu", dtype: str | None = None, output: int | None = None
) -> RewardModel:
    """Loads a reward model made by the stage `reward`, or any sequence-classification one.

    For what may also be an ensemble there is `reward.members.load_judge`.

    Args:
        path_or_ref: a folder (a LoRA adapter's too), a Hub id, or a step's result.
        device: cpu, cuda, cuda:1, ...
        dtype: float32, bfloat16, ...; by default float32 on CPU and the checkpoint's own on a GPU.
        output: which output is the score, of a model that has several.

    Raises:
        ModelError: there is no such model, its head would be newly initialised, it has several outputs, or its chat
            template is not the one it was trained with.
    """
    ref = path_or_ref if isinstance(path_or_ref, ModelRef) else None
    path, name = (ref.path, ref.name) if ref else (str(path_or_ref), str(path_or_ref))
    revision = ref.revision if ref else None
    card_file = find_file(path, FILE, revision)
    card = Card() if card_file is None else Card.read(card_file)
    wanted = dtype or ("float32" if device == "cpu" else "auto")
    model, missing = load_model(path, card.head, wanted, revision)
    if missing:
        raise ModelError(
            f"{name}: it has no weights for {', '.join(missing[:3])}, which would be random, and so would its scores; "
            "give a reward model (`align reward` trains one from a policy)"
        )
    if card.head == "scalar":
        _choose_output(model, output, name)
    tokenizer = load_tokenizer(path, revision)
    if card.template and card.template != template_hash(tokenizer):
        raise ModelError(f"{name}: its chat template was changed after it was trained; restore it, or train it again")
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = distinct_pad_id(tokenizer)
    return RewardModel(model.to(device).eval(), tokenizer, card, name, output or 0)


def _choose_output(model: Any, output: int | None, name: str) -> None:
    """Which of a classifier's outputs is the score.

    Raises:
        ModelError: there are several and none was chosen, or there is no such output.
    """
    outputs = model.config.num_labels
    if output is None and outputs != 1:
        raise ModelError(
            f"{name}: it has {outputs} outputs, a reward model has one; say which one is the score: "
            f"align ensemble reward_model={name} output=0 out=…"
        )
    if output is not None and not 0 <= output < outputs:
        raise ModelError(f"{name}: output {output} was asked for, it has {outputs}, counted from 0")
    if outputs != 1:
        keep_output(model, output or 0)
