"""Scoring whole datasets and measuring on them: `score` and `reward-bench`, with a judge whose rewards are known."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import reward.members
import reward.scoring
from align.core.errors import DataError, RunError
from align.core.records import COLUMNS, Kind, Row, message_text
from align.core.stage import Stage, Tools
from align.core.store import ModelRef
from reward import bench, score
from reward.bench import SECTIONS, section_score, sections_of
from reward.tallies import share, weighted
from tests.train.steps import Silent, table


class Lengths:
    """A judge that likes long texts: a point a character. It reads 50 characters at most."""

    name = "lengths"
    gates = None

    def __init__(self) -> None:
        self.texts: list[str] = []

    def score_fitting(self, items: Sequence[Any]) -> list[float | None]:
        texts = [message_text(completion) for _, completion in items]
        self.texts += texts
        return [float(len(text)) if len(text) <= 50 else None for text in texts]


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Lengths:
    found = Lengths()
    monkeypatch.setattr(reward.members, "load_judge", lambda *_: found)
    return found


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def row(kind: Kind, prompt: str, **more: Any) -> Row:
    empty: Row = dict.fromkeys(COLUMNS[kind])
    return empty | {"prompt_id": prompt, "prompt": [{"role": "user", "content": prompt}], "split": "test"} | more


def sample(prompt: str, text: str, verdict: str, **more: Any) -> Row:
    of = {"completion": said(text), "verdict": verdict, "family": "f", "finish_reason": "stop"}
    return row(Kind.COMPLETIONS, prompt, **of, **more)


def pair(prompt: str, chosen: str, rejected: str, **more: Any) -> Row:
    return row(Kind.PREFERENCES, prompt, chosen=said(chosen), rejected=said(rejected), **more)


def give(
    stage: Stage, folder: Path, rows: list[Row], progress: Silent | None = None, **settings: Any
) -> tuple[list[Row], dict[str, Any]]:
    """Runs a stage to its last row."""
    (folder / "work").mkdir(parents=True, exist_ok=True)
    tools = Tools(seed=0, engines={}, progress=progress or Silent(), work=folder / "work", out=folder)
    data = "completions" if stage is score.STAGE else "preferences"
    inputs = {
        "reward_model": ModelRef("rm", Kind.REWARD_MODEL, "rm", "1"),
        data: table(folder / "rows.parquet", rows),
    }
    result = stage.run(stage.config(**settings), inputs, tools)
    assert result.rows is not None
    found = list(result.rows)
    assert json.dumps(result.summary)
    return found, result.summary


def test_completions_get_a_reward_and_the_summary_says_what_it_is_worth(judge: Lengths, tmp_path: Path) -> None:
    """Rewards 3 and 1 of p, 2 and 4 of q: the favourite is right of p only. What is too long or empty has none."""
    rows = [
        sample("p", "yes", "passed"), sample("p", "n", "failed"), sample("q", "no", "passed"),
        sample("q", "wild", "failed"), sample("q", "x" * 51, "passed"), sample("q", "", "failed") | {"completion": []},
    ]  # fmt: skip
    found, summary = give(score.STAGE, tmp_path, rows)
    assert [one["reward"] for one in found] == [3.0, 1.0, 2.0, 4.0, None, None]
    assert summary["without_reward"] == {"too_long": 1, "empty": 1}
    assert summary["rewards"]["f"]["mean"] == 2.5
    assert (summary["scored"], summary["overall"]["best_of_n"], summary["overall"]["groups"]) == (4, 0.5, 2)


def test_both_sides_of_preferences_get_a_reward_and_their_margin(judge: Lengths, tmp_path: Path) -> None:
    rows = [pair("p", "yes", "n", margin=9.0), pair("q", "no", "wild", margin=9.0), pair("r", "x" * 51, "y")]
    found, summary = give(score.STAGE, tmp_path, rows)
    assert [(one["chosen_reward"], one["rejected_reward"], one["margin"]) for one in found] == [
        (3.0, 1.0, 2.0), (2.0, 4.0, -2.0), (None, 1.0, None),
    ]  # fmt: skip
    assert (summary["overall"]["pairs"], summary["overall"]["pair_accuracy"]) == (2, 0.5)
    kept, _ = give(score.STAGE, tmp_path / "kept", rows, column="rm")
    assert (kept[0]["chosen_rm"], kept[0]["rm_margin"], kept[0]["margin"]) == (3.0, 2.0, 9.0)


def test_a_column_of_ours_and_rows_without_any_reward_are_refused(judge: Lengths, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="none of ours"):
        score.Config(column="verdict")
    with pytest.raises(RunError, match="no reward at all: 1 too long"):
        give(score.STAGE, tmp_path, [sample("p", "x" * 51, "passed")])


def test_a_killed_step_scores_nothing_twice(judge: Lengths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 2; a process of its own is killed when its 4th row is counted: two chunks are on the disk."""
    monkeypatch.setattr(reward.scoring, "CHUNK", 2)
    rows = [sample(f"p{i}", "x" * (i + 1), "passed") for i in range(7)]
    child = os.fork()
    if not child:
        give(score.STAGE, tmp_path, rows, Silent(kill_at=4))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    found, summary = give(score.STAGE, tmp_path, rows)
    assert [one["reward"] for one in found] == [1, 2, 3, 4, 5, 6, 7]
    assert judge.texts == ["x" * 5, "x" * 6, "x" * 7], "the others were read back"
    assert summary["scored"] == 7


