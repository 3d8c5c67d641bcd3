"""Stage `rank`: responses ranked, the best kept if it is good enough (the Qwen2 report, arXiv:2407.10671, 4.1.1).

The report: several responses from diverse generation strategies and models of different sizes are ranked, the best must
meet set criteria, and the ranking yields demonstrations and preferences.

    for each prompt:
        sample completions from every engine at every temperature (or take those that are there)
        compare every two of them, in both orders (a judge); or score each (a reward model); or ask a person
        reward: the share of its comparisons that a completion won, a tie counting half
        the best one that ended by itself passes if it meets the criteria; all others fail

Rankers beside the one that decides (`also`) only say how far they agree with it. People rank completions that exist
already, on a page of this machine or in another tool; by=people, annotations=[FILE.jsonl] reads what they said:

    align rank --serve completions=FOLDER out=FILE.jsonl [annotator=NAME] [port=0] [prompts=1000] [browser=true]
    align rank --export TOOL completions=FOLDER out=FILE.json [question=rating] [annotations=[FILE.jsonl]]
    align rank --import TOOL source=FILE.json completions=FOLDER out=FILE.jsonl [annotators={ID: NAME}]

TOOL is argilla or label-studio.

Differs from the report: it gives no procedure; comparing in both orders is MT-Bench's (arXiv:2306.05685), the score is
Copeland's, the criterion is a judge's score of the best, the gate of the reward model, or the person's own word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from align.core.errors import DataError
from align.core.groups import by_prompt
from align.core.records import Kind, Row
from align.core.stage import Asks, Need, Result, Stage, Tools
from align.core.store import ModelRef, Table
from data_synthesis.rank_settings import RankConfig
from data_synthesis.ranked import Tally, give_ranks, pass_the_best
from data_synthesis.rankers import Group, JudgeRanker, People, Ranker, RewardRanker, judge_names, judge_seed
from data_synthesis.sampling import ErrorBudget, sampled, wanted
from reward.verifiers import Verifiers

BLOCK = 256
"""Prompts that are sampled, ranked and checked together."""


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
    tally = Tally(rankers)
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
                give_ranks(group, config, rankers)
            pass_the_best(block, config, rankers, verifiers)
            for group in block:
                yield from tally.count(group, config)
                tools.progress.advance(len(group.rows) if "completions" in inputs else 1, kept=tally.kept)
            summary.update(tally.summary(config), skipped=dict(skipped))
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


def _rankers(config: RankConfig, inputs: Mapping[str, Table | ModelRef], table: Table, tools: Tools) -> list[Ranker]:
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
        from reward.members import load_judge  # torch is loaded for this alone

        ref = inputs["reward_model"]
        assert isinstance(ref, ModelRef)
        found.append(RewardRanker(load_judge(ref, Speed.of(tools.speed).device), ref.name))
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
            for number, temperature in enumerate(config.temperatures):
                params = config.params(tools.seed, temperature)
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


def asks(config: RankConfig) -> dict[str, Asks]:
    """Every sample of one engine; every comparison or score of as many completions, and the score of the best."""
    samples = config.samples * len(config.temperatures)
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
    made_later=("annotations",),
    asks=asks,
    adds=("finish_reason", "rank", "score", "judgement", "kept"),
)
