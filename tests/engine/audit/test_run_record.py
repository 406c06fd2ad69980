"""record.json: what it holds, what it hides, and that no change of it or of what it covers goes unseen."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import digest, made, make_keys, overwrite, read
from toys import few, tiny_vit

from engine.audit import run_record
from engine.audit.record import Record, append_to_record, contains, recorded
from engine.audit.record_check import check_record, verify_record
from engine.audit.record_format import IDS, RECORD, SALT, canonical
from engine.audit.run_record import RecordOptions, code
from engine.cli import app as cli
from engine.data import ForgetRequest, Samples, open_source
from engine.errors import UserError
from engine.jobs.task import Task
from engine.jobs.train import train_job
from engine.jobs.unlearn import run_job
from engine.models.checkpoint import load_checkpoint, save_checkpoint, weights_sha256
from engine.run.folder import RunFolder
from engine.runtime.environment import commit

QUICK = {"max_steps": 1, "batch_size": 30, "precision": "fp32", "seed": 5}
COVERED = ("config.json", "config.yaml", "history.jsonl", "metrics.json", "model.safetensors", "report.html")


@pytest.fixture(scope="module")
def task() -> Task:
    """Sixty digits that bear people's names; twelve are to be forgotten, by a file that is named after one of them."""
    digits = open_source("digits")
    train = few(digits.train, 60)
    named = Samples("train", [f"jane-{i:04d}" for i in range(60)], train.labels, train.image, train.class_names)
    source = dataclasses.replace(digits, train=named, validation=few(digits.validation, 20), test=few(digits.test, 40))
    request = ForgetRequest("jane-doe.txt", np.arange(0, 60, 5), 2, {})
    return Task(source, request, *request.split(named))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tiny_vit(), tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tiny_vit(1), tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def finished(task: Task, original: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    known = RecordOptions(request={"received": "2026-01-02T03:04:05Z", "source": "form 7"})
    run_job(task, str(original), folder, method="finetune", config=QUICK, references=[reference], record=known)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to be changed."""
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("keys"))


def test_the_record_of_a_run_holds_what_it_should(finished: Path, task: Task, original: Path, reference: Path) -> None:
    document = read(finished)
    assert verify_record(finished) == []
    content = {entry["kind"]: entry["content"] for entry in document["entries"]}
    kinds = ["request", "data", "code", "environment", "config", "weights", "events", "metrics", "files"]
    assert list(content) == kinds
    request = {key: value for key, value in content["request"].items() if key != "ids"}
    assert request == {
        "kind": "ids",
        "forget": 12,
        "retain": 48,
        "duplicates": 2,
        "received": "2026-01-02T03:04:05Z",
        "source": "form 7",
    }
    retained = task.retain.fingerprint()
    assert content["data"] == {
        "spec": "digits",
        "samples": {"forget": 12, "retain": 48, "retain_sha256": retained},
    }
    assert content["config"]["seed"] == 5
    assert content["config"]["checkpoint"] == str(original)
    before = weights_sha256(load_checkpoint(original))
    after = weights_sha256(load_checkpoint(finished))
    assert content["weights"] == {
        "before": before,
        "after": after,
        "references": [weights_sha256(load_checkpoint(reference))],
    }
    assert before != after
    assert content["metrics"] == json.loads((finished / "metrics.json").read_text())
    history = [json.loads(line) for line in (finished / "history.jsonl").read_text().splitlines()]
    events = [row for row in history if "event" in row]
    assert content["events"] == {"events": events, "bad_images": {"count": 0, "ids": []}}
    assert "torch" in content["environment"]["packages"]
    assert content["code"] == code()
    assert sorted(document["files"]) == list(COVERED)
    for name, recorded_hash in document["files"].items():
        assert recorded_hash == hashlib.sha256((finished / name).read_bytes()).hexdigest()


def test_chain_and_bytes_are_those_of_the_format(finished: Path) -> None:
    assert (
        canonical({"b": 1.0, "a": [1e-5, "\u00e9", None, True, -0.0]})
        == b'{"a":[1e-05,"\\u00e9",null,true,-0.0],"b":1.0}'
    )
    document = read(finished)
    previous = "0" * 64
    for number, entry in enumerate(document["entries"], 1):
        assert (entry["number"], entry["previous"], entry["sha256"]) == (number, previous, digest(entry))
        assert len(entry["time"]) == len("2026-01-02T03:04:05Z")
        previous = entry["sha256"]
    assert document["head"] == previous
    assert (document["format"], document["signature"]) == (2, None)
    assert (finished / RECORD).read_bytes() == canonical(document) + b"\n"


def test_no_id_is_in_the_record_and_who_has_the_salt_can_show_one(
    finished: Path, run: Path, task: Task, tmp_path: Path
) -> None:
    text = (run / RECORD).read_text()
    assert "jane" not in text  # neither an id nor the name of the request's file
    assert task.forget.fingerprint() not in text
    salt = (run / SALT).read_bytes()
    assert len(salt) == 32
    assert (finished / SALT).stat().st_mode & 0o777 == 0o600
    assert salt.hex() not in text
    expected = sorted(hmac.new(salt, i.encode(), hashlib.sha256).hexdigest() for i in task.forget.ids)
    assert recorded(run, "request")["ids"]["forget"] == expected
    assert [contains(run, i) for i in ("jane-0005", "jane-0006", "5", "")] == [True, False, False, False]
    (run / SALT).write_bytes(bytes(32))
    assert verify_record(run) == [f"{SALT}: was changed: its hash is not the one recorded"]
    with pytest.raises(UserError, match="its ids cannot be identified"):
        contains(run, "jane-0005")
    (run / SALT).unlink()
    assert verify_record(run) == []
    assert check_record(run).salt == "destroyed"
    with pytest.raises(UserError, match="its ids cannot be identified"):
        contains(run, "jane-0005")


def written(folder: Path, task: Task, plain: bool = False, bad: dict[str, str] | None = None) -> Path:
    """A record of the task in a folder of nothing but a configuration."""
    folder.mkdir()
    (folder / "config.yaml").touch()

    class Result:
        config: dict[str, Any] = {"samples": {}}  # noqa: RUF012
        events: list[Any] = [{"event": "collapse"}]  # noqa: RUF012
        bad_images = bad or {}

    run_record.write_record(
        folder,
        Result(),  # type: ignore[arg-type]
        request=run_record.RecordedRequest(counts=task.counted(), ids=task.forget.ids, data="digits"),
        weights={},
        environment={},
        metrics=None,
        files=["config.yaml"],
        options=RecordOptions(plain_ids=plain),
    )
    return folder


def test_each_record_has_a_salt_of_its_own(task: Task, tmp_path: Path) -> None:
    first, second = (recorded(written(tmp_path / name, task), "request")["ids"]["forget"] for name in "ab")
    assert not set(first) & set(second)


def test_plain_ids_where_they_are_asked_for(task: Task, tmp_path: Path) -> None:
    folder = written(tmp_path / "run", task, plain=True, bad={"jane-0001": "broken"})
    assert recorded(folder, "request")["ids"] == {"form": "plain", "forget": list(task.forget.ids)}
    assert recorded(folder, "events")["bad_images"] == {"count": 1, "ids": ["jane-0001"]}
    assert contains(folder, "jane-0005")
    assert not contains(folder, "jane-0006")
    assert not (folder / SALT).exists()
    assert check_record(folder).salt == "none"


def test_bad_images_are_hashed_as_well(task: Task, tmp_path: Path) -> None:
    folder = written(tmp_path / "run", task, bad={"jane-0001": "image 'jane-0001' does not decode"})
    assert "jane" not in (folder / RECORD).read_text()
    hashed = hmac.new((folder / SALT).read_bytes(), b"jane-0001", hashlib.sha256).hexdigest()
    bad_images = {"count": 1, "ids": [hashed]}
    assert recorded(folder, "events") == {"events": [{"event": "collapse"}], "bad_images": bad_images}
    assert not contains(folder, "jane-0001")  # it was not asked for


@pytest.mark.parametrize("plain", [False, True])
def test_many_ids_have_a_file_of_their_own(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    monkeypatch.setattr(run_record, "MOST_IDS", 12)
    assert not (written(tmp_path / "few", task, plain) / IDS).exists()
    folder = written(tmp_path / "many", task, plain, {"jane-0001": "broken"})
    assert recorded(folder, "request")["ids"].get("forget") is None
    assert recorded(folder, "events")["bad_images"] == {"count": 1, "file": IDS}
    assert IDS in read(folder)["files"]
    assert [contains(folder, i) for i in ("jane-0005", "jane-0001")] == [True, False]
    (folder / IDS).write_bytes((folder / IDS).read_bytes().replace(b",", b", ", 1))
    assert verify_record(folder) == [f"{IDS}: was changed: its hash is not the one recorded"]
    with pytest.raises(UserError, match="restore it"):
        contains(folder, "jane-0005")


def test_two_hundred_changes_of_a_byte_are_two_hundred_detected(finished: Path, run: Path) -> None:
    names = [*COVERED, RECORD, SALT]
    rng = np.random.default_rng(0)
    contents = {name: (run / name).read_bytes() for name in names}
    for trial in range(200):
        name = names[trial % len(names)]
        place, step = int(rng.integers(len(contents[name]))), int(rng.integers(1, 256))
        changed = bytearray(contents[name])
        changed[place] = (changed[place] + step) % 256
        overwrite(run / name, changed)
        problems = verify_record(run)
        if name == RECORD:
            assert problems, (place, step)
            assert problems[0].startswith(f"{RECORD}: ")
        else:
            assert problems == [f"{name}: was changed: its hash is not the one recorded"], (place, step)
        overwrite(run / name, contents[name])
    assert verify_record(run) == []


def test_a_verdict_is_added_and_what_was_there_stays(run: Path) -> None:
    before = read(run)
    for number, status in enumerate(("FAIL", "PASS"), 1):
        (run / "verdict.json").write_text(status)
        append_to_record(run, "verdict", {"status": status, "share": np.float64(0.5).item()}, files=["verdict.json"])
        after = read(run)
        assert verify_record(run) == []
        assert after["entries"][: len(before["entries"])] == before["entries"]
        assert len(after["entries"]) == len(before["entries"]) + 2 * number
        assert recorded(run, "verdict")["status"] == status
    (run / "verdict.json").write_text("FAIL")
    assert verify_record(run) == ["verdict.json: was changed: its hash is not the one recorded"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.pem", "cannot be read"),
        ("noise.pem", "not an Ed25519"),
        ("curve.pem", "not an Ed25519"),
        ("mine.pub", "not an Ed25519 private"),
        ("locked.pem", "is encrypted"),
    ],
)
def test_a_key_that_cannot_sign_is_refused_before_the_work(
    task: Task, original: Path, tmp_path: Path, keys: Path, name: str, message: str
) -> None:
    options = RecordOptions(key=keys / name)
    with pytest.raises(UserError, match=message):
        run_job(task, str(original), tmp_path / "run", config=QUICK, record=options)
    with pytest.raises(UserError, match=message):
        train_job(task.source, tiny_vit(), tmp_path / "run", config=QUICK, record=options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("left_out", [True, False])
def test_a_training_is_recorded_with_what_it_was_trained_on(task: Task, tmp_path: Path, left_out: bool) -> None:
    folder = tmp_path / "reference"
    result = train_job(task.source, tiny_vit(), folder, task=task if left_out else None, config={**QUICK, "epochs": 1})
    samples = task.retain if left_out else task.source.train
    assert verify_record(folder) == []
    assert recorded(folder, "data")["samples"]["retain_sha256"] == samples.fingerprint()
    assert recorded(folder, "request")["kind"] == ("ids" if left_out else "none")
    assert recorded(folder, "request")["forget"] == (12 if left_out else 0)
    assert contains(folder, "jane-0005") is left_out
    assert recorded(folder, "weights") == {"before": None, "after": weights_sha256(result.model)}
    assert recorded(folder, "metrics") is None
    assert recorded(tmp_path, "data") is None
    assert sorted(read(folder)["files"]) == sorted(run_record.TRAINED)
    assert (folder / SALT).exists() is left_out


@pytest.mark.parametrize(("spec", "kind"), [("class:jane", "class"), ("random:0.1@0", "random"), ("a.csv", "ids")])
def test_the_kind_of_a_request_is_kept_without_its_name(task: Task, spec: str, kind: str) -> None:
    named = dataclasses.replace(task, request=dataclasses.replace(task.request, spec=spec))
    assert named.counted()["kind"] == kind


def test_a_run_that_is_done_again_leaves_nothing_of_the_record_before(run: Path) -> None:
    sealed = ("record.json", "record.salt", "record.ids", "verdict.json")
    for name in sealed:
        (run / name).touch()
    config = {"method": "finetune"}
    with pytest.raises(UserError, match="holds another run"):
        RunFolder(run, config)
    assert all((run / name).exists() for name in sealed)  # a refusal changes nothing
    RunFolder(run, config, overwrite=True)
    assert [path.name for path in run.iterdir() if path.name != "config.yaml"] == ["history.jsonl"]
    for name in sealed:  # as a process leaves them that is killed after it has written them
        (run / name).touch()
    RunFolder(run, config, resume=True)
    assert not any((run / name).exists() for name in sealed)


def test_a_second_record_replaces_the_first(task: Task, tmp_path: Path) -> None:
    folder = written(tmp_path / "run", task)
    (folder / IDS).touch()
    Record.start(folder)
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_the_code_is_known_by_its_files_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = code()
    assert known == code()
    root = Path(cli.__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted((root / "engine").rglob("*.py")) + sorted((root / "kernels").rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    assert known["sha256"] == digest.hexdigest()
    assert commit(tmp_path) is None

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert commit(tmp_path) is None  # without a commit
    (tmp_path / "file").touch()
    git("add", "file")
    git("commit", "-qm", "m")
    assert commit(tmp_path) == {"hash": git("rev-parse", "HEAD"), "modified": False}
    (tmp_path / "file").write_text("changed")
    assert commit(tmp_path) == {"hash": git("rev-parse", "HEAD"), "modified": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) is None


Lethe = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lethe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lethe:
    def command(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lethe", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return int(stopped.value.code or 0), captured.out, captured.err

    return command


def test_the_command_says_what_holds_and_what_does_not(lethe: Lethe, run: Path, tmp_path: Path) -> None:
    code, out, _ = lethe("verify-record", run, "--json", tmp_path / "check.json")
    assert code == 0
    assert f"intact; {len(read(run)['entries'])} entries, 6 files covered" in out
    assert read(run)["head"] in out
    assert "Not signed: a change of a file with all later hashes computed again is not detected" in out
    said = json.loads((tmp_path / "check.json").read_text())
    assert (said["intact"], said["problems"], said["signature"], said["salt"]) == (True, [], "none", "present")
    assert said["entries"][0]["kind"] == "request"
    (run / "metrics.json").write_text("{}")
    code, out, _ = lethe("verify-record", run, "--json", tmp_path / "check.json")
    assert code == 1
    assert "WRONG: metrics.json: was changed" in out
    assert "1 problem; do not rely on this record" in out
    assert "intact" not in out
    assert json.loads((tmp_path / "check.json").read_text())["intact"] is False
    (run / RECORD).write_bytes(b"[" * 100_000)
    assert lethe("verify-record", run)[0] == 1


def test_the_command_names_wrong_use(lethe: Lethe, tmp_path: Path) -> None:
    small = made(tmp_path / "small")
    for folder in (tmp_path, tmp_path / "missing", small / "a.txt"):
        code, _, err = lethe("verify-record", folder)
        assert code == 2
        assert "holds no record.json" in " ".join(err.split())
    assert lethe("verify-record", small, "--public-key", tmp_path / "missing.pub")[0] == 2


def test_a_run_is_signed_by_the_command(lethe: Lethe, tmp_path: Path, original: Path, keys: Path) -> None:
    quick = [text for key, value in QUICK.items() if key != "seed" for text in ("--set", f"{key}={value}")]
    code, _, err = lethe(
        *("train", "--data", "digits", "--arch", original, "--out", tmp_path / "t", "--epochs", "1", *quick),
        *("--sign", keys / "mine.pem"),
    )
    assert code == 0, err
    code, out, _ = lethe("verify-record", tmp_path / "t", "--public-key", keys / "mine.pub")
    assert code == 0
    assert "Signed by the holder of this key" in out
    code, out, _ = lethe("verify-record", tmp_path / "t")
    assert "Signed, which was not checked" in out
    assert lethe("verify-record", tmp_path / "t", "--public-key", keys / "theirs.pub")[0] == 1


def test_unlearn_hands_the_key_on(
    lethe: Lethe, monkeypatch: pytest.MonkeyPatch, original: Path, tmp_path: Path
) -> None:
    class Asked(BaseException):  # not one of those that become an exit code
        pass

    def asked(*_: Any, record: RecordOptions, **__: Any) -> None:
        raise Asked(record.key)

    monkeypatch.setattr("engine.jobs.unlearn.run_job", asked)
    monkeypatch.setattr(sys, "argv", ["lethe", "unlearn", "--checkpoint", str(original), "--data", "digits"])
    sys.argv += ["--forget", "random:0.1@0", "--out", str(tmp_path / "run"), "--sign", "key.pem", "--accept-accuracy"]
    with pytest.raises(Asked, match=r"^key\.pem$"):
        cli.main()
