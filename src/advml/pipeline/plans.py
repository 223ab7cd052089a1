"""What a phase of a study trains, resolved from params.yaml: network, task, adversary and seed.

    plan = finetuning(configuration, dataset, machine, network, scheme="CL", regime="Full-AT", seed=0)
    network, history = fit(plan, dataset, machine, checkpoint=Checkpoint(folder, fingerprint))

The stages write what comes of it into the study's folders; a search asks for the same phase under other values.
"""

from __future__ import annotations

from advml import config
from advml.attacks.pgd import training_adversary
from advml.core.device import Machine, chosen_device, derived_seed
from advml.core.errors import UserError
from advml.data.datasets import Dataset
from advml.models.layers import batch_norms, knows_blocks
from advml.models.network import Architecture, Network, build
from advml.models.trial_step import try_step
from advml.recipes import REGIMES, SCHEMES
from advml.training.tasks import finetuning_task, pretraining_task
from advml.training.trainer import Plan


def pretraining(configuration: config.Config, dataset: Dataset, *, scheme: str, phase: str, seed: int) -> Plan:
    """The plan of `pretrain SCHEME PHASE`, on a network of random weights that depend on scheme and seed alone.

    Args:
        configuration: its sections model, temperature, views, pretrain.SCHEME; if attacked also threat_model and attack. The
            backbone is checked for what the grid's regimes will ask of it, too.
        dataset: gives the network its shape; its images are not read.
        scheme: a key of SCHEMES.
        phase: "st" or "at".
        seed: of weights, batches, views and random starts.
    Raises:
        UserError: the backbone cannot be built, or not trained, for these images.
    """
    row, attacked, section = SCHEMES[scheme], phase == "at", configuration.pretrain[scheme]
    network = build(architecture(configuration, dataset, head=row.head, attacked=attacked), seed=derived_seed("weights", scheme, seed))
    _check(f"pretrain.{scheme}", section, network)
    check_regimes(configuration, network)
    spec, views = getattr(configuration.views, row.view), 2 if row.groups else 1  # of each image, in one batch
    bfloat16 = configuration.runtime.precision == "bf16" and chosen_device(configuration.runtime.device).type == "cpu"
    try_step(network, count=views * _smallest_batch(section, dataset), cpu_bfloat16=bfloat16)
    return Plan(
        network=network,
        phase=section,
        task=lambda: pretraining_task(network, row, section, spec=spec, temperature=configuration.temperature),
        adversary=training_adversary(configuration.attack, configuration.threat_model, section) if attacked else None,
        seed=derived_seed("pretrain", scheme, phase, seed),
    )


def finetuning(
    configuration: config.Config, dataset: Dataset, machine: Machine, network: Network, *, scheme: str, regime: str, seed: int
) -> Plan:
    """The plan of `finetune SCHEME REGIME`, on a pretrained network, which it changes.

    Args:
        configuration: its section regimes.REGIME; if attacked also threat_model and attack.
        dataset: has the classes, and the training images of which a fixed encoder's features are taken.
        machine: computes those.
        network: a pretrained one; gets a new classifier where the regime fits one.
        scheme: a key of SCHEMES, the one of the pretraining.
        regime: a key of REGIMES.
        seed: of the new classifier, of batches and of random starts.
    """
    row, plan, phase = SCHEMES[scheme], REGIMES[regime], configuration.regimes[regime]
    _check(f"regimes.{regime}", phase, network)
    if not plan.keeps_head(row):
        network.attach_classifier(len(dataset.classes), seed=derived_seed("head", scheme, regime, seed))
    if plan.encoder_learns and not phase.frozen_statistics:
        try_step(network, count=_smallest_batch(phase, dataset))
    return Plan(
        network=network,
        phase=phase,
        task=(lambda: finetuning_task(network, plan, phase, dataset.train, machine)) if plan.finetunes(row) else None,
        adversary=training_adversary(configuration.attack, configuration.threat_model, phase) if plan.attacked else None,
        seed=derived_seed("finetune", scheme, regime, seed),
    )


def check_regimes(configuration: config.Config, network: Network) -> None:
    """What the grid's regimes will ask of the backbone, so that it is not refused after hours of pretraining.

    Raises:
        UserError: this one does not have it.
    """
    for regime in (name for name in configuration.grid.regimes if REGIMES[name].encoder_learns):
        _check(f"regimes.{regime}", configuration.regimes[regime], network)


def _check(key: str, phase: config.Phase, network: Network) -> None:
    """What a phase asks of the backbone, before anything is trained.

    Raises:
        UserError: this one does not have it.
    """
    backbone = network.architecture.backbone
    if phase.frozen_statistics and not batch_norms(network.encoder):
        raise UserError(f"{key}.frozen_statistics = true has no effect: {backbone} has no batch norm; set it to false")
    if phase.layer_decay < 1 and not knows_blocks(network.encoder):
        raise UserError(f"{key}.layer_decay = {phase.layer_decay:g} needs the blocks of {backbone}, which timm does not tell; set it to 1")


def _smallest_batch(phase: config.Phase, dataset: Dataset) -> int:
    """Images in a batch of the training; of two or more, two will do for a trial."""
    return min(phase.batch_size, len(dataset.train), 2)


def architecture(configuration: config.Config, dataset: Dataset, *, head: str, attacked: bool) -> Architecture:
    """The network of a pretraining; `dual` batch norm only where there are adversarial batches."""
    model, (channels, size, _) = configuration.model, dataset.shape
    return Architecture(
        backbone=model.backbone,
        stem=model.stem,
        options=model.options,
        channels=channels,
        image_size=size,
        mean=dataset.mean,
        std=dataset.std,
        classes=len(dataset.classes) if head == "classifier" else None,
        projection_size=model.projection_size if head == "projection" else None,
        normalize_logits=model.normalize_logits,
        dual_batch_norm=attacked and model.batch_norm == "dual",
    )
