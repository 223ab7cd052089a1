"""Values of params.yaml that do not fit the data or the backbone are refused before anything is trained."""

from __future__ import annotations

import pytest

from advml.core.errors import UserError
from advml.pipeline.plans import check_regimes


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["views.contrastive.pad=8"], "views.contrastive.pad = 8"),  # the images have 8 x 8 pixels
        (["threat_model.norm=l2", "threat_model.epsilon=8.1"], "threat_model.epsilon = 8.1"),  # the cube's diameter is 8
        (["threat_model.norm=l2", "regimes.Full-AT.epsilon=9"], "regimes.Full-AT.epsilon = 9"),
        (["threat_model.norm=l2", "evaluate.epsilon=9"], "evaluate.epsilon = 9"),
        (["evaluate.adversarial_images=3"], "evaluate.adversarial_images = 3"),
        (["similarity.probe_images=3"], "similarity.probe_images = 3"),  # four classes
    ],
)
def test_values_that_the_data_do_not_allow_are_refused_with_their_key(study, overrides: list[str], key: str) -> None:
    with pytest.raises(UserError, match=f"^{key} "):
        _ = study.context(*overrides).dataset


@pytest.mark.parametrize(
    "overrides",
    [
        ["views.contrastive.pad=7", "evaluate.adversarial_images=4", "similarity.probe_images=4"],
        ["threat_model.norm=l2", "threat_model.epsilon=8", "evaluate.epsilon=8"],
    ],
)
def test_values_at_the_edge_of_what_the_data_allow_are_taken(study, overrides: list[str]) -> None:
    assert len(study.context(*overrides).dataset.classes) == 4


def test_what_a_regime_asks_of_the_backbone_is_checked_with_the_pretraining(study, make_network) -> None:
    frozen, network = "regimes.Full-AT.frozen_statistics=true", make_network(backbone="test_convnext", stem="native", image_size=32)
    check_regimes(study.config(frozen), make_network())
    check_regimes(study.config(frozen, "grid.adversarial_regimes=[AT]"), network)
    with pytest.raises(UserError, match=r"^regimes\.Full-AT\.frozen_statistics = true .*test_convnext"):
        check_regimes(study.config(frozen), network)
