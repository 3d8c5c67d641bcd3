"""The stage on a scripted engine and the real verifiers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from align.core.engines.base import Completion, Prompt, SamplingParams
from align.core.errors import DataError, EngineError
from align.core.records import COLUMNS, Kind
from align.core.stage import Result, Tools
from align.core.store import TINY, Table
from align.core.writer import write_rows
from align.evaluate.evaluate import STAGE, Config
from align.evaluate.scores import compare
from align.pipeline import run
from align.recipe import load_stage


class Scripted:
    """Answers from a table: text of the prompt -> the completions of its samples, and what it was asked."""

    generator = "scripted"
    fingerprint = "scripted-1"

    def __init__(self, answers: dict[str, list[Completion]]) -> None:
        self.answers = answers
        self.asked: list[tuple[Prompt, float]] = []

    def sample(
        self, prompts: Iterable[Prompt], n: int, params: SamplingParams, first_index: int = 0
    ) -> Iterator[tuple[int, int, Completion]]:
        for number, prompt in enumerate(prompts):
            self.asked.append((prompt, params.temperature))
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]  # type: ignore[index,call-overload]
            for index in range(first_index, first_index + n):
                yield number, index, self.answers[text][index if params.temperature else 0]

    def close(self) -> None: ...


class Silent:
    def start(self, total: int | None, unit: str) -> None: ...
    def advance(self, by: int = 1, **figures: float | int | str) -> None: ...
    def say(self, line: str) -> None: ...


def said(text: str, finish_reason: Any = "stop") -> Completion:
    return Completion(text, (1, 2), finish_reason, error="connection lost" if finish_reason == "error" else "")


def prompts_table(folder: Path, rows: list[dict[str, Any]]) -> Table:
    full = [{**dict.fromkeys(COLUMNS[Kind.PROMPTS]), **row} for row in rows]
    pq.write_table(pa.Table.from_pylist(full), folder / "part-00000.parquet")
    return Table([folder / "part-00000.parquet"], "prompts", "abc")


def math_row(name: str, answer: str, split: str = "test", **more: Any) -> dict[str, Any]:
    return {
        "prompt_id": name,
        "prompt": [{"role": "user", "content": f"question {name}"}],
        "split": split,
        "task": "math",
        "family": "sums",
        "reference": json.dumps({"answer": answer}),
        **more,
    }


def tools(tmp_path: Path, engine: Scripted) -> Tools:
    return Tools(seed=3, engines={"policy": engine}, progress=Silent(), work=tmp_path, out=tmp_path)


def evaluate(
    tmp_path: Path, rows: list[dict[str, Any]], engine: Scripted, **settings: Any
) -> tuple[list[dict[str, Any]], Result]:
    result = STAGE.run(Config(**settings), {"prompts": prompts_table(tmp_path, rows)}, tools(tmp_path, engine))
    assert result.rows is not None
    return list(result.rows), result


def test_greedy_and_sampled_scores_are_those_of_the_verifier(tmp_path: Path) -> None:
    """q1 greedy right, samples right and wrong; q2 greedy wrong, samples wrong and right: 50 and 50."""
    engine = Scripted(
        {
            "question 1": [said("#### 4"), said("#### 5")],
            "question 2": [said("#### 7"), said("#### 9")],
        }
    )
    rows, result = evaluate(tmp_path, [math_row("1", "4"), math_row("2", "9")], engine, samples=2)
    assert [(r["prompt_id"], r["mode"], r["sample_index"], r["verdict"]) for r in rows] == [
        ("1", "greedy", 0, "passed"),
        ("2", "greedy", 0, "failed"),
        ("1", "sampled", 0, "passed"),
        ("1", "sampled", 1, "failed"),
        ("2", "sampled", 0, "failed"),
        ("2", "sampled", 1, "passed"),
    ]
    scores = result.summary["scores"]
    assert scores["greedy"]["overall"]["score"] == 50
    assert scores["sampled"]["by_family"]["sums"] == {**scores["sampled"]["overall"]}
    assert scores["sampled"]["overall"]["n"] == 2
    assert {temperature for _, temperature in engine.asked} == {0.0, 1.0}


def test_rows_hold_every_column_of_completions_and_what_the_model_read(tmp_path: Path) -> None:
    engine = Scripted({"Q: question 1\nA:": [said("#### 4")]})
    rows, _ = evaluate(tmp_path, [math_row("1", "4")], engine, samples=0, layout="Q: {instruction}\nA:")
    assert set(COLUMNS[Kind.COMPLETIONS]) | set(STAGE.adds) <= set(rows[0])
    assert rows[0]["rendered_prompt"] == "Q: question 1\nA:"
    assert rows[0]["prompt"] == [{"role": "user", "content": "question 1"}]
    assert rows[0]["completion"] == [{"role": "assistant", "content": "#### 4"}]


def test_a_chat_prompt_is_stored_as_the_models_own_template_renders_it(tmp_path: Path) -> None:
    """Through the pipeline, so that the engine lies behind its cache; a template of one's own shows whose it is."""
    from transformers import AutoTokenizer

    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}[answer] "
    (model / "chat_template.jinja").write_text(template)
    write_rows(tmp_path / "prompts", [math_row("1", "4")], Kind.PROMPTS)
    arguments = [f"prompts={tmp_path / 'prompts'}", f"policy={model}", "samples=0", "max_tokens=4"]
    run(load_stage("evaluate", [*arguments, f"out={tmp_path / 'out'}"]))
    (row,) = Table.open(tmp_path / "out").rows()
    assert row["rendered_prompt"] == "[user] question 1<|im_end|>[answer] "
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert row["rendered_prompt"] == tokenizer.apply_chat_template(
        row["prompt"], tokenize=False, add_generation_prompt=True
    )


