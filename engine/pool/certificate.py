"""A certificate: what was shown of an unlearning procedure by simulated requests, and what it is valid for.

It binds a method with its options, the code, the model that requests start from, the pool (with its data), and the kind
and size of requests. Any other is not covered. It ends by age, and by drift: the share of samples forgotten since.

The file holds the HMAC-SHA256 of its content under the key of the pool, so that an edit by hand is detected. Whoever
holds the pool can compute it anew; a signature (`--sign`) excludes that as well.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import hmac
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from engine._version import __version__
from engine.attack.ensemble import what_counts
from engine.audit.record_format import canonical
from engine.audit.signature import checker, signer
from engine.config import split_options
from engine.errors import UserError
from engine.evaluate.gates import INSUFFICIENT, PASS, Gates, Verdict
from engine.evaluate.intervals import Interval, proportion
from engine.evaluate.verdict import Evidence, ModelOutputs, calibrated_margins, judge
from engine.methods import get_method
from engine.models.predict import Predictions
from engine.pool.attempts import Attempt
from engine.pool.references import PoolReferences, with_cost
from engine.pool.simulation import Procedure, Simulated, kind_of
from engine.pool.store import Pool, model_identity
from engine.runtime.files import write_json

FILE, FORMAT = "certificate.json", 1
DAYS, MOST_DAYS = 180.0, 3650.0
# Share of the samples that may be forgotten, since the model that was certified, before a certificate ends.
MAX_DRIFT = 0.1
# Sizes of requests that a certificate covers, relative to the simulated size.
SIZES = (0.5, 2.0)
# Probability that a procedure which changes nothing gets the certificate, at most: its upper limit at 95%.
MOST_NO_OP = 0.05
# Probability of the intervals for the figures of a run.
_LIKE = 0.998
# Added to the range of the change of the weights, log10: a factor of two. A version that was made from an unlearned
# model may change less than one that was made from the original.
_MOVED = 0.301
_DRAWS = 100
# Attempts from which on the draws do not increase: they take a third of a second each. Some more, and none is granted.
_MOST_ATTEMPTS = 50
# Parts of the code that decide what a run does to a model.
_CODE = ("core", "data", "methods", "models", "run", "runtime")


@dataclasses.dataclass(frozen=True)
class Certificate:
    """An opened certificate; `content` is that of the file."""

    path: Path
    content: Mapping[str, Any]

    @property
    def granted(self) -> bool:
        return bool(self.content["granted"])

    @property
    def sizes(self) -> tuple[int, int]:
        low, high = self.content["sizes"]
        return int(low), int(high)

    def gap(self, covered: Covered, now: datetime.datetime) -> str:
        """Return why the certificate does not cover a run; empty if it does."""
        mine, low, high = self.content, *self.sizes
        expires = datetime.datetime.fromisoformat(mine["expires"])
        if not self.granted:
            return f"it was not granted: {mine['reason']}"
        if now >= expires:
            return f"it expired on {mine['expires'][:10]}; certify again"
        for name, what in _BOUND.items():
            if mine[name] != getattr(covered, name):
                return f"it is for another {what}{_shown(mine[name], getattr(covered, name))}"
        if not low <= covered.size <= high:
            return f"it is for requests of {low} to {high} samples, this one has {covered.size}"
        if covered.kind != mine["kind"] and not (mine["kind"] == "near-duplicates" and covered.kind == "random"):
            return f"it is for requests of the kind {mine['kind']}, this one is of the kind {covered.kind}"
        if covered.drift > mine["max_drift"]:
            return (
                f"{100 * covered.drift:.1f}% of the samples were forgotten since the model that it is for, more than "
                f"{100 * mine['max_drift']:g}%; certify the present model"
            )
        return ""

    def like(self, figures: Mapping[str, float], size: int) -> dict[str, tuple[float, Interval]]:
        """Return each figure of a run, and the interval in which a further certified run would have it (99.8%).

        `figures`: as of `figures_of`, the score less that on test samples (`test_score`), since a model that was
        unlearned several times may be surer on all samples. Of a request that is smaller than the simulated ones, the
        mean over its samples varies more. The change of the weights may be outside by a factor of two.
        """
        found = {}
        for name, value in figures.items():
            known = np.array(self.content["figures"][name]) - (self.content["test_score"] if name == "score" else 0.0)
            half = float(t.ppf((1 + _LIKE) / 2, len(known) - 1)) * known.std(ddof=1) * (1 + 1 / len(known)) ** 0.5
            if name == "score":
                half *= max(1.0, self.content["requests"]["size"] / size) ** 0.5
            else:
                half += _MOVED
            found[name] = (value, Interval(float(known.mean()), float(known.mean() - half), float(known.mean() + half)))
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Covered:
    """A run that a certificate is to cover.

    Attributes:
        method, options, code, original, pool: As in the certificate's file.
        kind, size: Of the request.
        drift: Share of the training samples that were forgotten since the original.
    """

    method: str
    options: Mapping[str, Any]
    code: str
    original: str
    pool: str
    kind: str
    size: int
    drift: float


_BOUND = {
    "method": "method",
    "options": "set of options",
    "code": "version of the code",
    "original": "model",
    "pool": "pool",
}


def _shown(mine: Any, other: Any) -> str:
    if isinstance(mine, Mapping):
        key = next(key for key in {**mine, **other} if mine.get(key) != other.get(key))
        return f" ({key}={mine.get(key)}, this run has {other.get(key)})"
    return f" ({mine}, this run has {other})" if len(str(mine)) < 40 else ""


def certify(
    references: PoolReferences,
    procedure: Procedure,
    found: Sequence[Simulated],
    evidence: Evidence,
    days: float = DAYS,
    earlier: Sequence[Attempt] = (),
) -> tuple[dict[str, Any], Verdict]:
    """Return the content of a certificate, granted or not, and the verdict on the simulated requests.

    It is granted if the verdict on all simulated requests together is PASS, and a procedure that changes nothing would
    not have passed, by resampling, in more than 5% of cases, over all attempts together (Bonferroni).

    Args:
        references, procedure: As of `engine.pool.simulation.simulate`.
        found, evidence: What it returned.
        days: Days until it expires.
        earlier: Other attempts for such requests (`engine.pool.attempts.competing`).
    """
    gates = Gates.read()
    began = time.perf_counter() - sum(one.seconds for one in found)  # the runs may be of an earlier call
    verdict = with_cost(judge(evidence, gates), references, "pool", references.pool.folder, began)
    attempt = 1 + len(earlier)
    draws = _DRAWS * min(attempt, _MOST_ATTEMPTS)  # more of them, so that the smaller rate can be shown
    no_op = no_op_rate(evidence, gates, procedure.count, draws) if verdict.status == PASS else None
    powerless = no_op is not None and attempt * no_op.high > MOST_NO_OP
    reason = ""
    if verdict.status != PASS:
        reason = f"the verdict on the simulated requests is {verdict.status} ({', '.join(verdict.decided_by)})"
        if verdict.status == INSUFFICIENT:
            reason += f"; --requests {2 * procedure.count} in another --out would narrow its intervals"
    elif no_op is not None and powerless:
        of = f" of {attempt} attempts" if earlier else ""
        reason = f"a procedure that changes nothing could pass{of}, in up to {100 * attempt * no_op.high:.0f}% of cases"
    now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    content = {
        "format": FORMAT,
        "granted": verdict.status == PASS and not powerless,
        "reason": reason,
        "created": now.isoformat(),
        "expires": (now + datetime.timedelta(days=days)).isoformat(),
        **bound(references, procedure.method, procedure.config),
        "kind": procedure.kind,
        "sizes": covered_sizes(procedure, len(references.source.train)),
        "max_drift": MAX_DRIFT,
        "requests": {"size": procedure.size, "count": procedure.count, "seed": procedure.seed},
        "verdict": verdict.to_dict(),
        "no_op": None if no_op is None else no_op.to_dict(),
        "attempt": attempt,
        "earlier": [dataclasses.asdict(each) for each in earlier],
        "test_score": score_on_test(evidence.model, evidence.references),
        "figures": {name: [one.figures[name] for one in found] for name in found[0].figures},
        "cost": {
            "seconds": sum(one.seconds for one in found),
            "training_images": sum(one.images for one in found),
            "images": references.answers.images,
        },
        "version": __version__,
    }
    return content, verdict


def covered_sizes(procedure: Procedure, count: int) -> list[int]:
    """Return the least and the most samples of a covered request, half to twice of those that are simulated.

    Sizes at which the method takes another procedure are left out (`Method.regime`).

    Args:
        procedure: What is certified.
        count: Number of training samples.
    """
    method, size = get_method(procedure.method), procedure.size
    config = split_options(procedure.config, method.Config)[1]
    regime = method.regime(config, size, count - size)
    low, high = max(1, round(SIZES[0] * size)), min(count, round(SIZES[1] * size))
    same = [n for n in range(low, high + 1) if method.regime(config, n, count - n) == regime]
    return [min(same), max(same)]


def score_on_test(model: ModelOutputs, references: Sequence[ModelOutputs]) -> float:
    """Return the mean log-odds of the true class on the test samples, less that of the references."""
    others = [each.predictions["test"] for each in references]
    return float(calibrated_margins(model.predictions["test"], others).mean())


def bound(references: PoolReferences, method: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a certificate is bound to."""
    return {
        "method": method,
        "options": json.loads(json.dumps(what_counts(config, method))),
        "code": code_sha256(),
        "original": model_identity(references.original),
        "pool": references.pool.identity,
    }


