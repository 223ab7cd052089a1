"""Run the protocol of `advml evaluate` on any module and tensors or a DataLoader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor, nn

from advml import config
from advml.api.models import adapted, config_of, listed, machine_of
from advml.core.device import deterministic_kernels
from advml.core.errors import UserError
from advml.core.progress import Bar
from advml.core.result_cache import Memo
from advml.data.tensors import Batches, Labelled, labelled, pair, require
from advml.evaluation import evaluate as evaluation
from advml.models.network import Network, eval_mode
from advml.pipeline.stages.evaluate import expected_of, settings
from advml.recipes import SCHEMES

if TYPE_CHECKING:
    import pyarrow as pa


class Interval(NamedTuple):
    """A proportion with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """Result of `evaluate`; prints as a table.

    Attributes:
        figures: accuracies with 95 % intervals (Wilson), by name: `accuracy/clean`, `accuracy/threat_model_2` (PGD end to end), both
            attacks' names with `_half` at half of epsilon, `accuracy/worst_case` (images that survive all attacks), and further ones
            that the settings ask for.
        verdicts: one row per image: `label`, `predicted`, `broken_by` (null: it survived), `broken_as`, `distance`, ...
        flags: signs that a robust accuracy is too high (gradient masking, ...) or says nothing (`at_chance`): `name`, `saw`, `try`.
        judged: whether the probes that raise flags were run; if not, an empty list of flags means nothing.
        images: adversarial images of threat model II, (n, C, H, W) in [0, 1].
        remarks: how the model was adapted for the evaluation, whether it was trained with another ball, and which attacks are not run, one
            line each.
        metrics: the figures, flat, as in metrics.json.
        record: how each figure was measured: attack, steps, seed, passes.
    """

    figures: Mapping[str, Interval]
    verdicts: pa.Table
    flags: tuple[dict[str, str], ...]
    judged: bool
    images: Tensor
    remarks: tuple[str, ...]
    metrics: Mapping[str, float]
    record: Mapping[str, Any]

    def __repr__(self) -> str:
        width = max(map(len, self.figures))
        lines = [f"{name:{width}}  {figure}" for name, figure in self.figures.items()]
        lines += [f"! {flag['name']}: {flag['saw']}; to try: {flag['try']}" for flag in self.flags]
        if not self.flags:
            lines.append("no flags" if self.judged else "no probes for gradient masking were run")
        return "\n".join([*lines, *(f"note: {remark}" for remark in self.remarks)])


