"""One MLflow run: its curves, its final metrics, its weights, its end."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from advml.tracking import lineage
from advml.tracking import store as stores
from advml.tracking.start import new_params, texts_of
from advml.tracking.writer import Writer, guarded

if TYPE_CHECKING:
    from mlflow.entities import Run as Record

EPOCH = "epoch"
R = TypeVar("R", bound="Run")


class Run(Writer):
    """A handle on one run; `open_run` and `attach_run` make it.

    As a context manager it ends FINISHED, FAILED after an exception, or KILLED after Ctrl-C or SIGTERM (which
    the command line turns into SystemExit). `id` is None where there is no store. Of an `attached` run the status stays as it is;
    a `strict` one raises.
    """

    def __init__(
        self,
        place: stores.Place,
        store: stores.Store | None,
        record: Record | None,
        *,
        root: Path,
        attached: bool = False,
        strict: bool = False,
    ) -> None:
        super().__init__(place, store, record, strict=strict)
        self._root, self._ended = root, attached
        self._params: dict[str, str] = dict(record.data.params) if record else {}
        self._metrics: dict[str, float] = dict(record.data.metrics) if record else {}
        data = record.inputs.dataset_inputs[:1] if record and record.inputs else []
        self._data = {"dataset_name": data[0].dataset.name, "dataset_digest": data[0].dataset.digest} if data else {}
        self._epochs: dict[str, dict[int, float]] = {}  # key -> epoch -> the value that the store has

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        try:
            self.finish(status)
        except (KeyboardInterrupt, SystemExit):  # a signal came before the call to the store, or waited for it
            self.finish(status)
            raise

    @guarded
    def finish(self, status: str = "FINISHED", *, end_time: int | None = None) -> None:
        """Set the final status (FINISHED, FAILED or KILLED); only the first call counts."""
        if not self._ended:
            self._store.client.set_terminated(self.id, status, end_time)
            self._ended = True

    @guarded
    def log_epochs(self, records: Sequence[Mapping[str, Any]], *, at: int | None = None) -> None:
        """Log the curves' points that the store lacks or has with another value, in one call.

        Give the whole history every time: what a killed or repeated epoch left behind is neither doubled nor missed. MLflow deletes
        no point: of two at one epoch, the later one counts.

        Args:
            records: {'epoch': 3, 'train/loss': 0.1, ...}; values that are no numbers are left out.
            at: milliseconds since 1970; now, if None.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        when = now if at is None else at
        points = [
            Metric(key, value, now if epoch in known else when, epoch)
            for epoch, record in ((record[EPOCH], record) for record in records)
            for key, value in _numbers(record).items()
            if key != EPOCH and not _same(value, (known := self._epochs_of(key)).get(epoch))
        ]
        self._store.client.log_batch(self.id, metrics=points, synchronous=True)
        for point in points:
            self._epochs[point.key][point.step] = point.value

    @guarded
    def log_metrics(self, metrics: Mapping[str, Any], *, instead_of: Sequence[str] = ()) -> None:
        """Log the final metrics that are new or have changed, on the run and on its model.

        Args:
            instead_of: first words of metrics (`accuracy` of `accuracy/clean`) that these replace: those that the run has and `metrics`
                lacks become NaN. MLflow deletes none, and an earlier value would pass for today's.
        """
        from mlflow.entities import Metric

        now, model = int(time.time() * 1000), self._tags.get("advml.model_id")
        gone = {key: math.nan for key in self._metrics if key.partition("/")[0] in instead_of}
        changed = {key: value for key, value in (gone | _numbers(metrics)).items() if not _same(value, self._metrics.get(key))}
        entities = [Metric(key, value, now, 0, model_id=model, **self._data) for key, value in changed.items()]
        self._store.client.log_batch(self.id, metrics=entities, synchronous=True)
        self._metrics |= changed

    @guarded
    def log_params(self, params: Mapping[str, Any]) -> None:
        """Add the parameters, nested or flat, that the run lacks. MLflow changes none that it has: their values of today are tags."""
        fresh = new_params(params, known=self._params)
        self._store.client.log_batch(self.id, params=fresh, synchronous=True)
        self._params |= {param.key: param.value for param in fresh}
        self._tell_now({f"{lineage.NOW}{key}": text if text != self._params[key] else None for key, text in texts_of(params).items()})

    def _tell_now(self, values: Mapping[str, str | None]) -> None:
        """Tags of parameters whose values differ from the columns'; None: they don't, or not any more."""
        self._tag({key: text for key, text in values.items() if text is not None and self._tags.get(key) != text})
        for key in [key for key, text in values.items() if text is None and key in self._tags]:
            self._store.client.delete_tag(self.id, key)
            del self._tags[key]
        described = lineage.describe(self._store, self._tags)
        if described != self._tags.get("mlflow.note.content", ""):
            self._tag({"mlflow.note.content": described})

    @guarded
    def log_model_record(self, record: Path, *, commit: str | None) -> None:
        """Replace the model.json of the run's model, and the commit that it names; `log_checkpoint` gives the model its first one."""
        if model := self._tags.get("advml.model_id"):
            self._store.client.log_model_artifact(model, str(record))
            self._tag({"mlflow.source.git.commit": commit} if commit else {})

    @guarded
    def log_checkpoint(self, folder: Path, *, digest: str) -> None:
        """Record the checkpoint as an external model: where the weights lie and their sha256, not the weights.

        The tag `advml.digest`, which `find_run` and `sync` go by, is written last: it says that the run is complete.
        """
        known = Path(os.path.abspath(folder)), folder.resolve()  # the first one, with its links, is how the study names it
        path = next((path.relative_to(self._root).as_posix() for path in known if path.is_relative_to(self._root)), str(known[0]))
        if self._tags.get("advml.digest") != digest:  # else a stage that was killed just after is repeating itself
            self._tag({"advml.path": path})
            self._tag({"advml.model_id": lineage.add_model(self._store, self.id, self._tags, folder=folder, digest=digest)})
        self._tag({"mlflow.note.content": lineage.describe(self._store, self._tags)})
        self._tag({"advml.digest": digest})

    @guarded
    def link(self, pretraining: str | None) -> None:
        """Link the run whose weights this one started from (its id; None if the store has no such run)."""
        if pretraining is not None:
            self._tag(lineage.add_parent(self._store, self.id, pretraining))
            self._tag({"mlflow.note.content": lineage.describe(self._store, self._tags)})

    def _epochs_of(self, key: str) -> dict[int, float]:
        """The points of one curve that the store has, by epoch; asked once per key, and only if the run had it when opened."""
        if key not in self._epochs:
            history = self._store.client.get_metric_history(self.id, key) if key in self._metrics else []
            self._epochs[key] = {point.step: point.value for point in sorted(history, key=lambda point: point.timestamp)}
        return self._epochs[key]


def opened(place: stores.Place, begin: Callable[[stores.Store], R]) -> R | None:
    """`stores.attempt`; a run that has begun when a signal, which waited for that, ends the process is ended as well."""
    begun: list[R] = []

    def note(store: stores.Store) -> R:
        begun.append(begin(store))
        return begun[0]

    try:
        return stores.attempt(place, note)
    except BaseException as error:
        for run in begun:
            run.__exit__(type(error))
        raise


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in values.items() if isinstance(value, Real)}


def _same(value: float, known: float | None) -> bool:
    return known is not None and (value == known or (math.isnan(value) and math.isnan(known)))
