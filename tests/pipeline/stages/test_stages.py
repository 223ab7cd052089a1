"""Stages: the files they write, what they take from whom, and that what is up to date is not done again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import load_file
from torch import Tensor

from advml import config as configuration
from advml.core.errors import UserError
from advml.core.exclusive import exclusive
from advml.core.provenance import source_digest
from advml.data import datasets
from advml.data.prepared import digest
from advml.evaluation.metrics import wilson
from advml.evaluation.run_attacks import _Batch
from advml.pipeline import training_stage
from advml.pipeline.stages import evaluate, finetune, prepare, pretrain, report, represent, train
from advml.tracking import results
from advml.training.checkpoint import Checkpoint

REPOSITORY = Path(__file__).parents[3]
REGIMES = {"ST": "st", "AT": "at", "Partial-AT": "at", "Full-AT": "at"}
PLAIN = ("diagnostics.images=0", "worst_case.attacks=[]", "corruptions.names=none")  # an evaluation that need not show all it can
COLUMNS = ("clean", "threat_model_1", "threat_model_2", "threat_model_1_half", "threat_model_2_half", "worst_case")


@pytest.fixture(scope="module")
def pretrained_study(new_study, tmp_path_factory):
    """SL and CL, standard and adversarial, pretrained."""
    study = new_study(tmp_path_factory.mktemp("stages") / "pretrained")
    for scheme in ("SL", "CL"):
        for phase in ("st", "at"):
            pretrain.run(study.context(), scheme=scheme, phase=phase, seed=0)
    return study


@pytest.fixture
def study(pretrained_study, tmp_path):
    """A copy of it, for one test."""
    return pretrained_study.copy(tmp_path / "copy")


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: dict[str, Tensor], second: dict[str, Tensor], part: str) -> bool:
    ours, theirs = ({key: value for key, value in one.items() if key.startswith(f"{part}.")} for one in (first, second))
    assert ours and ours.keys() == theirs.keys()
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# prepare


def photo_study(make_study, folder: Path):
    """A study of two classes with ten pictures each, in `folder`/photos."""
    for name in ("cats", "dogs"):
        for number in range(10):
            path = folder / "photos" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (9, 9), color=20 * number + (name == "dogs")).save(path)
    return make_study("folder", "data.name=folder", f"data.path={folder / 'photos'}", "data.image_size=8", "data.channels=1")


def test_a_second_training_of_the_same_model_at_once_is_refused(study):
    context = study.context("pretrain.SL.epochs=2")
    first = exclusive(context.workspace.scratch("pretrain-SL-st-s0"), work="it runs")
    with first, pytest.raises(UserError, match=rf"pretrain SL-st-s0 .*process {os.getpid()}"):
        pretrain.run(context, scheme="SL", phase="st", seed=0)


def test_prepare_writes_the_dataset_that_params_yaml_names(make_study, tmp_path):
    study = photo_study(make_study, tmp_path)
    made = prepare.run(study.context())
    assert made.classes == ("cats", "dogs") and made.shape == (1, 8, 8)
    assert datasets.load(study.workspace.prepared).digest == made.digest
    assert files(study.workspace.prepared) == {"dataset.json", "train.safetensors", "validation.safetensors", "test.safetensors"}


def test_prepare_says_and_records_what_a_user_may_not_expect_of_the_images(make_study, tmp_path, capsys):
    study = photo_study(make_study, tmp_path)
    (tmp_path / "photos" / "dogs").rename(tmp_path / "photos" / "Cats")
    for number in range(3):
        Image.new("I;16", (9, 9), color=1000 + 11 * number).save(tmp_path / "photos" / "cats" / f"deep{number}.png")
    made = prepare.run(study.context())
    told = capsys.readouterr().err.splitlines()
    assert [line.removeprefix("note: ") for line in told] == datasets.remarks(made) and len(told) == 2
    assert "'Cats' and 'cats'" in told[0] and "1022" in told[1]
    recorded = json.loads((study.workspace.prepared / "dataset.json").read_text())
    assert recorded["remarks"] == list(made.remarks) == list(datasets.load(study.workspace.prepared).remarks)
    assert study.context().provenance["white_level"] == 1023


@pytest.mark.parametrize("place", ["", "data", "data/prepared", "reports", "models/finetune", ".scratch/x"])
def test_images_do_not_lie_where_the_study_writes_nor_around_it(make_study, tmp_path, place):
    study = photo_study(make_study, tmp_path)
    (study.root / place).mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match=r"data\.path = .* which the study writes"):
        prepare.run(study.context(f"data.path={study.root / place}"))


def test_images_may_lie_beside_what_the_study_writes(make_study, tmp_path):
    study = photo_study(make_study, tmp_path)
    (tmp_path / "photos").rename(study.root / "data" / "photos")
    assert prepare.run(study.context(f"data.path={study.root / 'data' / 'photos'}")).classes == ("cats", "dogs")


@pytest.mark.parametrize(
    "path", ['"a\\0b"', "~no_such_user_/x", "''", "no/such/folder", "x" * 900], ids=["NUL", "user", "empty", "none", "long"]
)
def test_a_path_that_is_no_folder_is_one_line(make_study, tmp_path, path):
    study = photo_study(make_study, tmp_path)
    with pytest.raises(UserError) as error:
        prepare.run(study.context(f"data.path={path}"))
    assert str(error.value).isprintable() and ("data.path" in str(error.value) or path in str(error.value))


# pretrain


@pytest.mark.parametrize(("scheme", "head", "absent"), [("SL", "classifier", "projection_head"), ("CL", "projection_head", "classifier")])
@pytest.mark.parametrize("phase", ["st", "at"])
def test_pretraining_writes_an_encoder_with_its_own_head_and_its_record(pretrained_study, dataset, scheme, head, absent, phase):
    name = f"{scheme}-{phase}-s0"
    folder = pretrained_study.workspace.pretrained(name)
    assert files(folder) == {"model.json", "model.safetensors"}
    parts = {key.split(".")[0] for key in weights(folder)}
    assert {"encoder", "normalize", head} == parts and absent not in parts
    record = json.loads((folder / "model.json").read_text())
    assert record["digest"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (record["name"], record["kind"], record["scheme"], record["phase"], record["seed"]) == (name, "pretrain", scheme, phase, 0)
    assert record["classes"] == list(dataset.classes) and record["input"] == [1, 8, 8] and "git_commit" in record
    assert record["data"] == {"digest": dataset.digest, "source": "patterns", "counts": {"train": 96, "validation": 32, "test": 40}}
    assert record["architecture"]["backbone"] == "test_resnet" and record["epoch"] in (1, 2)
    attacks = {"threat_model", "attack"} if phase == "at" else set()
    assert set(record["parameters"]) == {"data", "model", "runtime", "temperature", "views", "pretrain"} | attacks
    assert list(record["parameters"]["pretrain"]) == [scheme]
    history = json.loads((pretrained_study.workspace.report(name) / "history.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2] and ("train/adversarial_loss" in history[0]) == (phase == "at")


def test_standard_and_adversarial_pretraining_start_from_the_same_weights(make_study, monkeypatch):
    """So that the attack is all that tells them apart. Another seed starts elsewhere."""
    monkeypatch.setattr(pretrain, "learn", lambda context, job, reuse: job)
    context = make_study().context()
    jobs = [pretrain.run(context, scheme="CL", phase=phase, seed=seed) for phase, seed in (("st", 0), ("at", 0), ("st", 1))]
    first, second, other = (job.plan.network.state_dict() for job in jobs)
    assert same(first, second, "encoder") and same(first, second, "projection_head") and not same(first, other, "encoder")


# finetune: who takes what from whom


@pytest.mark.parametrize("regime", ["ST", "AT"])
def test_sl_takes_its_pretrained_network_as_it_is_under_st_and_at(study, regime):
    record = finetune.run(study.context(), scheme="SL", regime=regime, seed=0)
    source = study.workspace.pretrained(f"SL-{REGIMES[regime]}-s0")
    made = study.workspace.model(f"SL-{regime}-s0")
    assert (made / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert json.loads((study.workspace.report(f"SL-{regime}-s0") / "history.json").read_text()) == []
    assert record["epoch"] is None and "regimes" not in record["parameters"]


def test_sl_full_at_goes_on_with_its_head_and_partial_at_fits_a_fresh_one(study):
    """A learning rate that moves nothing shows where they start."""
    source = weights(study.workspace.pretrained("SL-at-s0"))
    context = study.context(
        *(f"regimes.{regime}.{key}" for regime in ("Full-AT", "Partial-AT") for key in ("learning_rate=1e-30", "epochs=1"))
    )
    finetune.run(context, scheme="SL", regime="Full-AT", seed=0)
    finetune.run(context, scheme="SL", regime="Partial-AT", seed=0)
    full, partial = (weights(study.workspace.model(f"SL-{regime}-s0")) for regime in ("Full-AT", "Partial-AT"))
    assert same(full, source, "classifier")
    assert same(partial, source, "encoder") and not torch.isclose(partial["classifier.weight"], source["classifier.weight"]).any()


@pytest.mark.parametrize("regime", REGIMES)
def test_cl_keeps_its_projection_head_and_changes_its_encoder_only_under_full_at(study, regime):
    record = finetune.run(study.context(), scheme="CL", regime=regime, seed=0)
    source = weights(study.workspace.pretrained(f"CL-{REGIMES[regime]}-s0"))
    made = weights(study.workspace.model(f"CL-{regime}-s0"))
    assert same(made, source, "projection_head") and made["classifier.weight"].shape == (4, 96)
    assert same(made, source, "encoder") == (regime != "Full-AT")
    pretraining = json.loads((study.workspace.pretrained(f"CL-{REGIMES[regime]}-s0") / "model.json").read_text())
    assert record["pretraining"] == {key: pretraining[key] for key in ("name", "digest", "gradient_steps")}
    assert ("threat_model" in record["parameters"]) == ("attack" in record["parameters"]) == (regime != "ST")


def test_fine_tuning_records_all_that_made_the_model(study):
    """So that runs of AT compare by the epsilon and the temperature of their pretraining."""
    record = finetune.run(study.context(), scheme="CL", regime="AT", seed=0)
    pretraining = json.loads((study.workspace.pretrained("CL-at-s0") / "model.json").read_text())
    assert record["parameters"] == pretraining["parameters"] | {"regimes": {"AT": record["parameters"]["regimes"]["AT"]}}
    assert record["parameters"]["runtime"] == study.config().runtime.model_dump() and record["versions"]["torch"] == torch.__version__
    assert source_digest()[:12] in record["versions"]["advml"]
    assert record["parameters"]["threat_model"]["epsilon"] == 0.15 and record["parameters"]["regimes"]["AT"]["epochs"] == 2


def test_fine_tuning_refuses_a_model_section_that_pretraining_did_not_have(study):
    line = r"^model\.backbone = 'other', but CL-at-s0 was pretrained with 'test_resnet'; .*advml pretrain CL at --seed 0$"
    with pytest.raises(UserError, match=line):
        finetune.run(study.context("model.backbone=other"), scheme="CL", regime="AT", seed=0)


def test_dual_batch_norm_is_only_for_attacked_networks(make_study, monkeypatch):
    monkeypatch.setattr(pretrain, "learn", lambda context, job, reuse: job)
    context = make_study("dual", "model.batch_norm=dual").context()
    jobs = {phase: pretrain.run(context, scheme="SL", phase=phase, seed=0) for phase in ("st", "at")}
    assert {phase: job.plan.network.architecture.dual_batch_norm for phase, job in jobs.items()} == {"st": False, "at": True}


# evaluate


@pytest.fixture(scope="module")
def finetuned_study(pretrained_study, tmp_path_factory):
    """The models CL-Full-AT-s0 and SL-ST-s0, fine-tuned."""
    study = pretrained_study.copy(tmp_path_factory.mktemp("stages") / "finetuned")
    finetune.run(study.context(), scheme="CL", regime="Full-AT", seed=0)
    finetune.run(study.context(), scheme="SL", regime="ST", seed=0)
    return study


@pytest.fixture
def finetuned(finetuned_study, tmp_path):
    return finetuned_study.copy(tmp_path / "copy")


def test_evaluate_writes_metrics_with_intervals_and_how_they_were_made(finetuned):
    metrics = evaluate.run(finetuned.context(), scheme="CL", regime="Full-AT", seed=0)
    names = [f"accuracy/{name}" for name in COLUMNS] + [f"corruption/{name}" for name in ("contrast", "fog", "mean")]
    assert set(metrics) == {f"{name}{end}" for name in names for end in ("", "/low", "/high")} | {"diagnostics/flags"}
    assert {name.partition("/")[0] for name in metrics} == set(results.EVALUATION)  # else some would never leave MLflow
    assert json.loads((finetuned.workspace.report("CL-Full-AT-s0") / "metrics.json").read_text()) == metrics
    record = json.loads(finetuned.workspace.record("evaluate", "CL-Full-AT-s0").read_text())
    assert record["digest"] == json.loads((finetuned.workspace.model("CL-Full-AT-s0") / "model.json").read_text())["digest"]
    for name, figure in record["figures"].items():
        assert metrics[name] == figure["correct"] / 40 and figure["n"] == 40
        assert (metrics[f"{name}/low"], metrics[f"{name}/high"]) == tuple(figure["interval"]) == wilson(figure["correct"], 40)
    half = record["figures"]["accuracy/threat_model_1_half"]
    assert half["epsilon"] == record["figures"]["accuracy/threat_model_1"]["epsilon"] / 2 == 0.075
    assert "changed since" in half["note"]  # Full-AT attacks through the head of pretraining


class Unread:
    """A split that may be counted, but not looked at."""

    def __init__(self, split: datasets.Split) -> None:
        self.count = len(split)

    def __len__(self) -> int:
        return self.count

    def __getattr__(self, name: str) -> None:
        raise AssertionError(f"this stage must not read the split's {name}")


def blind(context, *names: str):
    """The context with splits that raise when they are read."""
    splits = {name: Unread(getattr(context.dataset, name)) for name in names}
    context.__dict__["dataset"] = replace(context.dataset, **splits)
    return context


def test_the_test_split_is_read_by_evaluate_alone(study):
    pretrain.run(blind(study.context(), "test"), scheme="CL", phase="at", seed=1)
    for regime in ("AT", "Full-AT"):
        finetune.run(blind(study.context(), "test"), scheme="CL", regime=regime, seed=1)
    evaluate.run(blind(study.context(), "train", "validation"), scheme="CL", regime="AT", seed=1)
    with pytest.raises(AssertionError, match="this stage must not read the split's"):  # as any of the stages above would
        evaluate.run(blind(study.context(), "test"), scheme="CL", regime="AT", seed=1)


def test_evaluation_is_the_same_twice_and_depends_on_its_seed(finetuned):
    first = evaluate.run(finetuned.context(), scheme="CL", regime="Full-AT", seed=0)
    record = finetuned.workspace.record("evaluate", "CL-Full-AT-s0")
    told = record.read_bytes()
    shutil.rmtree(finetuned.root / ".scratch")
    assert evaluate.run(finetuned.context(), scheme="CL", regime="Full-AT", seed=0) == first and record.read_bytes() == told
    evaluate.run(finetuned.context("evaluate.seed=1"), scheme="CL", regime="Full-AT", seed=0)
    assert record.read_bytes() != told


def test_adversarial_images_are_stored_once_and_a_correction_repeats_the_attack_that_made_them_alone(finetuned, monkeypatch):
    def run(*overrides: str) -> dict[str, float]:
        return evaluate.run(finetuned.context(*overrides), scheme="CL", regime="Full-AT", seed=0)

    def stored() -> bytes:
        return finetuned.workspace.adversarial("CL-Full-AT-s0").read_bytes()

    run()
    images = stored()
    for path in (scratch := finetuned.workspace.scratch("evaluate-CL-Full-AT-s0")).rglob("*.safetensors"):
        assert "images" not in load_file(path)
    assert sum(path.stat().st_size for path in scratch.rglob("*")) < 4 * len(images)  # a few hundred bytes per attack, of 40 tiny images
    attacked, measure = [], _Batch.measure
    monkeypatch.setattr(_Batch, "measure", lambda batch, *before: attacked.append(batch.attack.name) or measure(batch, *before))
    corrected = run("corruptions.severities=[2]")
    assert set(attacked) == {"accuracy/threat_model_2"} and stored() == images
    shutil.rmtree(finetuned.root / ".scratch")
    assert run("corruptions.severities=[2]") == corrected


def test_a_model_of_other_data_is_neither_fine_tuned_nor_measured(finetuned):
    """Another split would have it measured on images it has learnt from."""
    prepared = datasets.load(finetuned.workspace.prepared)
    splits = {"train": prepared.test, "validation": prepared.validation, "test": prepared.train}
    mixed = replace(prepared, **splits, digest=digest(splits, prepared.classes))
    datasets.save(mixed, finetuned.workspace.prepared)
    told = rf"was trained on other data \({prepared.digest[:16]}\) than .*data/prepared \({mixed.digest[:16]}\); run: dvc repro, or: "
    for stage, command in ((finetune, "advml pretrain CL at --seed 0"), (evaluate, "advml train CL Full-AT --seed 0")):
        with pytest.raises(UserError, match=told + command):
            stage.run(finetuned.context(), scheme="CL", regime="Full-AT", seed=0)
    with pytest.raises(UserError, match=told):
        represent.run(finetuned.context(), scheme="CL", regime="Full-AT", seed=0)


# Parameters: what a stage reads, it declares


class Watched:
    """A configuration that notes which sections are read; of `pretrain` and `regimes`, which part of them."""

    def __init__(self, configuration: Any, seen: set[str]) -> None:
        self.__dict__.update(configuration=configuration, seen=seen)

    def __getattr__(self, name: str) -> Any:
        if name == "attacked_epsilon":  # no section, but a property that reads two
            return configuration.Config.attacked_epsilon.fget(self)
        return self._note(name, getattr(self.configuration, name))

    def _note(self, name: str, value: Any) -> Any:
        if isinstance(value, dict) and name in ("pretrain", "regimes"):
            return WatchedDict(value, lambda key: self.seen.add(f"{name}.{key}"))
        self.seen.add(name)
        return value

    def model_dump(self, **options: Any) -> dict[str, Any]:
        everything = WatchedDict(self.configuration.model_dump(**options), lambda key: None)
        everything.wrap = self._note
        return everything


class WatchedDict(dict):
    wrap = staticmethod(lambda key, value: value)

    def __init__(self, values: dict, note: Any) -> None:
        super().__init__(values)
        self.note = note

    def __getitem__(self, key: str) -> Any:
        self.note(key)
        return self.wrap(key, super().__getitem__(key))


def declared(stage: str, **item: str) -> set[str]:
    """The sections under a stage's `params` in dvc.yaml."""
    listed = YAML(typ="safe").load(REPOSITORY / "dvc.yaml")["stages"][stage]["params"]
    for key, value in item.items():
        listed = [name.replace(f"${{item.{key}}}", value) for name in listed]
    return {name if name.startswith(("pretrain.", "regimes.")) else name.partition(".")[0] for name in listed}


