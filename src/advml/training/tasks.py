"""Training tasks: losses of a phase, objective of its adversary, and validation score.

A task gets images x (N, C, H, W) in [0, 1] and labels (N,) and returns one loss per image:

| task           | clean loss      | adversarial loss       | the adversary ascends            | loss of free training |
|----------------|-----------------|------------------------|----------------------------------|-----------------------|
| Contrastive    | L(t1(x), t2(x)) | L(x, x + d)            | L(x, x + d)                      | L(t1(x), t2(x) + d)   |
| Contrastive, `attacked: views` | L(t1(x), ...) | L(t1(x) + d1, ...) | L(t1(x) + d1, ...)       | L(t1(x) + d1, ...)    |
| Classification | CE(t(x))        | CE(x + d)              | CE(x + d), end to end            | CE(t(x) + d)          |
| HeadOnly       | CE(x)           | CE(x + d)              | CE(x + d); the encoder is fixed  | CE(x + d)             |

Hybrid is the sum of two of these, on labelled and on unlabelled images.

L is the scheme's loss of embeddings, of two or more views. With `attacked: views` all views are perturbed jointly (CL: the second stream of
ACL, Jiang et al. 2020), and CE(x + d) is CE(t(x) + d). Adversarial loss and objective of the last two tasks are for `loss: two-term`; see
`advml.training.losses` for others. Free training: `advml.training.adversarial_steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from advml import config
from advml.attacks.pgd import Objective
from advml.core import ranks
from advml.core.device import Machine
from advml.data.augment import view, weakened
from advml.data.datasets import Split
from advml.models.layers import batch_norms, clean_statistics
from advml.models.memory_format import place
from advml.models.network import Network
from advml.recipes import Regime, Scheme
from advml.training.losses import TERMS, classification_objective, contrastive_objective, cross_entropy, loss_of_embeddings


class Task(Protocol):
    """Interface between a task and the training loop."""

    network: Network
    metric: str  # name of the validation score, e.g. "accuracy"
    larger_is_better: bool
    count: int  # V: number of views per image
    perturbed: tuple[int, ...]  # numbers of perturbed inputs per image (views, or the image itself), of each stream

    def learners(self) -> list[nn.Parameter]: ...
    def train_mode(self) -> None: ...
    def views(self, images: Tensor, *, generator: torch.Generator, strength: float = 1.0) -> Tensor: ...  # (V N, C, H, W), of V views
    def clean_loss(self, views: Tensor, labels: Tensor, index: Tensor) -> Tensor: ...
    def attacked(self, images: Tensor, views: Tensor) -> Tensor: ...  # input that the adversary perturbs: x in the next two lines
    def adversarial_loss(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor: ...
    def training_objective(self, images: Tensor, labels: Tensor) -> Objective: ...
    def perturbed_rows(
        self, count: int
    ) -> int: ...  # number of rows, the last ones among the views of `count` images, that free training perturbs
    def loss_of_views(self, views: Tensor, labels: Tensor) -> Tensor: ...
    def objective(self, images: Tensor, labels: Tensor) -> Objective: ...
    def clean_score(self, images: Tensor, labels: Tensor, *, generator: torch.Generator) -> Tensor: ...
    def adversarial_score(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor: ...
    def withstood(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor: ...


class Classification:
    """Cross-entropy, end to end: SL's pretraining (with views) and Full-AT fine-tuning (without)."""

    metric, larger_is_better, count, perturbed = "accuracy", True, 1, (1,)

    def __init__(
        self,
        network: Network,
        *,
        spec: config.View | None = None,
        label_smoothing: float = 0.0,
        loss: str = "two-term",
        frozen_statistics: bool = False,
        attacked: str = "image",
    ) -> None:
        self.network, self.spec, self.label_smoothing, self.attacks_views = network, spec, label_smoothing, attacked == "views"
        self.term, self.frozen_statistics = TERMS[loss], frozen_statistics

    def learners(self) -> list[nn.Parameter]:
        """Parameters of encoder and classifier; a projection head, kept for threat model I, is not trained."""
        return [*self.network.encoder.parameters(), *self.network.classifier.parameters()]

    def train_mode(self) -> None:
        """Set train mode; with frozen statistics, the encoder's batch norms keep theirs, and only their weights are trained."""
        self.network.train()
        for layer in batch_norms(self.network.encoder) if self.frozen_statistics else ():
            layer.eval()

    def views(self, images: Tensor, *, generator: torch.Generator, strength: float = 1.0) -> Tensor:
        """Views t(x); x itself without a view spec."""
        return images if self.spec is None else view(images, weakened(self.spec, strength), generator=generator)

    def clean_loss(self, views: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """CE(t(x))."""
        with clean_statistics(self.network):
            return self.loss_of_views(views, labels)

    def loss_of_views(self, views: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of given views."""
        return cross_entropy(self.network(views), labels, label_smoothing=self.label_smoothing)

    def attacked(self, images: Tensor, views: Tensor) -> Tensor:
        """Input that the adversary perturbs: images, or views."""
        return views if self.attacks_views else images

    def perturbed_rows(self, count: int) -> int:
        """Free training perturbs all rows."""
        return count

    def adversarial_loss(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
        """CE(x + d), or the adversarial loss that `loss` names."""
        return self.term.loss(self.network, images, adversarial, labels, label_smoothing=self.label_smoothing)

    def training_objective(self, images: Tensor, labels: Tensor) -> Objective:
        """Objective of the adversary of training."""
        return self.term.objective(self.network, images, labels)

    def objective(self, images: Tensor, labels: Tensor) -> Objective:
        """Threat model II for validation: cross-entropy of the whole classifier for every `loss`, so that scores are comparable."""
        return classification_objective(self.network, labels)

    def clean_score(self, images: Tensor, labels: Tensor, *, generator: torch.Generator) -> Tensor:
        """Score (N,): 1 if the prediction is correct, else 0; NaN if logits are not finite."""
        return _hits(self.network(images), labels)

    def adversarial_score(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
        """Score (N,): 1 if the prediction survives the attack, else 0; NaN if logits are not finite."""
        return _hits(self.network(adversarial), labels)

    def withstood(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
        """Score (N,): 1 if the image withstands the attack, the same as `adversarial_score`."""
        return self.adversarial_score(images, adversarial, labels)


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Correct predictions (N,) as 0 and 1; NaN for logits that are not finite, in which `argmax` would also find a class."""
    return torch.where(logits.isfinite().all(1), (logits.argmax(1) == labels).float(), torch.nan)


class HeadOnly(Classification):
    """Cross-entropy of a linear head on a fixed encoder, which stays in eval mode.

    The clean features of all training images are computed once, for all epochs.
    """

    def __init__(self, network: Network, *, features: Tensor, label_smoothing: float = 0.0, loss: str = "two-term") -> None:
        super().__init__(network, label_smoothing=label_smoothing, loss=loss)
        self.clean_features = features  # (number of training images, D)

    def learners(self) -> list[nn.Parameter]:
        return list(self.network.classifier.parameters())

    def train_mode(self) -> None:
        self.network.eval()
        self.network.encoder.requires_grad_(False)

    def clean_loss(self, views: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """CE(x) from the stored features."""
        logits = self.network.classify(self.clean_features[index])
        return cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


class Contrastive:
    """Loss of embeddings of `count` views of each image, or of an image and its adversarial example."""

    metric, larger_is_better = "loss", False

    def __init__(
        self,
        network: Network,
        *,
        spec: config.View,
        temperature: float,
        groups: Callable[[Tensor], Tensor],
        loss: str = "contrastive",
        count: int = 2,
        attacked: str = "image",
    ) -> None:
        self.network, self.spec, self.groups, self.count = network, spec, groups, count
        self.temperature, self.loss, self.attacks_views = temperature, loss, attacked == "views"

    def learners(self) -> list[nn.Parameter]:
        return [*self.network.encoder.parameters(), *self.network.projection_head.parameters()]

    def train_mode(self) -> None:
        self.network.train()

    def views(self, images: Tensor, *, generator: torch.Generator, strength: float = 1.0) -> Tensor:
        """Views t1(x), t2(x), ... of the whole batch, concatenated."""
        spec = weakened(self.spec, strength)
        return torch.cat([view(images, spec, generator=generator) for _ in range(self.count)])

    def clean_loss(self, views: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """L(t1(x), t2(x), ...); all views pass the network as one batch."""
        with clean_statistics(self.network):
            return self.loss_of_views(views, labels)

    def loss_of_views(self, views: Tensor, labels: Tensor) -> Tensor:
        """L (N,) of given views (V N, C, H, W)."""
        groups = self.groups(ranks.everyones(labels))  # from all processes, like the embeddings, because the loss couples images
        embeddings = ranks.everyones(self.network.embed(views)).unflatten(0, (-1, len(groups)))  # (V, N, D)
        return ranks.own(loss_of_embeddings(self.loss, embeddings, groups, temperature=self.temperature))

    def attacked(self, images: Tensor, views: Tensor) -> Tensor:
        """Input that the adversary perturbs: images, or views."""
        return views if self.attacks_views else images

    @property
    def perturbed(self) -> tuple[int, ...]:
        """Number of perturbed inputs per image: all views, or one view or image."""
        return (self.count if self.attacks_views else 1,)

    def perturbed_rows(self, count: int) -> int:
        """Number of rows that free training perturbs: all, or the last view of each image, as for SimCLR in arXiv 2501.03507."""
        return self.perturbed[0] * count

    def adversarial_loss(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
        """L(x, x + d), or L of the perturbed views."""
        return self.loss_of_views(adversarial if self.attacks_views else torch.cat([images, adversarial]), labels)

    def training_objective(self, images: Tensor, labels: Tensor) -> Objective:
        """Objective of the adversary of training: `objective`, or L of the views, all of which are perturbed."""
        return (lambda views: self.loss_of_views(views, labels)) if self.attacks_views else self.objective(images, labels)

    def objective(self, images: Tensor, labels: Tensor) -> Objective:
        """Threat model I: loss between the embeddings of the adversarial image and its positives."""
        groups = self.groups(ranks.everyones(labels))
        return contrastive_objective(self.network, images, groups, temperature=self.temperature, loss=self.loss)

    def clean_score(self, images: Tensor, labels: Tensor, *, generator: torch.Generator) -> Tensor:
        """Score (N,): L of new views."""
        return self.clean_loss(self.views(images, generator=generator), labels, torch.empty(0))

    def adversarial_score(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
        """Score (N,): L between image and adversarial image."""
        return self.loss_of_views(torch.cat([images, adversarial]), labels)

    def withstood(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
        """Score (N,): 1 if the image of the batch nearest to the adversarial one, by embeddings, is of its own group; else 0."""
        clean, attacked = self.network.embed(torch.cat([images, adversarial])).chunk(2)
        groups = self.groups(ranks.everyones(labels))
        return (groups[(attacked @ ranks.everyones(clean).T).argmax(1)] == ranks.own(groups)).float()


class Hybrid:
    """Sum of the mean losses of two tasks on one network, on the labelled and on the unlabelled images of a batch:

        mean_l L1(x_l, y_l) + mean_u L2(x_u)

    Labelled images come first. Each task passes its own images through the network, so that batch norms see them separately. Validation
    images have labels, and are scored by the labelled task.

    Args:
        labelled, unlabelled: the tasks.
        sizes: numbers of labelled and of unlabelled images in every batch, over all processes.
    """

    def __init__(self, labelled: Task, unlabelled: Task, *, sizes: tuple[int, int]) -> None:
        self.network, self.tasks, self.sizes = labelled.network, (labelled, unlabelled), sizes
        self.metric, self.larger_is_better, self.objective = labelled.metric, labelled.larger_is_better, labelled.objective
        self.clean_score, self.adversarial_score, self.withstood = labelled.clean_score, labelled.adversarial_score, labelled.withstood
        self.perturbed = labelled.perturbed + unlabelled.perturbed
        self.images = [ranks.part(size) for size in sizes]  # of this process, per task
        self.moved = [own * rows for own, rows in zip(self.images, self.perturbed, strict=True)]  # number of perturbed rows, per task
        self.fixed = [own * task.count - moved for task, own, moved in zip(self.tasks, self.images, self.moved, strict=True)]

    def learners(self) -> list[nn.Parameter]:
        """Parameters of both tasks, without repetition, which would apply the optimiser step twice."""
        return list(dict.fromkeys(parameter for task in self.tasks for parameter in task.learners()))

    def train_mode(self) -> None:
        for task in self.tasks:
            task.train_mode()

    def views(self, images: Tensor, *, generator: torch.Generator, strength: float = 1.0) -> Tensor:
        """Views of both tasks, those that free training perturbs last, as required by `perturbed_rows`."""
        drawn = self._each(lambda task, own: task.views(own, generator=generator, strength=strength), images.split(self.images))
        parts = [own.split(rows) for own, *rows in zip(drawn, self.fixed, self.moved, strict=True)]
        return torch.cat([own for kind in zip(*parts, strict=True) for own in kind])

    def clean_loss(self, views: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """L1 and L2 of the views."""
        return self._sum(lambda task, *own: task.clean_loss(*own), self._apart(views), labels.split(self.images), index.split(self.images))

    def loss_of_views(self, views: Tensor, labels: Tensor) -> Tensor:
        """L1 and L2 of given views."""
        return self._sum(lambda task, *own: task.loss_of_views(*own), self._apart(views), labels.split(self.images))

    def attacked(self, images: Tensor, views: Tensor) -> Tensor:
        """Inputs that the adversaries perturb, for each task images or views."""
        return torch.cat(self._each(lambda task, *own: task.attacked(*own), images.split(self.images), self._apart(views)))

    def perturbed_rows(self, count: int) -> int:
        """Number of rows that free training perturbs, in both tasks together."""
        return sum(self.moved)

    def adversarial_loss(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
        """Adversarial losses of both tasks."""
        attacked = [rows.split(self.moved) for rows in (images, adversarial)]
        return self._sum(lambda task, *own: task.adversarial_loss(*own), *attacked, labels.split(self.images))

    def training_objective(self, images: Tensor, labels: Tensor) -> Objective:
        """Objectives of both adversaries, each of its own task on its own images."""
        parts = images.split(self.moved), labels.split(self.images)
        objectives = self._each(lambda task, *own: task.training_objective(*own), *parts)
        return lambda moved: torch.cat(self._each(lambda task, of, own: of(own), objectives, moved.split(self.moved)))

    def _apart(self, views: Tensor) -> list[Tensor]:
        """Split views into those of labelled and of unlabelled images, in the order of each task: inverse of `views`."""
        fixed, moved = views.split([sum(self.fixed), sum(self.moved)])
        return [torch.cat(own) for own in zip(fixed.split(self.fixed), moved.split(self.moved), strict=True)]

    def _each(self, call: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """Results of `call` for both tasks, each of which shares its own images with the other processes."""
        results = []
        for task, size, *own in zip(self.tasks, self.sizes, *arguments, strict=True):
            with ranks.shared(size):
                results.append(call(task, *own))
        return results

    def _sum(self, loss: Callable[..., Tensor], *arguments: Sequence[Tensor]) -> Tensor:
        """Losses of both tasks, one per image, weighted so that the mean of all is the sum of both means."""
        losses = self._each(loss, *arguments)
        return torch.cat([own * (sum(self.sizes) / size) for own, size in zip(losses, self.sizes, strict=True)])


def pretraining_task(network: Network, scheme: Scheme, phase: config.Phase, *, spec: config.View, temperature: float) -> Task:
    """Task of a scheme's pretraining, chosen by its head."""
    attacked = phase.attacked or scheme.attacked
    if scheme.groups:
        about = {"groups": scheme.groups, "loss": scheme.loss, "count": phase.views or scheme.views, "attacked": attacked}
        return Contrastive(network, spec=spec, temperature=temperature, **about)
    return Classification(network, spec=spec, label_smoothing=phase.label_smoothing, loss=phase.loss, attacked=attacked)


def hybrid_task(
    network: Network, scheme: Scheme, phase: config.Phase, *, views: config.Views, temperature: float, sizes: tuple[int, int]
) -> Hybrid:
    """Task of a hybrid's pretraining; `sizes`: numbers of labelled and unlabelled images in a batch."""
    terms = (pretraining_task(network, term, phase, spec=getattr(views, term.view), temperature=temperature) for term in scheme.terms)
    return Hybrid(*terms, sizes=sizes)


def finetuning_task(network: Network, regime: Regime, phase: config.Phase, train: Split, machine: Machine) -> Task:
    """Task of a regime's fine-tuning: end to end, or a head on stored features of the training images."""
    if regime.encoder_learns:
        return Classification(network, label_smoothing=phase.label_smoothing, loss=phase.loss, frozen_statistics=phase.frozen_statistics)
    place(network, machine.device).eval()
    with torch.no_grad(), machine.autocast(training=True):
        features = torch.cat([network.classifier_features(machine.images(images)).float() for images in train.images.split(512)])
    return HeadOnly(network, features=features, label_smoothing=phase.label_smoothing, loss=phase.loss)
