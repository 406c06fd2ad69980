"""Figures in the sentences of README.md and docs/results.md, each made from a file of bench/results/.

`python -m bench tables` finds them by the words around them. A new one is an entry of FIGURES and its sentence; a
function of `values` raises UserError where the sentence would no longer be true.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from bench.harness.cases import VIT_B
from bench.harness.measure import middle, ratios
from bench.kernel_speed.kernel_peers import INFO_NCE_PYTORCH
from bench.kernel_speed.kernel_targets import CONTRAST, MASKING
from bench.kernel_speed.rollout_peers import FAST_VIT_ROLLOUT, PLAIN
from bench.publish.readme import IN_FULL, MIB, README, Report
from bench.quality import ablation
from bench.training_cost.recipes import RECIPES
from bench.training_cost.train import BEST_BF16
from engine.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """Numbers in a sentence. text: the sentence's words, {NAME} where `values` has a number of that name."""

    name: str
    file: str
    text: str
    values: Callable[[Report], dict[str, str]]
    document: str = README


def _yardstick(report: Report) -> dict[str, str]:
    (entry,), (subject,) = report["tasks"].values(), report["subjects"]
    samples = entry["samples"]
    return {
        "samples": f"{samples['forget'] + samples['retain']:,}",
        "epochs": f"{subject['recipe']['epochs']:g}",
        "forget": f"{samples['forget']:,}",
        "references": str(len(entry["references"])),
    }


def _standing_on_a_class(report: Report) -> dict[str, str]:
    (entry,) = report["tasks"].values()
    gaps = {each["method"]: f"{each['gap']['mean']:.2f}" for each in entry["summary"]}
    return {"floor": f"{entry['noise_floor']:.2f}", "plus": gaps["lethe_plus"], "lethe": gaps["lethe"]}


def _standing(report: Report) -> dict[str, str]:
    (entry,) = report["tasks"].values()
    gaps = {each["method"]: each["gap"]["mean"] for each in entry["summary"] if each["method"] != "retrain"}
    order = sorted(gaps, key=lambda method: gaps[method])
    if gaps["finetune"] - gaps["lethe"] > entry["noise_floor"]:
        raise UserError("leaderboard-yardstick.json has lethe better than finetune; change the sentence")
    return {
        "untouched": f"{entry['untouched']['gap']['average']:.2f}", "floor": f"{entry['noise_floor']:.2f}",
        "lethe": f"{gaps['lethe']:.2f}", "finetune": f"{gaps['finetune']:.2f}", "plus": f"{gaps['lethe_plus']:.2f}",
        "place": str(1 + order.index("lethe_plus")), "lethe_place": str(1 + order.index("lethe")),
        "methods": str(len(order)),
    }  # fmt: skip


def _alone(report: Report) -> dict[str, str]:
    """Shares of LetheViT's seconds, seed by seed, as both ran in the same hour."""
    (entry,) = report["tasks"].values()
    means = {each["method"]: f"{each['unlearn_seconds']['mean']:.0f}" for each in entry["summary"]}
    seconds = {(row["method"], row["seed"]): row["seconds"] for row in entry["rows"]}
    seeds = [seed for method, seed in seconds if method == "lethe"]

    def shares(part: str) -> list[float]:
        return [100 * seconds["lethe_plus", seed][part] / seconds["lethe", seed][part] for seed in seeds]

    unlearning = shares("unlearn")
    return {
        "plus": means["lethe_plus"], "lethe": means["lethe"], "seeds": str(len(seeds)),
        "least": f"{min(unlearning):.0f}", "most": f"{max(unlearning):.0f}",
        "whole": f"{sum(shares('total')) / len(seeds):.0f}",
    }  # fmt: skip


def _busy(report: Report) -> dict[str, str]:
    loads = [row["load_average"] for entry in report["tasks"].values() for row in entry["rows"]]
    return {"least": f"{min(loads):.1f}", "most": f"{max(loads):.1f}"}


def _ablation_figures(report: Report) -> dict[str, str]:
    gaps = {
        name: float(cells[-1].split()[0]) for name, stage, _, cells in ablation.table_rows(report) if stage == "retain"
    }
    return {"gain": f"{gaps['retain stage alone'] - gaps['default: top patches, cosine, logits']:.2f}"}


