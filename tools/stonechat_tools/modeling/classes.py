"""Many device classes: the same task over processes on this machine, or over the machines of a Dask cluster.

A class that is done is not done again: its outcome.json names the digest of what it was made from. Dask was chosen of
the two engines that were measured: a training takes seconds, so what an engine adds to a task (0.5 ms with Ray, 6 ms
with Dask) does not count, but 40 MB against 246 MB and 1.8 s against 6.9 s until ready do.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from stonechat import __version__
from stonechat.errors import ConfigError, StonechatError

from ..console import install_command, write_atomic
from .task import DONE, Task, make

Outcome = dict[str, Any]
View = Callable[[int], AbstractContextManager[Callable[[Outcome], None]]]
_BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def train_classes(
    tasks: list[Task], jobs: int = 1, engine: str = "local", address: str | None = None, view: View | None = None
) -> list[Outcome]:
    """Do the tasks -> their outcomes in the order of the tasks; a class that failed has `error` instead of figures and
    stops no other. Those done before are taken from their outcome.json."""
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: want at least 1")
    done = {task.name: outcome for task in tasks if (outcome := _done_before(task)) is not None}
    left = [task for task in tasks if task.name not in done]
    runner = {"local": _local, "dask": _dask}[engine]
    if view is None:
        for outcome in runner(left, jobs, address):
            done[outcome["name"]] = outcome
    else:
        with view(len(tasks)) as shown:
            for outcome in [*done.values()]:
                shown(outcome)
            for outcome in runner(left, jobs, address):
                done[outcome["name"]] = outcome
                shown(outcome)
    return [done[task.name] for task in tasks]


def work(task: Task) -> Outcome:
    """One task, wherever it runs. An error that a user can fix becomes an outcome with `error`."""
    try:
        outcome = make(task)
        outcome["made_from"] = made_from(task)
        write_atomic(Path(task.output) / DONE, (json.dumps(outcome) + "\n").encode())
    except (StonechatError, OSError) as error:
        return {"name": task.name, "error": str(error)}
    return outcome


def made_from(task: Task) -> str:
    """A digest of all that a model depends on."""
    digest = hashlib.sha256(json.dumps([__version__, task.name, task.version, asdict(task.options)]).encode())
    for path in task.recordings:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _done_before(task: Task) -> Outcome | None:
    try:
        outcome: Outcome = json.loads((Path(task.output) / DONE).read_text())
        whole = (Path(task.output) / "model.tflite").exists() and outcome["made_from"] == made_from(task)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return outcome if whole else None


def _local(tasks: list[Task], jobs: int, _address: str | None) -> Iterator[Outcome]:
    if jobs == 1:
        yield from map(work, tasks)
        return
    for name in _BLAS_THREADS:  # as many threads as processes is slower, not faster
        os.environ.setdefault(name, "1")
    with ProcessPoolExecutor(min(jobs, max(1, len(tasks))), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(work, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield _outcome(future, futures[future])
        except KeyboardInterrupt:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _outcome(future: Any, task: Task) -> Outcome:
    try:
        outcome: Outcome = future.result()
    except Exception as error:  # a worker that was killed, a machine that went away
        return {"name": task.name, "error": f"its worker failed: {error!r}"}
    return outcome


def _dask(tasks: list[Task], jobs: int, address: str | None) -> Iterator[Outcome]:
    try:
        from distributed import Client, LocalCluster
        from distributed import as_completed as dask_completed
    except ImportError as error:
        raise ConfigError(f"--engine dask needs distributed ({error}): {install_command('dask')}") from None
    if address is None:
        cluster = LocalCluster(n_workers=jobs, threads_per_worker=1, dashboard_address=None)
        client = Client(cluster)
    else:
        cluster, client = None, Client(address, timeout=30)
    try:
        futures = client.map(work, tasks, pure=False)
        by_key = {future.key: task for future, task in zip(futures, tasks, strict=True)}
        for future in dask_completed(futures):
            yield _outcome(future, by_key[future.key])
    finally:
        client.close()
        if cluster is not None:
            cluster.close()
