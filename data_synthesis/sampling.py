"""Sampling completions, verifying them, giving them back prompt by prompt: what the sampling stages share."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from pydantic import Field

from align.core.engines.base import Completion, Engine, SamplingParams
from align.core.engines.cache import in_order
from align.core.errors import DataError, EngineError
from align.core.records import Row, Split, Verdict
from align.core.sandbox import Accept
from align.core.stage import StageConfig
from reward.verifiers import Verifiers

NOT_RUNNING = ("does not compile", "the program raised")
"""How the code verifier's detail begins for a program that never got as far as its tests."""

Group = TypeVar("Group")
Question = TypeVar("Question")
Reply = TypeVar("Reply")

CHECK_ERRORS_FROM = 200
"""From so many completions on, a share of errors above the limit stops a stage at once, not only at its end."""


class SamplingConfig(StageConfig):
    """How a stage samples; stages that sample have these settings, some with other defaults."""

    samples: int = Field(8, ge=1, description="completions sampled for each prompt")
    temperature: float = Field(0.7, ge=0, le=5, description="sampling temperature; 0.7 is RFT's (arXiv:2308.01825)")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling; 1 is off")
    top_k: int = Field(0, ge=0, description="only the k likeliest tokens; 0 is off")
    min_p: float = Field(
        0.0, ge=0, le=1, description="no token with less than this share of the likeliest one's; 0 is off"
    )
    repetition_penalty: float = Field(1.0, gt=0, description="above 1 disfavours tokens that have occurred; 1 is off")
    max_tokens: int = Field(512, ge=1, description="most new tokens of a completion; a longer one counts as truncated")
    splits: list[Split] = Field(
        ["train"], min_length=1, description="prompts of these splits are sampled, others passed by"
    )
    max_error_share: float = Field(
        0.05, ge=0, le=1,
        description="the stage fails when a larger share of completions can't be sampled or verified (timeouts apart)",
    )  # fmt: skip

    accept: Accept = Field("isolated", description="what isolation is enough to run code; unsafe runs it without any")
    cpu_s: float = Field(8.0, gt=0, description="CPU seconds for all tests of one program")
    memory_mb: int = Field(512, ge=16, description="memory of one program beyond the interpreter's own, MiB")

    @property
    def sandbox(self) -> dict[str, Any]:
        """The verifiers' view of these settings."""
        return {"accept": self.accept, "cpu_s": self.cpu_s, "memory_mb": self.memory_mb}

    def params(self, seed: int) -> SamplingParams:
        """The engine's view of these settings."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=seed,
        )


class ErrorBudget:
    """Counts errors and stops a stage when their share passes the limit."""

    def __init__(self, stage: str, max_share: float) -> None:
        self.stage, self.max_share = stage, max_share
        self.seen = 0
        self.errors = 0
        self.last = ""

    def count(self, error: bool, reason: str, seen_before: bool = False) -> None:
        """Takes one answer in, or, with `seen_before`, an error found later in an answer that was counted.

        Raises:
            EngineError: too many errors, once enough answers were seen to tell.
        """
        self.seen += not seen_before
        if error:
            self.errors += 1
            self.last = reason
        if self.seen >= CHECK_ERRORS_FROM:
            self.check()

    def check(self) -> None:
        """Compares the share so far with the limit; called at the end of the rows.

        Raises:
            EngineError: the share is above the limit.
        """
        if self.seen and self.errors / self.seen > self.max_share:
            raise EngineError(
                f"{self.stage}: {self.errors} of {self.seen} answers are errors, more than max_error_share="
                f"{self.max_share:g} allows; the last one: {self.last or 'no reason given'}. Mend the cause, or raise "
                "max_error_share if these rows may be lost"
            )


def completion_row(row: Row, index: int, completion: Completion, verdict: Verdict, generator: str) -> Row:
    """A COMPLETIONS row: the prompt's row, the completion and what is known of it; for code also whether it `runs`."""
    is_code = row["task"] == "code"
    runs = verdict.verdict != "error" and not verdict.detail.startswith(NOT_RUNNING)
    return {
        **row,
        "sample_index": index,
        "completion": [{"role": "assistant", "content": completion.text}],
        "reward": verdict.reward,
        "verdict": verdict.verdict,
        "detail": verdict.detail,
        "generator": generator,
        "finish_reason": completion.finish_reason,
        **({"runs": runs} if is_code else {}),
    }


