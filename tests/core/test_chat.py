from __future__ import annotations

import time
from typing import Any

import pytest

from align.core.chat import IGNORED, encode_demonstration, encode_demonstrations, encode_pair, encode_pairs, prompt_ids
from align.core.errors import DataError, ModelError
from tests.train.tiny import FAMILIES, make_tokenizer

FOUR = ["qwen2", "llama", "mistral", "gemma"]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def supervised_text(tokenizer: Any, labels: list[int]) -> str:
    return str(tokenizer.decode([label for label in labels if label != IGNORED]))


@pytest.mark.parametrize("family", FOUR)
def test_the_answer_and_its_end_token_are_supervised_and_nothing_else(family: str) -> None:
    tokenizer = make_tokenizer(family)
    end = FAMILIES[family][-1]
    ids, labels = encode_demonstration(tokenizer, [user("What is 3 plus 4?")], [assistant("The answer is 7.")])
    space = " " if family == "mistral" else ""
    assert supervised_text(tokenizer, labels) == f"{space}The answer is 7.{end}"
    assert ids[-1] == tokenizer.convert_tokens_to_ids(end)
    assert labels[-1] == ids[-1]
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


@pytest.mark.parametrize("family", FOUR)
def test_a_training_row_begins_with_the_ids_that_an_engine_feeds(family: str) -> None:
    tokenizer = make_tokenizer(family)
    prompt = [user("What is 3 plus 4?")]
    fed = prompt_ids(tokenizer, prompt)
    ids, labels = encode_demonstration(tokenizer, prompt, [assistant("7")])
    assert ids[: len(fed)] == fed
    assert labels[: len(fed)] == [IGNORED] * len(fed)
    assert IGNORED not in labels[len(fed) :]
    if tokenizer.bos_token_id is not None:
        assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("family", FOUR)
def test_each_turn_s_end_token_is_supervised_exactly_once(family: str) -> None:
    tokenizer = make_tokenizer(family)
    end = tokenizer.convert_tokens_to_ids(FAMILIES[family][-1])
    prompt = [user("hello"), assistant("world"), user("What is 3 plus 4?")]
    completion = [assistant("The answer is 7."), user("Yes?"), assistant("Yes.")]
    _, completion_only = encode_demonstration(tokenizer, prompt, completion)
    _, all_turns = encode_demonstration(tokenizer, prompt, completion, all_turns=True)
    assert completion_only.count(end) == 2
    assert all_turns.count(end) == 3
    parts = [part.strip() for part in supervised_text(tokenizer, all_turns).split(FAMILIES[family][-1])]
    assert parts == ["world", "The answer is 7.", "Yes.", ""]


def test_no_token_reaches_over_the_border_of_prompt_and_completion() -> None:
    """Two newlines are one token of this tokenizer: rendered whole, prompt and answer would merge."""
    tokenizer = make_tokenizer("qwen2")
    prompt, completion = [user("hello")], [assistant("\nYes.")]
    whole = tokenizer(tokenizer.apply_chat_template(prompt + completion, tokenize=False))["input_ids"]
    fed = prompt_ids(tokenizer, prompt)
    assert whole[: len(fed)] != fed
    ids, labels = encode_demonstration(tokenizer, prompt, completion)
    assert ids[: len(fed)] == fed
    assert supervised_text(tokenizer, labels) == "\nYes.<|im_end|>"


def test_the_end_token_is_supervised_although_it_is_the_padding_token() -> None:
    tokenizer = make_tokenizer("qwen2")
    pad = tokenizer.pad_token
    try:
        tokenizer.pad_token = tokenizer.eos_token
        _, labels = encode_demonstration(tokenizer, [user("hello")], [assistant("world")])
    finally:
        tokenizer.pad_token = pad
    assert labels[-1] == tokenizer.eos_token_id


def test_an_empty_answer_still_teaches_to_stop() -> None:
    tokenizer = make_tokenizer("qwen2")
    _, labels = encode_demonstration(tokenizer, [user("hello")], [assistant("")])
    assert supervised_text(tokenizer, labels) == "<|im_end|>"


def test_an_answer_that_quotes_the_end_token_is_still_ended_by_the_template_s_own() -> None:
    tokenizer = make_tokenizer("qwen2")
    _, labels = encode_demonstration(tokenizer, [user("hello")], [assistant("write <|im_end|> here")])
    assert supervised_text(tokenizer, labels) == "write <|im_end|> here<|im_end|>"


