"""The preference losses: what each asks of a pair, as a pure function of log-probabilities in float32.

Written with c and r for the policy's log-probability of the chosen and of the rejected less the reference's (the
log-ratios), h = beta * (c - r) for the margin, s for the logistic function, e for `label_smoothing`. A log-probability
is the sum over a completion's tokens in nats; with `length_normalised` it is their mean, in every loss.

Every loss is a mean over the pairs of the global batch, so that no split into micro batches and processes changes it.
Two losses compare pairs with each other (`SORTING`); they need the global batch in one piece. The names are TRL's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.train.settings import DPOSettings


@dataclass(frozen=True, slots=True)
class Pairs:
    """What is known of B pairs; every tensor (B,), float32.

    Attributes:
        chosen: summed log-probabilities of the chosen completions under the policy, nats.
        rejected: of the rejected.
        ref_chosen: of the chosen under the reference.
        ref_rejected: of the rejected under the reference.
        chosen_tokens: tokens of the chosen completions, their end-of-turn token included.
        rejected_tokens: of the rejected.
        mean_tokens: of a chosen completion, over the global batch of which these pairs are a part.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    mean_tokens: Tensor | float = 1.0

    @property
    def c(self) -> Tensor:
        """Log-ratio of the chosen."""
        return self.chosen - self.ref_chosen

    @property
    def r(self) -> Tensor:
        """Log-ratio of the rejected."""
        return self.rejected - self.ref_rejected

    def per_token(self) -> Pairs:
        """With means over tokens in place of sums. A second time changes nothing."""
        chosen, rejected = self.chosen_tokens, self.rejected_tokens
        return replace(
            self,
            chosen=self.chosen / chosen,
            rejected=self.rejected / rejected,
            ref_chosen=self.ref_chosen / chosen,
            ref_rejected=self.ref_rejected / rejected,
            chosen_tokens=torch.ones_like(chosen),
            rejected_tokens=torch.ones_like(rejected),
        )


def sigmoid(pairs: Pairs, settings: DPOSettings) -> Tensor:
    """-(1 - e) log s(h) - e log s(-h): DPO (arXiv:2305.18290, eq. 7); with e > 0 conservative DPO (Mitchell, 2023).

    Differs from TRL's, which takes no notice of `label_smoothing` here.
    """
    return _smoothed(settings.beta * (pairs.c - pairs.r), settings)


def sigmoid_norm(pairs: Pairs, settings: DPOSettings) -> Tensor:
    """`sigmoid` on means over tokens: length-normalised DPO (Tülu 3, arXiv:2411.15124)."""
    return sigmoid(pairs.per_token(), settings)


def hinge(pairs: Pairs, settings: DPOSettings) -> Tensor:
    """max(0, 1 - h): SLiC-HF's (arXiv:2305.10425) on log-ratios, as RSO has it (arXiv:2309.06657)."""
    return torch.relu(1 - settings.beta * (pairs.c - pairs.r))


def ipo(pairs: Pairs, settings: DPOSettings) -> Tensor:
    """(c - r - 1 / (2 beta))^2: IPO (arXiv:2310.12036, eq. 17), beta for its tau.

    Differs from the paper: c and r are means over tokens, as its authors have confirmed to be meant.
    """
    mean = pairs.per_token()
    return (mean.c - mean.r - 1 / (2 * settings.beta)) ** 2


def exo_pair(pairs: Pairs, settings: DPOSettings) -> Tensor:
    """s(h) log(s(h) / (1 - e)) + s(-h) log(s(-h) / e): EXO for two completions (arXiv:2402.00856, eq. 16).

    The divergence of the policy's preference from the labels', (1 - e, e): the other way round than in `sigmoid`.
    """
    h = settings.beta * (pairs.c - pairs.r)
    labels = torch.tensor([1 - settings.label_smoothing, settings.label_smoothing], device=h.device).log()
    return h.sigmoid() * (logsigmoid(h) - labels[0]) + (-h).sigmoid() * (logsigmoid(-h) - labels[1])


def nca_pair(pairs: Pairs, settings: DPOSettings) -> Tensor:
    """-log s(beta c) - (log s(-beta c) + log s(-beta r)) / 2: NCA for two completions (arXiv:2402.05369)."""
    c, r = settings.beta * pairs.c, settings.beta * pairs.r
    return -logsigmoid(c) - 0.5 * (logsigmoid(-c) + logsigmoid(-r))


def robust(pairs: Pairs, settings: DPOSettings) -> Tensor:
    """(-(1 - e) log s(h) + e log s(-h)) / (1 - 2e): what DPO's loss would be, were no label flipped (arXiv:2403.00409).

    An unbiased estimate where a share e of the labels is the wrong way round; it may be below 0.
    """
    h, e = settings.beta * (pairs.c - pairs.r), settings.label_smoothing
    return (-(1 - e) * logsigmoid(h) + e * logsigmoid(-h)) / (1 - 2 * e)


