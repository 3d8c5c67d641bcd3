"""What a person sees while a step runs."""

from __future__ import annotations

import io

import pytest

from align.progress import Lines, Silent, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("align.progress.time", clock)
    return clock


def test_plain_lines_come_every_few_seconds_with_rate_figures_and_time_left(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Lines("reject", stream)
    progress.start(296, "prompts")
    for _ in range(120):
        clock.now += 0.125
        progress.advance(1, passed=80, loss=0.12345678)
    progress.close()
    assert stream.getvalue().splitlines() == [
        "  reject: 0 of 296 prompts (0%)",
        "  reject: 40 of 296 prompts (13%), 8.0/s, passed 80, loss 0.1235, 32 s left",
        "  reject: 80 of 296 prompts (27%), 8.0/s, passed 80, loss 0.1235, 27 s left",
        "  reject: 120 of 296 prompts (40%), 8.0/s, passed 80, loss 0.1235, 22 s left",
    ]


def test_no_time_left_is_guessed_from_one_slow_first_thing_or_without_a_total(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Lines("evaluate", stream)
    progress.start(1500, "completions")
    clock.now += 13.5
    progress.advance()
    progress.start(None, "prompts")
    clock.now += 10
    progress.advance(40)
    assert stream.getvalue().splitlines() == [
        "  evaluate: 0 of 1500 completions (0%)",
        "  evaluate: 1 of 1500 completions (0%), 13.5 s each",
        "  evaluate: 0 prompts",
        "  evaluate: 40 prompts, 4.0/s",
    ]


def test_a_training_that_goes_on_counts_only_its_own_steps_for_the_rate(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Lines("sft", stream)
    progress.start(1000, "steps")
    progress.advance(900)
    for _ in range(20):
        clock.now += 0.5
        progress.advance()
    assert stream.getvalue().splitlines()[-1] == "  sft: 920 of 1000 steps (92%), 2.0/s, 40 s left"


def test_on_a_terminal_one_line_is_written_over_and_said_lines_stay() -> None:
    stream = Terminal()
    progress = Lines("sft", stream, every_s=0)
    progress.start(2, "steps")
    progress.advance()
    progress.say("\x1b[32mgreen\x1b[0m")
    progress.close()
    written = stream.getvalue()
    assert written.count("\n") == 1 and written.endswith("  sft: \x1b[32mgreen\x1b[0m\n")
    assert written.startswith("\r\x1b[2K  sft: 0 of 2 steps (0%)\r\x1b[2K  sft: 1 of 2 steps (50%)")


def test_colours_are_left_out_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    Lines("sft", stream).say("\x1b[32mgreen\x1b[0m")
    assert stream.getvalue() == "  sft: green\n"


def test_the_processes_beside_the_first_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    silent = Silent()
    silent.start(3, "steps")
    silent.advance(1, loss=1.0)
    silent.say("hello")
    silent.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (4800, "1 h 20 min")],
)
def test_durations_are_said_as_a_person_would(seconds: float, said: str) -> None:
    assert duration(seconds) == said
