from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.core.errors import DataError, RecipeError
from align.train.batches import cut, deal
from align.train.data import batch_order, tokens_on_disk
from align.train.settings import Speed, TrainSettings
from align.train.trainer import learning_rate_factor


def settings(**more: object) -> TrainSettings:
    return TrainSettings.model_validate({"learning_rate": 1e-3, "epochs": 1.0, "max_length": 64} | more)


def test_every_row_comes_once_an_epoch_and_the_last_batch_is_filled_from_a_further_pass() -> None:
    """10 rows, 2 epochs, batches of 8: 20 rows make 3 batches of 8 = 24, so that 4 rows come a third time."""
    order = batch_order(np.arange(10), 2.0, 8, seed=1)
    times = np.bincount(order, minlength=10)
    assert len(order) == 24
    assert sorted(times) == [2] * 6 + [3] * 4


def test_rows_of_like_length_meet_in_a_batch() -> None:
    """Of 64 rows of lengths 0..63 a batch of 8 spans 7 where sorted; at random it spans about 50."""
    order = batch_order(np.random.default_rng(0).permutation(64), 1.0, 8, seed=1)
    lengths = np.random.default_rng(0).permutation(64)[order].reshape(8, 8)
    assert (lengths.max(1) - lengths.min(1) == 7).all()


def test_long_batches_do_not_all_come_last() -> None:
    order = batch_order(np.arange(64), 1.0, 8, seed=1)
    assert list(order[::8]) != sorted(order[::8])


def test_the_order_depends_on_the_seed_alone() -> None:
    lengths = np.arange(40)
    assert (batch_order(lengths, 2.0, 8, 5) == batch_order(lengths, 2.0, 8, 5)).all()
    assert (batch_order(lengths, 2.0, 8, 5) != batch_order(lengths, 2.0, 8, 6)).any()


def test_where_nothing_is_padded_chance_alone_decides_which_rows_meet() -> None:
    """Of 64 rows of lengths 0..63 a batch of 8 then spans about 50."""
    order = batch_order(np.arange(64), 2.0, 8, seed=1, by_length=False)
    assert sorted(order[:64]) == sorted(order[64:]) == list(range(64))
    assert np.ptp(order.reshape(16, 8), axis=1).min() > 20


def test_a_step_s_rows_are_dealt_so_that_processes_have_as_much_to_do() -> None:
    """The longest first, there and back: 9 6 5 2 to the first, 8 7 4 3 to the second; 22 tokens each."""
    lengths = np.array([2, 3, 4, 5, 6, 7, 8, 9])
    assert [lengths[share].tolist() for share in deal(lengths, 2)] == [[9, 6, 5, 2], [8, 7, 4, 3]]
    assert sorted(np.concatenate(deal(np.arange(7), 3))) == list(range(7))


def test_micro_batches_hold_so_many_tokens_and_rows_and_never_cut_a_row() -> None:
    """Flat, 10 tokens: 12 | 6 4 | 4 3 2. Padded, as long as the longest: 12 | 6 | 4 4 | 3 2. Two rows: pairs."""
    lengths = np.array([12, 6, 4, 4, 3, 2])
    assert cut(lengths, True, 10, 99) == [[0], [1, 2], [3, 4, 5]]
    assert cut(lengths, False, 10, 99) == [[0], [1], [2, 3], [4, 5]]
    assert cut(lengths, True, 99, 2) == [[0, 1], [2, 3], [4, 5]]


def test_processes_that_must_run_in_step_get_as_many_micro_batches() -> None:
    assert [len(cut(np.full(n, 5), True, 99, 99, at_least=3)) for n in (6, 3, 2)] == [3, 3, 2]


def test_data_smaller_than_a_batch_give_one_step_on_all_of_it() -> None:
    assert sorted(batch_order(np.arange(5), 1.0, 8, seed=1)) == [0, 1, 2, 3, 4]


def test_rows_left_out_are_counted_by_reason_and_a_second_call_reads_the_file(tmp_path: Path) -> None:
    rows: list[Any] = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, "too_long", {"input_ids": [4], "labels": [4]}]
    path = tmp_path / "tokens.arrow"
    data, counts = tokens_on_disk(path, rows, "demonstration")
    assert counts == {"rows": 2, "too_long": 1}
    assert data[0] == {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "length": 3}
    again, counts = tokens_on_disk(path, [], "demonstration")
    assert (len(again), counts["too_long"]) == (2, 1)


def test_nothing_left_to_train_on_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no demonstration to train on: 2 too_long"):
        tokens_on_disk(tmp_path / "tokens.arrow", ["too_long", "too_long"], "demonstration")


def test_the_cosine_falls_from_the_peak_to_its_floor() -> None:
    """Half way the cosine is 1/2 of the way: 0.1 + 0.9 / 2 = 0.55."""
    s = settings(lr_scheduler="cosine", min_lr_ratio=0.1)
    assert [learning_rate_factor(s, p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.55, 0.1])


def test_the_linear_schedule_warms_up_and_falls() -> None:
    """Warm-up is the first fifth; half of the rest is behind at 0.6, where 1 has fallen to 0.5."""
    s = settings(lr_scheduler="linear", min_lr_ratio=0.0, warmup_ratio=0.2)
    assert [learning_rate_factor(s, p) for p in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_a_constant_schedule_stays() -> None:
    s = settings(lr_scheduler="constant")
    assert [learning_rate_factor(s, p) for p in (0.0, 0.7, 1.0)] == [1.0, 1.0, 1.0]


def test_the_global_batch_is_split_over_processes_and_accumulation() -> None:
    assert Speed(device="cpu", micro_batch_size=4).split(128, processes=8) == (4, 4)
    assert Speed(device="cpu").split(128, processes=1) == (32, 4)
    assert Speed(device="cuda").split(128, processes=2) == (8, 8)
    assert Speed(device="cpu").split(7, processes=1) == (7, 1)
    assert math.prod(Speed(device="cpu", micro_batch_size=64).split(16, processes=1)) == 16


def test_a_micro_batch_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(RecipeError, match=r"micro_batch_size: 3 doesn't divide the 8 rows.*1, 2, 4, 8"):
        Speed(micro_batch_size=3).split(16, processes=2)


def test_a_global_batch_that_the_processes_can_not_share_is_refused() -> None:
    with pytest.raises(RecipeError, match="global_batch_size: 9 rows can't be shared by 2 processes"):
        Speed().split(9, processes=2)


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(RecipeError, match="precision: fp8"):
        Speed.of({"device": "cpu", "precision": "fp8"})
