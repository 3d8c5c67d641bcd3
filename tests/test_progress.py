"""What a person sees while a step runs."""

from __future__ import annotations

import io

import pytest

from align.progress import Asked, Lines, Silent, duration


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


def test_no_rate_is_guessed_from_one_slow_first_thing_and_no_time_left_from_few_or_without_a_total(
    clock: Clock,
) -> None:
    stream = io.StringIO()
    progress = Lines("evaluate", stream)
    progress.start(1500, "completions")
    for _ in range(2):
        clock.now += 13.5
        progress.advance()
    progress.start(None, "prompts")
    for _ in range(2):
        clock.now += 10
        progress.advance(40)
    assert stream.getvalue().splitlines() == [
        "  evaluate: 0 of 1500 completions (0%)",
        "  evaluate: 1 of 1500 completions (0%)",
        "  evaluate: 2 of 1500 completions (0%), 13.5 s each",
        "  evaluate: 0 prompts",
        "  evaluate: 40 prompts",
        "  evaluate: 80 prompts, 4.0/s",
    ]


def test_what_is_counted_in_bursts_has_the_rate_of_whole_bursts(clock: Clock) -> None:
    """64 prompts are verified together, every 16 s: 4 a second. A line is written at the first of a burst."""
    stream = io.StringIO()
    progress = Lines("reject", stream)
    progress.start(400, "prompts")
    for _ in range(3):
        clock.now += 16
        for _ in range(64):
            progress.advance()
    assert stream.getvalue().splitlines() == [
        "  reject: 0 of 400 prompts (0%)",
        "  reject: 1 of 400 prompts (0%)",
        "  reject: 65 of 400 prompts (16%), 4.0/s, 1 min 24 s left",
        "  reject: 129 of 400 prompts (32%), 4.0/s, 1 min 08 s left",
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
    silent.watch(Asked)
    silent.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (4800, "1 h 20 min")],
)
def test_durations_are_said_as_a_person_would(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_what_comes_from_the_cache_does_not_count_for_rate_and_time_left(clock: Clock) -> None:
    """A run that goes on: 900 of 1,000 prompts, 4 samples each, are known and pass in 9 s. The other 100 take half a
    second each, so that 10 of them are 5 s, and 90 are 45 s; each gives 4 times 25 tokens in half a second."""
    asked = Asked()
    stream = io.StringIO()
    progress = Lines("reject", stream)
    progress.watch(lambda: asked)
    progress.start(1000, "prompts")
    for _ in range(900):
        clock.now += 0.01
        asked = asked._replace(reused=asked.reused + 4)
        progress.advance(passed=7)
    for number in range(50):
        clock.now += 0.5
        asked = asked._replace(sampled=asked.sampled + 4, tokens=asked.tokens + 100)
        if number == 0:
            asked = asked._replace(failed=1, sampled=3)
        progress.advance(passed=7)
    assert stream.getvalue().splitlines() == [
        "  reject: 0 of 1000 prompts (0%)",
        "  reject: 500 of 1000 prompts (50%), passed 7, 2000 from the cache",
        "  reject: 902 of 1000 prompts (90%), passed 7, 3600 from the cache, 1 failed",  # a second is too short to tell
        *(
            f"  reject: {done} of 1000 prompts ({done // 10}%), 2.0/s, 200 tokens/s, passed 7, 3600 from the cache, "
            f"1 failed, {(1000 - done) // 2} s left"
            for done in (912, 922, 932, 942)
        ),
    ]


def test_where_known_and_new_completions_are_mixed_the_new_ones_tell_how_long_it_takes(clock: Clock) -> None:
    """Of each prompt 3 samples are known and 1 is new, which takes 2 s: a prompt is a quarter of one that lacks all 4,
    which would take 8 s. After 20 prompts, 40 s, the 60 to come take 480 s if nothing of them is known."""
    asked = Asked(reused=50, sampled=50)
    stream = io.StringIO()
    progress = Lines("reject", stream, every_s=40)
    progress.watch(lambda: asked)
    progress.start(80, "prompts")
    for _ in range(20):
        clock.now += 2
        asked = asked._replace(sampled=asked.sampled + 1, reused=asked.reused + 3)
        progress.advance()
    assert stream.getvalue().splitlines()[-1] == (
        "  reject: 20 of 80 prompts (25%), 8.0 s each, 60 from the cache, 8 min 00 s left"
    )


def test_a_training_tells_loss_learning_rate_tokens_a_second_and_time_left(clock: Clock) -> None:
    """20 of 100 steps in 10 s are 2/s, so 80 more take 40 s; 20 · 150 tokens in 10 s are 300/s."""
    stream = io.StringIO()
    progress = Lines("sft", stream)
    progress.start(100, "steps")
    for _ in range(20):
        clock.now += 0.5
        progress.advance(loss=0.31, learning_rate=6.5e-6, tokens=150)
    last = stream.getvalue().splitlines()[-1]
    assert last == "  sft: 20 of 100 steps (20%), 2.0/s, 300 tokens/s, loss 0.31, learning rate 6.5e-06, 40 s left"


def test_a_long_run_writes_fewer_plain_lines(clock: Clock) -> None:
    """A line each 5 s in the first 100 s (20), each twentieth of the time up to 20 min (50), then one a minute (40)."""
    stream = io.StringIO()
    progress = Lines("sft", stream)
    progress.start(3600, "steps")
    for _ in range(3600):
        clock.now += 1
        progress.advance()
    assert 60 < len(stream.getvalue().splitlines()) < 125


def test_colours_are_for_terminals_of_people_who_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(stream: io.StringIO) -> str:
        Lines("sft", stream).say("\x1b[32m⟦learned⟧\x1b[0m")
        return stream.getvalue()

    assert said(io.StringIO()) == "  sft: ⟦learned⟧\n"
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m⟦learned⟧" in said(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in said(Terminal())
