"""Certificates: when they are granted, what they cover, and what is refused."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from digit_pool import CERTIFICATE, make_pool
from drawn_predictions import drawn
from records import make_keys
from toys import tiny_vit

from engine.data import Source
from engine.errors import UserError
from engine.evaluate.gates import Gates
from engine.evaluate.intervals import Interval
from engine.evaluate.verdict import Evidence, ModelOutputs
from engine.models.predict import Predictions
from engine.pool.answers import Answers
from engine.pool.attempts import Attempt
from engine.pool.certificate import (
    Certificate,
    Covered,
    bound,
    certify,
    code_sha256,
    covered_run,
    covered_sizes,
    no_op_rate,
    open_certificate,
    write_certificate,
)
from engine.pool.references import PoolReferences
from engine.pool.simulation import Procedure, Simulated
from engine.pool.store import Pool

NOW = datetime.datetime(2026, 6, 1, tzinfo=datetime.timezone.utc)
RUN = Covered(method="lethe", options={"lr": 0.1}, code="c", original="o", pool="p", kind="random", size=20, drift=0.02)
CONTENT: dict[str, Any] = {
    **CERTIFICATE,
    "expires": "2026-10-01T00:00:00+00:00",
    "method": "lethe",
    "options": {"lr": 0.1},
    "code": "c",
    "original": "o",
    "pool": "p",
    "sizes": [10, 40],
    "requests": {"size": 20, "count": 4, "seed": 0},
    "figures": {"weights": [-0.5, -0.6, -0.55, -0.52], "score": [1.0, 0.5, 0.8, 0.9]},
}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, digits: Source) -> Pool:
    return make_pool(tmp_path_factory.mktemp("pool") / "pool", digits)


def _gap(changed: dict[str, Any] | None = None, now: datetime.datetime = NOW, **run: Any) -> str:
    certificate = Certificate(Path("x"), {**CONTENT, **(changed or {})})
    return certificate.gap(dataclasses.replace(RUN, **run), now)


def test_a_run_like_that_of_the_certificate_is_covered() -> None:
    assert _gap() == ""
    assert _gap(size=10) == _gap(size=40) == ""
    assert _gap(drift=0.1) == ""
    assert _gap({"kind": "near-duplicates"}) == ""  # the harder case


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        ({"method": "scrub"}, "another method .lethe, this run has scrub."),
        ({"options": {"lr": 0.2}}, "another set of options .lr=0.1, this run has 0.2."),
        ({"code": "d"}, "another version of the code"),
        ({"original": "q"}, "another model"),
        ({"pool": "q"}, "another pool"),
        ({"size": 9}, "10 to 40 samples, this one has 9"),
        ({"size": 41}, "10 to 40 samples, this one has 41"),
        ({"kind": "class"}, "of the kind random, this one is of the kind class"),
        ({"drift": 0.11}, "11.0% of the samples were forgotten"),
    ],
)
def test_any_other_run_is_not_covered(run: dict[str, Any], reason: str) -> None:
    import re

    assert re.search(reason, _gap(**run))


def test_it_expires_and_has_to_be_granted() -> None:
    assert "expired on 2026-10-01" in _gap(now=NOW + datetime.timedelta(days=150))
    assert _gap({"granted": False, "reason": "too few"}) == "it was not granted: too few"


def test_a_run_is_compared_with_the_certified_ones() -> None:
    found = Certificate(Path("x"), CONTENT).like({"weights": -0.54, "score": 9.0}, 40)
    value, allowed = found["weights"]
    assert allowed.low < value < allowed.high
    value, allowed = found["score"]
    assert value > allowed.high
    assert allowed.value == pytest.approx(0.7)  # 0.8 on forget samples, 0.1 on test samples
    # A further run: t(0.999, 3 degrees of freedom) = 10.21, sd 0.2160, times sqrt(1 + 1/4).
    assert allowed.high - 0.7 == pytest.approx(10.2145 * 0.216025 * 1.118034, rel=1e-4)
    value, allowed = Certificate(Path("x"), CONTENT).like({"weights": -9.0}, 20)["weights"]
    assert value < allowed.low  # nothing was changed
    # The range of a further run, and a factor of two on either side.
    spread = 10.2145 * np.std([-0.5, -0.6, -0.55, -0.52], ddof=1) * 1.25**0.5
    assert allowed.value - allowed.low == pytest.approx(spread + np.log10(2), abs=1e-3)


def test_of_fewer_samples_the_mean_varies_more() -> None:
    certificate, figures = Certificate(Path("x"), CONTENT), {"weights": -0.5, "score": 0.8}
    ranges = {size: certificate.like(figures, size) for size in (5, 20, 40)}
    half = {
        size: {name: each[1].high - each[1].value for name, each in found.items()} for size, found in ranges.items()
    }
    assert half[5]["score"] == pytest.approx(2 * half[20]["score"])
    assert half[40] == half[20]
    assert half[5]["weights"] == half[20]["weights"]


def test_a_certificate_is_read_back(pool: Pool, tmp_path: Path) -> None:
    path = write_certificate(tmp_path, CONTENT, pool)
    assert open_certificate(path, pool).content == open_certificate(tmp_path, pool).content == CONTENT


@pytest.mark.parametrize(
    ("key", "value"), [("granted", True), ("expires", "2036-01-01T00:00:00+00:00"), ("sizes", [1, 99]), ("method", "x")]
)
def test_an_edit_is_detected(pool: Pool, tmp_path: Path, key: str, value: Any) -> None:
    path = write_certificate(tmp_path, {**CONTENT, "granted": False}, pool)
    document = json.loads(path.read_text())
    document["content"][key] = value
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="was changed since it was written, or belongs to another pool"):
        open_certificate(path, pool)


def test_that_of_another_pool_is_refused(pool: Pool, tmp_path: Path) -> None:
    other = Pool(pool.folder, {**pool.facts, "key": "other"})
    with pytest.raises(UserError, match="belongs to another pool"):
        open_certificate(write_certificate(tmp_path, CONTENT, other), pool)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"content": {"format": 9}, "hmac": "", "signature": null}'])
def test_a_file_that_is_none_is_refused(pool: Pool, tmp_path: Path, text: str) -> None:
    path = tmp_path / "certificate.json"
    path.write_text(text)
    with pytest.raises(UserError, match="--certificate"):
        open_certificate(path, pool)
    with pytest.raises(UserError, match="cannot be read"):
        open_certificate(tmp_path / "none.json", pool)


def test_a_signature_is_checked(pool: Pool, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    make_keys(tmp_path)
    private, public = tmp_path / "mine.pem", tmp_path / "mine.pub"
    unsigned = write_certificate(tmp_path, CONTENT, pool)
    with pytest.raises(UserError, match="no signature that"):
        open_certificate(unsigned, pool, public)
    signed = write_certificate(tmp_path, CONTENT, pool, private)
    assert open_certificate(signed, pool, public).granted
    # Whoever holds the pool can compute the HMAC of an edited content, but not its signature.
    document = json.loads(signed.read_text())
    forged = json.loads(write_certificate(tmp_path, {**CONTENT, "sizes": [1, 99]}, pool).read_text())
    signed.write_text(json.dumps({**forged, "signature": document["signature"]}))
    assert open_certificate(signed, pool).sizes == (1, 99)
    with pytest.raises(UserError, match="no signature that"):
        open_certificate(signed, pool, public)


def test_options_that_do_not_change_a_run_do_not_bind(pool: Pool, digits: Source) -> None:
    references = PoolReferences(pool, digits, tiny_vit(3), Answers({"precision": "fp32"}))
    one = bound(references, "finetune", {"workers": 0, "seed": 1, "precision": "fp32"})
    assert one == bound(references, "finetune", {"workers": 2, "seed": 2, "precision": "fp32"})
    assert one != bound(references, "finetune", {"lr": 0.5, "precision": "fp32"})
    run = covered_run(references, "finetune", {"precision": "fp32"}, np.zeros(6, dtype=int), 0.0)
    assert (run.kind, run.size, run.code) == ("class", 6, code_sha256())


# --- when it is granted -----------------------------------------------------------------------------------------------


def _moved(predictions: Predictions, by: float) -> Predictions:
    """Return predictions whose logit of the true class is higher."""
    logits = predictions.logits.copy()
    logits[np.arange(len(logits)), predictions.labels] += by
    return Predictions(logits, predictions.labels)


def _outputs(seed: int, memorised: float = 0.0) -> ModelOutputs:
    """Return outputs of models of one kind: they agree on the difficulty of the samples, and differ by noise."""
    rng = np.random.default_rng(seed)

    def noisy(p: Predictions) -> Predictions:
        return Predictions((p.logits + rng.normal(0, 0.2, p.logits.shape)).astype(np.float32), p.labels)

    sets = {
        name: noisy(drawn(count, 6.0 if name == "retain" else 1.0, number))
        for number, (name, count) in enumerate(_COUNTS.items())
    }
    sets["forget"] = _moved(sets["forget"], memorised)
    return ModelOutputs(sets, {}, {name: sets[name] for name in ("forget", "test")})


_COUNTS = {"forget": 300, "test": 400, "retain": 400}


def _evidence(memorised: float, original: float) -> Evidence:
    model = _outputs(1, memorised)
    return Evidence(
        model=model,
        original=_outputs(2, original),
        references=[_outputs(3), _outputs(4)],
        repeated=model.predictions["forget"],
        changed=0.9,
        partial=True,
        expected_test=np.mean([_outputs(seed).predictions["test"].correct for seed in (3, 4, 5)], axis=0),
    )


def _certified(pool: Pool, digits: Source, memorised: float, original: float, earlier: int = 0) -> dict[str, Any]:
    references = PoolReferences(pool, digits, tiny_vit(3), Answers({"precision": "fp32"}))
    evidence = _evidence(memorised, original)
    procedure = Procedure(method="finetune", config={}, kind="random", size=20, count=15)
    found = [
        Simulated(evidence.model, evidence.repeated, 0.9, {"weights": -0.5 - i / 100, "score": 1.0}, 2.0, 100)
        for i in range(15)
    ]
    others = [Attempt(str(i), "", "o", "random", 20, "finetune") for i in range(earlier)]
    content, verdict = certify(references, procedure, found, evidence, days=30, earlier=others)
    assert content["verdict"]["status"] == verdict.status
    return content


def test_it_is_granted_to_a_procedure_that_forgets(pool: Pool, digits: Source) -> None:
    content = _certified(pool, digits, memorised=0.0, original=2.0)
    assert content["granted"], content["reason"]
    assert content["sizes"] == [10, 40]
    assert (content["verdict"]["kind"], content["verdict"]["proof"]["source"]) == ("pool", str(pool.folder))
    assert content["no_op"]["high"] < 0.05
    assert content["cost"] == {"seconds": 30.0, "training_images": 1500, "images": content["cost"]["images"]}
    days = datetime.datetime.fromisoformat(content["expires"]) - datetime.datetime.fromisoformat(content["created"])
    assert days.days == 30
    json.dumps(content, allow_nan=False)


def test_it_is_not_granted_to_one_that_keeps_the_samples(pool: Pool, digits: Source) -> None:
    content = _certified(pool, digits, memorised=2.0, original=2.0)
    assert not content["granted"]
    assert "FAIL" in content["reason"]


def test_more_attempts_ask_for_more_power(pool: Pool, digits: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error rates are those of all attempts together: a rate that is enough for one is not for three."""
    drawn_for = []

    def rate(evidence: Evidence, gates: Gates, requests: int, draws: int) -> Interval:
        drawn_for.append(draws)
        return Interval(0.01, 0.0, 0.02)

    monkeypatch.setattr("engine.pool.certificate.no_op_rate", rate)
    assert _certified(pool, digits, 0.0, 2.0)["granted"]
    refused = _certified(pool, digits, 0.0, 2.0, earlier=2)
    assert not refused["granted"]
    assert "of 3 attempts, in up to 6% of cases" in refused["reason"]
    assert refused["attempt"] == 3
    assert drawn_for == [100, 300]


