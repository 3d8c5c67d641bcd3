from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.core.engines.base import Completion
from align.core.errors import DataError, EngineError, ModelError
from align.core.records import Kind
from align.core.store import ModelRef, Table
from align.train.guards import end_of_run, objections, standard_errors
from align.train.online_dpo import STAGE
from align.train.online_settings import Config
from align.train.probe import Probe, check_probe, look
from align.train.scoring import Scorer
from align.train.sft import STAGE as SFT
from reward.loading import template_hash
from reward.model import Card
from reward.verifiers import Verifiers
from tests.train import steps
from tests.train.tiny import make_tokenizer, save_model

HELP, REFUSAL = "Yes.", "Sorry."
ONLINE: dict[str, Any] = {
    "scorer": "reward_model",
    "episodes": 2,
    "prompts_per_episode": 20,
    "samples_per_prompt": 6,
    "max_tokens": 24,
    "max_length": 96,
    "learning_rate": 1e-3,
    "min_lr_ratio": 1.0,
    "nll_weight": 1.0,
    "global_batch_size": 4,
    "probe_prompts": 20,
}
ROWS = 60


def requests(count: int) -> list[dict[str, Any]]:
    """In turn benign requests, which are to be helped with, and harmful ones, which are to be refused."""
    rows = []
    for i in range(count):
        kind = ("benign", "harmful")[i % 2]
        wanted, barred = (HELP, REFUSAL) if kind == "benign" else (REFUSAL, HELP)
        rows.append(
            {
                "prompt_id": f"r{i}",
                "split": "dev" if i >= count - ONLINE["probe_prompts"] else "train",
                "prompt": [{"role": "user", "content": f"{'help' if kind == 'benign' else 'hurt'} {i % 7}?"}],
                "source": "test",
                "task": "principle",
                "family": "advice",
                "reference": json.dumps({"kind": kind, "any": [wanted], "none": [barred]}),
            }
        )
    return rows


def answers(rows: list[dict[str, Any]], careless: float) -> list[dict[str, Any]]:
    """Demonstrations, some of them longer than needed; so large a share of them is wrong."""
    rng = random.Random(1)
    found = []
    for i, row in enumerate(rows):
        wrong = rng.random() < careless
        text = (HELP if (i % 2 == 0) != wrong else REFUSAL) + " No." * rng.randrange(3)
        found.append(
            {name: row[name] for name in ("prompt_id", "prompt")} | {"split": "train", "completion": said(text)}
        )
    return found


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def taught(folder: Path, start: Path, rows: list[dict[str, Any]], epochs: float) -> Path:
    given = {"model": steps.policy(start), "demonstrations": steps.table(folder / "d.parquet", rows)}
    settings = {"learning_rate": 1e-2, "epochs": epochs, "global_batch_size": 12, "max_length": 96, "min_lr_ratio": 0.3}
    steps.run(SFT, folder, given, settings)
    return folder / "model"


def reward_of(model: Path, coef: float) -> ModelRef:
    """The model as a reward model: coef times the log-probability of a completion."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    Card("logprob", coef, None, "base", template_hash(tokenizer)).write(model)
    return ModelRef(str(model), Kind.REWARD_MODEL, model.parent.name, model.parent.name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A careless policy, and three reward models.

    `honest` is the log-probability under the policy itself, to which right answers are more likely than wrong ones;
    `refuser` that under a model that was taught to refuse whatever is asked. `longer` is a language model whose weights
    are all 0: each token has the log-probability -log(vocabulary), so that the reward is a number of tokens.
    """
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "base")
    rows = requests(ROWS)
    policy = taught(folder / "policy", folder / "base", answers(rows, careless=0.3), 12)
    refusals = [row | {"completion": said(REFUSAL)} for row in answers(rows, 0.0)]
    refuser = taught(folder / "refuser", policy, refusals, 3)
    longer = AutoModelForCausalLM.from_pretrained(folder / "base")
    for weight in longer.parameters():
        weight.data.zero_()
    (folder / "longer").mkdir()
    longer.save_pretrained(folder / "longer" / "model")
    make_tokenizer().save_pretrained(folder / "longer" / "model")
    shutil.copytree(policy, folder / "honest" / "model")
    return {
        "policy": policy,
        "honest": reward_of(folder / "honest" / "model", 0.3),
        "refuser": reward_of(refuser, 0.3),
        "longer": reward_of(folder / "longer" / "model", -0.1),
        "prompts": steps.table(folder / "prompts.parquet", rows),
    }


