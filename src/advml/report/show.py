"""`advml show MODEL`: print a model's record as text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from advml.config import flatten, is_default
from advml.core.io import read_json, reporting_damage
from advml.core.paths import Workspace, find_model
from advml.core.training_cost import SECONDS, STEPS, training_cost

CHOSEN = {"best": "the best on validation", "last": "the last"}  # value of `keep` -> description


def record_of(workspace: Workspace, model: str, *, full: bool = False) -> str:
    """Text of a model's data, settings, training cost and measurements.

    Args:
        model: name or folder of a trained model, or name of an external model that was evaluated.
        full: show all parameters, not only those that differ from the defaults of params.yaml.
    """
    if given := workspace.evaluations_of_given().get(model):
        return _given(given)
    folder = find_model(workspace, model)
    with _reading(folder / "model.json") as record:
        lines = [f"{record['name']}   ({folder})", ""]
        results = [*_figures(workspace, record), *_representation(workspace, record)]
        lines += [*results, ""] if results else []
        lines += _block("made from", record.get("origin") or _origin(record))
        cost = training_cost(workspace, record)
        shown = {"gradient steps per image": cost.get(STEPS, "unknown"), "seconds": cost.get(SECONDS, "unknown")}
        lines += _block("training cost, pretraining included", shown)
        lines += _block("architecture", record["architecture"])
        parameters = flatten(record.get("parameters", {}))
        shown = {key: value for key, value in parameters.items() if full or not is_default(key, value)}
        lines += _block("parameters" if full else "parameters, without defaults (--full shows all)", shown) if parameters else []
    return "\n".join(lines).rstrip("\n")


def records_of(workspace: Workspace, model: str) -> dict[str, Any]:
    """Records of a model as data: `model` (model.json; None for an external model), `evaluate` and `represent`.

    The latter two are None if the model's present weights were not measured.
    """
    if given := workspace.evaluations_of_given().get(model):
        with _reading(given, again="measure again with: advml evaluate") as record:
            return {"model": None, "evaluate": record, "represent": None}
    folder = find_model(workspace, model)
    with _reading(folder / "model.json") as made:
        found: dict[str, Any] = {"model": made, "evaluate": None, "represent": None}
        for stage in ("evaluate", "represent"):
            path = workspace.record(stage, made["name"])
            if path.is_file():
                with _reading(path) as record:
                    found[stage] = record if record["digest"] == made["digest"] else None
        return found


def _given(made: Path) -> str:
    with _reading(made, again="measure again with: advml evaluate") as record:
        about = {**record["origin"], "data digest": record["data_digest"][:16], "weights": record["digest"][:16]}
        about["trained on"] = (record["trained_on"] or "unknown")[:16]
        return "\n".join([f"{record['model']}   ({made})", "", *_block("made from", about), *_accuracies(record), *_corruptions(record)])


@contextlib.contextmanager
def _reading(path: Path, *, again: str = "restore it with: dvc checkout") -> Iterator[dict[str, Any]]:
    """Context manager that yields a JSON file's content, and converts errors about missing or wrong keys to a UserError of one line."""
    with reporting_damage(path, remedy=again):
        yield read_json(path, remedy=again)


def _origin(record: dict[str, Any]) -> dict[str, Any]:
    data = record["data"]
    shown: dict[str, Any] = {
        "data": f"{data['source']}, {', '.join(f'{count} {split}' for split, count in data['counts'].items())}",
        "data digest": data["digest"][:16],
        "git commit": record["git_commit"] or "none: outside of git, or nothing was committed yet",
        "weights": record["digest"][:16],
    }
    if "pretraining" in record:
        shown["pretraining"] = f"{record['pretraining']['name']} ({record['pretraining']['digest'][:16]})"
    if record.get("epoch"):
        shown["selected epoch"] = f"{record['epoch']} ({CHOSEN[_phase(record)['keep']]})"
    return shown


def _figures(workspace: Workspace, record: dict[str, Any]) -> list[str]:
    made = workspace.record("evaluate", record["name"])
    if not made.is_file():
        return ["accuracy: not measured yet"] if record["kind"] == "model" else []
    with _reading(made) as evaluation:
        if evaluation["digest"] != record["digest"]:
            again = f"advml evaluate {record['scheme']} {record['regime']} --seed {record['seed']}"
            return [f"accuracy: {made} belongs to other weights; measure again with: {again}"]
        flags = _transfer_flags(workspace, record["name"], digest=record["digest"])
        return [*_accuracies(evaluation), *flags, *_corruptions(evaluation)]


def _accuracies(evaluation: dict[str, Any]) -> list[str]:
    shown = [line for name, figure in evaluation["figures"].items() for line in (_figure(name, figure), *_cascade(figure))]
    return ["accuracy on test (95 % intervals)", *shown, *flags_of(evaluation)]


def _figure(name: str, figure: dict[str, Any]) -> str:
    low, high = figure["interval"]
    attack = ", ".join(f"{key} {figure[key]:.4g}" for key in ("epsilon", "step_size") if key in figure)
    how = f"   {figure['norm']} {attack}" if "norm" in figure else ""
    how += f", {figure['steps']} steps, {_runs(figure['restarts'])}" if "steps" in figure else ""
    how += f", seed {figure['seed']}, {_passes(figure)}" if "forward" in figure else ""
    share = figure["correct"] / figure["n"]
    return f"  {name.removeprefix('accuracy/'):22} {100 * share:5.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {figure['n']}{how}"


