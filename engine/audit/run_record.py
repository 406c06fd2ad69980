"""The entries of record.json for a run, as `engine.jobs.task` has them written."""

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
from engine.audit.record import Record, hashed_ids, recorded
from engine.audit.record_check import verify_record
from engine.audit.record_format import IDS, SALT, canonical
from engine.audit.signature import signer
from engine.config import read_yaml
from engine.core.result import UnlearnResult
from engine.errors import UserError
from engine.models.image_processor import PROCESSOR
from engine.models.slice_stages import STAGES
from engine.runtime.environment import commit
from engine.runtime.files import full_disk, replacing
from engine.runtime.process_group import ProcessGroup

# Files of a run folder at the end of a training, and of an unlearning that was evaluated.
TRAINED = ("config.yaml", "history.jsonl", "config.json", "model.safetensors")
UNLEARNED = (*TRAINED, "metrics.json", "report.html")

# More ids than this are in record.ids, so that record.json stays readable: 1,000 hashes take 67 kB.
MOST_IDS = 1_000

# Keys of config.yaml that the record's entry `config` leaves out: the request by name, and the digest of its samples.
_NOT_CONFIG = ("forget", "samples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """Options of the record of a run.

    Attributes:
        key: PEM file of the Ed25519 private key that signs the record; None: it is not signed.
        plain_ids: Store ids in plain text; the record is then personal data itself.
        request: Further entries of the request (received, deadline, source, ...), as JSON values.
    """

    key: Path | None = None
    plain_ids: bool = False
    request: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        """Check the key before the work, not after it.

        Raises:
            UserError: The key cannot sign.
        """
        key = self.key
        if key is not None:
            ProcessGroup.current().on_main(lambda: signer(key))


@dataclasses.dataclass(frozen=True)
class Origin:
    """How the model of a run folder was made, by the files of the folder.

    Attributes:
        method: Name of the method.
        samples_sha256: `Samples.fingerprint()` of the retain set.
        source: File that the origin was read from: record.json or config.yaml.
        forgotten: Number of samples of the forget set; 0 for a training.
        data: Spec of the data source.
        before_sha256: `weights_sha256` of the model that was unlearned.
        init: For a training from another checkpoint, that checkpoint as noted by `engine.jobs.task.init_model`.
    """

    method: str
    samples_sha256: str
    source: str
    forgotten: int = 0
    data: str | None = None
    before_sha256: str | None = None
    init: Mapping[str, Any] | None = None

    @property
    def is_training(self) -> bool:
        """Whether the model was trained on the retain set alone, at once or in slices."""
        return self.method == "retrain" or (self.method == "s3t" and not self.forgotten)


def origin(folder: Path) -> Origin | None:
    """Return the origin of a model, by its record if there is one, else by its config.yaml.

    Args:
        folder: Run folder.

    Returns:
        The origin; None for a checkpoint that another program trained.

    Raises:
        UserError: The record, or a file that it covers, was changed.
    """
    data = recorded(folder, "data")
    if data is not None:
        if problems := verify_record(folder):
            raise UserError(f"{folder}: its record is not valid ({problems[0]}); take a folder that was not changed")
        config, source = recorded(folder, "config"), "record.json"
    elif (folder / "config.yaml").is_file():
        config = data = read_yaml(folder / "config.yaml")
        source = "config.yaml"
    else:
        return None
    config, samples = config or {}, (data or {}).get("samples", {})
    method, digest = config.get("method"), samples.get("retain_sha256")
    if not method or not digest:
        return None
    return Origin(
        method=method,
        samples_sha256=digest,
        source=source,
        forgotten=int(samples.get("forget", 0)),
        data=(data or {}).get("spec") or config.get("data"),
        before_sha256=(recorded(folder, "weights") or {}).get("before"),
        init=config.get("init"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordedRequest:
    """A forget request as it is recorded.

    Attributes:
        counts: Kind (ids, class, random or none) and numbers of samples.
        ids: Ids to forget; the record holds their hashes, unless `RecordOptions.plain_ids`.
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
        options: Key that signs the record, form of the ids, and further entries of the request.
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
    """Return (`ids` of the request, `bad_images` of the events), and write the files that they refer to."""
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
    """Write a new file that only its owner can read at any moment."""
    with full_disk(path, "nothing was recorded"):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(descriptor)


def code() -> dict[str, Any]:
    """Return which code ran.

    Returns:
        `lethe`: Version. `sha256`: SHA-256 over all modules of engine and kernels. `commit`: Hash of the commit and
        whether files differ from it; None if the code is not in a repository.
    """
    digest = hashlib.sha256()
    for folder, package in (("engine", "engine"), ("kernels", "lethe_kernels")):
        place = Path(next(iter(importlib.import_module(package).__path__)))
        for path in sorted(place.rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{folder}/{path.relative_to(place).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return {"lethe": __version__, "sha256": digest.hexdigest(), "commit": commit()}
