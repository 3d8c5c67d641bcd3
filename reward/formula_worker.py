"""The worker process of `reward.formulas`: a line with two formulas in, a line with what was found out.

It ends with its input, when the CPU time of a pair is used up (the kernel ends it then, whatever it computes), or when
it has no memory left. Its arguments are CPU seconds for a pair and MiB of address space.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys


def main() -> None:
    """Answers until the input ends."""
    cpu_s, memory = int(sys.argv[1]), int(sys.argv[2]) << 20
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    for limit, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401 - takes more than a second, which is not the first pair's

    for line in sys.stdin:
        answer, expected = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        same, problem = compare(answer, expected)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"same": same, "problem": problem}), file=answers, flush=True)


def compare(answer: str, expected: str) -> tuple[bool | None, str]:
    """Whether math-verify takes the two for the same, whichever of them is the reference; None and why it can't."""
    from math_verify import LatexExtractionConfig, parse, verify

    readable = []
    for formula in (answer, expected):
        try:
            readable.append(
                parse(
                    f"${formula}$",
                    [LatexExtractionConfig(boxed_match_priority=-1)],
                    fallback_mode="no_fallback",
                    extraction_mode="first_match",
                    parsing_timeout=None,  # the process has one
                )
            )
        except Exception:
            readable.append([])
    if not readable[1]:
        return None, "math-verify can't read the expected formula"
    if not readable[0]:
        return False, ""
    try:
        same = all(
            verify(
                one,
                other,
                float_rounding=12,
                allow_set_relation_comp=True,
                timeout_seconds=None,
                raise_on_error=True,
            )
            for one, other in (readable, readable[::-1])
        )
    except MemoryError:
        raise  # the next pair gets a process that has all of it again
    except Exception as problem:
        return None, f"math-verify can't compare the formulas ({type(problem).__name__})"
    return same, ""


if __name__ == "__main__":
    main()
