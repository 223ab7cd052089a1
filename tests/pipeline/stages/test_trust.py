"""`trust` on a tiny study: which networks are trained, on which labels, and what the report shows."""

from __future__ import annotations

import json

import pytest

from advml.core.errors import UserError
from advml.pipeline.stages import trust
from advml.report.figures import trust as shown
from advml.similarity.alternatives import MEASURES
from advml.similarity.trust import ORDERS, Variant


def test_plans_differ_from_their_reference_in_one_thing():
    plans = trust.plans("test_resnet", ["test_byobnet", "test_vit"], epochs=8, seeds=2)
    assert len(plans) == len({each.name for each in plans}) == 2 * (5 + 5 + 2)
    for each in plans:
        assert (each.noise > 0) + (each.epochs < 8) + (each.architecture != "test_resnet") <= 1
    assert {each.epochs for each in plans} == {1, 2, 3, 4, 6, 8}


def test_a_share_of_labels_is_drawn_anew_and_images_stay(dataset):
    half = trust._relabelled(dataset, Variant("", 0, 0.5, 8))
    whole = trust._relabelled(dataset, Variant("", 0, 0.0, 8))
    changed = (half.train.labels != whole.train.labels).float().mean()
    assert 0.25 < changed < 0.5 and (half.train.images == whole.train.images).all()  # a quarter of the new labels are the old ones
    assert half.validation is dataset.validation and sorted(whole.train.labels.tolist()) == sorted(dataset.train.labels.tolist())


def test_every_measure_is_scored_and_the_report_shows_it(study, monkeypatch):
    monkeypatch.setattr(trust, "NOISE", (0.0, 1.0))
    monkeypatch.setattr(trust, "LENGTHS", (0.25,))
    monkeypatch.setattr(trust, "OTHERS", ("test_efficientnet",))
    context = study.context("similarity.layers=blocks")
    found = trust.run(context, epochs=4, seeds=2)
    assert json.loads(study.workspace.record("trust", "measures").read_text())["data"] == context.dataset.digest
    assert list(found["scores"]) == ["cka", *MEASURES] and len(found["networks"]) == 8
    for orders in found["scores"].values():
        assert list(orders) == list(ORDERS)
        assert all(about["mean"] is None or -1 <= about["mean"] <= 1 for about in orders.values())
    assert len(shown(study.workspace, context.dataset.digest)["table"]) == 1 + len(found["scores"])
    assert shown(study.workspace, "other data") is None
    assert not list(study.workspace.scratch("").glob("trust-*"))


@pytest.mark.parametrize("asked", [{"epochs": 3, "seeds": 2}, {"epochs": 8, "seeds": 1}])
def test_too_few_to_order_is_refused(study, asked):
    with pytest.raises(UserError, match="--epochs 4 or more and --seeds 2"):
        trust.run(study.context(), **asked)
