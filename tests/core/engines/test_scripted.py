from __future__ import annotations

import pytest

from align.core.engines import Completion, Prompt, SamplingParams
from align.core.engines.scripted import ScriptedEngine
from align.core.errors import EngineError

CHAT: Prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}]


def _texts(engine: ScriptedEngine, prompts: list[Prompt], n: int, **params: int) -> list[str]:
    return [c.text for _, _, c in engine.sample(prompts, n, SamplingParams(**params))]  # type: ignore[arg-type]


def test_a_function_answers_by_prompt_and_index_and_calls_are_counted() -> None:
    engine = ScriptedEngine(lambda prompt, index: f"{prompt}{index}")
    assert _texts(engine, ["a", "b"], 2) == ["a0", "a1", "b0", "b1"]
    assert engine.calls == 4


def test_a_table_answers_by_the_prompts_text_or_its_last_message() -> None:
    engine = ScriptedEngine({"q": ["one", "two"], "other": "always"})
    assert _texts(engine, [CHAT, "other"], 3) == ["one", "two", "one", "always", "always", "always"]
    with pytest.raises(EngineError, match="no answer for the prompt 'unknown'"):
        _texts(engine, ["unknown"], 1)


def test_a_sequence_answers_by_index_and_completions_pass_as_they_are() -> None:
    failed = Completion("", (), "error", error="down")
    results = list(ScriptedEngine(["yes", failed]).sample(["a"], 2, SamplingParams()))
    assert results[0][2].text == "yes" and results[1] == (0, 1, failed)


def test_a_block_read_ahead_comes_back_last_first() -> None:
    engine = ScriptedEngine(lambda prompt, index: str(prompt), ahead=3)
    assert _texts(engine, ["a", "b", "c", "d"], 1) == ["c", "b", "a", "d"]


def test_tokens_are_words_and_max_tokens_cuts_them() -> None:
    completion = next(ScriptedEngine(["one two  three"]).sample(["a"], 1, SamplingParams(max_tokens=2)))[2]
    assert (completion.text, len(completion.token_ids), completion.finish_reason) == ("one two", 2, "length")


def test_fingerprints_tell_scripts_apart() -> None:
    assert ScriptedEngine(["a"]).fingerprint == ScriptedEngine(["a"]).fingerprint != ScriptedEngine(["b"]).fingerprint
