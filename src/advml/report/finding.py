"""Summary of a study in a few sentences, from its table and claims, for the report and the description of its MLflow run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from advml.evaluation.records import AT_CHANCE
from advml.figures.style import FLAGGED, MEANING, mark
from advml.recipes import REGIMES, Regime
from advml.report.table import Row, with_means
from advml.similarity.statistics import Estimate

WORST, CLEAN = "accuracy/worst_case", "accuracy/clean"
VERDICTS = ("supported", "contradicted", "inconclusive")
NUMBERS = "no", "one", "two", "three", "four", "five", "six"
Group = tuple[str, str]  # scheme and regime
Difference = Callable[[Group, Group], Estimate | None]


def finding(table: Sequence[Row], claims: Mapping[str, Any], *, threat_model: str, minus: Difference = lambda *_: None) -> list[str]:
    """Sentences on the models' robustness, the effect of full adversarial fine-tuning, and the number of supported claims.

    Models of several seeds are averaged. Sentences on missing measurements are left out, and so are models that are at chance for any seed,
    which are named instead.

    Args:
        table: rows of the grid.
        claims: the content of claims.json.
        threat_model: e.g. "0.15 (L-infinity)".
        minus: difference of two groups' worst-case accuracies, paired by image; None: the second accuracy is compared with the interval of
            the first.
    """
    groups: dict[Group, list[Row]] = {}
    for row in table:
        if WORST in row:
            groups.setdefault((row["scheme"], row["regime"]), []).append(row)
    at_chance = {group for group, rows in groups.items() if any(row.get(AT_CHANCE) for row in rows)}
    able = {group: rows for group, rows in groups.items() if group not in at_chance}
    parts = [[*_robustness(able, threat_model, minus)], [*_chance(at_chance, able)], [*_lifts(able), *_verdicts(claims)]]
    sentences = ["; ".join(part) for part in parts if part]
    return [f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences]


def _robustness(groups: Mapping[Group, list[Row]], threat_model: str, minus: Difference) -> Iterator[str]:
    where = f" of the test images correct under all attacks with ε = {threat_model}"
    robust = {group: rows for group, rows in groups.items() if _attacked(REGIMES[group[1]])}
    plain = [row[WORST] for group, rows in groups.items() if group not in robust for row in rows]
    if plain:
        yield f"without adversarial training no model has more than {_percent(max(plain))}{where}"
    if robust:
        best = max(robust, key=lambda group: _mean(robust[group], WORST))
        rows = robust[best]
        told = f"the most robust model, {' '.join(best)}, has {_percent(_mean(rows, WORST))}{_spread(rows)}{'' if plain else where}"
        told += f", and {_percent(_mean(rows, CLEAN))} without attack" if all(CLEAN in row for row in rows) else ""
        yield told + (f" ({MEANING[FLAGGED]})" if any(mark(row) == FLAGGED for row in rows) else "")
        low = with_means(rows)[0].get(f"{WORST}/low", _mean(rows, WORST))
        others = [group for group in groups if group != best and not _is_worse(minus(best, group), _mean(groups[group], WORST) < low)]
        if others:
            names = [" ".join(group) for group in sorted(others, key=lambda group: -_mean(groups[group], WORST))]
            verb = "other is" if len(others) == 1 else "others are"
            yield f"{_number(len(others))} {verb} not significantly less robust: {_listed(names)}"


def _is_worse(difference: Estimate | None, otherwise: bool) -> bool:
    """Whether a difference, best minus other, is significantly above 0; `otherwise` without a difference."""
    return otherwise if difference is None else difference.interval[0] > 0


def _chance(at_chance: Collection[Group], able: Collection[Group]) -> Iterator[str]:
    """Sentence on models that are no better than always naming the most frequent class."""
    if at_chance and not able:
        yield "no model is better than chance (always naming the most frequent class), so nothing is known about their robustness"
    elif at_chance:
        names, verb = _listed(sorted(" ".join(group) for group in at_chance)), "is" if len(at_chance) == 1 else "are"
        yield f"{names} {verb} no better than chance (always naming the most frequent class), and left out here"


def _lifts(groups: Mapping[Group, list[Row]]) -> Iterator[str]:
    """Sentence on the gain of full adversarial fine-tuning, by scheme."""
    full = next((name for name, regime in REGIMES.items() if regime.attacked and regime.encoder_learns), None)
    base = next((name for name, regime in REGIMES.items() if regime.pretraining == "at" and not regime.attacked), None)
    schemes = [scheme for scheme, regime in groups if regime == full and (scheme, base) in groups]
    if schemes:
        lift = {scheme: _mean(groups[scheme, full], WORST) - _mean(groups[scheme, base], WORST) for scheme in schemes}
        told = [f"{100 * lift[scheme]:+.1f} points for {scheme}" for scheme in sorted(lift, key=lambda scheme: -lift[scheme])]
        steps = f"fine-tuning the whole network under attack ({full}) after adversarial pretraining ({base})"
        yield f"{steps} changes that accuracy by {_listed(told)}"


def _verdicts(claims: Mapping[str, Any]) -> Iterator[str]:
    """Sentence on verdicts: `of the paper's six claims five are supported, by one seed, and one is not tested`."""
    verdicts = Counter(claim["verdict"].removesuffix(" for this seed") for claim in claims.get("claims", ()))
    among, untested = f"of the paper's {_number(verdicts.total())} claims", verdicts.pop("not tested", 0)
    if not verdicts:
        yield from [f"none {among} is tested"] if untested else []
        return
    by = f"by {_number(len(claims['seeds']))} seed{'s' if len(claims['seeds']) > 1 else ''}"
    told = [_counted(count, verdict) for verdict, count in sorted(verdicts.items(), key=lambda each: VERDICTS.index(each[0]))]
    if untested:
        yield f"{among} {_listed(told)}, {by}, and {_counted(untested, 'not tested')}"
    else:
        yield f"each {among} is {next(iter(verdicts))}, {by}" if len(told) == 1 else f"{among} {_listed(told)}, {by}"


def _counted(count: int, verdict: str) -> str:
    return f"{_number(count)} {'is' if count == 1 else 'are'} {verdict}"


def _attacked(regime: Regime) -> bool:
    return regime.attacked or regime.pretraining == "at"


def _mean(rows: Sequence[Row], metric: str) -> float:
    return mean(row[metric] for row in rows)


def _spread(rows: Sequence[Row]) -> str:
    """Text of the 95 % interval of one model, or of mean and range over several seeds."""
    if len(rows) > 1:
        values = [row[WORST] for row in rows]
        return f" (mean of {len(rows)} seeds, {100 * min(values):.1f} to {100 * max(values):.1f})"
    ends = [rows[0].get(f"{WORST}/{end}") for end in ("low", "high")]
    return f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if None not in ends else ""


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def _listed(parts: Sequence[str]) -> str:
    """Enumeration in words: `a, b and c`."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
