"""What the stages share that make an instruction for a text that is there: reading one, the rows, the curation."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from align.core.asking import NOT_SAMPLED, Answer, MalformedError, ask_each
from align.core.engines.base import Engine
from align.core.errors import DataError
from align.core.records import Messages, Row, message_text
from align.core.text import prompt_id_of, words
from data_synthesis.passages import Passage
from data_synthesis.sampling import ErrorBudget
from reward.judge import Judge, JudgeConfig, score, score_question

PASSAGE = "passage"
"""The generator of a completion that nobody sampled: it stands in the source."""

CUT_OFF = "cut off"
"""How the problem of an answer begins that reached `max_tokens`."""

INSTRUCTION_SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"instruction": {"type": "string"}},
        "required": ["instruction"],
        "additionalProperties": False,
    }
)
_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?```", re.DOTALL)
_SPOKEN = re.compile(r"instruction:[ \t]*\n?(.*)", re.DOTALL | re.IGNORECASE)
_POINTS_AT_IT = re.compile(
    r"\b(?:passage|text|excerpt|paragraph)s? (?:above|below)\b|\b(?:above|below|following|given|provided|this) "
    r"(?:passage|text|excerpt|paragraph)s?\b|(?:上面|上述|以上|下面|以下|本|这)(?:的)?(?:段|篇|一段)?(?:文字|文章|文本|短文|段落|内容)",
    re.IGNORECASE,
)
_SCRIPTS = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "HANGUL": "HANGUL"}


def read_instruction(text: str, most_words: int, bare: bool = False) -> str:
    """The instruction in a model's answer: a JSON object with `instruction`, or a text that begins "Instruction:".

    Args:
        text: the model's words.
        most_words: longer ones are refused (see `words`: a Chinese character counts as one).
        bare: whether a text that is neither is an instruction itself, as a backward model writes it.

    Raises:
        MalformedError: it is none, is empty or too long.
    """
    body = text.strip()
    if found := _FENCE.fullmatch(body):
        body = found[1].strip()
    if body.startswith("{"):
        try:
            value = json.loads(body, strict=False)
        except ValueError as problem:
            raise MalformedError(f"not JSON: {body[:80]!r}") from problem
        body = value.get("instruction")
        if not isinstance(body, str):
            raise MalformedError(f"an object without the text `instruction`: {text[:80]!r}")
    elif spoken := _SPOKEN.fullmatch(body):
        body = spoken[1]
    elif not bare:
        raise MalformedError(f"neither an object with `instruction` nor a text after 'Instruction:': {body[:80]!r}")
    body = body.strip()
    if not words(body):
        raise MalformedError("an empty instruction")
    if len(words(body)) > most_words:
        raise MalformedError(f"an instruction of {len(words(body))} words, {most_words} are allowed")
    return body


def points_at_text(instruction: str) -> bool:
    """Whether an instruction speaks of a text that its reader won't see ("the passage above"); English and Chinese."""
    return _POINTS_AT_IT.search(instruction) is not None


def other_script(instruction: str, passage: str) -> str | None:
    """The script of an instruction where the passage is mostly in another; None where they agree or nothing can tell.

    Chinese characters and kana count as one. It tells Chinese from English, not English from French.
    """
    asked, given = _script(instruction), _script(passage)
    return asked if asked and given and asked != given else None


