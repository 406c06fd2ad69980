"""`python -m bench certificates | pool-agreement | pool-queue` on models of a few steps, and their tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from digit_pool import CERTIFICATE

from bench.publish.verdict_sheets import agreement_table, certificates_table, queue_table
from bench.quality import certificates, pool_agreement, pool_queue
from engine.errors import UserError
from engine.jobs.task import Task
from engine.pool.store import Pool

SHORT = {**certificates.RECIPE, "epochs": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Original and pool, and short runs for all that is trained beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificates, "RECIPE", SHORT)
        patch.setattr(certificates, "BLOCKS", 8)
        patch.setattr(certificates, "REQUESTS", 2)
        patch.setattr(certificates, "_MODELS", 4)
        patch.setattr(certificates, "_SHARE", 0.5)
        folder = tmp_path_factory.mktemp("certificates")
        certificates.models_of(folder, None)
        yield folder


@pytest.mark.slow
def test_every_procedure_is_certified_or_not(folder: Path, tmp_path: Path) -> None:
    found = certificates.run_certificates(1, ["finetune"], folder, None, tmp_path / "c.json")
    names = {"retrain", "no-op", "head only", "labels flipped", "early-stopped", "finetune"}
    assert set(found["procedures"]) == names
    for row in found["procedures"].values():
        assert row["seeds"] == 1
        assert row["granted"] == 0  # of models of a few steps nothing can be shown
        assert all(row["reasons"])
    assert json.loads((tmp_path / "c.json").read_text())["procedures"] == found["procedures"]
    assert len(list((folder / "bank").iterdir())) == 2  # those of the requests alone


@pytest.mark.slow
def test_a_model_of_the_bank_lacks_the_samples_of_its_requests(folder: Path) -> None:
    original, _ = certificates.models_of(folder, None)
    bank = certificates._Bank(folder, original)
    drawn = bank.requests(3)
    assert [len(ids) for ids in drawn] == [certificates.SIZE] * 2
    assert len({i for ids in drawn for i in ids}) == 2 * certificates.SIZE
    task = Task.of_ids(bank.source, drawn[0], spec="x")
    bank.run(original, task, "", {})
    number = bank.block_of[drawn[0][0]]
    record = (folder / "bank" / str(number) / "record.json").read_text()
    retained = np.setdiff1d(np.arange(len(bank.source.train)), bank.blocks[number])
    assert bank.source.train.subset(retained).fingerprint() in record
    assert set(drawn[0]) <= {bank.source.train.ids[int(i)] for i in bank.blocks[number]}


@pytest.mark.slow
def test_the_same_models_get_both_verdicts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.quality import retrain_cost
    from engine.run.unlearn import train

    def quick(*models: Any, config: Any = None, **options: Any) -> Any:
        return train(*models, config={**(config or {}), "max_steps": 2}, **options)

    monkeypatch.setattr("bench.quality.verdict_matrix.train", quick)
    monkeypatch.setattr(retrain_cost, "train", quick)
    monkeypatch.setattr(pool_agreement, "RECIPE", SHORT)
    few = dict.fromkeys(("untouched, weights nudged", "interpolated 50%"))
    made = pool_agreement.impostors
    monkeypatch.setattr(
        pool_agreement,
        "impostors",
        lambda *models, **options: {k: v for k, v in made(*models, **options).items() if k in few},
    )
    found = pool_agreement.run_pool_agreement(1, 3, tmp_path / "calibration", folder, None, None)
    assert len(found["models"]) == 3 + 1 + 2
    assert found["models"]["list 0, untouched"]["pool"] == "FAIL"  # its weights are the original's
    assert sum(sum(row.values()) for row in found["counts"].values()) == 6


@pytest.mark.slow
def test_a_queue_by_the_command_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its certificate is planted: models of two steps do not get one."""
    from engine.data import open_source
    from engine.jobs.opening import open_model
    from engine.pool.answers import Answers
    from engine.pool.certificate import bound, write_certificate
    from engine.pool.references import PoolReferences

    _, pool = certificates.models_of(folder, None)
    checkpoint, options = folder / "original", {"max_steps": 2, "precision": "fp32", "batch_size": 50, "lr": 1e-5}
    references = PoolReferences(pool, open_source("digits"), open_model(checkpoint), Answers(options))
    content = {
        **CERTIFICATE,
        **bound(references, "finetune", options),
        "sizes": [1, 10],
        "requests": {"size": 5, "count": 3, "seed": 0},
        "figures": {"weights": [-4.0, -3.0, -3.5], "score": [-1.0, 0.0, 1.0]},
    }
    path = write_certificate(tmp_path, content, pool)
    monkeypatch.setattr(pool_queue, "PLANTED", {2: "no-op"})
    settings = [f"{key}={value}" for key, value in options.items()]
    found = pool_queue.pool_queue(
        str(checkpoint), "digits", pool.folder, [path], "finetune", 2, settings=settings, json_file=tmp_path / "q.json"
    )
    rows = [(row["request"], row["samples"], row["planted"]) for row in found["runs"]]
    assert rows == [(1, 1, ""), (2, 5, "no-op"), (2, 5, "")]
    # The accuracy of a model of three epochs is too uncertain for a PASS; that is tested in tests/engine/requests.
    assert [row["state"] == "open" for row in found["runs"]] == [False, True, False]
    assert found["runs"][0]["kind"] == found["runs"][2]["kind"] == "certificate"
    assert "UNCHANGED" in found["runs"][1]["reason"]
    assert queue_table(found).rows[1][:5] == ["2", "5", "no-op", "FAIL", "open"]