FREE = {"tracking", "data"}  # writes history only; comes with data/prepared, on which every stage depends


@pytest.mark.parametrize(
    ("stage", "item"),
    [
        ("pretrain_st", {"scheme": "CL"}),
        ("pretrain_at", {"scheme": "SL"}),
        ("finetune_st", {"scheme": "CL", "regime": "ST"}),
        ("finetune_at", {"scheme": "CL", "regime": "AT"}),
        ("finetune_at", {"scheme": "CL", "regime": "Full-AT"}),
        ("evaluate_st", {"scheme": "SL", "regime": "ST"}),
        ("evaluate_at", {"scheme": "CL", "regime": "Full-AT"}),
        ("report", {}),
    ],
)
def test_a_stage_reads_no_parameter_that_dvc_does_not_track(finetuned, stage, item, monkeypatch):
    """Else its result would survive a change of that parameter. Checks may read all of them: they refuse, and change no result."""
    monkeypatch.setattr("advml.pipeline.context.check_fit", lambda *_: None)
    monkeypatch.setattr("advml.pipeline.plans.check_regimes", lambda *_: None)
    name, _, phase = stage.partition("_")
    arguments = {"seed": 0, **item, **({"phase": phase} if name == "pretrain" else {})} if item else {}
    if name == "report":
        evaluate.run(finetuned.context(*PLAIN), scheme="SL", regime="ST", seed=0)
    seen: set[str] = set()
    context = replace(finetuned.context(), config=Watched(finetuned.config(), seen))
    {"pretrain": pretrain, "finetune": finetune, "evaluate": evaluate, "report": report}[name].run(context, **arguments)
    assert seen - FREE <= declared(stage, **item)
    if name == "report":
        return
    idle = declared(stage, **item) - seen - {"runtime", "threat_model", "attack", "views", "temperature"}
    assert not idle, f"dvc.yaml: {stage} is run again for {idle}, which it does not read"


