"""Studies planted as files: every kind of input, quarter of the layers, pair of schemes and epsilon has its own CKA."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pytest

from advml import config as configuration
from advml.claims.testing import check
from advml.core.paths import Workspace, model_name
from advml.evaluation import samples
from advml.similarity.compare import SCHEME_PAIRS
from advml.similarity.represent import ESTIMATOR, to_npz

REPOSITORY = Path(__file__).parents[2]
BATCHES, LAYERS, SIZE = 12, 8, 30
NAMES = [f"encoder.block{number}" for number in range(LAYERS)] + ["classifier"]
REGIMES = ("ST", "AT", "Partial-AT", "Full-AT")
SCHEMES = ("SL", "CL", "SCL")
KINDS = ("clean", "adversarial")
# What the paper found, as CKA and accuracy of each regime. `late`: what the last quarter's clean-adversarial CKA has on top of the others'.
AS_PAPER: dict[str, dict[str, Any]] = {
    "redundancy": {"ST": 0.6, "AT": 0.8, "Partial-AT": 0.8, "Full-AT": {"SL": 0.8, "CL": 0.7, "SCL": 0.82}},
    "redundancy_adversarial": {"ST": 0.7, "AT": 0.5, "Partial-AT": 0.5, "Full-AT": 0.9},
    "clean_adversarial": {"ST": 0.6, "AT": 0.97, "Partial-AT": 0.97, "Full-AT": 0.97},
    "late": {"ST": -0.3, "AT": -0.1, "Partial-AT": -0.1, "Full-AT": -0.1},
    "robust": {"ST": 0.0, "AT": {"SL": 0.7, "CL": 0.4, "SCL": 0.7}, "Partial-AT": 0.7, "Full-AT": 0.72},
    "worst": {"ST": 0.0, "AT": {"SL": 0.64, "CL": 0.25, "SCL": 0.66}, "Partial-AT": 0.6, "Full-AT": 0.68},
    "cross": {"ST": {"SCL-CL": 0.40, "SL-CL": 0.42, "SL-SCL": 0.44}, "AT": {"SCL-CL": 0.70, "SL-CL": 0.73, "SL-SCL": 0.76}},
    "cross_clean": {"ST": 0.8, "AT": 0.2},
}
MAIN = ("redundancy", "full_fine_tuning_redundancy", "full_fine_tuning_robustness", "clean_adversarial", "convergence")


def changed(quantity: str, **values: object) -> dict:
    return AS_PAPER | {quantity: AS_PAPER[quantity] | {key.replace("_", "-"): each for key, each in values.items()}}


def value(table: dict, quantity: str, name: str, regime: str) -> float:
    found = table[quantity][regime]
    return found[name] if isinstance(found, dict) else found


def attack(name: str, epsilon: float = 0.15) -> dict[str, Any]:
    steps = {"attack": "pgd", "objective": "cross-entropy", "norm": "linf", "epsilon": epsilon, "box": [0, 1], "steps": 20}
    steps |= {"step_size": 0.01875, "random_start": True, "keep": "best", "mode": "eval", "seed": 0, "batch_size": 512}
    return {"model": name, "digest": f"weights of {name}", "n": 359, "correct": crc32(name.encode()) % 359} | steps


def noisy(matrix: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Per batch the matrix and some noise of mean zero: norms of one make it the CKA."""
    random = np.random.default_rng(seed).normal(0, noise, (BATCHES, *matrix.shape))
    return matrix + random - random.mean(0)


def with_head(matrix: np.ndarray, *, head: float) -> np.ndarray:
    """The encoder's matrix and a classifier, which must not count."""
    whole = np.full((LAYERS + 1, LAYERS + 1), head)
    whole[:LAYERS, :LAYERS] = matrix
    return whole


