"""How good are the policy's completions: verifiers, the reward model, a judge, or several of them together.

Each part scores what it can; `align.train.grading` makes one reward of that, and `reward.pairs` the pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from align.core.engines.base import Completion
from align.core.errors import EngineError, RecipeError
from align.core.records import Row, Verdict
from align.core.stage import Tools
from align.train.online_settings import PARTS, Config, Part
from reward.judge import Judge
from reward.pairs import Pair, Scored, make_pairs
from reward.scoring import item_of
from reward.verifiers import VERIFIERS, Verifiers

Gather = Callable[[list[Any]], list[Any]]
"""A list of every process's things from the list of its own; `list` where there is one process."""

SILENT = 20
"""From so many judgements on, a judge of whom none can be read stops the run."""


@dataclass
class Group:
    """The completions of one prompt.

    Attributes:
        row: of the prompts.
        prompt_ids: what the policy reads.
        completions: as sampled.
        scores: by part what it gave each completion, in the same order; None where it could not say.
        verdicts: of the verifier and of the judge, where they were asked.
        scored: as pairing sees them, once graded (`align.train.grading`).
    """

    row: Row
    prompt_ids: list[int]
    completions: list[Completion] = field(default_factory=list)
    scores: dict[Part, list[float | None]] = field(default_factory=dict)
    verdicts: dict[Part, list[Verdict]] = field(default_factory=dict)
    scored: list[Scored] = field(default_factory=list)

    @property
    def family(self) -> str:
        """What scores are reported by."""
        return str(self.row["family"] or self.row["task"] or "")

    @property
    def scorer(self) -> str:
        """The parts that scored, joined by +; an empty text where there are none."""
        return "+".join(self.scores)