def _passes(figure: dict[str, Any]) -> str:
    """Mean passes over all test images, to two digits at least, since those that are misclassified before the attack cost none."""
    if not figure["forward"]:
        return "no image was left to attack"
    means = [figure[direction] / figure["n"] for direction in ("forward", "backward")]
    forward, backward = (f"{mean:.0f}" if mean >= 10 else f"{mean:.2g}" for mean in means)
    few = " (misclassified ones are not attacked)" if means[0] < figure.get("steps", 0) else ""
    return f"{forward} forward and {backward} backward passes an image{few}"


def _corruptions(evaluation: dict[str, Any]) -> list[str]:
    """Lines on the accuracy under corruptions: the mean, then each one, worst first."""
    found = evaluation.get("corruptions")
    if not found:
        return []
    metrics = evaluation["metrics"]
    lines = []
    for name in ("corruption/mean", *sorted(found, key=metrics.__getitem__)):
        share, low, high = (100 * metrics[f"{name}{end}"] for end in ("", "/low", "/high"))
        lines.append(f"  {name.removeprefix('corruption/'):22} {share:5.1f} % [{low:.1f}, {high:.1f}]")
    severities = next(iter(found.values()))["severities"]
    return ["", f"accuracy under corruptions (means over severities {', '.join(map(str, severities))}; 95 % intervals)", *lines]


def flags_of(evaluation: dict[str, Any]) -> list[str]:
    """Lines on flags: one per flag, and one if the probes were not run or there are no flags."""
    diagnostics = evaluation.get("diagnostics", {})
    lines = [_flag(flag) for flag in diagnostics.get("flags", ())]
    if "skipped" in diagnostics:
        return [*lines, f"  diagnostics: not judged ({diagnostics['skipped']})"]
    return lines or (["  diagnostics: no flags"] if "evidence" in diagnostics else [])


def _flag(flag: dict[str, str]) -> str:
    return f"  ! {flag['name']}: {flag['saw']}; to try: {flag['try']}"


def _transfer_flags(workspace: Workspace, model: str, *, digest: str) -> list[str]:
    """Lines on flags that `advml transfer` has raised for these weights."""
    made = workspace.report("transfer") / "transfer.json"
    if not made.is_file():
        return []
    with _reading(made) as found:
        blocks = [block for block in found["seeds"] if block["digests"].get(model) == digest]
        flags = [flag for block in blocks for flag in block["flags"] if flag["model"] == model]
        return [_flag(flag) for flag in flags]


def _cascade(figure: dict[str, Any]) -> list[str]:
    """Lines per attack of the worst case: number of images broken, of those that survive all earlier attacks; or why it was not run."""
    ran = [f"    {step['name']:20} broke {step['broke']:4} of {step['aimed_at']}" for step in figure.get("cascade", ())]
    return ran + [f"    {name:20} not run: {reason}" for name, reason in figure.get("not_run", {}).items()]


def _phase(record: dict[str, Any]) -> dict[str, Any]:
    """Parameters of the phase that selected the epoch."""
    parameters = record["parameters"]
    return parameters["regimes"][record["regime"]] if record["kind"] == "model" else parameters["pretrain"][record["scheme"]]


def _runs(restarts: int) -> str:
    """Number of runs in words."""
    return "one run" if restarts == 1 else f"worst of {restarts} runs"


def _representation(workspace: Workspace, record: dict[str, Any]) -> list[str]:
    made = workspace.record("represent", record["name"])
    if not made.is_file():
        return []
    with _reading(made) as represented:
        if represented["digest"] != record["digest"]:
            return []
        metrics = represented["metrics"]
        named = [name for name in metrics if name.count("/") == 1]
        width = max((len(name) for name in named), default=0)
        shown, gaps = [], False
        for name in named:
            value, low, high = (metrics.get(f"{name}{end}") for end in ("", "/low", "/high"))
            gaps |= None in (value, low, high)
            shown.append(f"  {name:{width}} {_finite(value):>8} [{_finite(low)}, {_finite(high)}]")
        return ["", "representation on test (95 % intervals)", *shown, *(_why_not_finite(represented.get("how", {})) if gaps else [])]


def _finite(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _why_not_finite(how: dict[str, Any]) -> list[str]:
    """Line with the reasons for missing numbers, from the record."""
    dead = {layer for layers in how.get("dead_layers", {}).values() for layer in layers}
    reasons = [f"intervals of CKA: {how['intervals']['cka']}"] if "intervals" in how else []
    reasons += [f"constant layers, which have no CKA: {', '.join(sorted(dead))}"] if dead else []
    return [f"  -: not finite ({'; '.join(reasons) or 'the record does not say why'})"]


def _block(title: str, values: dict[str, Any]) -> list[str]:
    width = max(map(len, values), default=0)
    return [title, *(f"  {key:{width}}  {value}" for key, value in values.items()), ""]
