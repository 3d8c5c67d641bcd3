from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from align.core.errors import RunError
from align.train import reference
from align.train.reference import LogpCache, cached_logps, pair_digest, setup_of, weights_digest
from tests.train.tiny import make_model


def pairs(count: int = 3) -> Dataset:
    return Dataset.from_list(
        [{"prompt_ids": [1, 2], "chosen_ids": [3, number], "rejected_ids": [4]} for number in range(count)]
    )


def cache(folder: Path, said: list[str] | None = None, **setup: Any) -> LogpCache:
    return LogpCache(folder, {"weights": "w", "code": 1} | setup, (said if said is not None else []).append)


class Counted:
    """Computes (number of the pair, -1), and remembers for which pairs it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, some: Any) -> Any:
        numbers = [pair["chosen_ids"][1] for pair in some]
        self.asked += numbers
        return np.array([[number, -1] for number in numbers], np.float32)


def logps(kept: LogpCache, some: Any, compute: Any) -> Any:
    return cached_logps(kept, some, compute, main=True, agree=lambda thing: thing)


def test_a_second_run_asks_for_nothing_and_one_with_more_pairs_for_the_new_ones(tmp_path: Path) -> None:
    first, second, third = Counted(), Counted(), Counted()
    found, counts = logps(cache(tmp_path), pairs(3), first)
    assert found.tolist() == [[0, -1], [1, -1], [2, -1]]
    assert counts == {"computed": 3, "from_cache": 0}
    again, counts = logps(cache(tmp_path), pairs(3).select([2, 0]), second)  # in another order
    assert (again.tolist(), second.asked) == ([[2, -1], [0, -1]], [])
    assert counts == {"computed": 0, "from_cache": 2}
    more, counts = logps(cache(tmp_path), pairs(5), third)
    assert (more.tolist()[4], third.asked, counts["from_cache"]) == ([4, -1], [3, 4], 3)


def test_another_setup_finds_nothing(tmp_path: Path) -> None:
    logps(cache(tmp_path), pairs(), Counted())
    other = Counted()
    logps(cache(tmp_path, code=2), pairs(), other)
    assert other.asked == [0, 1, 2]


def test_a_pair_is_known_by_its_ids_and_by_where_they_are_cut() -> None:
    one = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}
    others = [
        one | {"prompt_ids": [1], "chosen_ids": [2, 3]},
        one | {"chosen_ids": [4], "rejected_ids": [3]},
        one | {"prompt_ids": [2, 1]},
        one | {"rejected_ids": [4, 4]},
    ]
    assert len({pair_digest(pair) for pair in [one, *others]}) == 5
    assert pair_digest(one) == pair_digest({name: np.array(ids, np.int32) for name, ids in one.items()})


SETUP = {"precision": "fp32", "device": "cpu"}


def changed_weight() -> Any:
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    return model


def with_rope() -> Any:
    model = make_model()
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    return model


def with_attention() -> Any:
    model = make_model()
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize(
    ("what", "model", "more"),
    [
        ("weights", changed_weight, {}),
        ("weights", lambda: make_model().bfloat16(), {}),
        ("config", with_rope, {}),
        ("attention", with_attention, {}),
        ("precision", make_model, {"precision": "bf16"}),
        ("device", make_model, {"device": "mps"}),
    ],
)
def test_whatever_changes_a_figure_changes_the_key(what: str, model: Any, more: dict[str, str], tmp_path: Path) -> None:
    before, after = setup_of(make_model(), **SETUP), setup_of(model(), **SETUP | more)
    assert [name for name in before if before[name] != after[name]] == [what]
    keys = [LogpCache(tmp_path, setup, print).key for setup in (before, after)]
    assert keys[0] != keys[1]


def test_other_versions_and_other_code_change_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = {LogpCache(tmp_path, setup_of(make_model(), **SETUP), print).key}
    for library in ("torch", "transformers", "trl"):
        with monkeypatch.context() as patched:
            patched.setattr(reference, "version", lambda name, new=library: "9" if name == new else "1")
            keys.add(LogpCache(tmp_path, setup_of(make_model(), **SETUP), print).key)
    monkeypatch.setattr(reference, "CODE", reference.CODE + 1)
    keys.add(LogpCache(tmp_path, setup_of(make_model(), **SETUP), print).key)
    assert len(keys) == 5


def test_what_changes_no_figure_keeps_the_key(tmp_path: Path) -> None:
    """Where the model lies, and what its trainer or a generation does with its configuration."""
    one = make_model()
    two = make_model()
    two.config._name_or_path, two.config.use_cache, two.config.eos_token_id = "elsewhere", False, 7
    assert setup_of(one, **SETUP) == setup_of(two, **SETUP)
    one.save_pretrained(tmp_path)
    assert weights_digest(type(one).from_pretrained(tmp_path)) == weights_digest(one)


def test_a_damaged_file_is_said_and_its_pairs_are_computed_again(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    logps(kept, pairs(2), Counted())
    logps(kept, pairs(4), Counted())
    for damage in (lambda data: data[:-7], lambda data: data[:20] + b"x" + data[21:]):
        file = sorted(kept.folder.glob("*.logps"), key=lambda path: path.stat().st_mtime_ns)[0]
        file.write_bytes(damage(file.read_bytes()))
        said: list[str] = []
        again = Counted()
        found, _ = logps(cache(tmp_path, said), pairs(4), again)
        assert found[:, 0].tolist() == [0, 1, 2, 3]
        assert len(again.asked) == 2
        assert said == [f"{file}: is damaged; its log-probabilities are computed again"]


def test_a_kill_between_two_stretches_loses_only_the_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "STRETCH", 2)

    class Killed(Counted):
        def __call__(self, some: Any) -> Any:
            if self.asked:
                raise KeyboardInterrupt
            return super().__call__(some)

    with pytest.raises(KeyboardInterrupt):
        logps(cache(tmp_path), pairs(5), Killed())
    rest = Counted()
    found, counts = logps(cache(tmp_path), pairs(5), rest)
    assert (found[:, 0].tolist(), rest.asked, counts["from_cache"]) == ([0, 1, 2, 3, 4], [2, 3, 4], 2)


def test_what_is_no_number_is_an_error_and_not_kept(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the reference gives pair 0 no finite log-probability"):
        logps(cache(tmp_path), pairs(), lambda some: np.full((len(some), 2), -np.inf, np.float32))
    assert not list(tmp_path.rglob("*.logps"))


def test_a_cache_that_is_a_file_is_said_and_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said: list[str] = []
    assert logps(cache(tmp_path / "file", said), pairs(), Counted())[0][1, 0] == 1
    assert "can't be written" in said[0]