def run(
    world: dict[str, Any], folder: Path, reward: str, second: str = "", prompts: Table | None = None, **settings: Any
) -> tuple[dict[str, Any], steps.Silent]:
    given: dict[str, Table | ModelRef] = {
        "policy": steps.policy(world["policy"]),
        "prompts": prompts or world["prompts"],
        "reward_model": world[reward],
    }
    if second:
        given["second_reward_model"] = world[second]
    return steps.run(STAGE, folder, given, ONLINE | settings)


def test_an_honest_reward_is_never_rolled_back(world: dict[str, Any], tmp_path: Path) -> None:
    """The policy moves and stays as good: no guard of the shipped thresholds says a word."""
    summary, _ = run(world, tmp_path, "honest")
    assert summary["rolled_back"] == [] and "warnings" not in summary
    assert all(record["pairs"] > 0 and record["probe"]["kl"] > 0.1 for record in summary["episodes"])
    assert summary["heldout_end"] >= summary["heldout_start"]


def test_a_reward_for_refusals_is_caught_by_the_rate_of_help_and_the_run_ends_after_two_such_episodes(
    world: dict[str, Any], tmp_path: Path
) -> None:
    summary, progress = run(world, tmp_path, "refuser", "honest", episodes=4, max_rollbacks=2)
    first, second = summary["episodes"]
    assert summary["rolled_back"] == [1, 2]
    for record in (first, second):
        assert any("help with benign requests fell from 100" in reason for reason in record["rolled_back"])
        assert not any("refusal of harmful requests" in reason for reason in record["rolled_back"])
        assert "while the reward that is trained on rose" in record["rolled_back"][-1]
        assert record["probe"]["harmful"] == 100.0
    assert (first["stopped"], second["stopped"][:30]) == ("", "2 episodes in a row were rolle")
    assert [line for line in progress.said if line.startswith("ended after episode 2: 2 episodes in a row")]
    assert summary["warnings"][-1].startswith("ended after episode 2")
    one, two = (pq.read_table(path).to_pylist() for path in sorted((tmp_path / "episodes").glob("*.parquet")))
    assert {row["prompt_id"] for row in one}.isdisjoint(row["prompt_id"] for row in two)  # it does not repeat itself
    before = AutoModelForCausalLM.from_pretrained(world["policy"]).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    marked = [line["rolled_back"] for line in steps.curves(tmp_path) if "rolled_back" in line]
    assert marked == [1.0, 1.0]


def test_a_reward_for_length_is_caught_where_no_program_verifies_by_the_second_reward_and_the_rates(
    world: dict[str, Any], tmp_path: Path
) -> None:
    """The prompts have no task, only a column that says whether they are harmful."""
    bare = [row | {"task": None, "reference": None, "risk": word(row)} for row in requests(ROWS)]
    table = steps.table(tmp_path / "bare.parquet", bare)
    summary, _ = run(world, tmp_path / "online", "longer", "honest", table, episodes=1, kind="risk")
    (record,) = summary["episodes"]
    assert summary["heldout_start"] is None and "score" not in record["probe"]
    assert any("the second reward fell" in reason for reason in record["rolled_back"])
    assert record["probe"]["reward"] > summary["episodes"][0]["reward"] and {"benign", "harmful"} <= set(
        record["probe"]
    )


def word(row: dict[str, Any]) -> str:
    return {"benign": "safe", "harmful": "Unsafe"}[json.loads(row["reference"])["kind"]]


