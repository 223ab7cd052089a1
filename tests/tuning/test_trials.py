"""What trials do: attacks within their budget, and trainings that go on where a kill has stopped them."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch

from advml.attacks import autoattack
from advml.attacks.pgd import Adversary
from advml.attacks.threat_model import ThreatModel
from advml.cli import tune as tune_command
from advml.cli.live_table import reached
from advml.core.device import Machine
from advml.data.datasets import Split
from advml.evaluation import attack_suite
from advml.evaluation import run_attacks as running
from advml.models.network import load
from advml.pipeline.stages import finetune, pretrain
from advml.recipes import REGIMES, Regime
from advml.training.checkpoint import Checkpoint
from advml.tuning import attack_trial, training_trial
from advml.tuning import study as studies
from advml.tuning.attack_search import AttackSearch, passes, steps_within
from advml.tuning.search import Attempt, hyperband, rungs
from advml.tuning.storage import address
from advml.tuning.training_search import TrainingSearch

CPU = Machine(torch.device("cpu"))
FEW = "tune.attack.space.restarts={choice: [1, 2]}"
SPACE = "tune.finetune.space={learning_rate: {log: [1e-4, 1e-2]}, epochs: {int: [2, 4]}}"


@pytest.fixture(scope="module")
def stages(new_study, tmp_path_factory):
    """A study with CL-at pretrained and CL-AT trained, which no test changes."""
    study = new_study(tmp_path_factory.mktemp("trials") / "study")
    pretrain.run(study.context(), scheme="CL", phase="at", seed=0)
    finetune.run(study.context(), scheme="CL", regime="AT", seed=0)
    return study


@pytest.fixture
def trained(stages, tmp_path):
    """A study of one's own with CL-at pretrained and CL-AT trained."""
    return replace(stages, root=Path(shutil.copytree(stages.root, tmp_path / "study")))


def one_trial(search, study):
    """Take the next trial and run it, as driver and worker do; the trial afterwards."""
    opened = studies.create(search, address(None, root=study.root))
    studies.requeue_dead(opened)
    trial = studies.next_trial(opened, search)
    scratch = study.root / "scratch" / f"trial-{trial.user_attrs[studies.ORIGIN]}"
    attempt = Attempt(dict(trial.params), scratch, lambda report: studies.note(trial, *report))
    studies.finish(opened, trial, attempt.run(search.open().objective))
    shutil.rmtree(scratch, ignore_errors=True)
    return opened.get_trials()[trial.number]


# Attacks


