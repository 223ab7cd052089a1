"""The six claims on planted studies: each can be supported, contradicted, undecided and untestable."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from advml import config as configuration
from advml.claims.hypotheses import CLAIMS, paper
from advml.claims.testing import check
from advml.errors import UserError
from advml.paths import Workspace, model_name, pretraining_name
from advml.similarity.arrays import to_npz
from advml.similarity.comparison import SCHEME_PAIRS
from advml.similarity.representation import MATRICES

REPOSITORY = Path(__file__).parents[2]
BATCHES, LAYERS = 12, 8
REGIMES = ("ST", "AT", "Partial-AT", "Full-AT")
# What the paper found, as CKA and accuracy of each regime: redundancy, long-range CKA follows; clean-adversarial; robust accuracy.
AS_PAPER = {
    "redundancy": {"ST": 0.6, "AT": 0.8, "Partial-AT": 0.8, "Full-AT": {"SL": 0.8, "CL": 0.7, "SCL": 0.82}},
    "clean_adversarial": {"ST": 0.6, "AT": 0.97, "Partial-AT": 0.97, "Full-AT": 0.97},
    "robust": {"ST": 0.0, "AT": {"SL": 0.7, "CL": 0.4, "SCL": 0.7}, "Partial-AT": 0.7, "Full-AT": 0.72},
    "cross": {"ST": 0.4, "AT": 0.7},
}


def value(table: dict, quantity: str, scheme: str, regime: str) -> float:
    found = table[quantity][regime]
    return found[scheme] if isinstance(found, dict) else found


def products(matrix: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Per batch the matrix and some noise of mean zero: norms of one make it the CKA."""
    random = np.random.default_rng(seed).normal(0, noise, (BATCHES, *matrix.shape))
    return matrix + random - random.mean(0)


def uniform(off_diagonal: float, diagonal: float = 1.0) -> np.ndarray:
    return np.full((LAYERS, LAYERS), off_diagonal) + (diagonal - off_diagonal) * np.eye(LAYERS)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def plant_model(workspace: Workspace, scheme: str, regime: str, seed: int, table: dict, *, noise: float, n: int) -> None:
    name = model_name(scheme, regime, seed)
    redundancy, similar, robust = (value(table, key, scheme, regime) for key in ("redundancy", "clean_adversarial", "robust"))
    matrices = {"clean": uniform(redundancy), "adversarial": uniform(redundancy), "clean_adversarial": uniform(0.5, similar)}
    arrays = {f"products_{key}": products(matrices[key], noise, crc32(name.encode())) for key in MATRICES}
    arrays |= {f"norms_{kind}": np.ones((BATCHES, LAYERS)) for kind in ("clean", "adversarial")}
    arrays |= {"sizes": np.full(BATCHES, 30), "counted": np.ones(LAYERS, bool)}
    workspace.report(name).mkdir(parents=True, exist_ok=True)
    (workspace.report(name) / "cka.npz").write_bytes(to_npz(arrays))
    figure = {"n": n, "correct": round(n * robust)}
    write(workspace.record("evaluate", name), {"model": name, "metrics": {}, "figures": {"accuracy/threat_model_2": figure}})
    write(workspace.record("represent", name), {"model": name, "metrics": {}})


def plant_comparison(workspace: Workspace, table: dict, seeds: tuple[int, ...], *, noise: float) -> None:
    panels = [
        {"group": "", "first": model_name(a, regime, seed), "second": model_name(b, regime, seed)}
        for seed, regime, (a, b) in itertools.product(seeds, ("ST", "AT"), SCHEME_PAIRS)
    ]
    models = sorted({panel[side] for panel in panels for side in ("first", "second")})
    arrays = {"sizes": np.full(BATCHES, 30)}
    for panel, kind in itertools.product(panels, ("clean", "adversarial")):
        cka = table["cross"]["ST" if "-ST-" in panel["first"] else "AT"]
        arrays[f"products/{panel['first']}/{panel['second']}/{kind}"] = products(uniform(cka), noise, 2)
    for model in models:
        arrays[f"counted/{model}"] = np.ones(LAYERS, bool)
        arrays |= {f"norms/{model}/{kind}": np.ones((BATCHES, LAYERS)) for kind in ("clean", "adversarial")}
    folder = workspace.reports / "compare"
    folder.mkdir(parents=True)
    (folder / "cka.npz").write_bytes(to_npz(arrays))
    write(folder / "cka.json", {"panels": panels, "layers": {model: [] for model in models}})
    write(workspace.record("compare", "panels"), {})


