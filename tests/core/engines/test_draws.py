from __future__ import annotations

import math

import numpy as np
import torch

from align.core.engines.base import SamplingParams
from align.core.engines.draws import choose, logprobs_of, sample_key, uniforms

# Probabilities 0.5, 0.25, 0.125, 0.125 at temperature 1.
LOGITS = torch.tensor([[3.0, 2.0, 1.0, 1.0]]) * math.log(2)


def _chosen(u: float, **settings: float) -> int:
    params = SamplingParams(**settings)  # type: ignore[arg-type]
    token, usable, _ = choose(LOGITS, torch.tensor([u]), params)
    assert usable.all()
    return int(token)


def test_the_stream_is_splitmix64() -> None:
    """SplitMix64 from state 0 is known to begin with 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4."""
    got = uniforms(np.zeros(2, dtype=np.uint64), np.array([0, 1]))
    assert got.tolist() == [(0xE220A8397B1DCDAF >> 40) / 2**24, (0x6E789E6AA1B965F4 >> 40) / 2**24]


def test_a_key_depends_on_seed_prompt_and_index_and_on_nothing_else() -> None:
    keys = {sample_key(0, [1, 2], 0), sample_key(1, [1, 2], 0), sample_key(0, [1, 3], 0), sample_key(0, [1, 2], 1)}
    assert len(keys) == 4
    assert sample_key(0, [1, 2], 0) == sample_key(0, (1, 2), 0) == 14202844574646479967


def test_uniforms_are_uniform_and_below_one() -> None:
    keys = np.array([sample_key(0, [7], i) for i in range(2000)], dtype=np.uint64)
    values = np.concatenate([uniforms(keys, np.full(2000, i)) for i in range(5)])
    assert values.min() >= 0 and values.max() < 1
    counts = np.histogram(values, 10, (0, 1))[0]
    # Chi-square with 9 degrees of freedom; 27.9 is passed once in a thousand.
    assert ((counts - 1000) ** 2 / 1000).sum() < 27.9


def test_inverse_transform_takes_the_token_whose_interval_holds_u() -> None:
    assert [_chosen(u) for u in (0.0, 0.49, 0.51, 0.74, 0.76, 0.87, 0.88, 0.9999999)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_temperature_one_half_squares_the_probabilities() -> None:
    """Squares 16, 4, 1, 1 of 22: the first interval ends at 0.7272…, the second at 0.9090…"""
    assert [_chosen(u, temperature=0.5) for u in (0.72, 0.73, 0.90, 0.92, 0.96)] == [0, 0 + 1, 1, 2, 3]


def test_temperature_zero_is_greedy_and_reads_no_randomness() -> None:
    assert {_chosen(u, temperature=0.0) for u in (0.0, 0.6, 0.99)} == {0}


def test_top_k_keeps_the_k_likeliest() -> None:
    """Of 0.5 and 0.25 the first holds two thirds."""
    assert [_chosen(u, top_k=2) for u in (0.66, 0.67, 0.9999999)] == [0, 1, 1]


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    assert _chosen(0.99, top_p=0.5) == 0  # the first alone reaches 0.5
    assert _chosen(0.99, top_p=0.51) == 1  # the first two are needed
    assert _chosen(0.99, top_p=0.01) == 0  # the likeliest is always in


def test_min_p_leaves_out_what_is_less_likely_than_that_share_of_the_likeliest() -> None:
    """Of 0.5, 0.25, 0.125, 0.125: a share of 0.3 keeps what has 0.15, so 2/3 and 1/3 are left."""
    assert [_chosen(u, min_p=0.3) for u in (0.66, 0.67, 0.9999999)] == [0, 1, 1]
    assert _chosen(0.9999999, min_p=0.24) == 3
    assert _chosen(0.9999999, min_p=1.0) == 0


def _close(u: float, logits: torch.Tensor = LOGITS, **settings: float) -> bool:
    return bool(choose(logits, torch.tensor([u]), SamplingParams(**settings)).close)  # type: ignore[arg-type]


def test_a_draw_by_a_border_between_two_tokens_is_called_close() -> None:
    """The borders are at 0.5, 0.75 and 0.875; the largest logit is 3 log 2 = 2.08, so the margin is 2.08e-6."""
    assert [_close(u) for u in (0.5 - 1.9e-6, 0.5 + 1.9e-6, 0.75 + 1.9e-6, 0.875 - 1.9e-6)] == [True] * 4
    assert [_close(u) for u in (0.0, 0.5 - 2.5e-6, 0.5 + 2.5e-6, 0.6, 0.9999999)] == [False] * 5


def test_a_filter_whose_own_border_is_near_a_token_makes_the_draw_close() -> None:
    """Two tokens of 0.125 tie for the third place; 0.5 is where the first token's mass ends; 0.5 is 0.25 / 0.5."""
    assert _close(0.1, top_k=3) and not _close(0.1, top_k=2)
    assert _close(0.1, top_p=0.5) and not _close(0.1, top_p=0.51)
    assert _close(0.1, min_p=0.5) and not _close(0.1, min_p=0.51)


def test_a_greedy_choice_between_two_almost_equal_logits_is_close() -> None:
    assert _close(0.0, torch.tensor([[4.0, 4.0 + 3e-5, 0.0]]), temperature=0)
    assert not _close(0.0, torch.tensor([[4.0, 4.0 + 5e-5, 0.0]]), temperature=0)


def test_in_sixteen_bits_no_draw_is_called_close() -> None:
    assert not _close(0.5, LOGITS.bfloat16()) and not _close(0.5, LOGITS.bfloat16(), temperature=0)


def test_u_at_its_end_never_takes_a_token_of_probability_zero() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    token = choose(logits, torch.tensor([1.0 - 2**-24]), SamplingParams()).token
    assert int(token) == 1


def test_logits_that_are_not_numbers_are_told_apart_row_by_row() -> None:
    logits = torch.stack([LOGITS[0], torch.full((4,), torch.nan)])
    for params in (SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_k=2, top_p=0.9)):
        assert choose(logits, torch.tensor([0.1, 0.1]), params)[1].tolist() == [True, False]


def test_logprobs_are_those_of_temperature_one() -> None:
    got = logprobs_of(LOGITS.repeat(4, 1), torch.arange(4))
    assert torch.allclose(got, torch.tensor([0.5, 0.25, 0.125, 0.125]).log())
