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
        "the old features has other outputs, and its features still hold what was learned.",
    ),
    "repeatable": Measure(
        "Repeatable",
        "0%",
        "Whether the model gives the same outputs twice. Random outputs hide what was learned in one pass, not in "
        "many.",
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
        "that was not trained on an image may still classify it correctly, and one that is wrong on purpose reveals "
        "it.",
    ),
    "power": Measure(
        "Power",
        "the original is detected",
        "The membership attack on the untouched original, which was trained on the samples. If the attack does not "
        "detect even that, it proves nothing about this model.",
    ),
    "membership": Measure(
        "Membership",
        "0.5",
        "Membership inference attack: an attempt to find, by the model's outputs, which samples were trained on. Its "
        "AUC is the probability that a random forget sample is fitted better than a random test image; 0.5 is chance. "
        "Below 0.5 the model is worse on the samples than one that was not trained on them, which reveals them too.",
    ),
    "sure members": Measure(
        "Sure members",
        "close to the false positive rate",
        "Share of the forget samples that the attack finds while it is hardly ever wrong about test images. An attack "
        "can be weak on average and still find a few samples with near certainty.",
    ),
    "shifted images": Measure(
        "Shifted images",
        "0.5",
        "The membership attack on the same images moved by a pixel. A model that answers the exact images of the "
        "request from a table still knows the moved ones.",
    ),
    "agreement": Measure(
        "Agreement",
        "close to 1",
        "How far the model's outputs for the forget samples are from those of retrained models, divided by how far "
        "those are from each other. 1: it is as close to them as they are among themselves.",
    ),
    "relearning": Measure(
        "Relearning",
        "0.5 or below",
        "A copy of the model is trained on some of the forget samples and tested on the others. If their accuracy "
        "rises more than in a retrained model, they were hidden and not forgotten. Read as membership.",
    ),
    "joint": Measure(
        "Joint",
        "0 or 1",
        "Number of the figures above that are clearly on the side of a model that was trained on the samples, however "
        "little. One of them may be chance; several at once are not.",
    ),
    "samples": Measure("Samples", "more is better", "Number of samples of the verdict."),
    "references": Measure("References", "2 or more", "Number of models retrained without the samples."),
    "certificate": Measure(
        "Certificate", "", "A measurement of the procedure on simulated requests that covers this one."
    ),
    "like: weights": Measure(
        "Like the certified runs: weights", "within the range", "How far the run moved the weights of the model, log10."
    ),
    "like: score": Measure(
        "Like the certified runs: forget samples",
        "within the range",
        "Mean log-odds of the true class on the forget samples, less those of models that were not trained on them.",
    ),
    # membership attacks
    "loss": Measure("Loss", "", "The attack calls samples members on which the model's loss is low."),
    "entropy": Measure("Entropy", "", "It calls samples members on which the model is confident, rightly or not."),
    "modified_entropy": Measure(
        "Modified entropy", "", "It calls samples members on which the model is confident in the true class."
    ),
    "confidence": Measure(
        "Confidence", "", "It calls samples members whose true class the model gives a high probability."
    ),
    "calibrated_loss": Measure(
        "Calibrated loss",
        "",
        "It calls samples members on which the model's loss is lower than that of retrained models, so that the "
        "difficulty of a sample does not count.",
    ),
    "auc": Measure(
        "AUC",
        "0.5 is chance",
        "The probability that a random forget sample is fitted better than a random test image.",
    ),
    "balanced_accuracy": Measure(
        "Balanced accuracy",
        "0.5 is chance",
        "How often the attack is right, with equal weights of members and others.",
    ),
    # agreement
    "top1": Measure("Same class", "higher is better", "Share of the samples on which both models predict one class."),
    "kl_from_reference": Measure(
        "KL from retrained", "lower is better", "How far the model's probabilities are from a retrained model's."
    ),
    "kl_to_reference": Measure("KL to retrained", "lower is better", "The same, weighed by the model's probabilities."),
    "margin_gap": Measure(
        "Margin gap", "lower is better", "Difference of the two models' confidence in a sample's true class."
    ),
    "tow": Measure(
        "Tug of war (ToW)", "higher is better", "How close the accuracies on all three sets are to a retrained model's."
    ),
    "tow_mia": Measure("ToW-MIA", "higher is better", "The same with a membership attack in place of forget accuracy."),
    "rf_jsd": Measure(
        "RF-JSD",
        "lower is better",
        "Needs no retrained model: whether outputs for forget samples are those of the original for held-out images.",
    ),
    # relearning
    "held_back_before": Measure(
        "Held-back accuracy, before",
        "",
        "Accuracy on forget samples that the attack is not trained on, before the attack.",
    ),
    "held_back": Measure("Held-back accuracy, after", "closer to retrained is better", "The same after its last step."),
    "test_before": Measure(
        "Test accuracy, before", "", "Accuracy on test images of the same classes, before the attack."
    ),
    "test_after": Measure("Test accuracy, after", "", "The same after its last step."),
    "excess": Measure(
        "Excess, after",
        "points; closer to retrained is better",
        "Held-back less test accuracy: what was learned of these samples beyond all others.",
    ),
    "relearned_auc": Measure(
        "AUC, after",
        "0.5 is chance",
        "The membership attack by calibrated loss on the held-back samples, after the last step.",
    ),
    "advantage": Measure("Advantage", "points; 0 or below", "What the attack restores beyond a retrained model."),
    "steps_to_original": Measure(
        "Steps to the original's accuracy", "", "Steps until accuracy on held-back samples is that before unlearning."
    ),
    "probe": Measure(
        "Linear probe, excess",
        "points; closer to retrained is better",
        "A new head is trained on the features of kept samples.",
    ),
    # representation
    "cka": Measure("CKA", "closer to that between retrained models is better", "Similarity of a layer's features."),
    "share_of_way": Measure(
        "Share of the way", "0.5 or above", "How far a layer has gone from the original towards the retrained models."
    ),
    "knn_accuracy": Measure(
        "k-NN accuracy",
        "closer to retrained is better",
        "The class of a sample is that of its nearest kept samples in feature space, without the head.",
    ),
    "neighbours_original": Measure(
        "Shared neighbours with original", "", "Share of the nearest kept samples that two models have in common."
    ),
    "neighbours_retrained": Measure(
        "Shared neighbours with retrained", "", "The same with retrained models; the target is that between those."
    ),
    "weights_changed": Measure("Weights changed", "", "How much of the model outside the head was changed."),
    "distance": Measure("Distance travelled", "", "How far the weights of a layer have moved."),
    # attention
    "iou": Measure(
        "Overlap",
        "closer to that between retrained models",
        "How far two models attend to the same patches of an image.",
    ),
    "spearman": Measure(
        "Rank correlation", "closer to that between retrained models", "The same for all patches, by rank."
    ),
    "reading_top1": Measure("Same class", "higher is more like retrained", "As in the agreement above."),
    "reading_kl": Measure("KL from retrained", "lower is more like retrained", "As in the agreement above."),
    # all
    "interval": Measure(
        "Interval",
        "",
        "The range in brackets or the bar next to a number: where the number would mostly fall with other samples of "
        "the same kind. It does not cover the spread of training runs; the retrained models show that.",
    ),
    "retrained": Measure(
        "Retrained model, noise floor",
        "",
        "A model trained from the start without the forget samples: what unlearning imitates. Two such models differ "
        "as well, by chance of training alone; that difference is the noise floor: no method can be expected to do "
        "better.",
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