def _script(text: str) -> str | None:
    letters = [sign for sign in text if sign.isalpha()]
    step = max(1, len(letters) // 500)
    names = (unicodedata.name(sign, "UNKNOWN").split()[0] for sign in letters[::step])
    found = Counter(_SCRIPTS.get(name, name) for name in names)
    return found.most_common(1)[0][0] if found else None


def readable(answer: Answer[str], most_words: int) -> str | None:
    """The instruction in an answer that was refused for what it says; None where there is none to read."""
    try:
        return read_instruction(answer.text, most_words) if was_whole(answer) else None
    except MalformedError:
        return None


def was_whole(answer: Answer[Any]) -> bool:
    """Whether the last attempt was sampled at all, and to its end."""
    return not answer.problem.startswith((NOT_SAMPLED, CUT_OFF))


def repurposed_row(passage: Passage, instruction: str, system: str, stage: str) -> Row:
    """A COMPLETIONS row without a verdict: the instruction as prompt, the passage as it stands as completion."""
    prompt: Messages = [{"role": "system", "content": system}] if system else []
    prompt.append({"role": "user", "content": instruction})
    where = passage.columns()
    return {
        "prompt_id": prompt_id_of(prompt),
        "prompt": prompt,
        **where,
        "family": where["family"] or stage,
        "task": None,
        "reference": None,
        "sample_index": 0,
        "completion": [{"role": "assistant", "content": passage.text}],
        "reward": None,
        "verdict": "error",
        "detail": "",
        "generator": PASSAGE,
        "kept": False,
    }


def judged(
    rows: Iterable[Row], engine: Engine, config: JudgeConfig, seed: int, stage: str, max_error_share: float
) -> Iterator[Row]:
    """Yields the rows with the judge's verdict on the completion as an answer to the prompt.

    Rows that have failed already are passed on as they are. Every vote and the judge's words stand in `judgement` (JSON
    text), the mean of its votes, on its own scale, in `score`; `kept` is whether it passes.

    Raises:
        EngineError: too many judgements can't be read.
    """
    judge = Judge(engine, config, seed, needs=("instruction", "completion"))
    budget = ErrorBudget(f"{stage} (judge)", max_error_share)

    def questions() -> Iterator[tuple[Row, list[Any]]]:
        for row in rows:
            values = {"instruction": row["prompt"], "completion": message_text(row["completion"])}
            asked = score_question(judge.template, values, config.scale, config.judge_json)
            yield row, [] if row["verdict"] == "failed" else [asked]

    for row, found in ask_each(
        engine, questions(), judge.params, config.judge_attempts, config.judge_votes, whole=True
    ):
        if found:
            judgement = score(found[0], config.scale, config.judge_attempts)
            verdict = judgement.verdict
            budget.count(verdict.verdict == "error", verdict.detail)
            row["verdict"], row["reward"], row["detail"] = verdict.verdict, verdict.reward, verdict.detail
            row["score"] = judgement.figures()["mean"]
            row["judgement"] = json.dumps(judgement.figures(), ensure_ascii=False)
            row["kept"] = verdict.verdict == "passed"
        yield row
    budget.check()


def decided(row: Row, refused: tuple[str, str] | None, counts: Yield) -> Row:
    """The row with the rules' verdict: passed, until a judge says more, or failed where the instruction is refused."""
    row["verdict"], row["reward"] = ("failed", 0.0) if refused else ("passed", 1.0)
    row["detail"] = ": ".join(refused) if refused else "no rule refuses it"
    row["refused"] = refused[0] if refused else None
    row["kept"] = refused is None
    row["score"], row["judgement"] = None, None
    if refused is None:
        counts.passed()
    return row


class Yield:
    """Counts what each step of a stage left, and why the rest was lost.

    Attributes:
        steps: how many came through each step, in order; the last is `kept`.
        lost: how many were lost after `asked`, by reason: `asked` less all of them is `kept`.
    """

    def __init__(self, *steps: str) -> None:
        self.steps: dict[str, int] = dict.fromkeys(steps, 0)
        self.lost: Counter[str] = Counter()

    def passed(self) -> None:
        """An instruction came through the rules: the step before `kept`."""
        self.steps[list(self.steps)[-2]] += 1

    def judged(self, row: Row) -> None:
        """Takes in a row that is done."""
        self.steps["kept"] += row["kept"]
        if not row["kept"]:
            failed = "the judge finds it no good answer" if row["verdict"] == "failed" else "the judge gave no score"
            self.lost[row.get("refused") or failed] += 1

    def summary(self) -> dict[str, Any]:
        """For the manifest."""
        return {"yield": dict(self.steps), "lost": dict(self.lost.most_common())}

    def check(self, stage: str, table: str, skipped: Counter[str]) -> None:
        """Refuses a run that had nothing to ask about.

        Raises:
            DataError: there was no passage.
        """
        if not next(iter(self.steps.values())):
            reasons = ", ".join(f"{why}: {count}" for why, count in skipped.most_common()) or "the table is empty"
            raise DataError(
                f"{stage}: {table} has no passage to work on ({reasons}); lower min_words or min_letters, raise "
                "max_words, or take other splits"
            )


def unsampled(problem: str, what: str = "the instruction") -> str:
    """Why there is nothing to go on with, as a short reason to count by."""
    return "not sampled" if problem.startswith(NOT_SAMPLED) else f"{what} can't be read"
