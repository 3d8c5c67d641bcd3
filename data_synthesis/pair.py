"""Stage `pair`: scored completions to preferences, the report's P (arXiv:2407.10671, 4.1).

The rules of pairing are in `reward/pairs.py`, which online DPO uses too. Human rankings enter the same way, as
completions with rewards and no verdict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from align.core.errors import DataError
from align.core.groups import by_prompt
from align.core.records import Kind, Row, Split, message_text
from align.core.stage import Need, Result, Stage, StageConfig, Tools
from align.core.store import ModelRef, Table
from reward.pairs import Scored, Strategy, make_pairs

CARRIED = ("source", "task", "family", "tags")


class PairConfig(StageConfig):
    """Settings of `pair`."""

    strategy: Strategy = Field(
        "max_min", description="max_min: a prompt's best against its worst (the Qwen2 report, 4.3); max_random: its "
        "best against one drawn of the others (Zephyr, arXiv:2310.16944); all: passed with failed ones side by side, "
        "the shorter list cycled (IRPO, arXiv:2404.19733), or, where no verifier spoke, any two with a margin; random: "
        "one pair drawn, a control",
    )  # fmt: skip
    min_margin: float = Field(
        0.0, ge=0, description="least difference of the rewards; ties are dropped always, whatever this is"
    )
    missing_end_penalty: float = Field(
        0.0, ge=0, description="taken off the reward of a completion that was cut off, so that it is the rejected one"
    )
    max_pairs: int = Field(10, ge=1, description="most pairs of one prompt under strategy=all; 10 is IRPO's K")
    chosen_passes: bool = Field(
        True, description="never choose a completion that a verifier failed, however well graded"
    )
    max_rejected: float | None = Field(
        None, description="never reject a completion of a higher reward; 0 is AutoIF's (arXiv:2406.13542): no function "
        "accepts it. None: no limit",
    )  # fmt: skip
    max_broken_share: float = Field(
        0.2, ge=0, le=1, description="largest share of pairs whose rejected code does not run at all, for those "
        "are easy; kept from the first pair on [our choice]",
    )  # fmt: skip
    answers: bool = Field(
        False, description="where no completion of a prompt may be chosen, its gold answer (the column `answer`) is, "
        "with reward 1 and verdict passed",
    )  # fmt: skip
    splits: list[Split] = Field(["train"], min_length=1, description="pairs are made of prompts of these splits")


def run(config: PairConfig, inputs: Mapping[str, Table | ModelRef], tools: Tools) -> Result:
    """Gives the pairs of each prompt; the summary says what became of every prompt (the yield)."""
    table = inputs["completions"]
    assert isinstance(table, Table)
    if config.answers and "answer" not in table.columns:
        raise DataError(
            f"pair: answers=true needs a column `answer` in {table.name}; it has {', '.join(table.columns)}"
        )
    summary: dict[str, Any] = {}
    return Result(_rows(config, table, tools, summary), summary)


def _rows(config: PairConfig, table: Table, tools: Tools, summary: dict[str, Any]) -> Iterator[Row]:
    counts: Counter[str] = Counter()
    families: Counter[str] = Counter()
    prompts = pairs_given = broken = 0
    margins = 0.0
    tools.progress.start(len(table), "completions")
    for rows in by_prompt(table, tools.work):
        prompts += 1
        if rows[0]["split"] not in config.splits:
            counts[f"split_{rows[0]['split']}"] += 1
        else:
            rows = _with_answer(rows) if config.answers else rows
            pairs, of_prompt = make_pairs(
                [scored(row, config.max_rejected, config.missing_end_penalty) for row in rows],
                config.strategy,
                min_margin=config.min_margin,
                max_pairs=config.max_pairs,
                chosen_passes=config.chosen_passes,
                seed=f"{tools.seed}/{rows[0]['prompt_id']}",
            )
            counts.update(of_prompt)
            before = pairs_given
            for pair in pairs:
                if rows[pair.rejected].get("runs") is False:
                    if broken + 1 > config.max_broken_share * (pairs_given + 1):
                        counts["rejected_does_not_run"] += 1
                        continue
                    broken += 1
                pairs_given += 1
                margins += pair.margin
                families[str(rows[0]["family"])] += 1
                yield _preference(rows[pair.chosen], rows[pair.rejected], pair.margin)
            if pairs and pairs_given == before:
                counts["paired"] -= 1
        tools.progress.advance(len(rows), pairs=pairs_given)
        summary.update(
            prompts=prompts, pairs=pairs_given, by_family=dict(sorted(families.items())), outcome=dict(counts),
            mean_margin=round(margins / pairs_given, 4) if pairs_given else None,
            **{"yield": {"prompts": prompts, "prompts with a pair": counts["paired"], "pairs": pairs_given}},
            lost={_lost(why): count for why, count in counts.most_common() if why != "paired" and count},
        )  # fmt: skip
    if not pairs_given:
        raise DataError(
            f"pair: no pair came of the {prompts} prompts of {table.name} "
            f"({', '.join(f'{why}: {count}' for why, count in counts.most_common()) or 'the table is empty'}); sample "
            "more completions or at a higher temperature, lower min_margin, or let gold answers win (answers=true)"
        )


def scored(row: Row, max_rejected: float | None = None, missing_end_penalty: float = 0.0) -> Scored:
    """A COMPLETIONS row as pairing sees it.

    A right answer that its stage doesn't keep (by a false equation, or a path that another one has) isn't chosen.
    """
    cut_off = row.get("finish_reason") == "length"
    return Scored(
        text=message_text(row["completion"]),
        reward=row["reward"],
        verdict=row["verdict"],
        truncated=row.get("finish_reason") in ("length", "error"),
        choosable=row["verdict"] != "passed" or row.get("kept") is not False,
        runs=row.get("runs") is not False,
        rejectable=max_rejected is None or (row["reward"] is not None and row["reward"] <= max_rejected),
        penalty=missing_end_penalty if cut_off else 0.0,
    )


def _with_answer(rows: list[Row]) -> list[Row]:
    """The rows, and the prompt's gold answer as one more if none of them may be chosen."""
    answer = rows[0]["answer"]
    ones = [scored(row) for row in rows]
    if answer is None or any(one.verdict == "passed" and one.choosable and not one.truncated for one in ones):
        return rows
    messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    gold = {
        **rows[0], "completion": messages, "reward": 1.0, "verdict": "passed", "generator": "answer",
        "sample_index": None, "finish_reason": "stop", "kept": True, "runs": True,
    }  # fmt: skip
    return [*rows, gold]