def _stability(report: Report) -> dict[str, str]:
    random, of_class = (entry["stability"]["mean"] for entry in report["tasks"].values())
    return {"random": f"{random:.2f}", "of_class": f"{of_class:.2f}"}


def _stability_of_one(report: Report) -> dict[str, str]:
    (entry,) = report["tasks"].values()
    return {"tau": f"{entry['stability']['mean']:.2f}"}


def _foresight(report: Report) -> dict[str, str]:
    (entry,) = report["tasks"].values()
    return {"tau": f"{entry['foresight']:.2f}"}


def _steps(report: Report) -> dict[str, str]:
    times = [case["rows"][0].get("times_with_prepare", {}).get(BEST_BF16) for case in report["cases"]]
    found = [middle(each) for each in times if each]
    return {"least": f"{min(found):.2f}", "most": f"{max(found):.2f}"}


def _projected(report: Report) -> dict[str, str]:
    (found,) = (each for each in report["projection"] if each["model"] == VIT_B.name)
    (hours,) = (each for each in found["hours"] if each["work"] == "lethe")
    return {"share": f"{100 * hours['share'][RECIPES[0].name]:.1f}"}


def _coin_toss(report: Report) -> dict[str, str]:
    (found,) = (each for each in report["rows"] if each["method"] == "lethe")
    return {key: f"{found[part]['auc']['value']:.2f}" for key, part in (("lethe", "ulira"), ("before", "untouched"))}


def _equality_worst(report: Report) -> dict[str, str]:
    worst = max(row["tensor"] for row in report["rows"] if row["precision"] == "fp32")
    return {"worst": f"{worst:.1e}".replace("e-0", "e-")}


def _equality_setup(report: Report) -> dict[str, str]:
    (steps,) = {row["steps"] for row in report["rows"]}
    return {"steps": str(steps)}


def _equality_bf16(report: Report) -> dict[str, str]:
    rows = [row for row in report["rows"] if row["precision"] == "bf16" and row["case"] != "one process"]
    tensors, points = ([row[key] for row in rows] for key in ("tensor", "points"))
    return {
        **{
            key: f"{value:.0e}".replace("e-0", "e-") for key, value in (("least", min(tensors)), ("most", max(tensors)))
        },
        **{key: f"{value:.1f}" for key, value in (("low", min(points)), ("high", max(points)))},
    }


def _chaos_figures(report: Report) -> dict[str, str]:
    doing = [kill["doing"] for row in report["rows"] for kill in row["kills"]]
    return {
        "runs": str(len(report["rows"])),
        "same": str(sum(row["equal"] for row in report["rows"])),
        "before": str(sum(not row["kills"] for row in report["rows"])),
        "after": str(doing.count("after the end")),
    }


def _full_disk(report: Report) -> dict[str, str]:
    if not report["full_disk"].get("equal"):
        raise UserError("chaos.json has no full disk after which the result was the same; change the sentence")
    return {}


def _two_hosts(report: Report) -> dict[str, str]:
    if not report["passed"]:
        raise UserError("two-hosts.json did not pass; change the sentence")
    return {}


def _data_figures(report: Report) -> dict[str, str]:
    synthetic, steps = report["synthetic"], report["synthetic"]["open_and_match"]
    opened, matched, first = (steps[key] for key in ("open", "match_and_split", "first_batch"))
    peak = max(opened["peak_bytes"], matched["peak_bytes"])
    return {
        "images": f"{synthetic['images']:,}",
        "shards": f"{synthetic['shards']:,}",
        "index": f"{synthetic['index']['seconds']:.1f}",
        "open": f"{opened['seconds']:.1f}",
        "ids": f"{synthetic['forget']:,}",
        "match": f"{matched['seconds']:.1f}",
        "batch": str(first["batch"][0]),
        "first": f"{opened['seconds'] + matched['seconds'] + first['seconds']:.1f}",
        "extra": f"{(peak - opened['peak_bytes'] + opened['extra_bytes']) / MIB:.0f}",
        "peak": f"{peak / 2**30:.2f}",
    }


