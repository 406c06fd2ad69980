"""Definitions of the numbers of a proof, for readers who do not train models."""

from __future__ import annotations

from typing import Any

from engine.report.page import Measure

_KNOWN = {
    # gates
    "changed": Measure(
        "Weights changed",
        "more than 0%",
        "Whether anything but the model's last layer, the head, differs from the original. A model with a new head on "
        "the old features answers differently and still holds what it learned, one layer away.",
    ),
    "repeatable": Measure(
        "Repeatable",
        "0%",
        "Whether the model answers the same when it is asked twice. Random answers hide what was learned from one "
        "look, not from many.",
    ),
    "test accuracy": Measure(
        "Test accuracy",
        "0 points or above",
        "Share of images that no model was trained on which are classified correctly, less that of the models compared "
        "with: whether the model is still of use.",
    ),
    "retain accuracy": Measure(
        "Retain accuracy",
        "0 points or above",
        "The same for the training samples that are kept: whether forgetting damaged what was to stay.",
    ),
    "forget accuracy": Measure(
        "Forget accuracy",
        "0 points",
        "The same for the samples to be forgotten. The target is what a retrained model reaches, not zero: a model "
        "that never saw an image can still recognise what is in it, and one that fails on it on purpose gives it away.",
    ),
    "power": Measure(
        "Power",
        "the original is caught",
        "The membership attack on the untouched original, which was trained on the samples. Where the attack does not "
        "notice even that, its silence about this model means nothing.",
    ),
    "membership": Measure(
        "Membership",
        "0.5",
        "Membership inference attack: an attempt to tell from the model's answers which samples were trained on. Its "
        "AUC is the chance that a random forget sample looks more learned than a random test image; 0.5 is a coin "
        "toss. Below 0.5 the model is worse on the samples than one that never saw them, which gives them away too.",
    ),
    "sure members": Measure(
        "Sure members",
        "close to the false positive rate",
        "Share of the forget samples that the attack names while it is hardly ever wrong about test images. An attack "
        "can be weak on average and still be certain of a few samples.",
    ),
    "agreement": Measure(
        "Agreement",
        "close to 1",
        "How far the model's answers to the forget samples are from those of retrained models, divided by how far "
        "those are from each other. 1: it is as close to them as they are among themselves.",
    ),
    "relearning": Measure(
        "Relearning",
        "0.5 or below",
        "An attacker trains a copy of the model on some of the forget samples, and asks it about the others. If those "
        "come back more than in a retrained model, they were hidden and not forgotten. Read as membership.",
    ),
    "samples": Measure("Samples", "more is better", "How many samples there are to decide with."),
    "references": Measure(
        "References", "2 or more", "How many models retrained without the samples are compared with."
    ),
    # membership attacks
    "loss": Measure("Loss", "", "The attack calls samples members on which the model's loss is low."),
    "entropy": Measure("Entropy", "", "It calls samples members on which the model is sure, rightly or wrongly."),
    "modified_entropy": Measure(
        "Modified entropy", "", "It calls samples members on which the model is sure of the true class, not of others."
    ),
    "confidence": Measure(
        "Confidence", "", "It calls samples members whose true class the model gives a high probability."
    ),
    "calibrated_loss": Measure(
        "Calibrated loss",
        "",
        "It calls samples members on which the model's loss is lower than that of retrained models: how hard a sample "
        "is for any model is taken out.",
    ),
    "auc": Measure(
        "AUC",
        "0.5 is a coin toss",
        "The chance that a random forget sample looks more learned than a random test image.",
    ),
    "balanced_accuracy": Measure(
        "Balanced accuracy",
        "0.5 is a coin toss",
        "How often the attack is right, members and others weighing the same.",
    ),
    # agreement
    "top1": Measure("Same class", "higher is better", "Share of the samples on which both models name the same class."),
    "kl_from_reference": Measure(
        "KL from retrained", "lower is better", "How far the model's probabilities are from a retrained model's."
    ),
    "kl_to_reference": Measure("KL to retrained", "lower is better", "The same, weighed by the model's probabilities."),
    "margin_gap": Measure(
        "Margin gap", "lower is better", "How differently sure the two models are of a sample's true class."
    ),
    "tow": Measure(
        "Tug of war (ToW)", "higher is better", "How close the accuracies on all three sets are to a retrained model's."
    ),
    "tow_mia": Measure("ToW-MIA", "higher is better", "The same with a membership attack in place of forget accuracy."),
    "rf_jsd": Measure(
        "RF-JSD",
        "lower is better",
        "Needs no retrained model: whether the model reads forget samples as the original read images it had not seen.",
    ),
    # relearning
    "held_back_before": Measure(
        "Held-back accuracy, before",
        "",
        "Accuracy on forget samples that the attacker does not hold, before the attack.",
    ),
    "held_back": Measure("Held-back accuracy, after", "closer to retrained is better", "The same after its last step."),
    "test_before": Measure(
        "Test accuracy, before", "", "Accuracy on test images of the same classes, before the attack."
    ),
    "test_after": Measure("Test accuracy, after", "", "The same after its last step."),
    "excess": Measure(
        "Excess, after",
        "points; closer to retrained is better",
        "Held-back less test accuracy: what the model knows of these samples beyond what it knows of any other.",
    ),
    "relearned_auc": Measure(
        "AUC, after",
        "0.5 is a coin toss",
        "The membership attack by calibrated loss on the held-back samples, after the attacker's last step.",
    ),
    "advantage": Measure("Advantage", "points; 0 or below", "What the attack brings back beyond a retrained model."),
    "steps_to_original": Measure(
        "Steps to the original's accuracy", "", "How soon the held-back samples are read as well as before unlearning."
    ),
    "probe": Measure(
        "Linear probe, excess",
        "points; closer to retrained is better",
        "A new head is trained on the features of kept samples.",
    ),
    # representation
    "cka": Measure("CKA", "closer to that between retrained models is better", "How alike a layer's features are."),
    "share_of_way": Measure(
        "Share of the way", "0.5 or above", "How far a layer has gone from the original towards the retrained models."
    ),
    "knn_accuracy": Measure(
        "k-NN accuracy",
        "closer to retrained is better",
        "The class of a sample is read from its nearest kept samples in feature space, without the head.",
    ),
    "neighbours_original": Measure(
        "Shared neighbours with original", "", "Whether two models see the same kept samples as nearest to a sample."
    ),
    "neighbours_retrained": Measure(
        "Shared neighbours with retrained", "", "The same with retrained models; the target is that between those."
    ),
    "weights_changed": Measure("Weights changed", "", "How much of the model outside the head was changed."),
    "distance": Measure("Distance travelled", "", "How far the weights of a layer have moved."),
    # attention
    "iou": Measure(
        "Overlap", "closer to that between retrained models", "How far two models look at the same places of an image."
    ),
    "spearman": Measure(
        "Rank correlation", "closer to that between retrained models", "The same for all places, by rank."
    ),
    "reading_top1": Measure("Same class", "higher is more like retrained", "As in the agreement above."),
    "reading_kl": Measure("KL from retrained", "lower is more like retrained", "As in the agreement above."),
    # all
    "interval": Measure(
        "Interval",
        "",
        "The range in brackets or the bar beside a number: where the number would mostly fall with other samples of "
        "the same kind. It does not say what another training run would give; the retrained models show that.",
    ),
    "retrained": Measure(
        "Retrained model, noise floor",
        "",
        "A model trained from the start without the forget samples: what unlearning imitates. Two such models differ "
        "as well, by chance of training alone; that difference is the noise floor: no method can be asked for less.",
    ),
    "forget samples": Measure(
        "Forget, retain and test samples",
        "",
        "The training samples to be forgotten; those that are kept; and images that no model was trained on.",
    ),
}
_RATE = "tpr_at_fpr_"


def rate_of(key: str) -> float | None:
    """Return the false positive rate of a key such as `tpr_at_fpr_0.01`; None for another key."""
    try:
        return float(key.removeprefix(_RATE)) if key.startswith(_RATE) else None
    except ValueError:
        return None


def term(key: str, direction: Any = None) -> Measure:
    """Return the measure of a key of the proof.

    An unknown key keeps its name, so that no number is lost.

    Args:
        key: The key.
        direction: How a value is read, according to the proof; added to the definition.
    """
    rate = rate_of(key)
    if rate is not None:
        found = Measure(
            f"TPR at {100 * rate:g}% FPR",
            f"{100 * rate:g}% is no power",
            f"Share of the forget samples that the attack finds while it calls {100 * rate:g}% of test images members.",
        )
    else:
        found = _KNOWN.get(key) or Measure(key.replace("_", " "), "", "")
    if not direction:
        return found
    return Measure(found.name, found.hint, f"{found.definition} {sentence(str(direction))}".strip())


def sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."
