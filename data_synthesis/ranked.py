"""From rankings to rows: reward and rank, which completion is the best and whether it is good enough, what is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from align.core.records import Row, message_text
from data_synthesis.rank_settings import RankConfig
from data_synthesis.rankers import Group, JudgeRanker, Ranker, RewardRanker, judgement_text
from data_synthesis.sampling import last_user_text
from reward.rankings import Agreement, ranks_of, win_rates
from reward.verifiers import Verifiers


def give_ranks(group: Group, config: RankConfig, rankers: Sequence[Ranker]) -> None:
    """Sets reward and rank of a prompt's rows; the verdict of all of them is `failed` until one is found the best."""
    if config.by == "nobody":
        return
    names = [name for ranker in rankers if ranker.kind == config.by for name in ranker.names]
    rates = win_rates(len(group.ids), [group.rankings[name] for name in names if name in group.rankings])
    if len(group.ids) == 1 and (config.by != "people" or group.good):
        rates = [0.5]  # nothing to compare it with: as a tie
    ranks = ranks_of(rates)
    for row, place in zip(group.rows, group.place, strict=True):
        row |= {"rank": None, "reward": None, "score": None, "judgement": None, "kept": False}
        if place is None:
            continue
        row |= {"rank": ranks[place], "reward": rates[place], "judgement": judgement_text(group.judgements[place])}
        scores = [group.scores[name][place] for name in names if name in group.scores]
        known = [score for score in scores if score is not None]
        row["score"] = sum(known) / len(known) if known else None
        if rates[place] is None:
            row |= {"verdict": "error", "detail": f"not ranked: no {config.by.replace('_', ' ')} could tell"}
        else:
            ties = sum(rank == ranks[place] for rank in ranks) - 1
            tied = f", tied with {ties} more" if ties else ""
            row |= {"verdict": "failed", "detail": f"rank {ranks[place]} of {len(group.ids)}{tied}"}


def best_of(group: Group) -> list[tuple[Row, int]]:
    """The rows of highest reward, with their places: of those that ended by themselves, and all that tie."""
    may = [
        (row, place)
        for row, place in zip(group.rows, group.place, strict=True)
        if place is not None and row.get("reward") is not None and row["finish_reason"] in (None, "stop")
    ]
    top = max((row["reward"] for row, _ in may), default=None)
    return [(row, place) for row, place in may if row["reward"] == top]


def pass_the_best(groups: Sequence[Group], config: RankConfig, rankers: Sequence[Ranker], verifiers: Verifiers) -> None:
    """Passes the best completions of each group that meet all criteria."""
    best = [(group, row, place) for group in groups for row, place in best_of(group)]
    found: dict[tuple[int, int], str] = {}  # by group and place: which criterion isn't met
    if "people" in config.must_meet:
        for group, _, place in best:
            if 2 * sum(group.good.values()) <= len(group.good):
                found[id(group), place] = "people found it not good enough"
    for ranker in rankers:
        if isinstance(ranker, RewardRanker) and "reward_model" in config.must_meet:
            ranker.rank([group for group in groups if ranker.name not in group.scores])
            for group, _, place in best:
                if not ranker.accepts(group, place):
                    found.setdefault((id(group), place), "the reward model's gate does not believe it")
    if "judge" in config.must_meet:
        judges = [ranker for ranker in rankers if isinstance(ranker, JudgeRanker)]
        for at, problem in _below_threshold(best, config, judges).items():
            found.setdefault(at, problem)
    if "verifier" in config.must_meet:
        waiting = [(group, row, place) for group, row, place in best if (id(group), place) not in found]
        asked = ((r["task"], message_text(r["completion"]), r["reference"], last_user_text(r)) for _, r, _ in waiting)
        for (group, _, place), verdict in zip(waiting, verifiers.verify_many(asked), strict=True):
            if verdict.verdict != "passed":
                found[id(group), place] = f"the verifier: {verdict.detail or verdict.verdict}"
    for group, row, place in best:
        unmet = found.get((id(group), place))
        row["verdict"] = "failed" if unmet else "passed"
        row["detail"] += f", the best, but {unmet}" if unmet else ", the best"
        row["judgement"] = judgement_text(group.judgements[place])


def _below_threshold(
    best: Sequence[tuple[Group, Row, int]], config: RankConfig, judges: Sequence[JudgeRanker]
) -> dict[tuple[int, int], str]:
    """Which of the best the judges score below the threshold, by the mean of all judges."""
    scale = config.scale
    asked = {(id(group), place): (group, place) for group, _, place in best}
    rewards: dict[tuple[int, int], list[float]] = {at: [] for at in asked}
    for judge in judges:
        for at, (group, place) in asked.items():
            known = group.scores[judge.name][place] if judge.name in group.scores else None
            rewards[at] += [] if known is None else [known]
        for group, place, said in judge.scored([item for item in asked.values() if judge.name not in item[0].scores]):
            rewards[id(group), place] += [] if said.verdict.reward is None else [said.verdict.reward]
    problems = {}
    for at, given in rewards.items():
        mean = scale.lowest + sum(given) / len(given) * (scale.highest - scale.lowest) if given else None
        if mean is None:
            problems[at] = "no judge's score of it could be read"
        elif mean < scale.pass_from:
            problems[at] = f"the judge gives it {mean:.3g} of {scale.highest:g}, {scale.pass_from:g} passes"
    return problems


class Tally:
    """Marks what is kept, and counts what becomes of the completions."""

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
            self.lost["of a prompt that no person ranked"] += len(group.rows)
            return []
        self.agreement.count(group.rankings)
        best = best_of(group)
        self.best += len(best)
        self.tied += len({place for _, place in best}) > 1
        kept: set[int | None] = set()
        for row, place in zip(group.rows, group.place, strict=True):
            row["kept"] = row["verdict"] == "passed" and place not in kept and len(kept) < config.keep
            if row["kept"]:
                kept.add(place)
            else:
                self.lost[_why_lost(row, any(row is each for each, _ in best))] += 1
            self.ranked += row["rank"] is not None
            self.passed += row["verdict"] == "passed"
        self.kept += len(kept)
        return group.rows

    def summary(self, config: RankConfig) -> dict[str, Any]:
        """The figures for the manifest; what is kept and what is lost add up to the completions."""
        steps = {"prompts": self.prompts, "completions": self.completions}
        if config.by == "nobody":
            steps["kept"] = self.completions - self.lost["not sampled"]
        else:
            steps |= {"ranked": self.ranked, "best": self.best, "passed": self.passed, "kept": self.kept}
        lost = {why: count for why, count in self.lost.most_common() if count}
        return {"prompts": self.prompts, "yield": steps, "lost": lost, "tied": self.tied}


def _why_lost(row: Row, best: bool) -> str:
    if row["verdict"] == "error":
        return "not sampled" if row["detail"].startswith("not sampled") else "not ranked"
    if row["verdict"] == "passed":
        return "the best, but as good as one that is kept"
    if best:
        return "the best, but it does not meet the criteria"
    return "cut off" if row["finish_reason"] not in (None, "stop") else "worse than the best"
