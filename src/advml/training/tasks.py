"""What a network is trained for: the losses of one phase, the objective of its adversary, its validation score.

A task gets images x (N, C, H, W) in [0, 1] and labels (N,) and returns one loss per image:

| task           | clean loss    | adversarial loss | the adversary ascends            |
|----------------|---------------|------------------|----------------------------------|
| Contrastive    | L(t1(x), t2(x)) | L(x, x + d)    | L(x, x + d)                      |
| Classification | CE(t(x))      | CE(x + d)        | CE(x + d), end to end            |
| HeadOnly       | CE(x)         | CE(x + d)        | CE(x + d); the encoder is fixed  |

Adversarial loss and training objective of the last two are those of `loss: two-term`; see `advml.training.losses` for others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from advml import config
from advml.attacks.pgd import Objective
from advml.core import ranks
from advml.core.device import Machine
from advml.data.augment import view
from advml.data.datasets import Split
from advml.models.layers import batch_norms, clean_statistics
from advml.models.memory_format import place
from advml.models.network import Network
from advml.recipes import Regime, Scheme
from advml.training.losses import TERMS, classification_objective, contrastive_objective, contrastive_pair, cross_entropy


class Task(Protocol):
    """What the training loop needs to know."""

    network: Network
    metric: str  # name of the validation score, e.g. "accuracy"
    larger_is_better: bool

    def learners(self) -> list[nn.Parameter]: ...
    def train_mode(self) -> None: ...
    def clean_loss(self, images: Tensor, labels: Tensor, index: Tensor, *, generator: torch.Generator) -> Tensor: ...
    def adversarial_loss(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor: ...
    def training_objective(self, images: Tensor, labels: Tensor) -> Objective: ...
    def objective(self, images: Tensor, labels: Tensor) -> Objective: ...
    def clean_score(self, images: Tensor, labels: Tensor, *, generator: torch.Generator) -> Tensor: ...
    def adversarial_score(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor: ...


class Classification:
    """Cross-entropy, end to end: SL's pretraining (with views) and Full-AT fine-tuning (without)."""

    metric, larger_is_better = "accuracy", True

    def __init__(
        self,
        network: Network,
        *,
        spec: config.View | None = None,
        label_smoothing: float = 0.0,
        loss: str = "two-term",
        frozen_statistics: bool = False,
    ) -> None:
        self.network, self.spec, self.label_smoothing = network, spec, label_smoothing
        self.term, self.frozen_statistics = TERMS[loss], frozen_statistics

    def learners(self) -> list[nn.Parameter]:
        """The encoder and the classifier; a projection head kept for threat model I rests."""
        return [*self.network.encoder.parameters(), *self.network.classifier.parameters()]

    def train_mode(self) -> None:
        """With frozen statistics the encoder's batch norms use what they have seen so far; their weights learn all the same."""
        self.network.train()
        for layer in batch_norms(self.network.encoder) if self.frozen_statistics else ():
            layer.eval()

    def clean_loss(self, images: Tensor, labels: Tensor, index: Tensor, *, generator: torch.Generator) -> Tensor:
        """CE(t(x)), or CE(x) without a view spec."""
        images = images if self.spec is None else view(images, self.spec, generator=generator)
        with clean_statistics(self.network):
            return cross_entropy(self.network(images), labels, label_smoothing=self.label_smoothing)

    def adversarial_loss(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
        """CE(x + d), or what else `loss` says."""
        return self.term.loss(self.network, images, adversarial, labels, label_smoothing=self.label_smoothing)

    def training_objective(self, images: Tensor, labels: Tensor) -> Objective:
        """What the adversary of training ascends."""
        return self.term.objective(self.network, images, labels)

    def objective(self, images: Tensor, labels: Tensor) -> Objective:
        """Threat model II: cross-entropy of the whole classifier, whatever the loss: so validation scores compare."""
        return classification_objective(self.network, labels)

    def clean_score(self, images: Tensor, labels: Tensor, *, generator: torch.Generator) -> Tensor:
        """1 where the prediction is right (N,); NaN where there is none."""
        return _hits(self.network(images), labels)

    def adversarial_score(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
        """1 where the prediction survives the attack (N,); NaN where there is none."""
        return _hits(self.network(adversarial), labels)


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    """`argmax` finds a class in any logits, also in those of a network that has diverged."""
    return torch.where(logits.isfinite().all(1), (logits.argmax(1) == labels).float(), torch.nan)


class HeadOnly(Classification):
    """Cross-entropy of a linear head on a fixed encoder, which stays in eval mode, untouched.

    The clean features of all training images are computed once and serve every epoch.
    """

    def __init__(self, network: Network, *, features: Tensor, label_smoothing: float = 0.0, loss: str = "two-term") -> None:
        super().__init__(network, label_smoothing=label_smoothing, loss=loss)
        self.clean_features = features  # (number of training images, D)

    def learners(self) -> list[nn.Parameter]:
        return list(self.network.classifier.parameters())

    def train_mode(self) -> None:
        self.network.eval()
        self.network.encoder.requires_grad_(False)

    def clean_loss(self, images: Tensor, labels: Tensor, index: Tensor, *, generator: torch.Generator) -> Tensor:
        """CE(x) from the stored features."""
        logits = self.network.classify(self.clean_features[index])
        return cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


class Contrastive:
    """The contrastive objective of CL and SCL on two views, or on an image and its adversarial example."""

    metric, larger_is_better = "loss", False

    def __init__(self, network: Network, *, spec: config.View, temperature: float, groups: Callable[[Tensor], Tensor]) -> None:
        self.network, self.spec, self.temperature, self.groups = network, spec, temperature, groups

    def learners(self) -> list[nn.Parameter]:
        return [*self.network.encoder.parameters(), *self.network.projection_head.parameters()]

    def train_mode(self) -> None:
        self.network.train()

    def clean_loss(self, images: Tensor, labels: Tensor, index: Tensor, *, generator: torch.Generator) -> Tensor:
        """L(t1(x), t2(x)); both views pass the network as one batch."""
        first, second = (view(images, self.spec, generator=generator) for _ in range(2))
        with clean_statistics(self.network):
            return self._pair(first, second, labels)

    def adversarial_loss(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
        """L(x, x + d)."""
        return self._pair(images, adversarial, labels)

    def training_objective(self, images: Tensor, labels: Tensor) -> Objective:
        """As `objective`."""
        return self.objective(images, labels)

    def objective(self, images: Tensor, labels: Tensor) -> Objective:
        """Threat model I: pull the adversarial image's embedding away from its positives."""
        return contrastive_objective(self.network, images, self.groups(ranks.everyones(labels)), temperature=self.temperature)

    def clean_score(self, images: Tensor, labels: Tensor, *, generator: torch.Generator) -> Tensor:
        """Contrastive loss of two fresh views (N,)."""
        return self.clean_loss(images, labels, torch.empty(0), generator=generator)

    def adversarial_score(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
        """Contrastive loss between image and adversarial image (N,)."""
        return self._pair(images, adversarial, labels)

    def _pair(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        first, second = ranks.everyones(torch.stack(self.network.embed(torch.cat([first, second])).chunk(2), 1)).unbind(1)
        return ranks.own(contrastive_pair(first, second, self.groups(ranks.everyones(labels)), temperature=self.temperature))


def pretraining_task(network: Network, scheme: Scheme, phase: config.Phase, *, spec: config.View, temperature: float) -> Task:
    """The task of a scheme's pretraining, by the head it learns."""
    if scheme.groups:
        return Contrastive(network, spec=spec, temperature=temperature, groups=scheme.groups)
    return Classification(network, spec=spec, label_smoothing=phase.label_smoothing, loss=phase.loss)


def finetuning_task(network: Network, regime: Regime, phase: config.Phase, train: Split, machine: Machine) -> Task:
    """The task of a regime's fine-tuning: end to end, or a head on stored features of the training images."""
    if regime.encoder_learns:
        return Classification(network, label_smoothing=phase.label_smoothing, loss=phase.loss, frozen_statistics=phase.frozen_statistics)
    place(network, machine.device).eval()
    with torch.no_grad(), machine.autocast(training=True):
        features = torch.cat([network.features(machine.images(images)).float() for images in train.images.split(512)])
    return HeadOnly(network, features=features, label_smoothing=phase.label_smoothing, loss=phase.loss)
