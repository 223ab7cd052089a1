"""Run one training phase for `pretrain` and `finetune`: resume, train, track, write files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advml import tracking
from advml.core import ranks
from advml.core.exclusive import exclusive
from advml.core.io import replace_folder, to_json, write_atomically
from advml.core.messages import tell
from advml.core.progress import Bar
from advml.core.training_cost import write_seconds
from advml.models import network
from advml.pipeline.context import Context
from advml.training.checkpoint import Checkpoint, Progress, is_unfinished
from advml.training.cost import GRADIENT_STEPS
from advml.training.streams import batches_per_epoch
from advml.training.trainer import Plan, Record, fit


@dataclass(frozen=True)
class Job:
    """One training phase of one model, with the folder of its result."""

    stage: str  # "pretrain" or "finetune"
    name: str
    folder: Path
    plan: Plan
    identity: dict[str, Any]  # kind, scheme, phase or regime, seed, pretraining
    parameters: dict[str, Any]  # the sections of params.yaml that affect the result


def learn(context: Context, job: Job, *, reuse: bool) -> dict[str, Any]:
    """Train `job`, resuming an interrupted training; write its folder and history, and log its run. Returns the content of model.json.

    With `reuse`, a folder that was made from the same inputs is kept.
    """
    device = context.machine.device  # asked first, because this joins the process group
    if not ranks.is_first():
        return _follow(context, job)
    with exclusive(context.workspace.scratch(f"{job.stage}-{job.name}"), work=f"{job.stage} {job.name} is running"):
        return _lead(context, job, device, reuse=reuse)


def _lead(context: Context, job: Job, device: torch.device, *, reuse: bool) -> dict[str, Any]:
    """Train in the first process, which writes all files."""
    inputs = context.fingerprint(job.stage, job.identity, job.parameters, context.dataset.digest)
    record = {"name": job.name, **job.identity, **context.provenance, "parameters": job.parameters, "inputs": inputs}
    scratch = context.workspace.scratch(f"{job.stage}-{job.name}")
    if reuse and network.is_whole(job.folder) and not is_unfinished(scratch, inputs):
        made = network.read_record(job.folder)
        if made.get("inputs") == inputs:
            ranks.any_of(True, device)
            return made
    checkpoint = Checkpoint(scratch, inputs)
    ranks.any_of(False, device)
    runs = {"run_id": checkpoint.notes.get("run_id"), "discarded": checkpoint.orphan}
    tracked = tracking.open_run(context.tracking, record=record, **runs)
    with tracked as run, Bar(f"{job.stage} {job.name}", total=_work(context, job)) as bar:
        checkpoint.note(run_id=run.id)
        history = _train(context, job, checkpoint, run, bar) if job.plan.task else []
        ended = checkpoint.load() if history else Progress()
        about = {"epoch": ended.best_epoch, "gradient_steps": round(sum(one[GRADIENT_STEPS] for one in history), 2)}
        with replace_folder(job.folder) as folder:
            digest = network.save(job.plan.network, folder, record | about)
        write_seconds(context.workspace, job.name, digest=digest, seconds=ended.seconds)
        write_atomically(context.workspace.report(job.name) / "history.json", to_json(history, indent=1))
        tracking.log_model(run, job.folder, digest=digest)
    checkpoint.note(finished=True)
    ranks.barrier()
    return network.read_record(job.folder)


def _follow(context: Context, job: Job) -> dict[str, Any]:
    """Train in a process other than the first, which writes all files, and decides whether there is anything to train."""
    if not ranks.any_of(False, context.machine.device):
        if job.plan.task:
            scratch = context.workspace.scratch(f"{job.stage}-{job.name}")
            fit(job.plan, context.machine, checkpoint=Checkpoint(scratch))
        ranks.barrier()
    return network.read_record(job.folder)


def _train(context: Context, job: Job, checkpoint: Checkpoint, run: tracking.Run, bar: Bar) -> list[Record]:
    """Train, and say after which epoch an interrupted training is resumed, or would be."""
    epochs, training = job.plan.epochs, f"note: {job.stage} {job.name}"
    per_epoch = _work(context, job) // epochs
    history: list[Record] = []

    def log(record: Record) -> None:
        history.append(record)
        run.log_epochs(history)

    def show(epoch: int, done: int, loss: Tensor) -> None:
        if history and not bar.done:  # the first batch
            tell(f"{training}: resuming after epoch {len(history)} of {epochs}")
        bar.reach((epoch - 1) * per_epoch + done, lambda: f"epoch {epoch}/{epochs}  loss {loss:.3f}{_scores(history)}")

    try:
        fit(job.plan, context.machine, checkpoint=checkpoint, on_epoch=log, on_batch=show)
    except (KeyboardInterrupt, SystemExit):
        saved = checkpoint.load()
        where = f"continues after epoch {saved.epoch} of {epochs}" if saved else "starts again: no epoch has finished"
        tell(f"{training}: interrupted; the same command {where}")
        raise
    return history


def _work(context: Context, job: Job) -> int:
    """Number of batches in all epochs, with those of validation."""
    if not job.plan.task:
        return 0
    validation = -(-len(context.dataset.validation) // job.plan.phase.batch_size)
    return (batches_per_epoch(job.plan.dataset, job.plan.phase) + validation) * job.plan.epochs


def _scores(history: list[Record]) -> str:
    """Latest validation scores, for the progress bar."""
    last = history[-1] if history else {}
    return "".join(f"  {key} {value:.3f}" for key, value in last.items() if key.startswith("validation/"))
