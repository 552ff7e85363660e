"""The rows of a batch job as a source of Ray Data."""

from __future__ import annotations

import functools

import pyarrow
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from deployments.batch_jobs.input import Row, read_lines


class RowSource(Datasource):
    """Each batch of rows is a block of two columns, `key` and `row`, read where the files are."""

    def __init__(self, batches: list[list[Row]]):
        super().__init__()
        self._batches = batches

    def get_name(self) -> str:
        return "Rows"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[ReadTask]:
        return [
            ReadTask(functools.partial(_read, batch), BlockMetadata(len(batch), None, None)) for batch in self._batches
        ]


def _read(batch: list[Row]) -> list[pyarrow.Table]:
    return [pyarrow.table({"key": [row.key for row in batch], "row": read_lines(batch)})]
