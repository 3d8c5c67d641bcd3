"""Who samples for online DPO: engines that take the policy's weights, in this process and behind a server."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.core.engines.build import VllmSettings, build_vllm
from align.core.engines.cache import CachedEngine
from align.core.engines.openai_engine import OpenAIEngine
from align.core.engines.openai_settings import OpenAISettings
from align.core.engines.scripted import ScriptedEngine
from align.core.engines.transformers_engine import TransformersEngine
from align.core.errors import EngineError, ModelError, RecipeError
from align.core.stage import Tools
from align.core.store import ModelRef, Table
from align.recipe import load_recipe
from align.train import samplers
from align.train.online_dpo import STAGE
from align.train.online_settings import Config
from tests.core.engines import vllm_standin
from tests.train import steps
from tests.train.test_online_dpo import QUICK, inputs, trained
from tests.train.tiny import make_model, make_tokenizer, save_model
from tests.train.weights_server import WeightsServer

__all__ = ["inputs", "trained"]  # its fixtures

FEW = QUICK | {"episodes": 1, "prompts_per_episode": 6, "samples_per_prompt": 4, "max_tokens": 24, "probe_prompts": 2}


def served(at: WeightsServer, **more: Any) -> OpenAIEngine:
    settings = {"model": "policy", "base_url": at.url, "server": "vllm", "max_retries": 4, **more}
    return OpenAIEngine(OpenAISettings.model_validate_json(json.dumps(settings)), first_wait_s=0.01)


def adapted(seed: int = 0) -> tuple[Any, Any]:
    """A random base model, and a copy of it with LoRA adapters that do something."""
    base = make_model(seed=seed)
    wrapped: Any = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return base, wrapped


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model's folder."""
    return save_model(tmp_path_factory.mktemp("plain") / "model")


# --- the weights ------------------------------------------------------------------------------------------------------


def test_adapters_are_added_under_the_base_s_names_and_the_live_model_stays_as_it_was() -> None:
    """W + (alpha / r) · B · A, alpha / r = 2; what has no adapter is the base's, and so are the names."""
    base, wrapped = adapted()
    before = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    found = samplers.weights_of(wrapped)
    expected = base.state_dict()
    assert found.keys() == expected.keys()
    layer = wrapped.base_model.model.model.layers[1].mlp.up_proj
    product = 2 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(found[name], expected[name] + product)
    changed = {name for name in found if not torch.equal(found[name], expected[name])}
    assert changed == {name for name in found if "_proj.weight" in name}
    assert all(torch.equal(before[name], tensor) for name, tensor in wrapped.state_dict().items())


def test_weights_count_as_other_ones_after_a_step_and_after_a_roll_back_which_is_no_step() -> None:
    model = make_model()
    start = samplers.state_of(model, 0)
    assert samplers.state_of(model, 0) == start
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    assert samplers.state_of(model, 0) != start
    assert samplers.state_of(model, 1) != samplers.state_of(model, 0)


# --- in this process --------------------------------------------------------------------------------------------------


def test_a_second_model_that_takes_the_weights_samples_as_the_live_one_does(plain: str, tmp_path: Path) -> None:
    """Bit for bit in float32, before and after the weights change; also where the recipe's engine comes behind a
    completion cache, which would give the samples of the old weights again."""
    model: Any = AutoModelForCausalLM.from_pretrained(plain)
    tokenizer = make_tokenizer()
    engine = CachedEngine(TransformersEngine(plain, fingerprint="0"), tmp_path / "cache")
    tools = Tools(3, {"sampler": engine}, steps.Silent(), tmp_path, tmp_path)
    taken = samplers.given(Config(), tools, steps.policy(plain), tokenizer, 1)
    assert taken is not None
    live = samplers.Live(model, tokenizer)
    params = samplers.SamplingParams(max_tokens=6, logprobs=True, seed=5)
    seen = []
    for step in (0, 1):
        taken.take(model, step)
        one, two = (sorted(each.sample([[7, 8], [9]], 2, params), key=lambda s: s[:2]) for each in (live, taken))
        assert one == two
        seen.append(one)
        taken.rest()
        with torch.no_grad():
            model.model.norm.weight.mul_(3)
    assert seen[0] != seen[1]
    assert (engine.misses, engine.hits, len(engine.file)) == (8, 0, 0)  # counted, and neither read nor kept
    engine.close()


def test_vllm_is_woken_given_the_merged_weights_and_put_to_sleep_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_standin.install(monkeypatch)
    save_model(tmp_path / "policy")
    settings = VllmSettings(kind="vllm", model=str(tmp_path / "policy"), sleep_mode=True)
    engine: Any = build_vllm(settings, fingerprint="0")
    sampler = samplers.Loaded(engine)
    _, model = adapted()
    sampler.take(model, 0)
    sampler.take(model, 0)  # nothing changed: not loaded again
    sampler.rest()
    sampler.take(model, 0)  # its weights went when it slept
    loaded = ["reload_weights", "reset_prefix_cache"]
    assert engine.llm.calls == [*loaded, "sleep 2", "wake_up", *loaded]
    expected = samplers.weights_of(model)
    assert all(torch.equal(engine.llm.reloaded[name], expected[name]) for name in expected)
    assert len(list(sampler.sample([[1, 2, 3]], 2, samplers.SamplingParams(max_tokens=4)))) == 2
    before = sampler.fingerprint
    sampler.take(model, 1)
    assert sampler.fingerprint == before, "under it an episode's samples are kept over a kill"
    sampler.close()
    awake = samplers.Loaded(build_vllm(settings.model_copy(update={"sleep_mode": False}), fingerprint="0"))
    awake.take(model, 0)
    awake.rest()
    awake.take(model, 0)
    assert awake.engine.llm.calls == loaded


