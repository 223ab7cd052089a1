"""Files that are of other weights, data, layers, batches or attacks are no evidence, and damaged ones are one line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from advml.claims.evidence import Study, accuracy_difference
from advml.core.errors import UserError
from advml.evaluation import samples


def missing(planted, claim: int, *overrides: str) -> str:
    """Why a claim could not be tested."""
    found = planted.check(*overrides)["claims"][claim]
    assert found["verdict"] == "not tested"
    return "; ".join(part.get("missing", "") for part in found["parts"])


@pytest.mark.parametrize("stage", ["represent", "evaluate"])
def test_a_measurement_of_other_weights_is_no_evidence(planting, planted, stage):
    planting.edit(planted.workspace.record(stage, "CL-Full-AT-s0"), digest="earlier weights")
    told = missing(planted, 1 if stage == "represent" else 2)
    assert "CL-Full-AT-s0 has been trained anew since it was measured" in told and "dvc repro" in told


def test_a_model_at_chance_tests_no_claim_about_accuracies(planting, planted):
    path = planted.workspace.record("evaluate", "SL-AT-s0")
    planting.edit(path, diagnostics={"flags": [{"name": "at_chance", "saw": "", "try": ""}], "skipped": "x"})
    told = missing(planted, 2)
    assert "SL-AT-s0" in told and "at_chance" in told
    tested = [part["name"] for part in planted.check()["claims"][2]["parts"] if "missing" not in part]
    assert tested and not any("SL" in name.replace("SCL", "") for name in tested)
    assert planted.verdicts()["redundancy"] == "supported for this seed"


def test_panels_of_other_weights_are_no_evidence(planting, planted):
    planting.edit(planted.workspace.model("CL-ST-s0") / "model.json", digest="new weights")
    for stage in ("evaluate", "represent"):
        planting.edit(planted.workspace.record(stage, "CL-ST-s0"), digest="new weights")
    assert "CL-ST-s0 has been trained anew" in missing(planted, 4)
    assert planted.verdicts()["redundancy"] == "supported for this seed"


def test_records_without_models_are_taken_as_they_are(planting, planted):
    """After a partial `dvc pull`."""
    for path in planted.workspace.models.glob("*/model.json"):
        path.unlink()
    assert planted.verdicts() == {**dict.fromkeys(planting.MAIN, "supported for this seed"), "epsilon": "not tested"}


@pytest.mark.parametrize(
    ("key", "other", "told"),
    [
        ("how__counted_in_scalars", ["encoder.block0"] * 8, "layers"),
        ("how__n", 300, "images"),
        ("how__batch_sizes", [29] * 12, "batches"),
        ("how__gram", "bfloat16", "estimators"),
        ("data", "other digits", "data"),
        ("how__adversarial_source__steps", 5, "attacks"),
        ("how__adversarial_source__keep", "last", "attacks"),
    ],
)
def test_models_measured_in_different_ways_are_not_compared(planting, planted, key, other, told):
    planting.edit(planted.workspace.record("represent", "SL-AT-s0"), **{key: other})
    said = missing(planted, 0)
    assert f"measured with different {told}" in said and "SL-AT-s0" in said and "dvc repro" in said


def test_accuracies_under_different_attacks_are_not_compared(planting, planted):
    planting.edit(planted.workspace.record("evaluate", "SL-AT-s0"), **{"figures__accuracy/threat_model_2__steps": 5})
    assert "different attacks" in missing(planted, 2)


def test_accuracies_are_paired_by_the_place_of_an_image_in_the_test_split(planting, tmp_path):
    """Both models have the same images right; one file has its rows in another order."""
    part, right = "CL: accuracy under threat model II, Full-AT minus AT", np.arange(100) < 50
    planted = planting.Planted(tmp_path, planting.changed("robust", AT=0.5, Full_AT=0.5), n=100).plant()
    apart = planted.parts()[part]
    for name in ("CL-AT-s0", "CL-Full-AT-s0"):
        planted.samples(name, right, right)
    alike = planted.parts()[part]
    assert alike["high"] == pytest.approx(1.959964**2 / (100 + 1.959964**2), abs=1e-6) and apart["high"] > 3 * alike["high"]
    path = planted.workspace.samples("CL-AT-s0")
    table, _ = samples.read(path)
    samples.write(table.take(np.random.default_rng(0).permutation(100)), path)
    assert planted.parts()[part] == alike


@pytest.mark.parametrize(
    ("about", "told"),
    [
        ({"digest": "weights of SL-AT-s0"}, "other weights or test images than the record of CL-AT-s0"),
        ({"test_digest": "other digits"}, "other weights or test images than the record of CL-AT-s0"),
        ({}, "999 of 2000 images right under accuracy/threat_model_2, its record 800 of 2000"),
    ],
)
def test_samples_that_are_not_the_records_are_not_paired(planted, about, told):
    right = np.arange(planted.n) < (800 if about else 999)
    planted.samples("CL-AT-s0", right, np.arange(planted.n) < 500, **about)
    said = missing(planted, 2)
    assert told in said and "dvc repro" in said and "samples.parquet" in said


def test_models_that_saw_other_test_images_are_not_compared(planting, planted):
    name = "CL-AT-s0"
    planted.samples(name, np.arange(planted.n) < 800, np.arange(planted.n) < 500, test_digest="other digits")
    planting.edit(planted.workspace.record("evaluate", name), test_digest="other digits")
    assert "different test images" in missing(planted, 2)


def test_without_samples_accuracies_are_not_compared(planted):
    planted.workspace.samples("CL-Full-AT-s0").unlink()
    assert "CL-Full-AT-s0/samples.parquet" in missing(planted, 2)
    assert planted.verdicts()["redundancy"] == "supported for this seed"


@pytest.mark.parametrize("fault", ["another column", "an image twice", "no table"])
def test_damaged_samples_are_one_line(planted, fault):
    path = planted.workspace.samples("CL-AT-s0")
    table, _ = samples.read(path)
    if fault == "no table":
        path.write_bytes(b"no table")
    else:
        samples.write(table.drop_columns("index") if fault == "another column" else table.take([0, 0, *range(2, len(table))]), path)
    with pytest.raises(UserError, match=r"samples\.parquet") as refused:
        planted.check()
    assert "measure again" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("stage", ["represent", "evaluate"])
def test_models_attacked_at_another_epsilon_than_the_studys_are_no_evidence(planted, stage):
    told = missing(planted, 1 if stage == "represent" else 2, "evaluate.epsilon=0.1")
    assert "was attacked at linf 0.15, params.yaml asks for linf 0.1" in told


def test_studies_of_other_epsilons_must_be_attacked_like_the_main_one(planting, tmp_path):
    planted = planting.plant_epsilons(tmp_path, (0.7, 0.8, 0.95))
    for scheme in planting.SCHEMES:
        for folder in planting.EPSILONS.keys() - {"."}:  # alike among themselves
            planting.edit(tmp_path / folder / "records" / "represent" / f"{scheme}-AT-s0.json", how__adversarial_source__epsilon=0.3)
    assert "was attacked at linf 0.3" in missing(planted, 5, planting.STUDIES)


def test_records_of_an_older_version_are_no_evidence(planting, planted):
    path = planted.workspace.record("represent", "SL-AT-s0")
    record = json.loads(path.read_text())
    del record["how"]["counted_in_scalars"]
    path.write_text(json.dumps(record))
    assert "older version" in missing(planted, 0)


def test_convergence_needs_each_models_own_adversarial_images(planting, planted):
    planted.comparison(source="SL-AT-s0")
    told = missing(planted, 4)
    assert "the adversarial images of SL-AT-s0 (similarity.source)" in told and "similarity.source: own" in told


def test_convergence_needs_the_same_layers_of_both(planting, planted):
    path = planted.workspace.reports / "compare" / "cka.json"
    described = json.loads(path.read_text())
    described["layers"]["CL-AT-s0"][0]["name"] = "another"
    path.write_text(json.dumps(described))
    assert "the layers that count differ" in missing(planted, 4)


def test_panels_that_were_not_measured_are_named(planted):
    planted.workspace.record("compare", "panels").unlink()
    told = missing(planted, 4)
    assert "SCL-AT-s0 with CL-AT-s0" in told and "advml compare" in told


def test_a_model_that_was_never_trained_is_named_before_the_comparison(planted):
    planted.workspace.record("compare", "panels").unlink()
    (planted.workspace.model("SCL-AT-s0") / "model.json").unlink()
    told = missing(planted, 4)
    assert "SCL-AT-s0 is missing" in told and "SCL-AT-s0 with CL-AT-s0" not in told


def test_accuracies_of_two_models_are_compared_image_by_image_and_only_if_both_were_measured_alike(planting, planted):
    attacked = planting.load().threat_model
    studies, path = [Study(attacked, planted.workspace, 0)], planted.workspace.record("evaluate", "SCL-AT-s0")
    steps = json.loads(path.read_text())["figures"]["accuracy/worst_case"]["cascade"]
    own = [step | ({"objective": "emp-ssl"} if step["name"] == "threat_model_1" else {}) for step in steps]
    planting.edit(path, **{"figures__accuracy/worst_case__cascade": own})  # of a scheme with another objective, which is no other attack
    found = accuracy_difference(studies, "accuracy/worst_case", ("SCL", "AT"), ("SL", "AT"))
    right = [samples.right(samples.read(planted.workspace.samples(f"{name}-AT-s0"))[0], "accuracy/worst_case") for name in ("SCL", "SL")]
    assert found.value == pytest.approx(0.02) and np.allclose(found.value + found.deviations, right[0] * 1.0 - right[1])
    planting.edit(planted.workspace.record("evaluate", "SL-AT-s0"), digest="earlier weights")
    assert accuracy_difference(studies, "accuracy/worst_case", ("SCL", "AT"), ("SL", "AT")) is None


@pytest.mark.parametrize("fault", ["no archive", "another archive", "none"])
@pytest.mark.parametrize("name", ["CL-AT-s0", "compare"])
def test_a_file_that_is_not_its_records_is_one_line(planted, name, fault):
    """As a kill between the file and its record leaves it."""
    path = planted.workspace.reports / name / "cka.npz"
    other = planted.workspace.reports / "SL-ST-s0" / "cka.npz"
    path.unlink() if fault == "none" else path.write_bytes(b"no archive" if fault == "no archive" else other.read_bytes())
    with pytest.raises(UserError, match=r"cka\.npz") as refused:
        planted.check()
    assert "measure again" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["no json", "{}", "[]"])
def test_a_damaged_description_is_one_line(planted, content):
    (planted.workspace.reports / "compare" / "cka.json").write_text(content)
    with pytest.raises(UserError, match=r"compare\b.* is damaged .*advml compare"):
        planted.check()
