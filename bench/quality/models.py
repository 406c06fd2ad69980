"""Test which of timm's classifiers can be opened, and what runs on them: `python -m bench models`.

Two parts. `count` builds every name of `timm.list_models()` on the meta device, which has shapes and no numbers. It
counts the classifiers, those that methods accept which read logits, and the columnar ViTs, at two blocks, that `lethe`
accepts; those have to return logits in a pass, the others in the table. `table` takes one small model of every module
of timm, and more of the modules whose models differ in their attention, with random weights. Each is opened, unlearned
for a step by `lethe` and by `lethe_plus`, evaluated as by `verify`, and planned.

A refusal is a `UserError`, stored with its message; any other error is a crash, and counted as such.
"""

from __future__ import annotations

import concurrent.futures
import copy
import json
import multiprocessing
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import Dataset

from bench.harness.report import Report
from engine.cli.console import console
from engine.core.method import refuse_unfit
from engine.data import from_dataset
from engine.errors import UserError
from engine.evaluate import Evaluator
from engine.evaluate.relearning import relearning_curve
from engine.evaluate.representation import compare_weights
from engine.methods import Method, get_method
from engine.models.info import black_image, model_info
from engine.models.spec import ModelSpec
from engine.plan.cost import count_cost
from engine.run.unlearn import unlearn

CLASSES = 4
# Modules of timm whose models are one column of blocks of attention over the same tokens, or could be taken for one.
COLUMNAR = (
    "beit",
    "cait",
    "convit",
    "deepseek_vit",
    "deit",
    "eva",
    "gemma4_vit",
    "naflexvit",
    "qwen3_vit",
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "vision_transformer_sam",
    "xcit",
)
ATTENTION = (
    *COLUMNAR,
    *("byoanet", "coat", "crossvit", "davit", "edgenext", "efficientformer", "efficientformer_v2", "efficientvit_mit"),
    *("efficientvit_msra", "fastvit", "gcvit", "hiera", "hieradet_sam2", "iformer", "levit", "lowformer", "maxxvit"),
    *("metaformer", "mobilevit", "mvitv2", "nest", "nextvit", "pit", "pvt_v2", "repvit", "shvit", "swiftformer"),
    *("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "tiny_vit", "tnt", "twins", "visformer"),
    *("vitamin", "volo", "cpubone", "mobilenetv5", "csatv2"),
)
_TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
_FLEX = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}
_DEEP = {"depth": 2}
# What makes a model small, by module.
_SMALLER: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("beit", "deit", "eva", "vision_transformer", "vision_transformer_relpos"), _TINY),
    "naflexvit": _FLEX,
    **dict.fromkeys(("cait", "convit", "vision_transformer_hybrid", "xcit"), _DEEP),
    **{module: {"img_size": 96, **_DEEP} for module in ("gemma4_vit", "qwen3_vit")},
    "deepseek_vit": {"img_size": 98, **_DEEP},
    "vision_transformer_sam": {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3},
}
# Words for sizes in timm's names, smallest first.
_SIZES = (
    ("atto", "a0", "b0", "s0", "t0", "m0", "s1", "w18"),
    ("femto", "xxt", "xxs", "n"),
    ("pico", "nano", "xtiny", "xs"),
    ("tiny", "ti", "t", "mini", "zepto"),
    ("small", "s", "micro"),
    ("medium", "m", "18", "b1"),
)
# Sizes of models whose names have no size.
_CHOSEN = {"eva": "vit_small_patch16_rope_224", "naflexvit": "naflexvit_base_patch16_gap", "senet": "legacy_seresnet18"}
# Convolutional models are run on images of this size, except those that are built for one size.
_IMAGE = {"input_size": (3, 96, 96)}
_OF_ONE_SIZE = ("mlp_mixer", "sequencer")
# Further kinds of attention, by module.
_KINDS = (
    ("rotary", "eva02_tiny_patch14_224"),
    ("rotary, DINOv3", "vit_small_patch16_dinov3"),
    ("rotary, learned", "vit_small_patch16_rope_mixed_224"),
    ("rotary, attention pooling", "vit_pe_core_tiny_patch16_384"),
    ("attention pooling", "vit_base_patch16_siglip_224"),
    ("registers", "vit_small_patch14_reg4_dinov2"),
    ("parallel attention", "vit_small_patch16_18x2_224"),
    ("distilled", "deit_tiny_distilled_patch16_224"),
    ("relative bias, shared", "vit_srelpos_small_patch16_224"),
    ("parallel blocks", "naflexvit_base_patch16_par_gap"),
    ("attention pooling", "naflexvit_base_patch16_map"),
    ("MobileCLIP stem", "vit_base_mci_224"),
)


