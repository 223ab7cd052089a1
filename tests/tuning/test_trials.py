"""What trials do: attacks within their budget, and trainings that go on where a kill has stopped them."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch

from advml.attacks.threat import ThreatModel
from advml.runtime.checkpoint import Checkpoint
from advml.runtime.machine import Machine
from advml.stages import finetune, pretrain
from advml.tuning import attack, budget, census, training, worker
from advml.tuning import study as studies
from advml.tuning.searches import AttackSearch, TrainingSearch
from advml.tuning.storage import address

CPU = Machine(torch.device("cpu"))
SPACE = "tune.finetune.space={learning_rate: {log: [1e-4, 1e-2]}, epochs: {int: [2, 4]}}"


@pytest.fixture
def trained(make_study):
    """A study with CL-at pretrained."""
    study = make_study()
    pretrain.run(study.context(), scheme="CL", phase="at", seed=0)
    return study


def one_trial(search, study, total: int = 9):
    """Claim the next trial and run it, as a worker does; the trial afterwards."""
    url, definition = address(None, root=study.root), search.definition()
    opened = studies.create(definition, url)
    studies.bury(opened, url)
    trial = studies.claim(opened, definition, url, total=total, since=0, seed=0)
    worker.run(opened, trial, search.open(), study.root / "scratch")
    return opened.get_trials()[trial.number]


# Attacks


class Counter(torch.nn.Module):
    """A linear classifier with hooks that count how often images pass forwards, and gradients come back."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.passes = torch.nn.Linear(64, 4), {"forward": 0, "backward": 0}
        self.register_forward_hook(self._count)

    def _count(self, module, inputs, output) -> None:
        self.passes["forward"] += 1
        if output.requires_grad:
            output.register_hook(self._count_back)

    def _count_back(self, gradient) -> None:
        self.passes["backward"] += 1

    def forward(self, images):
        return self.linear(images.flatten(1))


VALUES = {
    "step_size": 1e-9,
    "schedule": "linear",
    "momentum": 0.5,
    "objective": "margin",
    "restarts": 1,
    "random_start": False,
    "keep": "best",
}


@pytest.mark.parametrize(
    ("restarts", "keep", "steps", "forward"),
    [(1, "best", 12, 14), (2, "best", 5, 14), (4, "best", 2, 16), (1, "last", 12, 13), (5, "last", 2, 15)],
)
def test_all_passes_of_all_restarts_stay_within_those_of_the_default(dataset, restarts, keep, steps, forward):
    assert budget.steps_within(12 + 12 + 2, restarts=restarts, keep=keep) == steps
    network, values = Counter(), VALUES | {"restarts": restarts, "keep": keep}
    chosen = attack.Attack.of(values, steps=steps, threat_model=ThreatModel("linf", 1e-9))
    with torch.no_grad():
        labels = network(CPU.images(dataset.validation.images)).argmax(1)
    split = type(dataset.validation)(dataset.validation.images, labels)
    network.passes = {"forward": -1, "backward": 0}  # the clean images, which every attack begins with, are not counted
    right = torch.cat(list(attack.withstood(network, split, chosen, batch_size=32, seed=0, machine=CPU)))
    assert right.all()  # nothing breaks, so nothing leaves the batch early
    assert network.passes == chosen.passes == {"forward": forward, "backward": restarts * steps}
    assert sum(network.passes.values()) <= 12 + 12 + 2


def test_only_the_first_run_begins_at_the_image_itself():
    chosen = attack.Attack.of(VALUES | {"restarts": 3}, steps=3, threat_model=ThreatModel("linf", 0.1))
    assert [run.random_start for run in chosen.runs()] == [False, True, True]


def test_an_image_counts_as_broken_if_any_run_breaks_it(dataset, make_network):
    network, threat = make_network(), ThreatModel("linf", 0.05)
    values = VALUES | {"step_size": 0.3, "objective": "ce", "random_start": True}

    def standing(restarts: int) -> torch.Tensor:
        chosen = attack.Attack.of(values | {"restarts": restarts}, steps=3, threat_model=threat)
        return torch.cat(list(attack.withstood(network, dataset.validation, chosen, batch_size=8, seed=0, machine=CPU)))

    once, often = standing(1), standing(4)
    assert not (often & ~once).any() and (once & ~often).sum() >= 0


def test_the_pairs_of_a_comparison_are_tested_exactly():
    """Against the binomial by hand: 5 to 0 is 2 * 0.5^5."""
    one, other = torch.tensor([True] * 5 + [False, True]), torch.tensor([False] * 5 + [False, True])
    assert attack.paired(one, other) == {"broken_by_winner_only": 5, "broken_by_default_only": 0, "p": pytest.approx(2 * 0.5**5)}
    assert attack.paired(one, one)["p"] == 1.0


def test_a_searched_attack_is_scored_on_validation_and_confirmed_on_both_splits(trained):
    finetune.run(trained.context(), scheme="CL", regime="AT", seed=0)
    settings = ("tune.attack.batch_size=8", "tune.attack.budget=4", "tune.attack.space.restarts={choice: [1, 2]}")
    search = AttackSearch.of(trained.config(*settings), trained.root, "CL-AT-s0")
    first, second = one_trial(search, trained), one_trial(search, trained)
    assert first.params["restarts"] == 1 and len(first.intermediate_values) == 4
    assert first.value == pytest.approx(sum(first.intermediate_values.values()) / 4)
    told = search.confirm(second.params)
    assert told["validation"]["default"]["accuracy"] == pytest.approx(first.value)
    assert {split: told[split]["winner"]["n"] for split in ("validation", "test")} == {"validation": 32, "test": 40}


