"""`advml estimate`: counts are exact, stages are those of the pipeline, and the time is that of the slots."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from advml.data import prepared
from advml.pipeline.estimate import MACHINES, REACHED, START, Cost, Stage, estimate, makespan

CHEAP = ("corruptions.names=none", "diagnostics.images=0", "worst_case.attacks=[]", "similarity.layers=blocks")


def stage(name: str, seconds: float, *needs: str) -> Stage:
    return Stage(name, Cost(seconds=seconds), needs)


def test_slots_are_filled_in_order_and_stages_wait_for_what_they_need():
    stages = [stage("a", 3), stage("b", 1), stage("c", 1, "b"), stage("d", 5, "a", "c")]
    assert makespan(stages, 1) == 10 and makespan(stages, 2) == 8 and makespan(stages, 9) == 8


def test_costs_add_up_and_the_memory_is_the_largest():
    assert Cost(1, 2, 3, 4) + Cost(1, 1, 1, 9) == Cost(2, 3, 4, 9) and Cost(1, 2, 3, 4) * 2 == Cost(2, 4, 6, 4)
    assert Cost(1, 2, 3e12, 4).on("a100").seconds == pytest.approx(3e12 / (MACHINES["a100"] * REACHED))


def test_a_study_is_counted_stage_by_stage_before_anything_of_it_exists(make_study):
    study = make_study("study", "grid.schemes=[SL]", "grid.standard_regimes=[]", "grid.adversarial_regimes=[AT]", "seeds=[0, 1]", *CHEAP)
    found = estimate(study.context(), jobs=2)
    names = [one.name for one in found.stages]
    assert names[2:6] == [f"pretrain_{phase}@SL-{seed}" for phase in ("st", "at") for seed in (0, 1)]  # as the matrix of dvc.yaml says
    assert names[-1] == "report" and len(names) == 5 + 2 * 5
    costs = {one.name: one.cost for one in found.stages}
    # Two epochs of 3 batches of 32 images: the clean term, two steps of PGD, the attacked term; and PGD on 32 of validation.
    assert costs["pretrain_at@SL-0"].gradient_steps == 2 * (3 * 32 * (1 + 2 + 1) + 32 * 2)
    assert costs["finetune_at@SL-AT-0"].gradient_steps == 0  # the classifier is taken over
    # Threat model II, at epsilon and half of it: two steps on each of 40 test images.
    assert costs["evaluate_at@SL-AT-0"].gradient_steps >= 2 * 2 * 40
    assert all(cost.seconds > 0 for cost in costs.values()) and costs["pretrain_at@SL-0"].flops > 0 < found.total.memory
    assert START < found.seconds < START + sum(cost.seconds for cost in costs.values())
    assert not study.workspace.models.exists() and not study.workspace.reports.exists()


def test_a_hybrid_is_counted_by_the_shares_of_its_batches(make_study, dataset):
    """Three batches of 8 labelled images, once each, and 24 unlabelled ones, seen twice."""
    options = "{epochs: 2, batch_size: 32, optimizer: sgd, learning_rate: 0.1, weight_decay: 0, schedule: constant}"
    study = make_study(
        "study", "grid.schemes=[CLxSL]", "grid.standard_regimes=[ST]", "grid.adversarial_regimes=[]", f"pretrain.CLxSL={options}", *CHEAP
    )
    parts = [prepared.Split(dataset.train.images[some], dataset.train.labels[some]) for some in (slice(24), slice(24, None))]
    splits = dataset.splits | {"train": parts[0], "unlabelled": parts[1]}
    shutil.rmtree(study.workspace.prepared)
    prepared.save(replace(dataset, **splits, digest=prepared.digest(splits, dataset.classes)), study.workspace.prepared)
    costs = {one.name: one.cost for one in estimate(study.context(), jobs=1).stages}
    assert costs["pretrain_st@CLxSL-0"].gradient_steps == 2 * 3 * (8 + 2 * 24)
