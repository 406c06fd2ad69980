"""Runs of deletion requests whose proof is a pool, or a certificate."""

from __future__ import annotations

import json
import shutil
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Lethe
from digit_pool import CERTIFICATE, make_pool
from digit_requests import QUICK, ids_of, record, states
from records import make_keys
from toys import tiny_vit

from engine.data import Source
from engine.errors import UserError
from engine.evaluate.gates import Gate, Verdict
from engine.jobs.opening import open_model
from engine.models.checkpoint import save_checkpoint
from engine.pool.answers import Answers
from engine.pool.certificate import bound, write_certificate
from engine.pool.references import PoolReferences
from engine.pool.store import Pool, model_identity
from engine.requests import intake, pool_proof, verdicts
from engine.requests.intake import add_request, init_store
from engine.requests.rebase import rebase
from engine.requests.run_options import Overrides
from engine.requests.runner import Finished, run_requests
from engine.requests.status import status
from engine.requests.store import Store
from engine.requests.verdicts import judge_again


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, digits: Source) -> Pool:
    return make_pool(tmp_path_factory.mktemp("pool") / "pool", digits)


@pytest.fixture
def with_references(checkpoint: Path, digits: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with a reference, and a request in it."""
    monkeypatch.setattr(intake, "open_source", {"digits": digits}.__getitem__)
    place = tmp_path / "kept"
    reference = str(save_checkpoint(tiny_vit(9), tmp_path / "reference"))
    init_store(place, str(checkpoint), "digits", method="finetune", config=QUICK, references=[reference])
    add_request(place, ids=ids_of(digits, 0))
    return place


@pytest.fixture
def certificate(pool: Pool, store: Path, digits: Source, tmp_path: Path) -> Path:
    """A certificate for the store's procedure, as if such runs had been measured."""
    references = PoolReferences(pool, digits, open_model(store / "versions" / "0000"), Answers(QUICK))
    content = {
        **CERTIFICATE,
        **bound(references, "finetune", QUICK),
        "sizes": [3, 12],
        "requests": {"size": 6, "count": 5, "seed": 0},
        "figures": {"weights": [-3.8, -3.85, -3.9, -3.85, -3.8], "score": [-2.0, 0.0, 2.0, 1.0, -1.0]},
    }
    return write_certificate(tmp_path, content, pool)


def _run(store: Path, **given: Any) -> Finished:
    finished = run_requests(store, given=Overrides(**given), record=record)
    assert finished is not None
    return finished


def _gates(finished: Finished) -> dict[str, str]:
    assert finished.verdict is not None
    return {gate["name"]: gate["status"] for gate in finished.verdict["gates"]}


def test_a_small_request_is_done_by_a_certificate(store: Path, pool: Pool, certificate: Path, digits: Source) -> None:
    add_request(store, ids=ids_of(digits, 0))
    finished = _run(store, pool=pool.folder, certificates=[certificate])
    assert finished.verdict is not None
    assert (finished.status, finished.state, finished.verdict["kind"]) == ("PASS", "done", "certificate")
    assert states(store) == {1: "done"}
    assert _gates(finished) == dict.fromkeys(
        ("certificate", "like: weights", "like: score", "test accuracy", "retain accuracy"), "PASS"
    )
    assert finished.verdict["proof"]["source"] == str(certificate)
    kept = json.loads((store / "versions" / "0001" / "verdict.json").read_text())
    assert "simulated requests" in kept["worth"]
    page = (store / "versions" / "0001" / "verdict.html").read_text()
    assert "Kind of proof: a certificate of the procedure" in page
    assert "Does a certificate cover the run?" in page


def test_the_next_request_is_done_as_well(store: Path, pool: Pool, certificate: Path, digits: Source) -> None:
    for start in (0, 6):
        add_request(store, ids=ids_of(digits, start))
        assert _run(store, pool=pool.folder, certificates=[certificate]).state == "done"
    assert states(store) == {1: "done", 2: "done"}


def test_a_certificate_proves_its_own_request_alone(
    store: Path, pool: Pool, certificate: Path, digits: Source, lethe: Lethe
) -> None:
    """An earlier request that is unproven stays so: the verdict was not on its samples."""
    add_request(store, ids=ids_of(digits, 0))
    assert _run(store, pool=pool.folder).state == "unproven"
    add_request(store, ids=ids_of(digits, 6))
    assert _run(store, pool=pool.folder, certificates=[certificate]).state == "done"
    assert states(store) == {1: "unproven", 2: "done"}
    assert [version["proof"] for version in status(store)["versions"]] == [None, "pool", "certificate"]
    _, out, _ = lethe("request", "status", "--store", store)
    assert "certificate" in out


def test_the_cost_is_that_of_the_images_that_models_saw(
    store: Path, pool: Pool, certificate: Path, digits: Source
) -> None:
    add_request(store, ids=ids_of(digits, 0))
    _run(store, pool=pool.folder, certificates=[certificate])
    add_request(store, ids=ids_of(digits, 6))
    finished = _run(store, pool=pool.folder, certificates=[certificate])
    assert finished.verdict is not None
    # The model on 6 forget, 80 test and 228 retain samples, the original on these 228, two models of the pool on the 6.
    assert finished.verdict["proof"]["images"] == 6 + 80 + 2 * 228 + 2 * 6
    assert finished.verdict["proof"]["retrain"] == 3 * 240


def test_without_a_certificate_it_is_unproven_and_the_command_is_named(store: Path, pool: Pool, digits: Source) -> None:
    add_request(store, ids=ids_of(digits, 0))
    finished = _run(store, pool=pool.folder)
    assert finished.verdict is not None
    assert (finished.state, finished.verdict["kind"]) == ("unproven", "pool")
    assert "no certificate was given" in finished.reason
    assert f"lethe certify --checkpoint {store}/versions/0000 --data digits --pool {pool.folder}" in finished.reason
    assert "--method finetune --set max_steps=2" in finished.reason
    assert "--kind random --size 6 --out CERTIFICATE" in finished.reason


def test_a_request_of_another_size_is_not_covered(store: Path, pool: Pool, certificate: Path, digits: Source) -> None:
    add_request(store, ids=ids_of(digits, 0, 2))
    finished = _run(store, pool=pool.folder, certificates=[certificate])
    assert finished.state == "unproven"
    assert "for requests of 3 to 12 samples, this one has 2" in finished.reason


def test_a_request_that_empties_a_class_is_not_covered(
    store: Path, pool: Pool, certificate: Path, digits: Source
) -> None:
    """The models of the pool know the class; earlier requests took all but six of its samples."""
    members = [digits.train.ids[int(i)] for i in np.flatnonzero(digits.train.labels == 3)]
    add_request(store, ids=members[6:])
    assert _run(store, pool=pool.folder).state == "unproven"
    add_request(store, ids=members[:6])
    finished = _run(store, pool=pool.folder, certificates=[certificate])
    assert finished.state == "unproven"
    assert f"of class 3 0 of {len(members)} samples are retained" in finished.reason


def test_other_options_are_not_covered(store: Path, pool: Pool, certificate: Path, digits: Source) -> None:
    add_request(store, ids=ids_of(digits, 0))
    finished = _run(store, pool=pool.folder, certificates=[certificate], config={"lr": 2e-5})
    assert finished.state == "unproven"
    assert "another set of options (lr=1e-05, this run has 2e-05)" in finished.reason


def test_a_run_unlike_the_certified_ones_is_refused(
    store: Path, pool: Pool, certificate: Path, digits: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the method returns the parent with a change that is too small to matter."""
    from engine.methods.finetune import Finetune

    original = Finetune.learning_rate
    monkeypatch.setattr(Finetune, "learning_rate", lambda self, *args: original(self, *args) * 1e-3)
    add_request(store, ids=ids_of(digits, 0))
    finished = _run(store, pool=pool.folder, certificates=[certificate])
    assert (finished.status, finished.state) == ("FAIL", "open")
    assert "like: weights" in finished.reason
    assert states(store) == {1: "open"}
    with Store.open(store) as opened:
        assert opened.current().number == 0


def test_a_run_that_changes_nothing_is_refused(
    store: Path, pool: Pool, certificate: Path, digits: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.methods.finetune import Finetune

    monkeypatch.setattr(Finetune, "learning_rate", lambda self, *args: 0.0)
    add_request(store, ids=ids_of(digits, 0))
    finished = _run(store, pool=pool.folder, certificates=[certificate])
    assert finished.state == "open"
    assert "UNCHANGED" in finished.reason


def test_an_edited_certificate_is_refused_before_any_work(
    store: Path, pool: Pool, certificate: Path, digits: Source
) -> None:
    document = json.loads(certificate.read_text())
    document["content"]["sizes"] = [1, 99]
    certificate.write_text(json.dumps(document))
    add_request(store, ids=ids_of(digits, 0))
    with pytest.raises(UserError, match="was changed since it was written"):
        _run(store, pool=pool.folder, certificates=[certificate])
    assert not (store / "versions" / "0001").exists()
    with Store.open(store) as opened:
        assert opened.unfinished() is None


def test_only_signed_certificates_are_accepted_with_a_key(
    store: Path, pool: Pool, certificate: Path, digits: Source, checkpoint: Path, tmp_path: Path
) -> None:
    """Red before: `lethe request run` did not check signatures."""
    pytest.importorskip("cryptography")
    make_keys(tmp_path)
    private, public = tmp_path / "mine.pem", tmp_path / "mine.pub"
    add_request(store, ids=ids_of(digits, 0))
    with pytest.raises(UserError, match="has no signature that"):
        _run(store, pool=pool.folder, certificates=[certificate], public_key=public)
    content = json.loads(certificate.read_text())["content"]
    signed = write_certificate(certificate.parent, content, pool, private)
    given: dict[str, Any] = {"pool": pool.folder, "certificates": [signed], "public_key": public}
    assert _run(store, **given).state == "done"
    # The store keeps a copy of the key: whoever edits the file does not change who has to sign.
    init_store(tmp_path / "kept", str(checkpoint), "digits", method="finetune", config=QUICK, **given)
    public.unlink()
    write_certificate(certificate.parent, content, pool)
    add_request(tmp_path / "kept", ids=ids_of(digits, 0))
    with pytest.raises(UserError, match="has no signature that"):
        _run(tmp_path / "kept")


def test_a_certificate_without_a_pool_is_refused(store: Path, certificate: Path, digits: Source) -> None:
    add_request(store, ids=ids_of(digits, 0))
    with pytest.raises(UserError, match="give the pool that it was made with"):
        _run(store, certificates=[certificate])


def test_references_and_a_pool_are_refused(store: Path, pool: Pool, digits: Source, tmp_path: Path) -> None:
    add_request(store, ids=ids_of(digits, 0))
    reference = save_checkpoint(tiny_vit(9), tmp_path / "reference")
    with pytest.raises(UserError, match="references and a pool are both given"):
        _run(store, pool=pool.folder, references=[str(reference)])
    with Store.open(store) as opened:
        assert opened.unfinished() is None


def test_a_certificate_proves_a_run_that_is_over(store: Path, pool: Pool, certificate: Path, digits: Source) -> None:
    """What an unproven request's reason names as the remedy."""
    lines: list[str] = []
    add_request(store, ids=ids_of(digits, 0))
    run_requests(store, given=Overrides(pool=pool.folder), record=record, notify=lines.append)
    assert any("will be unproven, no certificate covers it: no certificate was given" in each for each in lines)
    assert states(store) == {1: "unproven"}
    judged = judge_again(store, given=Overrides(pool=pool.folder, certificates=[certificate]), record=record)
    assert judged is not None
    assert (judged.status, judged.verdict["kind"], judged.requests) == ("PASS", "certificate", {1: "done"})


def test_a_certificate_proves_the_runs_before_each_by_its_own_model(
    store: Path, pool: Pool, certificate: Path, digits: Source
) -> None:
    lines: list[str] = []
    for start in (0, 6, 12):
        add_request(store, ids=ids_of(digits, start))
        _run(store, pool=pool.folder, certificates=[certificate] if start == 12 else [])
    assert states(store) == {1: "unproven", 2: "unproven", 3: "done"}
    given = Overrides(pool=pool.folder, certificates=[certificate])
    judged = judge_again(store, given=given, record=record, notify=lines.append)
    assert judged is not None
    assert (judged.version, judged.status, judged.verdict["kind"]) == (2, "PASS", "certificate")
    assert judged.requests == {1: "done", 2: "done"}
    assert states(store) == dict.fromkeys((1, 2, 3), "done")
    assert [line.split(":")[0] for line in lines] == ["version 0001", "version 0002"]
    kept = json.loads((store / "versions" / "0001" / "verdict.json").read_text())
    assert kept["samples"]["forget"] == 6


def test_a_run_before_that_no_certificate_covers_stays_unproven_with_its_reason(
    store: Path, pool: Pool, certificate: Path, digits: Source
) -> None:
    """Before, the reason was that no certificate was given, and the remedy the one that had just been tried."""
    for start, count in ((0, 2), (6, 6)):
        add_request(store, ids=ids_of(digits, start, count))
        _run(store, pool=pool.folder)
    judged = judge_again(store, given=Overrides(pool=pool.folder, certificates=[certificate]), record=record)
    assert judged is not None
    assert states(store) == {1: "unproven", 2: "done"}
    assert "no certificate was given" not in judged.reason
    assert "version 0001, whose requests are unproven" in judged.reason
    assert "for requests of 3 to 12 samples, this one has 2" in judged.reason
    assert "From 100 unproven samples on lethe request judge" in judged.reason
    assert "lethe certify" not in judged.reason


def test_all_that_was_forgotten_is_judged_though_it_is_done(
    store: Path, pool: Pool, certificate: Path, digits: Source
) -> None:
    add_request(store, ids=ids_of(digits, 0))
    _run(store, pool=pool.folder, certificates=[certificate])
    assert judge_again(store, record=record) is None  # nothing is unproven
    judged = judge_again(store, given=Overrides(pool=pool.folder), record=record)
    assert judged is not None
    assert judged.verdict["kind"] == "pool"
    assert states(store) == {1: "done"}


def test_what_is_done_needs_no_second_proof_of_its_own(
    store: Path, pool: Pool, certificate: Path, digits: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red before: the last request was judged alone, and six samples are too few for that whatever they show."""
    passed = Verdict([Gate("membership", "?", "PASS", None, "limit", "planted")], 2, {"forget": 1, "test": 1})
    monkeypatch.setattr(pool_proof, "judge_task", lambda *anything: passed)
    add_request(store, ids=ids_of(digits, 0, 105))
    _run(store, pool=pool.folder)
    add_request(store, ids=ids_of(digits, 110))
    chosen = types.SimpleNamespace(path=certificate)  # it does not cover so many of 240 samples
    monkeypatch.setattr(pool_proof.PoolProof, "_covering", lambda *anything: (chosen, []))
    monkeypatch.setattr(pool_proof.PoolProof, "_by_certificate", lambda *anything: passed)
    assert _run(store, pool=pool.folder, certificates=[certificate]).state == "done"
    judged = judge_again(store, given=Overrides(pool=pool.folder), record=record)
    assert judged is not None
    assert judged.status == "PASS"


def test_a_full_retrain_can_be_judged_again(
    store: Path, pool: Pool, certificate: Path, digits: Source, tmp_path: Path
) -> None:
    """Red before: refused as a request that names no samples, since no request belongs to a retrain."""
    add_request(store, ids=ids_of(digits, 0))
    _run(store, pool=pool.folder, certificates=[certificate])
    rebase(store, str(save_checkpoint(tiny_vit(9), tmp_path / "retrained")))
    judged = judge_again(store, given=Overrides(pool=pool.folder), record=record)
    assert judged is not None
    assert judged.version == 2


def test_the_record_of_a_version_is_signed(
    store: Path, pool: Pool, certificate: Path, digits: Source, lethe: Lethe, tmp_path: Path
) -> None:
    """By `run`, with the verdict in it, and again by a later verdict."""
    keys = make_keys(tmp_path)
    add_request(store, ids=ids_of(digits, 0))
    by = ("--store", store, "--pool", pool.folder, "--certificate", certificate)
    assert lethe("request", "run", *by, "--sign", tmp_path / "none.pem")[0] == 2
    assert states(store) == {1: "open"}
    place = store / "versions" / "0001"
    for command in ("run", "judge"):
        code, _, err = lethe("request", command, *by, "--sign", keys / "mine.pem")
        assert code in (0, 3), err
        assert lethe("verify-record", place, "--public-key", keys / "mine.pub")[0] == 0
        assert lethe("verify-record", place, "--public-key", keys / "theirs.pub")[0] == 1


def test_a_pool_takes_the_place_of_the_references_of_the_store(with_references: Path, pool: Pool, lethe: Lethe) -> None:
    """Red before: the error recommended --no-reference, which `judge` did not have."""
    gate = Gate("membership", "?", "INSUFFICIENT EVIDENCE", None, "limit", "planted")
    undecided = Verdict([gate], 2, {"forget": 6, "test": 80})
    run_requests(with_references, verify=lambda *anything, **more: undecided, record=record)
    assert states(with_references) == {1: "unproven"}
    code, _, err = lethe("request", "judge", "--store", with_references, "--pool", pool.folder)
    assert (code, "give --no-reference" in err) == (2, True)
    code, out, _ = lethe("request", "judge", "--store", with_references, "--pool", pool.folder, "--no-reference")
    assert (code, "proof: pool" in out) == (3, True)


def test_a_later_fail_opens_what_a_certificate_proved(
    store: Path, pool: Pool, certificate: Path, digits: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_request(store, ids=ids_of(digits, 0))
    _run(store, pool=pool.folder, certificates=[certificate])
    failed = Verdict([Gate("membership", "?", "FAIL", None, "limit", "planted")], 2, {"forget": 1, "test": 1})
    monkeypatch.setattr(verdicts, "judge_version", lambda *anything: failed)
    judged = judge_again(store, given=Overrides(pool=pool.folder), record=record)
    assert judged is not None
    assert judged.requests == {1: "open"}
    assert states(store) == {1: "open"}


def test_another_preprocessing_is_another_model(pool: Pool, digits: Source, checkpoint: Path, tmp_path: Path) -> None:
    """The same weights, fed with other images."""
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["pretrained_cfg"] = {**config.get("pretrained_cfg", {}), "mean": [0.45], "std": [0.6]}
    (other / "config.json").write_text(json.dumps(config))
    assert model_identity(open_model(other)) != model_identity(open_model(checkpoint))
    with pytest.raises(UserError, match="a pool has that of the original"):
        PoolReferences(pool, digits, open_model(other), Answers(QUICK))


def test_the_store_keeps_pool_and_certificates(
    checkpoint: Path, pool: Pool, certificate: Path, digits: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "open_source", {"digits": digits}.__getitem__)
    init_store(
        tmp_path / "kept",
        str(checkpoint),
        "digits",
        method="finetune",
        config=QUICK,
        pool=pool.folder,
        certificates=[certificate],
    )
    add_request(tmp_path / "kept", ids=ids_of(digits, 0))
    assert _run(tmp_path / "kept").state == "done"
    with pytest.raises(UserError, match="give the pool that it was made with"):
        init_store(tmp_path / "other", str(checkpoint), "digits", certificates=[certificate])


@pytest.mark.parametrize(("last", "state"), [(6, "unproven"), (110, "done")])
def test_a_pass_on_all_samples_does_not_close_a_small_request(
    store: Path, pool: Pool, digits: Source, monkeypatch: pytest.MonkeyPatch, last: int, state: str
) -> None:
    """A few samples that were not forgotten would not be noticed among many others."""
    passed = Verdict([Gate("membership", "?", "PASS", None, "limit", "planted")], 2, {"forget": 1, "test": 1})
    monkeypatch.setattr(pool_proof, "judge_task", lambda *anything: passed)
    add_request(store, ids=ids_of(digits, 0, 105))
    assert _run(store, pool=pool.folder).state == "done"
    add_request(store, ids=ids_of(digits, 110, last))
    finished = _run(store, pool=pool.folder)
    assert finished.state == state
    judged = judge_again(store, given=Overrides(pool=pool.folder), record=record)
    assert judged is not None
    assert states(store) == {1: "done", 2: state}


def test_a_later_verdict_by_the_pool_is_on_all_samples(store: Path, pool: Pool, digits: Source) -> None:
    add_request(store, ids=ids_of(digits, 0))
    _run(store, pool=pool.folder)
    judged = judge_again(store, given=Overrides(pool=pool.folder), record=record)
    assert judged is not None
    assert judged.verdict["kind"] == "pool"
    assert judged.verdict["samples"]["forget"] == 6
    assert judged.requests == {1: "unproven"}


def test_a_large_request_is_judged_by_the_pool_itself(store: Path, pool: Pool, digits: Source) -> None:
    add_request(store, ids=ids_of(digits, 0, 110))
    finished = _run(store, pool=pool.folder)
    assert finished.verdict is not None
    assert finished.verdict["kind"] == "pool"
    # 80 test samples are too few for these gates; all of the evidence is there.
    assert finished.verdict["samples"] == {"forget": 110, "test": 80, "retain": 130}
    assert np.isfinite(finished.verdict["proof"]["seconds"])


def test_the_command_shows_the_kind_of_proof(
    lethe: Lethe, store: Path, pool: Pool, certificate: Path, digits: Source
) -> None:
    add_request(store, ids=ids_of(digits, 0))
    code, out, _ = lethe("request", "run", "--store", store, "--pool", pool.folder, "--certificate", certificate)
    assert code == 0
    assert "proof: certificate" in out
    assert "of a retrain" in out
    assert "versions/0001/verdict.html" in out.replace("\n", "")
    assert "simulated requests of this size and kind" in out.replace("\n", " ")


def test_a_run_by_a_pool_is_judged_again_by_it_though_the_store_has_references(
    with_references: Path, pool: Pool
) -> None:
    """The options of the run decide, which has no references, not those of the store."""
    assert _run(with_references, pool=pool.folder, references=[]).state == "unproven"
    judged = judge_again(with_references, given=Overrides(pool=pool.folder), record=record)
    assert judged is not None
    assert judged.verdict["kind"] == "pool"
