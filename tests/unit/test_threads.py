"""How long a shard's threads spin while they wait for each other."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from rayllm.engine.shard import SPIN_COUNT

CODE = """
from rayllm.config import EngineConfig
from rayllm.engine.shard import Shard
Shard(None, None, 0, 0)
import torch
"""


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({}, SPIN_COUNT),
        ({"OMP_WAIT_POLICY": "passive"}, 0),
        ({"GOMP_SPINCOUNT": "70"}, 70),
    ],
)
def test_torchs_openmp_takes_it(given: dict[str, str], count: int):
    """Unless the user has decided."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=environment | {"OMP_DISPLAY_ENV": "verbose"} | given,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    if "GOMP" not in done.stderr:
        pytest.skip("this torch runs on another OpenMP")
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr) == [str(count)]
