"""Kubernetes: custom resources of KubeRay v1, a RayCluster that stays or a RayJob that trains and ends.

KubeRay (1.5.1 or newer) starts Ray itself and, for `authOptions`, makes the token: a secret that every pod gets.
"""

from __future__ import annotations

import shlex
from typing import Any

from cluster.nodes.manifests.plan import ManifestPlan
from cluster.nodes.node import NODE_DEFAULTS

# /dev/shm of a pod, for Ray's object store and NCCL's buffers. Kubernetes alone gives 64 MiB. What is used of it counts
# as memory of the node.
SHARED_MEMORY_GIB = 8


def ray_cluster(plan: ManifestPlan, *, image: str, claim: str) -> dict[str, Any]:
    """A RayCluster for KubeRay, with nodes as large as the plan says.

    Args:
        image: container image with this package and the version of Ray that it needs.
        claim: PersistentVolumeClaim, writable by many pods, that is mounted at `plan.shared_dir`.
    """
    return _resource("RayCluster", plan, _cluster_spec(plan, image, claim))


def ray_job(plan: ManifestPlan, *, image: str, claim: str) -> dict[str, Any]:
    """A RayJob, which starts a RayCluster, trains on it and ends it. The arguments are those of `ray_cluster`."""
    return _resource(
        "RayJob",
        plan,
        {
            "entrypoint": shlex.join(plan.train_command),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,  # to read the logs
            "rayClusterSpec": _cluster_spec(plan, image, claim),
        },
    )


def _resource(kind: str, plan: ManifestPlan, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": plan.name}, "spec": spec}


def _cluster_spec(plan: ManifestPlan, image: str, claim: str) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"rayStartParams": {}, "template": _pod(plan, image, claim, "head")},
    }
    if plan.num_nodes > 1:
        count = plan.num_nodes - 1
        spec["workerGroupSpecs"] = [
            {
                "groupName": "workers",
                **dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), count),
                "rayStartParams": {},
                "template": _pod(plan, image, claim, "worker"),
            }
        ]
    return spec


def _pod(plan: ManifestPlan, image: str, claim: str, role: str) -> dict[str, Any]:
    resources: dict[str, Any] = {"cpu": plan.cpus_per_node, "memory": f"{plan.memory_gib_per_node}Gi"}
    if plan.gpus_per_node:
        resources["nvidia.com/gpu"] = plan.gpus_per_node
    container = {
        "name": f"ray-{role}",
        "image": image,
        "env": [{"name": name, "value": value} for name, value in NODE_DEFAULTS.items()],
        "resources": {"requests": resources, "limits": dict(resources)},
        "volumeMounts": [
            {"name": "shared", "mountPath": plan.shared_dir},
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 a mount of the pod's own
        ],
    }
    return {
        "spec": {
            "containers": [container],
            "volumes": [
                {"name": "shared", "persistentVolumeClaim": {"claimName": claim}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{SHARED_MEMORY_GIB}Gi"}},
            ],
        }
    }
