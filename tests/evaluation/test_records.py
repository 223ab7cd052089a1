"""Files of results are valid JSON, whatever could not be measured."""

from __future__ import annotations

import json

import pytest

from advml.core.paths import Workspace
from advml.evaluation import records


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_null_in_a_record_and_left_out_of_the_metrics(tmp_path, number):
    record = {"model": "CL-AT-s0", "digest": "d", "metrics": {"cka/redundancy": 0.5, "cka/redundancy/low": number}}
    written = records.write(Workspace(tmp_path), "represent", record | {"how": {"nested": [(number, 1)]}})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    stored = json.loads((tmp_path / "records/represent/CL-AT-s0.json").read_text(), parse_constant=refuse)
    assert stored["metrics"] == {"cka/redundancy": 0.5, "cka/redundancy/low": None} and stored["how"] == {"nested": [[None, 1]]}
    published = json.loads((tmp_path / "reports/CL-AT-s0/metrics.json").read_text(), parse_constant=refuse)
    assert written == published == {"cka/redundancy": 0.5}
