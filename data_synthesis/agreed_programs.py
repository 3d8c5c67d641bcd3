"""Programs and the tests of a model, run against each other; verdicts where they agree clearly.

What `execute` does with `tests=written`. The agreement itself is in `data_synthesis.code_agreement`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from align.core.records import Row, message_text
from align.core.sandbox import Slot
from data_synthesis.code_agreement import UNDECIDED, Agreement, AgreementConfig, agree
from data_synthesis.pooling import BLOCK, Pool
from data_synthesis.programs import entry_point, given_code, program_key, reads_input
from data_synthesis.sampling import answered, last_user_text
from data_synthesis.written_tests import Task, TestWriter, Written, WrittenTestsConfig
from reward.code_asserts import tested_name
from reward.code_matrix import Passed, passed_asserts, written_outputs
from reward.code_programs import normal_output
from reward.code_tests import extract_code
from reward.verifiers import Verifiers

NO_TESTS = "no test could be read"
WORSE, BETWEEN = "passes clearly fewer tests", "neither agreed with nor clearly worse"
STEPS: dict[str, tuple[str, ...]] = {
    "run": ("not sampled", "could not be run", "does not run"),
    "decided": (NO_TESTS, *UNDECIDED),
    "agreed": (WORSE, BETWEEN),
    "whole": ("right, but cut off at max_tokens",),
    "distinct": ("right, but the program of another",),
    "kept": ("right, but beyond `keep`",),
}
"""The steps from a sample to a demonstration where tests are written, and why a sample is lost at each."""


class AgreedConfig(AgreementConfig, WrittenTestsConfig):
    """Settings of `execute` that count where `tests=written`."""


Prompt = tuple[Task, Written, list[Row]]
"""What a prompt asks for, its tests, and its programs' rows."""


class AgreedPrograms:
    """Samples programs and tests, runs every program against every test, and gives verdicts by their agreement.

    Args:
        config: the settings.
        pool: samples programs.
        writer: writes tests.
        verifiers: hold the sandbox.
        check: whether what is decided is run against references too.
    """

    def __init__(self, config: AgreedConfig, pool: Pool, writer: TestWriter, verifiers: Verifiers, check: bool) -> None:
        self.config, self.pool, self.writer, self.verifiers, self.check = config, pool, writer, verifiers, check
        self.prompts: Counter[str] = Counter()
        self.tests: Counter[str] = Counter()
        self.checked: Counter[str] = Counter()

    def rows(self, prompts: Iterable[Row], samples: int) -> Iterator[list[Row]]:
        """Yields each prompt's COMPLETIONS rows: verdict, reward, and the figures that they come from."""
        for prompt, results in answered(self._prompts(prompts, samples), self._programs, self._run):
            task, written, rows = prompt
            of_code = dict(zip(dict.fromkeys(self._codes(prompt)), results, strict=True)) if results else {}
            passed = [of_code.get(code) for code in self._codes(prompt)]
            yield self._judged(task, written, rows, passed)

    def _prompts(self, prompts: Iterable[Row], samples: int) -> Iterator[Prompt]:
        remaining = iter(prompts)
        while block := list(islice(remaining, BLOCK)):
            groups = list(self.pool.rows(block, samples))
            tasks = [task_of(row, rows, self.config) for row, rows in zip(block, groups, strict=True)]
            for (task, written), rows in zip(self.writer.write(tasks), groups, strict=True):
                yield task, written, rows

    def _codes(self, prompt: Prompt) -> list[str]:
        """The program of each row, with the code that the prompt began."""
        task, _, rows = prompt
        given = given_code(last_user_text(task.row), task.name) if task.name else ""
        return [given + extract_code(message_text(row["completion"]), task.name or None) for row in rows]

    def _programs(self, prompt: Prompt) -> Iterator[tuple[str, Task, Written]]:
        task, written, _ = prompt
        if written.tests:
            for code in dict.fromkeys(self._codes(prompt)):  # the same program is run once
                yield code, task, written

    def _run(self, programs: Iterable[tuple[str, Task, Written]]) -> Iterator[Passed]:
        def work(slot: Slot, program: tuple[str, Task, Written]) -> Passed:
            code, task, written = program
            texts = list(dict.fromkeys(test for test, _ in written.tests))
            return passed_asserts(slot, code, texts) if task.form == "functions" else written_outputs(slot, code, texts)

        return self.verifiers.run_each(work, programs)

    def _judged(self, task: Task, written: Written, rows: list[Row], passed: Sequence[Passed | None]) -> list[Row]:
        sampled = [row["finish_reason"] != "error" for row in rows]
        repeats = list(written.repeats)
        tests = [_shown(test, task) for test in written.tests]
        sets = [its if sampled[place] and its is not None and its.runs else None for place, its in enumerate(passed)]
        passes = _passes(sets, written, task)
        keys = [program_key(extract_code(message_text(row["completion"]), task.name or None)) for row in rows]
        found = agree(keys, passes, repeats, self.config)
        undecided = found.undecided if written.tests else NO_TESTS
        self.prompts[undecided or "decided"] += 1
        self.tests.update(
            answers=len(written.words), unread=written.unread, written=sum(repeats), distinct=len(tests),
            telling=len(found.useful),
        )  # fmt: skip
        agreeing = found.standings.count("agreed")
        for index, row in enumerate(rows):
            its = passed[index]
            row["sample_index"] = index
            row["entry_point"] = task.name or None
            row["written_tests"] = json.dumps(tests, ensure_ascii=False) if index == 0 else None
            row["tester_words"] = json.dumps(written.words, ensure_ascii=False) if index == 0 else None
            row["passes"] = sorted(passes[index] or ())
            row["group"], row["agreement"] = found.groups[index], found.scores[index]
            row["runs"] = its.runs if its is not None and sampled[index] else None
            row["sandbox_level"] = self.verifiers.sandbox_level
            row["reference_verdict"] = None
            if sampled[index]:
                self._decide(row, its, found, index, undecided, agreeing, len(rows))
            else:
                row["outcome"] = row["lost"] = "not sampled"
        return rows

    def _decide(
        self, row: Row, its: Passed | None, found: Agreement, index: int, undecided: str, agreeing: int, of: int
    ) -> None:
        """Sets the verdict of a program that was sampled."""
        standing = found.standings[index]
        least = f"{len(found.agreed)} tests that the best group passes"
        if its is not None and its.problem:
            self._set(row, "error", None, its.problem, "could not be run")
        elif its is not None and not its.runs:
            detail = "the program raised before any test" if its.compiles else "does not compile"
            self._set(row, "failed", 0.0, detail, "does not run")
        elif undecided:
            self._set(row, "error", None, f"undecided: {undecided}", undecided)
        elif standing == "agreed":
            self._set(
                row, "passed", 1.0, f"one of {agreeing} of {of} programs that agree on {len(found.agreed)} tests", None
            )
        else:
            share = round(found.shares[index], 4)
            passes = f"passes {round(share * len(found.agreed))} of the {least}"
            if standing == "worse":
                self._set(row, "failed", share, passes, WORSE)
            else:
                self._set(row, "error", None, f"undecided: {passes}", BETWEEN)

    @staticmethod
    def _set(row: Row, verdict: str, reward: float | None, detail: str, lost: str | None) -> None:
        row["verdict"], row["reward"], row["detail"], row["lost"] = verdict, reward, detail, lost
        row["outcome"] = lost or "agreed"

    def check_kept(self, rows: Sequence[Row]) -> None:
        """Runs kept and rejected programs against their prompt's reference, where that is asked for."""
        rows = [row for row in rows if self.check and row["reference"] and (row["kept"] or row["outcome"] == WORSE)]
        asked = [(row["task"], message_text(row["completion"]), row["reference"], last_user_text(row)) for row in rows]
        for row, verdict in zip(rows, self.verifiers.verify_many(asked), strict=True):
            row["reference_verdict"] = verdict.verdict
            self.checked[f"{'kept' if row['kept'] else 'rejected'}: {verdict.verdict} by reference"] += 1

    def summary(self) -> dict[str, Any]:
        """Prompts by what came of them, tests by how far they got, and what references say."""
        return {
            "prompts": dict(self.prompts),
            "tests": dict(self.tests),
            **({"checked": dict(sorted(self.checked.items()))} if self.checked else {}),
        }


