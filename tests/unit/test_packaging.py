"""What is installed is what is written: packages, data files, and no clash with another `kernels`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, folder: Path, **settings: Any) -> str:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, **settings)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_packages_are_importable_from_any_folder(tmp_path: Path) -> None:
    run_python("import rayllm, rayllm_kernels, deployments", tmp_path)


def test_packages_are_found_beside_folders_of_their_names(tmp_path: Path) -> None:
    """A clone's, say; also where nothing but the install leads to them."""
    for name in ("rayllm", "rayllm_kernels", "deployments"):
        (tmp_path / name).mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import rayllm_kernels.norm, deployments.config; from rayllm import SamplingParams; print(SamplingParams())"
    assert run_python(code, tmp_path, env=environment).startswith("SamplingParams(")


def test_transformers_finds_hugging_faces_kernels_beside_ours() -> None:
    """In the repository's root, where a folder of that name lies."""
    code = "import rayllm_kernels, kernels, transformers.integrations.hub_kernels; print(kernels.__file__)"
    assert "site-packages" in run_python(code, ROOT)


def test_wheel_contains_all_modules(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves files behind
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "tests", "*.egg-info", "__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source]
    subprocess.run(command, check=True)
    [wheel] = tmp_path.glob("rayllm-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("rayllm-")}
    folders = {"rayllm": ROOT / "rayllm", "deployments": ROOT / "deployments"}
    folders["rayllm_kernels"] = ROOT / "kernels" / "rayllm_kernels"
    expected = {
        f"{package}/{file.relative_to(folder)}"
        for package, folder in folders.items()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert packed == expected