def run_models(json_file: Path | None, only: str | None, jobs: int, part: str) -> dict[str, Any]:
    """Run both parts, or one; only: names that contain this. Returns the content of `json_file`."""
    report = Report(environment={"timm": timm.__version__, "classes": CLASSES})
    began = time.perf_counter()
    results: dict[str, Any] = {}
    if part in ("all", "count"):
        names = [name for name in timm.list_models() if only is None or only in name]
        results["count"] = summary(_each(counted, names, jobs, _partial(json_file, "count")))
        print_count(results["count"])
    if part in ("all", "table"):
        cases = [case for case in subjects() if only is None or only in case[2]]
        results["table"] = _each(supported, cases, jobs, _partial(json_file, "table"))
        print_support(results["table"])
    results["seconds"] = time.perf_counter() - began
    written = report.write(results, json_file)
    for file in (_partial(json_file, "count"), _partial(json_file, "table")):
        if file is not None:
            file.unlink(missing_ok=True)
    return written


def _partial(json_file: Path | None, part: str) -> Path | None:
    """Return the file to which rows are written as they are made, so that an interrupted run can continue."""
    return None if json_file is None else json_file.with_suffix(f".{part}.jsonl")


def _each(work: Callable[[Any], Any], items: Iterable[Any], jobs: int, file: Path | None) -> list[Any]:
    """Return the rows of all items, in their order.

    Each is appended to `file`, and rows that are in it are not made again.
    """
    items = list(items)
    rows: dict[str, Any] = {}
    if file is not None and file.is_file():
        rows = {row["name"]: row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
    names = [item if isinstance(item, str) else item[2] for item in items]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
        missing = [item for item, name in zip(items, names, strict=True) if name not in rows]
        for done in concurrent.futures.as_completed([pool.submit(work, item) for item in missing]):
            row = done.result()
            rows[row["name"]] = row
            if file is not None:
                with file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
    return [rows[name] for name in names]


def _one_thread() -> None:
    torch.set_num_threads(1)


# --- every model, by its shapes ---------------------------------------------------------------------------------------


def counted(name: str) -> dict[str, Any]:
    """Return the row of one name of timm: its module, and for a classifier logits and, of columnar ones, lethe.

    Values are true, or why not.
    """
    module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    row: dict[str, Any] = {"name": name, "module": module}
    model, why = _of_shapes(name, {"depth": 2} if module in COLUMNAR else {})
    if model is None:
        return {**row, "classifier": False, "why": why}
    if getattr(model, "num_classes", 0) != CLASSES or not callable(getattr(model, "get_classifier", None)):
        return {**row, "classifier": False, "why": "no classifier"}
    check = refuse_unfit if module not in COLUMNAR else _logits
    row |= {"classifier": True, "logits": outcome(lambda: check(get_method("random_labels"), model))}
    if module in COLUMNAR:
        row["lethe"] = outcome(lambda: refuse_unfit(get_method("lethe"), model))
    return row


def _of_shapes(name: str, arguments: dict[str, Any]) -> tuple[nn.Module | None, str]:
    """Build the model on the meta device with the arguments that its constructor accepts.

    Returns the model and "", or None and why there is none.
    """
    why = ""
    for kept in (arguments, {}) if arguments else ({},):
        try:
            with torch.device("meta"):
                return timm.create_model(name, num_classes=CLASSES, **kept).eval(), ""
        except Exception as error:  # what timm itself cannot build as a classifier
            why = _words(error)
    return None, why


def _logits(method: type[Method], model: nn.Module) -> None:
    refuse_unfit(method, model)
    with torch.no_grad():
        found = model(black_image(model))
    if not isinstance(found, Tensor) or tuple(found.shape) != (1, CLASSES):
        raise UserError(f"{type(model).__name__} does not return logits of one image")


def outcome(work: Callable[[], Any]) -> str:
    """Return "yes", "refused: ..." or "crash: ..."."""
    try:
        work()
    except UserError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"crash: {_words(error)}"
    return "yes"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return counts, and every name that was not accepted with its message."""
    classifiers = [row for row in rows if row["classifier"]]
    columnar = [row for row in classifiers if "lethe" in row]
    return {
        "names": len(rows),
        "classifiers": len(classifiers),
        "logits": sum(row["logits"] == "yes" for row in classifiers),
        "columnar": len(columnar),
        "lethe": sum(row["lethe"] == "yes" for row in columnar),
        "crashes": sum(row.get(key, "").startswith("crash") for row in classifiers for key in ("logits", "lethe")),
        "by_module": {
            module: {
                "classifiers": sum(row["module"] == module for row in classifiers),
                "logits": sum(row["module"] == module and row["logits"] == "yes" for row in classifiers),
                "lethe": sum(row["module"] == module and row["lethe"] == "yes" for row in columnar),
            }
            for module in sorted({row["module"] for row in classifiers})
        },
        "not_logits": {row["name"]: row["logits"] for row in classifiers if row["logits"] != "yes"},
        "not_lethe": {row["name"]: row["lethe"] for row in columnar if row["lethe"] != "yes"},
    }


def print_count(found: dict[str, Any]) -> None:
    for key, of in (("logits", "classifiers"), ("lethe", "columnar")):
        share = 100 * found[key] / max(1, found[of])
        console.print(f"{key}: {found[key]} of {found[of]} {of} ({share:.1f}%)")
    console.print(f"crashes: {found['crashes']}")


# --- one of each, with weights ----------------------------------------------------------------------------------------


def subjects() -> list[tuple[str, str, str, dict[str, Any]]]:
    """Return (module, kind, name, arguments) of every row.

    These are the smallest model of each module, by its name, and further kinds of attention.
    """
    rows = []
    for module in timm.list_modules():
        names = [name for name in timm.list_models(module=module) if not name.endswith(("_enc", "_align", "_features"))]
        tests = [name for name in names if name.startswith("test_")]
        if names := tests or names:
            name = _CHOSEN.get(module) or min(names, key=_size)
            rows.append((module, "", name, _SMALLER.get(module, {})))
    for kind, name in _KINDS:
        module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        rows.append((module, kind, name, _SMALLER.get(module, {})))
    return sorted(rows, key=lambda row: (row[0] not in ATTENTION, row[0], row[1]))


def _size(name: str) -> tuple[int, int, str]:
    """Return a key that orders names from small models to large ones."""
    parts = re.split(r"[_\d]+", name) + re.findall(r"(?<![a-z])[a-z]+\d+", name)
    ranks = [rank for rank, words in enumerate(_SIZES) if any(word in parts for word in words)]
    return min(ranks, default=len(_SIZES)), len(name), name


def supported(case: tuple[str, str, str, dict[str, Any]]) -> dict[str, Any]:
    """Make a row of the table."""
    module, kind, name, arguments = case
    row: dict[str, Any] = {"module": module, "kind": kind, "name": name, "attention": module in ATTENTION}
    began = time.perf_counter()
    config = _IMAGE if module == "mobilenetv5" or module not in (*ATTENTION, *_OF_ONE_SIZE) else {}
    spec, problem = _spec(name, arguments, config)
    if spec is None:
        return {**row, "opens": problem, "seconds": time.perf_counter() - began}
    row["model_args"] = spec.model_args
    model = spec.build(seed=0).eval()
    row["opens"] = outcome(lambda: _logits(get_method("random_labels"), model))
    if row["opens"] == "yes":
        row |= {
            "lethe": outcome(lambda: _step(model, "lethe", {"forget_epochs": 1, "retain_epochs": 1})),
            "lethe_plus": outcome(lambda: _step(model, "lethe_plus", {"views": False})),
            "verify": outcome(lambda: _examined(model)),
            "plan": outcome(
                lambda: count_cost(spec, precision="fp32", autocast=False, checkpointing=False, attention="eager")
            ),
        }
    return {**row, "seconds": time.perf_counter() - began}


def _spec(name: str, arguments: dict[str, Any], config: dict[str, Any]) -> tuple[ModelSpec | None, str]:
    """Return the spec of the smallest model that the arguments allow, or why timm builds none."""
    problem = ""
    for kept in (arguments, {key: value for key, value in arguments.items() if key == "depth"}, {}):
        spec = ModelSpec(architecture=name, num_classes=CLASSES, model_args=kept, pretrained_cfg=config)
        try:
            with torch.device("meta"):
                spec.build()
        except Exception as error:
            problem = f"crash: timm: {_words(error)}"
            continue
        return spec, ""
    return None, problem


class _Random(Dataset[Any]):
    def __init__(self, count: int, shape: tuple[int, ...], first: int) -> None:
        self.count, self.shape, self.first = count, shape, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(self.first + index)
        return torch.randn(self.shape, generator=generator), index % CLASSES


def _sets(model: nn.Module) -> dict[str, Any]:
    info = model_info(model)
    shape = (info.in_chans, *info.input_size)
    sizes = {"forget": 4, "retain": 4, "test": 4}
    return {name: from_dataset(_Random(n, shape, 100 * i), name) for i, (name, n) in enumerate(sizes.items())}


def _step(model: nn.Module, method: str, options: dict[str, Any]) -> None:
    """Run a step, in which weights have to change and losses to be finite."""
    sets = _sets(model)
    config = {**options, "max_steps": 1, "batch_size": 2, "workers": 0, "device": "cpu", "precision": "fp32"}
    config |= {"augment": "none", "collapse_drop": 100.0}
    result = unlearn(model, sets["forget"], sets["retain"], method=method, config=config, validation=sets["test"])
    if compare_weights(result.model, model)["identical"]:
        raise RuntimeError(f"a step of {method} changed nothing")


def _examined(model: nn.Module) -> None:
    """Do what `lethe verify` does with each model: outputs, relearning, and the comparison of weights."""
    sets = _sets(model)
    evaluator = Evaluator(sets["forget"], sets["retain"], sets["test"], device="cpu", workers=0, batch_size=4)
    answers = evaluator.all_predictions(model)
    if not all(np.isfinite(each.logits).all() for each in answers.values()):
        raise RuntimeError("logits are not finite")
    options: dict[str, Any] = {"device": "cpu", "workers": 0, "batch_size": 2, "lr": 1e-4}
    relearning_curve(model, sets["forget"], sets["test"], steps=(0, 1), **options)
    compare_weights(copy.deepcopy(model), model)


def print_support(rows: list[dict[str, Any]]) -> None:
    table = Table("module", "kind", "model", *COLUMNS, "s", header_style="bold")
    for row in rows:
        cells = (row.get(key, "-").partition(":")[0] for key in COLUMNS)
        table.add_row(row["module"], row["kind"], row["name"], *cells, f"{row['seconds']:.0f}")
    console.print(table)
    console.print(dict(Counter(row.get(key, "-").partition(":")[0] for row in rows for key in COLUMNS)))


COLUMNS = ("opens", "lethe", "lethe_plus", "verify", "plan")
