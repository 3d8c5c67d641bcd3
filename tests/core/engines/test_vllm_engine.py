"""The vLLM adapter's own logic, against a stand-in (vllm_standin.py): vLLM itself can't be had in the tested set, since
it pins another torch and needs a GPU, or a build for CPUs.

What only the real one can show is in the contract tests, whose entry `vllm` runs where vLLM is installed. That the
adapter uses what vLLM has is checked against vLLM's source: the installed one, or a folder named by ALIGN_VLLM_SOURCE.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from align.backends import BACKENDS
from align.core.chat import prompt_ids
from align.core.engines import Completion, Engine, Prompt, SamplingParams, vllm_engine
from align.core.engines.build import VllmSettings
from align.core.engines.cache import CachedEngine
from align.core.engines.draws import sample_key
from align.core.engines.transformers_engine import TransformersEngine
from align.core.engines.vllm_engine import VllmEngine
from align.core.errors import EngineError, ModelError
from tests.core.engines import test_contract as contract
from tests.core.engines import vllm_standin
from tests.core.engines.models import byte_tokenizer, tiny_model
from tests.core.engines.vllm_real import vllm_once

TOKENIZER = byte_tokenizer()
IM_END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
EOS = TOKENIZER.eos_token_id
PARAMS = SamplingParams(max_tokens=12, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model("qwen2").save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture
def engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmEngine]:
    vllm_standin.install(monkeypatch)
    made = VllmEngine(folder, max_in_flight=8, sleep_mode=True, fingerprint="given")
    yield made
    made.close()


# The contract's tests that ask for no model, on the adapter and its stand-in.
test_each_sample_comes_once = contract.test_each_sample_of_each_prompt_comes_exactly_once
test_same_call = contract.test_the_same_call_gives_the_same_completions
test_alone_or_beside_others = contract.test_a_sample_does_not_depend_on_what_is_sampled_beside_it
test_more_samples_than_slots = contract.test_more_samples_than_slots_all_come
test_bounded_reading = contract.test_prompts_are_read_a_bounded_number_ahead
test_an_empty_prompt = contract.test_an_empty_prompt_is_an_error_completion_and_the_others_still_come
test_max_tokens = contract.test_max_tokens_ends_a_completion_with_reason_length
test_stop_text = contract.test_a_stop_text_ends_a_completion_and_is_no_part_of_it
test_logprobs = contract.test_logprobs_come_one_a_token_when_asked_for_and_not_otherwise
test_no_prompts = contract.test_no_prompts_give_nothing
test_names = contract.test_generator_and_fingerprint_name_the_model
test_order = contract.test_in_order_gives_prompts_back_in_their_order_with_samples_by_index


def _all(engine: Engine, prompts: list[Prompt], n: int, params: SamplingParams, first: int = 0) -> Any:
    return {(number, index): done for number, index, done in engine.sample(iter(prompts), n, params, first)}


def test_every_sample_is_asked_with_a_seed_of_prompt_ids_seed_and_index(engine: VllmEngine) -> None:
    chat: Prompt = [{"role": "user", "content": "hi"}]
    _all(engine, [chat, "plain", [70, 71]], 2, PARAMS, 4)
    ids = [prompt_ids(TOKENIZER, chat), prompt_ids(TOKENIZER, "plain"), [70, 71]]
    assert [(r.prompt, r.params.seed) for r in engine.llm.llm_engine.seen] == [
        (each, sample_key(3, each, index) >> 1) for each in ids for index in (4, 5)
    ]


def test_a_resumed_run_asks_for_what_lacks_with_the_same_seeds(engine: VllmEngine, tmp_path: Path) -> None:
    whole = _all(engine, ["a", "b"], 4, PARAMS)
    first = CachedEngine(engine, tmp_path / "cache")
    stream = first.sample(["a", "b"], 4, PARAMS)
    some = {(number, index): done for number, index, done in (next(stream) for _ in range(3))}
    stream.close()
    first.file.close()
    again = CachedEngine(engine, tmp_path / "cache")
    assert _all(again, ["a", "b"], 4, PARAMS) == whole and again.hits == 3
    assert some.items() <= whole.items()
    again.file.close()


def test_no_more_requests_are_out_than_allowed_and_they_are_fed_as_others_finish(engine: VllmEngine) -> None:
    read = 0

    def prompts() -> Iterator[Prompt]:
        nonlocal read
        while read < 100:
            read += 1
            yield f"prompt {read}"

    stream = engine.sample(prompts(), 2, PARAMS)
    next(stream)
    assert read <= 6  # 8 requests are 4 prompts; one finished, and one prompt may be begun
    assert len(list(stream)) == 199
    assert engine.llm.llm_engine.most == 8


def test_a_consumer_that_stops_has_its_requests_aborted(engine: VllmEngine) -> None:
    stream = engine.sample((f"prompt {i}" for i in range(50)), 2, PARAMS)
    next(stream)
    out = set(engine.llm.llm_engine.requests)
    stream.close()
    assert out and out <= set(engine.llm.llm_engine.aborted)
    assert not engine.llm.llm_engine.requests
    assert len(_all(engine, ["next"], 2, PARAMS)) == 2


def test_two_calls_may_be_open_at_once_and_each_gets_its_own(engine: VllmEngine) -> None:
    """A stage may judge with the engine that it samples from, before it has taken all samples."""
    prompts: list[Prompt] = [f"prompt {i}" for i in range(12)]
    alone = _all(engine, prompts, 2, PARAMS)
    outer = engine.sample(iter(prompts), 2, PARAMS)
    got = {}
    for number, index, done in outer:
        got[number, index] = done
        assert _all(engine, [prompts[number]], 1, PARAMS, index)[0, index] == done
    assert got == alone


def test_end_tokens_stop_tokens_and_special_stop_texts_are_all_asked_for(engine: VllmEngine) -> None:
    start = TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    params = SamplingParams(max_tokens=40, stop=("zz", "<|im_start|>"), stop_token_ids=(7,))
    got = _all(engine, ["x"], 6, params)
    asked = engine.llm.llm_engine.seen[0].params
    assert (asked.stop, asked.stop_token_ids) == (["zz"], sorted({7, EOS, IM_END, start}))
    ended = [done for done in got.values() if done.finish_reason == "stop"]
    assert ended and all(done.token_ids[-1] == 7 for done in ended)
    assert all(done.text == TOKENIZER.decode(done.token_ids[:-1]) for done in ended)


def test_a_letter_cut_in_its_middle_reads_as_from_the_embedded_engine(engine: VllmEngine) -> None:
    engine.llm.llm_engine.letters = TOKENIZER("ā", add_special_tokens=False)["input_ids"][:1]
    got = _all(engine, ["x"], 8, SamplingParams(max_tokens=1)).values()
    assert {done.text for done in got if done.finish_reason == "length"} == {"\ufffd"}


def test_parameters_are_handed_on_as_they_are(engine: VllmEngine) -> None:
    params = SamplingParams(9, 0.5, 0.9, 40, 0.05, 1.2, seed=1, choices=("yes", "no"))
    _all(engine, ["x"], 1, params)
    asked = engine.llm.llm_engine.seen[0].params
    assert (asked.max_tokens, asked.temperature, asked.top_p, asked.top_k) == (9, 0.5, 0.9, 40)
    assert (asked.min_p, asked.repetition_penalty, asked.logprobs, asked.detokenize) == (0.05, 1.2, None, False)
    assert asked.structured_outputs.choice == ["yes", "no"]
    schema = '{"type": "object"}'
    _all(engine, ["x"], 1, SamplingParams(max_tokens=9, json_schema=schema))
    assert engine.llm.llm_engine.seen[-1].params.structured_outputs.json == schema


def test_what_vllm_cannot_do_as_asked_is_refused_with_a_remedy(engine: VllmEngine) -> None:
    for params, words in (
        (SamplingParams(temperature=2.5), r"found 2\.5, vLLM takes 0 \(greedy\) and 0\.01 to 2"),
        (SamplingParams(temperature=0.001), "temperature"),
        (SamplingParams(logprobs=True, choices=("a",)), "ask for one of the two"),
        (SamplingParams(max_tokens=0), "max_tokens: found 0"),
    ):
        with pytest.raises(EngineError, match=words):
            _all(engine, ["x"], 1, params)
    assert engine.llm.llm_engine.seen == []


def test_prompts_that_do_not_fit_are_errors_and_vllm_never_sees_them(engine: VllmEngine) -> None:
    params = SamplingParams(max_tokens=10)
    got = _all(engine, ["x" * 247, "x" * 246, [], [320], [-1]], 1, params)
    assert [got[i, 0].finish_reason == "error" for i in range(5)] == [True, False, True, True, True]
    assert "247 tokens and max_tokens 10 exceed the context of 256" in got[0, 0].error
    assert "vocabulary of 320" in got[3, 0].error
    assert len(engine.llm.llm_engine.seen) == 1


def test_a_request_that_vllm_refuses_is_an_error_completion(engine: VllmEngine) -> None:
    got = _all(engine, ["x", "y"], 1, SamplingParams(max_tokens=9, json_schema='{"type":"nonsense"}'))
    assert [done.error for done in got.values()] == ["vLLM refuses the request: no grammar for this schema"] * 2


@pytest.mark.parametrize("reason", ["abort", "error", "repetition", "new in some later version"])
def test_any_other_finish_reason_is_an_error_completion(engine: VllmEngine, reason: str) -> None:
    engine.llm.llm_engine.finishes_with = reason
    assert _all(engine, ["x"], 1, PARAMS) == {
        (0, 0): Completion("", (), "error", error=f"vLLM ended the request with reason '{reason}'")
    }


def test_a_dead_engine_is_told_as_such_when_it_is_fed_and_when_it_runs(engine: VllmEngine) -> None:
    stream = engine.sample((f"prompt {i}" for i in range(50)), 2, PARAMS)
    next(stream)
    engine.llm.llm_engine.dies = True
    with pytest.raises(EngineError, match=r"vLLM stopped: EngineCore encountered an issue.*run the same command again"):
        list(stream)
    with pytest.raises(EngineError, match="vLLM stopped"):
        _all(engine, ["x"], 1, PARAMS)


def test_how_vllm_is_started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_standin.install(monkeypatch)
    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    backend = BACKENDS["vllm"]
    settings = VllmSettings(kind="vllm", model=str(folder), dtype="bfloat16", tensor_parallel=2, max_context=128)
    made: Any = backend.engine(settings, generator="policy", fingerprint=None)
    told = made.llm.arguments
    assert (told["dtype"], told["max_model_len"], told["tensor_parallel_size"]) == ("bfloat16", 128, 2)
    assert told["distributed_executor_backend"] == "mp" and told["gpu_memory_utilization"] == 0.9
    assert told["enable_prefix_caching"] and told["logprobs_mode"] == "raw_logprobs"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert made.generator == "policy" and made.fingerprint == VllmEngine(folder).fingerprint
    assert set(backend.fixed(settings)) == {"kind", "dtype", "quantization", "max_context"}
    made.close()
    monkeypatch.delenv("VLLM_NO_USAGE_STATS")


def test_without_vllm_the_error_names_the_extra(folder: Path) -> None:
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed")
    with pytest.raises(EngineError, match=r"No module named 'vllm'.*align-toolkit\[vllm\].*environment of its own"):
        VllmEngine(folder)


def test_a_model_that_vllm_cannot_start_is_an_engine_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_standin.install(monkeypatch)
    TOKENIZER.save_pretrained(tmp_path / "too-large")
    with pytest.raises(EngineError, match=r"too-large: vLLM can't start.*No available memory.*lower max_context"):
        VllmEngine(tmp_path / "too-large")


def test_an_adapter_is_merged_before_vllm_loads_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM is given a plain model with base + B·A; the folder is gone when it has started."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    wrapped: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["q_proj"], lora_alpha=2)
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.5)
    wrapped.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    vllm_standin.install(monkeypatch)
    seen: dict[str, torch.Tensor] = {}

    class Looking(vllm_standin.LLM):
        def __init__(self, model: str, **arguments: Any) -> None:
            seen.update(load_file(f"{model}/model.safetensors"))
            super().__init__(model, **arguments)

    monkeypatch.setattr("vllm.LLM", Looking)
    made = VllmEngine(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert seen[name] == pytest.approx(load_file(folder / "model.safetensors")[name] + 2 * 0.5 * 0.5)
    assert not Path(made.llm.model).exists()
    assert made.generator == tmp_path.name


def test_weights_are_loaded_whole_through_a_file_and_the_prefix_cache_is_emptied(engine: VllmEngine) -> None:
    other = tiny_model("qwen2", seed=1)  # its lm_head is tied to the embedding, in one memory
    before = engine.fingerprint
    engine.load_weights(other.state_dict())
    assert engine.llm.calls == ["reload_weights", "reset_prefix_cache"]
    assert all(torch.equal(engine.llm.reloaded[name], tensor) for name, tensor in other.state_dict().items())
    once = engine.fingerprint
    engine.load_weights(other.state_dict())
    assert len({before, once, engine.fingerprint}) == 3
    with pytest.raises(ModelError, match=r"don't fit.*missing \['model\.embed_tokens\.weight'"):
        engine.load_weights({"model.norm.weight": torch.ones(48)})


def test_sleep_gives_memory_back_and_nothing_is_sampled_until_the_model_is_whole_again(engine: VllmEngine) -> None:
    engine.sleep()
    with pytest.raises(EngineError, match=r"call wake\(\)"):
        _all(engine, ["x"], 1, PARAMS)
    with pytest.raises(EngineError, match=r"wake\(\) it first"):
        engine.load_weights({})
    engine.wake()
    assert len(_all(engine, ["x"], 1, PARAMS)) == 1
    engine.sleep(keep_weights=False)
    engine.wake()
    with pytest.raises(EngineError, match=r"call load_weights\(\)"):
        _all(engine, ["x"], 1, PARAMS)
    engine.load_weights(tiny_model("qwen2").state_dict())
    assert len(_all(engine, ["x"], 1, PARAMS)) == 1
    assert engine.llm.calls == ["sleep 1", "wake_up", "sleep 2", "wake_up", "reload_weights", "reset_prefix_cache"]
    stream = engine.sample(["x"], 4, PARAMS)
    next(stream)
    with pytest.raises(EngineError, match="while it samples"):
        engine.sleep()
    stream.close()


def test_an_engine_that_was_not_made_to_sleep_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_standin.install(monkeypatch)
    with pytest.raises(EngineError, match="sleep_mode=True"):
        VllmEngine(folder).sleep()


@pytest.mark.gpu
def test_the_real_one_reports_the_log_probabilities_of_the_weights_that_it_has_now(tmp_path: Path) -> None:
    """Against the model's own forward in transformers, before and after other weights are loaded."""
    engine = vllm_once(tmp_path)
    assert isinstance(engine, VllmEngine)
    params = SamplingParams(max_tokens=12, seed=3, logprobs=True)
    ids = {number: prompt_ids(TOKENIZER, prompt) for number, prompt in enumerate(contract.PROMPTS)}
    for seed in (0, 1, 0):
        model = tiny_model("qwen2", seed=seed, hidden_size=256)
        engine.load_weights(model.state_dict())
        got = _all(engine, contract.PROMPTS, 3, params)
        scored = TransformersEngine(model, TOKENIZER).score(
            [ids[number] for number, _ in got], [done.token_ids for done in got.values()]
        )
        for done, fresh in zip(got.values(), scored, strict=True):
            assert done.logprobs == pytest.approx(fresh, abs=1e-3)