def test_pairs_are_passed_where_the_chosen_one_scores_higher_and_ties_are_not(judge: Lengths, tmp_path: Path) -> None:
    """Of subset a 1 of 3 (a win, a tie, a loss), of b 1 of 2 (a win, one too long to be read)."""
    rows = [
        pair("p", "yes", "n", subset="a"), pair("p", "yes", "sea", subset="a"), pair("q", "no", "wild", subset="a"),
        pair("r", "yes", "n", subset="b"), pair("s", "x" * 51, "y", subset="b"),
    ]  # fmt: skip
    found, summary = give(bench.STAGE, tmp_path, rows)
    assert [(one["verdict"], one["sample_index"], one["reward_margin"]) for one in found] == [
        ("passed", 0, 2.0), ("failed", 1, 0.0), ("failed", 0, -2.0), ("passed", 0, 2.0), ("error", 0, None),
    ]  # fmt: skip
    scores = summary["scores"]["pairs"]
    assert (scores["overall"]["score"], scores["overall"]["n"], scores["ties"], scores["errors"]) == (40.0, 5, 1, 1)
    assert {name: one["score"] for name, one in scores["by_family"].items()} == {"a": 33.33, "b": 50.0}
    assert scores["overall"]["low"] == share(2, 5)["low"]
    assert summary["by_family"]["a"]["length"]["longer_right"] == {"pairs": 1, "accuracy": 1.0}
    assert summary["by_family"]["a"]["length"]["shorter_right"] == {"pairs": 1, "accuracy": 0.0}


def test_two_reward_models_are_compared_pair_by_pair(judge: Lengths, tmp_path: Path) -> None:
    """The second is right about the first two of three pairs, the first about the last two."""
    from align.evaluate.scores import compare

    rows = [pair("p", "n", "yes"), pair("p", "yes", "n"), pair("q", "wild", "no")]
    first, _ = give(bench.STAGE, tmp_path / "a", rows)
    second = [{**one, "verdict": verdict} for one, verdict in zip(first, ["passed", "passed", "failed"], strict=True)]
    found = compare(table(tmp_path / "1.parquet", first), table(tmp_path / "2.parquet", second))["pairs"]
    assert (found["n"], found["a"], found["b"], found["z"]) == (3, pytest.approx(200 / 3), pytest.approx(200 / 3), 0.0)