def last_user_text(row: Row) -> str:
    """The text of a prompt's last user turn: the instruction that a completion answers."""
    for message in reversed(row["prompt"]):
        if message["role"] == "user":
            return str(message["content"])
    raise DataError(f"prompt {row['prompt_id']}: it has no user turn; a prompt ends with the user's message")


def wanted(
    rows: Iterable[Row],
    splits: Sequence[str],
    skipped: Counter[str],
    tasks: Sequence[str] | None = None,
    verified: bool = True,
) -> Iterator[Row]:
    """Yields the rows worth sampling and counts the others: another split, no task, a task that isn't asked for.

    Args:
        rows: prompts.
        splits: those to sample.
        skipped: takes the counts.
        tasks: those to sample; None for all.
        verified: whether a row needs a task at all (a judge needs none).
    """
    for row in rows:
        if row["split"] not in splits:
            skipped[f"split {row['split']}"] += 1
        elif verified and row["task"] is None:
            skipped["no task: nothing can verify it"] += 1
        elif tasks is not None and row["task"] not in tasks:
            skipped[f"task {row['task']}"] += 1
        else:
            yield row


def sampled(
    rows: Iterable[Row], engine: Engine, samples: int, params: SamplingParams, first_index: int = 0
) -> Iterator[tuple[Row, list[Completion]]]:
    """Yields each row with its completions, in the rows' order; rows are read a bounded number ahead."""
    waiting: deque[Row] = deque()

    def prompts() -> Iterator[Any]:
        for row in rows:
            waiting.append(row)
            yield row["prompt"]

    for _, completions in in_order(engine, prompts(), samples, params, first_index):
        yield waiting.popleft(), completions


def verified(
    groups: Iterable[tuple[Row, list[Completion]]],
    verifiers: Verifiers,
    generator: str,
    budget: ErrorBudget,
    first_index: int = 0,
) -> Iterator[list[Row]]:
    """Yields each prompt's COMPLETIONS rows, in order. A failed sample is an error and isn't verified.

    Raises:
        EngineError: the share of errors is above the budget.
    """

    def questions(group: tuple[Row, list[Completion]]) -> Iterator[tuple[Any, str, Any, str]]:
        row, completions = group
        instruction = last_user_text(row)
        for completion in completions:
            failed = completion.finish_reason == "error"
            budget.count(failed, completion.error)  # here already, so that an engine that is down stops the stage
            if not failed:
                yield row["task"], completion.text, row["reference"], instruction

    for (row, completions), verdicts in answered(groups, questions, verifiers.verify_many):
        given = iter(verdicts)
        rows: list[Row] = []
        for index, completion in enumerate(completions, start=first_index):
            if completion.finish_reason == "error":
                verdict = Verdict.error(f"not sampled: {completion.error}")
            else:
                verdict = next(given)
                # A timeout is no error of ours: a program that never ends is a fact of sampled code.
                if verdict.verdict == "error" and not verdict.detail.startswith("timeout"):
                    budget.count(True, verdict.detail, seen_before=True)
            rows.append(completion_row(row, index, completion, verdict, generator))
            if row["task"] == "code":
                rows[-1]["sandbox_level"] = verifiers.sandbox_level
        yield rows
    budget.check()


