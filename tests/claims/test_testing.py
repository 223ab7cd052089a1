"""The six claims on planted studies: each can be supported, contradicted, undecided and untestable."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest

from advml.claims.claims import AGREE, MARGIN
from advml.evaluation import records

MAIN = ("redundancy", "full_fine_tuning_redundancy", "full_fine_tuning_robustness", "clean_adversarial", "convergence")


def test_a_study_like_the_papers_supports_every_claim(planted):
    assert planted.verdicts() == {**dict.fromkeys(MAIN, "supported for this seed"), "epsilon": "not tested"}


@pytest.mark.parametrize(
    ("claim", "quantity", "values"),
    [
        ("redundancy", "redundancy", {"AT": {"SL": 0.8, "CL": 0.8, "SCL": 0.5}}),
        ("full_fine_tuning_redundancy", "redundancy", {"Full-AT": {"SL": 0.7, "CL": 0.7, "SCL": 0.82}}),
        ("full_fine_tuning_robustness", "robust", {"AT": {"SL": 0.2, "CL": 0.4, "SCL": 0.7}}),
        ("clean_adversarial", "clean_adversarial", {"AT": 0.8}),
        ("clean_adversarial", "clean_adversarial", {"ST": {"SL": 0.6, "CL": 0.94, "SCL": 0.6}}),  # no difference under ST
        ("convergence", "cross", {"AT": 0.3}),
    ],
)
def test_a_study_that_found_the_opposite_contradicts_that_claim(planting, tmp_path, claim, quantity, values):
    table = planting.AS_PAPER | {quantity: planting.AS_PAPER[quantity] | values}
    assert planting.Planted(tmp_path, table).plant().verdicts()[claim] == "contradicted for this seed"


def test_every_effect_is_the_planted_one(planted):
    """Every kind of input, quarter and pair has its own CKA, and the classifier another: a mix-up gives another number."""
    effects = {name: part["effect"] for name, part in planted.parts().items() if "effect" in part}
    expected = {f"{scheme}: redundancy, AT minus ST": 0.2 for scheme in ("SL", "CL", "SCL")}
    expected |= {"CL: redundancy, Full-AT minus AT": -0.1, "CL: long-range CKA, Full-AT minus AT": -0.1}
    expected |= {"SL: redundancy, Full-AT minus AT": 0.0, "SCL: redundancy, Full-AT minus AT": 0.02}
    for label, lift, sl, scl in (("accuracy under threat model II", 0.32, 0.3, 0.3), ("worst-case accuracy", 0.43, 0.39, 0.41)):
        expected |= {f"CL: {label}, Full-AT minus AT": lift}
        expected |= {f"gain in {label} (Full-AT minus AT), CL minus {scheme}": more for scheme, more in (("SL", sl), ("SCL", scl))}
    expected |= {f"{scheme}: clean-adversarial CKA, AT minus ST": 0.37 for scheme in ("SL", "CL", "SCL")}
    expected |= {f"{scheme}: clean-adversarial CKA of ST": 0.6 for scheme in ("SL", "CL", "SCL")}
    expected |= {f"{scheme}: clean-adversarial CKA of AT": 0.97 for scheme in ("SL", "CL", "SCL")}
    cross = {"SCL with CL": 0.3, "SL with CL": 0.31, "SL with SCL": 0.32}
    expected |= {f"{pair}: CKA on adversarial images, AT minus ST": effect for pair, effect in cross.items()}
    assert effects == pytest.approx(expected, abs=2e-6)


def test_parts_say_what_is_claimed_in_numbers_too(planted):
    part = planted.parts()["CL: redundancy, Full-AT minus AT"]
    assert (part["side"], part["bound"], part["claimed"]) == ("below", -0.02, "below -0.02")
    assert part["low"] < part["effect"] < part["high"] and part["paper"] == pytest.approx(0.7804 - 0.8177, abs=1e-4)


@pytest.mark.parametrize(
    ("after", "reduced", "kept"),
    [
        (0.8 - 0.03, "supported for this seed", "contradicted for this seed"),
        (0.8 - 0.01, "contradicted for this seed", "supported for this seed"),
        (0.8 + 0.03, "contradicted for this seed", "supported for this seed"),
    ],
)
def test_one_margin_says_what_is_reduced_and_what_is_not(planting, tmp_path, after, reduced, kept):
    """The same change is a reduction of CL's or it is none of SL's, never both."""
    table = planting.AS_PAPER | {"redundancy": planting.AS_PAPER["redundancy"] | {"Full-AT": after}}
    parts = planting.Planted(tmp_path, table).plant().parts()
    assert parts["CL: redundancy, Full-AT minus AT"]["verdict"] == reduced
    assert parts["SL: redundancy, Full-AT minus AT"]["verdict"] == kept
    assert MARGIN == 0.02


@pytest.mark.parametrize(("rise", "verdict"), [(0.03, "supported for this seed"), (0.01, "contradicted for this seed")])
def test_a_rise_is_one_above_the_margin(planting, tmp_path, rise, verdict):
    table = planting.AS_PAPER | {"redundancy": {"ST": 0.6, "AT": 0.6 + rise, "Partial-AT": 0.6, "Full-AT": 0.6}}
    table |= {"cross": {"ST": 0.4, "AT": 0.4 + rise}}
    found = planting.Planted(tmp_path, table).plant().verdicts()
    assert found["redundancy"] == found["convergence"] == verdict


@pytest.mark.parametrize(
    ("similar", "verdict"), [(0.85, "contradicted for this seed"), (0.89, "contradicted for this seed"), (0.91, "supported for this seed")]
)
def test_representations_agree_above_nine_tenths(planting, tmp_path, similar, verdict):
    table = planting.AS_PAPER | {"clean_adversarial": planting.AS_PAPER["clean_adversarial"] | {"AT": similar}}
    assert planting.Planted(tmp_path, table).plant().parts()["SL: clean-adversarial CKA of AT"]["verdict"] == verdict
    assert AGREE == 0.9


def test_effects_within_their_noise_are_inconclusive(planting, tmp_path):
    flat = {**planting.AS_PAPER, "robust": dict.fromkeys(planting.REGIMES, 0.5)}
    parts = planting.Planted(tmp_path, flat, n=50, noise=0.4).plant().parts()
    lift, redundancy = parts["CL: accuracy under threat model II, Full-AT minus AT"], parts["SL: redundancy, Full-AT minus AT"]
    assert lift["verdict"] == "inconclusive for this seed" and lift["low"] < 0 < lift["high"]
    assert redundancy["verdict"] == "inconclusive for this seed" and redundancy["low"] < -0.02 < redundancy["high"]


@pytest.mark.parametrize("robust", [0.0, 1.0])
def test_models_that_agree_on_every_image_may_differ_on_others(planting, tmp_path, robust):
    """Tango's interval of 0 differing images of n: z^2 / (n + z^2) to either side."""
    table = planting.AS_PAPER | {"robust": dict.fromkeys(planting.REGIMES, robust)}
    part = planting.Planted(tmp_path, table, n=40).plant().parts()["CL: accuracy under threat model II, Full-AT minus AT"]
    half = 1.959964**2 / (40 + 1.959964**2)
    assert part["effect"] == 0 and (part["low"], part["high"]) == pytest.approx((-half, half), abs=1e-5)


