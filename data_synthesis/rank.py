"""Stage `rank`: several responses ranked, the best kept where it is good enough (the Qwen2 report, arXiv:2407.10671, 4.1.1).

The report: several responses from diverse generation strategies and models of different sizes are ranked, the best must
meet set criteria, and the ranking yields demonstrations and preferences.

    for each prompt:
        sample completions from every engine at every temperature (or take those that are there)
        compare every two of them, in both orders (a judge); or score each (a reward model); or ask a person
        reward: the share of its comparisons that a completion won, a tie counting half
        the best one that ended by itself passes if it meets the criteria; all others fail

People rank in `align rank --serve`, a page on this machine, or in another tool (`align rank --import`). Rankers beside
the one that decides (`also`) only say how far they agree with it.

Differs from the report: it gives no procedure; comparing in both orders is MT-Bench's (arXiv:2306.05685), the score is
Copeland's, the criterion is a judge's score of the best, the gate of the reward model, or the person's own word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from align.core.errors import DataError
from align.core.groups import by_prompt
from align.core.records import Kind, Row, message_text
from align.core.stage import Asks, Need, Result, Stage, Tools
from align.core.store import ModelRef, Table
from data_synthesis.rankers import (
    Group,
    JudgeRanker,
    People,
    Ranker,
    RewardRanker,
    judge_names,
    judge_seed,
    judgement_text,
)
from data_synthesis.sampling import ErrorBudget, SamplingConfig, last_user_text, sampled, wanted
from reward.judged import JudgedConfig
from reward.rankings import Agreement, ranks_of, win_rates
from reward.verifiers import Verifiers

BLOCK = 256
"""Prompts that are sampled, ranked and checked together."""

By = Literal["judge", "reward_model", "people"]
Criterion = Literal["judge", "reward_model", "people", "verifier"]


class RankConfig(SamplingConfig, JudgedConfig):
    """Settings of `rank`."""

    by: Literal["judge", "reward_model", "people", "nobody"] = Field(
        "judge", description="who ranks; nobody only samples, so that people can rank what was sampled"
    )
    also: list[By] = Field([], description="who ranks besides, to see how far they agree; they decide nothing")
    judging: Literal["pairs", "scores"] = Field(
        "pairs", description="what a judge is asked: which of two is better, for every two in both orders, n(n-1) "
        "questions of n completions; or the score of each, n questions, coarser",
    )  # fmt: skip
    criteria: list[Criterion] | None = Field(
        None, description="what the best must meet to pass: judge (its score is at least judge_threshold), verifier (of "
        "the prompt's task), reward_model (its gate), people (most found the best good enough); by default that of `by`",
    )  # fmt: skip
    annotations: list[str] = Field(
        [], description="files in which people ranked the completions, made by `align rank --serve` or `--import`"
    )
    samples: int = Field(2, ge=1, description="completions of each engine at each temperature")
    temperatures: list[float] = Field(
        [0.7, 1.0], description="temperatures that every engine samples at; where none is given, `temperature` alone"
    )
    keep: int = Field(1, ge=1, description="most completions of a prompt that are kept, where several are the best")

    @model_validator(mode="after")
    def _rankers_make_sense(self) -> Self:
        if self.by in self.also:
            raise ValueError(f"also names {self.by}, which is `by` already; leave it out there")
        if self.by == "nobody" and (self.also or self.criteria):
            raise ValueError("by=nobody ranks nothing; leave out also and criteria")
        if self.annotations and "people" not in (self.by, *self.also):
            raise ValueError("annotations are given and nobody reads them; set by=people, or also=[people]")
        if "people" in (self.criteria or []) and "people" not in (self.by, *self.also):
            raise ValueError("criteria=[people] needs people who rank; set by=people, or also=[people]")
        if any(not 0 <= temperature <= 5 for temperature in self.temperatures):
            raise ValueError(f"temperatures are from 0 to 5, found {self.temperatures}")
        return self

    @property
    def must_meet(self) -> list[Criterion]:
        """What the best must meet."""
        if self.criteria is not None:
            return list(self.criteria)
        return [] if self.by == "nobody" else [self.by]


def run(config: RankConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives the completions with rank, reward and verdict; `kept` marks the best of each prompt, where it passed."""
    _check(config, inputs, tools)
    summary: dict[str, Any] = {"by": config.by}
    return Result(_rows(config, inputs, tools, summary), summary)


