"""`align export MODEL out=FOLDER`: full weights that any library loads, checked after writing, and pushed to the Hub.

LoRA adapters are merged in fp32. What is written is loaded again and must give the log-probabilities (of a reward
model: the scores) that the model in memory gave with its weights rounded, so a lost head, an untied embedding or a full
disk shows here and not at the one who downloads it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from align.core.errors import ModelError, RunError
from align.core.hub import check_model
from align.core.records import Kind, Messages
from align.core.stage import StageConfig
from align.core.store import ModelRef
from align.settings import from_arguments

SAME = 1e-5
"""Nats a token, or points of score, by which the model that was loaded again may differ."""

_MADE_ANEW = (
    "*.safetensors", "*.bin", "*.index.json", "config.json", "generation_config.json", "adapter_*", "training_args*",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.jinja",
)  # fmt: skip
"""Files of a model's folder that are written anew or have lost their meaning; all others go along."""

_PROBE: list[Messages] = [
    [{"role": "user", "content": "What is 17 plus 25?"}, {"role": "assistant", "content": "17 plus 25 is 42."}],
    [{"role": "user", "content": "Name three colours."}, {"role": "assistant", "content": "Red, green and blue."}],
]


class ExportConfig(StageConfig):
    """Settings of `align export`."""

    out: str = Field("", description="folder for the model; must be new or empty")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of the weights; auto is that of the model, of adapters that of their base"
    )
    push: str = Field("", description="name on the Hub, user/name, to upload it to")
    private: bool = Field(True, description="whether a repository that push makes is private")
    message: str = Field("Upload with align export", description="of the commit on the Hub")

    @field_validator("push")
    @classmethod
    def _is_a_name(cls, push: str) -> str:
        if push and push.count("/") != 1:
            raise ValueError(f"found {push!r}, expected user/name or organisation/name")
        return push

    @model_validator(mode="after")
    def _goes_somewhere(self) -> Self:
        if not self.out:
            raise ValueError("out is missing: the folder for the model, such as out=exported")
        return self


def export(model: str, arguments: Sequence[str]) -> list[str]:
    """Writes the model and, if asked, uploads it; gives what there is to tell.

    Raises:
        AlignError: the model can't be found or loaded, the folder isn't empty, what was written differs from what was
            meant, or the Hub refuses it.
    """
    config = from_arguments(ExportConfig, "align export", arguments)
    out = Path(config.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: is there already and not empty; give another out=, or remove it")
    token = hub_token() if config.push else ""
    found = ModelRef.find(model)
    check_model(found.path)  # before torch is loaded
    told = write(found, out, config.dtype)
    if config.push:
        told.append(upload(out, config.push, config.private, config.message, token))
    return told


def write(model: ModelRef, out: Path, dtype: str = "auto") -> list[str]:
    """Writes a model whole, beside `out` first, and checks it; gives what there is to tell.

    Raises:
        ModelError: loaded again it is another model.
    """
    import torch

    loaded, tokenizer, judge, adapters = _load(model)
    wanted = getattr(torch, dtype) if dtype != "auto" else adapters or loaded.dtype
    computed = loaded.dtype
    before = _figures(loaded, tokenizer, judge)
    cast(loaded, wanted, computed)
    rounded = _figures(loaded, tokenizer, judge)
    cast(loaded, wanted)
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    loaded.save_pretrained(part)
    tokenizer.save_pretrained(part)
    _copy_beside(Path(model.path), part)
    del loaded, judge
    again, tokenizer, judge, _ = _load(ModelRef(str(part), model.kind, model.name, ""))
    cast(again, computed)
    apart = _apart(rounded, _figures(again, tokenizer, judge))
    if not apart <= SAME:
        raise ModelError(
            f"{part}: loaded again, the model differs by {apart:.2g} from what was written; is the disk full? It was "
            "left there to look at"
        )
    if out.exists():
        out.rmdir()
    part.rename(out)
    unit = "of score" if model.kind is Kind.REWARD_MODEL else "nats a token"
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return [
        f"{model.name}: {'merged with its base, ' if adapters else ''}{str(wanted).removeprefix('torch.')}, "
        f"{size / 1e6:,.1f} MB in {out}",
        f"loaded again it is the same ({apart:.1g} {unit}); rounding its weights moved it by at most "
        f"{_apart(before, rounded):.2g} {unit}",
    ]


def cast(model: Any, *dtypes: Any) -> None:
    """Rounds the weights, in place; what the model computes for itself (the frequencies of its positions) stays."""
    for parameter in model.parameters():
        for dtype in dtypes:
            parameter.data = parameter.data.to(dtype)


def hub_token() -> str:
    """The token that uploads.

    Raises:
        RunError: there is none.
    """
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise RunError(
            "push: no token of the Hugging Face Hub is here; log in with `hf auth login`, or set HF_TOKEN to one that "
            "may write (huggingface.co/settings/tokens)"
        )
    return str(token)


def upload(folder: Path, name: str, private: bool, message: str, token: str) -> str:
    """Uploads a folder as a model of the Hub, which is made where there is none; gives its address.

    Raises:
        RunError: the Hub refuses it or can't be reached; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token)
    try:
        address = api.create_repo(name, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, repo_type="model")
    except (HfHubHTTPError, OSError, ValueError) as problem:
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise RunError(f"push: {name}: the Hub did not take it: {first}; the model is in {folder}") from problem
    return f"pushed to {address}"


def _load(model: ModelRef) -> tuple[Any, Any, Any, Any]:
    """The model whole, its tokenizer, the judge that it is (None of a policy), and the base's precision (of adapters).

    Adapters are merged in fp32.
    """
    from align.train.adapters import adapter_of
    from align.train.models import source_dtype

    base_dtype = source_dtype(model) if adapter_of(model) is not None else None
    dtype = "float32" if base_dtype is not None else "auto"
    if model.kind is Kind.REWARD_MODEL:
        from reward.model import load_reward_model

        judge = load_reward_model(model, dtype=dtype)
        return judge.model, judge.tokenizer, judge, base_dtype
    import torch

    from align.core.engines.load import load_model, load_tokenizer

    spec = "@".join(filter(None, (model.path, model.revision)))
    if dtype == "auto":  # on a CPU the engine's own auto is float32
        dtype = str(source_dtype(model)).removeprefix("torch.")
    return load_model(spec, torch.device("cpu"), dtype), load_tokenizer(spec), None, base_dtype


def _figures(model: Any, tokenizer: Any, judge: Any) -> list[float]:
    """Log-probabilities of a fixed text's tokens; of a judge its scores of fixed answers, read as its card says."""
    import torch

    if judge is not None:
        return list(judge.score_many([(messages[:1], messages[1:]) for messages in _PROBE]))
    found: list[float] = []
    for messages in _PROBE:
        text = "\n".join(turn["content"] for turn in messages)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], device=model.device)
        with torch.no_grad():
            logps = model.eval()(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        found += logps.gather(1, ids[0, 1:, None])[:, 0].tolist()
    return found


def _apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _copy_beside(source: Path, to: Path) -> None:
    """What lies beside the weights and is not written anew: the card, `reward_model.json`, a licence, …"""
    if not source.is_dir():
        return  # of the Hub
    for file in sorted(source.iterdir()):
        if file.is_file() and not any(file.match(form) for form in _MADE_ANEW) and not (to / file.name).exists():
            shutil.copyfile(file, to / file.name)
