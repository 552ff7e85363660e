"""Engines that tests share, and the references they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from engine_testing import Reference, assert_idle

from rayllm import LLM


@pytest.fixture(scope="session")
def model_paths(smollm2: Path, tiny_text_model: Path, tiny_models: dict[str, Path]) -> dict[str, Path]:
    return {"smollm2": smollm2, "text": tiny_text_model, **tiny_models}


@pytest.fixture(scope="session")
def reference(smollm2_folder: Path, tiny_models: dict[str, Path]) -> Callable[[str], Reference]:
    """The reference of a model by its name: smollm2, or one of `tiny_models`."""
    folders = {"smollm2": smollm2_folder, **tiny_models}
    known: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in known:
            known[name] = Reference(folders[name])
        return known[name]

    return get


class EnginePool:
    """Starts engines, and keeps each until the cluster's CPUs are needed for another: starts cost seconds."""

    def __init__(self, model_paths: dict[str, Path]):
        self._model_paths = model_paths
        self._engines: dict[tuple[Any, ...], LLM] = {}
        self.num_cpus = int(ray.cluster_resources()["CPU"])

    def get(self, model: str, tensor_parallel_size: int = 1, **arguments: Any) -> LLM:
        key = (tensor_parallel_size, model, *sorted(arguments.items()))
        llm = self._engines.pop(key, None)
        if llm is None:
            self.make_room(tensor_parallel_size)
            llm = LLM(
                str(self._model_paths[model]),
                device="cpu",
                tensor_parallel_size=tensor_parallel_size,
                skip_tokenizer_init=model != "smollm2" and "tokenizer" not in arguments,
                progress=False,
                **arguments,
            )
        self._engines[key] = llm  # the last used is closed last
        return llm

    def make_room(self, num_cpus: int) -> None:
        """Closes engines until the cluster has so many CPUs free."""
        while num_cpus > self.num_free_cpus:
            self._engines.pop(next(iter(self._engines))).close()

    @property
    def num_free_cpus(self) -> int:
        return self.num_cpus - sum(size for size, *_ in self._engines)


@pytest.fixture(scope="session")
def engine_pool(ray_cluster: str, model_paths: dict[str, Path]) -> Iterator[EnginePool]:
    pool = EnginePool(model_paths)
    yield pool
    pool.make_room(int(ray.cluster_resources()["CPU"]))


@pytest.fixture
def engines(engine_pool: EnginePool) -> Iterator[Callable[..., LLM]]:
    """`engines(model, tensor_parallel_size, **arguments)` is an LLM that other tests use too.

    After the test it must be idle: no sequence, no block in use.
    """
    used: dict[int, LLM] = {}

    def get(*args: Any, **arguments: Any) -> LLM:
        llm = engine_pool.get(*args, **arguments)
        used[id(llm)] = llm
        return llm

    yield get
    for llm in used.values():
        assert_idle(llm)
