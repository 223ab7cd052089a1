"""Formulas written down slowly from their papers; several test files compare with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def supcon(z: Tensor, groups: Sequence[int], temperature: float) -> Tensor:
    """Loss of every anchor, Khosla et al. 2020, eq. 2: -1/|P(i)| sum_p log(exp(z_i.z_p/t) / sum_{a != i} exp(z_i.z_a/t)).

    The embeddings z (N, D) have unit length. Double precision; 0 where P(i), the other images of the group, is empty.
    """
    z, losses = z.double(), []
    for i in range(len(z)):
        denominator = sum(torch.exp(z[i] @ z[a] / temperature) for a in range(len(z)) if a != i)
        positives = [p for p in range(len(z)) if p != i and groups[p] == groups[i]]
        terms = [torch.log(torch.exp(z[i] @ z[p] / temperature) / denominator) for p in positives]
        losses.append(-sum(terms) / len(positives) if positives else z[i].sum() * 0)
    return torch.stack(losses)


def linf_steps(loss: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, *, epsilon: float, steps: int) -> Tensor:
    """Madry et al. 2018: steps of 2.5 epsilon / steps along the sign of the gradient, inside the L-infinity ball and the box."""
    attacked = start
    for _ in range(steps):
        attacked = attacked.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(attacked), attacked)
        attacked = attacked.detach() + 2.5 * epsilon / steps * gradient.sign()
        attacked = torch.minimum(torch.maximum(attacked, x - epsilon), x + epsilon).clamp(0, 1)
    return attacked
