"""What the manifests say to Kubernetes, Slurm and `ray up`, against the published schemas and Ray's own validator."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest

from cluster.nodes.manifests.kuberay import ray_cluster, ray_job
from cluster.nodes.manifests.plan import ManifestPlan
from cluster.nodes.manifests.ray_up import ray_up
from cluster.nodes.manifests.slurm import slurm_script

SCHEMAS = Path(__file__).parents[1] / "schemas"
PLANS = (
    ManifestPlan(num_nodes=1),
    ManifestPlan(num_nodes=4, gpus_per_node=8, name="a-1", train_arguments=("--run.name", "it's $HOME; `x`")),
)
KUBERAY = {"image": "registry.example/trimtab:1", "claim": "shared"}


def complaints(kind: str, manifest: dict) -> list[str]:
    schema = json.loads((SCHEMAS / f"kuberay-{kind}-v1.schema.json").read_text())
    return [
        f"{error.json_path}: {error.message}" for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    ]


@pytest.mark.parametrize("plan", PLANS)
def test_kuberay_manifests_hold_to_the_published_schemas(plan):
    assert complaints("rayclusters", ray_cluster(plan, **KUBERAY)) == []
    assert complaints("rayjobs", ray_job(plan, **KUBERAY)) == []


def test_the_schemas_find_a_misspelt_field():
    manifest = ray_job(PLANS[1], **KUBERAY)
    container = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    container["imagePullPolcy"] = "Always"
    [complaint] = complaints("rayjobs", manifest)
    assert "imagePullPolcy" in complaint


def test_kuberay_demands_the_token_and_starts_one_pod_a_node():
    spec = ray_cluster(PLANS[1], **KUBERAY)["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    [group] = spec["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 3)
    for template in (spec["headGroupSpec"]["template"], group["template"]):
        assert template["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert "workerGroupSpecs" not in ray_cluster(PLANS[0], **KUBERAY)["spec"]


@pytest.mark.parametrize("run_name", [None, "it's $HOME; `x`"])
@pytest.mark.parametrize("plan", PLANS)
def test_the_slurm_script_is_one_that_bash_and_shellcheck_accept(plan, run_name, tmp_path):
    path = tmp_path / "script"
    path.write_text(slurm_script(plan, time_limit="1-00:00:00", run_dir="/a b/runs", run_name=run_name))
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "| head" not in path.read_text()  # SIGPIPE and pipefail would end it now and then
    if shutil.which("shellcheck"):
        # That the $ in a name, quoted, does not expand is what is wanted.
        subprocess.run(["shellcheck", "--exclude=SC2016", str(path)], check=True)
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", path.read_text(), re.MULTILINE))
    assert directives["nodes"] == str(plan.num_nodes)
    assert directives.get("gpus-per-node", "0") == str(plan.gpus_per_node)
    assert directives["ntasks-per-node"] == "1"


@pytest.mark.parametrize("workers", [(), ("10.0.0.2", "10.0.0.3")])
def test_rays_own_validator_accepts_the_file_of_ray_up(workers):
    from ray.autoscaler._private.util import prepare_config, validate_config

    plan = ManifestPlan(num_nodes=1 + len(workers), gpus_per_node=8)
    manifest = ray_up(plan, head="10.0.0.1", workers=workers, ssh_user="me")
    validate_config(prepare_config(manifest))
    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        validate_config(prepare_config(manifest | {"max_wrokers": 2}))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_nodes": 0}, r"num_nodes \(0\) must be at least 1"),
        ({"name": "Not_So"}, "small letters"),
        ({"shared_dir": "shared; rm"}, "absolute path"),
        ({"memory_gib_per_node": 1}, "at least 4"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        ManifestPlan(**{"num_nodes": 2} | setting)
