"""Finds a model: a Hugging Face folder, a .gguf file, a Hub id, a URL, or a configuration for random weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from tqdm import tqdm

from rayllm.caches import is_writable, writable_cache
from rayllm.checkpoint import bucket
from rayllm.checkpoint.files import check_file, read_json
from rayllm.checkpoint.gguf import converted, located
from rayllm.checkpoint.safetensors import WEIGHTS, check_weights, weight_files
from rayllm.errors import UsageError
from rayllm.model_config import ModelConfig
from rayllm.models.config_json import read_config
from rayllm.progress import Track, untracked

T = TypeVar("T")

SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model", "*.txt"]
"""What is fetched of a model folder beside its weights."""
UNWANTED = ["*/*", "consolidated*"]  # other formats of the same weights
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelSource:
    """A model that was found: `path` holds the weights (a folder, a .gguf file; for 'dummy' where the
    configuration was), `tokenizer_path` is a folder with tokenizer files, None when there are none."""

    path: str
    format: Literal["safetensors", "gguf", "dummy"]
    config: ModelConfig
    tokenizer_path: str | None
    origin: str | None = None
    """The Hub id or URL that it comes from. Its paths are then this node's own, and weights may still be missing."""

    def on_this_node(self, *, weights: bool, track: Track = untracked) -> ModelSource:
        """The model on the node where this is called, fetched if need be; without `weights` only what is small.

        Raises UsageError if it is not there.
        """
        if self.origin is not None:
            return _fetched(self.origin, self.format == "dummy", weights, track)
        if not Path(self.path).exists():
            raise UsageError(
                f"{self.path} is not on this node: give a path that all nodes share, a Hub id or a URL such as s3://…",
                "model",
            )
        return self


def resolve_model(model: str, load_format: Literal["auto", "dummy"] = "auto", progress: bool = True) -> ModelSource:
    """Finds `model` and reads its configuration; no weights are read, nor fetched but for a .gguf file.

    model: a folder with config.json and .safetensors files, a .gguf file, a Hub id ('owner/name'), the URL of a folder
    or .gguf file that pyarrow reads, or with `load_format` 'dummy' also a bare config .json file. Raises UsageError
    when there is nothing that can be served.
    """
    is_dummy = load_format == "dummy"
    path = Path(model).expanduser()
    if is_remote(model):
        track = _bar if progress else untracked
        return _fetched(model, is_dummy, weights=False, track=track)
    if path.suffix == ".gguf" and not is_dummy:
        return _gguf(path, progress)
    if path.is_file() and path.suffix == ".json" and is_dummy:
        return ModelSource(str(path), "dummy", read_config(read_json(path)), None)
    if not path.is_dir():
        raise UsageError(
            f"no model at {model!r}: give a folder with config.json and .safetensors files, a .gguf file, a Hub id or "
            "a URL",
            "model",
        )
    return _folder(path, is_dummy)


def is_remote(model: str) -> bool:
    """Whether that is a Hub id or a URL, and nothing that lies here."""
    is_id = HUB_ID.fullmatch(model) and not model.endswith(".gguf") and model[0] != "."
    return "://" in model or bool(is_id and not Path(model).expanduser().exists())


def fetch(origin: str, patterns: list[str], track: Track = untracked) -> Path:
    """This node's copy of a Hub id's or URL's files that fit `patterns`. Raises UsageError if they cannot be had."""
    return bucket.fetch(origin, patterns, track) if "://" in origin else _download(origin, patterns)


def _fetched(origin: str, is_dummy: bool, weights: bool, track: Track) -> ModelSource:
    """The model of a Hub id or URL, on this node."""
    path = fetch(origin, [*SMALL_FILES, WEIGHTS] if weights and not is_dummy else SMALL_FILES, track)
    source = _gguf(path, progress=False) if path.suffix == ".gguf" else _folder(path, is_dummy, has_weights=weights)
    return dataclasses.replace(source, origin=origin)


def _bar(items: Sequence[T], stage: str) -> Iterator[T]:
    """A `Track` on stderr."""
    yield from tqdm(items, stage, leave=False, delay=1, disable=None)


def _gguf(file: Path, progress: bool) -> ModelSource:
    if not file.is_file():
        raise UsageError(f"no file {file}", "model")
    check_file(file)
    folder = converted(file, progress)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{file} is a vocabulary without a model: name it with tokenizer", "model")
    try:
        config = read_config(read_json(folder / "config.json"))
    except UsageError as error:
        raise UsageError(f"{file}: {error}", error.param) from error
    return ModelSource(str(located(file)), "gguf", config, str(folder))


def _folder(folder: Path, is_dummy: bool, has_weights: bool = True) -> ModelSource:
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json: it is not a Hugging Face model folder", "model")
    generation = folder / "generation_config.json"
    config = read_config(read_json(folder / "config.json"), read_json(generation) if generation.is_file() else None)
    weights = [] if is_dummy else weight_files(folder)
    if not is_dummy and has_weights and not weights:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        found = "only pickled weights, which can run code" if pickled else "no weights"
        raise UsageError(
            f"{folder} has {found}: rayllm reads .safetensors (or load_format='dummy': random ones)", "model"
        )
    if has_weights:
        check_weights(weights)
    path = str(folder.resolve())
    return ModelSource(
        path, "dummy" if is_dummy else "safetensors", config, path if any(folder.glob("tokenizer*")) else None
    )


def _download(repo: str, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def download(**where: Any) -> Path:
        found = huggingface_hub.snapshot_download(repo, allow_patterns=patterns, ignore_patterns=UNWANTED, **where)
        return Path(found)

    try:
        if is_writable(Path(huggingface_hub.constants.HF_HUB_CACHE)):
            return download()
        try:  # it may have come with the image of a container
            return download(local_files_only=True)
        except LocalEntryNotFoundError:
            return download(cache_dir=writable_cache("hub"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{repo!r} is no local path and could not be downloaded from the Hugging Face Hub "
            f"({type(error).__name__}: {reason}): check the name and the network, or pass a local folder",
            "model",
        ) from error