def test_a_lift_against_one_attack_alone_contradicts_the_claim(planting, tmp_path):
    table = planting.AS_PAPER | {"worst": dict.fromkeys(planting.REGIMES, 0.5) | {"AT": 0.6}}
    planted = planting.Planted(tmp_path, table).plant()
    assert planted.parts()["CL: accuracy under threat model II, Full-AT minus AT"]["verdict"] == "supported for this seed"
    assert planted.verdicts()["full_fine_tuning_robustness"] == "contradicted for this seed"


def test_worst_cases_over_other_attacks_are_not_compared(planting, planted):
    path = planted.workspace.record("evaluate", "CL-AT-s0")
    cascade = json.loads(path.read_text())["figures"]["accuracy/worst_case"]["cascade"]
    planting.edit(path, **{"figures__accuracy/worst_case__cascade": cascade[:1]})
    part = planted.parts()["CL: worst-case accuracy, Full-AT minus AT"]
    assert "were measured with different attacks" in part["missing"] and part["verdict"] == "not tested"


FLAG = {"name": "dead_gradients", "saw": "it", "try": "that"}


UNSEEN = {"flags": [], "skipped": "it fails on a batch"}


@pytest.mark.parametrize(
    ("diagnostics", "said"),
    [({"flags": [FLAG], "evidence": {}}, "dead_gradients"), (UNSEEN, "not judged"), ({}, "not judged")],
)
def test_a_claim_names_the_models_that_its_accuracies_cannot_be_trusted_of(planting, planted, diagnostics, said):
    assert not any("doubts" in part for part in planted.parts().values())
    planting.edit(planted.workspace.record("evaluate", "SL-AT-s0"), diagnostics=diagnostics)
    doubted = {name for name, part in planted.parts().items() if part.get("doubts") == {"SL-AT-s0": said}}
    assert doubted == {
        f"gain in {label} (Full-AT minus AT), CL minus SL" for label in ("accuracy under threat model II", "worst-case accuracy")
    }


