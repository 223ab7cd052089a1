"""What a search for a training trains, and which values of params.yaml the keys of its space stand for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from advml import config
from advml.config import Config, changed, flatten
from advml.errors import UserError
from advml.paths import Workspace, pretraining_name
from advml.recipes import REGIMES, SCHEMES, PhaseName
from advml.tuning import space as spaces
from advml.tuning.searches.files import record_of
from advml.tuning.space import Values

# Keys that only a training under attack has a use for.
UNATTACKED = ("adversarial_weight", "epsilon", "epsilon_warmup", "attack_steps", "loss")
# Where a phase leaves one of these null, the value of the study counts.
INHERITED = {"epsilon": "threat_model.epsilon", "attack_steps": "attack.steps"}


@dataclass(frozen=True)
class Trained:
    """A training, and the configurations that it may have.

    Attributes:
        kind: what is trained.
        which: the phase (st, at) of a pretraining, or the regime of a fine-tuning.
    """

    config: Config
    root: Path
    kind: Literal["pretrain", "finetune"]
    scheme: str
    which: str
    seed: int

    @property
    def section(self) -> str:
        return f"tune.{self.kind}.space"

    @property
    def floor_key(self) -> str:
        return f"tune.{self.kind}.clean_floor"

    @property
    def spec(self) -> config.TrainingSearch:
        return getattr(self.config.tune, self.kind)

    @property
    def given(self) -> spaces.Space:
        return self.spec.space

    @property
    def phase(self) -> str:
        """The section of what is trained, e.g. `regimes.Full-AT`."""
        return f"pretrain.{self.scheme}" if self.kind == "pretrain" else f"regimes.{self.which}"

    @property
    def attacked(self) -> bool:
        """Whether what is trained here is trained under attack."""
        return self.which == "at" if self.kind == "pretrain" else REGIMES[self.which].attacked

    @property
    def start(self) -> PhaseName:
        """The phase of the pretraining that a fine-tuning starts from."""
        return REGIMES[self.which].pretraining

    def proposal(self, values: Values) -> dict[str, Any]:
        """Values -> keys of params.yaml: `learning_rate` of the phase, `view.shift` of the scheme's views, all others in full."""
        return {self.full_key(key): value for key, value in values.items()}

    def full_key(self, key: str) -> str:
        if key in config.Phase.model_fields:
            return f"{self.phase}.{key}"
        head, _, tail = key.partition(".")
        return f"views.{SCHEMES[self.scheme].view}.{tail}" if head == "view" else key

    def base(self, key: str) -> Any:
        """The value that params.yaml gives a key of the space; null, where a phase takes over a value of the study, is that value."""
        everything = flatten(self.config.model_dump())
        value = everything.get(self.full_key(key))
        return everything[INHERITED[key]] if value is None and key in INHERITED else value

    def accept(self, values: Values) -> Config:
        """The configuration with these values; raises UserError if it refuses them."""
        return changed(self.config, self.proposal(values))

    def check_keys(self) -> None:
        """Raises UserError for a key that is none of what is trained: another section would change what trials are measured by."""
        known = list(config.Phase.model_fields)
        if self.kind == "pretrain":
            views = config.View.model_fields
            known += ["temperature", *(f"view.{key}" for key in views)]
        for key in self.given:
            if key not in known:
                raise UserError(f"{self.section} has an unknown key {key!r}; choose from {', '.join(known)}")

    def without_effect(self) -> tuple[str, ...]:
        """Keys that this scheme, regime or phase has no use for: a space serves them all."""
        return tuple(key for key in self.given if self._is_idle(key))

    def _is_idle(self, key: str) -> bool:
        if not self.attacked and key.startswith(UNATTACKED):
            return True
        if key == "temperature" and SCHEMES[self.scheme].groups is None:
            return True
        refusals = [self._refusal(key, corner) for corner in spaces.corners(self.given[key])]
        return any(refusals) and all(said is None or " has no effect" in said for said in refusals)

    def _refusal(self, key: str, value: Any) -> str | None:
        try:
            self.accept({key: value})
        except UserError as error:
            return str(error)
        return None

    def record(self) -> dict[str, Any]:
        """Of the pretrained encoder that a fine-tuning starts from."""
        if self.kind == "pretrain":
            return {}
        folder = Workspace(self.root).pretrained(pretraining_name(self.scheme, self.start, self.seed))
        if not (folder / "model.json").is_file():
            raise UserError(f"there is no {folder}; make it with: advml pretrain {self.scheme} {self.start} --seed {self.seed}")
        return record_of(folder)
