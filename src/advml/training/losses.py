"""Losses per example, objectives of adversaries, and adversarial terms for the training of classifiers.

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
import torch.nn.functional as F
from torch import Tensor, nn

from advml.attacks.pgd import Objective
from advml.core import ranks
from advml.core.errors import Failure, UserError
from advml.models.layers import clean_statistics
from advml.models.network import Network

# Every loss returns one value per example; only the trainer takes the mean. The contrastive objective is used for CL and SCL, because
# SimCLR equals SupCon with instance ids as labels.


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy -log softmax(logits)[label], in nats.

    Args:
        logits: (N, K), any float type; computed in float32.
        labels: (N,) int64.
        label_smoothing: mass s spread evenly over all classes (Szegedy et al. 2016, sec. 7).
    Returns:
        Losses (N,).
    """
    return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Margin max_{k != y} logits[k] - logits[y]; positive exactly if the classifier errs (Carlini & Wagner 2017, f6).

    Args:
        logits: (N, K) with K >= 2.
        labels: (N,) int64.
    Returns:
        Margins (N,), in logits.
    """
    logits = logits.float()
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], float("-inf")).amax(1)
    return others - own


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio: -(z_y - max_{k != y} z_k) / (z_1st - z_3rd) (Croce & Hein 2020, eq. 6).

    Invariant to shift and scale of the logits, so that gradients do not vanish for a confident classifier.

    Args:
        logits: (N, K) with K >= 3.
        labels: (N,) int64.
    Returns:
        Ratios (N,), at least -1; positive exactly if the classifier errs.
    Raises:
        UserError: there are fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise UserError(f"objective = 'dlr' compares three logits, but there are {logits.shape[1]} classes; choose from ce, margin")
    first, _, third = logits.float().topk(3, dim=1).values.unbind(1)
    return margin(logits, labels) / (first - third).clamp(min=1e-12)


# Objectives for attacks on a classifier: (logits (N, K), labels (N,)) -> values (N,)
OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


def divergence(logits: Tensor, attacked: Tensor) -> Tensor:
    """KL divergence KL(p || q) = sum_k p_k (log p_k - log q_k) of softmax distributions p and q, in nats.

    Args:
        logits: of p (N, K), any float type; computed in float32.
        attacked: logits of q (N, K).
    Returns:
        Divergences (N,), at least 0.
    """
    log_p, log_q = logits.float().log_softmax(1), attacked.float().log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def contrastive(embeddings: Tensor, groups: Tensor, *, temperature: float) -> Tensor:
    """Contrastive loss per anchor: SupCon's L_out (Khosla et al. 2020, eq. 2), which is SimCLR's NT-Xent if groups are instance ids.

        l_i = -1/|P(i)| sum_{p in P(i)} log( exp(z_i.z_p/t) / sum_{a != i} exp(z_i.z_a/t) )

    where P(i) are the other embeddings of i's group. An anchor without positives contributes 0.

    Deviation: the public SupCon code multiplies by t / 0.07; this factor is left out, as in the paper's equation.

    Args:
        embeddings: (M, D), unit length; the logits are computed in float32 under any autocast.
        groups: (M,) integers; equal numbers are positives of each other.
        temperature: t > 0.
    Returns:
        Losses (M,), in nats.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        z = embeddings.float()
        similarity = z @ z.T / temperature  # (M, M)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    # The smallest float, not -inf: a single embedding has an empty sum, and 0 * -inf would be NaN.
    log_denominator = similarity.masked_fill(itself, torch.finfo(similarity.dtype).min).logsumexp(1)  # (M,)
    positives = (groups[:, None] == groups[None, :]) & ~itself
    count = positives.sum(1)
    attraction = (similarity * positives).sum(1) / count.clamp(min=1)
    return (log_denominator - attraction) * (count > 0)


def contrastive_views(embeddings: Tensor, groups: Tensor, *, temperature: float) -> Tensor:
    """Contrastive loss per image: mean over the anchors of an image's V views.

    Args:
        embeddings: (V, N, D), unit length: of V views, or of the clean and the adversarial images.
        groups: (N,) integers, one per image.
        temperature: t > 0.
    Returns:
        Losses (N,), one per image; their mean is the objective of all V N views.
    """
    views, count = embeddings.shape[:2]
    return contrastive(embeddings.flatten(0, 1), groups.repeat(views), temperature=temperature).view(views, count).mean(0)


INVARIANCE, CODING_ERROR = 200.0, 0.2  # constants of EMP-SSL's code, whose `eps` is the square of the paper's