def answered(
    groups: Iterable[Group],
    questions: Callable[[Group], Iterable[Question]],
    answer: Callable[[Iterable[Question]], Iterator[Reply]],
) -> Iterator[tuple[Group, list[Reply]]]:
    """Yields each group with the answers to its own questions, while `answer` sees one long stream of them.

    Args:
        groups: what is asked about, read only as far ahead as `answer` reads.
        questions: a group's questions, any number of them.
        answer: gives one reply a question, in order.
    """
    waiting: deque[tuple[Group, int]] = deque()

    def stream() -> Iterator[Question]:
        for group in groups:
            asked = list(questions(group))
            waiting.append((group, len(asked)))
            yield from asked

    replies: list[Reply] = []
    for reply in answer(stream()):
        while waiting[0][1] == 0:
            yield waiting.popleft()[0], []
        replies.append(reply)
        if len(replies) == waiting[0][1]:
            yield waiting.popleft()[0], replies
            replies = []
    for group, count in waiting:
        if count:
            raise RuntimeError(f"{count} questions got {len(replies)} answers")
        yield group, []


def why_lost(row: Row) -> str:
    """Why a completion is no demonstration, for the table of what was lost.

    `lost`, where a stage sets it, says it of one that passed.
    """
    if row["verdict"] == "error":
        return "not sampled" if row["detail"].startswith("not sampled") else "could not be verified"
    if row["verdict"] == "failed":
        return "wrong, and cut off at max_tokens" if row["finish_reason"] == "length" else "wrong"
    if row["finish_reason"] != "stop":
        return "right, but cut off at max_tokens"
    return str(row.get("lost") or "right, but not kept")


class Tally:
    """Counts a sampling stage's completions, for its progress and its summary."""

    def __init__(self) -> None:
        self.prompts = self.solved = self.kept = self.errors = self.truncated = 0
        self.samples: Counter[str] = Counter()
        self.passed: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()

    def count(self, rows: list[Row]) -> None:
        """Takes one prompt's completions in."""
        self.prompts += 1
        self.solved += any(row["verdict"] == "passed" for row in rows)
        for row in rows:
            family = str(row["family"])
            self.samples[family] += 1
            self.passed[family] += row["verdict"] == "passed"
            self.errors += row["verdict"] == "error"
            self.truncated += row["finish_reason"] == "length"
            self.kept += bool(row.get("kept"))
            if not row.get("kept", row["verdict"] == "passed"):
                self.lost[why_lost(row)] += 1

    def yielded(self) -> str:
        """How many of the samples passed, for the progress."""
        passed, samples = self.passed.total(), self.samples.total()
        return f"{passed} of {samples} ({100 * passed // samples if samples else 0}%)"

    def summary(self) -> dict[str, Any]:
        """The figures for the manifest; `passed_share` is by family."""
        return {
            "prompts": self.prompts,
            "samples": self.samples.total(),
            "passed": self.passed.total(),
            "passed_share": {family: round(self.passed[family] / n, 4) for family, n in sorted(self.samples.items())},
            "solved_prompts": self.solved,
            "kept": self.kept,
            "kept_per_prompt": round(self.kept / self.prompts, 4) if self.prompts else None,
            "truncated": self.truncated,
            "errors": self.errors,
            "yield": {
                "prompts": self.prompts,
                "sampled": self.samples.total(),
                "passed": self.passed.total(),
                "kept": self.samples.total() - self.lost.total(),
            },
            "lost": dict(self.lost.most_common()),
        }

    def check(self, stage: str, table: str, skipped: Counter[str]) -> None:
        """Refuses a run that had nothing to sample.

        Raises:
            DataError: no prompt was sampled.
        """
        if not self.prompts:
            reasons = ", ".join(f"{why}: {count}" for why, count in skipped.most_common()) or "the table is empty"
            raise DataError(
                f"{stage}: {table} has no prompt to sample ({reasons}); prompts need a task and a reference (the stage "
                "`prompts` gives them), and a split that the setting `splits` names"
            )