def test_only_the_chosen_split_is_evaluated(tmp_path: Path) -> None:
    engine = Scripted({"question 1": [said("#### 4")], "question 2": [said("#### 4")]})
    both = [math_row("1", "4", "train"), math_row("2", "4", "dev")]
    rows, _ = evaluate(tmp_path, both, engine, samples=0, split="dev")
    assert [r["prompt_id"] for r in rows] == ["2"]
    rows, _ = evaluate(tmp_path, both, engine, samples=0, split="all")
    assert len(rows) == 2
    with pytest.raises(DataError, match="split 'test'"):
        evaluate(tmp_path, both, engine, samples=0)


def test_truncated_completions_fail_though_their_text_is_right(tmp_path: Path) -> None:
    engine = Scripted({f"question {i}": [said("#### 4", "length" if i == 2 else "stop")] for i in (1, 2, 3)})
    rows, result = evaluate(tmp_path, [math_row(str(i), "4") for i in (1, 2, 3)], engine, samples=0)
    assert [r["verdict"] for r in rows] == ["passed", "failed", "passed"]
    assert "truncated" in rows[1]["detail"]
    assert result.summary["scores"]["greedy"]["truncated"] == 1


def test_failed_samples_are_errors_and_too_many_of_them_stop_the_stage(tmp_path: Path) -> None:
    answers = {f"question {i}": [said("#### 4", "error" if i == 4 else "stop")] for i in range(5)}
    rows = [math_row(str(i), "4") for i in range(5)]
    graded, result = evaluate(tmp_path, rows, Scripted(answers), samples=0, max_error_share=0.2)
    assert graded[-1]["verdict"] == "error"
    assert "connection lost" in graded[-1]["detail"]
    assert result.summary["scores"]["greedy"]["overall"]["score"] == 80
    with pytest.raises(EngineError, match="1 of 5 greedy completions"):
        evaluate(tmp_path, rows, Scripted(answers), samples=0, max_error_share=0.1)


def test_prompts_without_a_task_are_counted_and_left_out(tmp_path: Path) -> None:
    engine = Scripted({"question 1": [said("#### 4")]})
    rows, result = evaluate(tmp_path, [math_row("1", "4"), math_row("2", "4", task=None)], engine, samples=0)
    assert len(rows) == 1
    assert result.summary["not_verifiable"] == 1


def test_settings_that_ask_for_nothing_or_have_no_place_for_the_instruction_are_refused() -> None:
    with pytest.raises(ValidationError, match="nothing would be sampled"):
        Config(greedy=False, samples=0)
    with pytest.raises(ValidationError, match=r"\{instruction\}"):
        Config(layout="raw")


def test_compare_pairs_two_outputs_by_prompt(tmp_path: Path) -> None:
    """Six prompts: the second model mends three, breaks one; z = 2/sqrt(4) = 1."""
    before = [True, True, False, False, False, False]
    after = [True, False, True, True, True, False]
    tables = []
    for name, rights in (("before", before), ("after", list(reversed(after)))):
        ids = range(6) if name == "before" else reversed(range(6))
        rows = [
            {"prompt_id": str(i), "mode": "greedy", "sample_index": 0, "verdict": "passed" if right else "failed"}
            for i, right in zip(ids, rights, strict=True)
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        tables.append(Table([tmp_path / f"{name}.parquet"], name, name))
    found = compare(*tables)["greedy"]
    assert found["n"] == 6
    assert (found["a"], found["b"]) == pytest.approx((100 / 3, 200 / 3))
    assert found["z"] == pytest.approx(1.0)
    other = tmp_path / "other.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt_id": "1", "verdict": "passed"}]), other)
    with pytest.raises(DataError, match="mode"):
        compare(tables[0], Table([other], "other", "x"))