def test_a_flag_of_a_transfer_is_named_too(planted, monkeypatch):
    flags = [FLAG | {"model": "CL-AT-s0", "name": "transfer_stronger"}]
    monkeypatch.setattr(records, "read_transfer", lambda workspace: {"seeds": [{"flags": flags}]})
    assert planted.parts()["CL: worst-case accuracy, Full-AT minus AT"]["doubts"] == {"CL-AT-s0": "transfer_stronger"}


def test_errors_that_models_have_in_common_are_taken_off(planting, tmp_path):
    """SL's AT and ST err alike, batch by batch: their difference is sure, though neither is."""
    planted = planting.Planted(tmp_path).plant()
    shared = np.random.default_rng(0).normal(0, 0.1, planting.BATCHES)
    for regime in ("ST", "AT"):
        path = planted.workspace.report(f"SL-{regime}-s0") / "cka.npz"
        arrays = dict(np.load(path))
        off_diagonal = np.where(np.eye(planting.LAYERS + 1, dtype=bool), 0, 1)
        arrays["products_clean"] = arrays["products_clean"] + (shared - shared.mean())[:, None, None] * off_diagonal
        planting.edit(planted.workspace.record("represent", f"SL-{regime}-s0"), cka=planting.store(path, arrays))
    part = planted.parts()["SL: redundancy, AT minus ST"]
    assert part["verdict"] == "supported for this seed" and part["high"] - part["low"] < 0.01


def test_a_missing_model_leaves_its_claims_untested_and_the_others_alone(planted):
    for stage in ("evaluate", "represent"):
        planted.workspace.record(stage, "SCL-Full-AT-s0").unlink()
    found = planted.verdicts()
    assert found["full_fine_tuning_redundancy"] == found["full_fine_tuning_robustness"] == "not tested"
    assert found["redundancy"] == found["convergence"] == "supported for this seed"


def test_nothing_measured_is_no_crash(planting, tmp_path):
    assert set(planting.Planted(tmp_path).verdicts().values()) == {"not tested"}


def test_layers_that_are_dead_in_one_of_two_models_count_in_neither(planting, tmp_path):
    """Without the first two layers the last quarter weighs more: ST and AT are held against each other over the same ones."""
    planted = planting.Planted(tmp_path, dead={"SL-ST-s0": [0, 1]}).plant()
    parts, others = planted.parts(), np.array([0.97 + 0.025] * 4 + [0.97 - 0.075] * 2)
    standard = np.array([0.6 + 0.075] * 4 + [0.6 - 0.225] * 2)
    assert parts["SL: clean-adversarial CKA, AT minus ST"]["effect"] == pytest.approx(others.mean() - standard.mean(), abs=1e-5)
    assert parts["SL: clean-adversarial CKA of AT"]["effect"] == pytest.approx(0.97, abs=1e-5)


# Seeds


def test_seeds_that_disagree_leave_a_claim_open(planting, tmp_path):
    """Each seed alone is certain; together they are not. Two seeds make a t interval of one degree of freedom."""
    planted = planting.Planted(tmp_path).plant(seeds=(0, 1, 2))
    agreed = planted.parts("seeds=[0, 1, 2]")["SL: redundancy, AT minus ST"]
    other = planting.AS_PAPER | {"redundancy": planting.AS_PAPER["redundancy"] | {"AT": 0.65}}
    planted.model("SL", "AT", 1, table=other)
    two, three = (planted.parts(f"seeds={seeds}")["SL: redundancy, AT minus ST"] for seeds in ([0, 1], [0, 1, 2]))
    assert agreed["verdict"] == "supported" and two["verdict"] == three["verdict"] == "inconclusive"
    assert two["effect"] == pytest.approx(0.125, abs=1e-6) and two["high"] == pytest.approx(0.125 + 12.706 * 0.075, abs=0.01)
    assert three["high"] == pytest.approx(0.15 + 4.303 * np.std([0.2, 0.05, 0.2], ddof=1) / math.sqrt(3), abs=0.01)


