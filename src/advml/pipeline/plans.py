"""Resolve params.yaml to the plan of a training phase: network, task, adversary and seed.

    plan = finetuning(configuration, dataset, machine, network, scheme="CL", regime="Full-AT", seed=0)
    network, history = fit(plan, machine, checkpoint=Checkpoint(folder, fingerprint))

Stages write the results into the study's folders; a search trains the same phases with other values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from advml import config
from advml.core.device import Machine, chosen_device, derived_seed
from advml.core.errors import UserError
from advml.data.datasets import Dataset
from advml.data.prepared import require_labels
from advml.models.layers import batch_norms, knows_blocks
from advml.models.network import Architecture, Network, build
from advml.models.starting_point import read, start_from
from advml.models.trial_step import try_step
from advml.recipes import REGIMES, SCHEMES, Scheme
from advml.training.adversarial_steps import adversarial_training
from advml.training.streams import check_images, learnt_from, shares
from advml.training.tasks import Task, finetuning_task, hybrid_task, pretraining_task
from advml.training.trainer import Plan


def pretraining(configuration: config.Config, dataset: Dataset, *, scheme: str, phase: str, seed: int) -> Plan:
    """Plan of `pretrain SCHEME PHASE`, on a network with the weights of `model.init`, or random ones that depend on scheme and seed only.

    Args:
        configuration: uses the sections model, temperature, views and pretrain.SCHEME; if attacked, also threat_model and attack. The
            backbone is also checked against the requirements of the grid's regimes.
        dataset: determines the network's shape; the scheme trains on the part of it that it may use (`learnt_from`).
        scheme: a key of SCHEMES.
        phase: "st" or "at".
        seed: of weights, batches, views and random starts.
    Raises:
        UserError: the backbone cannot be built or trained for these images, the scheme needs other images or labels, or `model.init` does
            not fit the network.
    """
    row, attacked, section = SCHEMES[scheme], phase == "at", configuration.pretrain[scheme]
    check_images(row, dataset, batch_size=section.batch_size)
    network = build(architecture(configuration, dataset, heads=row.heads, attacked=attacked), seed=derived_seed("weights", scheme, seed))
    init = _start(configuration, dataset, network, scheme) if configuration.model.init else None
    _check(f"pretrain.{scheme}", section, network)
    check_regimes(configuration, network)
    views = min((section.views or part.views) if part.groups else 1 for part in row.parts)  # per image in a batch
    if section.epochs:
        try_step(network, count=views * _smallest_batch(section, dataset), cpu_bfloat16=_cpu_bfloat16(configuration))
    return Plan(
        network=network,
        images=lambda: learnt_from(dataset, row),
        phase=section,
        task=(lambda: _task(configuration, dataset, network, scheme=row, phase=section)) if section.epochs else None,
        adversary=adversarial_training(configuration.attack, configuration.threat_model, section) if attacked else None,
        seed=derived_seed("pretrain", scheme, phase, seed),
        init=init,
    )


def _start(configuration: config.Config, dataset: Dataset, network: Network, scheme: str) -> dict[str, Any]:
    """Load `model.init` into the network; without training, a classifier must come from there, and a missing projection head is removed."""
    init = start_from(network, read(configuration.model.init), classes=dataset.classes)
    if not configuration.pretrain[scheme].epochs and SCHEMES[scheme].head == "classifier" and "classifier" not in init["taken"]:
        remedy = "set epochs to 1 or more, or name the classes of the checkpoint: advml import --classes"
        told = f"pretrain.{scheme}.epochs = 0 needs a classifier of {', '.join(dataset.classes[:3])}, ..."
        raise UserError(f"{told}, which model.init = {configuration.model.init} does not have; {remedy}")
    if not configuration.pretrain[scheme].epochs and "projection_head" not in init["taken"]:
        network.projection_head, network.architecture = None, replace(network.architecture, projection_size=None)
    return init


def _task(configuration: config.Config, dataset: Dataset, network: Network, *, scheme: Scheme, phase: config.Phase) -> Task:
    """Task of a scheme's pretraining."""
    views, temperature = configuration.views, configuration.temperature
    if scheme.terms:
        sizes = shares(len(dataset.train), len(dataset.unlabelled), batch_size=phase.batch_size)
        return hybrid_task(network, scheme, phase, views=views, temperature=temperature, sizes=sizes)
    return pretraining_task(network, scheme, phase, spec=getattr(views, scheme.view), temperature=temperature)


