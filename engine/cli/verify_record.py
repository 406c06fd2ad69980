"""`lethe verify-record`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.cli.options import Json, write_json_file
from engine.errors import ExitCode


def verify_record(
    folder: Annotated[Path, typer.Argument(help="Run folder of `lethe unlearn` or `lethe train`.", show_default=False)],
    public_key: Annotated[
        Path | None,
        typer.Option(
            help="PEM file of the Ed25519 public key of whoever must have signed the whole record.", show_default=False
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Check whether a run folder was changed since its record was written. Intact: exit 0; changed: 1, with the place.

    Any changed byte of record.json, or of a file that it covers, is found. Without --public-key that does not hold
    against somebody who computed every later hash anew.
    """
    from engine.audit.record_check import check_record
    from engine.cli.console import console

    check = check_record(folder, public_key)

    def print_line(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False, highlight=False)

    for number, kind, time in check.entries:
        print_line(f"{number:>4}  {time}  {kind}")
    for problem in check.problems:
        print_line(f"WRONG: {problem}")
    if check.problems:
        print_line(
            f"{folder}: {len(check.problems)} problem{'s' * (len(check.problems) > 1)}; do not rely on this record"
        )
    else:
        print_line(f"{folder}: intact; {len(check.entries)} entries, {len(check.files)} files covered")
        print_line(f"head {check.head}")
        print_line(_ASSURANCE[check.signature])
        print_line(_SALT[check.salt])
    write_json_file(json_file, check.to_dict())
    if check.problems:
        raise typer.Exit(ExitCode.FAILED)


_UNDETECTED = "a change of a file with all later hashes computed again is not detected"
_ASSURANCE = {
    "none": f"Not signed: {_UNDETECTED}. Compare the head with one that was kept elsewhere, or sign runs by --sign.",
    "unchecked": f"Signed, which was not checked: {_UNDETECTED} without --public-key FILE.",
    "valid": "Signed by the holder of this key.",
}
_SALT = {
    "present": "record.salt is present: with it anyone can check whether an id was in the request.",
    "destroyed": "record.salt is missing: the ids of the request cannot be identified by this record.",
    "none": "No id is hidden by a salt: there are none, or the record holds them as they are.",
}
