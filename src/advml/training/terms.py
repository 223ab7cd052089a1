"""What an adversary ascends, and the adversarial term of a classification's training.

| loss     | adversarial loss        | the adversary of training ascends | source            |
|----------|-------------------------|-----------------------------------|-------------------|
| two-term | CE(x + d)               | CE(x + d)                         | arXiv 2302.02502  |
| trades   | KL(p(x), p(x + d))      | KL(p(x), p(x + d))                | Zhang et al. 2019 |

To add a term, add a row to TERMS and its name to `config.Phase.loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from advml.attacks.pgd import Objective
from advml.errors import UserError
from advml.networks.dual import clean_statistics
from advml.networks.models import Network
from advml.training.objectives import OBJECTIVES, contrastive_pair, cross_entropy, divergence


def classification_objective(network: Network, labels: Tensor, loss: str = "ce") -> Objective:
    """x_adv -> objective of the whole classifier (N,): threat model II, on cross-entropy by default.

    Args:
        network: maps images (N, C, H, W) to logits (N, K).
        labels: (N,) int64.
        loss: a key of OBJECTIVES.
    Raises:
        UserError: `loss` is none, or needs more classes.
    """
    if loss not in OBJECTIVES:
        raise UserError(f"objective = {loss!r}; choose from {', '.join(OBJECTIVES)}")
    return lambda adversarial: OBJECTIVES[loss](network(adversarial), labels)


def contrastive_objective(network: Network, images: Tensor, groups: Tensor, *, temperature: float) -> Objective:
    """x_adv -> contrastive loss between the images and x_adv (N,): threat model I.

    The clean embedding is computed once, here; that is exact because an attacked network has no dropout
    and its batch statistics do not depend on the other half of the pair.
    """
    with torch.no_grad():
        clean = network.embed(images)
    return lambda adversarial: contrastive_pair(clean, network.embed(adversarial), groups, temperature=temperature)


def divergence_objective(network: Network, images: Tensor) -> Objective:
    """x_adv -> KL(p(x) || p(x_adv)) (N,), with p(x) computed once, here.

    It is smallest, and flat, at x itself: the attack needs a random start.
    """
    with torch.no_grad(), clean_statistics(network):
        logits = network(images)
    return lambda adversarial: divergence(logits, network(adversarial))


def attacked_cross_entropy(network: Network, images: Tensor, adversarial: Tensor, labels: Tensor, *, label_smoothing: float) -> Tensor:
    """CE(x + d) (N,)."""
    return cross_entropy(network(adversarial), labels, label_smoothing=label_smoothing)


def attacked_divergence(network: Network, images: Tensor, adversarial: Tensor, labels: Tensor, *, label_smoothing: float) -> Tensor:
    """KL(p(x) || p(x + d)) (N,); gradients reach both. Labels, and their smoothing, belong to the clean term alone.

    x passes the network again, unaugmented and apart from x + d, as in the authors' code.
    """
    with clean_statistics(network):
        logits = network(images)
    return divergence(logits, network(adversarial))


@dataclass(frozen=True)
class Term:
    """One row of the table above."""

    loss: Callable[..., Tensor]  # (network, images, adversarial images, labels, label_smoothing=...) -> losses (N,)
    objective: Callable[[Network, Tensor, Tensor], Objective]  # (network, images, labels) -> what the adversary of training ascends


TERMS: dict[str, Term] = {
    "two-term": Term(attacked_cross_entropy, lambda network, images, labels: classification_objective(network, labels)),
    "trades": Term(attacked_divergence, lambda network, images, labels: divergence_objective(network, images)),
}
