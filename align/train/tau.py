"""tau = theta_SFT - theta_base, read from the models' folders, and what a run is told of the optimizer.

Never from live weights: a run that goes on after a kill would take what it has learned itself for what SFT has taught.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.core.errors import ModelError, RecipeError
from align.core.store import ModelRef, Table
from align.train.settings import Speed, TrainSettings

_SHOWN = {"ondare": "OnDARE", "onties": "OnTIES"}


def tau_of(settings: TrainSettings, inputs: Mapping[str, Table | ModelRef], start: ModelRef) -> Tau | None:
    """Tau of a stage's inputs; None where it has no use.

    Args:
        settings: of the stage.
        inputs: of which `base` and `sft` are taken.
        start: the model that the training starts from: SFT, where `sft` was not given.

    Raises:
        RecipeError: a model was given that has no effect, or one is missing.
        ModelError: both are one model.
    """
    base, sft = inputs.get("base"), inputs.get("sft")
    if settings.merging == "none" or not settings.merging_alpha:
        given = " and ".join(name for name in ("base", "sft") if name in inputs)
        if given:
            why = "merging is none" if settings.merging == "none" else "merging_alpha is 0"
            raise RecipeError(f"{given}: has no effect, since {why}; leave it out, or set {why.split()[0]}")
        return None
    if base is None:
        raise RecipeError(
            f"merging: {settings.merging} steers by what SFT has changed, and no base was given; give the model that "
            "SFT started from as base (and as sft what it made, where that is not the model that this step starts from)"
        )
    sft = sft or start
    assert isinstance(base, ModelRef) and isinstance(sft, ModelRef)  # the pipeline has checked the kinds
    if base.fingerprint == sft.fingerprint:
        raise ModelError(
            f"base {base.name} and sft {sft.name} are one model, so SFT has changed nothing to steer by; give the "
            "model that SFT started from as base"
        )
    return Tau(base, sft)


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it (checkpointing of activations, torch.compile)."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


class Tau:
    """theta_SFT - theta_base of a parameter by its name, a tensor at a time from the files.

    An adapter's folder counts with its adapters merged, and so is loaded whole, as is a model whose files have other
    names than its parameters (experts, which transformers puts together).

    Args:
        base: a folder or a Hub id.
        sft: the same.
    """

    def __init__(self, base: ModelRef, sft: ModelRef) -> None:
        self.base, self.sft = base, sft
        self._weights: dict[str, Weights] = {}
        self._tied: dict[str, str] = {}

    def check(self, model: Any) -> None:
        """Opens both, and holds the names and shapes of what will be trained against them.

        Raises:
            ModelError: they differ; or the weights of both are the same.
        """
        tops = [model.get_input_embeddings(), model.get_output_embeddings()]
        names = [f"{name}.weight" for top in tops for name, module in model.named_modules() if module is top]
        names = [plain_name(name) for name in names]
        self._tied = {one: other for one in names for other in names if one != other}
        wanted = {plain_name(name): tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        for role, ref in (("base", self.base), ("sft", self.sft)):
            weights = Weights(ref, wanted, self._tied)
            self._weights[role] = weights
            for name, shape in wanted.items():
                found = weights.shape(name)
                if found != shape:
                    what = "missing" if found is None else " × ".join(map(str, found))
                    raise ModelError(
                        f"{role} {ref.name}: {name} is {what} there, and {' × '.join(map(str, shape))} in the model "
                        f"that is trained; give as {role} a model of the same architecture and vocabulary"
                    )
        base, sft = self._weights["base"], self._weights["sft"]
        if all(bool((sft.read(name) == base.read(name)).all()) for name in wanted):  # most differ in the first few
            raise ModelError(
                f"base {self.base.name} and sft {self.sft.name} have the same weights, so SFT has changed nothing to "
                "steer by; give the model that SFT started from as base"
            )

    def __call__(self, name: str) -> Any:
        """Float32, on the CPU; each is asked for once."""
        return self._weights["sft"].take(name) - self._weights["base"].take(name)


class Weights:
    """A model's weights by the names of its parameters.

    Args:
        model: a folder or a Hub id.
        wanted: names that must be there for its files to be read as they are; each is taken once.
        tied: other names that a weight may have.
    """

    def __init__(self, model: ModelRef, wanted: Collection[str], tied: Mapping[str, str]) -> None:
        from align.train.adapters import adapter_of

        self.model, self.tied = model, tied
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._whole: dict[str, Any] | None = None
        if adapter_of(model) is None:
            self._read_headers()
        if not all(self._name(name) in self._files for name in wanted):
            self._load()
        self._left = Counter(self._name(name) for name in wanted)  # tied ones twice, where the other model's aren't

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None where there is no such weight."""
        return self._shapes.get(self._name(name))

    def take(self, name: str) -> Any:
        """Float32, on the CPU. What was loaded whole is forgotten as it is taken for the last time."""
        name = self._name(name)
        self._left[name] -= 1
        found = self.read(name)
        if self._whole is not None and not self._left[name]:
            del self._whole[name]
        return found

    def read(self, name: str) -> Any:
        """Float32, on the CPU."""
        from safetensors import safe_open

        name = self._name(name)
        if self._whole is not None:
            return self._whole[name].float()
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name).float()

    def _name(self, name: str) -> str:
        return name if name in self._shapes else self.tied.get(name, name)

    def _read_headers(self) -> None:
        from safetensors import safe_open

        for path in weight_files(self.model):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    self._files[name], self._shapes[name] = path, tuple(file.get_slice(name).get_shape())

    def _load(self) -> None:
        """The whole model through transformers, as a stage would; where it has adapters, merged."""
        from align.train.models import load_policy

        loaded = load_policy(self.model, Speed(device="cpu", precision="fp32"))
        self._whole = {name: parameter.detach() for name, parameter in loaded.named_parameters()}
        self._shapes = {name: tuple(weight.shape) for name, weight in self._whole.items()}