def uniform(off_diagonal: float, diagonal: float = 1.0) -> np.ndarray:
    return np.full((LAYERS, LAYERS), off_diagonal) + (diagonal - off_diagonal) * np.eye(LAYERS)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; `how__n=3` reaches into a section."""
    content = json.loads(path.read_text())
    for key, each in changes.items():
        *sections, last = key.split("__")
        place = content
        for section in sections:
            place = place[section]
        place[last] = each
    path.write_text(json.dumps(content))


def store(path: Path, arrays: dict[str, np.ndarray]) -> str:
    """Write a cka.npz; returns its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_npz(arrays))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Planted:
    """A study whose files say what `table` says.

    Attributes:
        dead: layers that are dead in models of these names.
    """

    root: Path
    table: dict = field(default_factory=lambda: AS_PAPER)
    noise: float = 0.002
    n: int = 2000
    epsilon: float = 0.15
    dead: dict[str, list[int]] = field(default_factory=dict)

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.root)

    def norms(self, name: str) -> np.ndarray:
        norms = np.ones((BATCHES, LAYERS + 1))
        norms[:, self.dead.get(name, [])] = 0
        return norms

    def model(
        self, scheme: str, regime: str, seed: int = 0, *, table: dict | None = None, last: float | None = None, first: float | None = None
    ) -> None:
        """Plant one model; `last`, `first`: clean-adversarial CKA of those quarters, instead of the table's."""
        name, table, workspace = model_name(scheme, regime, seed), table or self.table, self.workspace
        quantities = ("redundancy", "redundancy_adversarial", "clean_adversarial", "late", "robust", "worst")
        clean, other, similar, late, robust, worst = (value(table, key, scheme, regime) for key in quantities)
        diagonal = np.full(LAYERS, similar)
        diagonal[-2:] += late
        diagonal += similar - diagonal.mean()
        for place, given in ((slice(-2, None), last), (slice(None, 2), first)):
            diagonal[place] = diagonal[place] if given is None else given
        mixed = uniform(0.5, 0) + np.diag(diagonal)
        matrices = {"clean": uniform(clean), "adversarial": uniform(other), "clean_adversarial": mixed}
        number = crc32(name.encode())
        arrays = {f"products_{key}": noisy(with_head(each, head=0.1), self.noise, number) for key, each in matrices.items()}
        arrays |= {f"norms_{kind}": self.norms(name) for kind in KINDS}
        arrays |= {"sizes": np.full(BATCHES, SIZE), "counted": np.array([True] * LAYERS + [False])}
        digest = store(workspace.report(name) / "cka.npz", arrays)
        about = {"model": name, "digest": f"weights of {name}", "metrics": {}}
        robustness = attack(name) | {"n": self.n, "correct": round(self.n * robust)}
        steps = [attack(name) | {"name": "threat_model_2"}, attack(name) | {"name": "apgd-ce", "attack": "apgd-ce"}]
        steps += [attack(name) | {"name": "threat_model_1", "objective": "contrastive"}] if scheme != "SL" else []
        cascade = robustness | {"attack": "cascade", "correct": round(self.n * worst), "cascade": steps}
        figures = {"accuracy/threat_model_2": robustness, "accuracy/worst_case": cascade}
        evaluated = about | {"test_digest": "test digits", "figures": figures, "diagnostics": {"flags": [], "evidence": {}}}
        write(workspace.record("evaluate", name), evaluated)
        order = np.random.default_rng(number).permutation(self.n)
        self.samples(name, order < robustness["correct"], order < cascade["correct"])
        how = {"estimator": ESTIMATOR, "gram": "float32", "n": 359, "batch_sizes": [SIZE] * BATCHES, "counted_in_scalars": NAMES[:LAYERS]}
        write(
            workspace.record("represent", name),
            about | {"data": "digits", "cka": digest, "how": how | {"adversarial_source": attack(name)}},
        )
        trained = {"parameters": {"threat_model": {"epsilon": self.epsilon}}} if regime != "ST" else {"parameters": {}}
        write(workspace.model(name) / "model.json", {"digest": about["digest"], "data": {"digest": "digits"}} | trained)

    def samples(self, name: str, robust: np.ndarray, worst: np.ndarray, **about: str) -> None:
        """Plant which images of a model survive threat model II and all attacks."""
        columns = {"index": np.arange(len(robust)), "right/threat_model_2": robust}
        columns |= {"broken_by": pa.array(np.where(worst, None, "apgd-ce"), pa.string())}
        metadata = {samples.METADATA: json.dumps({"digest": f"weights of {name}", "test_digest": "test digits"} | about).encode()}
        samples.write(pa.table(columns).replace_schema_metadata(metadata), self.workspace.samples(name))

    def comparison(self, seeds: tuple[int, ...] = (0,), *, source: str | None = None) -> None:
        panels = [
            {"group": "", "first": model_name(a, regime, seed), "second": model_name(b, regime, seed)}
            for seed, regime, (a, b) in itertools.product(seeds, ("ST", "AT"), SCHEME_PAIRS)
        ]
        models = sorted({panel[side] for panel in panels for side in ("first", "second")})
        arrays = {"sizes": np.full(BATCHES, SIZE)}
        for panel, kind in itertools.product(panels, KINDS):
            pair, regime = "-".join(panel[side].split("-")[0] for side in ("first", "second")), panel["first"].split("-")[1]
            cka = value(self.table, "cross" if kind == "adversarial" else "cross_clean", pair, regime)
            # What stands on the diagonal must not count either: means are of different layers.
            matrix = with_head(uniform(cka, 0.05), head=0.9)
            arrays[f"products/{panel['first']}/{panel['second']}/{kind}"] = noisy(matrix, self.noise, crc32(pair.encode()))
        for model in models:
            arrays[f"counted/{model}"] = np.array([True] * LAYERS + [False])
            arrays |= {f"norms/{model}/{kind}": self.norms(model) for kind in KINDS}
        folder = self.workspace.reports / "compare"
        digest = store(folder / "cka.npz", arrays)
        layer = {"kind": "", "shape": [1], "aliases": [], "in_encoder": True, "is_block": True}
        described = {"panels": panels, "layers": {model: [layer | {"name": name} for name in NAMES] for model in models}}
        described |= {"estimator": ESTIMATOR, "gram": "float32", "n": 359, "batch_sizes": [SIZE] * BATCHES}
        described |= {"data": dict.fromkeys(models, "digits"), "adversarial_source": {model: attack(source or model) for model in models}}
        write(folder / "cka.json", described)
        write(self.workspace.record("compare", "panels"), {"digests": {model: f"weights of {model}" for model in models}, "cka": digest})

    def plant(self, *, seeds: tuple[int, ...] = (0,)) -> Planted:
        """All models and panels."""
        for scheme, regime, seed in itertools.product(SCHEMES, REGIMES, seeds):
            self.model(scheme, regime, seed)
        self.comparison(seeds)
        return self

    # What the claims say of it

    def check(self, *overrides: str) -> dict[str, Any]:
        config = load(*overrides)
        attacked = configuration.ThreatModelSection(norm=config.threat_model.norm, epsilon=config.attacked_epsilon)
        about = {"seeds": config.seeds, "epsilon": config.threat_model.epsilon, "others": config.similarity.epsilon_studies}
        found = check(self.workspace, **about, attacked=attacked)
        json.dumps(found, allow_nan=False)
        return found

    def verdicts(self, *overrides: str) -> dict[str, str]:
        return {claim["key"]: claim["verdict"] for claim in self.check(*overrides)["claims"]}

    def parts(self, *overrides: str) -> dict[str, dict[str, Any]]:
        return {part["name"]: part for claim in self.check(*overrides)["claims"] for part in claim["parts"]}


def load(*overrides: str) -> configuration.Config:
    return configuration.load(REPOSITORY / "params.yaml", overrides)


EPSILONS = {"eps/eps-0.05": 0.05, ".": 0.15, "eps/eps-0.3": 0.3}  # folder -> epsilon, weakest adversary first
STUDIES = "similarity.epsilon_studies=eps/eps-*"


def plant_epsilons(root: Path, last: tuple[float, float, float], first: tuple[float, float, float] = (0.9, 0.9, 0.9)) -> Planted:
    """A main study (0.15) and two beside it, with the clean-adversarial CKA of their last and first quarters, weakest adversary first."""
    main = Planted(root).plant()
    for (folder, epsilon), late, early in zip(EPSILONS.items(), last, first, strict=True):
        for scheme in SCHEMES:
            Planted(root / folder, epsilon=epsilon).model(scheme, "AT", last=late, first=early)
    return main


@pytest.fixture(scope="session")
def planting() -> ModuleType:
    """This module: test modules cannot import one another."""
    return sys.modules[__name__]


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    """A whole study that found what the paper found."""
    return Planted(tmp_path).plant()