@pytest.mark.gpu
def test_the_real_one_keeps_to_choices_schemas_and_greedy(tmp_path: Path) -> None:
    engine = vllm_once(tmp_path)
    prompts = contract.PROMPTS
    chosen = _all(engine, prompts, 4, SamplingParams(max_tokens=12, choices=("yes", "no", "perhaps")))
    assert {done.text for done in chosen.values()} <= {"yes", "no", "perhaps"}
    assert {done.finish_reason for done in chosen.values()} == {"stop"}
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    made = _all(engine, prompts, 2, SamplingParams(max_tokens=30, json_schema=json.dumps(schema)))
    assert {done.text for done in made.values()} <= {'{"a":1}', '{"a":2}'}
    model = tiny_model("qwen2", hidden_size=256)
    greedy = SamplingParams(max_tokens=12, temperature=0)
    assert _all(engine, prompts, 1, greedy) == _all(TransformersEngine(model, TOKENIZER), prompts, 1, greedy)
    penalised = _all(engine, prompts, 1, replace(greedy, repetition_penalty=1.3))
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt_ids(TOKENIZER, prompt)])
        want = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, repetition_penalty=1.3,
            eos_token_id=[EOS, IM_END], pad_token_id=EOS,
        )[0, ids.shape[1] :]  # fmt: skip
        assert penalised[number, 0].token_ids == tuple(want.tolist())


