"""SL, CL, SCL: what is learned. A scheme is a row of data; the trainer has no `if scheme == ...`.

| scheme | views | head | positives of an anchor        | known as |
|--------|-------|------|-------------------------------|----------|
| SL     | 1     | classifier | - (cross-entropy)       | -        |
| CL     | 2     | projection | the other view          | SimCLR   |
| SCL    | 2     | projection | all views of its class  | SupCon   |

To add a scheme, add a row (and an objective to `advml.training.objectives` if it is new); see docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Scheme:
    """What a scheme needs: which head, which views, and who counts as a positive."""

    name: str
    head: Literal["classifier", "projection"]
    view: Literal["supervised", "contrastive"]  # which section of params.yaml: views
    groups: Callable[[Tensor], Tensor] | None = None  # labels (N,) -> group ids (N,); None: no contrastive objective


def instances(labels: Tensor) -> Tensor:
    """Every image is a group of its own: SimCLR is SupCon whose labels are the instance ids."""
    import torch  # not above: searches read the table in a process that must start at once

    return torch.arange(len(labels), device=labels.device)


def classes(labels: Tensor) -> Tensor:
    """All images of a class form a group."""
    return labels


SCHEMES: dict[str, Scheme] = {
    "SL": Scheme("SL", head="classifier", view="supervised"),
    "CL": Scheme("CL", head="projection", view="contrastive", groups=instances),
    "SCL": Scheme("SCL", head="projection", view="contrastive", groups=classes),
}