def emp_ssl(embeddings: Tensor, groups: Tensor, *, temperature: float) -> Tensor:
    """EMP-SSL loss (Tong et al. 2023, eq. 4): crops of an image agree with their mean, and the crops of a batch fill the space.

        -200 mean_i cos(z_i, zbar) + mean_i R(Z_i),    R(Z) = -1/2 logdet(I + D / (N e^2) Z^T Z),    e^2 = 0.2

    Args:
        embeddings: (V, N, D), unit length; row i, Z_i, are the i-th crops of N images; zbar is an image's mean over crops.
        groups, temperature: without effect, because the loss has no negatives.
    Returns:
        Losses (N,); R couples the batch and is the same for each image.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        z = embeddings.float()
        _, count, width = z.shape
        agreement = F.cosine_similarity(z, z.mean(0, keepdim=True), dim=2).mean(0)  # (N,)
        spread = torch.eye(width, device=z.device) + width / (count * CODING_ERROR) * (z.mT @ z)  # (V, D, D)
        return -INVARIANCE * agreement - torch.logdet(spread).mean() / 2


# Loss of embeddings (V, N, D) of N images' views, by its name in recipes.SCHEMES: (embeddings, groups (N,), temperature=t) -> losses (N,)
EMBEDDING_LOSSES: dict[str, Callable[..., Tensor]] = {"contrastive": contrastive_views, "emp-ssl": emp_ssl}


# Objectives of adversaries, and adversarial terms for the training of classifiers


def classification_objective(network: nn.Module, labels: Tensor, loss: str = "ce") -> Objective:
    """Objective of threat model II: x_adv -> loss of the whole classifier (N,), by default cross-entropy.

    Args:
        network: maps images (N, C, H, W) to logits (N, K).
        labels: (N,) int64.
        loss: a key of OBJECTIVES.
    Raises:
        UserError: `loss` is unknown, or needs more classes.
    """
    if loss not in OBJECTIVES:
        raise UserError(f"objective = {loss!r}; choose from {', '.join(OBJECTIVES)}")
    return lambda adversarial: OBJECTIVES[loss](network(adversarial), labels)


def loss_of_embeddings(loss: str, embeddings: Tensor, groups: Tensor, *, temperature: float) -> Tensor:
    """Loss (N,) of embeddings (V, N, D) with groups (N,), by a function of EMBEDDING_LOSSES.

    Raises:
        Failure: the function returns another shape, whose mean would be another loss.
    """
    values = EMBEDDING_LOSSES[loss](embeddings, groups, temperature=temperature)
    if values.shape != groups.shape:
        raise Failure(f"the loss of embeddings {loss!r} must return one value per image, {tuple(groups.shape)}, not {tuple(values.shape)}")
    return values


def contrastive_objective(network: Network, images: Tensor, groups: Tensor, *, temperature: float, loss: str = "contrastive") -> Objective:
    """Objective of threat model I: x_adv -> loss of embeddings (a key of EMBEDDING_LOSSES) between the images and x_adv (N,).

    The clean embedding is computed only once. This is exact, because a network under attack has no dropout, and its batch statistics do
    not depend on the other half of the pair. `groups` are those of the whole batch, if it is shared by processes.
    """
    with torch.no_grad():
        clean = ranks.everyones(network.embed(images))

    def objective(adversarial: Tensor) -> Tensor:
        views = torch.stack([clean, ranks.everyones(network.embed(adversarial))])
        return ranks.own(loss_of_embeddings(loss, views, groups, temperature=temperature))

    return objective


def divergence_objective(network: Network, images: Tensor) -> Objective:
    """Objective of TRADES: x_adv -> KL(p(x) || p(x_adv)) (N,), with p(x) computed only once.

    Its gradient is zero at x itself, so the attack needs a random start.
    """
    with torch.no_grad(), clean_statistics(network):
        logits = network(images)
    return lambda adversarial: divergence(logits, network(adversarial))


def attacked_cross_entropy(network: Network, images: Tensor, adversarial: Tensor, labels: Tensor, *, label_smoothing: float) -> Tensor:
    """Cross-entropy CE(x + d) (N,)."""
    return cross_entropy(network(adversarial), labels, label_smoothing=label_smoothing)


def attacked_divergence(network: Network, images: Tensor, adversarial: Tensor, labels: Tensor, *, label_smoothing: float) -> Tensor:
    """Divergence KL(p(x) || p(x + d)) (N,), with gradients of both; labels and label smoothing are used only by the clean term.

    x passes the network again, unaugmented and in a batch of its own, as in the authors' code.
    """
    with clean_statistics(network):
        logits = network(images)
    return divergence(logits, network(adversarial))


@dataclass(frozen=True)
class Term:
    """An adversarial term: one row of the table above."""

    loss: Callable[..., Tensor]  # (network, images, adversarial images, labels, label_smoothing=...) -> losses (N,)
    objective: Callable[[Network, Tensor, Tensor], Objective]  # (network, images, labels) -> objective of the adversary of training


TERMS: dict[str, Term] = {
    "two-term": Term(attacked_cross_entropy, lambda network, images, labels: classification_objective(network, labels)),
    "trades": Term(attacked_divergence, lambda network, images, labels: divergence_objective(network, images)),
}
