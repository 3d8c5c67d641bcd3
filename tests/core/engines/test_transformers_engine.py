from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForSequenceClassification

from align.core.chat import prompt_ids
from align.core.engines import Completion, Prompt, SamplingParams
from align.core.engines.build import EngineSettings, build_engine
from align.core.engines.quick_weights import is_quick
from align.core.engines.transformers_engine import TransformersEngine
from align.core.errors import EngineError, ModelError
from tests.core.engines.models import QUICK, SHAPES, byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
PROMPTS: list[Prompt] = ["hello", "a", "what is the answer to this?", "hello world " * 5, [5, 6, 7], "hellp"]
GREEDY = SamplingParams(max_tokens=24, temperature=0, logprobs=True)


def _all(engine: TransformersEngine, prompts: Iterable[Prompt], n: int, params: SamplingParams) -> Any:
    return {(number, index): completion for number, index, completion in engine.sample(prompts, n, params)}


def _generated(model: Any, ids: list[int], ends: set[int], max_tokens: int = 24, **settings: Any) -> tuple[int, ...]:
    """What transformers' own `generate` gives for one prompt, greedy."""
    row = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=0,
        **settings,
    )
    return tuple(row[0, len(ids) :].tolist())


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_equals_generate_and_logprobs_equal_a_fresh_forward(shape: str) -> None:
    """Four slots and twelve samples: rows of different ages and prompts run side by side, slots are refilled."""
    for seed in range(2):
        model = tiny_model(shape, seed)
        engine = TransformersEngine(model, TOKENIZER, slots=4)
        assert is_quick(model) == (shape in QUICK)
        got = _all(engine, PROMPTS, 2, GREEDY)
        for number, prompt in enumerate(PROMPTS):
            ids = prompt_ids(TOKENIZER, prompt)
            want = _generated(model, ids, engine._end_ids)
            for index in range(2):
                completion = got[number, index]
                assert completion.token_ids == want
                assert completion.finish_reason == ("stop" if want[-1] in engine._end_ids else "length")
                fresh = engine.score([ids], [completion.token_ids])[0]
                assert completion.logprobs == pytest.approx(fresh, abs=1e-4)


def test_lengths_differ_in_the_comparison_with_generate() -> None:
    """Guards the test above: some of its completions end early, or refilled slots would not be tried."""
    engine = TransformersEngine(tiny_model("qwen3"), TOKENIZER, slots=4)
    assert len({len(c.token_ids) for c in _all(engine, PROMPTS, 1, GREEDY).values()}) > 2


def test_a_recurrent_model_is_sampled_in_groups_of_one_length() -> None:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        initializer_range=0.2, eos_token_id=258, pad_token_id=256, bos_token_id=None,
    )  # fmt: skip
    model = Qwen3NextForCausalLM(config).eval()
    engine = TransformersEngine(model, TOKENIZER, slots=8)
    got = _all(engine, PROMPTS, 2, SamplingParams(max_tokens=8, temperature=0))
    for number, prompt in enumerate(PROMPTS):
        want = _generated(model, prompt_ids(TOKENIZER, prompt), engine._end_ids, 8)
        assert got[number, 0].token_ids == got[number, 1].token_ids == want


@pytest.mark.parametrize("shape", ["qwen2", "gemma"])
def test_a_sample_is_the_same_on_any_number_of_slots_and_in_any_order(shape: str) -> None:
    model = tiny_model(shape)
    params = SamplingParams(max_tokens=40, seed=11)
    few = _all(TransformersEngine(model, TOKENIZER, slots=3), PROMPTS, 4, params)
    many = _all(TransformersEngine(model, TOKENIZER, slots=64), PROMPTS[::-1], 4, params)
    last = len(PROMPTS) - 1
    assert {(last - number, index): c for (number, index), c in many.items()} == few
    assert len({c.token_ids for c in few.values()}) == len(few)  # and no two samples are alike


