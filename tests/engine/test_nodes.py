"""Shards on several nodes: a cluster of several raylets, each a node to Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from engine_testing import Reference, greedy, pids_of, tokens_of
from ray.cluster_utils import Cluster

from rayllm import LLM, EngineDeadError

pytestmark = pytest.mark.slow

ARGUMENTS: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "placement_timeout_s": 3.0,
    "device": "cpu",
    "skip_tokenizer_init": True,
    "progress": False,
    "max_model_len": 256,
    "block_size": 8,
}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes of one; this process is on the head."""
    assert not ray.is_initialized()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def llm(cluster: Cluster, tiny_models: dict[str, Path]) -> Iterator[LLM]:
    with LLM(str(tiny_models["llama"]), address=cluster.address, **ARGUMENTS) as llm:
        yield llm


def test_two_shards_on_two_nodes(cluster: Cluster, llm: LLM, tiny_models: dict[str, Path], rng):
    """Token for token as transformers; steps and tokens go over TCP. A node that leaves is noticed."""
    prompts = [[rng.randrange(199) for _ in range(rng.randint(1, 60))] for _ in range(8)]
    assert llm.async_llm.engine.info.address.remote is not None
    assert len(pids_of(llm)) == 3
    nodes = {actor_node(pid) for pid in pids_of(llm)[1:]}
    assert len(nodes) == 2, "one shard on each"
    results = llm.generate(prompts, greedy(32), use_tqdm=False)
    Reference(tiny_models["llama"]).check_greedy(prompts, tokens_of(results), 32)

    stream = llm.stream([1], greedy(None))
    next(stream)
    start = time.monotonic()
    remove_other(cluster, llm)
    with pytest.raises(EngineDeadError, match=r"shard [01]"):
        list(stream)
    assert time.monotonic() - start < 30
    assert llm.async_llm.engine.trouble == "the cluster had no place for the engine within 3 s"


def test_another_node(cluster: Cluster, llm: LLM, tiny_models: dict[str, Path]):
    """It takes the place of one that leaves, and the answers go on."""
    stream = llm.stream([1], greedy(150))
    output = next(stream).token_ids
    remove_other(cluster, llm)
    cluster.add_node(num_cpus=1)
    output += [token_id for increment in stream for token_id in increment.token_ids]
    Reference(tiny_models["llama"]).check_greedy([[1]], [output], 150)


def remove_other(cluster: Cluster, llm: LLM) -> None:
    """Ends a node that has a shard, but not the driver."""
    driver = llm.async_llm.engine.info.address.node_id
    leaving = next(node for node in cluster.worker_nodes if node.node_id != driver)
    cluster.remove_node(leaving, allow_graceful=False)


def actor_node(pid: int) -> int:
    """The raylet that a worker belongs to."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