class Counter(torch.nn.Module):
    """A linear classifier with hooks that count how often images pass forwards, and gradients come back; in its copies, too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.passes = torch.nn.Linear(64, 4), {"forward": 0, "backward": 0}
        self.register_forward_hook(self._count)

    def __deepcopy__(self, memo):
        return self

    def _count(self, module, inputs, output) -> None:
        self.passes["forward"] += 1
        if output.requires_grad:
            output.register_hook(self._count_back)

    def _count_back(self, gradient) -> None:
        self.passes["backward"] += 1

    def forward(self, images):
        return self.linear(images.flatten(1))


def attack(*, restarts: int, keep: str, steps: int) -> attack_suite.AttackSpec:
    """One that changes next to nothing."""
    adversary = Adversary(ThreatModel("linf", 1e-9), steps, 1e-9, random_start=False, keep=keep)
    made = attack_suite.pgd_attack(attack_trial.STUDIED, adversary, attack_suite.classification("margin"), loss="margin")
    return replace(made, restarts=restarts)


@pytest.mark.parametrize(
    ("restarts", "keep", "steps", "forward"),
    [(1, "best", 12, 14), (2, "best", 5, 14), (4, "best", 2, 16), (1, "last", 12, 13), (5, "last", 2, 15)],
)
def test_all_passes_of_all_restarts_stay_within_those_of_the_default(trained, dataset, restarts, keep, steps, forward):
    assert steps_within(12 + 12 + 2, restarts=restarts, keep=keep) == steps
    network, chosen = Counter(), attack(restarts=restarts, keep=keep, steps=steps)
    with torch.no_grad():  # under the network's own labels nothing breaks, so nothing leaves the batch early
        split = Split(dataset.validation.images, network(CPU.images(dataset.validation.images)).argmax(1))
    network.passes = {"forward": -1, "backward": 0}  # the clean images, which every attack begins with, are not counted
    bench = attack_trial.Bench(
        AttackSearch.of(trained.config("tune.attack.batch_size=32", "tune.attack.budget=20"), trained.root, "CL-AT-s0")
    )
    bench.network, bench.scorer = network, running.Scorer.of(network, CPU)
    assert torch.cat(list(bench.under(chosen, split))).all()
    assert network.passes == passes(steps=steps, restarts=restarts, keep=keep) == {"forward": forward, "backward": restarts * steps}
    assert sum(network.passes.values()) <= 12 + 12 + 2


def test_a_trials_attack_is_threat_model_ii_as_its_values_say_and_its_random_numbers_are_those_of_the_default(trained):
    search = AttackSearch.of(trained.config("tune.attack.budget=8"), trained.root, "CL-AT-s0")
    values = {"schedule": "linear", "momentum": 0.75, "objective": "margin", "restarts": 2, "random_start": False, "step_size": 0.5}
    subject = attack_trial.Bench(search)
    made, default = subject.attack(values), subject.default()
    wanted = {"objective": "margin", "steps": 3, "keep": "best", "schedule": "linear", "momentum": 0.75, "random_start": False}
    assert made.settings.items() >= wanted.items() and made.restarts == 2
    assert made.settings["step_size"] == pytest.approx(0.5 * made.threat_model.epsilon)
    assert made.name == default.name == "accuracy/threat_model_2" and made.threat_model == default.threat_model


def test_a_searched_attack_is_scored_on_validation_and_confirmed_on_both_splits(trained):
    settings = ("tune.attack.batch_size=8", "tune.attack.budget=4", FEW)
    search = AttackSearch.of(trained.config(*settings), trained.root, "CL-AT-s0")
    first, second = one_trial(search, trained), one_trial(search, trained)
    assert first.params["restarts"] == 1 and len(first.intermediate_values) == 4
    assert first.value == pytest.approx(sum(first.intermediate_values.values()) / 4)
    told = search.open().confirm(second.params)
    assert told["validation"]["default"]["accuracy"] == pytest.approx(first.value)
    assert {split: told[split]["winner"]["n"] for split in ("validation", "test")} == {"validation": 32, "test": 40}


def test_the_default_attack_breaks_the_very_test_images_that_it_breaks_in_the_study(trained):
    """Steps that lead nowhere from random starts: what breaks depends on these alone."""
    settings = (
        "evaluate.step_size=1e-6",
        "evaluate.restarts=2",
        "evaluate.seed=4",
        "threat_model.epsilon=0.5",
        "tune.attack.batch_size=8",
        FEW,
    )
    search = AttackSearch.of(trained.config(*settings), trained.root, "CL-AT-s0")
    subject = attack_trial.Bench(search)
    test, configuration = subject.context.dataset.test, search.config
    spec, scorer = configuration.evaluate, running.Scorer.of(subject.network, subject.context.machine)
    attacks = [attack_suite.CLEAN_IMAGES, attack_suite.threat_model_2(spec, configuration.threat_model)]
    run = {"batch_size": spec.batch_size, "seed": spec.seed}
    study = running.run_attacks(subject.network, scorer, test, attacks, **run)["accuracy/threat_model_2"].right
    assert torch.equal(torch.cat(list(subject.under(subject.default(), test))), study) and 0 < study.sum() < len(study)
    told = search.open().confirm({"step_size": 1.0})
    assert told["test"]["default"]["accuracy"] == float(study.double().mean()) and told["default_is"] == "the attack of evaluate"


def test_a_default_of_another_budget_is_told(trained):
    search = AttackSearch.of(trained.config("tune.attack.budget=5", FEW), trained.root, "CL-AT-s0")
    assert "5 steps of tune.attack.budget" in search.open().confirm({"step_size": 1.0})["default_is"]


def test_autoattack_is_measured_on_test_by_all_of_its_attacks(trained, monkeypatch):
    """Here nothing breaks, so that each of them is asked about every image that is right; where nothing is right, none is."""
    search = AttackSearch.of(trained.config("tune.attack.budget=20"), trained.root, "CL-AT-s0")
    assert search.once == ("autoattack",)  # by default
    asked = {}

    def nothing(name, network, images, labels, *, threat_model, classes, strength, seed):
        asked[name] = asked.get(name, 0) + len(images)
        assert (threat_model.epsilon, classes, strength) == (0.15, 4, autoattack.Strength())
        return images

    monkeypatch.setattr(autoattack, "attack", nothing)
    found = search.open().autoattack()["test"]
    assert list(asked) == [name for name in autoattack.ATTACKS if autoattack.applicable(name, 4)] and len(asked) > 2
    assert found["n"] == 40 and set(asked.values()) == {round(40 * found["accuracy"])} != {0}
    asked.clear()
    monkeypatch.setattr(running, "predict", lambda network, images, machine: torch.full((len(images),), -1))
    assert search.open().autoattack()["test"]["accuracy"] == 0 and not asked


# Trainings


def test_a_trial_of_the_defaults_is_the_training_of_the_stage(trained):
    search = TrainingSearch.of(trained.config(SPACE), trained.root, "finetune", "CL", "Full-AT", seed=0)
    trial = one_trial(search, trained)
    record = finetune.run(trained.context(), scheme="CL", regime="Full-AT", seed=0)
    _, network = trained.context().load_network(trained.workspace.model("CL-Full-AT-s0"))
    measured = training_trial.Bench(search).validate(network)
    assert studies.history_of(trial)[-1]["epoch"] == 2 and record["epoch"] in (1, 2)
    assert (trial.value, trial.user_attrs["measured"]["clean"]) == (measured["robust"], measured["clean"])
    assert trial.constraints == {"clean_floor": 0.97 - measured["clean"]}


def test_trainings_are_measured_as_the_evaluation_measures_clean_images_and_threat_model_ii(trained):
    settings = trained.config(SPACE, "threat_model.epsilon=0.9")
    bench = training_trial.Bench(TrainingSearch.of(settings, trained.root, "finetune", "CL", "Full-AT", seed=0))
    _, network = trained.context().load_network(trained.workspace.model("CL-AT-s0"))
    split, clean, strong = (
        bench.dataset.test,
        attack_suite.CLEAN_IMAGES,
        attack_suite.threat_model_2(settings.evaluate, settings.threat_model),
    )
    outcomes = running.run_attacks(
        network, running.Scorer.of(network, CPU), split, [clean, strong], batch_size=7, seed=settings.evaluate.seed
    )
    (measured,) = bench.measure(network, split)
    assert measured == {
        "robust": float(outcomes[strong.name].right.double().mean()),
        "clean": float(outcomes[clean.name].right.double().mean()),
    }
    assert measured["robust"] < measured["clean"]


def test_the_plan_of_a_trial_follows_the_row_of_its_regime(trained, monkeypatch):
    """A regime that no list of names holds: attacked, on a standard encoder."""
    monkeypatch.setitem(REGIMES, "new", Regime("new", pretraining="st", attacked=True, encoder_learns=True))
    pretrain.run(trained.context(), scheme="CL", phase="st", seed=0)
    settings = trained.config()
    settings = settings.model_copy(update={"regimes": settings.regimes | {"new": settings.regimes["Full-AT"]}})
    bench = training_trial.Bench(TrainingSearch("finetune", "CL", "new", 0, config=settings, root=trained.root, name="new"))
    planned = bench.plan(settings, seed=0)
    standard = load(trained.workspace.pretrained("CL-st-s0")).encoder.state_dict()
    assert all(torch.equal(planned.network.encoder.state_dict()[name], value) for name, value in standard.items())
    assert planned.adversary is not None and planned.adversary.training.threat_model.epsilon == settings.threat_model.epsilon


@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_at_a_rung_the_pruner_is_told_of_the_floor_and_people_of_what_was_measured(trained, monkeypatch, floor):
    monkeypatch.setattr(training_trial.Bench, "validate", lambda *_: {"robust": 0.6, "clean": 0.9})
    settings = trained.config(SPACE, f"tune.finetune.clean_floor={floor}")
    trial = one_trial(TrainingSearch.of(settings, trained.root, "finetune", "CL", "Full-AT", seed=0), trained)
    assert trial.intermediate_values == {1: pytest.approx({0.0: 0.6, 1.0: -1.1}[floor])}
    assert studies.history_of(trial)[0]["validation/robust"] == 0.6
    assert reached(trial) == ", at 1: robust=0.6 clean=0.9"


def test_what_misses_the_floor_prunes_nothing_that_keeps_it():
    """Best first: feasible by robustness, then the others by what they lack."""
    ranked = [(0.9, 0.97), (0.0, 0.97), (0.99, 0.96), (0.5, 0.96), (1.0, 0.2), (1.0, 0.0)]
    values = [training_trial.standing({"robust": robust, "clean": clean}, floor=0.97) for robust, clean in ranked]
    assert values == sorted(values, reverse=True) and values[1] > values[2] == values[3] > values[4] > values[5]


def test_no_trial_that_keeps_the_floor_is_pruned_by_more_robust_ones_below_it():
    """By Hyperband itself: nine of ten collapse to something robust."""
    study = optuna.create_study(study_name="floor", direction="maximize", pruner=hyperband(9))
    outcomes = {True: [], False: []}
    for number in range(60):
        trial, keeps = study.ask(), number % 10 == 9
        outcome = {"robust": 0.3, "clean": 0.98} if keeps else {"robust": 0.9, "clean": 0.9 - number / 100}
        value = training_trial.standing(outcome, floor=0.97)
        pruned = False
        for rung in rungs(9):
            trial.report(value, rung)
            pruned = pruned or trial.should_prune()
        outcomes[keeps].append(pruned)
        study.tell(trial, value)
    assert not any(outcomes[True]) and any(outcomes[False])


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
    save = Checkpoint.save
    monkeypatch.setattr(Checkpoint, "save", lambda self, progress: trained_epochs.append(progress.epoch) or save(self, progress))
    again = one_trial(search("killed"), trained)
    assert trained_epochs == [4] and again.params == whole.params and again.user_attrs[studies.RETRY_OF] == 1
    assert again.value == whole.value and studies.history_of(again) == studies.history_of(whole)
    assert again.intermediate_values == whole.intermediate_values
    assert not list((trained.root / "scratch").iterdir())


def test_a_training_that_diverges_fails_for_that_reason(trained):
    space = "tune.finetune.space={learning_rate: {log: [1e17, 1e18]}}"
    settings = trained.config(space, "regimes.Full-AT.learning_rate=1e18", "regimes.Full-AT.optimizer=sgd")
    trial = one_trial(TrainingSearch.of(settings, trained.root, "finetune", "CL", "Full-AT", seed=0), trained)
    assert trial.state.name == "FAIL" and "loss is not finite in epoch 1" in trial.user_attrs[studies.REASON]


def test_trials_are_measured_by_the_same_attack_whatever_they_train_with(trained):
    base = trained.config("tune.finetune.space={epsilon: {float: [0.01, 0.3]}}")
    bench = training_trial.Bench(TrainingSearch.of(base, trained.root, "finetune", "CL", "Full-AT", seed=0))
    assert bench.attack.threat_model.epsilon == 0.15 and bench.attack.settings["steps"] == base.evaluate.steps


@pytest.mark.parametrize(("phase", "share"), [("st", 0.5), ("at", 1.0)])
def test_a_standard_pretraining_is_measured_at_half_of_the_radius(trained, phase, share):
    settings = trained.config("tune.pretrain.space={temperature: {log: [0.1, 1]}}")
    bench = training_trial.Bench(TrainingSearch.of(settings, trained.root, "pretrain", "CL", phase, seed=0))
    assert bench.attack.threat_model.epsilon == pytest.approx(share * settings.attacked_epsilon)
    assert bench.attack.name == attack_trial.STUDIED  # of which the random numbers follow


def test_a_pretraining_is_measured_under_a_linear_head_and_leaves_the_encoder_alone(trained):
    search = TrainingSearch.of(
        trained.config("tune.pretrain.space={temperature: {log: [0.1, 1]}}"), trained.root, "pretrain", "CL", "at", seed=0
    )
    bench = training_trial.Bench(search)
    plan = bench.plan(search.config, seed=0)
    before = {key: value.clone() for key, value in plan.network.state_dict().items()}
    assert bench.validate(plan.network).keys() == {"robust", "clean"}
    assert all(torch.equal(before[key], value) for key, value in plan.network.state_dict().items())
    assert one_trial(search, trained).state.name == "COMPLETE"


def test_winner_and_default_are_compared_on_further_seeds(trained, monkeypatch):
    """Default and winner in their places, on seeds that the search has not seen, and test measured once for each network."""
    settings = trained.config(SPACE, "tune.finetune.confirm=2", "tune.finetune.clean_floor=0.5", "regimes.Full-AT.epochs=1")
    search = TrainingSearch.of(settings, trained.root, "finetune", "CL", "Full-AT", seed=0)
    trainings, measured = [], []

    def train(bench, configuration, attempt, *, seed, watched):
        assert not watched  # nobody is told of the rungs
        trainings.append((configuration.regimes["Full-AT"].learning_rate, seed))
        return attempt.values

    def measure(bench, network, *splits):
        measured.append([len(split.labels) for split in splits])
        share = 0.75 if network else 0.25
        return [{"robust": share + len(measured) / 100, "clean": 0.4 if len(measured) == 4 else 0.9} for _ in splits]

    monkeypatch.setattr(training_trial.Bench, "train", train)
    monkeypatch.setattr(training_trial.Bench, "measure", measure)
    told = search.open().confirm({"learning_rate": 1e-3, "epochs": 1})["confirmed"]
    assert [rate for rate, _ in trainings] == [2e-3, 1e-3, 2e-3, 1e-3]  # default, winner
    seeds = [seed for _, seed in trainings]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3] and search.seed not in seeds
    assert measured == [[32, 40]] * 4
    for split in ("validation", "test"):
        assert told[split]["default"]["robust"]["values"] == pytest.approx([0.26, 0.28])
        assert told[split]["winner"]["robust"]["values"] == pytest.approx([0.77, 0.79])
    assert told["clean_floor"] == {"floor": 0.5, "kept": [True, False], "kept_on_every_seed": False}
    assert told["further_seeds"] == 2 and "chosen on these validation images" in told["note"]


def test_a_confirmation_trains_and_measures(trained):
    settings = trained.config(SPACE, "tune.finetune.confirm=1", "regimes.Full-AT.epochs=1")
    search = TrainingSearch.of(settings, trained.root, "finetune", "CL", "Full-AT", seed=0)
    told = search.open().confirm({"learning_rate": 1e-3, "epochs": 1})["confirmed"]
    assert told["test"]["beats_default"] is None and 0 <= told["test"]["winner"]["clean"]["mean"] <= 1


def scores(differences: list[float]) -> dict:
    default = [{"robust": 0.5, "clean": 1.0} for _ in differences]
    return {"default": default, "winner": [{"robust": 0.5 + one, "clean": 1.0} for one in differences]}


def test_a_difference_has_the_interval_of_student():
    """By hand: 0.01, 0.02, 0.03 have mean 0.02 and sd 0.01; t for 2 degrees of freedom is 4.302653, / sqrt(3)."""
    found = training_trial.over_seeds([0.01, 0.02, 0.03])
    half = 4.302653 * 0.01 / 3**0.5
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.02, 0.02 - half, 0.02 + half), rel=1e-5)


@pytest.mark.parametrize(
    ("differences", "verdict", "said"),
    [
        ([0.1, 0.11, 0.12], True, "beats the default by more than seed noise: yes; robust +0.11 ("),
        ([0.1, -0.05, 0.12], False, "beats the default by more than seed noise: no; robust +0.05667 ("),
        ([-0.1, -0.11, -0.12], False, "beats the default by more than seed noise: no; robust -0.11 ("),
        ([0.1], None, "beats the default by more than seed noise: not known from one seed; robust +0.1"),
    ],
)
def test_the_verdict_says_whether_the_difference_is_more_than_seed_noise(differences, verdict, said):
    told = training_trial.compare({"validation": scores(differences), "test": scores(differences)}, floor=1.0)
    assert told["test"]["beats_default"] is verdict and told["validation"]["beats_default"] is verdict
    printed = tune_command.confirmation_lines(told)
    assert [line for line in printed if said in line] == [printed[2], printed[5]] and "below the clean floor" not in str(printed)
    below = tune_command.confirmation_lines(
        training_trial.compare({"validation": scores(differences), "test": scores(differences)}, floor=1.1)
    )
    assert below[-1] == f"  warning: the winner is below the clean floor 1.1 on {len(differences)} of {len(differences)} further seeds"


def test_hyperband_looks_at_powers_of_three():
    assert [rungs(epochs) for epochs in (1, 3, 4, 10, 40)] == [(1,), (1,), (1, 3), (1, 3, 9), (1, 3, 9, 27)]