@pytest.mark.parametrize("shape", ["qwen2", "gemma", "qwen2_moe"])
def test_rounding_between_batches_stays_far_below_the_margin_of_a_close_draw(shape: str) -> None:
    """What `draws.CLOSE_MASS` and `CLOSE_LOGITS` rest on: the same rows, decoded beside others and computed alone."""
    from align.core.engines import draws
    from align.core.engines.slots import SlotLoop

    model = tiny_model(shape)
    engine = TransformersEngine(model, TOKENIZER, slots=16)
    logit_gaps: list[float] = []
    mass_gaps: list[float] = []
    plain = SlotLoop._take

    def watched(loop: Any, first: int, logits: torch.Tensor) -> Any:
        for at, slot in enumerate(loop.slot_of[first:][:4]):
            alone = loop.decoder.alone(loop.prompts[slot] + loop._ids(slot))
            size = float(alone.abs().max())
            logit_gaps.append(float((alone - logits[at]).abs().max()) / size)
            moved = alone.softmax(-1).cumsum(-1) - logits[at].softmax(-1).cumsum(-1)
            mass_gaps.append(float(moved.abs().max()) / size)
        return plain(loop, first, logits)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(SlotLoop, "_take", watched)
        _all(engine, PROMPTS, 4, SamplingParams(max_tokens=24, seed=3))
    assert len(logit_gaps) > 100 and max(logit_gaps) > 0  # batches do round in another way
    assert max(logit_gaps) < draws.CLOSE_LOGITS / 2
    assert max(mass_gaps) < draws.CLOSE_MASS / 2


@pytest.mark.parametrize("shape", ["qwen2", "gemma"])
def test_a_draw_on_the_very_border_is_decided_the_same_in_every_batch(shape: str) -> None:
    """With the margin at its largest every draw is close, so each token comes from the logits of its text alone."""
    from align.core.engines import draws

    model = tiny_model(shape)
    params = SamplingParams(max_tokens=16, seed=4, top_p=0.9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws, "CLOSE_MASS", 1.0)
        few = _all(TransformersEngine(model, TOKENIZER, slots=3), PROMPTS, 2, params)
        many = _all(TransformersEngine(model, TOKENIZER, slots=64), PROMPTS, 2, params)
    assert few == many == _all(TransformersEngine(model, TOKENIZER, slots=7), PROMPTS, 2, params)


@pytest.mark.parametrize("shape", ["qwen2", "gemma"])
def test_the_repetition_penalty_is_that_of_generate(shape: str) -> None:
    model = tiny_model(shape)
    engine = TransformersEngine(model, TOKENIZER, slots=4)
    params = SamplingParams(max_tokens=24, temperature=0, repetition_penalty=1.7)
    got = _all(engine, PROMPTS, 2, params)
    free = _all(engine, PROMPTS, 2, GREEDY)
    for number, prompt in enumerate(PROMPTS):
        want = _generated(model, prompt_ids(TOKENIZER, prompt), engine._end_ids, repetition_penalty=1.7)
        assert got[number, 0].token_ids == got[number, 1].token_ids == want
    assert any(got[key].token_ids != free[key].token_ids for key in got)


def test_logprobs_are_the_models_own_whatever_is_left_out_or_punished() -> None:
    engine = TransformersEngine(tiny_model("qwen2"), TOKENIZER, slots=4)
    params = SamplingParams(max_tokens=12, min_p=0.05, repetition_penalty=1.3, choices=("red", "blue"), logprobs=True)
    for (number, _), completion in _all(engine, PROMPTS, 2, params).items():
        fresh = engine.score([prompt_ids(TOKENIZER, PROMPTS[number])], [completion.token_ids])[0]
        assert completion.logprobs == pytest.approx(fresh, abs=1e-4)


def test_a_stop_token_ends_a_completion_like_the_models_own() -> None:
    engine = TransformersEngine(_always(tiny_model("qwen2_untied"), 9), TOKENIZER)
    got = _all(engine, ["x"], 1, SamplingParams(max_tokens=5, stop_token_ids=(9,)))
    assert got[0, 0] == Completion("", (9,), "stop")


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"tag": {"enum": ["a", "b"]}, "level": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["tag", "level"],
        "additionalProperties": False,
    }
)


