"""`align verify` with a judge as a user types it: other engines, kills, real data, and the example of docs/judge.md."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from align.core.engines.completion_file import kept_in
from align.core.engines.scripted import ScriptedEngine
from align.core.manifest import Manifest
from align.core.store import Table
from tests import forked
from tests.e2e.command import align, jsonl, manifest, refused, rows
from tests.reward.judges import blocks
from tests.reward.test_judged import run

ROOT = Path(__file__).parents[2]
LONGER = "{kind: 'tests.reward.judges:LONGER', model: any}"


def some_rows(number: int) -> list[dict[str, Any]]:
    """Every third one can't be read, every fourth is a comparison."""
    found: list[dict[str, Any]] = []
    for place in range(number):
        row = {"id": place, "prompt": f"Question {place}?", "completion": " ".join(["word"] * (place % 12))}
        if place % 3 == 0:
            row["completion"] = f"unreadable {place}"
        more = {"task": "compare", "reference": {"other": "a b c d"}} if place % 4 == 0 else {
            "task": "judge", "reference": {"rubric": "Is it long?"}
        }  # fmt: skip
        found.append({**row, **more})
    return found


def test_any_engine_judges_from_the_command_line_and_from_a_recipe(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "rows.jsonl", some_rows(12))
    said = align("verify", f"data={data}", f"judge={LONGER}", f"out={tmp_path / 'alone'}")
    assert "verify: judge: 6 of 9 rows judged, mean reward" in said
    assert (
        "verify: compare: 2 of 3 rows judged, 1 wins, 1 ties, 0 losses, the first of two took 50%, "
        "the orders disagree on 0%\n"
    ) in said
    (tmp_path / "r.yaml").write_text(
        f"name: r\nengines:\n  j: {LONGER}\nsteps:\n"
        f"  v: {{stage: verify, with: {{data: {data}}}, engines: {{judge: j}}}}\n"
    )
    align("run", tmp_path / "r.yaml", "--out", tmp_path / "r")
    found = rows(tmp_path / "alone")
    assert found == rows(tmp_path / "r" / "v")
    verdicts = ["error", "failed", "failed", "error", "failed", "failed", "error", "failed", "passed"]
    assert [row["verdict"] for row in found] == [*verdicts, "error", "passed", "passed"]
    summary = manifest(tmp_path / "alone").summary
    assert (summary["judge"]["rows"], summary["compare"]["errors"]) == (9, 1)
    assert summary["compare"]["first_position_share"] == 0.5


def test_a_missing_template_is_told_before_anything_is_sampled(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "rows.jsonl", some_rows(2))
    said = refused("verify", f"data={data}", f"judge={LONGER}", "judge_template=./mine.txt", f"out={tmp_path / 'out'}")
    assert "'./mine.txt': there is no such file" in said
    said = refused("verify", f"data={data}", f"judge={LONGER}", "compare_template=Rate {completion}",
                   f"out={tmp_path / 'out'}")  # fmt: skip
    assert "lacks {completion_a}, {completion_b}" in said