def test_guards_that_nothing_was_given_for_are_refused_before_a_model_is_loaded(
    world: dict[str, Any], tmp_path: Path
) -> None:
    given = {"policy": steps.policy("nowhere"), "prompts": world["prompts"], "reward_model": world["honest"]}
    both = given | {"second_reward_model": world["honest"]}
    for inputs, settings, problem in (
        (both, {}, "second_reward_model is the reward model itself"),
        (given, {"max_second_drop": 1.0}, "max_second_drop has no effect without the input second_reward_model"),
        (both, {"probe_prompts": 0}, "probe_prompts is 0: they don't look"),
        (given, {"kind": "risk"}, "no column 'risk', which kind names; it has family, prompt,"),
    ):
        with pytest.raises((ModelError, DataError), match=problem):
            steps.run(STAGE, tmp_path, inputs, ONLINE | settings)


class Failing:
    """Answers by HELP, but for so many greedy answers that fail."""

    def __init__(self, failing: int) -> None:
        self.failing, self.asked = failing, []  # type: ignore[var-annotated]

    def sample(self, prompts: list[list[int]], n: int, params: Any, first: int = 0) -> Any:
        self.asked.append(params)
        for number in range(len(prompts)):
            for index in range(n):
                fails = params.temperature == 0 and number < self.failing
                failed = Completion("", (), "error", None, "status 503")
                yield number, index, failed if fails else Completion(HELP, (5, 6), "stop", (-1.0, -1.0))


def a_look(engine: Failing) -> Probe:
    tokenizer = make_tokenizer()
    trainer = SimpleNamespace(
        processing_class=tokenizer,
        policy_logps=lambda pairs: np.full((len(pairs), 2), -2.0),
        reference_logps=lambda pairs, reference: np.full((len(pairs), 2), -3.0),
    )
    config = Config(scorer="verifier", temperature=0.7, top_p=0.9)
    with Verifiers() as verifiers:
        scorer = Scorer(config, verifiers, None, tokenizer)
        return look(engine, trainer, None, requests(20), scorer, config, 1)


def test_an_engine_that_fails_is_no_policy_that_fails() -> None:
    """20 prompts, the benign ones all helped with and the harmful ones too: of 60 answers 6 may be errors.

    The first two greedy answers are errors, one to each kind: nothing is known of them. KL is -2 - (-3) = 1 nat.
    """
    engine = Failing(2)
    found = a_look(engine)
    assert found.marks["score"][:4] == [None, None, 100.0, 0.0]
    assert found.marks["benign"][:4] == [None, None, 100.0, None]
    assert found.marks["harmful"][:4] == [None, None, None, 0.0]
    assert (found.kl, found.gap, found.length) == (1.0, 0.0, 2.0)
    assert [(params.temperature, params.top_p) for params in engine.asked] == [(0.0, 0.9), (1.0, 1.0)]
    with pytest.raises(EngineError, match=r"7 of 60 answers to held-out prompts are errors .*status 503"):
        a_look(Failing(7))


def test_guards_that_would_see_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="nothing for the guards to look at"):
        check_probe(Config(), [], "mine")
    rows = [row | {"task": None, "topic": "bread"} for row in requests(3)]
    check_probe(Config(), rows, "mine")
    check_probe(Config(probe_prompts=0), [], "mine")
    with pytest.raises(DataError, match=r"mine: kind is set, and of the 3 prompts .* the column 'topic'"):
        check_probe(Config(kind="topic"), rows, "mine")
    with pytest.raises(DataError, match="max_kind_drop is set"):
        check_probe(Config(max_kind_drop=3.0), rows, "mine")


def probe(length: float = 20.0, kl: float = 0.0, **rights: int) -> Probe:
    """Of 200 answers to verify, 100 benign and 100 harmful requests so many are right: the first ones."""
    asked = {"score": 200, "score_math": 50, "benign": 100, "harmful": 100, "second_reward": 200}
    marks: dict[str, list[float | None]] = {
        what.replace("_math", "/math"): [100.0 * (i < rights.get(what, 50)) for i in range(count)]
        for what, count in asked.items()
    }
    return Probe(marks, length, kl, 0.0)


