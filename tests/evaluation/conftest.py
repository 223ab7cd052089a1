"""The attacks of an evaluation, from settings."""

from __future__ import annotations

import pytest

from advml.config import Config
from advml.evaluation.attack_suite import AttackSpec, attack_suite
from advml.recipes import SCHEMES


@pytest.fixture(scope="session")
def suite():
    """suite(settings, "CL") -> every attack that they ask for."""

    def attacks(settings: Config, scheme: str | None = None, *, classes: int = 10, note: str = "") -> list[AttackSpec]:
        about = {"temperature": settings.temperature, "classes": classes, "note": note}
        return attack_suite(settings.evaluate, settings.threat_model, settings.worst_case, SCHEMES.get(scheme), **about)

    return attacks
