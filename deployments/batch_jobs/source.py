"""The rows of a batch job as a source of Ray Data."""

from __future__ import annotations

import functools

import pyarrow
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from deployments.batch_jobs.input import Row, read_lines


class RowSource(Datasource):
    """Each portion of rows is a block of Ray Data's with two columns, `key` and `row`, read where the files are.

    The methods are those that Ray Data asks of a `Datasource`.
    """

    def __init__(self, portions: list[list[Row]]):
        super().__init__()
        self._portions = portions

    def get_name(self) -> str:
        return "Rows"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[ReadTask]:
        return [
            ReadTask(functools.partial(_read, rows), BlockMetadata(len(rows), None, None)) for rows in self._portions
        ]


def _read(rows: list[Row]) -> list[pyarrow.Table]:
    return [pyarrow.table({"key": [row.key for row in rows], "row": list(read_lines(rows))})]