# Trainings


def test_a_trial_of_the_defaults_is_the_training_of_the_stage(trained):
    search = TrainingSearch.of(trained.config(SPACE), trained.root, "finetune", "CL", "Full-AT", seed=0)
    trial = one_trial(search, trained)
    record = finetune.run(trained.context(), scheme="CL", regime="Full-AT", seed=0)
    _, network = trained.context().load_network(trained.workspace.model("CL-Full-AT-s0"))
    measured = training.Bench(search).measure(network)
    assert trial.user_attrs["history"][-1]["epoch"] == 2 and record["epoch"] in (1, 2)
    assert (trial.value, trial.user_attrs["measured"]["clean"]) == (measured["robust"], measured["clean"])
    assert trial.constraints == {"clean_floor": 0.97 - measured["clean"]}


def test_a_killed_trial_goes_on_from_its_last_epoch_and_ends_the_same_to_the_bit(trained, monkeypatch):
    def search(name: str) -> TrainingSearch:
        settings = trained.config(SPACE, "regimes.Full-AT.epochs=4")
        return TrainingSearch.of(settings, trained.root, "finetune", "CL", "Full-AT", seed=0, name=name)

    whole = one_trial(search("whole"), trained)

    def killed_after(epoch: int) -> None:
        child = os.fork()
        if child == 0:
            saved = Checkpoint.save

            def save_and_die(self, progress):
                saved(self, progress)
                if progress.epoch == epoch:
                    os.kill(os.getpid(), signal.SIGKILL)

            Checkpoint.save = save_and_die
            try:
                one_trial(search("killed"), trained)
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL

    killed_after(1)
    killed_after(3)
    trained_epochs = []
    train_epoch = training.phases.train.__globals__["_Trainer"].epoch
    monkeypatch.setattr(
        training.phases.train.__globals__["_Trainer"],
        "epoch",
        lambda self, epoch, *rest: trained_epochs.append(epoch) or train_epoch(self, epoch, *rest),
    )
    again = one_trial(search("killed"), trained)
    assert trained_epochs == [4] and again.params == whole.params and again.user_attrs[census.RETRY_OF] == 1
    assert again.value == whole.value and again.user_attrs["history"] == whole.user_attrs["history"]
    assert again.intermediate_values == whole.intermediate_values
    assert not list((trained.root / "scratch").iterdir())


def test_a_training_that_diverges_fails_for_that_reason(trained):
    space = "tune.finetune.space={learning_rate: {log: [1e17, 1e18]}}"
    settings = trained.config(space, "regimes.Full-AT.learning_rate=1e18", "regimes.Full-AT.optimizer=sgd")
    trial = one_trial(TrainingSearch.of(settings, trained.root, "finetune", "CL", "Full-AT", seed=0), trained)
    assert trial.state.name == "FAIL" and "the loss is not finite in epoch 1" in trial.user_attrs[census.REASON]


def test_trials_are_measured_by_the_same_attack_whatever_they_train_with(trained):
    base = trained.config("tune.finetune.space={epsilon: {float: [0.01, 0.3]}}")
    bench = training.Bench(TrainingSearch.of(base, trained.root, "finetune", "CL", "Full-AT", seed=0))
    assert bench.attack.adversary.threat_model.epsilon == 0.15 and bench.attack.adversary.steps == base.evaluate.steps


def test_a_pretraining_is_measured_under_a_linear_head_and_leaves_the_encoder_alone(trained):
    search = TrainingSearch.of(
        trained.config("tune.pretrain.space={temperature: {log: [0.1, 1]}}"), trained.root, "pretrain", "CL", "at", seed=0
    )
    bench = training.Bench(search)
    plan = bench.plan(search.config, seed=0)
    before = {key: value.clone() for key, value in plan.network.state_dict().items()}
    assert bench.measure(plan.network).keys() == {"robust", "clean"}
    assert all(torch.equal(before[key], value) for key, value in plan.network.state_dict().items())
    assert one_trial(search, trained).state.name == "COMPLETE"


def test_winner_and_default_are_compared_on_further_seeds(trained):
    settings = trained.config(SPACE, "tune.finetune.confirm=2", "regimes.Full-AT.epochs=1")
    search = TrainingSearch.of(settings, trained.root, "finetune", "CL", "Full-AT", seed=0)
    told = search.confirm({"learning_rate": 1e-3, "epochs": 1})["confirmed"]
    assert told["further_seeds"] == 2
    assert all(len(told[who]["robust"]["values"]) == 2 and "sd" in told[who]["clean"] for who in ("default", "winner"))
    shutil.rmtree(trained.root / ".scratch", ignore_errors=True)


def test_hyperband_looks_at_powers_of_three():
    from advml.tuning.sampling import Hyperband

    assert [Hyperband.rungs(epochs) for epochs in (1, 3, 4, 10, 40)] == [(1,), (1,), (1, 3), (1, 3, 9), (1, 3, 9, 27)]
