"""What a recipe may say of an OpenAI-compatible server."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Server = Literal["any", "openai", "vllm", "sglang", "llama.cpp", "transformers"]

OURS = frozenset(
    "model messages prompt n seed stream stop max_tokens max_completion_tokens temperature top_p logprobs "
    "top_logprobs response_format".split()
)
"""Keys of a request that have a setting of their own: under `extra_body` they would make the manifest untrue."""

BEYOND = frozenset("top_k min_p repetition_penalty repeat_penalty stop_token_ids generation_config".split())
"""Keys that go along by themselves where `server` says what the server takes."""


class OpenAISettings(BaseModel):
    """One entry under `engines:` with `kind: openai`: a model behind one or several servers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)

    speed_only: ClassVar[frozenset[str]] = frozenset(
        "base_url api_key_env concurrency requests_per_minute tokens_per_minute timeout_s max_retries "
        "prompt_price completion_price".split()
    )
    """Settings that change how fast, where and for how much, but not what is sampled; no part of a fingerprint."""

    kind: Literal["openai"] = Field("openai", description="What runs the model: a server with OpenAI's interface.")
    model: str = Field(min_length=1, description="The model's name on the server.")
    base_url: str | tuple[str, ...] = Field(
        "https://api.openai.com/v1",
        description="The server's address, mostly with /v1 at its end; a list where several serve the same model.",
    )
    server: Server = Field(
        "any",
        description="What kind of server it is, which decides how it is asked for what OpenAI's interface lacks "
        f"(top_k, min_p, choices, token ids): {', '.join(get_args(Server))}.",
    )
    api: Literal["both", "chat", "completions"] = Field(
        "both",
        description="Which endpoints it has: /chat/completions for messages, /completions for raw text and token ids.",
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict, description="Parameters of that server alone, sent along with every request."
    )
    samples_per_request: int = Field(
        1,
        ge=1,
        le=128,
        description="Samples of a prompt asked for in one request (n). 1 gives each sample a seed of its own; more "
        "pays for the prompt once where the server bills by token.",
    )
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="The name of the environment variable that holds the key; never the key itself."
    )
    concurrency: int = Field(32, ge=1, le=1000, description="Most requests in flight at each address.")
    requests_per_minute: float | None = Field(
        None, gt=0, description="Most requests a minute, at all addresses together; no limit by default."
    )
    tokens_per_minute: float | None = Field(
        None, gt=0, description="Most tokens of prompts and completions a minute, at all addresses together."
    )
    timeout_s: float = Field(600.0, gt=0, description="Seconds after which an unanswered request is asked again.")
    max_retries: int = Field(
        8, ge=0, description="How often a request that failed is asked again; waits between grow to a minute."
    )
    prompt_price: float | None = Field(None, ge=0, description="USD for a million tokens of prompts.")
    completion_price: float | None = Field(None, ge=0, description="USD for a million tokens of completions.")

    @property
    def addresses(self) -> tuple[str, ...]:
        """`base_url` as a list, whichever way it was written."""
        return (self.base_url,) if isinstance(self.base_url, str) else self.base_url

    @field_validator("model")
    @classmethod
    def _is_a_name(cls, model: str) -> str:
        if model.startswith("step:"):
            raise ValueError(
                "a server knows its models by name, not by step; serve the step's model (RUN/STEP/model) and give the "
                "name that it is served under, or use kind: transformers"
            )
        return model

    @field_validator("base_url")
    @classmethod
    def _are_addresses(cls, base_url: str | tuple[str, ...]) -> str | tuple[str, ...]:
        addresses = (base_url,) if isinstance(base_url, str) else base_url
        if not addresses or len(set(addresses)) < len(addresses):
            raise ValueError("one or more different addresses were expected")
        for address in addresses:
            if re.match(r"[a-z]+://[^/]*@", address):  # not shown: it may hold a password
                raise ValueError("an address must hold no user or password; name a variable with api_key_env")
            if not re.fullmatch(r"https?://[^/\s?#]+[^\s?#]*", address):
                raise ValueError(f"expected an address such as http://localhost:8000/v1, found '{address}'")
        return base_url

    @field_validator("api_key_env")
    @classmethod
    def _is_no_key(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):  # not shown: it may be a key
            raise ValueError(
                "the name of an environment variable was expected, such as OPENAI_API_KEY (capitals, digits, _); "
                "a key itself never belongs into a recipe"
            )
        return name

    @model_validator(mode="after")
    def _leaves_ours_alone(self) -> OpenAISettings:
        taken = OURS if self.server in ("any", "openai") else OURS | BEYOND
        if wrong := sorted(taken & self.extra_body.keys()):
            raise ValueError(
                f"extra_body: {', '.join(wrong)}: sent by itself, as the stage's and the engine's settings say; "
                "leave it out here"
            )
        return self
