"""Slots for stages: on this machine, on a running Dask scheduler, or as jobs of a cluster's queue."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import math
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advml.config import Cluster
from advml.core.errors import Failure, UserError
from advml.core.messages import one_line, tell
from advml.core.provenance import source_digest
from advml.engine.stage_task import FOLDER, require_shared, token_file

if TYPE_CHECKING:
    from distributed import Client

# --cluster NAME -> class of dask_jobqueue, and its names for the account and for a job's number of cores.
QUEUES = {
    "slurm": ("SLURMCluster", "account", "job_cpu"),
    "pbs": ("PBSCluster", "account", None),
    "sge": ("SGECluster", "project", None),
    "lsf": ("LSFCluster", "project", "ncpus"),
    "oar": ("OARCluster", "project", None),
    "htcondor": ("HTCondorCluster", None, None),
    "local": ("LocalCluster", None, None),  # jobs are processes of this machine, to test the section `cluster`
}
LOCALHOST = "127.0.0.1:0"  # address of Dask's status page, which cannot be switched off; any free port
# Dask's settings of certificates, as environment variables.
CERTIFICATES = ", ".join(f"DASK_DISTRIBUTED__COMM__TLS__{name}" for name in ("CA_FILE", "CLIENT__CERT", "CLIENT__KEY"))
MOST_LOSSES = 10  # jobs that a stage may lose before it fails
PATIENCE = 30.0  # seconds to wait for a running scheduler
REMINDER = 60.0  # seconds between messages that there is no worker


@dataclass
class Slots:
    """Slots in which stages run.

    Attributes:
        token: part of the name of a file in the study's folder, by which workers check that they share the folder.
        refusals: messages of a queue that has refused jobs.
    """

    client: Client
    token: str
    refusals: list[str] = field(default_factory=list)
    _told: float = -math.inf

    def count(self) -> int:
        """Number of stages that can run at once now: one per thread of each worker. If it is 0, a message says so once a minute.

        Raises:
            Failure: the last worker is lost, and the queue has refused another job.
        """
        if count := sum(self.client.nthreads().values()):
            return count
        if self.refusals:
            raise Failure(
                f"no worker is left, and the queue refuses another job: {self.refusals[-1]}; repeat the command when it accepts jobs again"
            )
        if (now := time.monotonic()) - self._told > REMINDER:
            self._told = now
            tell(f"{self.client.scheduler.address} has no worker; waiting for one")
        return 0


@contextlib.contextmanager
def connect(where: str | None, *, root: Path, jobs: int, options: Cluster) -> Iterator[Slots]:
    """Context manager that yields slots for the stages of the study in `root`.

    Args:
        where: None: this machine, in this process; an address such as tcp://host:8786: the scheduler there and its workers;
            a name in `QUEUES`: jobs that are submitted to that queue now, and end with the context.
        jobs: number of slots; ignored for a running scheduler, whose workers determine it.
        options: the section `cluster` of params.yaml, for jobs of a queue.
    Raises:
        UserError: the scheduler cannot be reached, or the queue is unknown or refuses the job.
        Failure: a worker does not see `root`, lacks advml, or has another version of it.
    """
    from distributed import Client, LocalCluster, Security
    from distributed.comm import CommClosedError

    for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "distributed"]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # advml itself reports lost workers and cancelled tasks
    refusals, token = [], uuid.uuid4().hex
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    token_file(root, token).write_text(source_digest() if where else "")  # no check on this machine, where sources may be edited meanwhile
    with contextlib.ExitStack() as stack:
        stack.callback(token_file(root, token).unlink, missing_ok=True)
        if where is None:
            ports = {"dashboard_address": LOCALHOST, "worker_dashboard_address": LOCALHOST}
            target: Any = stack.enter_context(LocalCluster(processes=False, n_workers=1, threads_per_worker=jobs, **ports))
        elif "://" in where:
            target = where
        else:
            target = stack.enter_context(_jobs(where, root=root, jobs=jobs, options=options, refusals=refusals))
        try:
            if target == where and where.startswith("tls:") and not Security().get_connection_args("client")["ssl_context"]:
                raise ValueError(f"it needs certificates: name your files in {CERTIFICATES}")
            client = stack.enter_context(Client(target, timeout=PATIENCE, set_as_default=False))
        except (OSError, ValueError) as error:
            raise UserError(f"--cluster {where}: cannot be used ({one_line(error)})") from None
        try:
            for worker, error in client.run(require_shared, str(root.resolve()), token, on_error="return").items():
                if isinstance(error, Failure):
                    raise error
                if error:
                    raise Failure(f"worker {worker} cannot run stages ({one_line(error)}); start it in an environment with this advml")
            yield Slots(client, token, refusals)
        except CommClosedError:
            raise Failure(f"the Dask scheduler ({where}) is gone; start it and repeat the command, which goes on from here") from None


def _jobs(name: str, *, root: Path, jobs: int, options: Cluster, refusals: list[str]) -> Any:
    """Cluster whose workers are jobs of a queue; lost jobs are submitted again.

    Args:
        refusals: list to which the queue's error messages are appended, one line each.
    Raises:
        UserError: the queue is unknown, or the section `cluster` is not valid for it.
    """
    from distributed import Status

    if name not in QUEUES:
        raise UserError(f"--cluster {name!r}: choose from {', '.join(QUEUES)}, or give a scheduler's address such as tcp://host:8786")
    kind, account, cores = QUEUES[name]
    wanted = {
        "queue": options.queue,
        "walltime": options.walltime,
        account or "account": options.account,
        cores or "cores of a job": options.cores if cores else None,
        "job_extra_directives": [f"--gres=gpu:{options.gpus}"] if options.gpus and name == "slurm" else None,
    }
    if options.gpus and name != "slurm" and "job_extra_directives" not in options.options:
        raise UserError(f"cluster.gpus = {options.gpus} works for slurm only; for {name}, use cluster.options.job_extra_directives")
    logs = root / FOLDER / "jobs"
    logs.mkdir(parents=True, exist_ok=True)
    settings = {
        "cores": options.slots,
        "processes": 1,
        "memory": options.memory,
        "python": sys.executable,
        "log_directory": str(logs.resolve()),
        "scheduler_options": {"dashboard_address": LOCALHOST, "allowed_failures": MOST_LOSSES},
        "worker_extra_args": ["--dashboard-address", LOCALHOST],
        # With certificates made for this command, so that others who reach the port cannot run code.
        "protocol": "tls://",
        "security": True,
        "shared_temp_directory": str(logs.resolve()),
        **{key: value for key, value in wanted.items() if value is not None},
        **options.options,
    }
    before = signal.getsignal(signal.SIGINT)
    make = getattr(importlib.import_module(f"dask_jobqueue.{name}"), kind)
    signal.signal(signal.SIGINT, before)  # the import replaces the handler by a silent exit with code 0
    known = {key for part in (*make.job_cls.__mro__, *make.__mro__) for key in inspect.signature(part.__init__).parameters}
    if strange := settings.keys() - known:
        raise UserError(f"params.yaml: cluster.options has {min(strange)!r}, which dask_jobqueue.{kind} does not take")

    class Job(make.job_cls):
        async def start(self) -> None:
            try:
                await super().start()
            except (OSError, RuntimeError, ValueError) as error:  # dask-jobqueue would log it, and wait for the job for ever
                refusals.append(one_line(error))
                self.status = Status.running

    wanted_jobs = -(-jobs // options.slots)
    try:
        cluster = make(**settings, job_cls=Job)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--cluster {name}: the section `cluster` of params.yaml is not valid for it: {one_line(error)}") from None
    cluster.scale(jobs=wanted_jobs)
    cluster.sync(lambda: cluster)  # waits until all jobs are submitted
    if refusals:
        cluster.close()
        raise UserError(f"--cluster {name} refuses the job that the section `cluster` of params.yaml describes: {refusals[0]}")
    cluster.adapt(minimum_jobs=wanted_jobs, maximum_jobs=wanted_jobs)
    return cluster