def evaluate(
    model: nn.Module,
    images: Tensor | Batches,
    labels: Tensor | None = None,
    *,
    epsilon: float | str | None = None,
    norm: Literal["linf", "l2"] | None = None,
    params: str | Path | config.Config = "cifar10",
    overrides: str | Sequence[str] = (),
    corruptions: bool = False,
    scheme: str | None = None,
    validation: Labelled | None = None,
    classes: int | str | Sequence[str] | None = None,
    mean: str | None = None,
    std: str | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluate by the protocol of `advml evaluate`: PGD, a cascade with AutoAttack's attacks, and probes for gradient masking.

    AutoAttack's standard strength, the default, needs about 8000 forward and 2000 backward passes for an image that no attack breaks. To
    see how far it is, set `progress`; to make it shorter, give fewer images, or `overrides` as in the example.

    Args:
        model: maps float images in [0, 1] to logits; evaluated in eval mode. It normalises images itself, unless `mean` and `std` are
            given.
        images: (N, C, H, W), float in [0, 1] or uint8; or batches of (images, labels), such as a DataLoader.
        labels: (N,) true classes, where `images` is a tensor.
        epsilon: radius of the ball; None: that of `params`, 8/255 by default. A model trained by advml with another ball than that of
            the evaluation (`advml.train` has 0.15 by default) gets a remark.
        norm: "linf" or "l2"; None: that of `params`.
        params: the settings: path of a params.yaml, name of a preset ("cifar10": AutoAttack's standard strength; "digits", "smoke"), or
            a loaded Config.
        overrides: `key=value` strings as after `-S`, such as "worst_case.attacks=[]" or "diagnostics.images=0".
        corruptions: measure the common corruptions of `params`, too; they need images of 256 grey levels.
        scheme: e.g. "CL", for a network of advml with its projection head: threat model I is measured, too.
        validation: (images, labels), or batches of them, used to detect a wrong normalisation or order of classes; None: `images` and
            `labels`.
        classes: number or names of classes; None: the number of logits.
        mean, std: of the normalisation that the model expects, as after `--mean` and `--std`: "imagenet", "0.5", ...
        progress: show progress on stderr: a bar on a terminal, lines elsewhere.
    Raises:
        UserError: images, labels or settings are not valid, or the model does not return one logit per class.

    Example:
        >>> quick = ["worst_case.attacks=[]", "diagnostics.images=0", "evaluate.steps=5"]
        >>> measured = advml.evaluate(model, images, labels, epsilon=0.1, overrides=quick)
        >>> sorted(measured.figures)[:3]
        ['accuracy/clean', 'accuracy/threat_model_2', 'accuracy/threat_model_2_half']
        >>> measured.figures["accuracy/worst_case"].value <= measured.figures["accuracy/clean"].value
        True
        >>> measured.verdicts.num_rows, measured.judged
        (40, False)
    """
    changed = {"evaluate.epsilon": epsilon, "threat_model.norm": norm}
    asked = [*listed(overrides), *(f"{key}={value}" for key, value in changed.items() if value is not None)]
    chosen = config_of(params, asked if corruptions else [*asked, "corruptions.names=none"])
    require(scheme is None or scheme in SCHEMES, f"scheme = {scheme!r}; choose from {', '.join(SCHEMES)}")
    if scheme and SCHEMES[scheme].groups and getattr(model, "projection_head", None) is None:
        raise UserError(f"scheme = {scheme!r} needs a network of advml with a projection head, which this model is not; leave scheme out")
    test, machine = labelled(images, labels), machine_of(model, chosen.runtime.precision)
    selecting = None if validation is None else pair(validation, of="validation")
    if chosen.corruptions.names and test.images.is_floating_point():
        raise UserError("corruptions = True needs images of 256 grey levels, but some pixels are between two levels; give uint8 images")
    with eval_mode(model), deterministic_kernels():
        given, dataset = adapted(model, machine, test, validation=selecting, classes=classes, mean=mean, std=std)
        expected = expected_of(given, given.network, dataset, machine, batch_size=chosen.evaluate.batch_size)
        subject = evaluation.Subject(given.name, given.digest, given.network, flags=expected.flags)
        asked_for = settings(chosen, dataset, SCHEMES.get(scheme or ""))
        with Bar("evaluate", total=asked_for.parts * len(test), silent=not progress) as bar:
            found = evaluation.evaluate(subject, dataset, asked_for, machine, memo=Memo(), on_progress=bar.reach)
    diagnosis = found.record["diagnostics"]
    figures = {
        name: Interval(value, found.metrics[f"{name}/low"], found.metrics[f"{name}/high"])
        for name, value in found.metrics.items()
        if f"{name}/low" in found.metrics
    }
    judged = "evidence" in diagnosis
    remarks = [*given.remarks, *(f"{attack} is not run: it {reason}" for attack, reason in asked_for.not_run.items())]
    balls = [chosen.threat_model.model_dump() | {"epsilon": chosen.attacked_epsilon}]
    balls += [model.threat_model] if isinstance(model, Network) and model.threat_model else []
    evaluated, *trained = (f"{ball['norm']}, epsilon {ball['epsilon']:.4g}" for ball in balls)
    if trained and trained != [evaluated]:
        remarks.append(f"evaluated in another ball ({evaluated}) than that of the settings of its training ({trained[0]})")
    return Evaluation(figures, found.samples, tuple(diagnosis["flags"]), judged, found.images, tuple(remarks), found.metrics, found.record)
