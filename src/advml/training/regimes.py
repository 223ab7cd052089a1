"""ST, AT, Partial-AT, Full-AT: when the attack is present and who learns. A regime is a row of data.

| regime     | pretraining | fine-tuning | learns in fine-tuning | known elsewhere as |
|------------|-------------|-------------|-----------------------|--------------------|
| ST         | standard    | standard    | head                  | -                  |
| AT         | adversarial | standard    | head                  | SLF                |
| Partial-AT | adversarial | adversarial | head                  | ALF                |
| Full-AT    | adversarial | adversarial | encoder and head      | AFF                |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from advml.training.schemes import Scheme


@dataclass(frozen=True)
class Regime:
    """One row of the table above."""

    name: str
    pretraining: Literal["st", "at"]
    attacked: bool  # in fine-tuning
    encoder_learns: bool  # in fine-tuning; the head always does

    def finetunes(self, scheme: Scheme) -> bool:
        """Whether there is anything left to learn: a scheme that pretrains its classifier is done under ST and AT."""
        return scheme.head != "classifier" or self.attacked or self.encoder_learns

    def keeps_head(self, scheme: Scheme) -> bool:
        """Whether fine-tuning continues with the pretrained classifier (SL, Full-AT) or fits a new one."""
        return scheme.head == "classifier" and (self.encoder_learns or not self.attacked)


REGIMES: dict[str, Regime] = {
    "ST": Regime("ST", pretraining="st", attacked=False, encoder_learns=False),
    "AT": Regime("AT", pretraining="at", attacked=False, encoder_learns=False),
    "Partial-AT": Regime("Partial-AT", pretraining="at", attacked=True, encoder_learns=False),
    "Full-AT": Regime("Full-AT", pretraining="at", attacked=True, encoder_learns=True),
}
