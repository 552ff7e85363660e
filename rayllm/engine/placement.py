"""Connects to Ray and reserves the resources of engines: a placement group for each, with a bundle for each shard."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import grpc
import ray
import yaml
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from tqdm import tqdm

from rayllm.caches import is_writable
from rayllm.config import DeviceName
from rayllm.engine import ray_private
from rayllm.errors import UsageError

logger = logging.getLogger("rayllm")

Resources = dict[str, float]

SHARD: dict[DeviceName, Resources] = {"cpu": {"CPU": 1}, "cuda": {"GPU": 1}}
"""What a shard needs, by its device."""

CONNECT_TIMEOUT_S = 5.0
"""Longest wait for the first answer of a cluster; `ray.init` alone would try an address nobody serves for minutes."""
HEAD_TIMEOUT_S = 30.0
"""Longest wait for the head node to tell what its autoscaler can add."""
POLL_S = 0.5


def connect(address: str | None, min_cpus: int) -> bool:
    """Connects this process to Ray; True if it started Ray itself, which the caller then shuts down.

    `address` is that of a cluster ("host:port"), "auto" for the one running on this machine, or "local". None means
    the RAY_ADDRESS of the environment or, without one, a Ray started here with at least `min_cpus` CPUs. A process
    that is connected already stays as it is. Raises `UsageError` if the cluster cannot be used or reached.
    """
    given = os.environ.get("RAY_ADDRESS")
    address = given if given and address in (None, "auto") else address or "local"
    if "://" in address or (ray.is_initialized() and ray_private.is_client()):
        raise UsageError(
            "the engine's own connections cannot cross a Ray client (ray://): run on a machine of the cluster, "
            "with address='auto' or 'host:port'",
            "address",
        )
    if ray.is_initialized():
        return False
    start = address == "local"
    options = {"include_dashboard": False, "num_cpus": max(os.cpu_count() or 1, min_cpus)} if start else {}
    if start:
        _provide_token()
    else:
        _check_reachable(address)
    try:
        with ray_private.without_uv_run() if start else contextlib.nullcontext():
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, namespace="rayllm", **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())
        action = "start" if start else "connect to"
        raise UsageError(f"cannot {action} Ray (address {address}): {reason}", "address") from None
    return start


def _provide_token() -> None:
    """Gives a Ray that is to start here its token if it could not write one to the user's folder."""
    if not is_writable(Path("~/.ray")) and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _check_reachable(address: str) -> None:
    hint = "give the host:port that `ray start --head` printed"
    try:
        cluster = ray_private.cluster_at(address)
    except (ConnectionError, ValueError, OSError):
        raise UsageError(f"no Ray cluster found at address {address}: {hint}", "address") from None
    if os.environ.get("RAY_USE_TLS", "0") not in ("0", ""):
        return
    answer = ray_private.ask(cluster, CONNECT_TIMEOUT_S)
    if answer not in (grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED):
        raise UsageError(f"no Ray cluster answers at {cluster}: {hint}", "address")
    has_token = address == "auto" or os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    if answer == grpc.StatusCode.UNAUTHENTICATED and not has_token:
        raise UsageError(
            f"the Ray cluster at {cluster} asks for a token: before Python starts, set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN unless the token is in ~/.ray/auth_token",
            "address",
        )


def choose_device(requested: DeviceName | Literal["auto"]) -> DeviceName:
    """CUDA for "auto" where the cluster has GPUs or its autoscaler may add some. Touches no GPU."""
    if requested != "auto":
        return requested
    nodes, shard = _nodes(), SHARD["cuda"]
    if not _can_hold(nodes, [shard], "PACK"):
        addable = _addable_nodes(count=1)
        nodes = [shard] if addable is None else nodes + addable
    return "cuda" if _can_hold(nodes, [shard], "PACK") else "cpu"


def bundles_of(tensor_parallel_size: int, device: DeviceName) -> list[Resources]:
    """What an engine reserves: bundle i is shard i's, bundle 0 also the driver's."""
    return [{"CPU": 1} | SHARD[device]] + [SHARD[device]] * (tensor_parallel_size - 1)


def reserve(
    tensor_parallel_size: int, device: DeviceName, placement_timeout_s: float, progress: bool = True
) -> PlacementGroup:
    """A placement group that is ready, for one engine: see `reserve_all`."""
    [group] = reserve_all(1, tensor_parallel_size, device, placement_timeout_s, progress)
    return group


