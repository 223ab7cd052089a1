"""The stage `evaluate`: what is remembered when parameters are corrected, what is refused before the start, and names that are taken."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch import nn

from advml.attacks.minimum_norm import MINIMAL
from advml.config.schema import MINIMAL_NORMS
from advml.core import paths
from advml.core.errors import UserError
from advml.evaluation import evaluate as evaluation
from advml.evaluation import records
from advml.evaluation.masking import diagnose
from advml.evaluation.run_attacks import _Batch
from advml.models.external import Given
from advml.pipeline.stages import evaluate

QUICK = ("worst_case.attacks=[pgd-margin]", "corruptions.names=[contrast]")


class Stop(Exception):
    pass


def stop(*_: object, **__: object) -> None:
    raise Stop


@pytest.fixture
def given() -> Given:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    network[1].weight.data = 0.1 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    return Given("linear", network, "0", {})


@pytest.fixture
def interrupted(make_study, given, monkeypatch):
    """A study in which the evaluation of `given` has ended after all attacks and corruptions; what would attack again stops."""
    study = make_study("interrupted")
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.samples, "table", stop)
        with pytest.raises(Stop):
            evaluate.run_given(study.context(*QUICK), given)
    return study


@pytest.mark.parametrize(
    ("correction", "again"),
    [
        ("diagnostics.steps=3", {"diagnose"}),
        ("diagnostics.images=4", {"diagnose"}),
        ("corruptions.severities=[2]", {"one"}),
        ("evaluate.steps=3", {"measure", "diagnose"}),
        ("threat_model.epsilon=0.1", {"measure", "diagnose"}),
        ("worst_case.restarts=2", {"measure", "diagnose"}),
    ],
)
def test_a_correction_costs_the_parts_that_depend_on_it_alone(interrupted, given, monkeypatch, correction, again):
    ran = set()

    def watch(owner: object, name: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments, **options: (ran.add(name), real(*arguments, **options))[1])

    for owner, name in ((_Batch, "measure"), (diagnose, "diagnose"), (evaluation.corruption, "one")):
        watch(owner, name)
    metrics = evaluate.run_given(interrupted.context(*QUICK, correction), given)
    assert ran == again and "corruption/mean" in metrics
    assert not interrupted.workspace.scratch("evaluate-linear").exists()


def test_an_evaluation_is_asked_for_what_params_yaml_says(make_study, given, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluation, "evaluate", lambda subject, dataset, settings, machine, **how: asked.append(settings) or stop())
    changes = ("evaluate.seed=4", "evaluate.batch_size=7", "evaluate.adversarial_images=5", "evaluate.epsilon=0.25", "diagnostics.images=3")
    with pytest.raises(Stop):
        evaluate.run_given(make_study("asked").context(*QUICK, *changes), replace(given, scheme="CL"))
    (settings,) = asked
    assert (settings.seed, settings.batch_size, settings.keep, settings.threat_model.epsilon) == (4, 7, 5, 0.25)
    assert settings.diagnostics.images == 3 and settings.corruptions.names == ("contrast",) and settings.published is None
    threats = [f"accuracy/threat_model_{number}{suffix}" for suffix in ("", "_half") for number in (1, 2)]
    assert [attack.name for attack in settings.attacks] == ["accuracy/clean", *threats, "worst_case/pgd-margin"]


def test_a_missing_foolbox_is_said_before_the_first_attack(make_study, given, monkeypatch):
    def absent(name: str) -> str:
        if name == "foolbox":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(evaluate, "version", absent)
    monkeypatch.setattr(evaluation, "evaluate", stop)
    context = make_study("bare").context("diagnostics.minimal=fmn")
    told = r'diagnostics.minimal = fmn needs foolbox; install it with: pip install "advml\[distances\]"'
    with pytest.raises(UserError, match=told) as stopped:
        evaluate.run_given(context, given)
    assert "\n" not in str(stopped.value)
    with pytest.raises(Stop):  # nobody would use it
        evaluate.run_given(replace(context, config=make_study("none").config("diagnostics.minimal=fmn", "diagnostics.images=0")), given)


def test_attacks_that_are_not_run_are_warned_of_before_the_first_one(make_study, given, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "evaluate", stop)
    monkeypatch.setattr(evaluate, "not_run", lambda names, classes: {"square": f"needs more than {classes} classes"})
    with pytest.raises(Stop):
        evaluate.run_given(make_study("few").context(), given)
    (told,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning"))
    assert "worst_case.attacks" in told and "square" in told and "more than 4 classes" in told


@pytest.mark.parametrize("minimal", MINIMAL)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_params_yaml_refuses_the_norms_that_an_attack_does_not_work_in(make_study, minimal, norm):
    study = make_study("norms")
    assert {name: tuple(attack.norms) for name, attack in MINIMAL.items()} == MINIMAL_NORMS
    overrides = (f"diagnostics.minimal={minimal}", f"threat_model.norm={norm}")
    if norm in MINIMAL[minimal].norms:
        assert study.config(*overrides).diagnostics.minimal == minimal
    else:
        told = rf"diagnostics.minimal = {minimal} does not work in threat_model.norm = {norm}; choose from fmn"
        with pytest.raises(UserError, match=told):
            study.config(*overrides)


@pytest.mark.parametrize(
    ("library", "parts"),
    [
        ("torch", {"attacks", "diagnostics", "corruption"}),
        ("numpy", {"attacks", "diagnostics", "corruption"}),
        ("timm", {"attacks", "diagnostics", "corruption"}),
        ("pyautoattack", {"attacks", "diagnostics"}),
        ("foolbox", {"diagnostics"}),
        ("scipy", {"corruption"}),
        ("pillow", {"corruption"}),
    ],
)
def test_another_version_of_a_library_makes_what_it_computes_anew(make_study, monkeypatch, library, parts):
    context = make_study("versions").context("diagnostics.minimal=fmn")
    monkeypatch.setattr(evaluate, "version", lambda name: "1")
    before = evaluate._parts(context, "weights")
    monkeypatch.setattr(evaluate, "version", lambda name: "2" if name == library else "1")
    after = evaluate._parts(context, "weights")
    assert {part for part in before if before[part] != after[part]} == parts


def test_other_published_files_of_the_same_name_make_corruptions_anew(make_study, monkeypatch, tmp_path):
    class Published:
        folder = tmp_path

        def __contains__(self, name: str) -> bool:
            return name != "fog"

    context = make_study("published").context()
    for name in ("contrast", "labels"):
        (tmp_path / f"{name}.npy").write_bytes(b"1234")
    monkeypatch.setattr(evaluate.cifar_c, "find", lambda data, spec: Published())
    before = evaluate._parts(context)
    (tmp_path / "contrast.npy").write_bytes(b"12345")
    after = evaluate._parts(context)
    assert {part for part in before if before[part] != after[part]} == {"corruption"}


TAKEN = (*paths.REPORT_FILES, records.TRANSFER, "compare", "tune", "Report.html", "compare-SL-ST-s0-SL-AT-s0", "CL-AT-s7", "SL-st-s0")
ELSEWHERE = ("../../models", "a/b", ".hidden", "")


def test_a_name_that_other_commands_write_to_or_that_leads_elsewhere_is_refused(make_study, given):
    study = make_study("taken")
    context, before = study.context(*QUICK), sorted(study.root.rglob("*"))
    for name in (*TAKEN, *ELSEWHERE):
        with pytest.raises(UserError, match=rf"{re.escape(name)}.*--name|is not valid; use"):
            evaluate.run_given(context, replace(given, name=name))
    assert sorted(study.root.rglob("*")) == before
