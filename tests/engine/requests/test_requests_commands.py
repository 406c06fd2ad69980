"""The commands around the store of requests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted_requests import COUNT, SOURCE, Crash, make_store, plant, verdict
from toys import tiny_vit
from typer.testing import CliRunner, Result

from engine.cli.app import app
from engine.errors import UserError
from engine.requests import intake, rebase
from engine.requests.runner import run_requests
from engine.requests.store import Store
from engine.runtime.files import write_json


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store whose runs take no time."""
    plant(monkeypatch)
    return make_store(tmp_path / "store")


@pytest.fixture
def lethe(store: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("COLUMNS", "250")

    def call(command: str, *arguments: str | Path) -> Result:
        return CliRunner().invoke(app, ["request", command, "--store", str(store), *map(str, arguments)])

    return call


def test_commands_from_request_to_version(
    lethe: Callable[..., Result], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import engine.jobs.verify

    undecided = "INSUFFICIENT EVIDENCE"
    said = [undecided, "FAIL", "PASS", "PASS"]
    recorded = []
    monkeypatch.setattr(engine.jobs.verify, "verify_job", lambda *a, **k: verdict(said.pop(0)))
    monkeypatch.setattr(
        engine.jobs.verify, "record_verdict", lambda place, found: recorded.append((place.name, found.status))
    )

    result = lethe("add", "--id", "train/1", "--id", "train/1", "--id", "train/2", "--source", "letter [a]",
                   "--received", "2026-05-01", "--days", "1", "--json", tmp_path / "a.json")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "request 1: 2 samples, deadline 2026-05-02T00:00:00Z; 1 ids named more than once, merged" in result.output
    assert json.loads((tmp_path / "a.json").read_text())["added"]["overdue"] is True
    assert (
        "nothing was added; 1 ids of other requests, left out" in lethe("add", "--id", "train/1", "--skip-known").output
    )

    result = lethe("list")
    assert "OVERDUE" in result.output
    assert "letter [a]" in result.output

    result = lethe("run", "--json", tmp_path / "r.json")
    assert result.exit_code == 3, result.output
    assert "INSUFFICIENT EVIDENCE: membership: planted [x]" in result.output
    assert "requests 1 are unproven, not done" in result.output
    assert json.loads((tmp_path / "r.json").read_text())["run"]["version"] == 1

    lethe("add", "--id", "train/3")
    result = lethe("run")
    assert result.exit_code == 1, result.output
    assert "version 0002 is rejected; version 0001 stays the current one and requests 2 stay open" in result.output

    result = lethe("run")
    assert result.exit_code == 0, result.output
    assert "version 0003 is the current one; requests 2 are done" in result.output
    assert recorded == [("0001", "INSUFFICIENT EVIDENCE"), ("0002", "FAIL"), ("0003", "PASS")]
    assert "no open requests: nothing to do" in lethe("run", "--json", tmp_path / "r.json").output
    assert json.loads((tmp_path / "r.json").read_text())["run"] is None

    lethe("add", *(text for n in range(10, 20) for text in ("--id", f"train/{n}")))
    result = lethe("run")
    assert result.exit_code == 3, result.output
    assert "the 10 samples that no verdict has proven, if not forgotten at all, would not be noticed" in result.output
    result = lethe("status", "--json", tmp_path / "s.json")
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["requests"] == {"open": 0, "unproven": 1, "done": 2, "overdue": 0}
    assert [v["verdict"] for v in found["versions"]] == [None, undecided, "FAIL", "PASS", undecided]
    assert found["versions"][3]["drift"]["test_kl"] == 0.02
    assert found["current"]["version"] == 4
    assert "warning: 32.5% of the training samples were forgotten" in result.output
    assert "warning" not in lethe("status", "--max-share", "0.4").output
    for shown in ("0001", "0003", "rejected", "current", "-1.0", "32.5%"):
        assert shown in result.output, shown
    result = lethe("list", "--all", "--ids", tmp_path / "ids.txt", "--json", tmp_path / "l.json")
    assert "13 ids in" in result.output
    assert sorted((tmp_path / "ids.txt").read_text().split()) == sorted(f"train/{n}" for n in (1, 2, 3, *range(10, 20)))
    listed = json.loads((tmp_path / "l.json").read_text())["requests"]
    assert [row["state"] for row in listed] == ["done", "done", "unproven"]
    assert listed[0]["late"]
    assert listed[0]["deadline"] < listed[0]["proven_at"]
    assert "LATE" in lethe("list", "--all").output


def test_judging_again_with_more_evidence(
    lethe: Callable[..., Result], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import engine.jobs.verify

    said = ["INSUFFICIENT EVIDENCE", "INSUFFICIENT EVIDENCE", "FAIL", "INSUFFICIENT EVIDENCE", "PASS"]
    recorded, given = [], []

    def verify(task: Any, place: Path, original: Path, references: Any, **options: Any) -> Any:
        given.append((place.name, original.name, references))
        return verdict(said.pop(0))

    monkeypatch.setattr(engine.jobs.verify, "verify_job", verify)
    monkeypatch.setattr(engine.jobs.verify, "record_verdict", lambda place, found: recorded.append(place.name))

    assert "no unproven requests: nothing to judge" in lethe("judge", "--json", tmp_path / "j.json").output
    assert json.loads((tmp_path / "j.json").read_text())["judged"] is None
    for number in (1, 2):
        lethe("add", "--id", f"train/{number}")
        assert "lethe request judge" in lethe("run").output
    (tmp_path / "retrained").mkdir()
    (tmp_path / "retrained" / "config.json").touch()
    arguments = ("--reference", tmp_path / "retrained", "--json", tmp_path / "j.json")
    result = lethe("judge", *arguments)
    assert result.exit_code == 1, result.output
    for shown in (
        "FAIL: membership: planted [x]",
        "version 0002 is rejected; the version before is the current one again",
        "requests 1 are unproven",
        "requests 2 are open",
    ):
        assert shown in result.output, result.output
    assert json.loads((tmp_path / "j.json").read_text())["judged"]["requests"] == {"1": "unproven", "2": "open"}
    assert lethe("judge").exit_code == 3
    result = lethe("judge", *arguments)
    assert result.exit_code == 0, result.output
    assert "requests 1 are done" in result.output
    assert given[2:] == [(f"000{n}", "0000", given_here) for n, given_here in (
        (2, [str(tmp_path / "retrained")]), (1, []), (1, [str(tmp_path / "retrained")])
    )]  # fmt: skip
    assert recorded == ["0001", "0002", "0002", "0001", "0001"]
    with Store.open(store) as opened:
        assert [(v.state, v.verdict) for v in opened.versions()[1:]] == [
            ("accepted", "PASS"), ("rejected", "FAIL"),
        ]  # fmt: skip


@pytest.mark.parametrize("command", ["run", "judge", "rebase"])
def test_commands_that_change_the_lineage_refuse_a_launcher(
    command: str, lethe: Callable[..., Result], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lethe("add", "--id", "train/1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = lethe(command, *(["--checkpoint", store] if command == "rebase" else []))
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == f"lethe request {command} is one process; start it without a launcher"
    with Store.open(store) as opened:
        assert [version.number for version in opened.versions()] == [0]
        assert opened.unfinished() is None


def test_a_full_retrain_is_judged_without_a_record(
    lethe: Callable[..., Result], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import engine.jobs.verify

    said = ["INSUFFICIENT EVIDENCE", "PASS"]
    monkeypatch.setattr(engine.jobs.verify, "verify_job", lambda *a, **k: verdict(said.pop(0)))
    monkeypatch.setattr(engine.jobs.verify, "record_verdict", lambda place, found: None)
    monkeypatch.setattr(rebase, "load_fitting", lambda checkpoint, source: tiny_vit(9))
    lethe("add", "--id", "train/1")
    lethe("run")
    lethe("rebase", "--checkpoint", "retrain")
    monkeypatch.setattr(engine.jobs.verify, "record_verdict", lambda place, found: pytest.fail("it has no record"))
    assert "requests 1 are done" in lethe("judge").output


def test_commands_of_an_unfinished_run(
    lethe: Callable[..., Result], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*arguments: Any, **options: Any) -> Any:
        raise Crash

    lethe("add", "--id", "train/1")
    with pytest.raises(Crash):
        run_requests(store, verify=crash, record=crash)
    assert "in run 0001" in lethe("list").output
    assert "the run of version 0001, begun" in lethe("status").output
    result = lethe("judge")
    assert "has not ended; continue it by lethe request run" in str(result.exception)
    result = lethe("run", "--no-reference", "--reference", "x")
    assert isinstance(result.exception, UserError)
    assert "the run of version 0001 was dropped; its requests stay open" in lethe("run", "--abandon").output
    assert "abandoned" in lethe("status").output


def test_commands_that_take_a_checkpoint(
    lethe: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebase, "load_fitting", lambda checkpoint, source: tiny_vit(9))
    assert (
        "version 0001 is a copy of retrain; that none of the forgotten"
        in lethe("rebase", "--checkpoint", "retrain").output
    )
    write_json(
        tmp_path / "config.yaml", {"method": "retrain", "samples": {"retain_sha256": SOURCE.train.fingerprint()}}
    )
    assert "by its run folder it was trained on exactly" in lethe("rebase", "--checkpoint", tmp_path).output
    result = lethe("init", "--checkpoint", "x", "--data", "planted")
    assert "is a store of requests already" in str(result.exception)

    monkeypatch.setattr(intake, "load_fitting", lambda checkpoint, source, config: tiny_vit())
    new = tmp_path / "new"
    result = CliRunner().invoke(
        app,
        [
            "request",
            "init",
            "--store",
            str(new),
            "--checkpoint",
            "x",
            "--data",
            "planted",
            "--set",
            "seed=3",
            "--max-share",
            "0.1",
            "--method",
            "finetune",
        ],
    )
    assert f"store in {new}; version 0000 is a copy of x" in result.output
    with Store.open(new) as opened:
        assert {key: opened.settings[key] for key in ("method", "config", "max_share", "train")} == {
            "method": "finetune",
            "config": {"seed": 3},
            "max_share": 0.1,
            "train": COUNT,
        }
