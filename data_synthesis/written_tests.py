"""Tests that a model writes for programs that a model wrote: assertions for functions, inputs and outputs for programs.

As CodeT asks for them (arXiv:2207.10397, 3.1 and its code): several answers a prompt, and of each the first assertions
that name the function under test and compile. Programs that read standard input get pairs of an input and an output.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from align.core.asking import MalformedError, Question, ask_each, load_templates
from align.core.engines.base import Engine, SamplingParams
from align.core.records import Row
from align.core.stage import StageConfig
from data_synthesis.programs import parsed
from reward.code_tests import extract_code
from reward.judge import filled

TEMPLATES = Path(__file__).parent / "templates" / "execute"
NEEDS = {"asserts": ["instruction"], "inputs": ["instruction"]}
Form = Literal["functions", "stdin"]


class WrittenTestsConfig(StageConfig):
    """How tests are written, where `tests=written`."""

    templates: str = Field(
        "default", description="what the writer of tests is asked: a shipped set (default, tiny) or a folder with "
        "asserts.txt and inputs.txt",
    )  # fmt: skip
    test_samples: int = Field(10, ge=1, description="answers of the writer of tests for each prompt; CodeT takes 100")
    tests_per_sample: int = Field(5, ge=1, description="tests taken of each answer, the first ones (CodeT)")
    test_temperature: float = Field(0.8, ge=0, le=5, description="sampling temperature of the tests; CodeT's is 0.8")
    test_max_tokens: int = Field(512, ge=1, description="most new tokens of an answer with tests")
    attempts: int = Field(2, ge=1, description="samples asked for until an answer holds a test, then it is passed over")
    json_tests: bool = Field(
        False, description="hold inputs and outputs to a JSON schema; only for engines with structured output"
    )
    form: Literal["auto", "functions", "stdin"] = Field(
        "auto", description="what programs are: functions that assertions call, or programs that read standard input; "
        "auto: by what most of a prompt's programs do",
    )  # fmt: skip
    expected: Literal["written", "agreed"] = Field(
        "written", description="what a program should write on an input: what the writer of tests says (CodeT), or "
        "what most programs write",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Task:
    """What is known of a prompt before its tests are written.

    Attributes:
        row: the prompt's.
        form: what its programs are.
        name: the function under test; empty where there is none.
    """

    row: Row
    form: Form
    name: str


@dataclass(frozen=True, slots=True)
class Written:
    """The tests of a prompt.

    Attributes:
        tests: distinct assertions, or inputs with their outputs as (input, output); in the order they were written.
        repeats: how often each was written.
        words: the writer's answers.
        unread: answers that held no test.
    """

    tests: tuple[tuple[str, str | None], ...]
    repeats: tuple[int, ...]
    words: tuple[str, ...]
    unread: int


class TestWriter:
    """Asks a model for tests.

    Raises:
        DataError: a template can't be found, or lacks a placeholder.
    """

    __test__ = False  # no test of pytest's

    def __init__(self, engine: Engine, config: WrittenTestsConfig, seed: int) -> None:
        self.engine, self.config = engine, config
        self.templates = load_templates(config.templates, TEMPLATES, NEEDS)
        self.params = SamplingParams(max_tokens=config.test_max_tokens, temperature=config.test_temperature, seed=seed)

    def write(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Written]]:
        """Yields each task with its tests, in order; a task without a function to test has none."""
        items = ((task, [] if task.form == "functions" and not task.name else [self._question(task)]) for task in tasks)
        config = self.config
        for task, answers in ask_each(self.engine, items, self.params, config.attempts, config.test_samples):
            counts: Counter[tuple[str, str | None]] = Counter()
            given = answers[0] if answers else []
            for answer in given:
                counts.update((answer.value or [])[: config.tests_per_sample])
            unread = sum(answer.value is None for answer in given)
            yield task, Written(tuple(counts), tuple(counts.values()), tuple(a.text for a in given), unread)

    def _question(self, task: Task) -> Question[list[tuple[str, str | None]]]:
        more = {"count": str(self.config.tests_per_sample), "entry_point": task.name}
        if task.form == "functions":
            prompt = filled(self.templates["asserts"], {"instruction": task.row["prompt"]}, more)
            return Question(prompt, lambda said: [(test, None) for test in read_asserts(said, task.name)])
        prompt = filled(self.templates["inputs"], {"instruction": task.row["prompt"]}, more)
        agreed = self.config.expected == "agreed"
        schema = INPUTS_SCHEMA if self.config.json_tests else None
        return Question(prompt, lambda said: read_inputs(said, agreed), schema)


def read_asserts(said: str, name: str) -> list[str]:
    """The assertions of an answer that name the function and compile, each as Python writes it.

    Raises:
        MalformedError: there is none.
    """
    found: list[str] = []
    for source in _assertions(extract_code(said)):
        statement = parsed(source)[0]
        called = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}
        if isinstance(statement, ast.Assert) and name in called:
            found.append(ast.unparse(ast.Assert(statement.test)))
    if not found:
        raise MalformedError(f"no assertion in it that names {name} and compiles")
    return found


def _assertions(text: str) -> Iterator[str]:
    """Yields the sources of the assertions in a text that may hold other lines and may break off."""
    lines = text.splitlines()
    start = 0
    while start < len(lines):
        if lines[start].lstrip().startswith("assert "):
            for end in range(start + 1, min(start + 20, len(lines)) + 1):  # an assertion may go over several lines
                source = "\n".join([lines[start].lstrip(), *lines[start + 1 : end]])
                if len(parsed(source)) == 1:
                    yield source
                    start = end - 1
                    break
        start += 1


_CASE = {
    "type": "object",
    "properties": {"stdin": {"type": "string"}, "stdout": {"type": "string"}},
    "required": ["stdin", "stdout"],
    "additionalProperties": False,
}
INPUTS_SCHEMA = json.dumps({
    "type": "object", "properties": {"cases": {"type": "array", "items": _CASE}}, "required": ["cases"],
    "additionalProperties": False,
})  # fmt: skip


def read_inputs(said: str, agreed: bool) -> list[tuple[str, str | None]]:
    """The inputs of an answer with their outputs, or without them where programs shall agree on those.

    Raises:
        MalformedError: it holds no JSON object with `cases`, or a case lacks its texts.
    """
    start = said.find("{")
    try:
        found, _ = json.JSONDecoder().raw_decode(said[start:]) if start >= 0 else (None, 0)
    except (ValueError, RecursionError) as problem:
        raise MalformedError(f"no JSON object in it: {problem}") from None
    cases = found.get("cases") if isinstance(found, dict) else None
    if not isinstance(cases, list) or not cases:
        raise MalformedError('no JSON object {"cases": [...]} in it')
    tests: list[tuple[str, str | None]] = []
    for case in cases:
        keys = ("stdin",) if agreed else ("stdin", "stdout")
        if not isinstance(case, dict) or not all(isinstance(case.get(key), str) for key in keys):
            raise MalformedError(f"a case without {' and '.join(keys)} as texts")
        tests.append((case["stdin"], None if agreed else case["stdout"]))
    return tests