def bco_pair(pairs: Pairs, settings: DPOSettings) -> Tensor:
    """-log s(beta c) - log s(-beta r): BCO (arXiv:2404.04656).

    Differs from the paper: its reward shift delta, a running mean of the rewards, is 0, as in TRL's DPOTrainer. A
    running mean would make the gradient depend on the order of the micro batches.
    """
    return -logsigmoid(settings.beta * pairs.c) - logsigmoid(-settings.beta * pairs.r)


def sppo_hard(pairs: Pairs, settings: DPOSettings) -> Tensor:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2: SPPO (arXiv:2405.00675, eq. 4.7), beta for its 1 / eta.

    Differs from the paper: the chosen is taken to win always; there it wins with an estimated probability.
    """
    return (pairs.c - 0.5 / settings.beta) ** 2 + (pairs.r + 0.5 / settings.beta) ** 2


def aot(pairs: Pairs, settings: DPOSettings) -> Tensor:
    """-(1 - e) log s(d) - e log s(-d), d = beta * (sorted policy margins - sorted reference margins).

    AOT, paired (arXiv:2406.05882): the policy's margins chosen - rejected should dominate the reference's as a
    distribution, so their quantiles are compared and not the pairs. It sees the batch as a whole.
    """
    policy, reference = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
    return _smoothed(settings.beta * (policy.sort().values - reference.sort().values), settings)


def aot_unpaired(pairs: Pairs, settings: DPOSettings) -> Tensor:
    """As `aot` with d = beta * (sorted c - sorted r): AOT, unpaired (arXiv:2406.05882)."""
    return _smoothed(settings.beta * (pairs.c.sort().values - pairs.r.sort().values), settings)


def apo_zero(pairs: Pairs, settings: DPOSettings) -> Tensor:
    """1 - s(beta c) + s(beta r): chosen up, rejected down (APO, arXiv:2408.06266, eq. 7).

    For chosen completions that are better than the policy's own.
    """
    return 1 - (settings.beta * pairs.c).sigmoid() + (settings.beta * pairs.r).sigmoid()


def apo_down(pairs: Pairs, settings: DPOSettings) -> Tensor:
    """s(beta c) + 1 - s(h): both down, the rejected more (APO, arXiv:2408.06266, eq. 8).

    For chosen completions that are worse than the policy's own: it lowers their probability and means to.
    """
    return (settings.beta * pairs.c).sigmoid() + 1 - (settings.beta * (pairs.c - pairs.r)).sigmoid()


def discopop(pairs: Pairs, settings: DPOSettings) -> Tensor:
    """(1 - m) * -log s(h) + m * exp(-h), m = s(h / tau): DiscoPOP, found by a language model (arXiv:2406.08414, eq. 5).

    tau is `discopop_tau`, the paper's 0.05.
    """
    h = settings.beta * (pairs.c - pairs.r)
    mixed = (h / settings.discopop_tau).sigmoid()
    return (1 - mixed) * -logsigmoid(h) + mixed * torch.exp(-h)


def sft(pairs: Pairs, settings: DPOSettings) -> Tensor:
    """-log p(chosen) / mean_tokens: the chosen's negative log-likelihood, per token of the global batch.

    Its mean over pairs is TRL's `sft`, the mean over tokens, but of the whole global batch and not of a micro batch.
    Long completions count more; with `nll_weight` (`nll`) every pair counts alike.
    """
    return -pairs.chosen / pairs.mean_tokens


def nll(pairs: Pairs) -> Tensor:
    """-log p(chosen) / |chosen|: the term that holds the chosen's probability up (RPO, arXiv:2404.19733)."""
    return -pairs.chosen / pairs.chosen_tokens


def _smoothed(h: Tensor, settings: DPOSettings) -> Tensor:
    if not settings.label_smoothing:
        return -logsigmoid(h)
    return -(1 - settings.label_smoothing) * logsigmoid(h) - settings.label_smoothing * logsigmoid(-h)


LOSSES: dict[str, Callable[[Pairs, DPOSettings], Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sigmoid_norm": sigmoid_norm,
    "sft": sft,
}
"""By the names of the setting `losses`."""

SORTING = ("aot", "aot_unpaired")
"""Those that compare a pair with the other pairs of the global batch."""


def terms(pairs: Pairs, settings: DPOSettings) -> dict[str, tuple[float, Tensor]]:
    """Each term's weight and its mean over the pairs, by name: the losses, and `nll` where it has a weight."""
    seen = pairs.per_token() if settings.length_normalised else pairs
    weights = settings.loss_weights or [1.0] * len(settings.losses)
    found: dict[str, tuple[float, Tensor]] = {}
    for name, weight in zip(settings.losses, weights, strict=True):
        found[name] = (weight, LOSSES[name](pairs if name == "sft" else seen, settings).mean())
    if settings.nll_weight:
        found["nll"] = (settings.nll_weight, nll(pairs).mean())
    return found
