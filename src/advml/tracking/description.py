"""Markdown description of a run for the MLflow UI: model, results, flags, and links.

All of it comes from the run's tags, which `sync` rebuilds from files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from urllib.parse import quote

from advml.evaluation.records import NONE
from advml.recipes import REGIMES, SCHEMES
from advml.tracking.store import FLAGS, NOW, PARENT, RESULT, TRANSFER_FLAGS, UI_MODE

# Kind of result in a model's run -> its pictures and tables among the artifacts.
FILES = {
    "training": ("curves.png",),
    "evaluation": ("evaluation.json",),
    "representation": ("cka.png", "layers.png", "representation.json"),
}
# Name or kind of a run without a model -> its title and pictures.
OTHERS = {
    "study": ("all models of the grid: the report, the result table and the verdicts on the claims", ("report.html", "summary.png")),
    "transfer": ("adversarial images of each model, scored on every other one", ("transfer/transfer.png",)),
    "comparison": ("CKA between the layers of different models", ("cka/clean.png", "cka/adversarial.png")),
    "evaluation": ("a model from elsewhere, measured like the study's own", ()),
    "imported": ("a published checkpoint", ()),
    "search": ("a search on validation images; each trial is a run below this one", ()),
}
MODES = {"st": "standard", "at": "adversarial"}


def describe(tags: Mapping[str, str], *, run: str, experiment: str) -> str:
    """Description of a run with these tags; empty if no tag names its kind."""
    return "\n\n".join(_paragraphs(tags, f"#/experiments/{experiment}/runs", run))


def _paragraphs(tags: Mapping[str, str], runs: str, run: str) -> Iterator[str]:
    kind, name = tags.get("advml.kind", ""), tags.get("advml.name", "")
    what, pictures = OTHERS.get(name) or OTHERS.get(kind, ("", ()))
    if kind in ("model", "pretrain"):
        what, pictures = _training(tags), [file for part, files in FILES.items() if f"advml.{part}" in tags for file in files]
    if what:
        yield f"**{name}**: {what}."
    if result := tags.get(RESULT):
        yield f"**Result**: {result}"
    if FLAGS in tags or tags.get(TRANSFER_FLAGS, NONE) != NONE:
        flags = [told for told in (tags.get(FLAGS), tags.get(TRANSFER_FLAGS)) if told and told != NONE]
        yield f"**Flags**: {', '.join(flags) or NONE}"
    links = [f"[{file}]({runs}/{run}/artifacts/{file}?{UI_MODE})" for file in pictures]
    if parent := tags.get(PARENT):
        yield f"Pretraining: [{tags['advml.pretraining_name']}]({runs}/{parent}?{UI_MODE})"
    if links:
        yield f"To see: {', '.join(links)}"
    if kind == "model":
        studies = quote("tags.`advml.kind` = 'study'")
        yield f"Report: in the [runs of the study]({runs}?searchFilter={studies}&{UI_MODE})"
    if path := tags.get("advml.path"):
        load = f'; load it with `advml.load_model("{path}")`' if kind in ("model", "imported") else ""
        yield f"Weights: `{path}/model.safetensors` (`dvc pull {path}` fetches them){load}"
    if now := [f"`{key.removeprefix(NOW)}` {value}" for key, value in sorted(tags.items()) if key.startswith(NOW)]:
        yield f"The columns of parameters keep the first values. The last measurement took: {', '.join(now)}"


def _training(tags: Mapping[str, str]) -> str:
    """`contrastive (SimCLR) learning, adversarial pretraining, standard fine-tuning of the head; seed 0`."""
    scheme, regime = SCHEMES.get(tags.get("advml.scheme", "")), REGIMES.get(tags.get("advml.regime", ""))
    mode = MODES.get(regime.pretraining if regime else tags.get("advml.phase", ""), "")
    done = regime.described if scheme and regime and regime.finetunes(scheme) else f"{mode} pretraining"
    return f"{scheme.described if scheme else tags.get('advml.scheme')} learning, {done}; seed {tags.get('advml.seed')}"