def _decoding_figures(report: Report) -> dict[str, str]:
    training, evaluation, *_ = (
        {row["contender"]: f"{row['images_per_second']:.0f}" for row in case["rows"]} for case in report["decoding"]
    )
    bicubic, bilinear = (f"torchvision ImageFolder, {kind}" for kind in ("bicubic", "bilinear"))
    return {
        "ours": training["ours, draft"], "same": training[bicubic], "default": training[bilinear],
        "ours_evaluating": evaluation["ours, draft"], "evaluating": evaluation[bicubic],
    }  # fmt: skip


def _mutation_figures(report: Report) -> dict[str, str]:
    rows = report["rows"]
    return {"planted": str(len(rows)), "noticed": str(sum(row["killed_by"] is not None for row in rows))}


def _compile_figures(report: Report) -> dict[str, str]:
    kernels = report["kernels"]
    return {"kernels": str(len(kernels)), "spills": str(sum(one["spilled_bytes"] > 0 for one in kernels))}


def _rows(report: Report, work: str, part: str) -> dict[str, Any]:
    case = next(case for case in report["cases"] if case["work"] == work and part in case["case"])
    return {row["contender"]: row for row in case["rows"]}


def _masks_figures(report: Report) -> dict[str, str]:
    small, base = (_rows(report, MASKING, f"ViT-{letter}/16 224") for letter in "SB")
    return {
        "small": f"{middle(ratios(small[FAST_VIT_ROLLOUT], small['ours'])):.2f}",
        "base": f"{middle(ratios(base[FAST_VIT_ROLLOUT], base['ours'])):.2f}",
        "forward": f"{base[PLAIN]['median']:.2f}",
        "peer": f"{base[FAST_VIT_ROLLOUT]['median']:.2f}",
    }


def _paired_figures(report: Report) -> dict[str, str]:
    rows = _rows(report, CONTRAST, "paired")
    return {key: f"{1e3 * rows[name]['median']:.2f}" for key, name in (("ours", "ours"), ("peer", INFO_NCE_PYTORCH))}


