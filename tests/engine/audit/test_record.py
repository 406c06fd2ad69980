"""No change of a record, or of a file that it covers, goes unseen; none makes the checker fail."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from records import digest, forge, made, make_keys, overwrite, read

from engine.audit.record import Record, append_to_record, contains, recorded
from engine.audit.record_check import check_record, verify_record
from engine.audit.record_format import RECORD, SALT, canonical
from engine.errors import UserError


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A record by hand, of one small file."""
    return made(tmp_path / "small")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("keys"))


def test_no_byte_of_a_record_is_free(tmp_path: Path, keys: Path) -> None:
    """Every byte of a signed record in turn, without the public key; case, spaces and digits among the changes."""
    folder = made(tmp_path / "run", keys / "mine.pem")
    data = (folder / RECORD).read_bytes()
    for place in range(len(data)):
        for flipped in (1, 0x20, 0x80):
            changed = bytearray(data)
            changed[place] ^= flipped
            overwrite(folder / RECORD, changed)
            assert verify_record(folder), (place, flipped)
    for changed in (data[:-1], data + b"\n", b" " + data, data.replace(b":", b": ", 1), b"\xef\xbb\xbf" + data):
        overwrite(folder / RECORD, changed)
        assert verify_record(folder)


def nested(depth: int) -> dict[str, Any]:
    inner: Any = 0
    for _ in range(depth):
        inner = [inner]
    return {"deep": inner}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe{",
        "{}".encode("utf-16"),
        b"null\n",
        b"[]\n",
        b"{}\n",
        b"[" * 100_000,
        b"[" * 500 + b"]" * 500,
        b'{"a":' * 5_000,
        b"9" * 5_000,
        b"1e999",
        b"NaN",
        b'{"format":2,"format":2}',
        b'{"entries":[],"files":{},"format":2,"head":"","signature":null}\n',
        b'{"entries":[1],"files":{},"format":2,"head":"","signature":null}\n',
        b'{"entries":[],"files":{},"format":true,"head":"","signature":null}\n',
    ],
    ids=lambda data: f"{data[:12]!r} {len(data)}",
)
def test_what_is_no_record_is_said_in_one_line(small: Path, data: bytes) -> None:
    overwrite(small / RECORD, data)
    problems = verify_record(small)
    assert len(problems) == 1
    assert problems[0].startswith(f"{RECORD}: ")
    assert problems[0].isascii()
    assert len(problems[0]) < 200
    with pytest.raises(UserError, match="verify-record"):
        contains(small, "x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ENTRIES = st.tuples(st.text(max_size=8), st.dictionaries(st.text(max_size=8), JSON, max_size=2))


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("played") / "run")


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return read(made(tmp_path_factory.mktemp("intact") / "run"))


@given(data=st.binary(max_size=200) | JSON.map(lambda value: canonical(value) + b"\n"))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_checked_without_an_exception(played: Path, data: bytes) -> None:
    overwrite(played / RECORD, data)
    assert verify_record(played)


@given(data=st.data(), value=JSON)
@settings(max_examples=150, deadline=None)
def test_any_value_at_any_place_is_found(played: Path, intact: dict[str, Any], data: st.DataObject, value: Any) -> None:
    document = copy.deepcopy(intact)
    place: Any = document
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not (isinstance(place[key], (dict, list)) and place[key]) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    overwrite(played / RECORD, canonical(document) + b"\n")
    assert bool(verify_record(played)) == (canonical(document) != canonical(intact))


@given(
    contents=st.lists(
        st.tuples(st.text(max_size=8), st.dictionaries(st.text(max_size=8), JSON, max_size=2)), min_size=1, max_size=3
    )
)
@example(contents=[("request", {"ids": {"salt_sha256": 7, "forget": 7}})])
@example(contents=[("request", {"ids": {"salt_sha256": "0", "form": "hmac-sha256"}})])
@example(contents=[("files", {"sha256": {"../../etc/passwd": "0" * 64}})])
@example(contents=[("files", {"sha256": {"a" * 5_000: "0" * 64}})])
@example(contents=[("files", {"sha256": {"a\0": "0" * 64}}), ("files", {"sha256": {"a.txt": 7}})])
@example(contents=[("files", {"sha256": []}), ("files", {})])
@example(contents=[("\x1b[31m\ud800", nested(100))])
@settings(max_examples=60, deadline=None)
def test_records_that_others_made_are_checked_without_an_exception(
    played: Path, contents: list[tuple[str, dict[str, Any]]]
) -> None:
    entries = [{"kind": kind, "time": "", "content": content} for kind, content in contents]
    forge(played, {"entries": entries, "files": {}, "format": 2, "signature": None})
    check = check_record(played)
    json.dumps(check.to_dict(), allow_nan=False)
    said = [*check.problems, *(kind for _, kind, _ in check.entries)]
    assert all(text.isascii() and text.isprintable() for text in said)  # nothing that a terminal obeys