# vLLM's source, read and never run.


def _source() -> Path | None:
    named = os.environ.get("ALIGN_VLLM_SOURCE")
    if named:
        return Path(named) / "vllm" if (Path(named) / "vllm").is_dir() else Path(named)
    spec = importlib.util.find_spec("vllm")
    return Path(spec.origin).parent if spec and spec.origin else None


def _class(root: Path, module: str, name: str) -> ast.ClassDef:
    for node in ast.parse((root / module).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise AssertionError(f"{module} has no class {name}")


def _fields(of: ast.ClassDef) -> set[str]:
    """What a class declares, sets on itself in a method, or defines."""
    declared = {n.target.id for n in of.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assigned = {
        n.attr
        for n in ast.walk(of)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and ast.unparse(n.value) == "self"
    }
    return declared | assigned | {n.name for n in of.body if isinstance(n, ast.FunctionDef)}


def _parameters(of: ast.ClassDef, method: str) -> list[str]:
    found = next(n for n in of.body if isinstance(n, ast.FunctionDef) and n.name == method)
    return [a.arg for a in [*found.args.args, *found.args.kwonlyargs]][1:]


def test_what_the_adapter_uses_is_in_the_source_of_vllm() -> None:
    root = _source()
    if root is None:
        pytest.skip("vLLM isn't installed, and ALIGN_VLLM_SOURCE names no folder of its source")
    adapter = ast.parse(Path(vllm_engine.__file__).read_text())
    llm = _class(root, "entrypoints/llm.py", "LLM")
    engine = _class(root, "v1/engine/llm_engine.py", "LLMEngine")
    known = {
        "LLM": {*_parameters(llm, "__init__"), *_fields(_class(root, "engine/arg_utils.py", "EngineArgs"))},
        "VllmParams": _fields(_class(root, "sampling_params.py", "SamplingParams")),
        "StructuredOutputsParams": _fields(_class(root, "sampling_params.py", "StructuredOutputsParams")),
        "self.llm": _fields(llm),
        "self.llm.llm_engine": _fields(engine),
        "engine": _fields(engine),
        "config": _fields(_class(root, "config/model.py", "ModelConfig")),
        "output": _fields(_class(root, "outputs.py", "RequestOutput")),
        "done": _fields(_class(root, "outputs.py", "CompletionOutput")),
        "self.llm.llm_engine.engine_core": _fields(_class(root, "v1/engine/core_client.py", "EngineCoreClient")),
        "RequestOutputKind": {
            ast.unparse(n.targets[0])
            for n in _class(root, "sampling_params.py", "RequestOutputKind").body
            if isinstance(n, ast.Assign)
        },
        "at[token]": _fields(_class(root, "logprobs.py", "Logprob")),
    }
    used: set[tuple[str, str]] = set()
    for node in ast.walk(adapter):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in known:
            used.add((ast.unparse(node.value), node.attr))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in known:
            used |= {(ast.unparse(node.func), keyword.arg) for keyword in node.keywords if keyword.arg}
        if isinstance(node, ast.FunctionDef) and node.name == "_options":
            (returned,) = [n.value for n in ast.walk(node) if isinstance(n, ast.Return)]
            assert isinstance(returned, ast.Dict)
            used |= {("VllmParams", key.value) for key in returned.keys if isinstance(key, ast.Constant)}
    assert {place for place, _ in used} == set(known), "this test looks at names that the adapter no longer has"
    assert [f"{place}.{name}" for place, name in sorted(used) if name not in known[place]] == []

    for node in ast.walk(adapter):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "vllm":
            path = root.joinpath(*str(node.module).split(".")[1:])
            text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
            assert all(alias.name in text for alias in node.names), node.module
    assert _parameters(engine, "add_request")[:3] == ["request_id", "prompt", "params"]
    assert _parameters(engine, "abort_request")[0] == "request_ids"
    assert _parameters(llm, "sleep")[0] == "level"
    assert {"method", "kwargs"} <= set(_parameters(llm, "collective_rpc"))
    runner = _class(root, "v1/worker/gpu_model_runner.py", "GPUModelRunner")
    assert "weights_path" in _parameters(runner, "reload_weights")
    structured = _fields(_class(root, "config/structured_outputs.py", "StructuredOutputsConfig"))
    assert {"backend", "disable_any_whitespace"} <= structured
    assert "reload_weights" in _fields(_class(root, "v1/worker/gpu_worker.py", "Worker"))
    reasons = (root / "v1/engine/__init__.py").read_text()
    assert 'FINISH_REASON_STRINGS = ("stop", "length",' in reasons
    assert '"VLLM_NO_USAGE_STATS"' in (root / "envs.py").read_text()
    assert '"raw_logprobs"' in (root / "config/model.py").read_text()