def _rows(
    config: RankConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools, summary: dict[str, Any]
) -> Iterator[Row]:
    table = inputs["completions"] if "completions" in inputs else inputs["prompts"]
    assert isinstance(table, Table)
    skipped: Counter[str] = Counter()
    budget = ErrorBudget("rank", config.max_error_share)
    rankers = _rankers(config, inputs, table, tools)
    tally = _Tally(rankers)
    tools.progress.start(len(table), "prompts" if "prompts" in inputs else "completions")
    with Verifiers(config.sandbox, tools.progress.say) as verifiers:
        if "completions" in inputs:
            groups = _given(config, table, tools, skipped)
        else:
            groups = _sampled(config, table, tools, budget, skipped)
        while block := list(islice(groups, BLOCK)):
            for ranker in rankers:
                if ranker.kind in (config.by, *config.also):
                    ranker.rank(block)
            for group in block:
                _score(group, config, rankers)
            _judge_best(block, config, rankers, verifiers)
            for group in block:
                kept = tally.count(group, config)
                yield from kept
                tools.progress.advance(len(group.rows) if "completions" in inputs else 1, kept=tally.kept)
            summary.update(tally.summary(), skipped=dict(skipped))
    budget.check()
    if not tally.prompts:
        reasons = ", ".join(f"{why}: {count}" for why, count in skipped.most_common()) or "the table is empty"
        raise DataError(f"rank: {table.name} has no prompt to rank ({reasons}); the setting `splits` names which")
    summary["rankers"] = {_name(ranker): ranker.figures() for ranker in rankers}
    if agreement := tally.agreement.summary():
        summary["agreement"] = agreement
        for kinds, found in agreement.items():
            tools.progress.say(f"{kinds}: kappa {found['kappa']} over {found['n']} pairs")


