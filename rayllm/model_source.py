"""Finds a model: a Hugging Face folder, a .gguf file, a Hub id, or a configuration for random weights."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rayllm.errors import UsageError
from rayllm.gguf_index import converted
from rayllm.model_config import ModelConfig

LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelSource:
    """A model that was found: `path` holds the weights (a folder, a .gguf file; for 'dummy' where the
    configuration was), `tokenizer_path` is a folder with tokenizer files, None when there are none."""

    path: str
    format: Literal["safetensors", "gguf", "dummy"]
    config: ModelConfig
    tokenizer_path: str | None


def resolve_model(
    model: str, load_format: str = "auto", revision: str | None = None, progress: bool = True
) -> ModelSource:
    """Finds `model` and reads its configuration; no weights are read.

    model: a folder with config.json and .safetensors files, a .gguf file, a Hub id ('owner/name', downloaded
    at `revision`), or with `load_format` 'dummy' also a bare config .json file. Raises UsageError when there
    is nothing that can be served.
    """
    if load_format not in LOAD_FORMATS:
        raise UsageError(f"load_format {load_format!r} is unknown: use one of {', '.join(LOAD_FORMATS)}")
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and load_format in ("auto", "gguf"):
        return _gguf(path, progress)
    if path.is_file() and path.suffix == ".json" and load_format == "dummy":
        return ModelSource(str(path), "dummy", ModelConfig.from_hf(_read_json(path)), None)
    if not path.exists() and HUB_ID.fullmatch(model) and not model.startswith("."):
        path = _download(model, revision, load_format == "dummy")
    if not path.is_dir():
        raise UsageError(
            f"no model at {model!r}: give a folder with config.json and .safetensors files, a .gguf file or a Hub id"
        )
    if load_format == "gguf":
        raise UsageError(f"load_format 'gguf' needs a .gguf file, but {model!r} is a folder")
    return _folder(path, "dummy" if load_format == "dummy" else "safetensors")


def _gguf(file: Path, progress: bool) -> ModelSource:
    if not file.is_file():
        raise UsageError(f"no file {file}")
    folder = converted(file, progress)
    config = ModelConfig.from_hf(_read_json(folder / "config.json"))
    return ModelSource(str(file.resolve()), "gguf", config, str(folder))


def _folder(folder: Path, load_format: Literal["safetensors", "dummy"]) -> ModelSource:
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    generation = folder / "generation_config.json"
    config = ModelConfig.from_hf(
        _read_json(folder / "config.json"), _read_json(generation) if generation.is_file() else None
    )
    if load_format == "safetensors" and not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        found = "only pickled weights, which can run code" if pickled else "no weights"
        raise UsageError(f"{folder} has {found}: rayllm reads .safetensors (or load_format='dummy': random ones)")
    path = str(folder.resolve())
    return ModelSource(path, load_format, config, path if any(folder.glob("tokenizer*")) else None)


def _download(repo: str, revision: str | None, without_weights: bool) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    unwanted = ["*/*", "consolidated*"]  # other formats of the same weights
    if without_weights:
        unwanted.append("*.safetensors")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=unwanted
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"{repo!r} is no local path and could not be downloaded from the Hugging Face Hub "
            f"({type(error).__name__}: {reason}): check the name and the network, or pass a local folder"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} must hold a JSON object")
    return content