def task_of(row: Row, rows: Sequence[Row], config: WrittenTestsConfig) -> Task:
    """What a prompt asks for: by its reference where that says it, else by what most of its programs are."""
    reference = _reference(row)
    programs = [extract_code(message_text(one["completion"])) for one in rows if one["finish_reason"] != "error"]
    if config.form == "stdin" or (config.form == "auto" and reference.get("io")):
        return Task(row, "stdin", "")
    if config.form == "auto" and 2 * sum(map(reads_input, programs)) > len(programs):
        return Task(row, "stdin", "")
    name = reference.get("entry_point") or tested_name(tuple(reference.get("tests") or ()))
    return Task(row, "functions", name or entry_point(last_user_text(row), programs))


def _reference(row: Row) -> Mapping[str, Any]:
    """A prompt's reference; nothing where there is none, or a broken one."""
    try:
        found = json.loads(row["reference"]) if row["reference"] else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _passes(sets: Sequence[Passed | None], written: Written, task: Task) -> list[frozenset[int] | None]:
    """Places of the tests that each program passes; None for one that does not run."""
    if task.form == "functions":
        return [None if its is None else frozenset(i for i, ok in enumerate(its.tests) if ok) for its in sets]
    inputs = {stdin: place for place, stdin in enumerate(dict.fromkeys(test for test, _ in written.tests))}
    outputs = [
        None if its is None else [None if out is None else normal_output(out) for out in its.outputs] for its in sets
    ]
    wanted: list[str | None] = []
    for stdin, stdout in written.tests:
        said = Counter(its[inputs[stdin]] for its in outputs if its is not None and its[inputs[stdin]] is not None)
        if stdout is not None:
            wanted.append(normal_output(stdout))
        else:  # what most programs write; nothing where two outputs are equally frequent
            first, second = [*said.most_common(2), (None, 0), (None, 0)][:2]
            wanted.append(first[0] if first[1] > second[1] else None)
    return [
        None if its is None
        else frozenset(
            place
            for place, ((stdin, _), want) in enumerate(zip(written.tests, wanted, strict=True))
            if want is not None and its[inputs[stdin]] == want
        )
        for its in outputs
    ]  # fmt: skip


def _shown(test: tuple[str, str | None], task: Task) -> Any:
    return test[0] if task.form == "functions" else {"stdin": test[0], "stdout": test[1]}