# --- a server ---------------------------------------------------------------------------------------------------------


def test_a_run_samples_from_a_server_which_reads_the_weights_whenever_they_changed(
    inputs: dict[str, Table | ModelRef], trained: Path, tmp_path: Path
) -> None:
    """A trial, the start, and what the episode made of it: the gap to the trainer stays at rounding all the way."""
    with WeightsServer(trained) as server:
        engine = served(server)
        tools = Tools(3, {"sampler": engine}, steps.Silent(), tmp_path / "work", tmp_path / "online", {"device": "cpu"})
        tools.work.mkdir()
        summary = STAGE.run(Config(**FEW), inputs, tools).summary
        engine.close()
        assert len(server.read) == server.resets == 3 and summary["steps"] > 0
        assert len(set(server.read)) == len(server.read)
        end = AutoTokenizer.from_pretrained(trained).convert_tokens_to_ids("<|im_end|>")
        assert all(end in body["stop_token_ids"] for body in server.asked)
        kept = [path for path in server.read if path.exists()]
        assert kept == server.read[-1:], "one checkpoint at a time"
        last = AutoModelForCausalLM.from_pretrained(kept[0]).state_dict()
    assert summary["pairs"] > 0
    assert max(line["heldout/gap"] for line in steps.curves(tmp_path / "online") if "heldout/gap" in line) < 1e-4
    assert all(torch.equal(tensor, last[name]) for name, tensor in steps.weights(tmp_path / "online").items())


def sampler_of(server: WeightsServer, folder: Path, **more: Any) -> samplers.Served:
    return samplers.Served(served(server, **more), make_tokenizer(), folder / "sampler", 0.1)


def test_a_server_s_weights_are_sent_once_and_again_when_they_changed(plain: str, tmp_path: Path) -> None:
    _, model = adapted(seed=1)
    with WeightsServer(plain) as server:
        sampler = sampler_of(server, tmp_path)
        sampler.take(model, 0)
        sampler.take(model, 0)
        assert len(server.read) == 2  # the trial and the start
        sampler.take(model, 1)
        assert len(server.read) == 3
        served_now = server.engine.model.state_dict()
        assert all(torch.equal(served_now[name], tensor) for name, tensor in samplers.weights_of(model).items())
        sampler.close()


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (
            {"dev_mode": False},
            r"rpc: status 404, no weights were read; start it with VLLM_SERVER_DEV_MODE=1",
        ),
        ({"heeds": False}, r"other weights than those it was told to read.*with all weights at 0\.5 it was"),
        ({"gives_ids": False}, r"no samples come from the server: it tells no token ids"),
    ],
)
def test_a_server_that_cannot_or_does_not_take_weights_ends_the_run(
    plain: str, tmp_path: Path, how: dict[str, bool], told: str
) -> None:
    """One that pays no heed would go on sampling from the start, where a small step hides in the gap."""
    with WeightsServer(plain, **how) as server:
        sampler = sampler_of(server, tmp_path)
        with pytest.raises(EngineError, match=told):
            sampler.take(make_model(), 0)
        sampler.close()


def test_a_server_that_goes_stale_later_or_cannot_see_the_folder_ends_the_run(plain: str, tmp_path: Path) -> None:
    with WeightsServer(plain) as server:
        sampler = sampler_of(server, tmp_path)
        sampler.take(make_model(), 0)
        server.heeds = False
        other: Any = make_model(seed=1)
        with torch.no_grad():
            other.model.embed_tokens.weight.mul_(8)
        with pytest.raises(EngineError, match=r"lie [\d.]+ nats a token from the policy's \(max_sampler_gap 0\.1\)"):
            sampler.take(other, 1)
        server.heeds = True
        server.engine.model = AutoModelForCausalLM.from_pretrained(plain)
        server._reload = lambda folder: (500, {})  # type: ignore[method-assign]
        with pytest.raises(EngineError, match=r"status 500.*it must see .*/sampler/step-2-\d under this path"):
            sampler.take(make_model(), 2)
        sampler.close()
    sampler = sampler_of(server, tmp_path)
    with pytest.raises(EngineError, match=r"collective_rpc: .*refused.*see that the server runs"):
        sampler.take(make_model(), 0)


# --- precision --------------------------------------------------------------------------------------------------------


