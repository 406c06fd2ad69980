"""What record.json holds of a run: the entries that `engine.jobs.task` has it written with."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine._version import __version__
from engine.audit.record import IDS, SALT, Record, canonical, hashed_ids, recorded, verify_record
from engine.audit.signature import signer
from engine.config import read_yaml
from engine.core.result import UnlearnResult
from engine.errors import UserError
from engine.models.image_processor import PROCESSOR
from engine.models.slice_stages import STAGES
from engine.runtime.environment import commit
from engine.runtime.files import full_disk, replacing
from engine.runtime.process_group import ProcessGroup

# What a run folder holds at the end of a training, and of an unlearning that was evaluated.
TRAINED = ("config.yaml", "history.jsonl", "config.json", "model.safetensors")
UNLEARNED = (*TRAINED, "metrics.json", "report.html")

# More ids than these go to record.ids, so that a person can still open record.json: 1,000 hashes are 67 kB of it.
MOST_IDS = 1_000

# Of config.yaml, not of the record's entry `config`: the request by name, and the digest of its samples.
_NOT_CONFIG = ("forget", "samples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """What a caller decides about the record of a run.

    key: PEM file of the Ed25519 private key that signs it. plain_ids: keep ids as they are; the record is then personal
    data itself. request: what else is known of the request (received, deadline, source, ...), as JSON values.
    """

    key: Path | None = None
    plain_ids: bool = False
    request: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        """Raises UserError for a key that cannot sign: before the work, not after it."""
        key = self.key
        if key is not None:
            ProcessGroup.current().on_main(lambda: signer(key))


@dataclasses.dataclass(frozen=True)
class Origin:
    """How a run folder says that its model was made.

    samples_sha256: `Samples.fingerprint()` of what was retained. forgotten: how many samples it was to forget; 0 in a
    training. data: spec of the source. before_sha256: `weights_sha256` of the model that was unlearned. init: of a
    training from another checkpoint, as `engine.jobs.task.init_model` notes it.
    """

    method: str
    samples_sha256: str
    said_by: str
    forgotten: int = 0
    data: str | None = None
    before_sha256: str | None = None
    init: Mapping[str, Any] | None = None

    @property
    def is_training(self) -> bool:
        """Whether the model was trained on those samples alone, in one go or in slices."""
        return self.method == "retrain" or (self.method == "s3t" and not self.forgotten)


def origin(folder: Path) -> Origin | None:
    """By its record where there is one, else by its config.yaml; None for a checkpoint that another program trained.

    Raises UserError for a record that was changed, or that covers files that were.
    """
    data = recorded(folder, "data")
    if data is not None:
        if problems := verify_record(folder):
            raise UserError(f"{folder}: its record does not hold ({problems[0]}); take a folder that nobody changed")
        config, said_by = recorded(folder, "config"), "record.json"
    elif (folder / "config.yaml").is_file():
        config = data = read_yaml(folder / "config.yaml")
        said_by = "config.yaml"
    else:
        return None
    config, samples = config or {}, (data or {}).get("samples", {})
    method, digest = config.get("method"), samples.get("retain_sha256")
    if not method or not digest:
        return None
    return Origin(
        method=method,
        samples_sha256=digest,
        said_by=said_by,
        forgotten=int(samples.get("forget", 0)),
        data=(data or {}).get("spec") or config.get("data"),
        before_sha256=(recorded(folder, "weights") or {}).get("before"),
        init=config.get("init"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordedRequest:
    """A forget request as a record keeps it.

    Attributes:
        counts: Kind (ids, class, random or none) and numbers of samples.
        ids: Ids to forget; the record keeps them hashed.
        data: Spec of the data source.
    """

    counts: Mapping[str, Any]
    ids: Sequence[str]
    data: str


def write_record(
    folder: Path,
    result: UnlearnResult,
    *,
    request: RecordedRequest,
    weights: Mapping[str, Any],
    environment: Mapping[str, Any],
    metrics: Mapping[str, Any] | None,
    files: Sequence[str],
    options: RecordOptions,
) -> None:
    """Write record.json of a run whose other files are final; call it on the main rank alone.

    Args:
        folder: Run folder.
        result: What the run returned.
        request: The forget request.
        weights: `weights_sha256` of the models, by role.
        environment: Machine and versions.
        metrics: Contents of metrics.json; None for a training.
        files: Names of the files that the record covers.
        options: Who signs it, and what else it holds.
    """
    record = Record.start(folder)
    ids, bad_images = _ids(folder, sorted(request.ids), result.bad_images, options.plain_ids)
    counts = {key: value for key, value in result.config["samples"].items() if key != "forget_sha256"}
    record.append("request", {**options.request, **request.counts, "ids": ids})
    record.append("data", {"spec": request.data, "samples": counts})
    record.append("code", code())
    record.append("environment", dict(environment))
    record.append("config", {key: value for key, value in result.config.items() if key not in _NOT_CONFIG})
    record.append("weights", weights)
    record.append("events", {"events": result.events, "bad_images": bad_images})
    if metrics is not None:
        record.append("metrics", metrics)
    record.seal(folder, [*files, *(name for name in (IDS, STAGES, PROCESSOR) if (folder / name).exists())], options.key)


def _ids(
    folder: Path, forget: list[str], bad_images: Mapping[str, str], plain: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `ids` of the request and the `bad_images` of the events, and the files that they need."""
    form: dict[str, Any] = {"form": "plain"}
    lists = {"forget": forget, "bad_images": sorted(bad_images)}
    if not plain and any(lists.values()):
        salt = secrets.token_bytes(32)
        _write_private(folder / SALT, salt)
        form = {"form": "hmac-sha256", "salt_sha256": hashlib.sha256(salt).hexdigest()}
        lists = {name: hashed_ids(ids, salt) for name, ids in lists.items()}
    counts = {name: {"count": len(ids)} for name, ids in lists.items()}
    if sum(map(len, lists.values())) > MOST_IDS:
        with replacing(folder / IDS) as temporary:
            temporary.write_bytes(canonical(lists) + b"\n")
        return {**form, "file": IDS}, {**counts["bad_images"], "file": IDS}
    return {**form, "forget": lists["forget"]}, {**counts["bad_images"], "ids": lists["bad_images"]}


def _write_private(path: Path, data: bytes) -> None:
    """Makes a file that nobody but its owner could read at any moment."""
    with full_disk(path, "nothing was recorded"):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(descriptor)


def code() -> dict[str, Any]:
    """Which code ran: version, SHA-256 over all modules of engine and kernels, and the commit where there is one.

    commit: None, or hash and whether files differ from it.
    """
    digest = hashlib.sha256()
    for folder, package in (("engine", "engine"), ("kernels", "lethe_kernels")):
        place = Path(next(iter(importlib.import_module(package).__path__)))
        for path in sorted(place.rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{folder}/{path.relative_to(place).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return {"lethe": __version__, "sha256": digest.hexdigest(), "commit": commit()}