def test_it_is_not_granted_where_the_original_shows_nothing(pool: Pool, digits: Source) -> None:
    """Nothing was memorised, so a procedure that does nothing would pass as well."""
    content = _certified(pool, digits, memorised=0.0, original=0.0)
    assert not content["granted"]
    assert "power" in content["reason"]


def test_how_often_nothing_would_pass() -> None:
    gates = Gates.read()
    assert no_op_rate(_evidence(0.0, 2.0), gates, 15, draws=20).value == 0
    weak = no_op_rate(_evidence(0.0, 0.25), gates, 15, draws=20)
    assert weak == no_op_rate(_evidence(0.0, 0.25), gates, 15, draws=20)  # repeatable


@pytest.mark.parametrize(
    ("method", "size", "expected"),
    [("finetune", 20, [10, 40]), ("lethe_plus", 10, [5, 16]), ("lethe_plus", 20, [17, 40]), ("lethe_plus", 1, [1, 2])],
)
def test_a_certificate_covers_sizes_of_one_procedure(method: str, size: int, expected: list[int]) -> None:
    """By lethe_plus up to 16 of these samples are a small request, whose steps are others."""
    procedure = Procedure(method=method, config={}, kind="random", size=size, count=8)
    assert covered_sizes(procedure, 1_438) == expected