def test_a_bf16_training_is_sampled_from_in_bf16_and_its_weights_stay_in_fp32(trained: Path) -> None:
    """As the training computes: products in bf16 on a residual stream in fp32. Then the sampler's log-probabilities are
    those of the model's own forward under autocast to bf16's rounding, some thousandths of a nat a token."""
    model: Any = AutoModelForCausalLM.from_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    sampler = samplers.Live(model, tokenizer, "bf16")
    params = samplers.SamplingParams(max_tokens=24, logprobs=True)
    prompts = [
        tokenizer.encode(f"<|im_start|>user\nWhat is {i} plus {i}?<|im_end|>\n<|im_start|>assistant\n") for i in (2, 5)
    ]
    found = {place: done for place, _, done in sampler.sample(prompts, 1, params)}
    quick = sampler.engine._quick
    assert quick is not None and quick.blocks[0].qkv.dtype == quick.head.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    exact = sampler.engine.score(prompts, [found[i].token_ids for i in (0, 1)])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = sampler.engine.score(prompts, [found[i].token_ids for i in (0, 1)])
    for place in (0, 1):
        told = torch.tensor(found[place].logprobs)
        apart = (told - torch.tensor(rounded[place])).abs().mean()
        assert apart < 0.01 and (told - torch.tensor(exact[place])).abs().max() > 1e-5
    sampler.rest()
    assert quick.blocks == [] and quick.head is quick.embed
    again = {place: done for place, _, done in sampler.sample(prompts, 1, params)}
    assert again == found


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path: Path) -> Iterator[Any]:
    yield lambda engine: Tools(3, {"sampler": engine}, steps.Silent(), tmp_path, tmp_path)


def test_engines_that_cannot_sample_for_a_policy_are_refused_with_a_remedy(plain: str, tools: Any) -> None:
    policy, tokenizer = steps.policy(plain), make_tokenizer()
    scripted = ScriptedEngine(lambda prompt, index: "", fingerprint="0")
    other = TransformersEngine(plain, fingerprint="another")
    with WeightsServer(plain) as server:
        cases: list[tuple[Any, dict[str, Any], int, str]] = [
            (scripted, {}, 1, "ScriptedEngine, which takes no weights; use an engine of kind transformers or vllm"),
            (other, {}, 1, "its model is model, and the policy is model; give the engine the policy's own model"),
            (other, {}, 2, "one training process, and 2 train; set processes=1"),
            (other, {"quantization": "nf4", "lora_rank": 4}, 1, r"in 4 bits \(quantization: nf4\)"),
            (served(server, server="any"), {}, 1, "kind 'any' gives no token ids back"),
            (served(server, server="sglang"), {}, 1, "kind 'sglang' can't be told to read other weights"),
            (served(server, api="chat"), {}, 1, "prompts are sent as token ids, to /completions"),
        ]
        for engine, settings, processes, told in cases:
            with pytest.raises((RecipeError, ModelError), match=told):
                samplers.given(Config(**settings), tools(engine), policy, tokenizer, processes)
    own = TransformersEngine(plain, fingerprint="0")
    both = Tools(3, {"sampler": own, "judge": own}, steps.Silent(), Path(), Path())
    with pytest.raises(RecipeError, match=r"^judge: it has one engine with sampler.*give judge another model"):
        samplers.given(Config(), both, policy, tokenizer, 1)
    nothing = Tools(3, {}, steps.Silent(), Path(), Path())
    assert samplers.given(Config(), nothing, policy, tokenizer, 8) is None


RECIPE = """\
name: sampled
steps:
  prompts: {{stage: prompts, with: {{source: {{tiny: {{families: {{math: 4}}, seed: 1}}}}}}}}
  sft: {{stage: "tests.fakes:TRAIN"}}
  other: {{stage: "tests.fakes:TRAIN"}}
  online:
    stage: online-dpo
    in: {{policy: {policy}, prompts: prompts}}
    engines: {{sampler: {sampler}}}
    with: {{scorer: verifier}}
    processes: {processes}
"""
SERVED = '{kind: openai, model: any, server: vllm, base_url: "http://localhost:1/v1"}'


@pytest.mark.parametrize(
    ("policy", "sampler", "processes", "told"),
    [
        ("sft", "step:sft", 1, None),
        ("tiny", "tiny", 1, None),
        ("sft", SERVED, 1, None),
        ("sft", "step:other", 1, "its engine holds other, and is to take the weights of the policy sft; give it"),
        ("sft", "tiny", 1, "its engine holds tiny, and is to take the weights of the policy sft"),
        ("tiny", "tiny-writer", 1, "holds tiny-writer, and is to take the weights of the policy tiny"),
        ("sft", "step:sft", 2, "2 processes train, and an engine serves one; set it to 1, or leave out"),
    ],
)
def test_a_recipe_s_sampler_holds_the_policy_s_own_model(
    tmp_path: Path, policy: str, sampler: str, processes: int, told: str | None
) -> None:
    file = tmp_path / "sampled.yaml"
    file.write_text(RECIPE.format(policy=policy, sampler=sampler, processes=processes))
    if told is None:
        assert "sampler" in load_recipe(file, (), tmp_path / "run").steps["online"].engines
        return
    with pytest.raises(RecipeError, match=told):
        load_recipe(file, (), tmp_path / "run")