@pytest.mark.parametrize("name", ["../outside.txt", "sub/inside.txt", RECORD, SALT, ".hidden", ""])
def test_a_record_covers_files_of_its_folder_alone(small: Path, name: str) -> None:
    """Others' records must not have files read that lie elsewhere, and none can hold its own hash."""
    (small / "sub").mkdir()
    for path in (small.parent / "outside.txt", small / "sub" / "inside.txt", small / ".hidden", small / SALT):
        path.write_bytes(b"covered")
    document = read(small)
    files = {name: document["files"]["a.txt"]}
    document["entries"][2]["content"]["sha256"] = document["files"] = files
    forge(small, document)
    assert verify_record(small) == [f"{RECORD}: entry 3 (files) is not a list of files and their hashes"]
    with pytest.raises(ValueError, match="is not the name of a file that can be covered"):
        Record().seal(small, [name])


def test_true_is_no_number(small: Path) -> None:
    """Python takes it for 1; hashes that fit it do not make it one."""
    document = read(small)
    document["entries"] = document["entries"][:1]
    document.update(files={})
    forge(small, document)
    assert verify_record(small) == []
    document["entries"][0]["number"] = True
    document["entries"][0]["sha256"] = document["head"] = digest(document["entries"][0])
    overwrite(small / RECORD, canonical(document) + b"\n")
    assert verify_record(small) == [f"{RECORD}: entry 1 has another type of 'number' than int"]