def test_sizes_of_a_queue() -> None:
    assert pool_queue.sizes_of("1, 5,20") == [1, 5, 20]
    for wrong in ("", "1,,5", "0,5", "-1", "many"):
        with pytest.raises(UserError, match="--samples"):
            pool_queue.sizes_of(wrong)


def test_table_of_certificates() -> None:
    row = {
        "granted": 19,
        "seeds": 20,
        "rate": {"low": 0.78, "high": 0.99},
        "auc": [0.5, 0.52],
        "deciding": {"joint": 1},
    }
    none = {**row, "granted": 0, "rate": {"low": 0.0, "high": 0.12}, "deciding": {"changed": 2, "membership": 20}}
    sheet = certificates_table({"procedures": {"retrain": row, "no-op": none}})
    assert sheet.rows == [
        ["retrain", "19 of 20", "78 to 99", "0.510", "joint 1"],
        ["no-op", "0 of 20", "0 to 12", "0.510", "membership 20, changed 2"],
    ]


def test_table_of_agreement() -> None:
    sheet = agreement_table({"counts": {"PASS": {"PASS": 14, "INSUFFICIENT EVIDENCE": 2}, "FAIL": {"FAIL": 9}}})
    assert sheet.rows == [
        ["PASS", "14", "2", "0"],
        ["INSUFFICIENT EVIDENCE", "0", "0", "0"],
        ["FAIL", "0", "0", "9"],
    ]


def test_table_of_a_queue() -> None:
    run = {
        "request": 10,
        "samples": 5,
        "planted": "no-op",
        "status": "FAIL",
        "state": "open",
        "kind": "none",
        "kept": {},
        "share": None,
        "proof_seconds": None,
    }
    done = {**run, "planted": "", "status": "PASS", "state": "done", "kind": "certificate", "share": 0.0042}
    kept = {"test accuracy": [0.25, -1, 1], "retain accuracy": [-1.25, -2, 0]}
    rows = queue_table({"runs": [run, {**done, "kept": kept, "proof_seconds": 3.21}]}).rows
    assert rows == [
        ["10", "5", "no-op", "FAIL", "open", "none", "-", "-", "-", "-"],
        ["10", "5", "", "PASS", "done", "certificate", "+0.2", "-1.2", "0.42", "3.2"],
    ]


def test_a_pool_of_ones_own_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    def open_pool(folder: Path) -> Any:
        opened.append(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(Pool, "open", open_pool)
    monkeypatch.setattr(certificates, "is_finished", lambda place: True)
    with pytest.raises(KeyboardInterrupt):
        certificates.models_of(tmp_path, tmp_path / "mine")
    assert opened == [tmp_path / "mine"]
