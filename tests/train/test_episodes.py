"""An episode's prompts, scores and pairs, with an engine that answers as it is told; no model is trained here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from align.core.engines.base import Completion, Prompt
from align.core.engines.cache import CachedEngine
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import EngineError, ModelError, RecipeError
from align.core.records import Row
from align.core.stage import Tools
from align.train.episode_file import pairs_of, read_rows, record_of, set_reference, write_rows
from align.train.episodes import Prompts, episode_rows, most_varied, samples_of
from align.train.grading import grade
from align.train.online_settings import Config, Verified
from align.train.scoring import Group, Scorer, judge_of
from data_synthesis.constrain import STAGE as CONSTRAIN
from reward.judge import Judge
from reward.model import Gate, best_and_worst, high_enough
from reward.verifiers import VERIFIERS, Verifiers
from tests.reward.judges import blocks
from tests.synthesis.conftest import Bench, a_prompt
from tests.synthesis.test_constrain import a_constraint
from tests.train import steps
from tests.train.tiny import make_tokenizer

Answers = Callable[[str, int], str]
TOKENIZER = make_tokenizer()
RIGHT, WRONG = "The answer is 7.", "The answer is 8."


def config(**settings: Any) -> Config:
    return Config(**({"samples_per_prompt": 4, "max_tokens": 400} | settings))


def sum_of(number: int, answer: int, **more: Any) -> Row:
    """A prompt whose right answer a program knows."""
    reference = json.dumps({"answer": str(answer)})
    return a_prompt(number, f"Sum {number}?", task="math", family="math", reference=reference) | more


def wish(number: int, **more: Any) -> Row:
    """A prompt that no program can judge."""
    return a_prompt(number, f"Wish {number}?", task=None, family="wish", reference=None) | more


def engine_of(answers: Answers, cut: str = "...") -> ScriptedEngine:
    """Answers by the prompt's text and the sample's index; an answer with `cut` at its end was cut off."""

    def answer(prompt: Prompt, index: int) -> Completion:
        text = answers(TOKENIZER.decode(prompt, skip_special_tokens=True), index)
        if text == "nothing":
            return Completion("", (), "error", error="the server is down")
        ids = tuple(TOKENIZER(text)["input_ids"])
        if text.endswith(cut):
            return Completion(text, ids, "length", tuple(-1.0 for _ in ids))
        return Completion(text, (*ids, TOKENIZER.eos_token_id), "stop", (*(-1.0 for _ in ids), -0.5))

    return ScriptedEngine(answer)


class ByWords:
    """A reward model that counts words: twice as many, twice the reward. `gates` as of a real one."""

    name = "by words"

    def __init__(self, gates: dict[str, Gate] | None = None) -> None:
        self.gates, self.scored = gates, 0

    def reads_ids_of(self, tokenizer: Any) -> bool:
        return False

    def score_fitting(self, items: Sequence[Any]) -> list[float | None]:
        """None above 1000 words."""
        self.scored += len(items)
        words = [len(item[1][0]["content"].split()) for item in items]
        return [float(count) if count <= 1000 else None for count in words]

    def judge_group(self, family: str, scores: Sequence[float]) -> tuple[int, int] | None:
        return best_and_worst(self.gates, family, scores)

    def accepts(self, family: str, score: float) -> bool:
        return high_enough(self.gates, family, score)


def graded(prompt: Prompt, index: int) -> str:
    """A judge that gives the number in an answer, and says nothing of use where there is none."""
    found = [word for word in blocks(prompt)[1].split() if word.isdigit()]
    return f"I counted.\nScore: {found[0]}" if found else "I can't say."


def episode(
    rows: Sequence[Row], answers: Answers, settings: Config, model: Any = None, judge: Any = None, **more: Any
) -> list[dict[str, Any]]:
    with Verifiers() as verifiers:
        scorer = Scorer(settings, verifiers, model, TOKENIZER, judge)
        return episode_rows(engine_of(answers), rows, scorer, settings, 1, 0, TOKENIZER, **more)


def numbered(*texts: str) -> Answers:
    return lambda prompt, index: texts[index]


def test_the_file_of_an_episode_says_what_became_of_every_completion_and_gives_the_pairs_back(tmp_path: Path) -> None:
    """A sum: right, wrong, the same wrong text again, cut off. A wish that nobody scores under `verifier`."""

    def answers(prompt: str, index: int) -> str:
        return [RIGHT, WRONG, f" {WRONG}", "It is it is..."][index]

    rows = episode([sum_of(1, 7), wish(2)], answers, config(scorer="verifier"))
    first, second = rows
    assert (first["outcome"], first["scorer"], second["outcome"], second["scorer"]) == (
        "paired", "verifier", "no_scorer", ""
    )  # fmt: skip
    assert first["finish_reasons"] == ["stop", "stop", "stop", "length"]
    assert first["verdicts"] == ["passed", "failed", "failed", "failed"]
    assert first["rewards"] == [1.0, 0.0, 0.0, 0.0] and second["rewards"] == [None] * 4
    (pair,) = first["pairs"]
    assert (pair["chosen"], pair["margin"]) == (0, 1.0) and pair["rejected"] in (1, 3)
    assert first["became"] == ["chosen", *(("rejected", "identical", "truncated") if pair["rejected"] == 1 else
                                           ("unpaired", "identical", "rejected"))]  # fmt: skip
    assert first["sampler_logps"][0] == -1.0 * (len(first["completion_ids"][0]) - 1) - 0.5

    class Logps:
        def tolist(self) -> list[list[float]]:
            return [[-2.5, -3.5]]

    set_reference(rows, Logps())
    write_rows(tmp_path / "episode.parquet", [row | {"policy_step": 9} for row in rows])
    back = read_rows(tmp_path / "episode.parquet")
    assert pairs_of(back) == [
        {
            "prompt_ids": first["prompt_ids"], "chosen_ids": first["completion_ids"][0],
            "rejected_ids": first["completion_ids"][pair["rejected"]],
            "ref_chosen_logps": -2.5, "ref_rejected_logps": -3.5,
        }
    ]  # fmt: skip
    record = record_of(back)
    assert record == record_of(rows)
    assert (record["prompts"], record["completions"], record["pairs"], record["truncated"]) == (2, 8, 1, 0.25)
    assert record["outcomes"] == {"paired": 1, "no_scorer": 1}
    assert record["became"]["no_scorer"] == 4 and sum(record["became"].values()) == 8
    assert record["scores"] == {"verifier": 0.25}


def test_a_weighted_reward_is_the_mean_of_what_each_part_says_in_its_own_standard_deviations() -> None:
    """Two sums of two completions each, verifier 1, 0 and 0, 0; words 4, 6 and 8, 10.

    Verifier: mean 1/4, deviation sqrt(3)/4, so 1 is sqrt(3) and 0 is -1/sqrt(3). Words: mean 7, deviation sqrt(5), so
    they are -3, -1, 1, 3 over sqrt(5). Weights 3 and 1: the first is (3 sqrt(3) - 3/sqrt(5)) / 4 = 0.963628, the second
    (-3/sqrt(3) - 1/sqrt(5)) / 4 = -0.544816.
    """
    texts = {
        "Sum 1?": [RIGHT, "So then the answer is 8."],
        "Sum 2?": ["Well so then I say: answer is 8.", "Well so then I do now say: answer is 8."],
    }
    settings = config(scorer="weighted", weights={"verifier": 3.0, "reward_model": 1.0}, samples_per_prompt=2)

    def answers(prompt: str, index: int) -> str:
        return next(found[index] for asked, found in texts.items() if asked in prompt)

    rows = episode([sum_of(1, 7), sum_of(2, 7)], answers, settings, ByWords())
    assert [[score["reward_model"] for score in row["scores"]] for row in rows] == [[4, 6], [8, 10]]
    assert [[score["verifier"] for score in row["scores"]] for row in rows] == [[1, 0], [0, 0]]
    assert rows[0]["rewards"] == pytest.approx([0.963628, -0.544816], abs=1e-6)
    assert rows[0]["pairs"][0]["margin"] == pytest.approx(0.963628 + 0.544816, abs=1e-6)
    assert rows[0]["scorer"] == "verifier+reward_model"
    assert rows[1]["outcome"] == "none_chosen"  # both failed, whatever the reward model says


def test_where_a_prompt_has_no_verifier_the_other_parts_decide_and_a_lost_score_is_an_error() -> None:
    """A wish of words 4 and 6 and a judge's 2 and 6; a sum of words 4 and 6, judged 2 and not at all.

    Words: mean 5, deviation 1: -1, 1, -1, 1. Judge on 0 to 1: (2-1)/9 = 1/9, 5/9, 1/9: mean 7/27, deviation
    sqrt(2 (4/27)^2 + (8/27)^2) / sqrt(3) = 4 sqrt(2) / 27, so -1/sqrt(2), sqrt(2), -1/sqrt(2). The wish has no
    verifier; weights 1 and 1: (-1 - 0.707107) / 2 and (1 + 1.414214) / 2. Of the sum the verifier (1 and 0 of the two:
    1 and -1) is the third part: (1 - 1 - 0.707107) / 3; the second is lost.
    """

    def answers(prompt: str, index: int) -> str:
        wished, summed = ["so 2 it is", "let us say 6 times then"], ["The answer is 2", "I have really no such idea"]
        return (wished if "Wish" in prompt else summed)[index]

    weights = {"judge": 1.0, "reward_model": 1.0, "verifier": 1.0}
    settings = config(scorer="weighted", weights=weights, samples_per_prompt=2)
    judge = Judge(ScriptedEngine(graded), settings, 0)
    first, second = episode([wish(1), sum_of(2, 2)], answers, settings, ByWords(), judge)
    assert (first["scorer"], second["scorer"]) == ("reward_model+judge", "verifier+reward_model+judge")
    assert first["rewards"] == pytest.approx([(-1 - 2**-0.5) / 2, (1 + 2**0.5) / 2])
    assert second["rewards"] == [pytest.approx((1 - 1 - 2**-0.5) / 3), None]
    assert first["pairs"][0]["chosen"] == 1 and first["verdicts"] == [None, None]
    assert (second["outcome"], second["became"]) == ("too_few", ["unpaired", "error"])
    assert "the judge gave no score in 3 attempts" in second["details"][1]


def test_processes_that_share_the_prompts_weigh_and_choose_as_one_does() -> None:
    """Two processes with every other prompt, each told what both have: the same rewards and the same choice."""
    settings = config(scorer="weighted", weights={"verifier": 1.0, "reward_model": 1.0}, choose_from=2)
    rows = [sum_of(n, 7) for n in range(8)]

    def answers(prompt: str, index: int) -> str:
        number = next(n for n in range(8) if f"Sum {n}?" in prompt)
        return "Well " * (number + index * (number % 3)) + RIGHT if index % 2 else f"{number} no"

    def groups() -> list[Group]:
        with Verifiers() as verifiers:
            scorer = Scorer(settings, verifiers, ByWords(), TOKENIZER)
            found = [Group(row, [1]) for row in rows]
            for number, group in enumerate(found):
                group.completions = [
                    Completion(text, (5,), "stop") for text in (answers(f"Sum {number}?", i) for i in range(4))
                ]
            scorer.score(found)
        return found

    whole = groups()
    grade(whole, settings)
    taken = {group.row["prompt_id"] for group in most_varied(whole, 2, "s")}
    assert len(taken) == 4
    shares = [groups()[0::2], groups()[1::2]]

    def gathers(step: Callable[[Sequence[Group], Any], Any]) -> list[Any]:
        """Runs a step of each process that gathers any number of times: first notes what each gives, then runs it."""
        noted: list[list[list[Any]]] = []
        for share in shares:
            mine: list[list[Any]] = []
            step(share, lambda given, mine=mine: mine.append(given) or given)
            noted.append(mine)
        together = [list(chain(*given)) for given in zip(*noted, strict=True)]
        found = []
        for share in shares:
            turns = iter(together)
            found.append(step(share, lambda given, turns=turns: next(turns)))
        return found

    gathers(lambda share, gather: grade(share, settings, gather))
    for number, share in enumerate(shares):
        assert [group.scored for group in share] == [group.scored for group in whole[number::2]]
    chosen = gathers(lambda share, gather: most_varied(share, 2, "s", gather))
    assert {group.row["prompt_id"] for group in chain(*chosen)} == taken


def test_prompts_whose_rewards_vary_most_are_taken_of_each_scorer_its_share() -> None:
    """Of four sums and two wishes every second is taken: two sums and one wish, those that vary.

    Half of the four samples are drawn of all six, the other half of the three that are taken: 6 x 2 + 3 x 2 = 18.
    """

    def answers(prompt: str, index: int) -> str:
        if "Wish" in prompt:
            return "so it is" if "Wish 5?" in prompt and index % 2 else f"no {index}"
        return RIGHT if index % 2 and ("Sum 1?" in prompt or "Sum 3?" in prompt) else f"The answer is {index + 20}."

    rows = [sum_of(n, 7) for n in range(4)] + [wish(4), wish(5)]
    settings = config(choose_from=2)
    found = episode(rows, answers, settings, ByWords())
    assert [row["outcome"] for row in found] == ["not_taken", "paired", "not_taken", "paired", "not_taken", "paired"]
    assert [len(row["completion_ids"]) for row in found] == [2, 4, 2, 4, 2, 4]
    assert found[0]["became"] == ["not_taken"] * 2 and found[0]["pairs"] == []
    assert samples_of(settings, 6) == 18 == record_of(found)["completions"]
    assert samples_of(config(), 6) == 24


def test_of_fewer_prompts_than_are_looked_at_for_one_the_best_is_taken() -> None:
    """Three prompts where choose_from is 8: a third would be none, and an episode without a pair."""
    groups = [Group({"prompt_id": str(number)}, [1]) for number in range(3)]
    for group in groups:
        group.scores["verifier"] = [1.0]
    assert len(most_varied(groups, 8, "s")) == 1


def test_the_tasks_that_may_be_verified_are_those_that_have_a_verifier() -> None:
    assert set(get_args(Verified)) == set(VERIFIERS)


def test_an_episode_that_chooses_looks_at_other_prompts_each_time_and_at_fewer_of_a_small_split(tmp_path: Path) -> None:
    table = steps.table(tmp_path / "p.parquet", [sum_of(n, 7) for n in range(20)])
    prompts = Prompts(table, config(prompts_per_episode=3, choose_from=3, probe_prompts=2), 5)
    assert (len(prompts.train), prompts.size, prompts.looked_at) == (18, 3, 9)
    seen = [row["prompt_id"] for episode in range(2) for row in prompts.of_episode(episode)]
    assert len(set(seen)) == 18
    small = Prompts(table, config(prompts_per_episode=30, choose_from=4, probe_prompts=2), 5)
    assert (small.size, small.looked_at) == (4, 16)


def test_length_is_penalised_beyond_the_shortest_and_a_missing_end_besides() -> None:
    """Words 1, 51 and 101 (cut off); 3, 103 and 202 tokens with the end, so 0, 1 and 1.99 hundreds beyond the first.

    At 20 a hundred: 1, 51 - 20 = 31, and 101 - 39.8 - 50 = 11.2. Without penalties the cut-off one is the best.
    """
    texts = ["no", "no" + " no" * 50, "no" + " no" * 100 + "...", "nothing"]
    tokens = [len(TOKENIZER(text)["input_ids"]) for text in texts]
    over = [0.0, (tokens[1] - tokens[0]) / 100, (tokens[2] - 1 - tokens[0]) / 100]
    (row,) = episode(
        [wish(1)], numbered(*texts), config(length_penalty=20.0, missing_end_penalty=50.0, scorer="reward_model"),
        ByWords(),
    )  # fmt: skip
    assert row["penalties"] == pytest.approx([0.0, 20 * over[1], 20 * over[2] + 50, 0.0])
    assert row["rewards"][:3] == pytest.approx([1.0, 51 - 20 * over[1], 101 - 20 * over[2] - 50])
    assert row["rewards"][3] is None and row["became"][3] == "error"
    assert [score.get("reward_model") for score in row["scores"]] == [1.0, 51.0, 101.0, None]
    assert row["outcome"] == "paired"


def test_of_right_answers_the_shorter_is_chosen_and_a_wrong_one_never() -> None:
    """With a penalty two right answers make a pair; and a wrong short one is still what the right long one beats."""
    longer = f"Let us see, and see again. {RIGHT}"
    (row,) = episode(
        [sum_of(1, 7)], numbered(longer, RIGHT, f"{RIGHT} ", longer), config(scorer="verifier", length_penalty=1.0)
    )
    assert (row["pairs"][0]["chosen"], row["pairs"][0]["rejected"]) == (1, 0)
    (row,) = episode(
        [sum_of(1, 7)], numbered(longer, WRONG, longer, longer), config(scorer="verifier", length_penalty=50.0)
    )
    assert row["pairs"][0] == {"chosen": 0, "rejected": 1, "margin": 1.0}


def test_a_judge_is_asked_once_for_each_text_and_what_it_does_not_score_is_never_paired(tmp_path: Path) -> None:
    """Scores 9, none, 3 and 3 (one text twice): 8/9, an error, 2/9 on 0 to 1. From the cache the second time."""
    settings = config(scorer="judge")
    plain = ScriptedEngine(graded)
    cached = CachedEngine(plain, tmp_path / "completions-judge")
    answers = numbered("say 9", "nothing said", "say 3", "say 3")
    (row,) = episode([wish(1)], answers, settings, None, Judge(cached, settings, 0))
    assert row["scorer"] == "judge"
    assert row["rewards"] == [pytest.approx(8 / 9), None, pytest.approx(2 / 9), pytest.approx(2 / 9)]
    assert row["became"] == ["chosen", "error", "rejected", "identical"]
    calls = plain.calls
    assert calls == 2 + 3  # two texts, and three attempts at the one that can't be read
    assert episode([wish(1)], answers, settings, None, Judge(cached, settings, 0)) == [row]
    assert plain.calls == calls
    cached.close()


def test_what_the_judge_gives_less_than_the_threshold_is_rejected_and_never_chosen() -> None:
    settings = config(scorer="judge", judge_threshold=8.0)
    judge = Judge(ScriptedEngine(graded), settings, 0)
    rows = episode([wish(1)], numbered("say 7", "say 5", "say 4", "say 3"), settings, None, judge)
    assert rows[0]["outcome"] == "none_chosen"
    (row,) = episode([wish(1)], numbered("say 7", "say 8", "say 4", "say 3"), settings, None, judge)
    assert (row["pairs"][0]["chosen"], row["pairs"][0]["rejected"]) == (1, 3)


def test_a_judge_of_whom_nothing_can_be_read_stops_the_run() -> None:
    settings = config(scorer="judge")
    judge = Judge(ScriptedEngine(graded), settings, 0)
    with pytest.raises(EngineError, match="gave no score for any of 20 completions"):
        episode([wish(n) for n in range(5)], lambda prompt, i: f"well {'so ' * i}", settings, None, judge)


def test_constraints_that_a_model_wrote_programs_for_score_an_episode(tmp_path: Path) -> None:
    """From the library to the pair: `constrain` puts "In capitals." to a query, its function decides."""
    given = {"queries": [a_prompt(1, "Say so.")], "constraints": [a_constraint(1, "In capitals.")]}
    rows = Bench(tmp_path).run(CONSTRAIN, {"per_constraint": 1}, **given)
    assert rows[0]["task"] == "follow" and "In capitals." in rows[0]["prompt"][-1]["content"]
    (row,) = episode(rows, numbered("SO", "so", "So SO", "SO..."), config())
    assert row["verdicts"] == ["passed", "failed", "failed", "failed"]
    assert row["details"][0].startswith("1 of 1 functions say yes") and row["details"][3] == "truncated"
    assert row["scorer"] == "verifier" and row["outcome"] == "paired"
    assert row["pairs"][0]["chosen"] == 0
    # AutoIF's judge beside the functions: it is shown the query and the constraint apart. Of two that pass, 9 beats 2.
    settings = config(scorer="weighted", weights={"verifier": 1.0, "judge": 1.0}, judge_template="follow")
    seen: list[str] = []

    def judged(prompt: Prompt, index: int) -> str:
        seen.append(str(prompt[0]["content"]))  # type: ignore[index]
        return f"Score: {9 if 'SO 9' in seen[-1] else 2}"

    judge = Judge(ScriptedEngine(judged), settings, 0)
    (row,) = episode(rows, numbered("SO 2", "so", "SO 9", "SO"), settings, None, judge)
    assert "Say so. In capitals." not in seen[0] and "Say so." in seen[0] and "In capitals." in seen[0]
    assert row["scorer"] == "verifier+judge" and row["pairs"][0]["chosen"] == 2 and row["pairs"][0]["rejected"] == 1


def test_under_all_the_gate_is_asked_about_every_pair() -> None:
    """Words 1, 4, 6, 9; right from 6 on, wrong below 2, gap above 3: of six pairs (6, 1) and (9, 1) are believed."""
    gates = {"wish": Gate(6.0, 2.0, 3.0)}
    texts = ["no" + " no" * more for more in (0, 3, 5, 8)]
    settings = config(scorer="reward_model", pairing="all", min_margin=1.0)
    (row,) = episode([wish(1)], numbered(*texts), settings, ByWords(gates))
    assert [(p["chosen"], p["rejected"]) for p in row["pairs"]] == [(3, 0), (2, 0)]
    assert row["became"] == ["rejected", "unpaired", "chosen", "chosen"]
    assert len(pairs_of([row])) == 2
    (row,) = episode([wish(1, family="other")], numbered(*texts), settings, ByWords(gates))
    assert (row["outcome"], row["pairs"]) == ("abstained", [])


def test_of_several_pairs_those_that_are_too_long_are_dropped() -> None:
    texts = ["no", "no no", "no no no", "no" + " no" * 40]
    (row,) = episode(
        [wish(1)], numbered(*texts), config(scorer="reward_model", pairing="all", max_length=60), ByWords()
    )
    assert row["outcome"] == "paired" and {p["chosen"] for p in row["pairs"]} == {1, 2}


def test_what_is_too_long_for_the_reward_model_is_an_error_and_not_the_end() -> None:
    (row,) = episode(
        [wish(1)], numbered("no", "no no", "no no no", "no " * 1001), config(scorer="reward_model"), ByWords()
    )
    assert row["rewards"] == [1.0, 2.0, 3.0, None] and row["became"] == ["rejected", "unpaired", "chosen", "error"]


def test_what_was_sampled_again_is_scored_and_nothing_is_scored_twice() -> None:
    """No first sample of a wish reaches 6 words; two more are drawn, and the model has scored 4 + 2 completions."""
    model = ByWords({"wish": Gate(6.0, 4.0, 1.0)})
    texts = ["no", "no no", "no no no", "no no no no", "no no no no no", "no no no no no no no"]
    (row,) = episode([wish(1)], numbered(*texts), config(resample=2), model)
    assert (model.scored, row["pairs"][0]["chosen"], row["pairs"][0]["rejected"]) == (6, 5, 0)


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": {}}}]


def test_a_prompt_s_tools_stand_in_what_the_policy_reads() -> None:
    seen = []

    def answers(prompt: str, index: int) -> str:
        seen.append(prompt)
        return RIGHT if index else WRONG

    row = sum_of(1, 7, tools=json.dumps(TOOLS))
    with pytest.raises(ModelError, match=r"leaves out the tools that a row has \(prompt p1\)"):
        episode([row], answers, config())
    plain = TOKENIZER.chat_template
    try:
        TOKENIZER.chat_template = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}" + plain
        found = episode([row, sum_of(2, 7)], answers, config())
    finally:
        TOKENIZER.chat_template = plain
    assert [row["outcome"] for row in found] == ["paired", "paired"]
    assert "weather" in seen[0] and "weather" not in seen[-1]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"scorer": "weighted"}, "scorer is weighted and weights has nothing"),
        ({"scorer": "weighted", "weights": {"judge": 1.0}}, "weights has judge; give two or three"),
        ({"verified_tasks": ["maths"]}, "Input should be 'math'"),
        ({"learning_rate": math.inf}, "finite"),
        ({"weights": {"judge": 1.0, "verifier": 1.0}}, "weights has no effect with scorer=mix"),
        ({"scorer": "weighted", "weights": {"judge": 1.0, "verifier": -1.0}}, "weights: verifier has -1"),
        ({"choose_from": 2, "samples_per_prompt": 3}, "one completion has no variance"),
        ({"scorer": "judge", "resample": 2}, "raise judge_threshold"),
        ({"max_pairs": 3}, "max_pairs has no effect with pairing=max_min; set pairing to all"),
        ({"scorer": "verifier", "verified_tasks": ["math"]}, "verified_tasks has no effect with scorer=verifier"),
        ({"scorer": "reward_model", "judge_votes": 3, "judge_temperature": 0.7}, "has no effect with scorer=reward_m"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        config(**settings)


def test_a_judge_that_is_missing_or_would_never_be_asked_is_refused(tmp_path: Path) -> None:
    judge = ScriptedEngine(graded)

    def tools(**engines: Any) -> Tools:
        return Tools(0, engines, steps.Silent(), tmp_path, tmp_path)

    with pytest.raises(RecipeError, match="scorer is judge and there is no engine `judge`"):
        judge_of(config(scorer="judge"), tools(), True)
    with pytest.raises(RecipeError, match="no effect, since scorer is mix and the reward model scores"):
        judge_of(config(), tools(judge=judge), True)
    with pytest.raises(RecipeError, match="no effect, since scorer is verifier and nothing asks it"):
        judge_of(config(scorer="verifier"), tools(judge=judge), False)
    assert judge_of(config(), tools(), True) is None
    found = judge_of(config(), tools(judge=judge), False)
    assert found is not None and found.engine is judge
