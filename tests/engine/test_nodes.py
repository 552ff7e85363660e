"""Shards on several nodes: a cluster of several raylets, each a node to Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from engine_testing import Reference, greedy, pids_of, tokens_of
from ray.cluster_utils import Cluster

from rayllm import LLM, EngineDeadError

ARGUMENTS = {"device": "cpu", "skip_tokenizer_init": True, "progress": False, "max_model_len": 128, "block_size": 8}


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


def test_two_shards_on_two_nodes(cluster: Cluster, tiny_models: dict[str, Path], rng):
    """Token for token as transformers; steps and tokens go over TCP. A node that leaves is noticed."""
    prompts = [[rng.randrange(199) for _ in range(rng.randint(1, 60))] for _ in range(8)]
    with LLM(str(tiny_models["llama"]), tensor_parallel_size=2, address=cluster.address, **ARGUMENTS) as llm:
        info = llm.async_llm.engine.info
        assert info.address.remote is not None
        assert len(pids_of(llm)) == 3
        nodes = {actor_node(pid) for pid in pids_of(llm)[1:]}
        assert len(nodes) == 2, "one shard on each"
        results = llm.generate(prompts, greedy(32), use_tqdm=False)
        Reference(tiny_models["llama"]).check_greedy(prompts, tokens_of(results), 32)

        stream = llm.stream([1], greedy(None))
        next(stream)
        leaving = next(node for node in cluster.worker_nodes if node.node_id != info.address.node_id)
        start = time.monotonic()
        cluster.remove_node(leaving, allow_graceful=False)
        with pytest.raises(EngineDeadError, match=r"shard [01]"):
            list(stream)
        assert time.monotonic() - start < 30


def actor_node(pid: int) -> int:
    """The raylet that a worker belongs to."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