@pytest.mark.slow
def test_a_judging_that_is_killed_goes_on_and_pays_for_nothing_twice(tmp_path: Path) -> None:
    """kill -9 twice. Only a judgement that was said, but not yet kept when the kill came, is asked for again.

    Of 60 rows 20 can't be read: 5 comparisons with two orders and 15 scores, each asked for three times; 10 comparisons
    with two orders and 30 scores are read at once: 25·3 + 50 = 125 samples.
    """
    data, log, out = jsonl(tmp_path / "rows.jsonl", some_rows(60)), tmp_path / "log", tmp_path / "out"
    judge = f"{LONGER[:-1]}, delay_s: 0.03, log: {log}}}"
    command = ["verify", f"data={data}", f"judge={judge}", f"out={out}"]
    cache = out / "work" / "completions-judge"
    for least in (20, 90):
        process = forked.start(*command, cwd=ROOT)
        until = time.monotonic() + 120
        while not cache.exists() or kept_in(cache)[0] < least:
            assert process.poll() is None and time.monotonic() < until, process.communicate()
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert Manifest.read(out) is None
    done = forked.align(*command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    said = Counter(log.read_text().splitlines())
    assert len(said) == 125 and said.total() - len(said) <= 2
    made = Manifest.read(out)
    assert made is not None
    counts = made.engines["judge"].model_dump()
    assert counts["reused"] >= 90 and counts["reused"] + counts["sampled"] == 125
    align("verify", f"data={data}", f"judge={LONGER}", f"out={tmp_path / 'whole'}")
    assert list(Table.open(out).rows()) == rows(tmp_path / "whole")


@pytest.mark.real_data
@pytest.mark.skipif("ALIGN_TEST_DATA" not in os.environ, reason="ALIGN_TEST_DATA names no folder")
def test_the_pairs_of_llmbar_are_judged_and_agreement_with_their_labels_is_told(tmp_path: Path) -> None:
    """A judge that knows the labels agrees with all 100; one that always says A with none, since all are ties."""
    pairs = json.loads((Path(os.environ["ALIGN_TEST_DATA"]) / "llmbar_natural" / "dataset.json").read_text("utf-8"))
    lines = [
        {"task": "compare", "prompt": pair["input"], "completion": pair["output_1"],
         "reference": {"other": pair["output_2"], "winner": ["completion", "other"][pair["label"] - 1]}}
        for pair in pairs
    ]  # fmt: skip
    better = {(pair["input"], pair[f"output_{pair['label']}"]) for pair in pairs}

    def knows(prompt: Any, index: int) -> str:
        instruction, _, a, b = (text.removesuffix("\n") for text in blocks(prompt))
        assert ((instruction, a) in better) != ((instruction, b) in better)
        return "Winner: A" if (instruction, a) in better else "Winner: B"

    _, summary = run(tmp_path, lines, ScriptedEngine(knows))
    assert summary["compare"]["labels"]["accuracy"] == 100 and summary["compare"]["labels"]["n"] == 100
    assert (summary["compare"]["wins"], summary["compare"]["losses"]) == (42, 58)
    assert summary["compare"]["first_position_share"] == 0.5 and summary["compare"]["order_kappa"] == 1
    found, summary = run(tmp_path, lines, "Winner: A")
    assert {row["reward"] for row in found} == {0.5}
    labels = summary["compare"]["labels"]
    assert (labels["accuracy"], labels["tied"], labels["high"]) == (0, 100, pytest.approx(3.7, abs=0.01))


@pytest.mark.real_data
@pytest.mark.skipif("ALIGN_TEST_DATA" not in os.environ, reason="ALIGN_TEST_DATA names no folder")
def test_preferences_as_whole_dialogues_are_compared_with_all_their_turns(tmp_path: Path) -> None:
    file = Path(os.environ["ALIGN_TEST_DATA"]) / "hh_harmless_test_even" / "pairs.jsonl"
    lines = file.read_text("utf-8").splitlines()[:100]
    seen: list[str] = []

    def judge(prompt: Any, index: int) -> str:
        seen.append(blocks(prompt)[0])
        return "Winner: tie"

    found, summary = run(tmp_path, lines, ScriptedEngine(judge))
    errors = [row["detail"] for row in found if row["verdict"] == "error"]
    assert summary["verdicts"]["compare"] == {"failed": 100 - len(errors), **({"error": len(errors)} if errors else {})}
    assert len(errors) <= 5 and all("rejected" in detail for detail in errors)
    assert any(text.count("assistant\n") >= 1 and text.count("user\n") >= 2 for text in seen)


def test_the_example_of_the_page_gives_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "judge.md").read_text("utf-8").partition("## An example that runs")[2]
    blocks_of_code = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (_, judge), (_, answers), (_, commands), (_, expected) = blocks_of_code[:4]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_judge.py").write_text(judge)
    (tmp_path / "answers.jsonl").write_text(answers)
    (command,) = [line for line in commands.splitlines() if line.startswith("align ")]
    align(*shlex.split(command)[1:])
    shown = [json.loads(line) for line in expected.splitlines()]
    found = [{key: row[key] for key in shown[0]} for row in rows(tmp_path / "runs" / "judged")]
    assert found == shown


def test_a_real_model_is_asked_and_its_words_are_kept_though_they_are_no_score(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "rows.jsonl", [{**some_rows(3)[1], "completion": "It is red."}])
    settings = ["judge_max_tokens=8", "judge_attempts=1", "judge_template=Rate this. {completion}"]
    align("verify", f"data={data}", "judge=tiny", *settings, f"out={tmp_path / 'out'}")
    (row,) = rows(tmp_path / "out")
    assert row["verdict"] == "error" and row["detail"].startswith("the judge gave no score in 1 attempts: ")
    assert json.loads(row["judgement"])["words"][0] and manifest(tmp_path / "out").engines["judge"].name == "tiny"