def covered_run(
    references: PoolReferences, method: str, config: Mapping[str, Any], labels: np.ndarray, drift: float
) -> Covered:
    """Return the run of a request with these labels, for `Certificate.gap`."""
    facts = bound(references, method, config)
    return Covered(**facts, kind=kind_of(labels), size=len(labels), drift=drift)


def code_sha256() -> str:
    """Return the SHA-256 of the source files that decide what a run does to a model."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for part in _CODE for path in (root / part).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def no_op_rate(evidence: Evidence, gates: Gates, requests: int, draws: int = _DRAWS) -> Interval:
    """Return how often a procedure that changes nothing would PASS, by resampling requests and test samples.

    Whether its weights changed is not asked: a model with other weights and the same outputs is meant.
    """
    rng = np.random.default_rng(0)
    passed = 0
    forget, test = len(evidence.model.predictions["forget"]), len(evidence.model.predictions["test"])
    rows = np.split(np.arange(forget), requests)
    for _ in range(draws):
        chosen = np.concatenate([rows[int(i)] for i in rng.integers(0, requests, requests)])
        places = {"forget": chosen, "test": rng.integers(0, test, test)}
        original = _drawn(evidence.original, places)
        again = dataclasses.replace(
            evidence,
            model=original,
            original=original,
            references=[_drawn(each, places) for each in evidence.references],
            repeated=original.predictions["forget"],
            changed=1.0,
            expected_test=None if evidence.expected_test is None else evidence.expected_test[places["test"]],
        )
        passed += judge(again, gates).status == PASS
    return proportion(passed, draws)


def _drawn(outputs: ModelOutputs, places: Mapping[str, np.ndarray]) -> ModelOutputs:
    def of(sets: Mapping[str, Predictions]) -> dict[str, Predictions]:
        return {name: p.take(places[name]) if name in places else p for name, p in sets.items()}

    return ModelOutputs(of(outputs.predictions), {}, of(outputs.shifted))


# --- the file ---------------------------------------------------------------------------------------------------------


def write_certificate(folder: Path, content: Mapping[str, Any], pool: Pool, sign: Path | None = None) -> Path:
    """Write certificate.json with its HMAC and, if a key is given, its signature; return its path."""
    signature = None
    if sign is not None:
        value, public_key = signer(sign)(canonical(content))
        signature = {"algorithm": "Ed25519", "value": value, "public_key": public_key}
    path = folder / FILE
    write_json(path, {"content": content, "hmac": _hmac(content, pool), "signature": signature})
    return path


def open_certificate(given: Path, pool: Pool, public_key: Path | None = None) -> Certificate:
    """Open a certificate, a file or its folder.

    Args:
        given: The file, or the folder of `lethe certify`.
        pool: The pool that it was made with.
        public_key: PEM file that its signature is checked with; None: it is not checked.

    Raises:
        UserError: There is none, it was changed, it belongs to another pool, or its signature is not valid.
    """
    path = given / FILE if given.is_dir() else given
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        content, mac, signature = document["content"], document["hmac"], document["signature"]
        if content["format"] != FORMAT:
            raise UserError(f"--certificate {path}: format {content['format']}, expected {FORMAT}; certify again")
        whole = hmac.compare_digest(mac, _hmac(content, pool))
    except OSError as error:
        raise UserError(f"--certificate {given}: cannot be read ({error.strerror}); make it by lethe certify") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--certificate {path}: is not a certificate ({error}); make it by lethe certify") from None
    if not whole:
        raise UserError(
            f"--certificate {path}: was changed since it was written, or belongs to another pool than {pool.folder}; "
            "give the file as lethe certify wrote it"
        )
    value = signature.get("value") if isinstance(signature, Mapping) else None
    if public_key is not None and not (value and checker(public_key)(canonical(content), str(value))):
        raise UserError(f"--certificate {path}: has no signature that {public_key} confirms")
    return Certificate(path, content)


def check_given(folder: Path | None, certificates: Sequence[Path], public_key: Path | None = None) -> None:
    """Check that a pool is complete and that certificates belong to it, before any work.

    Args:
        folder: Folder of the pool; None: there is none.
        certificates, public_key: As of `open_certificate`.

    Raises:
        UserError: It is not, one does not, a signature is not valid, or there is no pool.
    """
    if public_key is not None:
        checker(public_key)
    if folder is None:
        if certificates:
            raise UserError(f"--certificate {certificates[0]}: give the pool that it was made with: --pool")
        return
    pool = Pool.open(folder)
    pool.check_complete()
    for each in certificates:
        open_certificate(each, pool, public_key)


def _hmac(content: Mapping[str, Any], pool: Pool) -> str:
    return hmac.new(str(pool.facts["key"]).encode(), canonical(content), hashlib.sha256).hexdigest()


def line_of(content: Mapping[str, Any]) -> str:
    """Return one line on a certificate, for the console."""
    low, high = content["sizes"]
    counted = attempts_of(content)
    if content["granted"]:
        return (
            f"CERTIFIED until {content['expires'][:10]}: {content['method']} for requests of {low} to {high} samples "
            f"({content['kind']}){counted}"
        )
    return f"NOT CERTIFIED: {content['reason']}{counted}"


def attempts_of(content: Mapping[str, Any]) -> str:
    """Return words to append on the attempts before; empty if there were none, or a release that counted none."""
    number = content.get("attempt", 1)
    return "" if number == 1 else f"; attempt {number} with this pool for such requests, each a chance to pass in error"