def plant(root: Path, table: dict, *, noise: float = 0.01, n: int = 2000, seeds: tuple[int, ...] = (0,)) -> Workspace:
    workspace = Workspace(root)
    for scheme, regime, seed in itertools.product(("SL", "CL", "SCL"), REGIMES, seeds):
        plant_model(workspace, scheme, regime, seed, table, noise=noise, n=n)
    plant_comparison(workspace, table, seeds, noise=noise)
    return workspace


def load(*overrides: str) -> configuration.Config:
    return configuration.load(REPOSITORY / "params.yaml", ["similarity.draws=300", *overrides])


def verdicts(workspace: Workspace, *overrides: str) -> dict[str, str]:
    return {claim["key"]: claim["verdict"] for claim in check(load(*overrides), workspace)["claims"]}


def changed(quantity: str, **values: object) -> dict:
    return AS_PAPER | {quantity: AS_PAPER[quantity] | {key.replace("_", "-"): each for key, each in values.items()}}


MAIN = ("redundancy", "full_fine_tuning_redundancy", "full_fine_tuning_robustness", "clean_adversarial", "convergence")


def test_a_study_like_the_papers_supports_every_claim(tmp_path):
    assert verdicts(plant(tmp_path, AS_PAPER)) == {**dict.fromkeys(MAIN, "supported"), "epsilon": "not tested"}


@pytest.mark.parametrize(
    ("claim", "table"),
    {
        "redundancy": changed("redundancy", AT={"SL": 0.8, "CL": 0.8, "SCL": 0.5}),
        "full_fine_tuning_redundancy": changed("redundancy", Full_AT={"SL": 0.7, "CL": 0.7, "SCL": 0.82}),
        "full_fine_tuning_robustness": changed("robust", AT={"SL": 0.2, "CL": 0.4, "SCL": 0.7}),
        "clean_adversarial": changed("clean_adversarial", AT=0.8),
        "convergence": changed("cross", AT=0.3),
    }.items(),
)
def test_a_study_that_found_the_opposite_contradicts_that_claim(tmp_path, claim, table):
    assert verdicts(plant(tmp_path, table))[claim] == "contradicted"


def test_effects_within_their_noise_are_inconclusive(tmp_path):
    flat = {"redundancy": dict.fromkeys(REGIMES, 0.7), "clean_adversarial": dict.fromkeys(REGIMES, 0.9)}
    flat |= {"robust": dict.fromkeys(REGIMES, 0.5), "cross": dict.fromkeys(("ST", "AT"), 0.5)}
    found = check(load(), plant(tmp_path, flat, noise=0.0, n=50))
    parts = {part["name"]: part for claim in found["claims"] for part in claim["parts"]}
    lift = parts["CL: robust accuracy, Full-AT minus AT"]
    assert lift["verdict"] == "inconclusive" and lift["low"] < 0 < lift["high"]
    assert parts["SL: redundancy, AT minus ST"]["verdict"] == "inconclusive"


def test_effects_are_differences_and_stand_beside_the_papers(tmp_path):
    found = check(load(), plant(tmp_path, AS_PAPER))
    part = found["claims"][0]["parts"][1]
    assert part["name"] == "CL: redundancy, AT minus ST" and part["effect"] == pytest.approx(0.2, abs=1e-6)
    assert part["low"] < part["effect"] < part["high"]
    assert part["paper"] == pytest.approx(0.8177 - 0.7215, abs=1e-4)
    json.dumps(found, allow_nan=False)


