"""A sweep's trials as tasks of a Ray cluster that is there already; ``fastslots.sweep.trials`` says what a trial is.

Every node needs fastslots, and the sweep's folder under the same path: results are files, as on one machine. So the
same command goes on after a stop, here or without Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastslots.errors import UserError, first_line
from fastslots.sweep.trials import Processes, Scoring, Trial, TrialResult, progress_line, run_trial


def run_on_ray(
    trials: Sequence[Trial],
    cpus: float = 1,
    gpus: float = 0,
    scoring: Scoring | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[TrialResult]:
    """As ``run_trials``; cpus, gpus: what each trial asks of the cluster, which decides how many run at once.

    A trial whose node is lost has failed; the others go on. An exception here asks the running ones to stop at a
    checkpoint. Raises UserError where there is no Ray, or no cluster.
    """
    ray = _connected()
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_task)
    waiting = {task.remote(trial, scoring, max(1, int(cpus))): trial for trial in trials}
    results: dict[str, TrialResult] = {}
    try:
        while waiting:
            for done in ray.wait(list(waiting))[0]:
                trial = waiting.pop(done)
                try:
                    result = ray.get(done)
                except ray.exceptions.RayError as error:
                    result = TrialResult(trial, {}, " ".join(str(error).split())[-300:])
                results[trial.name] = result
                say(progress_line(result, len(results), len(trials)))
    except BaseException:
        for left in waiting:
            ray.cancel(left, force=False)
        if waiting:
            ray.wait(list(waiting), num_returns=len(waiting), timeout=60)
        raise
    return [results[trial.name] for trial in trials]


def _connected() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs ray: pip install 'fastslots[ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init(address="auto", log_to_driver=False)
        except (ConnectionError, RuntimeError) as error:
            raise UserError(
                f"no Ray cluster is found ({first_line(error)}): start one (`ray start --head`) or set RAY_ADDRESS"
            ) from None
    return ray


def _task(trial: Trial, scoring: Scoring | None, threads: int) -> TrialResult:
    """On a node of the cluster."""
    processes = Processes(threads)
    try:
        return run_trial(trial, scoring, processes)
    except BaseException:  # cancelled: the trial's process stops at a checkpoint
        processes.stop()
        raise
