from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.core.errors import DataError
from align.core.lineage import render_trace, trace
from align.core.manifest import Manifest, Origin
from align.core.records import Kind, Row
from align.core.writer import write_rows


def a_prompt(number: int, **more: Any) -> Row:
    return {
        "prompt_id": f"p{number}", "prompt": [{"role": "user", "content": f"question {number}"}], "split": "train",
        "source": "math.jsonl", "source_row": 10 + number, "task": "math", "family": "math",
        "reference": '{"answer": "5"}', **more,
    }  # fmt: skip


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def a_completion(number: int, index: int, text: str, passed: bool) -> Row:
    return a_prompt(number) | {
        "sample_index": index, "completion": said(text), "reward": float(passed), "generator": "sft",
        "verdict": "passed" if passed else "failed", "detail": "",
    }  # fmt: skip


def a_pair(number: int) -> Row:
    return {
        "prompt_id": f"p{number}", "prompt": a_prompt(number)["prompt"], "split": "train", "chosen": said("five"),
        "rejected": said("six"), "margin": 1.0, "chosen_reward": 1.0, "rejected_reward": 0.0, "generator": "sft",
        "rejected_generator": "sft",
    }  # fmt: skip


def step(run: Path, name: str, stage: str, kind: Kind, rows: list[Row], **links: str) -> None:
    write_rows(run / name, rows, kind)
    inputs = {key: Origin(name=made_by, path=made_by, step=made_by) for key, made_by in links.items()}
    engines = {"sampler": Origin(name="sft", step="sft")} if stage == "reject" else {}
    Manifest(step=name, stage=stage, fingerprint="f", inputs=inputs, engines=engines).write(run / name)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """prompts -> evolve (p2 came of p1) -> tag -> sample -> pairs; `demos` is made from `sample` too."""
    folder = tmp_path / "run"
    step(folder, "prompts", "prompts", Kind.PROMPTS, [a_prompt(0), a_prompt(1)])
    step(folder, "evolve", "evolve", Kind.PROMPTS, [a_prompt(0), a_prompt(2, parent_id="p1")], prompts="prompts")
    tags = {"tags": ["math", "addition"]}
    step(
        folder,
        "tagged",
        "tag",
        Kind.PROMPTS,
        [a_prompt(0, **tags), a_prompt(2, parent_id="p1", **tags)],
        prompts="evolve",
    )
    samples = [a_completion(n, i, text, text == "five") for n in (0, 2) for i, text in enumerate(("six", "five"))]
    step(folder, "sample", "reject", Kind.COMPLETIONS, samples, prompts="tagged")
    step(folder, "pairs", "pair", Kind.PREFERENCES, [a_pair(0), a_pair(2)], completions="sample")
    demos = [{**a_prompt(2), "completion": said("five")}]
    step(folder, "demos", "demonstrate", Kind.DEMONSTRATIONS, demos, completions="sample")
    (folder / "sft").mkdir()
    Manifest(step="sft", stage="sft", fingerprint="f").write(folder / "sft")
    return folder


def test_a_pair_goes_back_through_completions_tags_and_parent_to_the_source(run: Path):
    links = trace(run, "pairs/1")
    assert [(link.step, link.prompt_id, len(link.rows)) for link in links] == [
        ("pairs", "p2", 1), ("sample", "p2", 2), ("tagged", "p2", 1), ("evolve", "p2", 1), ("prompts", "p1", 1),
    ]  # fmt: skip
    assert links[1].engines == {"sampler": "sft"}
    text = render_trace(links)
    assert "chosen (reward 1.0, generator sft): five" in text
    assert "completion 0 (verdict failed, reward 0.0, generator sft): six  <- rejected" in text
    assert "completion 1 (verdict passed, reward 1.0, generator sft): five  <- chosen" in text
    assert "tags: math, addition" in text
    assert "parent_id: p1" in text
    assert text.splitlines()[-1] == "source  math.jsonl, row 11 (from 0)"


def test_of_two_completions_with_the_same_text_only_the_paired_one_is_marked(run: Path):
    rows = [a_completion(2, 0, "five", True), a_completion(2, 1, "six", False), a_completion(2, 2, "five", True)]
    step(run, "sample", "reject", Kind.COMPLETIONS, rows, prompts="tagged")
    pair = a_pair(2) | {"chosen_index": 2, "rejected_index": 1}
    step(run, "pairs", "pair", Kind.PREFERENCES, [a_pair(0), pair], completions="sample")
    marked = [line.strip() for line in render_trace(trace(run, "pairs/1")).splitlines() if "<-" in line]
    assert [(line.split(" (")[0], line.split("<- ")[1]) for line in marked] == [
        ("completion 1", "rejected"), ("completion 2", "chosen"),
    ]  # fmt: skip


def test_a_prompts_id_gives_all_that_was_made_of_it(run: Path):
    assert [link.step for link in trace(run, "p2")] == ["demos", "pairs", "sample", "tagged", "evolve", "prompts"]
    assert [link.step for link in trace(run, "p1")] == ["prompts"]


def test_a_row_of_a_step_leaves_out_what_it_was_not_made_from(run: Path):
    links = trace(run, "demos/0")
    assert [link.step for link in links] == ["demos", "sample", "tagged", "evolve", "prompts"]
    (row,) = trace(run, "sample/2")[0].rows
    assert (row["prompt_id"], row["sample_index"]) == ("p2", 0)


def test_an_unfinished_step_is_left_out(run: Path):
    (run / "pairs" / "manifest.json").unlink()
    assert "pairs" not in [link.step for link in trace(run, "p2")]


def test_steps_run_alone_are_followed_by_their_paths(tmp_path: Path):
    write_rows(tmp_path / "p", [a_prompt(1)], Kind.PROMPTS)
    Manifest(step="prompts", stage="prompts", fingerprint="f").write(tmp_path / "p")
    write_rows(tmp_path / "s", [a_completion(1, 0, "five", True)], Kind.COMPLETIONS)
    origin = Origin(name="p", path=str(tmp_path / "p"))
    Manifest(step="reject", stage="reject", fingerprint="f", inputs={"prompts": origin}).write(tmp_path / "s")
    assert [link.stage for link in trace(tmp_path / "s", "p1")] == ["reject", "prompts"]
    assert [link.step for link in trace(tmp_path / "s", "reject/0")] == ["reject", str(tmp_path / "p")]


@pytest.mark.parametrize(
    ("row_id", "says"),
    [
        (
            "nobody",
            r"no row of prompt_id 'nobody' in the steps .*; give an id such as p\d, or STEP/NUMBER such as \w+/",
        ),
        ("pears/0", "has no finished step 'pears' with rows; it has "),
        ("pairs/2", "pairs has 2 rows, numbered from 0"),
    ],
)
def test_an_id_that_is_not_there_is_refused_with_some_that_are(run: Path, row_id: str, says: str):
    with pytest.raises(DataError, match=says):
        trace(run, row_id)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="has no finished step with rows"):
        trace(tmp_path, "p1")


def test_parents_in_a_circle_end(tmp_path: Path):
    step(tmp_path, "odd", "evolve", Kind.PROMPTS, [a_prompt(1, parent_id="p2"), a_prompt(2, parent_id="p1")])
    assert [link.prompt_id for link in trace(tmp_path, "p1")] == ["p1", "p2"]
