"""Pretrained weights of timm and of the Hugging Face Hub, with one-line errors."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm

from engine.errors import UserError, nearest

# Packages whose errors mean that the download failed.
_NETWORK = ("huggingface_hub", "requests", "httpx", "httpcore", "urllib3", "urllib", "socket", "ssl")


@contextlib.contextmanager
def fetching(name: str) -> Iterator[None]:
    """Turn errors of `timm.create_model(..., pretrained=True)` into UserError.

    Args:
        name: `timm:NAME` or `hf-hub:ID`, for the message.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = _explained(name, error)
        if message is None:
            raise
        raise UserError(f"checkpoint {name}: {message}") from error


def _explained(name: str, error: Exception) -> str | None:
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
    architecture = name.removeprefix("timm:")
    if isinstance(error, RuntimeError) and "Unknown model" in str(error):
        hint = nearest(architecture.split(".")[0], timm.list_models()).split(" known:")[0].rstrip(";")
        return f"timm has no such architecture{hint} (timm.list_models() has all)"
    if isinstance(error, RuntimeError) and ("pretrained weights" in str(error) or "pretrained tag" in str(error)):
        return f"{first} (timm.list_pretrained('{architecture.split('.')[0]}*') has all)"
    # Errors of the network are raised from one another: the reason may be any of them.
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {type(each).__name__ for each in chain}
    if kinds & {"RepositoryNotFoundError", "GatedRepoError"}:
        return (
            f"the Hub has no such repository, or it is not open to you ({first}); check the name, or log in by "
            "hf auth login"
        )
    if "EntryNotFoundError" in kinds and "LocalEntryNotFoundError" not in kinds:
        return f"the repository holds no model that timm opens ({first}); name one with config.json and weights of timm"
    fetched = any(
        isinstance(each, (ConnectionError, TimeoutError)) or type(each).__module__.split(".")[0] in _NETWORK
        for each in chain
    )
    if not fetched:
        return None
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    return (
        f"its weights are not on this machine and could not be fetched ({first}); "
        + ("HF_HUB_OFFLINE is set: unset it" if offline else "connect to huggingface.co (HF_HUB_OFFLINE is not set)")
        + ", fetch them to this machine's cache once, or give a local folder or file of weights"
    )


def hub_folder(name: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the local copy of a transformers model on the Hub, and its config.json; None for a timm model.

    Args:
        name: `owner/name` or `owner/name@revision`.
    """
    import huggingface_hub

    repository, _, revision = name.partition("@")
    options: dict[str, Any] = {"revision": revision or None}
    path = Path(huggingface_hub.hf_hub_download(repository, "config.json", **options))
    config = json.loads(path.read_text(encoding="utf-8"))
    if not config.get("model_type"):
        return None
    patterns = ["*.json", "*.safetensors", "pytorch_model*.bin"]
    return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns, **options)), config
