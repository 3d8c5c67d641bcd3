"""What is learnt of a conversation, under chat templates of the shapes that well-known families have."""

from __future__ import annotations

from typing import Any

import pytest

from align.core.chat import IGNORED, Tokens, encode_demonstrations, encode_pairs, encode_rows, prompt_ids
from align.core.errors import DataError, ModelError
from tests.core.shapes import SHAPES, tokenizer_of

EVERY = list(SHAPES)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def said(role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


def user(text: str) -> dict[str, Any]:
    return said("user", text)


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return said("assistant", text, **more)


def call(place: str, arguments: Any) -> dict[str, Any]:
    return {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def encode(shape: str, prompt: list[Any], completion: list[Any], all_turns: bool = False, **row: Any) -> list[Tokens]:
    rows = [{"prompt_id": "p7", "prompt": prompt, "completion": completion, **row}]
    return next(encode_rows(tokenizer_of(shape), rows, all_turns))


def learnt(shape: str, tokens: Tokens) -> list[str]:
    """The text of each supervised stretch."""
    return [str(tokenizer_of(shape).decode(tokens.ids[start:end])) for start, end, _ in tokens.turns]


def assert_as_sampled(shape: str, tokens: Tokens, messages: Any, tools: Any = None) -> None:
    """What comes before a sequence's first supervised turn is what an engine feeds."""
    start = tokens.turns[0][0]
    assert tokens.ids[:start] == prompt_ids(tokenizer_of(shape), messages, tools)


@pytest.mark.parametrize("shape", EVERY)
def test_every_turn_s_end_token_is_supervised_once_and_the_token_after_it_is_not(shape: str) -> None:
    tokenizer, end = tokenizer_of(shape), SHAPES[shape][-1]
    turns = [user("hello"), assistant("world"), user("What is 3 plus 4?"), assistant("The answer is 7.")]
    (tokens, *more) = encode(shape, turns[:1], turns[1:])
    sequences = [tokens, *more]
    ends = [sequence.ids[stop - 1] for sequence in sequences for _, stop, _ in sequence.turns]
    assert ends == [tokenizer.convert_tokens_to_ids(end)] * 2
    for sequence in sequences:
        assert sum(label in ends for label in sequence.labels) == len(sequence.turns)
        assert sequence.turns[-1][1] == len(sequence.ids)  # nothing after the last end token
        for _, stop, _ in sequence.turns[:-1]:
            assert sequence.labels[stop] == IGNORED
        if tokenizer.bos_token_id is not None:
            assert sequence.ids.count(tokenizer.bos_token_id) == 1
            assert sequence.ids[0] == tokenizer.bos_token_id
    texts = [text.removesuffix(end).split("</think>")[-1].strip() for s in sequences for text in learnt(shape, s)]
    assert texts == ["world", "The answer is 7."]


@pytest.mark.parametrize("shape", EVERY)
def test_before_each_supervised_turn_stands_what_an_engine_feeds_there(shape: str) -> None:
    turns: Any = [user("hello"), assistant("world"), user("Yes?"), assistant("Yes."), user("a"), assistant("7.")]
    sequences = encode(shape, turns[:1], turns[1:])
    starts = [tokens.ids[:start] for tokens in sequences for start, _, _ in tokens.turns]
    assert starts == [prompt_ids(tokenizer_of(shape), turns[:place]) for place in (1, 3, 5)]


@pytest.mark.parametrize("shape", [shape for shape in EVERY if shape != "gemma"])
def test_a_system_prompt_is_read_and_not_learnt(shape: str) -> None:
    prompt = [said("system", "Be plus."), user("hello")]
    (tokens,) = encode(shape, prompt, [assistant("world")])
    assert_as_sampled(shape, tokens, prompt)
    text = tokenizer_of(shape).decode(tokens.ids)
    assert text.count("Be plus.") == 1
    assert "You help." not in text
    assert "plus" not in "".join(learnt(shape, tokens))


def test_the_template_s_own_system_prompt_is_added_once() -> None:
    (tokens,) = encode("qwen2", [user("hello")], [assistant("world"), user("Yes?"), assistant("Yes.")])
    assert tokenizer_of("qwen2").decode(tokens.ids).count("You help.") == 1
    assert len(tokens.turns) == 2


def test_a_template_without_a_system_role_is_an_error_that_names_the_row() -> None:
    with pytest.raises(DataError, match=r"row 0 \(prompt_id p7\).*System role not supported"):
        encode("gemma", [said("system", "x"), user("y")], [assistant("z")])


def test_each_turn_of_a_template_that_leaves_out_earlier_thoughts_is_learnt_behind_what_was_seen_there() -> None:
    """The first answer is learnt with its thought; before the second question it stands without."""
    turns = [user("hello"), assistant("<think>\nwhat\n</think>\n\nworld"), user("Yes?"), assistant("Yes.")]
    first, second = encode("qwen3", turns[:1], turns[1:])
    assert learnt("qwen3", first) == ["<think>\nwhat\n</think>\n\nworld<|im_end|>"]
    assert learnt("qwen3", second) == ["<think>\n\n</think>\n\nYes.<|im_end|>"]
    assert_as_sampled("qwen3", second, turns[:3])
    before = tokenizer_of("qwen3").decode(second.ids[: second.turns[0][0]])
    assert "world" in before
    assert "what" not in before


def test_turns_that_stay_as_they_were_share_a_sequence() -> None:
    """Between two questions thoughts are kept: a call, what the tool said, and the answer are one sequence."""
    turns = [user("hello"), assistant("Yes.", reasoning_content="what"), said("tool", "7"), assistant("world")]
    (tokens,) = encode("qwen3", turns[:1], turns[1:])
    assert learnt("qwen3", tokens) == [
        "<think>\nwhat\n</think>\n\nYes.<|im_end|>",
        "<think>\n\n</think>\n\nworld<|im_end|>",
    ]


def test_an_empty_thought_may_be_part_of_the_prompt() -> None:
    """As under `enable_thinking=False`: what the generation prompt holds already is not learnt."""
    import copy

    tokenizer = copy.deepcopy(tokenizer_of("qwen3"))
    tokenizer.chat_template = "{% set enable_thinking = false %}" + tokenizer.chat_template
    row = {"prompt": [user("hello")], "completion": [assistant("world")]}
    ((tokens,),) = encode_rows(tokenizer, [row])
    assert tokenizer.decode(tokens.ids[tokens.turns[0][0] :]) == "world<|im_end|>"


def test_a_generation_prompt_that_no_turn_begins_with_is_an_error() -> None:
    """It opens a thought, and the template shows none: the model would be sampled from where it never was."""
    import copy

    tokenizer = copy.deepcopy(tokenizer_of("qwen2"))
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\\n' }}{% endif", "assistant\\n<t>' }}{% endif")
    with pytest.raises(DataError, match="begins an assistant turn otherwise than its generation prompt"):
        list(encode_rows(tokenizer, [{"prompt": [user("hello")], "completion": [assistant("world")]}]))


def test_a_system_prompt_that_moves_with_the_last_question_is_where_it_is_when_sampled() -> None:
    turns = [said("system", "Be plus."), user("hello"), assistant("world"), user("Yes?"), assistant("Yes.")]
    first, second = encode("mistral", turns[:2], turns[2:])
    assert tokenizer_of("mistral").decode(first.ids) == "<s>[INST] Be plus.\n\nhello[/INST] world</s>"
    assert (
        tokenizer_of("mistral").decode(second.ids)
        == "<s>[INST] hello[/INST] world</s>[INST] Be plus.\n\nYes?[/INST] Yes.</s>"
    )


@pytest.mark.parametrize(
    ("shape", "arguments"), [("qwen2.5", {"a": 3}), ("qwen2.5", '{"a": 3}'), ("mistral", {"a": 3})]
)
def test_a_tool_call_is_learnt_up_to_its_end_token_and_the_tool_s_answer_is_not(shape: str, arguments: Any) -> None:
    turns = [
        user("hello"),
        assistant("", tool_calls=[call("x", arguments)]),
        said("tool", "7"),
        assistant("The answer."),
    ]
    tools = {"qwen2.5": [WEATHER], "mistral": None}[shape]
    (tokens,) = encode(shape, turns[:1], turns[1:], tools=tools)
    made, answered = learnt(shape, tokens)
    end = SHAPES[shape][-1]
    assert '"arguments": {"a": 3}' in made
    assert (made.count(end), answered) == (1, f"{' ' if shape == 'mistral' else ''}The answer.{end}")
    assert made.endswith({"qwen2.5": "}\n</tool_call><|im_end|>", "mistral": "]</s>"}[shape])
    assert_as_sampled(shape, tokens, turns[:1], tools)
    if tools:
        assert "<tools>" in tokenizer_of(shape).decode(tokens.ids[: tokens.turns[0][0]])


def test_tools_may_be_json_text_as_they_are_stored() -> None:
    import json

    row = ([user("hello")], [assistant("world")])
    given = [encode("qwen2.5", *row, tools=tools)[0].ids for tools in ([WEATHER], json.dumps([WEATHER]))]
    assert given[0] == given[1]
    for wrong in ("weather", [3], {"name": "weather"}):
        with pytest.raises(DataError, match=r"p7.*tools is .*list of JSON schemas"):
            encode("qwen2.5", *row, tools=wrong)


def test_a_template_that_shows_no_tools_or_calls_is_refused() -> None:
    with pytest.raises(ModelError, match="leaves out the tools that a row has"):
        encode("qwen2", [user("hello")], [assistant("world")], tools=[WEATHER])
    with pytest.raises(ModelError, match="leaves out tool calls"):
        encode("qwen2", [user("hello")], [assistant("world", tool_calls=[call("x", {})])])


def test_a_call_whose_arguments_are_no_json_is_an_error_that_names_the_row() -> None:
    with pytest.raises(DataError, match=r"p7.*arguments of a call of weather are no JSON"):
        encode("qwen2.5", [user("hello")], [assistant("", tool_calls=[call("x", "{a")])], tools=[WEATHER])


def test_weights_stand_beside_their_turns_and_a_turn_of_weight_0_is_not_learnt() -> None:
    turns = [user("hello"), assistant("world", weight=0), user("Yes?"), assistant("Yes.", weight=0.5)]
    (tokens,) = encode(
        "qwen2", turns[:1], [*turns[1:], user("What?"), assistant("7."), user("a"), assistant("b", weight=0)]
    )
    assert [weight for _, _, weight in tokens.turns] == [0.5, 1.0]
    assert learnt("qwen2", tokens) == ["Yes.<|im_end|>", "7.<|im_end|>"]
    assert tokens.turns[-1][1] == len(tokens.ids)  # the last turn, of weight 0, is left out


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf"), "1", True])
def test_a_wrong_weight_is_an_error_that_names_the_row(weight: Any) -> None:
    with pytest.raises(DataError, match=r"p7.*weight .*a number of at least 0"):
        encode("qwen2", [user("hello")], [assistant("world", weight=weight)])


def test_a_row_whose_weights_are_all_0_is_an_error() -> None:
    with pytest.raises(DataError, match=r"p7.*every assistant message has the weight 0"):
        encode("qwen2", [user("hello")], [assistant("world", weight=0)])


def test_a_weight_in_a_preference_is_refused() -> None:
    row = {"prompt": [user("a")], "chosen": [assistant("b", weight=2.0)], "rejected": [assistant("c")]}
    with pytest.raises(DataError, match="messages have weights in demonstrations alone"):
        list(encode_pairs(tokenizer_of("qwen2"), [row]))


def test_an_answer_that_is_part_of_the_end_token_s_text_ends_at_that_token() -> None:
    (tokens,) = encode("llama3", [user("hello")], [assistant("d")])
    assert learnt("llama3", tokens) == ["d<|eot_id|>"]


def test_rows_of_one_sequence_are_asked_for_where_several_will_not_do() -> None:
    row = {"prompt": [user("a")], "completion": [assistant("b"), user("c"), assistant("d")]}
    with pytest.raises(DataError, match="one row per assistant turn"):
        list(encode_demonstrations(tokenizer_of("qwen3"), [row]))
