"""The coordinator: turns the global load of each step into the next bias.

Rank 0 has a copy of its state. So no step is lost when it dies: a restarted coordinator asks rank 0 for the state
(NeedState) and goes on. The policy is plain Python; the actor around it only carries bytes.
"""

import importlib
import os
from dataclasses import dataclass
from typing import Any

import torch

from dispatch.laws import Law
from workers.control.leader import CoordinatorUnreachable
from workers.control.wire import (
    MAX_MESSAGE_BYTES,
    BiasUpdate,
    LoadReport,
    NeedState,
    Refusal,
    Seed,
    VersionedState,
    WireError,
    decode,
    encode,
    law_checksum,
    max_message_bytes,
)


class CoordinatorPolicy:
    """Decides the answer to each message of one run. It starts empty; a report with a seed gives it law and state.

    It keeps two states: the base, from which it computed the last update, and that update. A report that builds on the
    update shows that the ranks applied it. A report that builds on the base shows that they did not (the optimizer
    skipped the step), or that the report came twice. Then the update is computed again: the same load gives the same
    bytes.

    Args:
        run_id: the only run that it serves; None serves every run. It is never taken from a message: else the run that
            reports first would shut out the others.
    """

    def __init__(self, run_id: str | None = None) -> None:
        self._run_id = run_id
        self._law: Law | None = None
        self._law_checksum = -1
        self._max_bytes = MAX_MESSAGE_BYTES
        self._held: tuple[VersionedState, ...] = ()  # the base and the update computed from it
        self._status: dict[str, int] = {"reports": 0, "refused": 0, "reseeds": 0, "last_step": -1, "version": -1}

    def handle(self, raw: bytes) -> bytes:
        """Answer one LoadReport with a BiasUpdate, NeedState or Refusal. Bad input is refused and changes nothing."""
        try:
            report = decode(raw, self._max_bytes)
            if not isinstance(report, LoadReport):
                raise WireError(f"a {type(report).__name__} is not for the coordinator")
            return encode(self._answer(report))
        except (ValueError, ArithmeticError) as error:  # ArithmeticError: a law may overflow on absurd numbers
            self._status["refused"] += 1
            return encode(Refusal(reason=str(error)))

    def status(self) -> dict[str, Any]:
        """Counters, for people and tests: run_id, reports, refused, reseeds after the first, last_step, version."""
        return {"run_id": self._run_id, **self._status}

    def _answer(self, report: LoadReport) -> BiasUpdate | NeedState:
        if self._run_id not in (None, report.run_id):
            raise WireError(
                f"this coordinator serves run {self._run_id!r}, not {report.run_id!r}; start one for each run"
            )
        law, base = self._law, self._find_base(report)
        if base is None and report.seed is not None:
            law, base = _from_seed(report, report.seed)
        if base is None or law is None:
            return NeedState(step=report.step)
        state = law.update(report.counts_M, base.state, report.step)
        if not all(bool(value.isfinite().all()) for value in (state.bias_N, *state.extras.values())):
            raise ValueError(f"law {law.config.law!r} answers these counts with a state that is not finite")
        # The state changes here only, after every check: a refused report leaves it as it was.
        self._keep(report, law, base, VersionedState(base.version + 1, state))
        return BiasUpdate(step=report.step, version=base.version + 1, state=state)

    def _find_base(self, report: LoadReport) -> VersionedState | None:
        # The version alone is not enough: a run that went back to a checkpoint reaches the same versions again.
        if report.law_checksum != self._law_checksum:
            return None
        wanted = (report.base_version, report.base_checksum)
        return next((held for held in self._held if (held.version, held.checksum) == wanted), None)

    def _keep(self, report: LoadReport, law: Law, base: VersionedState, proposal: VersionedState) -> None:
        if law is not self._law:
            self._status["reseeds"] += self._law is not None
            # Never less than before: else a message with a smaller law, sent by mistake, would have the run's next
            # reports refused as too long.
            bound = max_message_bytes(law)
            self._max_bytes = bound if self._law is None else max(self._max_bytes, bound)
        self._law, self._law_checksum = law, report.law_checksum
        self._held = (base, proposal)
        self._status["reports"] += 1
        self._status["last_step"], self._status["version"] = report.step, proposal.version


def _from_seed(report: LoadReport, seed: Seed) -> tuple[Law, VersionedState]:
    """The law and the base state of a report that brings a seed."""
    law = Law(seed.config, seed.layout)
    base = VersionedState(report.base_version, seed.state)
    if not law.fits(seed.state):
        raise ValueError(f"the seed's state is not one of law {seed.config.law!r} for {seed.layout.total} experts")
    if (base.checksum, law_checksum(seed.config, seed.layout)) != (report.base_checksum, report.law_checksum):
        raise ValueError("the seed does not match the checksums of its report")
    return law, base


class CoordinatorActor:
    """The Ray actor around the policy. If its process dies, Ray restarts it, and it starts empty."""

    def __init__(self, run_id: str, law_module: str | None = None) -> None:
        if law_module:
            importlib.import_module(law_module)  # Imported at the start: no message may have a module imported.
        # Ray leaves all GPUs visible to an actor that reserves none. This one must not open a CUDA context on them.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(1)
        self._policy = CoordinatorPolicy(run_id)

    def handle(self, raw: bytes) -> bytes:
        return self._policy.handle(raw)

    def status(self) -> dict[str, Any]:
        """The policy's status and the process that answers, for people and for tests that kill it."""
        return {**self._policy.status(), "pid": os.getpid()}


@dataclass(frozen=True)
class CoordinatorClient:
    """Rank 0's way to the coordinator: a function from bytes to bytes. It can be pickled, to travel to a worker.

    Raises:
        CoordinatorUnreachable: no answer within `timeout_s`, or the actor is dead or restarting.
    """

    actor: Any
    timeout_s: float

    def __call__(self, raw: bytes) -> bytes:
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            answer: bytes = ray.get(self.actor.handle.remote(raw), timeout=self.timeout_s)
        except RayTaskError:
            raise  # An exception inside the coordinator is a bug: it keeps its traceback.
        except RayError as error:
            text = str(error).strip().split("\n", 1)[0]  # Ray's further lines guess at causes.
            raise CoordinatorUnreachable(f"{type(error).__name__}: {text}") from error
        return answer


def start_coordinator(run_id: str, law_module: str | None = None) -> Any:
    """Start the actor in the connected Ray. Returns its handle without waiting; a call of `status` waits for the actor.

    It runs on this node, and Ray restarts it on another one if this node dies. It reserves no CPU, since a worker would
    then lack one.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    remote_class = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(CoordinatorActor)
    return remote_class.options(scheduling_strategy=this_node).remote(run_id, law_module)