def finetuning(
    configuration: config.Config, dataset: Dataset, machine: Machine, network: Network, *, scheme: str, regime: str, seed: int
) -> Plan:
    """Plan of `finetune SCHEME REGIME`, on a pretrained network, which is modified.

    Args:
        configuration: uses the section regimes.REGIME; if attacked, also threat_model and attack.
        dataset: provides the classes, and training images for the features of a fixed encoder.
        machine: computes these features.
        network: the pretrained network; gets a new classifier if the regime trains one.
        scheme: a key of SCHEMES, that of the pretraining.
        regime: a key of REGIMES.
        seed: of the new classifier, of batches and of random starts.
    """
    row, plan, phase = SCHEMES[scheme], REGIMES[regime], configuration.regimes[regime]
    require_labels(dataset, "fine-tuning")
    _check(f"regimes.{regime}", phase, network)
    if not plan.keeps_head(row):
        network.attach_classifier(len(dataset.classes), seed=derived_seed("head", scheme, regime, seed))
    if plan.finetunes(row):
        network.architecture = replace(network.architecture, averaged_crops=phase.averaged_crops)
    if plan.encoder_learns:
        alone = 2 if phase.frozen_statistics else _smallest_batch(phase, dataset)  # frozen statistics need no second image
        try_step(network, count=alone, cpu_bfloat16=_cpu_bfloat16(configuration))
    return Plan(
        network=network,
        images=lambda: replace(dataset, unlabelled=None),
        phase=phase,
        task=(lambda: finetuning_task(network, plan, phase, dataset.train, machine)) if plan.finetunes(row) else None,
        adversary=adversarial_training(configuration.attack, configuration.threat_model, phase) if plan.attacked else None,
        seed=derived_seed("finetune", scheme, regime, seed),
    )


def check_regimes(configuration: config.Config, network: Network) -> None:
    """Check the requirements of the grid's regimes on the backbone before pretraining, which may take hours.

    Raises:
        UserError: the backbone does not fulfil one.
    """
    for regime in (name for name in configuration.grid.regimes if REGIMES[name].encoder_learns):
        _check(f"regimes.{regime}", configuration.regimes[regime], network)


def _check(key: str, phase: config.Phase, network: Network) -> None:
    """Check the requirements of a phase on the backbone.

    Raises:
        UserError: the backbone does not fulfil one.
    """
    backbone = network.architecture.backbone
    if phase.frozen_statistics and not batch_norms(network.encoder):
        raise UserError(f"{key}.frozen_statistics = true has no effect: {backbone} has no batch norm; set it to false")
    if phase.layer_decay < 1 and not knows_blocks(network.encoder):
        raise UserError(
            f"{key}.layer_decay = {phase.layer_decay:g} needs the blocks of {backbone}, which timm does not define; set it to 1"
        )


def _cpu_bfloat16(configuration: config.Config) -> bool:
    """Whether training computes in bfloat16 on a CPU."""
    return configuration.runtime.precision == "bf16" and chosen_device(configuration.runtime.device).type == "cpu"


def _smallest_batch(phase: config.Phase, dataset: Dataset) -> int:
    """Size of the smallest training batch, at most 2, which is enough for a trial step."""
    return min(phase.batch_size, len(dataset.train), 2)


def architecture(configuration: config.Config, dataset: Dataset, *, heads: set[str], attacked: bool) -> Architecture:
    """Architecture of a pretraining; `dual` batch norm is used only with adversarial batches."""
    model, (channels, size, _) = configuration.model, dataset.shape
    return Architecture(
        backbone=model.backbone,
        stem=model.stem,
        options=model.options,
        channels=channels,
        image_size=size,
        mean=dataset.mean,
        std=dataset.std,
        classes=len(dataset.classes) if "classifier" in heads else None,
        projection_size=model.projection_size if "projection" in heads else None,
        normalize_logits=model.normalize_logits,
        dual_batch_norm=attacked and model.batch_norm == "dual",
    )