def _preference(chosen: Row, rejected: Row, margin: float) -> Row:
    return {
        "prompt_id": chosen["prompt_id"],
        "prompt": chosen["prompt"],
        "split": chosen["split"],
        "chosen": chosen["completion"],
        "rejected": rejected["completion"],
        "margin": margin,
        "chosen_reward": chosen["reward"],
        "rejected_reward": rejected["reward"],
        "generator": chosen["generator"],
        "rejected_generator": rejected["generator"],
        "chosen_index": chosen["sample_index"],
        "rejected_index": rejected["sample_index"],
        **{column: chosen[column] for column in CARRIED if column in chosen},
    }


_LOST = {
    "too_few": "prompt with fewer than two usable completions",
    "tie": "prompt whose completions are equally good",
    "below_margin": "prompt whose margins are below min_margin",
    "none_chosen": "prompt without a completion that may be chosen",
    "none_rejected": "prompt with no completion that may be rejected",
    "one_sided": "prompt with only winners or only losers",
    "at_odds": "prompt whose failed completion has the higher reward",
    "dropped_error": "completion without a verdict",
    "dropped_identical": "completion with the text of another",
    "rejected_does_not_run": "pair whose rejected program does not run, past max_broken_share",
}
"""What became of prompts and completions (`reward.pairs.make_pairs`), in the words of the card."""


def _lost(why: str) -> str:
    return _LOST.get(why, why.replace("split_", "prompt of the split "))


STAGE = Stage(
    name="pair",
    summary="preferences for DPO and the reward model from scored completions",
    config=PairConfig,
    needs={"completions": Need(Kind.COMPLETIONS, "scored completions, several of each prompt")},
    gives=Kind.PREFERENCES,
    run=run,
    version=2,
    adds=(
        "chosen_reward", "rejected_reward", "generator", "rejected_generator", "chosen_index", "rejected_index",
        "source", "task", "family",
    ),
)  # fmt: skip
