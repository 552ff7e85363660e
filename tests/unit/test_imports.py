"""The driver's policy is plain Python: its modules load without torch and without ray."""

import subprocess
import sys

import pytest

MODULES = ("config", "errors", "sampling_params", "messages.step", "scheduling.scheduler")


@pytest.mark.parametrize("module", MODULES)
def test_neither_torch_nor_ray(module):
    code = f"import sys, rayllm.{module}; print(*sorted({{'torch', 'ray'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []
