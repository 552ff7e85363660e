"""All use of what Ray does not promise to keep, one small function for each contract.

`tests/serve/test_ray_private.py` and `tests/engine/test_placement.py` exercise each by name, so that a version of Ray
that breaks one fails there.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import grpc
import ray
from ray._private import ray_constants, services
from ray._private.accelerators import get_accelerator_manager_for_resource
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.experimental.internal_kv import _internal_kv_exists, _internal_kv_get, _internal_kv_put
from ray.util.placement_group import placement_group_table


def cluster_at(address: str) -> str:
    """The host:port of the cluster that `ray.init(address)` would connect to; it alone knows what "auto" means.

    Contract: `ray._private.services.canonicalize_bootstrap_address` raises `ConnectionError`, `ValueError` or `OSError`
    where there is none.
    """
    found: str = services.canonicalize_bootstrap_address(address)
    return found


def ask(cluster: str, timeout_s: float) -> grpc.StatusCode:
    """What the control store (GCS) of the cluster at `cluster` (host:port) answers within `timeout_s`, without TLS.

    It is UNAUTHENTICATED where the cluster asks for a token. Contract: the call that `ray.init` makes first.
    """
    with grpc.insecure_channel(cluster, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=timeout_s)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


@contextlib.contextmanager
def without_uv_run() -> Iterator[None]:
    """Meanwhile `ray.init` of a process under `uv run` does as in any other process.

    Else Ray uploads the working folder, which must then be below 512 MiB, and starts each process through `uv run` in a
    copy of it: on the same machine to no purpose. Contract: `ray._private.ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV`.
    """
    known = ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    try:
        yield
    finally:
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = known


def is_client() -> bool:
    """Whether this process is connected through a Ray client (ray://). Contract: `ray.util.client.ray`."""
    return bool(ray.util.client.ray.is_connected())


def is_worker() -> bool:
    """Whether this process, connected to Ray, is a task's or actor's. Contract: the runtime context's `worker.mode`."""
    return bool(ray.get_runtime_context().worker.mode == ray.WORKER_MODE)


def count_gpus_here() -> int:
    """How many GPUs a Ray that is started on this machine would find; initialises none of them.

    Contract: `ray._private.accelerators`.
    """
    number: int = get_accelerator_manager_for_resource("GPU").get_current_node_num_accelerators()
    return number


def kv_put(namespace: bytes, key: str, value: bytes) -> None:
    """Writes to the cluster's key-value store, which every process of it can read.

    Contract: `ray.experimental.internal_kv._internal_kv_put`.
    """
    _internal_kv_put(key, value, overwrite=True, namespace=namespace)


def kv_get(namespace: bytes, key: str) -> bytes | None:
    """What `kv_put` wrote last, None before. Contract: `ray.experimental.internal_kv._internal_kv_get`."""
    value: bytes | None = _internal_kv_get(key, namespace=namespace)
    return value


def read_autoscaler_file(timeout_s: float) -> str | None:
    """The configuration (YAML) of the autoscaler that runs on the head node: "" if that one has nothing to scale, None
    if none runs there.

    Ray tells nobody what its autoscaler is set to: the cluster's state has a place for it (`get_cluster_config`, which
    Ray Data asks), but no autoscaler of open-source Ray fills it, and `ray.autoscaler.v2.sdk` tells of nodes that are
    there or on their way, not of those that may come. So this reads the autoscaler's command line.

    Contract: `ray up` and `ray start --head` start `monitor.py` beside the head node's other processes, with
    `--gcs-address` and, if there is something to scale, `--autoscaling-config`; the head node has the resource
    `node:__internal_head__`. Raises `ray.exceptions.RayError` when the head node does not answer within `timeout_s`.
    """

    def find() -> str | None:  # travels by value: the head node need not have rayllm
        gcs_address = f"--gcs-address={ray.get_runtime_context().gcs_address}"
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                arguments = path.read_text().split("\0")
            except OSError:  # the process is gone, or somebody else's
                continue
            if gcs_address in arguments and any(name.endswith("/monitor.py") for name in arguments):
                files = [a.partition("=")[2] for a in arguments if a.startswith("--autoscaling-config=")]
                return Path(files[0]).expanduser().read_text() if files else ""
        return None

    task = ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001}, max_retries=0)(find)
    found: str | None = ray.get(task.remote(), timeout=timeout_s)
    return found


def has_autoscaler_elsewhere() -> bool:
    """Whether an autoscaler reports to the cluster that may run elsewhere than on its head node, as KubeRay's does.

    Contract: `ray.autoscaler.v2.utils.is_autoscaler_v2`, and for older ones the key "__autoscaling_status".
    """
    return bool(is_autoscaler_v2(fetch_from_server=True) or _internal_kv_exists("__autoscaling_status"))


def quiet_ray_data() -> None:
    """Leaves what Ray Data logs to its file.

    Contract: the logger "ray.data", once `ray.data` is imported, has the handler "console".
    """
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.CRITICAL)


def log_folder() -> Path:
    """The folder of Ray's logs, of the same name on each node; Serve's are in its folder "serve".

    Contract: `ray._private.worker._global_node.get_logs_dir_path()`.
    """
    return Path(ray._private.worker._global_node.get_logs_dir_path())


def count_serve_places(app: str, deployment: str) -> int:
    """How many replicas of a Serve deployment have the resources of their placement groups.

    Contract: Serve calls the group of a replica SERVE_REPLICA::APP#DEPLOYMENT#ID.
    """
    prefix = f"SERVE_REPLICA::{app}#{deployment}#"
    groups = [group for group in placement_group_table().values() if group["name"].startswith(prefix)]
    return sum(group["state"] == "CREATED" for group in groups)


def serve_http_options() -> tuple[str, int]:
    """The host and port where the Serve of this cluster listens; `serve.start` leaves those of one that runs already.

    Contract: `ray.serve.context._get_global_client().http_config`.
    """
    from ray import serve

    options = serve.context._get_global_client().http_config
    return options.host, options.port


def serve_request_id() -> str:
    """The id of the request that a Serve replica works on.

    Contract: `ray.serve.context._get_serve_request_context().request_id`.
    """
    from ray import serve

    request_id: str = serve.context._get_serve_request_context().request_id
    return request_id


def serve_session_id() -> str:
    """The session that a request to a Serve replica belongs to (a handle's option, or x-session-id), or else "".

    Contract: `ray.serve.context._get_serve_request_context().session_id`.
    """
    from ray import serve

    session_id: str = serve.context._get_serve_request_context().session_id
    return session_id