def _check(config: RankConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> None:
    """Checks that what the settings ask for is there.

    Raises:
        DataError: an input or an engine is missing, or one too many is given.
    """
    who = {config.by, *config.also}
    if ("prompts" in inputs) == ("completions" in inputs):
        raise DataError("rank: give either prompts, to sample completions of, or completions that exist already")
    if "prompts" in inputs and "people" in who:
        raise DataError(
            "rank: people rank completions that exist already; sample them in a step of its own (stage rank with "
            "by=nobody, or any other) and give them as completions"
        )
    needs = {
        "sampler": ("prompts" in inputs, "an engine samples completions of prompts"),
        "judge": ("judge" in (*who, *config.must_meet), "a judge ranks, or says whether the best is good enough"),
    }
    for role, (needed, why) in needs.items():
        if needed and role not in tools.engines:
            raise DataError(f"rank: {why}, and no engine is given in the role {role}; give one, as in {role}=MODEL")
    if "reward_model" in (*who, *config.must_meet) and "reward_model" not in inputs:
        raise DataError("rank: a reward model ranks or is a criterion, and no reward_model is given; give its folder")


def _rankers(
    config: RankConfig, inputs: Mapping[str, Table | ModelRef], table: Table, tools: Tools
) -> list[Ranker]:
    """All that rank or that are asked about the best."""
    wanted_kinds = {config.by, *config.also, *config.must_meet}
    found: list[Ranker] = []
    if "judge" in wanted_kinds:
        engines = tools.all_of("judge")
        for number, (engine, name) in enumerate(zip(engines, judge_names(engines), strict=True)):
            seed = judge_seed(tools.seed, number)
            found.append(JudgeRanker(engine, name, config, config.judging == "pairs", seed, config.max_error_share))
    if "reward_model" in wanted_kinds:
        from align.train.settings import Speed

        ref = inputs["reward_model"]
        assert isinstance(ref, ModelRef)
        found.append(RewardRanker(ref, Speed.of(tools.speed).device))
    if "people" in wanted_kinds:
        found.append(People(config.annotations, table))
    return found


def _name(ranker: Ranker) -> str:
    return "people" if ranker.kind == "people" else next(iter(ranker.names))


# --- where completions come from --------------------------------------------------------------------------------------


def _sampled(
    config: RankConfig, table: Table, tools: Tools, budget: ErrorBudget, skipped: Counter[str]
) -> Iterator[Group]:
    """Yields the groups of prompts: `samples` completions of every engine at every temperature.

    One engine after the other, a block of prompts at a time, so that no two sample at once. Each temperature has sample
    indices, and so random numbers, of its own.
    """
    rows = wanted(table.rows(), config.splits, skipped, verified="verifier" in config.must_meet)
    while block := list(islice(rows, BLOCK)):
        groups: list[list[Row]] = [[] for _ in block]
        for engine in tools.all_of("sampler"):
            for number, temperature in enumerate(config.temperatures or [config.temperature]):
                params = replace(config.params(tools.seed), temperature=temperature)
                answers = sampled(block, engine, config.samples, params, number * config.samples)
                for group, (row, completions) in zip(groups, answers, strict=True):
                    for completion in completions:
                        failed = completion.finish_reason == "error"
                        budget.count(failed, completion.error)
                        group.append(
                            {
                                **row,
                                "sample_index": len(group),
                                "completion": [{"role": "assistant", "content": completion.text}],
                                "reward": None,
                                "verdict": "error" if failed else None,
                                "detail": f"not sampled: {completion.error}" if failed else "",
                                "generator": engine.generator,
                                "finish_reason": completion.finish_reason,
                                "temperature": temperature,
                            }
                        )
        yield from map(Group.of, groups)


def _given(config: RankConfig, table: Table, tools: Tools, skipped: Counter[str]) -> Iterator[Group]:
    """Yields the groups of completions that exist already; what was known of them is kept beside the ranking."""
    for rows in by_prompt(table, tools.work):
        if rows[0]["split"] not in config.splits:
            skipped[f"split {rows[0]['split']}"] += 1
            continue
        for row in rows:
            row.setdefault("finish_reason", None)
            row |= {"verdict_before": row["verdict"], "reward_before": row["reward"]}
        yield Group.of(rows)


# --- ranks, and whether the best is good enough -----------------------------------------------------------------------


def _score(group: Group, config: RankConfig, rankers: Sequence[Ranker]) -> None:
    """Sets reward, rank and, for all but the best, the verdict of a prompt's rows."""
    if config.by == "nobody":
        return
    names = [name for ranker in rankers if ranker.kind == config.by for name in ranker.names]
    rates = win_rates(len(group.ids), [group.rankings[name] for name in names if name in group.rankings])
    if len(group.ids) == 1 and (config.by != "people" or group.good):
        rates = [0.5]  # nothing to compare it with: as a tie
    ranks = ranks_of(rates)
    for row, place in zip(group.rows, group.place, strict=True):
        own = [group.scores[name][place] for name in names if name in group.scores] if place is not None else []
        known = [each for each in own if each is not None]
        row["score"] = sum(known) / len(known) if known else None
        row["rank"] = row["reward"] = row["judgement"] = None
        row["kept"] = False
        if place is None:
            continue
        row["rank"], row["reward"] = ranks[place], rates[place]
        row["judgement"] = judgement_text(group.judgements[place])
        if rates[place] is None:
            row |= {"verdict": "error", "detail": f"no {config.by.replace('_', ' ')} ranked it"}
        else:
            ties = sum(rank == ranks[place] for rank in ranks) - 1
            tied = f", with {ties} others" if ties else ""
            row |= {"verdict": "failed", "detail": f"rank {ranks[place]} of {len(group.ids)}{tied}"}


def _best(group: Group) -> list[Row]:
    """The rows of highest reward among those that may be the best: a completion that was cut off may not."""
    may = [row for row in group.rows if row.get("rank") is not None and row["finish_reason"] in (None, "stop")]
    top = max((row["reward"] for row in may), default=None)
    return [row for row in may if row["reward"] == top]


def _judge_best(
    groups: Sequence[Group], config: RankConfig, rankers: Sequence[Ranker], verifiers: Verifiers
) -> None:
    """Sets the verdict of the best rows: passed where they meet all criteria."""
    best = {id(row): (group, row) for group in groups for row in _best(group)}
    problems: dict[int, str] = {}
    judges = [ranker for ranker in rankers if isinstance(ranker, JudgeRanker)]
    if "judge" in config.must_meet:
        problems |= _below_threshold(best, config, judges)
    for key, (group, row) in best.items():
        place = group.place[next(i for i, each in enumerate(group.rows) if each is row)]
        assert place is not None
        for ranker in rankers:
            if isinstance(ranker, RewardRanker) and "reward_model" in config.must_meet:
                if ranker.name not in group.scores:
                    ranker.rank([group])
                if not ranker.accepts(group, place):
                    problems.setdefault(key, "the reward model's gate does not believe it")
        if "people" in config.must_meet and 2 * sum(group.good.values()) <= len(group.good):
            problems.setdefault(key, "people found it not good enough")
    if "verifier" in config.must_meet:
        waiting = [(key, row) for key, (_, row) in best.items() if key not in problems]
        asked = ((r["task"], message_text(r["completion"]), r["reference"], last_user_text(r)) for _, r in waiting)
        for (key, _), verdict in zip(waiting, verifiers.verify_many(asked), strict=True):
            if verdict.verdict != "passed":
                problems[key] = f"the verifier: {verdict.detail or verdict.verdict}"
    for key, (_, row) in best.items():
        passed = key not in problems
        row["verdict"] = "passed" if passed else "failed"
        row["detail"] += "; the best" if passed else f"; the best, but {problems[key]}"


def _below_threshold(
    best: Mapping[int, tuple[Group, Row]], config: RankConfig, judges: Sequence[JudgeRanker]
) -> dict[int, str]:
    """Which of the best the judges score below the threshold (the mean of the judges), and what they say."""
    threshold, scale = config.judge_threshold, config.scale
    asked: dict[tuple[int, int], tuple[Group, int]] = {}
    where: dict[int, tuple[int, int]] = {}
    for key, (group, row) in best.items():
        place = next(p for p, each in zip(group.place, group.rows, strict=True) if each is row)
        assert place is not None
        where[key] = (id(group), place)
        asked[where[key]] = (group, place)
    found: dict[tuple[int, int], list[float]] = {each: [] for each in asked}
    for judge in judges:
        new = [item for item in asked.values() if judge.name not in item[0].scores]
        for group, place, said in judge.scored(new):
            if said.verdict.reward is not None:
                found[id(group), place].append(said.verdict.reward)
        for at, (group, place) in asked.items():
            known = group.scores[judge.name][place] if judge.name in group.scores else None
            if known is not None:
                found[at].append(known)
    problems = {}
    for key, at in where.items():
        rewards = found[at]
        mean = scale.lowest + (sum(rewards) / len(rewards)) * (scale.highest - scale.lowest) if rewards else None
        if mean is None:
            problems[key] = "no judge's score of it could be read"
        elif mean < threshold:
            problems[key] = f"the judge gives it {mean:.3g} of {scale.highest:g}, {threshold:g} passes"
        group, place = asked[at]
        best[key][1]["judgement"] = judgement_text(group.judgements[place])
    return problems


# --- counting ---------------------------------------------------------------------------------------------------------


class _Tally:
    """Marks what is kept, and counts where completions are lost."""

    def __init__(self, rankers: Iterable[Ranker]) -> None:
        self.agreement = Agreement({name: kind for ranker in rankers for name, kind in ranker.names.items()})
        self.prompts = self.completions = self.ranked = self.best = self.passed = self.kept = self.tied = 0
        self.lost: Counter[str] = Counter()

    def count(self, group: Group, config: RankConfig) -> list[Row]:
        """Takes a group in and gives the rows that stay: all, but none of a prompt that no person has ranked."""
        self.prompts += 1
        self.completions += len(group.rows)
        if config.by == "nobody":
            self.lost["not sampled"] += sum(row["verdict"] == "error" for row in group.rows)
            return group.rows
        if config.by == "people" and not group.good:
            self.lost["of prompts that no person ranked"] += len(group.rows)
            return []
        self.agreement.count(group.rankings)
        best = {id(row) for row in _best(group)}
        self.tied += len({group.place[i] for i, row in enumerate(group.rows) if id(row) in best}) > 1
        kept: set[int | None] = set()
        for place, row in zip(group.place, group.rows, strict=True):
            row["kept"] = row["verdict"] == "passed" and place not in kept and len(kept) < config.keep
            if row["kept"]:
                kept.add(place)
            self.ranked += row["rank"] is not None
            self.best += id(row) in best
            self.passed += row["verdict"] == "passed"
            self.kept += row["kept"]
            if not row["kept"]:
                self.lost[_why(place, row, id(row) in best)] += 1
        return group.rows

    def summary(self) -> dict[str, Any]:
        """The figures for the manifest; what is lost and what is kept add up to the completions."""
        steps = {"completions": self.completions, "ranked": self.ranked, "best": self.best, "passed": self.passed}
        return {
            "prompts": self.prompts,
            "yield": {"prompts": self.prompts, **steps, "kept": self.kept},
            "lost": {why: count for why, count in self.lost.items() if count},
            "tied": self.tied,
        }


def _why(place: int | None, row: Row, best: bool) -> str:
    if place is None:
        return "not sampled"
    if row["rank"] is None:
        return "not ranked"
    if row["verdict"] == "passed":
        return "the best as well, beyond keep"
    if best:
        return "the best, but it does not meet the criteria"
    return "cut off" if row["finish_reason"] not in (None, "stop") else "worse than the best"


def asks(config: RankConfig) -> dict[str, Asks]:
    """Every sample of one engine; every comparison or score of as many completions, and the score of the best."""
    samples = config.samples * max(1, len(config.temperatures))
    ranks = "judge" in (config.by, *config.also)
    questions = samples * (samples - 1) if config.judging == "pairs" else samples
    questions = questions * ranks + ("judge" in config.must_meet and not (ranks and config.judging == "scores"))
    return {
        "sampler": Asks(samples, config.max_tokens),
        "judge": Asks(questions * config.judge_votes, config.judge_max_tokens),
    }


STAGE = Stage(
    name="rank",
    summary="completions of several models ranked by a judge, a reward model or people; the best kept",
    config=RankConfig,
    needs={
        "prompts": Need(Kind.PROMPTS, "prompts, to sample completions of", optional=True),
        "completions": Need(Kind.COMPLETIONS, "completions that exist already, in the place of prompts", optional=True),
        "reward_model": Need(Kind.REWARD_MODEL, "ranks, or says whether the best is good enough", optional=True),
    },
    gives=Kind.COMPLETIONS,
    run=run,
    engines={
        "sampler": "the model that answers, or a list of several",
        "judge": "the model that ranks, or a list of several",
    },
    optional_engines=("sampler", "judge"),
    several=("sampler", "judge"),
    reads=("judge_template", "compare_template", "annotations"),
    asks=asks,
    adds=("finish_reason", "rank", "score", "judgement", "kept"),
)
