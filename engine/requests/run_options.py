"""Options of a run of deletion requests: those of the store, and what a call gives in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.config import split_options
from engine.errors import UserError
from engine.evaluate.gates import Gates
from engine.methods import get_method
from engine.pool.certificate import check_given
from engine.requests.entries import Run
from engine.requests.intake import absolute
from engine.requests.store import Store


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a run, stored with it so that a resumed run has the options that it began with.

    Attributes:
        method, config: As of `engine.unlearn`.
        references, gates, require_proof, pool, certificates, public_key: As of `Overrides`, for the verdict.
    """

    method: str
    config: dict[str, Any]
    references: list[str]
    gates: str | None
    require_proof: bool = False
    pool: str | None = None
    certificates: list[str] = dataclasses.field(default_factory=list)
    public_key: str | None = None

    @property
    def gates_file(self) -> Path | None:
        return Path(self.gates) if self.gates else None

    def check(self) -> None:
        """Raise UserError if the method does not exist, an option is wrong, or pool or certificate are not valid."""
        split_options(self.config, get_method(self.method).Config)
        if self.pool and self.references:
            raise UserError("references and a pool are both given; leave --pool out, or give --no-reference")
        Gates.read(self.gates_file)
        pool, key = (Path(each) if each else None for each in (self.pool, self.public_key))
        check_given(pool, [Path(each) for each in self.certificates], key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overrides:
    """Options of one call, in place of the store's; None: the store's.

    Attributes:
        method: Name of the method.
        config: Options of `engine.unlearn` that take precedence over the store's.
        references: Reference models for the verdict; [] are none.
        gates: File of limits of the verdict.
        require_proof: Treat INSUFFICIENT EVIDENCE as a FAIL.
        pool: Folder of a pool, for a verdict without references.
        certificates: Certificates of the procedure, for small requests.
        public_key: PEM file of the Ed25519 key that must have signed every certificate.
    """

    method: str | None = None
    config: Mapping[str, Any] | None = None
    references: Sequence[str] | None = None
    gates: Path | None = None
    require_proof: bool = False
    pool: Path | None = None
    certificates: Sequence[Path] | None = None
    public_key: Path | None = None

    def _of_pool(self, pool: str | None, certificates: Sequence[str], public_key: str | None) -> dict[str, Any]:
        """Return the options of the pool: those given, else these."""
        given = None if self.certificates is None else [str(each.resolve()) for each in self.certificates]
        return {
            "pool": str(self.pool.resolve()) if self.pool else pool,
            "certificates": list(certificates) if given is None else given,
            "public_key": str(self.public_key.resolve()) if self.public_key else public_key,
        }

    def of_store(self, store: Store) -> Options:
        """Return the store's settings, replaced by what was given in their place."""
        settings = store.settings
        own_gates, own_key = (
            str((store.folder / name).resolve()) if name else None
            for name in (settings["gates"], settings.get("public_key"))
        )
        return Options(
            method=self.method or settings["method"],
            config={**settings["config"], **(self.config or {})},
            references=settings["references"] if self.references is None else absolute(self.references),
            gates=str(self.gates.resolve()) if self.gates else own_gates,
            require_proof=self.require_proof,
            **self._of_pool(settings.get("pool"), settings.get("certificates", []), own_key),
        )

    def of_unfinished(self, run: Run) -> Options:
        """Return the options of an unfinished run with another verdict's; method and config are kept.

        Raises:
            UserError: Another method or other options of it were given.
        """
        options = Options(**run.options)
        if self.method not in (None, options.method) or {**options.config, **(self.config or {})} != options.config:
            raise UserError(
                f"the run of version {run.number:04d} has not ended and has another method or other options; leave "
                "--method and --set out to continue it, or drop it by --abandon"
            )
        return dataclasses.replace(
            options,
            references=options.references if self.references is None else absolute(self.references),
            gates=str(self.gates.resolve()) if self.gates else options.gates,
            require_proof=options.require_proof or self.require_proof,
            **self._of_pool(options.pool, options.certificates, options.public_key),
        )