def test_labelled_completions_are_passed_where_the_favourite_is_right(judge: Lengths, tmp_path: Path) -> None:
    """p is; q's favourite is wrong; r is one-sided; of s not all can be read, so it isn't passed."""
    rows = [
        sample("p", "yes", "passed"), sample("p", "n", "failed"), sample("q", "no", "passed"),
        sample("q", "wild", "failed"), sample("r", "yes", "passed"),
        sample("s", "yes", "passed"), sample("s", "x" * 51, "failed"),
    ]  # fmt: skip
    found, summary = give(bench.STAGE, tmp_path, rows)
    assert [one["score"] for one in found] == [3.0, 1.0, 2.0, 4.0, 3.0, 3.0, None]
    assert summary["scores"]["best-of-n"]["ties"] == 0
    overall = summary["scores"]["best-of-n"]["overall"]
    assert (overall["score"], overall["n"], summary["left_out"]) == (33.33, 3, {"one_sided": 1})
    assert summary["overall"]["best_of_n_curve"][-1]["n"] == 2


def test_a_tie_of_a_right_and_a_wrong_completion_is_not_passed_but_one_of_right_ones_is(
    judge: Lengths, tmp_path: Path
) -> None:
    rows = [
        sample("p", "yes", "passed"), sample("p", "sea", "failed"), sample("q", "yes", "passed"),
        sample("q", "yes", "passed"), sample("q", "n", "failed"),
    ]  # fmt: skip
    _, summary = give(bench.STAGE, tmp_path, rows)
    scores = summary["scores"]["best-of-n"]
    assert (scores["overall"]["score"], scores["ties"]) == (50.0, 1)


def test_rows_that_say_nothing_of_better_and_worse_are_refused(judge: Lengths, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to tell apart in split 'dev'"):
        give(bench.STAGE, tmp_path, [pair("p", "yes", "n")], split="dev")
    with pytest.raises(DataError, match="has no column 'kind'"):
        give(bench.STAGE, tmp_path, [pair("p", "yes", "n")], by="kind")


def test_rewardbenchs_sections_weigh_items_alike_but_maths_as_much_as_all_code() -> None:
    """Maths 50% of 2 items weighs as much as code's 6 items, 100% of 4 and 0% of 2: (0.5 · 6 + 4 + 0) / 12 = 7/12."""
    subsets = {"math-prm": share(1, 2), "hep-go": share(4, 4), "hep-cpp": share(0, 2), "donotanswer": share(1, 1)}
    sections = sections_of(None, subsets)
    assert sections == {"Safety": ["donotanswer"], "Reasoning": ["math-prm", "hep-cpp", "hep-go"]}
    assert section_score(sections["Reasoning"], subsets)["score"] == pytest.approx(100 * 7 / 12, abs=0.01)
    assert sections_of(None, subsets | {"mine": share(1, 1)}) == {}
    assert sections_of({"all": ["mine"]}, {"mine": 1}) == {"all": ["mine"]}
    with pytest.raises(DataError, match="leaves out the subset 'other'"):
        sections_of({"all": ["mine"]}, {"mine": 1, "other": 1})
    with pytest.raises(DataError, match="names 'mien', which is no subset"):
        sections_of({"all": ["mien"]}, {"mine": 1})
    assert sum(len(names) for names in SECTIONS.values()) == 23


def test_the_mean_of_shares_has_the_interval_of_as_many_items_as_vary_alike() -> None:
    """Of 10 and 10 items it varies as that of 1 / (0.25/10 + 0.25/10) = 20, of 10 and 30 as that of 30 items."""
    assert weighted([(1, share(5, 10)), (1, share(5, 10))]) == share(10, 20)
    found = weighted([(1, share(5, 10)), (1, share(15, 30))])
    assert (found["n"], found["low"], found["high"]) == (40, share(15, 30)["low"], share(15, 30)["high"])