@pytest.mark.parametrize("shape", ["qwen2", "gemma"])
def test_a_random_model_asked_for_json_of_a_schema_gives_nothing_else(shape: str) -> None:
    engine = TransformersEngine(tiny_model(shape), TOKENIZER, slots=4)
    got = _all(engine, PROMPTS, 3, SamplingParams(max_tokens=150, seed=1, json_schema=SCHEMA))
    levels = set()
    for completion in got.values():
        assert completion.finish_reason == "stop"
        value = json.loads(completion.text)
        assert set(value) == {"tag", "level"} and value["tag"] in ("a", "b") and 1 <= value["level"] <= 9
        levels.add(value["level"])
    assert len(levels) > 1


def test_choices_are_drawn_with_the_models_probabilities_and_none_is_cut_short() -> None:
    choices = ("yes", "yes, sure", "no")
    engine = TransformersEngine(tiny_model("qwen2", initializer_range=0.05), TOKENIZER)
    got = _all(engine, ["hello"], 200, SamplingParams(max_tokens=20, choices=choices))
    assert {c.text for c in got.values()} == set(choices)
    assert {c.finish_reason for c in got.values()} == {"stop"}
    greedy = _all(engine, ["hello"], 1, SamplingParams(max_tokens=20, choices=choices, temperature=0))[0, 0]
    ids = prompt_ids(TOKENIZER, "hello")
    first = {text: TOKENIZER(text[0], add_special_tokens=False)["input_ids"] for text in ("yes", "no")}
    scores = {text: engine.score([ids], [tokens])[0][0] for text, tokens in first.items()}
    assert greedy.text.startswith(max(scores, key=lambda text: scores[text]))


def test_a_schema_that_is_none_is_refused_with_what_is_wrong() -> None:
    engine = TransformersEngine(tiny_model("qwen2"), TOKENIZER)
    for schema, says in (
        ("{", "no JSON"),
        ("[]", "found list, expected a JSON object"),
        ('{"type": "nonsense"}', "Invalid type: nonsense"),
    ):
        with pytest.raises(EngineError, match=says):
            _all(engine, ["x"], 1, SamplingParams(json_schema=schema))
    with pytest.raises(EngineError, match="only one of them"):
        _all(engine, ["x"], 1, SamplingParams(json_schema="{}", choices=("a",)))


def test_logprobs_stay_right_while_rows_of_many_ages_are_dropped_and_merged() -> None:
    engine = TransformersEngine(tiny_model("qwen3"), TOKENIZER, slots=16)
    prompts: list[Prompt] = [[1 + (7 * i + j) % 255 for j in range(3 + 5 * i % 17)] for i in range(40)]
    got = _all(engine, prompts, 3, SamplingParams(max_tokens=40, seed=1, logprobs=True))
    assert len({len(c.token_ids) for c in got.values()}) > 10  # many ends at many ages
    for (number, _), completion in got.items():
        fresh = engine.score([prompts[number]], [completion.token_ids])[0]  # type: ignore[list-item]
        assert completion.logprobs == pytest.approx(fresh, abs=1e-4)


def test_samples_change_with_the_seed() -> None:
    engine = TransformersEngine(tiny_model("qwen2"), TOKENIZER)
    one, two = (_all(engine, ["hello"], 1, SamplingParams(max_tokens=16, seed=seed))[0, 0] for seed in (0, 1))
    assert one.token_ids != two.token_ids


def test_messages_text_and_ids_of_one_prompt_give_the_same_sample() -> None:
    chat: Prompt = [{"role": "user", "content": "hi"}]
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    engine = TransformersEngine(tiny_model("qwen2"), TOKENIZER)
    got = _all(engine, [chat, text, ids], 1, SamplingParams(max_tokens=16))
    assert got[0, 0] == got[1, 0] == got[2, 0]