def test_a_missing_model_leaves_its_claims_untested_and_the_others_alone(tmp_path):
    workspace = plant(tmp_path, AS_PAPER)
    for stage in ("evaluate", "represent"):
        workspace.record(stage, "SCL-Full-AT-s0").unlink()
    found = verdicts(workspace)
    assert found["full_fine_tuning_redundancy"] == found["full_fine_tuning_robustness"] == "not tested"
    assert found["redundancy"] == found["convergence"] == "supported"


def test_nothing_measured_is_no_crash(tmp_path):
    assert set(verdicts(Workspace(tmp_path)).values()) == {"not tested"}


def test_a_damaged_file_is_one_line(tmp_path):
    workspace = plant(tmp_path, AS_PAPER)
    (workspace.report("CL-AT-s0") / "cka.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"cka\.npz cannot be read"):
        verdicts(workspace)


def test_seeds_that_disagree_widen_the_interval(tmp_path):
    """Each seed alone is certain; together they are not."""
    workspace = plant(tmp_path, AS_PAPER, seeds=(0, 1))
    agreed = check(load("seeds=[0, 1]"), workspace)["claims"][0]["parts"][0]
    other = changed("redundancy", AT=0.3)
    plant_model(workspace, "SL", "AT", 1, other, noise=0.01, n=2000)
    split = check(load("seeds=[0, 1]"), workspace)["claims"][0]["parts"][0]
    assert agreed["verdict"] == "supported" and split["verdict"] == "inconclusive"
    assert split["effect"] == pytest.approx((0.2 - 0.3) / 2, abs=1e-6) and split["low"] < -0.2 and split["high"] > 0.1


def plant_epsilons(root: Path, last: tuple[float, float, float]) -> Workspace:
    """A main study (0.15) and two others; the last quarter's clean-adversarial CKA of each, weakest adversary first."""
    workspaces = {0.05: Workspace(root / "eps" / "eps-0.05"), 0.15: Workspace(root), 0.3: Workspace(root / "eps" / "eps-0.3")}
    plant(root, AS_PAPER)
    for (epsilon, workspace), similar in zip(workspaces.items(), last, strict=True):
        for scheme in ("SL", "CL", "SCL"):
            plant_model(workspace, scheme, "AT", 0, AS_PAPER, noise=0.01, n=100)
            path = workspace.report(model_name(scheme, "AT", 0)) / "cka.npz"
            arrays = dict(np.load(path))
            diagonal = np.full(LAYERS, 0.9)
            diagonal[-2:] = similar
            arrays["products_clean_adversarial"] = products(uniform(0.5, 0) + np.diag(diagonal), 0.01, 1)
            path.write_bytes(to_npz(arrays))
            about = {"parameters": {"threat_model": {"epsilon": epsilon}}}
            write(workspace.pretrained(pretraining_name(scheme, "at", 0)) / "model.json", about)
    return workspaces[0.15]


@pytest.mark.parametrize(("last", "verdict"), [((0.7, 0.8, 0.95), "supported"), ((0.95, 0.8, 0.7), "contradicted")])
def test_studies_of_other_training_epsilons_test_the_last_claim(tmp_path, last, verdict):
    workspace = plant_epsilons(tmp_path, last)
    assert verdicts(workspace, "similarity.epsilon_studies=eps/eps-*")["epsilon"] == verdict
    assert verdicts(workspace)["epsilon"] == "not tested"
    assert check(load("similarity.epsilon_studies=eps/eps-*"), workspace)["epsilons"] == [0.05, 0.15, 0.3]
    assert verdicts(workspace, "similarity.epsilon_studies=eps/eps-*")["redundancy"] == "supported"  # of the main study alone


def test_there_are_the_papers_six_claims_and_their_figures():
    assert len(CLAIMS) == 6 and len({claim.key for claim in CLAIMS}) == 6
    assert paper()["cross"]["SL-CL"] == {"ST": 0.3664, "AT": 0.6879}
    names = [part.name for claim in CLAIMS for part in claim.parts]
    assert len(names) == len(set(names))