def test_every_verdict_has_its_number_of_seeds_beside_it(planting, tmp_path):
    planted = planting.Planted(tmp_path).plant(seeds=(0, 1))
    for seeds in ([0], [0, 1]):
        claims = planted.check(f"seeds={seeds}")["claims"]
        for found in (*claims, *(part for claim in claims for part in claim["parts"])):
            tested = found["verdict"] != "not tested"
            assert found["seeds"] == (len(seeds) if tested else 0)
            assert ("for this seed" in found["verdict"]) == (tested and len(seeds) == 1)


def test_differences_of_accuracies_over_seeds_are_of_models_of_the_same_seed(planting, tmp_path):
    """Seeds differ in how robust all their models are, not in what Full-AT adds: 0.1 in each."""
    planted = planting.Planted(tmp_path).plant(seeds=(0, 1, 2))
    for seed, base in enumerate((0.3, 0.5, 0.7)):
        for regime, robust in (("AT", base), ("Full-AT", base + 0.1)):
            planted.model("CL", regime, seed, table=planting.changed("robust", **{regime.replace("-", "_"): robust}))
    part = planted.parts("seeds=[0, 1, 2]")["CL: accuracy under threat model II, Full-AT minus AT"]
    assert part["effect"] == pytest.approx(0.1, abs=1e-6) and part["verdict"] == "supported" and part["seeds"] == 3
    assert part["high"] - part["low"] < 0.06  # were the seeds not paired: 1 and more


def test_it_is_said_what_intervals_are_made_of(planting, tmp_path):
    planted = planting.Planted(tmp_path)
    told = [planted.check(f"seeds={seeds}")["intervals"] for seeds in ([0], [0, 1], [0, 1, 2], [0, 1, 2, 3])]
    assert "test images alone" in told[0] and "one degree of freedom" in told[1] and told[2] == told[3] and "over seeds" in told[2]


# Training epsilons


@pytest.mark.parametrize(
    ("last", "verdict"), [((0.7, 0.8, 0.95), "supported for this seed"), ((0.95, 0.8, 0.7), "contradicted for this seed")]
)
def test_studies_of_other_training_epsilons_test_the_last_claim(planting, tmp_path, last, verdict):
    planted = planting.plant_epsilons(tmp_path, last)
    assert planted.verdicts(planting.STUDIES)["epsilon"] == verdict and planted.verdicts()["epsilon"] == "not tested"
    assert planted.check(planting.STUDIES)["epsilons"] == [0.05, 0.15, 0.3]
    assert planted.verdicts(planting.STUDIES)["redundancy"] == "supported for this seed"  # of the main study alone


def test_the_gain_is_from_the_smallest_to_the_largest_epsilon(planting, tmp_path):
    parts = planting.plant_epsilons(tmp_path, (0.7, 0.98, 0.8), (0.9, 0.5, 0.95)).parts(planting.STUDIES)
    for scheme in ("SL", "CL", "SCL"):
        name = f"{scheme}: clean-adversarial CKA of the last quarter, largest minus smallest training epsilon"
        assert parts[name]["effect"] == pytest.approx(0.1, abs=1e-6)
        assert parts[f"{scheme}: that gain, last quarter minus first quarter"]["effect"] == pytest.approx(0.05, abs=1e-6)


def test_folders_may_be_given_from_the_root_and_the_main_study_is_not_one_of_the_others(planting, tmp_path):
    planted = planting.plant_epsilons(tmp_path, (0.7, 0.8, 0.95))
    assert planted.verdicts(f"similarity.epsilon_studies={tmp_path}/eps/eps-*")["epsilon"] == "supported for this seed"
    for pattern in (".", str(tmp_path), "none-*"):
        part = planted.check(f"similarity.epsilon_studies={pattern}")["claims"][-1]["parts"][0]
        assert part["verdict"] == "not tested" and "similarity.epsilon_studies" in part["missing"] and repr(pattern) in part["missing"]


