"""An adversary leaves the network as it found it, and hoisting the clean embedding changes nothing."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from advml import config
from advml.attacks.pgd import Adversary, Objective, evaluation_adversary, training_adversary
from advml.attacks.threat_model import ThreatModel
from advml.models.network import Architecture, Network, build, under_attack
from advml.training.losses import contrastive_views, cross_entropy
from advml.training.tasks import contrastive_objective

PARAMS = Path(__file__).parents[2] / "params.yaml"
MODES = pytest.mark.parametrize("mode", ["eval", "train"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_network(**options) -> Network:
    """A network that has learnt for a moment, so that its batch-norm statistics differ from a batch's."""
    network = build(Architecture("test_resnet", "small", options, 1, 8, (0.4,), (0.3,), 10, 16, False, False), seed=0)
    with torch.no_grad():
        network(torch.rand(16, 1, 8, 8, generator=seeded(5)))
    return network


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 1, 8, 8, generator=seeded()), torch.arange(count) % 10


def adversary(norm: str = "linf", **changes) -> Adversary:
    settings = {"steps": 3, "step_size": 0.05, "random_start": True, "keep": "last"}
    return Adversary(ThreatModel(norm, 0.1), **(settings | changes))


def classification(network: Network, labels: Tensor) -> Objective:
    return lambda x: cross_entropy(network(x), labels)


def batch_norms(network: Network) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


# Side effects


@MODES
@pytest.mark.parametrize("keep", ["last", "best"])
def test_an_attack_leaves_gradients_flags_statistics_and_global_rng_untouched(mode, keep):
    """A network in the middle of training: some gradients, a frozen encoder in eval mode, a learning head with dropout."""
    network, (images, labels) = small_network(drop_rate=0.5), batch()
    network.train()
    network.encoder.eval()
    network.encoder.requires_grad_(False)
    network.classifier.weight.grad = torch.randn_like(network.classifier.weight)
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters()}
    kept = {name: p.grad for name, p in network.named_parameters()}
    flags, learns = [m.training for m in network.modules()], [p.requires_grad for p in network.parameters()]
    state, rng = copy.deepcopy(network.state_dict()), torch.get_rng_state()

    adversary(mode=mode, keep=keep).attack(network, lambda: classification(network, labels), images, generator=seeded())

    assert [m.training for m in network.modules()] == flags
    assert [p.requires_grad for p in network.parameters()] == learns
    for name, parameter in network.named_parameters():
        assert parameter.grad is kept[name]
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_an_attack_in_train_mode_moves_the_statistics_of_a_learning_network_only():
    """The paper's protocol. Validation, and a frozen encoder among learning parts, stay as they are."""
    network, (images, labels) = small_network(), batch()
    frozen = batch_norms(network)[0]

    def updates() -> list[int]:
        before = [int(layer.num_batches_tracked) for layer in batch_norms(network)]
        adversary(mode="train").attack(network, lambda: classification(network, labels), images, generator=seeded())
        return [int(layer.num_batches_tracked) - number for layer, number in zip(batch_norms(network), before, strict=True)]

    network.train()
    frozen.eval()
    assert updates() == [0] + [3] * (len(batch_norms(network)) - 1)
    network.eval()
    assert updates() == [0] * len(batch_norms(network))


@MODES
def test_an_attack_is_deterministic_despite_dropout_and_leaves_the_global_rng_alone(mode):
    """Else the clean embedding, computed once, would be of another network than the adversarial one."""
    network, (images, labels) = small_network(drop_rate=0.5, drop_path_rate=0.5).train(), batch()
    attack = adversary(mode=mode).attack
    rng, state = torch.get_rng_state(), copy.deepcopy(network.state_dict())
    first, second = (attack(network, lambda: classification(network, labels), images, generator=seeded()) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), rng)
    assert mode == "train" or all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert all(module.training for module in network.modules())


@MODES
def test_under_attack_restores_after_an_exception(mode):
    network = small_network().train()
    frozen = batch_norms(network)[1].eval()
    network.classifier.requires_grad_(False)
    with pytest.raises(ZeroDivisionError), under_attack(network, mode=mode):
        assert not any(p.requires_grad for p in network.parameters())
        assert {layer.training for layer in batch_norms(network) if layer is not frozen} == {mode == "train"}
        assert not network.training and not frozen.training
        raise ZeroDivisionError
    assert [module for module in network.modules() if not module.training] == [frozen]
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["classifier.weight", "classifier.bias"]


def test_the_objective_is_built_once_while_the_network_is_under_attack():
    network, (images, labels), seen = small_network().train(), batch(), []

    def make() -> Objective:
        seen.append((network.training, any(p.requires_grad for p in network.parameters())))
        return classification(network, labels)

    adversary().attack(network, make, images, generator=seeded())
    assert seen == [(False, False)]


