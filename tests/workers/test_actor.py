"""What the actor's shell does without Ray: exceptions on their way to the driver, and counting cores."""

import os
import pickle

from workers.actor import Failure, WorkerActor, parse_gpu_ids, usable_cores


class NeedsKeyword(Exception):
    def __init__(self, *, step: int) -> None:
        super().__init__(f"at step {step}")


def raised(error: Exception, cause: Exception | None = None) -> Failure:
    try:
        raise error from cause
    except Exception as caught:  # noqa: BLE001
        return Failure.from_error(caught)


def test_an_exception_travels_as_itself_if_pickling_keeps_it_and_as_text_always():
    kept = pickle.loads(pickle.dumps(raised(ValueError("a bad batch"))))
    assert isinstance(kept.error, ValueError)
    text_only = raised(NeedsKeyword(step=3))
    assert text_only.error is None
    assert text_only.message == "NeedsKeyword: at step 3"
    assert "test_actor.py" in text_only.trace


def test_a_broken_connection_is_collateral_also_when_another_error_wraps_it():
    broken = RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:4242")
    assert raised(broken).collateral
    assert raised(LookupError("reduction failed at step 3"), broken).collateral
    assert not raised(ValueError("a bad batch")).collateral


def test_calls_return_what_the_method_returns_or_the_failure_also_for_a_method_that_is_missing():
    actor = WorkerActor({}, pickle.dumps(dict))
    actor._worker = {"a": 1}
    assert actor.call("get", "a") == actor.control("get", "a") == 1
    assert actor.call("pop", "b").message == "KeyError: 'b'"
    assert "AttributeError" in actor.call("train").message


def test_gpus_are_in_order_and_may_be_named_by_uuid():
    assert parse_gpu_ids(["10", "2"]) == (2, 10)
    assert parse_gpu_ids(["MIG-b", "MIG-a"]) == ("MIG-a", "MIG-b")  # as Ray gives them where CUDA_VISIBLE_DEVICES does


def test_usable_cores_are_at_least_one_and_no_more_than_the_machine_has():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