def test_no_record_is_larger_than_a_checker_reads(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.audit.record_format.LARGEST", (small / RECORD).stat().st_size)
    with pytest.raises(UserError, match="record less"):
        append_to_record(small, "verdict", {})
    assert verify_record(small) == []
    monkeypatch.setattr("engine.audit.record_format.LARGEST", (small / RECORD).stat().st_size - 1)
    assert verify_record(small) == [f"{RECORD}: is larger than any record"]


def test_nothing_is_nested_beyond_what_a_checker_descends_into(small: Path) -> None:
    append_to_record(small, "verdict", nested(58))
    assert verify_record(small) == []
    with pytest.raises(ValueError, match="nested"):
        append_to_record(small, "verdict", nested(100))
    document = read(small)
    document["entries"][0]["content"] = nested(100)
    forge(small, document)
    assert verify_record(small) == [f"{RECORD}: is nested more deeply than any record"]


@pytest.mark.parametrize("name", [RECORD, "a.txt"])
def test_what_lies_in_a_files_place_is_named(small: Path, name: str) -> None:
    path, kept = small / name, small / "kept"
    path.rename(kept)

    def problem() -> str:
        (found,) = verify_record(small)
        assert found.startswith(f"{name}: ")
        return found

    path.symlink_to(kept)
    assert "is a symbolic link" in problem()
    path.unlink()
    path.symlink_to("nowhere")
    assert "is a symbolic link" in problem()
    path.unlink()
    path.mkdir()
    assert "is not a file" in problem()
    path.rmdir()
    os.mkfifo(path)  # opening one would wait for a writer
    assert "is not a file" in problem()
    path.unlink()
    if name != RECORD:
        assert "is missing" in problem()
    kept.rename(path)
    assert verify_record(small) == []


def test_problems_are_named_by_entry(small: Path) -> None:
    document = read(small)

    def problems(change: Callable[[dict[str, Any]], None]) -> list[str]:
        changed = copy.deepcopy(document)
        change(changed)
        overwrite(small / RECORD, canonical(changed) + b"\n")
        return verify_record(small)

    def swap(changed: dict[str, Any]) -> None:
        changed["entries"][0:2] = changed["entries"][1::-1]

    assert problems(lambda d: d["entries"][1]["content"].update(accuracy=0.9)) == [
        f"{RECORD}: entry 2 (metrics) was changed: its hash is not that of its content"
    ]
    assert f"{RECORD}: entry 1 (metrics) has the number 2" in problems(swap)
    assert f"{RECORD}: entry 2 (files) does not follow the entry before it" in problems(lambda d: d["entries"].pop(1))
    assert problems(lambda d: d["entries"].pop()) == [
        f"{RECORD}: head is not the hash of the last entry",
        f"{RECORD}: files are not those of its entries",
    ]
    assert problems(lambda d: d["files"].clear()) == [f"{RECORD}: files are not those of its entries"]
    assert problems(lambda d: d.update(more=1)) == [f"{RECORD}: has a key 'more' that does not belong there"]
    assert problems(lambda d: d["entries"][0].pop("time")) == [f"{RECORD}: entry 1 has no key 'time'"]
    assert problems(lambda d: d.update(format=3)) == [f"{RECORD}: has format 3, expected 2"]


def test_nothing_is_added_to_a_record_that_does_not_hold(small: Path, tmp_path: Path) -> None:
    data = (small / RECORD).read_bytes()
    overwrite(small / RECORD, data.replace(b'"accuracy":0.1', b'"accuracy":0.9'))
    with pytest.raises(UserError, match=r"entry 2 \(metrics\) was changed"):
        append_to_record(small, "verdict", {})
    with pytest.raises(UserError, match="holds no record"):
        append_to_record(tmp_path, "verdict", {})
    overwrite(small / RECORD, data)
    (small / "a.txt").write_bytes(b"changed")
    append_to_record(small, "verdict", {})
    assert verify_record(small) == ["a.txt: was changed: its hash is not the one recorded"]
    for kind, content, files in (("opinion", {}, ()), ("verdict", {"x": float("nan")}, ()), ("verdict", {}, (SALT,))):
        with pytest.raises(ValueError, match=r"opinion|JSON compliant|record\.salt"):
            append_to_record(small, kind, content, files)


def test_keys_that_are_numbers_are_kept_as_the_text_they_become(small: Path) -> None:
    append_to_record(small, "verdict", {"by class": {10: 1, 9: (2, 3)}})
    assert verify_record(small) == []
    assert recorded(small, "verdict") == {"by class": {"10": 1, "9": [2, 3]}}


def test_a_process_that_dies_while_it_adds_leaves_the_record_before(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (small / RECORD).read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        append_to_record(small, "verdict", {})
    monkeypatch.undo()
    assert (small / RECORD).read_bytes() == data
    assert verify_record(small) == []


def test_a_signature_holds_for_its_key_alone(tmp_path: Path, keys: Path, small: Path) -> None:
    folder = made(tmp_path / "run", keys / "mine.pem")
    assert read(folder)["signature"]["entries"] == 3
    assert verify_record(folder, keys / "mine.pub") == []
    assert (check_record(folder).signature, check_record(folder, keys / "mine.pub").signature) == ("unchecked", "valid")
    wrong = f"{RECORD}: signature is not one of this record by the holder of this key"
    assert verify_record(folder, keys / "theirs.pub") == [wrong]
    assert verify_record(small, keys / "mine.pub") == [f"{RECORD}: carries no signature"]


def test_who_computes_all_hashes_anew_is_found_by_the_signature_alone(tmp_path: Path, keys: Path) -> None:
    folder = made(tmp_path / "run", keys / "mine.pem")
    document = read(folder)
    document["entries"][1]["content"]["accuracy"] = 0.9
    forge(folder, document)
    assert verify_record(folder) == []
    assert "signature is not one of this record" in verify_record(folder, keys / "mine.pub")[0]
    document["signature"].update(entries=7)
    document["signature"]["sha256"] = digest(document["signature"])
    forge(folder, document)
    assert "over 7 entries, and there are 3" in verify_record(folder, keys / "mine.pub")[0]


def test_what_is_added_after_a_signature_is_not_signed_before_somebody_signs(tmp_path: Path, keys: Path) -> None:
    folder = made(tmp_path / "run", keys / "mine.pem")
    append_to_record(folder, "verdict", {"status": "PASS"})
    assert verify_record(folder) == []
    unsigned = f"{RECORD}: signature is over entries 1 to 3; the 1 after them are not signed"
    assert verify_record(folder, keys / "mine.pub") == [unsigned]
    append_to_record(folder, "verdict", {"status": "PASS"}, key=keys / "mine.pem")
    assert verify_record(folder, keys / "mine.pub") == []


@pytest.mark.parametrize("name", ["missing.pub", "noise.pem", "curve.pub", "mine.pem"])
def test_a_public_key_that_is_none_is_wrong_use(small: Path, keys: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"public key .*{name}"):
        verify_record(small, keys / name)


def test_a_missing_package_is_named(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(UserError, match=r"lethe-unlearning\[record\]"):
        verify_record(small, tmp_path / "key.pub")
    assert verify_record(small) == []