FIGURES = (
    Figure(
        name="yardstick", file="leaderboard-yardstick.json", values=_yardstick,
        text="on {samples} images of CIFAR-10 for {epochs} epochs; {forget} of them, drawn at random, are to be "
        "forgotten; {references} models trained without them",
    ),
    Figure(
        name="standing", file="leaderboard-yardstick.json", values=_standing,
        text="The untouched model is {untouched} points from a retrained one, and retrained models are {floor} from "
        "each other. LetheViT as published ends {lethe} points away, no better than fine-tuning alone ({finetune}); "
        "`lethe_plus` ends {plus} away. By gap they have places {lethe_place} and {place} of {methods} methods",
    ),
    Figure(
        name="steps", file="train-cpu.json", values=_steps,
        text="{least} to {most} times as many images a second as the best plain loop in bf16",
    ),
    Figure(
        name="projected", file="retrain-cost.json", values=_projected,
        text="LetheViT on ViT-B/16 is projected to take {share}% of DeiT's 300 epochs",
    ),
    Figure(
        name="coin-toss", file="ulira-digits.json", values=_coin_toss,
        text="finds LetheViT's forget samples with an AUC of {lethe}, those of the untouched model with {before}",
    ),
    Figure(
        name="equality-worst", file="equality.json", values=_equality_worst,
        text="differ from one process by at most {worst} of a tensor's norm",
    ),
    Figure(
        name="alone", file="leaderboard-yardstick-alone.json", values=_alone,
        text="alone on the machine its unlearning took {plus} s beside LetheViT's {lethe} s, the mean of {seeds} seeds "
        "({least} to {most}% of it); with the evaluation of the result it was {whole}%",
    ),
    Figure(
        name="busy", file="leaderboard-yardstick.json", values=_busy, document=IN_FULL,
        text="the load average before a run on the yardstick was {least} to {most}",
    ),
    Figure(
        name="ablation", file="yardstick-ablation.json", values=_ablation_figures, document=IN_FULL,
        text="The forget stage takes {gain} points off the gap that the retain stage leaves alone",
    ),
    Figure(
        name="stability", file="leaderboard-digits.json", values=_stability, document=IN_FULL,
        text="Between seeds the order of the methods by gap has Kendall's tau {random} on a random tenth of digits and "
        "{of_class} on a class",
    ),
    Figure(
        name="stability-yardstick", file="leaderboard-yardstick.json", values=_stability_of_one, document=IN_FULL,
        text="Between them the methods keep their order by gap with Kendall's tau {tau}",
    ),
    Figure(
        name="standing-class", file="leaderboard-yardstick-class.json", values=_standing_on_a_class, document=IN_FULL,
        text="retrained models are {floor} points from each other, `lethe_plus` ends {plus} from them and LetheViT "
        "{lethe}",
    ),
    Figure(
        name="stability-class", file="leaderboard-yardstick-class.json", values=_stability_of_one, document=IN_FULL,
        text="Between seeds the methods keep their order with Kendall's tau {tau}",
    ),
    Figure(
        name="foresight-class-in-full", file="leaderboard-yardstick-class.json", values=_foresight, document=IN_FULL,
        text="the score orders them as the gap does with {tau} only",
    ),
    Figure(
        name="foresight-class", file="leaderboard-yardstick-class.json", values=_foresight,
        text="on its class with {tau}",
    ),
    Figure(
        name="foresight", file="leaderboard-yardstick.json", values=_foresight,
        text="orders the methods on the yardstick as the gap does with Kendall's tau {tau}",
    ),
    Figure(
        name="equality-setup", file="equality.json", values=_equality_setup, document=IN_FULL,
        text="After {steps} steps on the yardstick",
    ),
    Figure(
        name="equality-bf16", file="equality.json", values=_equality_bf16, document=IN_FULL,
        text="differ by {least} to {most} in the worst tensor and by {low} to {high} points of accuracy",
    ),
    Figure(
        name="chaos", file="chaos.json", values=_chaos_figures,
        text="Of {runs} runs with SIGKILL at a random moment (one rank or all; in a step, while a checkpoint was "
        "written, while the report was), {same} ended in the same bits as the run that nobody disturbed; {before} of "
        "them had ended before its kill, {after} was killed after its end",
    ),
    Figure(name="full-disk", file="chaos.json", values=_full_disk, text="The same goes for a full disk"),
    Figure(
        name="two-hosts", file="two-hosts.json", values=_two_hosts, text="for a link between two hosts that was cut"
    ),
    Figure(
        name="data", file="data-cpu.json", values=_data_figures, document=IN_FULL,
        text="{images} images in {shards} tar shards, small ones made on the spot: index built in {index} s, opened "
        "again in {open} s, {ids} ids matched in {match} s, first training batch of {batch} after {first} s; {extra} "
        "MiB at most above the process before it ({peak} GiB in all)",
    ),
    Figure(
        name="decoding", file="data-cpu.json", values=_decoding_figures, document=IN_FULL,
        text="training {ours} against {same} for torchvision's ImageFolder with the same interpolation ({default} with "
        "its default, bilinear); evaluation {ours_evaluating} against {evaluating}",
    ),
    Figure(
        name="mutation", file="mutation.json", values=_mutation_figures,
        text="{planted} planted bugs, of which the tests notice {noticed}",
    ),
    Figure(
        name="compile", file="kernels-compile.json", values=_compile_figures,
        text="{kernels} kernels of the production launches compiled for sm_80, sm_90, sm_100 and gfx942, {spills} of "
        "them with a spill",
    ),
    Figure(
        name="masks", file="kernels-cpu.json", values=_masks_figures, document=IN_FULL,
        text="Beside fast-vit-rollout ours is {small} times as fast on ViT-S and {base} times on ViT-B, where the aim "
        "was 1.15 for both: there the forward pass alone takes {forward} of the peer's {peer} s",
    ),
    Figure(
        name="paired", file="kernels-cpu.json", values=_paired_figures, document=IN_FULL,
        text="256 pairs of 1,000 logits, our loss takes {ours} ms and info-nce-pytorch's {peer} ms",
    ),
)  # fmt: skip