class Scorer:
    """Scores completions, and makes the pairs of each prompt.

    Args:
        config: `scorer` and what follows it.
        verifiers: started by the caller.
        reward_model: a `reward.members.Judge`; None where none is asked.
        tokenizer: the policy's.
        judge: a model that grades; None where none is asked.
    """

    def __init__(
        self, config: Config, verifiers: Verifiers, reward_model: Any, tokenizer: Any, judge: Judge | None = None
    ) -> None:
        self.config, self.verifiers, self.reward_model, self.judge = config, verifiers, reward_model, judge
        # Sampled ids are scored as they are where the reward model reads the same ids; else its own template is used.
        self.same_ids = reward_model is not None and reward_model.reads_ids_of(tokenizer)

    @staticmethod
    def decidable(row: Row) -> bool:
        """Whether a program can say which completions of a prompt are right."""
        return row["task"] in VERIFIERS and row["reference"] is not None

    def parts(self, row: Row) -> list[Part]:
        """Who scores a prompt's completions; nobody where only a verifier may and it has none."""
        config, decidable = self.config, self.decidable(row)
        if config.scorer == "verifier":
            return ["verifier"] if decidable else []
        if config.scorer in ("reward_model", "judge"):
            return [config.scorer]
        verified = decidable and row["task"] in config.verified_tasks
        if config.scorer == "mix":
            return ["verifier" if verified else "reward_model" if self.reward_model is not None else "judge"]
        return [part for part in config.scored_by if part != "verifier" or verified]

    def score(self, groups: Sequence[Group]) -> None:
        """Fills in `scores` and `verdicts` of the completions that have none yet."""
        for group in groups:
            for part in self.parts(group.row):
                group.scores.setdefault(part, [])
        asked: dict[Part, Callable[[Sequence[Group]], Any]] = {"verifier": self.verdicts, "judge": self.judgements}
        for part, ask in asked.items():
            own = [group for group in groups if part in group.scores]
            for group, verdicts in zip(own, ask([_unscored(group, part) for group in own]), strict=True):
                group.scores[part] += [verdict.reward for verdict in verdicts]
                group.verdicts.setdefault(part, []).extend(verdicts)
        own = [group for group in groups if "reward_model" in group.scores]
        for group, rewards in zip(own, self.rewards([_unscored(g, "reward_model") for g in own]), strict=True):
            group.scores["reward_model"] += rewards

    def verdicts(self, groups: Sequence[Group]) -> list[list[Verdict]]:
        """A verdict for each completion; one that was cut off has failed."""
        asked = [
            (group.row["task"], c.text, group.row["reference"], group.row["prompt"][-1]["content"])
            for group in groups
            for c in group.completions
            if c.finish_reason == "stop"
        ]
        found = self.verifiers.verify_many(asked)
        apart = {"length": Verdict.of(False, "truncated"), "error": Verdict.error("not sampled")}
        return [
            [next(found) if c.finish_reason == "stop" else apart[c.finish_reason] for c in group.completions]
            for group in groups
        ]

    def rewards(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """The reward model's score of each completion; None where nothing was sampled, or more than it can read."""
        items = [
            (group.prompt_ids, c.token_ids)
            if self.same_ids
            else item_of(group.row["prompt"], [{"role": "assistant", "content": c.text}], group.row.get("tools"))
            for group in groups
            for c in group.completions
            if c.finish_reason != "error" and c.token_ids
        ]
        found = iter(self.reward_model.score_fitting(items) if items else [])
        return [
            [next(found) if c.finish_reason != "error" and c.token_ids else None for c in group.completions]
            for group in groups
        ]

    def judgements(self, groups: Sequence[Group]) -> list[list[Verdict]]:
        """The judge's verdict of each completion, an error where it could not be read; equal texts are judged once.

        Raises:
            EngineError: none of many could be read.
        """
        if self.judge is None or not groups:
            return [[Verdict.error("no judge")] * len(group.completions) for group in groups]
        apart = "{constraint}" in self.judge.template
        asked = {
            (number, c.text): {**_instruction(group.row, apart), "completion": c.text}
            for number, group in enumerate(groups)
            for c in group.completions
            if c.finish_reason != "error"
        }
        found = dict(self.judge.judge_many(asked.items()))
        unread = [verdict for verdict in found.values() if verdict.verdict == "error"]
        if len(unread) == len(found) >= SILENT:
            raise EngineError(
                f"the judge {self.judge.engine.generator} gave no score for any of {len(found)} completions; the last "
                f"time: {unread[-1].detail}. Look at judge_template and at what it answers (`align chat`)"
            )
        lost = Verdict.error("not sampled")
        return [[found.get((n, c.text), lost) for c in group.completions] for n, group in enumerate(groups)]

    def accepted(self, group: Group) -> bool:
        """Whether some completion is believed to be right: by the verifier, else the reward model, else the judge."""
        part = next(part for part in PARTS if part in group.scores)
        whole = [place for place, c in enumerate(group.completions) if c.finish_reason == "stop"]
        if part in group.verdicts:
            return any(group.verdicts[part][place].verdict == "passed" for place in whole)
        rewards = [reward for place in whole if (reward := group.scores[part][place]) is not None]
        return bool(rewards and self.reward_model.accepts(group.family, max(rewards)))

    def pair(self, group: Group, seed: str) -> tuple[list[Pair], str]:
        """The prompt's pairs, and what became of it: `paired`, or why it has none.

        Where the reward model alone scored, its gate is asked about each pair.
        """
        if not group.scores:
            return [], "no_scorer"
        config = self.config
        pairs, counts = make_pairs(
            group.scored, config.pairing, min_margin=config.min_margin, max_pairs=config.max_pairs, seed=seed
        )
        outcome: str = next(reason for reason in counts if not reason.startswith("dropped_"))
        if pairs and list(group.scores) == ["reward_model"]:
            pairs = [pair for pair in pairs if self._believed(group, pair)]
            outcome = outcome if pairs else "abstained"
        return pairs, outcome

    def _believed(self, group: Group, pair: Pair) -> bool:
        """Whether the gate lets a pair through; a penalty that turns two scores around is only heard without a gate."""
        scores = [group.scores["reward_model"][place] for place in (pair.chosen, pair.rejected)]
        believed = self.reward_model.judge_group(group.family, scores)
        return self.reward_model.gates is None or believed == (0, 1)


def _instruction(row: Row, apart: bool) -> dict[str, Any]:
    """A prompt as a judge's template shows it; of one that `constrain` made, query and constraint apart if wanted."""
    *before, last = row["prompt"]
    if not apart or not row.get("constraint"):
        return {"instruction": row["prompt"], "constraint": ""}
    query = {**last, "content": row.get("query") or last["content"]}
    return {"instruction": [*before, query], "constraint": row["constraint"]}


def _unscored(group: Group, part: Part) -> Group:
    """The group with the completions alone that a part has not scored."""
    return replace(group, completions=group.completions[len(group.scores[part]) :])


def judge_of(config: Config, tools: Tools, has_reward_model: bool) -> Judge | None:
    """The engine `judge` as what grades; None where it is not asked.

    Raises:
        RecipeError: it is needed and was not given, or given and would never be asked.
    """
    given = "judge" in tools.engines
    asked = "judge" in config.scored_by and not (config.scorer == "mix" and (has_reward_model or not given))
    if asked and not given:
        raise RecipeError(
            f"scorer is {config.scorer} and there is no engine `judge`; give one (engines: {{judge: …}}, "
            "or judge=MODEL), in one process (processes: 1)"
        )
    if given and not asked:
        who = "the reward model scores what no verifier does" if config.scorer == "mix" else "nothing asks it"
        raise RecipeError(
            f"the engine `judge` has no effect, since scorer is {config.scorer} and {who}; leave it out, "
            "or set scorer to judge or weighted"
        )
    return Judge(tools.engines["judge"], config, tools.seed) if asked else None