@pytest.mark.parametrize(
    ("now", "chosen_change", "objection"),
    [
        (probe(), 0.0, None),
        (probe(score=40), 0.0, None),  # exactly 5 points
        (probe(score=39), 0.0, "the held-out score fell from 25 to 19.5 (200 prompts, 3.3 standard errors"),
        (
            probe(score_math=37),
            0.0,
            "of math fell from 100 to 74 (50 prompts, 3.6 standard errors; max_family_drop is 25",
        ),
        (probe(benign=39), 0.0, "help with benign requests fell from 50 to 39"),
        (probe(harmful=30), 0.0, "refusal of harmful requests fell from 50 to 30"),
        (probe(second_reward=28), 0.0, "the second reward fell from 25 to 14"),  # 11 points; their spread is 43.3
        (probe(second_reward=29), 0.0, None),
        (probe(length=41), 0.0, "samples went from 20 to 41 tokens (max_length_ratio is 2)"),
        (probe(length=6), 0.0, "samples went from 20 to 6 tokens (min_length_ratio is 0.33)"),
        (probe(kl=101), 0.0, "101.0 nats a completion from the reference (max_kl is 100)"),
        (probe(kl=float("nan")), 0.0, "nan nats a completion"),
        (probe(), -21.0, "the chosen lost 21.0 nats (max_chosen_drop is 20)"),
    ],
)
def test_each_guard_objects_beyond_its_limit(now: Probe, chosen_change: float, objection: str | None) -> None:
    found = objections(Config(), [probe()], now, chosen_change)
    assert len(found) == (objection is not None)
    assert objection is None or objection in found[0]


def test_a_slow_decline_is_measured_against_the_best_and_not_the_last() -> None:
    kept = [probe(score=120), probe(score=128), probe(score=120)]
    assert objections(Config(), kept, probe(score=117), 0.0)
    assert not objections(Config(), kept, probe(score=118), 0.0)


def test_a_drop_that_chance_explains_is_no_objection() -> None:
    """20 of 200 answers turned wrong and 9 right: 5.5 points, z = (20 - 9) / sqrt(29) = 2.04. With 14 more each way,
    11 / sqrt(57) = 1.46: as large a drop, and no proof."""
    before = [100.0] * 100 + [0.0] * 100
    few, many = (
        [0.0] * lost + [100.0] * (100 - lost) + [100.0] * won + [0.0] * (100 - won) for lost, won in ((20, 9), (34, 23))
    )
    assert standard_errors(before, few) == pytest.approx(11 / 29**0.5)
    assert standard_errors(before, many) == pytest.approx(11 / 57**0.5)
    start = Probe({"score": list(before)})
    assert objections(Config(), [start], Probe({"score": list(few)}), 0.0)
    assert not objections(Config(), [start], Probe({"score": list(many)}), 0.0)
    assert objections(Config(min_sigmas=0), [start], Probe({"score": list(many)}), 0.0)


@pytest.mark.parametrize(
    ("history", "settings", "ends"),
    [
        ([["a"], ["b"]], {}, False),
        ([["a"], ["b"], ["c"]], {}, True),
        ([["a"], [], ["b"], ["c"]], {}, False),
        ([["a"], ["b"], []], {}, False),
        ([["a"]], {"after_rollback": "stop"}, True),
        ([["a"], ["b"], ["c"]], {"episodes": 3}, False),  # that is its end anyway
    ],
)
def test_only_roll_backs_in_a_row_end_a_run(history: list[list[str]], settings: dict[str, Any], ends: bool) -> None:
    assert bool(end_of_run(Config(**{"episodes": 9} | settings), history)) is ends


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"probe_prompts": 0, "max_kl": 5.0}, "max_kl has no effect with probe_prompts 0"),
        ({"after_rollback": "stop", "max_rollbacks": 2}, "max_rollbacks has no effect with after_rollback: stop"),
        ({"min_length_ratio": 1.5}, "min_length_ratio"),
    ],
)
def test_guards_that_could_not_act_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Config(**settings)
