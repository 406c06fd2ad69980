"""The verdict on a checkpoint: references checked, evidence gathered, gates judged (`engine.evaluate.verdict`)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from engine.audit.record import append_to_record, recorded
from engine.audit.run_record import origin
from engine.errors import UserError
from engine.evaluate.gates import Gates, Verdict
from engine.evaluate.relearning import relearning_curve, steps_of
from engine.evaluate.representation import compare_weights
from engine.evaluate.verdict import Evidence, ModelOutputs, attack_power, judge
from engine.jobs.opening import open_given
from engine.jobs.opening import open_model as load_checkpoint
from engine.jobs.task import Task
from engine.models.checkpoint import weights_sha256
from engine.models.checkpoint_source import CheckpointSource
from engine.models.huggingface import as_classifier
from engine.models.predict import moved_images
from engine.runtime import lock
from engine.runtime.files import write_json

# A reference was trained on other data if its test accuracy is more than this many points below the original's.
_MAX_ACCURACY_LOSS = 20.0
# AUC above which the original fits the retained samples better than a reference does, compared with test samples. A
# reference that was trained on them is at 0.5, up to the effect of seeds and of a tenth fewer samples.
_UNTRAINED = 0.6
# Share by which the numbers of parameters of one architecture in two libraries may differ.
_SAME_SIZE = 0.01


class Verifier:
    """Judges models for one forget request. References and original are evaluated once, then any number of models.

    Args:
        task: The data with the forget request.
        original: The model before unlearning, or its checkpoint.
        references: Reference models or their checkpoints.
        gates: Limits of the verdict; None: the defaults.
        config: Options of the evaluation (precision, device, ...), by name.
        seed: Seed of the relearning attack.

    Raises:
        UserError: A reference is not valid, see `check_references` and `check_reference`.
    """

    def __init__(
        self,
        task: Task,
        original: nn.Module | str | Path,
        references: Sequence[nn.Module | str | Path],
        *,
        gates: Gates | None = None,
        config: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.gates, self.seed = gates or Gates.read(), seed
        self.before = open_given(original)
        self.task = task.readable(self.before, config)
        self.evaluator = self.task.evaluator(config)
        self.original = self.evaluate(self.before)
        made = original_of(original, self.before)
        self.references = []
        self._sources = list(references)
        checked = check_references(task, references, {"the original": self.before}, made)
        for (name, proven), reference in zip(checked, references, strict=True):
            outputs = self.evaluate(open_given(reference))
            check_reference(name, outputs, self.original, proven=proven, level=self.gates.level)
            self.references.append(outputs)

    def load_references(self) -> list[nn.Module]:
        """Load the reference models again: only their outputs are kept."""
        return [open_given(source) for source in self._sources]

    def evaluate(self, model: nn.Module) -> ModelOutputs:
        """Return the outputs of a model, as it is, on moved images, and after the relearning attack on a copy of it.

        The outputs after the attack are empty if less than half of the minimum number of samples would be held back
        from it.
        """
        predictions = self.evaluator.all_predictions(model)
        classifier = as_classifier(model)
        with moved_images(classifier):
            shifted = {name: self.evaluator.predictions(classifier, name) for name in ("forget", "test")}
        share, epochs = self.gates.relearning_share, self.gates.relearning_epochs
        if round((1 - share) * len(self.task.forget)) < self.gates.minimum_samples // 2:
            return ModelOutputs(predictions, {}, shifted)
        curve = relearning_curve(
            model,
            self.task.forget,
            self.evaluator.sets["test"],
            share=share,
            steps=(0, steps_of(round(share * len(self.task.forget)), epochs)[-1]),
            seed=self.seed,
            device=str(self.evaluator.device),
            precision=self.evaluator.precision,
            **self.loading,
        )
        return ModelOutputs(predictions, curve.predictions[-1], shifted)

    @property
    def loading(self) -> dict[str, Any]:
        """How images are read, as options of `engine.data.Loader`."""
        return {key: value for key, value in self.evaluator.loading.items() if key != "batch_size"}

    def evidence(self, model: nn.Module) -> Evidence:
        """Evaluate a model, and return the evidence that `judge` takes."""
        outputs = self.evaluate(model)
        return Evidence(
            model=outputs,
            original=self.original,
            references=self.references,
            repeated=self.evaluator.predictions(model, "forget"),
            changed=changed_share(model, self.before),
        )

    def judge(self, evidence: Evidence) -> Verdict:
        """Return the verdict on the evidence."""
        verdict = judge(evidence, self.gates)
        if not self.task.unreadable:
            return verdict
        samples = {**verdict.samples, "forget_unreadable": self.task.unreadable}
        return dataclasses.replace(verdict, samples=samples)

    def __call__(self, model: nn.Module) -> Verdict:
        return self.judge(self.evidence(model))


def verify_job(
    task: Task,
    checkpoint: str | Path,
    original: str | Path,
    references: Sequence[str | Path] = (),
    *,
    gates: Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> Verdict:
    """Return the verdict on a checkpoint; the body of `lethe verify`.

    All random draws use seed 0, so the same call gives the same verdict.

    Args:
        task: The data with the forget request.
        checkpoint: The model to judge.
        original: The model before unlearning.
        references: Reference models.
        gates: File of limits; None: the defaults.
        config: Options of the evaluation, by name.

    Raises:
        UserError: A checkpoint cannot be opened, or a reference is not valid.
    """
    model, verifier = prepare(task, checkpoint, original, references, gates=gates, config=config)
    return verifier(model)


def prepare(
    task: Task,
    checkpoint: str | Path,
    original: str | Path,
    references: Sequence[str | Path],
    *,
    gates: Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Verifier]:
    """Load the model to judge and create its verifier; arguments as of `verify_job`.

    Returns:
        (the model, the verifier).
    """
    limits = Gates.read(gates)
    model = load_checkpoint(checkpoint)  # before the work: a wrong name must not cost minutes
    return model, Verifier(task, original, references, gates=limits, config=config)


def check_references(
    task: Task,
    references: Sequence[nn.Module | str | Path],
    others: Mapping[str, nn.Module | None],
    made: MadeFrom | None = None,
) -> list[tuple[str, bool]]:
    """Check the records and the weights of reference models.

    Args:
        task: The data with the forget request.
        references: Reference models or their checkpoints.
        others: Models that no reference may be equal to, by name.
        made: Hashes of the original and of its base.

    Returns:
        (name, whether a record proves that it is one) of each reference.

    Raises:
        UserError: A reference is not valid by its record, is of another architecture, or has the weights of another
            model. A model compared with itself has no gap, and two equal references have no noise floor.
    """
    owners = {weights_sha256(model): name for name, model in others.items() if model is not None}
    original = others.get("the original")
    found = []
    for number, reference in enumerate(references, 1):
        path = Path(CheckpointSource.parse(reference).place) if isinstance(reference, (str, Path)) else None
        name = f"reference {number}" if path is None else str(reference)
        proven = path is not None and check_origin(CheckpointSource.parse(path).folder, task, made)
        opened = open_given(reference)
        if original is not None:
            _check_size(name, opened, original)
        digest = weights_sha256(opened)
        if digest in owners:
            raise UserError(
                f"--reference {name}: its weights are those of {owners[digest]}; a reference is a model of its own, "
                "trained without the forget samples: lethe train --forget, with another --seed for each"
            )
        owners[digest] = f"--reference {name}"
        found.append((name, proven))
    return found


def _check_size(name: str, reference: nn.Module, original: nn.Module) -> None:
    """Check that a reference has about as many parameters as the original: names and parts differ between libraries."""
    mine, theirs = (sum(p.numel() for p in model.parameters()) for model in (reference, original))
    if abs(mine - theirs) > _SAME_SIZE * theirs:
        raise UserError(
            f"--reference {name}: it has {mine:,} parameters, the original {theirs:,}; a reference is a model of the "
            "original's architecture, trained by its recipe without the forget samples"
        )


@dataclasses.dataclass(frozen=True)
class MadeFrom:
    """Hashes of an original and of its base.

    Attributes:
        weights_sha256: SHA-256 of the original's weights.
        init_sha256: SHA-256 of the weights that it was fine-tuned from; None if unknown.
    """

    weights_sha256: str
    init_sha256: str | None = None


def original_of(original: nn.Module | str | Path, model: nn.Module) -> MadeFrom:
    """Return the hashes of an original and, if its run folder has them, of its base.

    Args:
        original: The original, or its checkpoint.
        model: The original, loaded.
    """
    found = None
    if isinstance(original, (str, Path)):
        with contextlib.suppress(UserError):  # a folder that was changed is no evidence on the references
            found = origin(CheckpointSource.parse(original).folder)
    return MadeFrom(weights_sha256(model), found.init.get("weights_sha256") if found and found.init else None)


def check_origin(folder: Path, task: Task, original: MadeFrom | None = None) -> bool:
    """Check by its run folder that a reference was trained on exactly the retained samples.

    A reference that was fine-tuned (`lethe train --init`) is proven if its base is one of timm's, or the one that the
    original was made from.

    Args:
        folder: Run folder of the reference.
        task: The data with the forget request.
        original: Hashes of the original and of its base.

    Returns:
        True if the run folder proves it. False if it has no record (a checkpoint that another program trained), or if
        the record leaves it open.

    Raises:
        UserError: The record contradicts it.
    """
    found = origin(folder)
    if found is None:
        return False
    name, remedy = f"--reference {folder}: by its {found.source}", "retrain with `lethe train --forget`"
    if not found.is_training:
        elsewhere = original and found.before_sha256 not in (None, original.weights_sha256)
        if not (found.method == "finetune" and elsewhere and found.samples_sha256 == task.retain.fingerprint()):
            raise UserError(f"{name} it was made by {found.method}, not by a retrain; {remedy}")
        return False  # fine-tuned on the retain set, from a model that is not the original
    if found.samples_sha256 == task.source.train.fingerprint():
        raise UserError(f"{name} it was trained on all samples, those to forget among them; {remedy}")
    if found.samples_sha256 != task.retain.fingerprint():
        raise UserError(
            f"{name} it was trained on other samples than this request retains; {remedy} and the same data and request"
        )
    if not found.init:
        return True
    base, seen = found.init.get("weights_sha256"), found.init.get("trained_on")
    if (original and base == original.weights_sha256) or seen == task.source.train.fingerprint():
        raise UserError(
            f"{name} it was trained from {found.init.get('checkpoint')}, which saw the samples to forget; train it "
            "from the base of the original: lethe train --init BASE --forget FILE"
        )
    same = original is not None and original.init_sha256 is not None and base == original.init_sha256
    return same or str(found.init.get("checkpoint")).startswith("timm:")


def check_reference(name: str, reference: ModelOutputs, original: ModelOutputs, *, proven: bool, level: float) -> None:
    """Check by its outputs that a reference was trained on the retained samples, without the forget set.

    A reference that was trained without the forget samples fits them less than the original does, compared with
    retained samples. One that was trained on the retained samples fits those as well as the original does, compared
    with test samples. With an original that never memorised anything, the first cannot be shown: a record has to prove
    it.

    Args:
        name: Name of the reference, for errors.
        reference, original: Outputs of the models.
        proven: Whether a record proves that the reference was trained without the forget samples.
        level: Confidence level of the intervals, (0, 1).

    Raises:
        UserError: By its outputs the reference was trained on other data, or with the forget samples.
    """
    mine, theirs = (_accuracy(outputs) for outputs in (reference, original))
    if theirs - mine > _MAX_ACCURACY_LOSS:
        raise UserError(
            f"--reference {name}: its test accuracy is {mine:.1f}%, the original's {theirs:.1f}%; it was trained on "
            "other data or not to its end"
        )
    retained = attack_power(original, [reference], ("retain", "test"), level)
    if retained.low > _UNTRAINED:
        raise UserError(
            f"--reference {name}: the original fits the retained samples better than it does (AUC "
            f"{retained.value:.3f} against test samples; 0.5 for a model trained on them); it was trained on other data"
        )
    forgotten = attack_power(original, [reference], ("forget", "retain"), level)
    if not proven and forgotten.low <= 0.5:
        raise UserError(
            f"--reference {name}: it fits the forget samples as well as the original does (AUC {forgotten.value:.3f} "
            "against retained samples; above 0.5 for a model trained without them); it was trained with them, or the "
            "original shows no trace of them. A run folder of `lethe train --forget` is accepted by its record; one of "
            "`lethe train --init` if the original's own record names the same base"
        )


def _accuracy(outputs: ModelOutputs) -> float:
    return 100 * outputs.predictions["test"].accuracy


def changed_share(model: nn.Module, original: nn.Module) -> float | None:
    """Return the share of the weights, outside the head, that differ; None for another architecture."""
    if [(key, value.shape) for key, value in model.state_dict().items()] != [
        (key, value.shape) for key, value in original.state_dict().items()
    ]:
        return None
    return float(compare_weights(model, original)["changed"])


def record_verdict(folder: Path, verdict: Verdict, key: Path | None = None) -> None:
    """Write verdict.json into a run folder, and append the verdict to its record.

    Args:
        folder: The run folder.
        verdict: The verdict.
        key: PEM file of the Ed25519 private key that signs the record; None: no new signature.

    Raises:
        UserError: The folder has no record, or a run is at work in it.
    """
    check_recorded(folder)
    with lock.held(folder):
        write_json(folder / "verdict.json", verdict.to_dict())
        append_to_record(folder, "verdict", verdict.to_dict(), files=["verdict.json"], key=key)


def check_recorded(folder: Path) -> None:
    """Check that a verdict can be added to the record of a folder.

    Raises:
        UserError: The folder has no record, or a run is at work in it.
    """
    lock.check(folder)
    if recorded(folder, "data") is None:
        raise UserError(f"--record: {folder} has no record.json; it is written by `lethe unlearn` and `lethe train`")