def test_first_tokens_are_drawn_with_the_models_probabilities() -> None:
    model = tiny_model("qwen2", initializer_range=0.05)
    engine = TransformersEngine(model, TOKENIZER)
    got = _all(engine, ["hello"], 4000, SamplingParams(max_tokens=1))
    with torch.no_grad():
        probs = model(torch.tensor([prompt_ids(TOKENIZER, "hello")])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in got.values()]), minlength=len(probs))
    expected = 4000 * probs
    big = expected >= 5
    statistic = float(((counts - expected) ** 2 / expected)[big].sum())
    freedom = int(big.sum())
    assert freedom > 100
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5  # chi-square: mean f, variance 2f


def test_a_completion_far_longer_than_the_first_room_equals_generate() -> None:
    model = tiny_model("llama", 4, max_position_embeddings=700)
    engine = TransformersEngine(model, TOKENIZER, slots=2)
    got = _all(engine, ["ab", "abcdef", "x"], 1, SamplingParams(max_tokens=600, temperature=0))
    want = [_generated(model, prompt_ids(TOKENIZER, p), engine._end_ids, 600) for p in ("ab", "abcdef", "x")]
    assert [got[i, 0].token_ids for i in range(3)] == want
    assert max(map(len, want)) > 300


def test_what_does_not_fit_the_context_is_an_error_that_says_so_and_the_rest_goes_on() -> None:
    engine = TransformersEngine(tiny_model("qwen2"), TOKENIZER)  # context 256
    got = _all(engine, ["x" * 250, "x" * 246, [], [9999]], 1, SamplingParams(max_tokens=10))
    assert [got[i, 0].finish_reason for i in range(4)] == ["error", "length", "error", "error"]
    assert "250 tokens and max_tokens 10 exceed the context of 256" in got[0, 0].error
    assert "empty" in got[2, 0].error
    assert "vocabulary" in got[3, 0].error


def test_max_context_narrows_the_models_own() -> None:
    engine = TransformersEngine(tiny_model("qwen2"), TOKENIZER, max_context=20)
    got = _all(engine, ["x" * 11, "x" * 10], 1, SamplingParams(max_tokens=10))
    assert [got[i, 0].finish_reason for i in range(2)] == ["error", "length"]


def test_messages_that_the_template_refuses_are_an_error_of_that_prompt_alone() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}hi"
    )
    engine = TransformersEngine(tiny_model("qwen2"), tokenizer)
    prompts: list[Prompt] = [[{"role": "system", "content": "s"}], [{"role": "user", "content": "u"}]]
    got = _all(engine, prompts, 1, SamplingParams(max_tokens=4))
    assert got[0, 0].finish_reason == "error" and "no system turn" in got[0, 0].error
    assert got[1, 0].finish_reason != "error"


def test_messages_without_a_chat_template_are_refused_with_a_remedy() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    engine = TransformersEngine(tiny_model("qwen2"), tokenizer)
    with pytest.raises(ModelError, match=r"no chat template.*chat_template\.jinja"):
        _all(engine, [[{"role": "user", "content": "u"}]], 1, SamplingParams(max_tokens=4))


def _always(model: Any, token: int) -> Any:
    """Makes an untied model say one token for ever."""
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.full((320,), -50.0).index_fill_(0, torch.tensor([token]), 50.0))
    return model


def test_end_tokens_are_the_tokenizers_the_generation_configs_and_im_end() -> None:
    model = tiny_model("qwen2_untied")
    model.generation_config.eos_token_id = [7, 8]
    eos, im_end = TOKENIZER.eos_token_id, TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    for token in (eos, im_end, 7, 8):
        engine = TransformersEngine(_always(model, token), TOKENIZER)
        assert _all(engine, ["x"], 1, SamplingParams(max_tokens=5))[0, 0] == Completion("", (token,), "stop")
    engine = TransformersEngine(_always(model, 9), TOKENIZER)
    assert _all(engine, ["x"], 1, SamplingParams(max_tokens=5))[0, 0].finish_reason == "length"


