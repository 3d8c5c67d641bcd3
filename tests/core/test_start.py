"""What a training tells before its first step, and what it foretells of its cost."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from align.core.cost import Seconds, Shape, amount, shape_of, training_flops, training_seconds
from align.core.examples import Line, Span, coloured, group, pair, supervised
from align.core.start import Batch, Start

GREEN, RED = "\x1b[32m", "\x1b[31m"


class Letters:
    """Token 65 is A, and so on."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def ids(text: str) -> list[int]:
    return list(map(ord, text))


def start(**more: Any) -> Start:
    about: dict[str, Any] = {
        "title": "SFT of tiny on rows", "examples": [], "kept": 5120, "tokens": 400_000, "learned_tokens": 100_000,
        "longest": 245, "batch": Batch(32, 8, 4), "steps": 320, "epochs": 2.0, "layout": "flat", "optimizer": "AdamW",
        "learning_rates": [0.0, 7e-6, 7e-7], "scheduler": "cosine", "parameters": 494_000_000, "trained": 494_000_000,
        "place": "cpu, fp32",
    }  # fmt: skip
    return Start(**about | more)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_supervised_tokens_stand_in_green_brackets_and_other_weights_are_told() -> None:
    row = supervised(Letters(), ids("ask:yesE\n"), [-100] * 4 + ids("yesE") + [-100], [0] * 4 + [1, 1, 1, 0.5, 0])
    text = start(examples=[row]).text(100)
    assert "ask:⟦yes⟧⟦×0.5 E⟧↵" in plain(text)
    assert f"{GREEN}⟦yes⟧" in text


def test_a_pairs_chosen_is_green_its_rejected_red_and_a_groups_worst_too() -> None:
    one = pair(Letters(), ids("ask"), ids("right"), ids("wrong"))
    other = group(Letters(), ids("ask"), [ids("w"), ids("r")], [0, 1])
    text = start(examples=[one, other]).text(100)
    assert f"{GREEN}⟦right⟧" in text and f"{RED}⟦wrong⟧" in text
    assert f"{GREEN}⟦r⟧" in text and f"{RED}⟦w⟧" in text
    assert plain(text).index("worth 1: ⟦r⟧") < plain(text).index("worth 0: ⟦w⟧")


def test_what_a_row_says_moves_no_cursor_and_makes_no_markup() -> None:
    shown = coloured([Span("a\x1b[2J[bold]b\r\n\tc")]).plain
    assert shown == "a�[2J[bold]b�↵⇥c"


def test_a_long_text_loses_its_middle_and_a_long_conversation_its_middle_turns() -> None:
    """Of 1,000 characters of context 80 stay at each end; of 21 stretches 4 at each end, 13 are left out."""
    assert coloured([Span("x" * 1000)]).plain == f"{'x' * 80} …840 characters… {'x' * 80}"
    many = coloured([Span(str(number)) for number in range(21)]).plain
    assert many.startswith("0123 … 13 more stretches … ") and many.endswith("17181920")


def test_the_facts_are_those_that_a_person_asks_for() -> None:
    """25% of the tokens are learned; 32 rows are 8 × 4."""
    told = start(
        left_out={"too_long": 12, "split_dev": 30}, max_length=4096, seconds=Seconds(734, "measured"),
        memory={"weights": 2**31, "optimizer": 2**32}, memory_there=2**34, trained=4_940_000,
    ).facts()  # fmt: skip
    assert told["rows"] == "5,120 to train on; left out: 12 too long, 30 split dev"
    assert told["tokens"].startswith("400,000, of which 100,000 are learned (25%)")
    assert "245 of at most 4,096" in told["tokens"]
    assert told["steps"] == "320 of 32 rows (8 at once × 4 accumulated × 1 process); 2 epochs"
    assert told["optimizer"] == "AdamW; learning rate 0 → 7e-06 → 7e-07, cosine " + "▁" * 4 + "█" * 8 + "▁" * 4
    assert told["weights"] == "494 M, 4.94 M of them trained (1.0%); cpu, fp32"
    assert told["memory"] == "about 6.0 GiB (weights 2.0 GiB, optimizer 4.0 GiB); 16 GiB are free"
    assert told["time"] == "about 12 min 14 s (measured)"
    assert start().facts()["time"] == "unknown until the first steps"
    assert "loss" not in start().facts()


