import pytest

from cluster.config import ClusterConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_workers": 0}, r"cluster\.num_workers \(0\) must be at least 1"),
        ({"threads_per_worker": -1}, r"cluster\.threads_per_worker \(-1\)"),
        ({"cpus_per_worker": 0}, r"cluster\.cpus_per_worker \(0\)"),
        ({"gpus_per_worker": -1}, r"cluster\.gpus_per_worker \(-1\)"),
        ({"device": "cpu", "gpus_per_worker": 1}, r"must be 0 when cluster\.device is cpu; leave it empty"),
        ({"device": "cuda", "gpus_per_worker": 0}, r"must be above 0 when cluster\.device is cuda"),
        ({"device": "tpu"}, r"cluster\.device \('tpu'\) must be auto, cpu or cuda"),
        ({"start_timeout_s": float("nan")}, r"cluster\.start_timeout_s \(nan\) must be above 0 seconds and finite"),
        ({"cpus_per_worker": float("nan")}, r"cluster\.cpus_per_worker \(nan\) must be above 0 and finite"),
        ({"gpus_per_worker": float("inf")}, r"cluster\.gpus_per_worker \(inf\) must be at least 0 and finite"),
        ({"device": "t" * 1000}, r"cluster\.device \('t{59}\) must be"),
        ({"collective_timeout_s": 0}, r"cluster\.collective_timeout_s \(0\) must be above 0 seconds"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(values, message):
    with pytest.raises(ValueError, match=message):
        ClusterConfig(**values)