def reserve_all(
    num_engines: int,
    tensor_parallel_size: int,
    device: DeviceName,
    placement_timeout_s: float,
    progress: bool = True,
) -> list[PlacementGroup]:
    """One placement group for each engine, all ready, of the bundles of `bundles_of`.

    Their strategy is STRICT_PACK, or PACK where no node of the cluster, present or to be added, can ever hold all
    bundles of an engine. Raises `UsageError` at once if the cluster can never hold them, and after
    `placement_timeout_s` seconds if its resources stay taken or its autoscaler adds none; nothing stays reserved then.
    `progress` shows the wait on stderr.
    """
    bundles = bundles_of(tensor_parallel_size, device)
    strategy = feasible_strategy(bundles, num_engines)
    groups = [placement_group(bundles, strategy) for _ in range(num_engines)]
    try:
        _wait(groups, bundles, placement_timeout_s, progress)
    except BaseException:
        for group in groups:
            release(group)
        raise
    return groups


def release(group: PlacementGroup) -> None:
    """Gives the resources back; Ray ends what still runs on them."""
    if ray.is_initialized():
        remove_placement_group(group)


def feasible_strategy(bundles: list[Resources], num_engines: int, count: str = "num_engines") -> str:
    """STRICT_PACK, or PACK if only that can ever be met. Raises `UsageError` if the cluster can never hold so many
    engines of these bundles; `count` is the argument that says how many.

    Before this process is connected to Ray, the cluster is what a Ray that starts on this machine would have.
    """
    nodes, every = _nodes(), bundles * num_engines
    if _can_hold(nodes, bundles, "STRICT_PACK") and _can_hold(nodes, every, "PACK"):
        return "STRICT_PACK"
    addable = _addable_nodes(count=len(every))
    if addable is None:
        return "STRICT_PACK"
    if not _can_hold(nodes + addable, every, "PACK"):
        remedies = " or ".join([*_remedies(bundles, num_engines, count), "add nodes"])
        raise UsageError(
            f"{_cause(bundles, num_engines)} {_lack(every, nodes, addable)}: {remedies}", _param(bundles, num_engines)
        )
    if _can_hold(nodes + addable, bundles, "STRICT_PACK"):
        return "STRICT_PACK"
    logger.info("no single node can hold %s: the shards span nodes (PACK)", _text(_sum(bundles), bundles))
    return "PACK"


def check_room(bundles: list[Resources]) -> None:
    """Raises `UsageError` if the cluster can never hold the bundles of all models together."""
    nodes = _nodes()
    if not _can_hold(nodes, bundles, "PACK"):
        addable = _addable_nodes(count=len(bundles))
        if addable is not None and not _can_hold(nodes + addable, bundles, "PACK"):
            raise UsageError(f"the models need {_lack(bundles, nodes, addable)}: serve fewer or add nodes", "models")


def _cause(bundles: list[Resources], num_engines: int) -> str:
    """What needs so much."""
    size = "device=cuda" if bundles == bundles_of(1, "cuda") else f"tensor_parallel_size={len(bundles)}"
    return f"{size} needs" if num_engines == 1 else f"{num_engines} engines of {size} need"


def _lack(needed: list[Resources], nodes: list[Resources], addable: list[Resources]) -> str:
    """What is needed beside what there is and may come."""
    grown = f" and can grow to {_text(_sum(nodes + addable), needed)}" if addable else " and nothing can add nodes"
    return f"{_text(_sum(needed), needed)}, but the cluster has {_text(_sum(nodes), needed)}{grown}"


def _remedies(bundles: list[Resources], num_engines: int, count: str) -> list[str]:
    """What of the engines' arguments would let them fit."""
    lower = [count] * (num_engines > 1) + ["tensor_parallel_size"] * (len(bundles) > 1)
    return [f"lower {', '.join(lower)}"] if lower else ["use device=cpu"] if "GPU" in bundles[0] else []


def _param(bundles: list[Resources], num_engines: int) -> str:
    return "device" if bundles == bundles_of(1, "cuda") and num_engines == 1 else "tensor_parallel_size"