# train: nothing twice


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Names of the phases that are trained and of the models that are measured from here on."""
    names: list[str] = []
    real_train, real_evaluate = training_stage._train, evaluate.evaluate

    def spy_train(context, job, *rest):
        names.append(job.name)
        return real_train(context, job, *rest)

    def spy_evaluate(context, subject, *rest):
        names.append(f"evaluate {subject.name}")
        return real_evaluate(context, subject, *rest)

    monkeypatch.setattr(training_stage, "_train", spy_train)
    monkeypatch.setattr(evaluate, "evaluate", spy_evaluate)
    return names


def test_train_does_what_is_missing_or_out_of_date_and_nothing_else(make_study, trained):
    study = make_study("study", *PLAIN)

    def run(regime: str, *overrides: str) -> list[str]:
        trained.clear()
        train.run(study.context(*overrides), scheme="CL", regime=regime, seed=0)
        return list(trained)

    everything = ["CL-at-s0", "CL-Full-AT-s0", "evaluate CL-Full-AT-s0"]
    assert run("Full-AT") == everything
    assert run("Full-AT") == []
    assert run("AT") == ["CL-AT-s0", "evaluate CL-AT-s0"]  # the adversarial pretraining is shared
    assert run("Full-AT", "evaluate.steps=1") == everything[2:]
    assert run("Full-AT", "evaluate.steps=1") == []
    assert run("Full-AT", "regimes.Full-AT.epochs=1", "evaluate.steps=1") == everything[1:]
    assert run("Full-AT", "pretrain.CL.epochs=1") == everything
    assert run("Full-AT", "pretrain.CL.epochs=1", "regimes.ST.epochs=1", "tracking.experiment=other") == []
    (study.workspace.pretrained("CL-at-s0") / "model.safetensors").write_bytes(b"damaged")
    assert run("Full-AT", "pretrain.CL.epochs=1") == everything[:1]
    metrics = study.workspace.report("CL-Full-AT-s0") / "metrics.json"
    told = metrics.read_bytes()
    metrics.write_text("{}")  # of an earlier evaluation: the process was killed after the record
    assert run("Full-AT", "pretrain.CL.epochs=1") == [] and metrics.read_bytes() == told
    for lost in (study.workspace.record("evaluate", "CL-Full-AT-s0"), study.workspace.samples("CL-Full-AT-s0")):
        lost.unlink()
        assert run("Full-AT", "pretrain.CL.epochs=1") == everything[2:]


def test_train_after_an_edit_does_what_the_edited_source_has_a_part_in(make_study, trained, sources):
    study = make_study("study", *PLAIN, "pretrain.CL.epochs=1", "regimes.ST.epochs=1")

    def run() -> list[str]:
        trained.clear()
        train.run(study.context(), scheme="CL", regime="ST", seed=0)
        return list(trained)

    everything = ["CL-st-s0", "CL-ST-s0", "evaluate CL-ST-s0"]
    assert run() == everything
    for file in ("figures/curves.py", "report/page.py", "config/schema.py"):
        sources.edit(file)
        assert run() == [], file
    sources.edit("evaluation/accuracy.py")
    assert run() == everything[2:]
    sources.edit("training/loop.py")
    assert run() == everything
    sources.edit("pipeline/stages/finetune.py")
    assert run() == everything[1:2]  # the same weights come out of it


def test_data_are_prepared_again_after_an_edit_of_their_sources_and_not_for_want_of_a_note(make_study, sources):
    context = make_study("prepared").context("data.max_train=100")
    prepare.run(context)
    sources.edit("training/loop.py")
    assert prepare.is_current(context)
    sources.edit("data/splits.py")
    assert not prepare.is_current(context)
    shutil.rmtree(context.workspace.scratch("prepare"))  # as after `dvc pull`
    assert prepare.is_current(context)


def test_train_prepares_data_that_are_missing_or_of_other_parameters(make_study, monkeypatch, dataset):
    study = make_study("prepared", *PLAIN, "pretrain.SL.epochs=1")
    prepared = []

    def spy(context):
        prepared.append(1)
        datasets.save(replace(dataset, parameters=context.config.data.model_dump(mode="json")), context.workspace.prepared)

    monkeypatch.setattr(prepare, "run", spy)
    train.run(study.context(), scheme="SL", regime="ST", seed=0)
    assert prepared == []
    train.run(study.context("data.max_train=96"), scheme="SL", regime="ST", seed=0)
    assert prepared == [1]
    shutil.rmtree(study.workspace.prepared)
    train.run(study.context(), scheme="SL", regime="ST", seed=0)
    assert prepared == [1, 1]


def test_train_names_the_models_of_the_data_that_it_replaces(finetuned, monkeypatch, capsys):
    study = finetuned
    prepared = datasets.load(study.workspace.prepared)
    splits = {"train": prepared.test, "validation": prepared.validation, "test": prepared.train}
    other = replace(prepared, **splits, digest=digest(splits, prepared.classes))
    monkeypatch.setattr(prepare, "run", lambda context: datasets.save(other, context.workspace.prepared))
    for stage in (pretrain, finetune, evaluate):
        monkeypatch.setattr(stage, "run", lambda *_, **__: {})
    train.run(study.context("data.max_train=96"), scheme="SL", regime="ST", seed=0)
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: "))
    assert "CL-Full-AT-s0" in warning and "advml prepare" in warning


def test_train_notices_that_the_images_have_changed(make_study, monkeypatch, tmp_path):
    """DVC hashes what `prepare` writes, not what it reads."""
    study = photo_study(make_study, tmp_path)
    prepare.run(study.context())
    written = (study.workspace.prepared / "dataset.json").read_bytes()
    assert prepare.is_current(study.context()) and not prepare.is_current(study.context("data.seed=1"))
    Image.new("L", (8, 8), color=255).save(tmp_path / "photos" / "cats" / "0.png")
    assert not prepare.is_current(study.context())
    prepare.run(study.context())
    assert prepare.is_current(study.context())
    shutil.rmtree(study.root / ".scratch")  # as `make clean` does: one more look at the images costs little
    assert not prepare.is_current(study.context())
    shutil.rmtree(tmp_path / "photos")  # pulled, on another machine
    assert prepare.is_current(study.context())
    assert written != (study.workspace.prepared / "dataset.json").read_bytes()


def test_the_prepared_data_are_the_same_bytes_whenever_the_images_were_written(make_study, tmp_path):
    """DVC hashes them: times of files would have every model of the study trained again."""
    study = photo_study(make_study, tmp_path)
    prepare.run(study.context())
    first = {path.name: path.read_bytes() for path in study.workspace.prepared.iterdir()}
    for path in (tmp_path / "photos").rglob("*.png"):
        os.utime(path, (0, 0))
    prepare.run(study.context())
    assert {path.name: path.read_bytes() for path in study.workspace.prepared.iterdir()} == first


# Scratch and history


def test_the_state_of_a_stage_is_kept_until_the_next_stage_has_taken_over(make_study):
    study = make_study("study", *PLAIN)

    def states() -> list[str]:
        return [path.name for path in (study.root / ".scratch").glob("*-s0")]

    pretrain.run(study.context(), scheme="CL", phase="st", seed=0)
    assert states() == ["pretrain-CL-st-s0"]
    finetune.run(study.context(), scheme="CL", regime="ST", seed=0)
    assert states() == ["finetune-CL-ST-s0"]
    evaluate.run(study.context(), scheme="CL", regime="ST", seed=0)
    assert states() == ["evaluate-CL-ST-s0"]


def test_a_later_stage_that_uses_earlier_outputs_leaves_an_unfinished_state_alone(finetuned, monkeypatch):
    killed = [Checkpoint(finetuned.workspace.scratch(stage), "new inputs") for stage in ("pretrain-CL-at-s0", "finetune-CL-Full-AT-s0")]
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: sys.exit())
    monkeypatch.setattr(finetune, "learn", lambda *_, **__: None)
    finetune.run(finetuned.context(), scheme="CL", regime="Full-AT", seed=0)
    with pytest.raises(SystemExit):
        evaluate.run(finetuned.context(), scheme="CL", regime="Full-AT", seed=0)
    assert [state.notes for state in killed] == [{"fingerprint": "new inputs"}] * 2


def test_every_phase_has_one_finished_run_linked_to_its_pretraining(make_study):
    study = make_study("study", *PLAIN)
    train.run(study.context(), scheme="CL", regime="ST", seed=0)
    assert study.runs() == [("CL-st-s0", "FINISHED"), ("CL-ST-s0", "FINISHED")]
    store = study.store()
    pretraining, model = store.client.search_runs([store.experiment], order_by=["attributes.start_time ASC"])
    assert model.data.tags["advml.pretraining_run"] == pretraining.info.run_id
    assert (
        model.data.metrics["accuracy/clean"]
        == json.loads((study.workspace.report("CL-ST-s0") / "metrics.json").read_text())["accuracy/clean"]
    )
    assert pretraining.data.params["training.pretrain.epochs"] == "2"
    shown = {"scheme": "CL", "regime": "ST", "seed": "0", "training.pretrain.epochs": "2"}
    assert shown.items() <= model.data.params.items()


# What is missing is named


def test_a_missing_pretraining_is_named(study):
    with pytest.raises(UserError, match=r"models/pretrain/CL-at-s7 contains no model"):
        finetune.run(study.context(), scheme="CL", regime="AT", seed=7)


def test_missing_prepared_data_are_named(study):
    shutil.rmtree(study.workspace.prepared)
    for stage, arguments in ((pretrain, {"phase": "st"}), (finetune, {"regime": "ST"})):
        with pytest.raises(UserError, match=r"data/prepared .*advml prepare"):
            stage.run(study.context(), scheme="CL", seed=0, **arguments)


def test_a_model_record_of_an_earlier_version_is_made_anew(make_study, trained):
    """A model.json without `inputs` may stand for anything."""
    study = make_study("old", *PLAIN, "pretrain.SL.epochs=1")
    train.run(study.context(), scheme="SL", regime="ST", seed=0)
    path = study.workspace.pretrained("SL-st-s0") / "model.json"
    record = json.loads(path.read_text())
    del record["inputs"]
    path.write_text(json.dumps(record))
    trained.clear()
    train.run(study.context(), scheme="SL", regime="ST", seed=0)
    assert trained == ["SL-st-s0"]