def test_training_after_an_attack_in_one_autocast_still_reaches_every_parameter():
    """Autocast caches weights in bf16: a copy cached while they took no gradient would cut them off from the loss."""
    network, (images, labels) = small_network().train(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective = lambda: contrastive_objective(network, images, labels, temperature=0.2)  # noqa: E731
        attacked = adversary().attack(network, objective, images, generator=seeded())
        first, second = network.embed(torch.cat([images, attacked])).chunk(2)
        loss = contrastive_views(torch.stack([first, second]), labels, temperature=0.2).mean()
    loss.backward()
    learners = [*network.encoder.parameters(), *network.projection_head.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learners)
    assert sum(float(p.grad.abs().sum()) for p in learners) > 0


# The attack itself


def test_the_adversary_keeps_the_iterate_it_is_told_to():
    """Steps far too long for the ball overshoot, so that the last iterate is not the best of every image."""
    network, (images, labels) = small_network().eval(), batch()

    def value(keep: str) -> Tensor:
        attacker = adversary(steps=6, step_size=0.5, keep=keep)
        return cross_entropy(network(attacker.attack(network, lambda: classification(network, labels), images, generator=seeded())), labels)

    assert (value("best") >= value("last")).all() and (value("best") > value("last")).any()


def test_the_random_start_follows_from_the_generator_alone():
    network, (images, labels) = small_network(), batch()

    def attack(seed: int, **changes) -> Tensor:
        return adversary(**changes).attack(network, lambda: classification(network, labels), images, generator=seeded(seed))

    assert torch.equal(attack(1), attack(1))
    assert not torch.equal(attack(1), attack(2))
    assert torch.equal(attack(1, random_start=False), attack(2, random_start=False))


@MODES
@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 0, 1]], ids=["CL", "SCL"])
def test_the_hoisted_clean_embedding_gives_exactly_what_recomputing_it_gives(mode, groups):
    """Exact also where batch norm uses batch statistics: the clean batch's do not depend on the perturbation."""
    network, images, groups = small_network().train(), batch()[0], torch.tensor(groups)

    def recomputed() -> Objective:
        return lambda x: contrastive_views(torch.stack([network.embed(images), network.embed(x)]), groups, temperature=0.2)

    def hoisted() -> Objective:
        return contrastive_objective(network, images, groups, temperature=0.2)

    attacker = adversary(mode=mode, steps=5)
    ours = attacker.attack(network, hoisted, images, generator=seeded())
    slow = attacker.attack(network, recomputed, images, generator=seeded())
    assert torch.equal(ours, slow) and not torch.equal(ours, images)


def test_a_scaled_adversary_is_smaller_in_radius_and_step_alone():
    whole = adversary(momentum=0.5, schedule="cosine", mode="train")
    half = whole.scaled(0.5)
    assert half == replace(whole, threat_model=ThreatModel("linf", 0.05), step_size=0.025)
    assert whole.scaled(1) is whole


# Settings


def test_the_training_adversary_is_what_params_yaml_says():
    configuration = config.load(
        PARAMS, ["threat_model.epsilon=8/255", "attack.steps=5", "attack.batch_norm=train", "attack.random_start=false"]
    )
    assert training_adversary(configuration.attack, configuration.threat_model) == Adversary(
        ThreatModel("linf", 8 / 255), steps=5, step_size=pytest.approx(4 / 255), random_start=False, keep="last", mode="train"
    )
    longer = config.load(PARAMS, ["attack.step_size=0.01"])
    assert training_adversary(longer.attack, longer.threat_model).step_size == 0.01


@pytest.mark.parametrize(
    ("overrides", "epsilon", "steps", "step_size"),
    [
        ([], 0.2, 5, 0.1),
        (["regimes.Full-AT.epsilon=0.1"], 0.1, 5, 0.05),
        (["regimes.Full-AT.attack_steps=2"], 0.2, 2, 0.25),
        (["regimes.Full-AT.attack_steps=1"], 0.2, 1, 0.2),
        (["regimes.Full-AT.epsilon=0.1", "attack.step_size=0.03"], 0.1, 5, 0.03),
    ],
)
def test_a_phase_may_have_a_radius_and_a_number_of_steps_of_its_own(overrides, epsilon, steps, step_size):
    configuration = config.load(PARAMS, ["threat_model.epsilon=0.2", "attack.steps=5", *overrides])
    made = training_adversary(configuration.attack, configuration.threat_model, configuration.regimes["Full-AT"])
    assert (made.threat_model.epsilon, made.steps) == (epsilon, steps) and made.step_size == pytest.approx(step_size)
    other = training_adversary(configuration.attack, configuration.threat_model, configuration.regimes["Partial-AT"])
    assert other.threat_model == evaluation_adversary(configuration.evaluate, configuration.threat_model).threat_model
    assert other.threat_model.epsilon == 0.2


def test_the_evaluation_adversary_is_what_params_yaml_says():
    overrides = ["threat_model.norm=l2", "evaluate.steps=20", "evaluate.keep=last", "attack.batch_norm=train", "attack.steps=3"]

    def adversary(*changes: str, share: float = 1.0) -> Adversary:
        asked = config.load(PARAMS, [*overrides, "threat_model.epsilon=0.4", *changes])
        return evaluation_adversary(asked.evaluate, asked.threat_model, share=share)

    expected = Adversary(ThreatModel("l2", 0.4), steps=20, step_size=pytest.approx(0.05), random_start=True, keep="last", mode="eval")
    assert adversary() == expected
    assert adversary("evaluate.epsilon=0.8", share=0.5) == expected
    assert adversary("evaluate.step_size=0.01", share=0.5).step_size == 0.01