def waiting(
    are_placed: Callable[[], bool],
    bundles: list[Resources],
    num_engines: int,
    timeout_s: float,
    count: str = "num_engines",
) -> Iterator[tuple[float, str]]:
    """Yields the seconds so far and what is free, until `are_placed` says that the engines have their bundles. Raises
    `UsageError` after `timeout_s`."""
    start = time.monotonic()
    while not are_placed():
        elapsed = time.monotonic() - start
        free = _text(ray.available_resources(), bundles)
        total = _text(_sum(_nodes()), bundles)
        if elapsed >= timeout_s:
            remedies = [*_remedies(bundles, num_engines, count), "free or add resources"]
            raise UsageError(
                f"{_cause(bundles, num_engines)} {needed_by(bundles, num_engines)}, but after {timeout_s:g} s only "
                f"{free} of the cluster's {total} are free: {', '.join(remedies)}, or raise placement_timeout_s",
                _param(bundles, num_engines),
            )
        yield elapsed, f"{free} of {total} free"


def needed_by(bundles: list[Resources], num_engines: int) -> str:
    """What so many engines need, as in "4 GPU + 1 CPU"."""
    return _text(_sum(bundles * num_engines), bundles)


def _wait(groups: list[PlacementGroup], bundles: list[Resources], timeout_s: float, progress: bool) -> None:
    """Returns when the `groups` have their resources; `UsageError` after `timeout_s`."""

    def are_placed() -> bool:
        return all(group.wait(min(POLL_S, timeout_s)) for group in groups)

    stage = f"waiting for {needed_by(bundles, len(groups))}"
    is_logged = progress and not sys.stderr.isatty()
    with tqdm(
        desc=stage,
        total=timeout_s,
        bar_format="{desc}{postfix} [{n:.0f} of {total:.0f} s]",
        delay=1,
        mininterval=1,
        leave=False,
        disable=not progress or None,
    ) as bar:
        for elapsed, free in waiting(are_placed, bundles, len(groups), timeout_s):
            if is_logged and elapsed >= POLL_S:
                is_logged = False  # where there is no bar, one line
                print(f"{stage}, {free}", file=sys.stderr)
            bar.set_postfix_str(free, refresh=False)
            bar.update(elapsed - bar.n)


def local_host() -> str:
    """This node's address as other nodes see it."""
    address: str = ray.util.get_node_ip_address()
    return address or socket.gethostbyname(socket.gethostname())


def has_many_nodes() -> bool:
    """Whether the cluster has more than one living node."""
    return len(_nodes()) > 1


def _nodes() -> list[Resources]:
    """The resources, taken or not, of each living node; of this machine while there is no connection."""
    if not ray.is_initialized():
        return [{"CPU": os.cpu_count() or 1, "GPU": ray_private.count_gpus_here()}]
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _can_hold(nodes: list[Resources], bundles: list[Resources], strategy: str) -> bool:
    """Whether `nodes`, if they were free, could hold all `bundles`; only STRICT_PACK means one single node."""
    if strategy == "STRICT_PACK":
        whole = _sum(bundles)
        return any(all(node.get(name, 0) >= amount for name, amount in whole.items()) for node in nodes)
    left = [dict(node) for node in nodes]
    for bundle in bundles:
        node = next((n for n in left if all(n.get(name, 0) >= amount for name, amount in bundle.items())), None)
        if node is None:
            return False
        for name, amount in bundle.items():
            node[name] -= amount
    return True


def _addable_nodes(count: int) -> list[Resources] | None:
    """The nodes an autoscaler may still add, at most `count` of a type: [] without one, None if that is unknown."""
    if not ray.is_initialized():
        return []
    try:
        found = ray_private.read_autoscaler_file(HEAD_TIMEOUT_S)
    except ray.exceptions.RayError as error:
        logger.info("cannot tell what the autoscaler may add: %s", error)
        return None
    if found is None:
        return None if ray_private.has_autoscaler_elsewhere() else []
    configuration = yaml.safe_load(found) or {"available_node_types": {}}
    nodes: list[Resources] = []
    for name, node_type in configuration["available_node_types"].items():
        is_head = name == configuration["head_node_type"]
        limit = min(count, node_type.get("max_workers", 0 if is_head else configuration.get("max_workers", count)))
        if limit > 0 and not node_type.get("resources"):
            return None  # known only once such a node runs
        nodes += [node_type["resources"]] * limit
    return nodes


def _sum(items: list[Resources]) -> Resources:
    return {name: sum(item.get(name, 0) for item in items) for name in ("GPU", "CPU")}


def _text(resources: Resources, bundles: list[Resources]) -> str:
    """What there is of the resources that the bundles ask for, as in "4 GPU + 1 CPU"."""
    return " + ".join(f"{resources.get(name, 0):g} {name}" for name in ("GPU", "CPU") if _sum(bundles)[name])