def test_it_fits_on_a_screen_of_any_width() -> None:
    rows = [supervised(Letters(), ids("ask " * 900 + "answer " * 900), [-100] * 3600 + ids("answer " * 900))] * 2
    text = plain(start(examples=rows, memory={"weights": 2**31}, loss="cross-entropy").text(80))
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) < 40


def test_memory_that_cannot_fit_and_many_rows_too_long_are_warnings() -> None:
    tight = start(memory={"weights": 2**33}, memory_there=2**32, left_out={"too_long": 1000}, warnings=["one more"])
    assert [line.split()[:4] for line in tight.all_warnings()] == [
        ["one", "more"], ["it", "needs", "about", "8.0"], ["1,000", "of", "6,120", "rows"],
    ]  # fmt: skip
    assert "warning: it needs about 8.0 GiB" in plain(tight.text(120))
    assert tight.figures()["warnings"] == tight.all_warnings()
    assert start(memory={"weights": 2**31}, memory_there=2**32, left_out={"too_long": 10}).all_warnings() == []


def test_flops_are_two_for_each_weight_token_and_pass() -> None:
    """One token through 10 weights and, scored, a head of 6; attention: 2 · 2 layers · 3 wide · 5 tokens = 60.

    All trained: 3 · 2 · (10 + 60 + 6) = 456. Adapters: 2 · 2 · 76 = 304. Recomputed: 4 · 2 · 76 = 608. A token that is
    read only: 2 · (10 + 60) = 140 more.
    """
    full = Shape(parameters=16, trained=16, active=10, head=6, layers=2, hidden=3)
    assert training_flops(full, 1, 1, 5.0) == 456
    assert training_flops(full, 1, 1, 5.0, only_forward=1) == 456 + 140
    assert training_flops(full, 1, 1, 5.0, recomputed=True) == 608
    assert training_flops(full._replace(trained=1), 1, 1, 5.0) == 304


def test_of_experts_only_the_chosen_count_and_a_tied_head_counts_once() -> None:
    """Weights: 8 embedding (tied head), 4 dense, 12 of 3 experts of which a token meets 1: 4 + 12 / 3 = 8 active."""

    def weight(count: int, trained: bool = True) -> Any:
        return SimpleNamespace(numel=lambda: count, requires_grad=trained)

    table = SimpleNamespace(weight=weight(8, False))
    model = SimpleNamespace(
        config=SimpleNamespace(
            get_text_config=lambda: SimpleNamespace(
                num_experts=3, num_experts_per_tok=1, num_hidden_layers=2, hidden_size=4
            )
        ),
        get_input_embeddings=lambda: table,
        get_output_embeddings=lambda: table,
        named_parameters=lambda: [("embed", table.weight), ("up", weight(4)), ("mlp.experts.up", weight(12))],
    )
    assert shape_of(model) == Shape(parameters=24, trained=16, active=8, head=8, layers=2, hidden=4)


def test_the_time_of_a_small_model_is_not_foretold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of 4e9 FLOP a second are reached on a CPU: 2e10 take 10 s."""
    shape = Shape(30_000_000, 30_000_000, 30_000_000, 0, 2, 64)
    monkeypatch.setattr("align.core.cost.matmul_speed", lambda *_: 4e9)
    found = training_seconds(2e10, shape, "cpu", "fp32")
    assert found is not None and found.seconds == 10
    assert training_seconds(2e10, shape._replace(active=1000), "cpu", "fp32") is None


def test_bytes_are_told_as_people_say_them() -> None:
    assert [amount(size) for size in (17, 2**11, 3 * 2**20, 2**30 * 1.44, 2**34)] == [
        "17 B", "2 KiB", "3.0 MiB", "1.4 GiB", "16 GiB",
    ]  # fmt: skip


def test_the_first_of_many_completions_and_the_last_are_shown() -> None:
    lines: list[Line] = list(group(Letters(), ids("q"), [ids(str(n)) for n in range(6)], list(range(6)), most=2))
    assert [line.name for line in lines] == ["prompt", "worth 5", "worth 0"]