def test_a_special_token_may_be_given_as_stop_text() -> None:
    start = TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    engine = TransformersEngine(_always(tiny_model("qwen2_untied"), start), TOKENIZER)
    got = _all(engine, ["x"], 1, SamplingParams(max_tokens=5, stop=("<|im_start|>",)))
    assert got[0, 0] == Completion("", (start,), "stop")


def test_a_stop_text_of_one_character_in_several_tokens_is_found() -> None:
    """The letter is the bytes C4 81, a token each; the model is a bigram table: a -> C4 -> 81 -> a."""
    first, second = TOKENIZER("ā", add_special_tokens=False)["input_ids"]
    a = TOKENIZER("a", add_special_tokens=False)["input_ids"][0]
    model = tiny_model("qwen2_untied", hidden_size=320, num_attention_heads=4)
    with torch.no_grad():  # no layer adds anything; the embedding is one-hot, the head maps each token to its next
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(320))
        model.lm_head.weight.zero_()
        for before, after in ((a, first), (first, second), (second, a)):
            model.lm_head.weight[after, before] = 10.0
    engine = TransformersEngine(model, TOKENIZER)
    free = _all(engine, ["a"], 1, SamplingParams(max_tokens=4, temperature=0))[0, 0]
    assert (free.text, free.token_ids) == ("āa\ufffd", (first, second, a, first)), "cut within a letter"
    stopped = _all(engine, ["a"], 1, SamplingParams(max_tokens=6, temperature=0, stop=("aā",)))[0, 0]
    assert (stopped.text, stopped.token_ids, stopped.finish_reason) == ("ā", (first, second, a, first, second), "stop")


def test_logits_that_are_not_numbers_make_error_completions() -> None:
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    for params in (SamplingParams(max_tokens=4), SamplingParams(max_tokens=4, temperature=0)):
        completion = _all(TransformersEngine(model, TOKENIZER), ["x"], 1, params)[0, 0]
        assert completion.finish_reason == "error" and "NaN" in completion.error


def test_a_model_in_memory_is_sampled_with_the_weights_it_has_now() -> None:
    model = tiny_model("qwen2").train()
    engine = TransformersEngine(model, TOKENIZER)
    params = SamplingParams(max_tokens=12, temperature=0)
    before = _all(engine, ["hello"], 1, params)[0, 0]
    print_before = engine.fingerprint
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.tensor([prompt_ids(TOKENIZER, "hello world")])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    after = _all(engine, ["hello"], 1, params)[0, 0]
    assert after.token_ids != before.token_ids
    assert after.token_ids == _generated(model.eval(), prompt_ids(TOKENIZER, "hello"), engine._end_ids, 12)
    assert engine.fingerprint != print_before