def test_what_is_missing_for_the_last_claim_is_named(planted):
    missing = planted.check()["claims"][-1]["parts"][0]["missing"]
    assert "similarity.epsilon_studies is null" in missing and "python pipelines/epsilon/run.py" in missing and "\n" not in missing


def test_a_model_of_another_epsilon_than_its_study_is_no_evidence(planting, tmp_path):
    planted = planting.plant_epsilons(tmp_path, (0.7, 0.8, 0.95))
    path = tmp_path / "eps" / "eps-0.3" / "models" / "finetune" / "CL-AT-s0" / "model.json"
    planting.edit(path, parameters__threat_model__epsilon=0.2)
    parts = [part for part in planted.check(planting.STUDIES)["claims"][-1]["parts"] if part["name"].startswith("CL")]
    assert all("trained at epsilon 0.2" in part["missing"] for part in parts)


def test_a_study_without_models_of_another_epsilon_is_left_out(planting, tmp_path):
    planted = planting.plant_epsilons(tmp_path, (0.7, 0.8, 0.95))
    shutil.rmtree(tmp_path / "eps" / "eps-0.3" / "models")
    (tmp_path / "eps" / "eps-none").mkdir()
    assert planted.check(planting.STUDIES)["epsilons"] == [0.05, 0.15]


# Under other measures than CKA

MEASURES = "similarity.measures=[cka, rsa, r2, knn]"
ON_LAYERS = ("redundancy", "full_fine_tuning_redundancy", "clean_adversarial", "convergence")


def test_claims_on_similarity_are_tested_under_every_measure(planting, tmp_path):
    """One that sees what CKA sees, one that sees nothing, and one without intervals."""
    found = planting.Planted(tmp_path, measures={"rsa": 1.0, "r2": 0.0, "knn": None}).plant().check(MEASURES)
    claims = {claim["key"]: claim for claim in found["claims"]}
    assert [key for key, claim in claims.items() if "measures" in claim] == [*ON_LAYERS, "epsilon"]
    for key in ON_LAYERS:
        under = claims[key]["measures"]
        verdicts = {name: about["verdict"] for name, about in under.items()}
        assert verdicts["cka"] == verdicts["rsa"] == "supported for this seed" and verdicts["r2"] != verdicts["cka"]
        assert verdicts["knn"] == "inconclusive for this seed" and under["knn"]["claimed_side"] == under["knn"]["of"] == len(
            under["cka"]["parts"]
        )
        assert not claims[key]["cka_alone"]
        for cka, rsa in zip(under["cka"]["parts"], under["rsa"]["parts"], strict=True):
            assert rsa["effect"] == pytest.approx(cka["effect"], abs=0.01) and rsa["low"] <= rsa["effect"] <= rsa["high"]
    agreement = [part["name"] for part in claims["clean_adversarial"]["measures"]["rsa"]["parts"]]
    assert len(agreement) == 3 and not [name for name in agreement if "minus" not in name]  # 0.9 is a bound of CKA's own scale


def test_a_claim_that_holds_under_cka_alone_says_so(planting, tmp_path):
    found = planting.Planted(tmp_path, measures={"rsa": 0.0, "r2": -1.0, "knn": None}).plant().check(MEASURES)
    claims = {claim["key"]: claim for claim in found["claims"]}
    assert claims["redundancy"]["cka_alone"] and claims["redundancy"]["measures"]["r2"]["verdict"].startswith("contradicted")
    assert claims["redundancy"]["measures"]["rsa"]["claimed_side"] == 0


def test_a_measure_that_was_not_measured_is_missing_and_changes_no_verdict(planted):
    plain, asked = planted.check(), planted.check(MEASURES)
    assert [claim["verdict"] for claim in plain["claims"]] == [claim["verdict"] for claim in asked["claims"]]
    assert not [claim for claim in plain["claims"] if "measures" in claim]
    under = asked["claims"][0]["measures"]["rsa"]
    assert under["verdict"] == "not tested" and all("not measured by rsa" in part["missing"] for part in under["parts"])
