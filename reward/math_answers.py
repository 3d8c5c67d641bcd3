r"""Verifier of the task `math`: does a completion's final answer equal the reference's?

A reference is `{"answer": "72"}`; an answer given as "#### 72", as `\boxed{72}` or as a whole worked solution is read
the same way as a completion. Only a stated final answer counts: the right number inside the reasoning is no answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from align.core.records import Verdict
from reward.equations import Equation, equation_key, equations, equations_hold
from reward.formulas import NO_EXTRA, Formulas
from reward.same_answer import compare, same_answer
from reward.spellings import NUMBER

__all__ = ["Equation", "equation_key", "equations", "equations_hold", "final_answer", "same_answer", "verify"]

_ANSWER_IS = re.compile(r"\banswer\b[^\S\n]*(?:is|=|:)(?:[^\S\n]*:)?|答案[是为:：]+", re.IGNORECASE)
_QUICK = re.compile(r"[-+\d.,$%]+")
_LABEL = re.compile(r"(?:the\s+)?(?:final\s+)?answer\b\s*(?:is\b)?\s*[:=]?\s*", re.IGNORECASE)
_OPENING_NUMBER = re.compile(rf"{NUMBER}(?:[^\S\n]*/[^\S\n]*\d+)?%?")


def verify(completion: str, reference: Mapping[str, Any], formulas: Formulas | None = None) -> Verdict:
    """Passed if the completion's final answer equals the reference's.

    An error if the reference has none, or if nothing can tell whether two formulas are equal.

    Args:
        completion: a worked solution.
        reference: see above.
        formulas: asked about formulas that can't be evaluated here; without it they are errors.
    """
    expected = reference.get("answer")
    if isinstance(expected, (int, float)) and not isinstance(expected, bool):
        expected = str(expected)
    if not isinstance(expected, str) or not expected.strip():
        return Verdict.error(f"reference.answer: expected a text such as '72', found {expected!r:.200}")
    if any(marker in expected for marker in ("####", r"\boxed", r"\fbox")):
        expected = final_answer(expected)
        if expected is None:
            return Verdict.error(r"reference.answer: a solution without a final answer after #### or in \boxed{}")
    answer = final_answer(completion)
    if answer is None:
        return Verdict.of(False, r"no final answer: expected it after ####, in \boxed{} or in 'the answer is ...'")
    same = compare(answer, expected, formulas.same if formulas else None)
    shown = f"answer {_shown(answer)}, expected {_shown(expected)}"
    if same is None:
        return Verdict.error(f"undecided: {shown}: {formulas.problem if formulas else NO_EXTRA}")
    return Verdict.of(same, shown)


def final_answer(text: str) -> str | None:
    r"""The answer that a solution states; None if it states none.

    What stands after the last `####`; else in the last `\boxed{}`; else in a closing sentence "the answer is ...",
    after which no other number comes.
    """
    return _after_marker(text) or _boxed(text) or _in_sentence(text)


def _after_marker(text: str) -> str | None:
    """The line after the last `####`, unless that is a heading or an answer in a box follows."""
    _, marker, after = text.rpartition("####")
    if not marker:
        return None
    after = after.strip()
    if _QUICK.fullmatch(after):
        return after
    if r"\boxed" in after:
        return None
    label = _LABEL.match(after)
    line, _, below = after[label.end() if label else 0 :].partition("\n")
    is_heading = below.strip() and re.match(r"[*_\s]*[A-Za-z]{3,}", line)
    return None if is_heading else line.strip() or None


def _boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, its braces matched; None where it is not closed."""
    last = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if last < 0:
        return None
    content = text[last:].removeprefix(r"\boxed").removeprefix(r"\fbox").lstrip()
    if not content.startswith("{"):
        bare = re.match(r"[^\s$.{}]+", content)
        return bare[0] if bare else None
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", content, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return content[1 : brace.start()].strip() or None
    return None


def _in_sentence(text: str) -> str | None:
    """What the last "the answer is ..." says, provided that no number follows its sentence."""
    opening = None
    for opening in _ANSWER_IS.finditer(text):  # noqa: B007 - the last is wanted
        pass
    if opening is None:
        return None
    sentence, _, rest = text[opening.end() :].strip().partition("\n")
    end = re.search(r"\.(?=\s+[A-Z])", sentence)
    if end:
        sentence, rest = sentence[: end.start()], sentence[end.end() :] + rest
    if re.search(r"\d", rest):
        return None
    sentence = re.sub(r"^[*_:\s]*(?:(?:equal to|approximately|about)\s+)?", "", sentence[:1000])
    formula = re.match(r"\$([^$]+)\$|\\\((.+?)\\\)", sentence)
    if formula:
        return formula[1] or formula[2]
    number = _OPENING_NUMBER.match(sentence)
    if number is None:
        return sentence.strip() or None
    after = sentence[number.end() :]
    if re.match(r"\s*[-+*/=^×÷]\s*[\d$(]", after):  # "the answer is 3 + 4 = 7"
        return sentence.rpartition("=")[2] if "=" in after else sentence
    several = re.search(r"\b(?:or|and|to)\b[^.]*\d", after)
    return None if several else number[0].rstrip(".") + _unit(after)


def _unit(after: str) -> str:
    """A scale that follows a number belongs to it ("2 million"); other words don't matter."""
    word = re.match(r"\s*(?:hundred|thousand|million|billion|trillion)\b", after, re.IGNORECASE)
    return word[0] if word else ""


def _shown(answer: str) -> str:
    if len(answer) < 40 and answer.isprintable() and "  " not in answer:
        return repr(answer.strip())
    text = " ".join(answer[:500].split())
    return repr(text if len(text) <= 80 else text[:77] + "...")