def test_sampling_leaves_training_mode_and_gradients_alone() -> None:
    for shape in ("qwen2", "gemma"):
        model = tiny_model(shape, attention_dropout=0.5).train()
        engine = TransformersEngine(model, TOKENIZER)
        got = _all(engine, ["hello"], 1, GREEDY)[0, 0]
        assert model.training and all(p.grad is None for p in model.parameters())
        fresh = engine.score([prompt_ids(TOKENIZER, "hello")], [got.token_ids])[0]
        assert got.logprobs == pytest.approx(fresh, abs=1e-4)  # no dropout while it samples
        model(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()


def test_load_weights_takes_a_state_dict_and_refuses_another_models() -> None:
    engine = TransformersEngine(tiny_model("qwen2", 0), TOKENIZER)
    other = tiny_model("qwen2", 1)
    engine.load_weights(other.state_dict())
    got = _all(engine, ["hello"], 1, GREEDY)[0, 0]
    assert got.token_ids == _generated(other, prompt_ids(TOKENIZER, "hello"), engine._end_ids)
    with pytest.raises(ModelError, match="don't fit"):
        engine.load_weights(tiny_model("qwen2", hidden_size=64).state_dict())
    with pytest.raises(ModelError, match="missing"):
        engine.load_weights({"model.norm.weight": torch.ones(48)})


def _lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", lora_dropout=0.3))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return wrapped


@pytest.mark.parametrize("shape", ["qwen2", "gemma"])
def test_lora_adapters_count_live_and_from_a_folder(shape: str, tmp_path: Path) -> None:
    plain = tiny_model(shape)
    plain.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "adapter")
    ids = prompt_ids(TOKENIZER, "hello")
    without = _all(TransformersEngine(plain, TOKENIZER), ["hello"], 1, GREEDY)[0, 0]
    from transformers import AutoModelForCausalLM

    wrapped = _lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    wrapped.save_pretrained(tmp_path / "adapter")
    live = TransformersEngine(wrapped, TOKENIZER)
    got = _all(live, ["hello"], 1, GREEDY)[0, 0]
    assert is_quick(wrapped) == (shape == "qwen2")
    assert got.token_ids == _generated(wrapped.eval(), ids, live._end_ids) != without.token_ids
    merged = TransformersEngine(tmp_path / "adapter")
    assert _all(merged, ["hello"], 1, GREEDY)[0, 0].token_ids == got.token_ids
    assert merged.generator == "adapter"


def test_a_small_memory_budget_means_fewer_rows_not_other_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2")
    params = SamplingParams(max_tokens=20, seed=2)
    free = _all(TransformersEngine(model, TOKENIZER, slots=16), PROMPTS, 4, params)
    monkeypatch.setattr("align.core.engines.quick_decoder.memory_budget", lambda device: 1)
    tight = _all(TransformersEngine(model, TOKENIZER, slots=16), PROMPTS, 4, params)
    assert tight == free


def test_a_folder_gives_the_same_as_the_model_in_memory_and_a_stable_fingerprint(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    engine = build_engine(EngineSettings(model=str(tmp_path), device="cpu", slots=8), generator="base")
    assert isinstance(engine, TransformersEngine)
    assert _all(engine, PROMPTS, 1, GREEDY) == _all(TransformersEngine(model, TOKENIZER), PROMPTS, 1, GREEDY)
    assert engine.generator == "base"
    assert engine.fingerprint == build_engine(EngineSettings(model=str(tmp_path))).fingerprint
    assert build_engine(EngineSettings(model=str(tmp_path)), fingerprint="given").fingerprint == "given"
    engine.close()


def test_a_missing_model_is_a_model_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing-here.*save_pretrained"):
        TransformersEngine(tmp_path / "nothing-here")


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    config = tiny_model("qwen2").config
    config.num_labels = 1
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="Qwen2ForSequenceClassification, expected a causal language model"):
        TransformersEngine(tmp_path)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_model("qwen2").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights \(model.norm.weight"):
        TransformersEngine(tmp_path, TOKENIZER)


def test_a_folder_without_tokenizer_is_refused_with_a_remedy(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no tokenizer"):
        TransformersEngine(tmp_path)


def test_wrong_sampling_parameters_are_all_named_at_once() -> None:
    engine = TransformersEngine(tiny_model("qwen2"), TOKENIZER)
    with pytest.raises(EngineError) as caught:
        _all(engine, ["x"], 0, SamplingParams(max_tokens=0, temperature=-1, top_p=0, top_k=-1))
    for name in ("n:", "max_tokens:", "temperature:", "top_p:", "top_k:"):
        assert name in str(caught.value)


def test_a_device_that_is_not_there_is_an_engine_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cuda:99"):
        TransformersEngine(tmp_path, device="cuda:99")
    with pytest.raises(EngineError, match="expected auto, cpu, cuda"):
        TransformersEngine(tmp_path, device="nonsense")


def test_settings_of_speed_are_settings_and_the_device_is_one() -> None:
    assert set(EngineSettings.model_fields) > EngineSettings.speed_only >= {"device", "slots"}