def weight_files(model: ModelRef) -> list[Path]:
    """Its safetensors files, from a folder or the Hub's cache; none where its weights lie in another format."""
    from transformers.utils import cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    found: dict[str, Any] = {"revision": model.revision or "main", "_raise_exceptions_for_missing_entries": False}
    one = cached_file(model.path, "model.safetensors", **found)
    if one is not None:
        return [Path(one)]
    index = cached_file(model.path, "model.safetensors.index.json", **found)
    if index is None:
        return []
    shards, _ = get_checkpoint_shard_files(model.path, index, revision=model.revision or "main")
    return [Path(shard) for shard in shards]


def optimizer_words(settings: TrainSettings) -> str:
    """`AdamW, weight decay 0.1, clip 1`; and how its steps are merged."""
    words = f"AdamW, weight decay {settings.weight_decay:g}, clip {settings.max_grad_norm:g}"
    if settings.merging == "none":
        return words
    every = "" if settings.merging_every == 1 else f", every {settings.merging_every} steps"
    return (
        f"{_SHOWN[settings.merging]} (the {settings.merging_as_in}'s variant, alpha {settings.merging_alpha:g}, "
        f"keep {settings.merging_keep:g}{every}) of {words}"
    )


def merging_bytes(settings: TrainSettings) -> float | None:
    """Bytes a trained parameter that it holds beyond AdamW's moments and its buffer; None where nothing merges.

    24 at each place where F(tau) is not 0: the place twice, tau, and the remainder; OnDARE as in the paper has tau and
    the remainder of all places. Every K steps the weights after the last merge too.
    """
    if settings.merging == "none":
        return None
    kept = 24 * settings.merging_keep if settings.merging_alpha else 0.0
    if kept and settings.merging == "ondare" and settings.merging_as_in == "paper":
        kept = 8.0
    return kept + (4.0 if settings.merging_every > 1 else 0.0)


def drift(settings: TrainSettings, merges: int) -> float:
    """The share of tau that so many merges add to a weight that F(tau) reaches: alpha × merges.

    It is not tied to the learning rate, so it goes on where the schedule has come to its end. OnDARE's code divides tau
    by keep: there it is so much more, on that share of the weights, and this is their mean.
    """
    return 0.0 if settings.merging == "none" else settings.merging_alpha * merges


def drift_warnings(settings: TrainSettings, steps: int) -> list[str]:
    """What a person should know before so many steps."""
    return _warnings_of(settings, -(-steps // settings.merging_every))


def _warnings_of(settings: TrainSettings, merges: int) -> list[str]:
    share = drift(settings, merges)
    if share <= settings.merging_warn_drift:  # 0 without merging
        return []
    most = settings.merging_warn_drift / merges
    told = float(f"{most:.1g}")
    if drift(settings.model_copy(update={"merging_alpha": told}), merges) > settings.merging_warn_drift:
        told -= 10.0 ** math.floor(math.log10(most))  # it was rounded up
    return [
        f"merging_alpha {settings.merging_alpha:g} adds {share:.2g} of tau to the weights in {merges:,} merges, more "
        f"than merging_warn_drift {settings.merging_warn_drift:g}: the model is moved on from SFT whatever the data "
        f"say; lower it to {told:.1g}, or merge less often (merging_every)"
    ]


def merging_figures(settings: TrainSettings, merges: int, warnings: Sequence[str] = ()) -> dict[str, Any]:
    """For a step's summary: which optimizer it was, how much of tau it has added, and all warnings, with others.

    Args:
        settings: of the stage.
        merges: that the written weights hold.
        warnings: others.
    """
    found: dict[str, Any] = {"optimizer": optimizer_words(settings)}
    if settings.merging != "none":
        found["merging_drift"] = drift(settings, merges)
    if told := [*warnings, *_warnings_of(settings, merges)]:
        found["warnings"] = told
    return found