def test_a_row_without_an_assistant_message_is_an_error_that_names_it() -> None:
    rows = [
        {"prompt_id": "a", "prompt": [user("hello")], "completion": [assistant("world")]},
        {"prompt_id": "b7", "prompt": [user("hello")], "completion": []},
    ]
    with pytest.raises(DataError, match=r"row 1 \(prompt_id b7\).*no token to learn from"):
        list(encode_demonstrations(make_tokenizer("qwen2"), rows))


def test_a_template_that_refuses_a_row_is_an_error_that_names_it() -> None:
    row = {"prompt_id": "s1", "prompt": [{"role": "system", "content": "x"}, user("y")], "completion": [assistant("z")]}
    with pytest.raises(DataError, match=r"prompt_id s1.*Only user and assistant roles"):
        list(encode_demonstrations(make_tokenizer("mistral"), [row]))


def with_template(template: str | None) -> Any:
    import copy

    tokenizer = copy.deepcopy(make_tokenizer("llama"))
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_without_an_end_token_is_refused() -> None:
    plain = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    with pytest.raises(ModelError, match="no special token after an assistant turn"):
        encode_demonstration(with_template(plain), [user("hello")], [assistant("world")])


def test_a_template_that_gives_two_bos_is_refused() -> None:
    doubled = "{{ bos_token }}" + FAMILIES["llama"][0]
    with pytest.raises(ModelError, match="two BOS"):
        encode_demonstration(with_template(doubled), [user("hello")], [assistant("world")])


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        encode_demonstration(with_template(None), [user("hello")], [assistant("world")])


def test_only_the_end_of_turn_token_counts_where_a_template_adds_another_at_the_end() -> None:
    """Some templates end a conversation with EOS after the end-of-turn token; a sampled turn never has it."""
    closing = FAMILIES["llama"][0].replace(
        "{% if add", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add"
    )
    tokenizer = with_template(closing)
    ids, _ = encode_demonstration(tokenizer, [user("hello")], [assistant("world")])
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert tokenizer.eos_token_id not in ids


def test_a_template_that_rewrites_earlier_turns_is_refused_for_several_turns_at_once() -> None:
    last_only = FAMILIES["llama"][0].replace("m['content'] | trim", "(m['content'] if loop.last else '...')")
    with pytest.raises(DataError, match="one row per assistant turn"):
        encode_demonstration(with_template(last_only), [user("a")], [assistant("b"), user("c"), assistant("d")])


@pytest.mark.parametrize("family", FOUR)
def test_a_pair_shares_its_prompt_and_ends_both_sides_at_the_end_token(family: str) -> None:
    tokenizer = make_tokenizer(family)
    end = tokenizer.convert_tokens_to_ids(FAMILIES[family][-1])
    prompt = [user("What is 3 plus 4?")]
    start, chosen, rejected = encode_pair(tokenizer, prompt, [assistant("It is 7.")], [assistant("\n\nIt is 8.")])
    assert start == prompt_ids(tokenizer, prompt)
    assert (chosen[-1], rejected[-1]) == (end, end)
    assert (chosen.count(end), rejected.count(end)) == (1, 1)
    assert tokenizer.decode(chosen[:-1]).strip() == "It is 7."
    assert tokenizer.decode(rejected[:-1]).strip() == "It is 8."


def test_a_pair_of_several_messages_is_refused() -> None:
    row = {"prompt_id": "x", "prompt": [user("a")], "chosen": [assistant("b"), user("c")], "rejected": [assistant("d")]}
    with pytest.raises(DataError, match=r"prompt_id x.*chosen must be one assistant message"):
        list(encode_pairs(make_tokenizer("qwen2"), [row]))


def test_fifteen_hundred_short_rows_are_encoded_in_a_second_of_cpu_time() -> None:
    """25,000 are on a quiet machine; the bound only catches a return to one row at a time, some 460 a second."""
    rows = [
        {"prompt": [user(f"What is {i} plus 4?")], "completion": [assistant("The answer is 7.")]} for i in range(2000)
    ]
    tokenizer = make_tokenizer("qwen2")
    start = time.process_time()
    assert sum(1 for _ in encode_demonstrations(tokenizer, rows)) == 2000
    assert 2000 / (time.process_time() - start) > 1500
