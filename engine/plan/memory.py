"""Bytes on one rank, part by part, at the moments of a run: those of DeepSpeed's stages, and the engine's own.

P parameters, N ranks, w bytes a weight: 2 in bf16 at ZeRO 1 to 3, else 4 (bf16 at stage 0, and if a file enables
torch_autocast, is autocast over float32 weights). Read from DeepSpeed 0.19's runtime/zero/stage_1_and_2.py, stage3.py
and engine.py, and checked against the resident memory of ranks on the CPU (docs/lab). Adam's moments and master
weights are float32 everywhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from engine.errors import UserError
from engine.plan.cost import Cost

Place = Literal["device", "host"]

# Weights in one allreduce of plain data parallel (MEMORY_OPT_ALLREDUCE_SIZE of DeepSpeed).
_ALLREDUCE = 500_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zero:
    """The parts of a DeepSpeed configuration that determine memory, sizes in weights; defaults as in DeepSpeed."""

    stage: int = 0
    offload_optimizer: bool = False
    offload_param: bool = False
    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    prefetch_bucket_size: int = 50_000_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    grad_accum_fp32: bool = False
    autocast: bool = False

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Zero:
        """Return the sizes in a DeepSpeed JSON; "auto" and missing values are DeepSpeed's defaults.

        Raises:
            UserError: zero_optimization is not a group of options.
        """
        zero = config.get("zero_optimization") or {}
        if not isinstance(zero, Mapping):
            raise UserError("deepspeed configuration: zero_optimization is not a group of options")
        stage = zero.get("stage", 0)

        def number(*names: str) -> dict[str, int]:
            given = [zero[name] for name in names if isinstance(zero.get(name), (int, float))]
            return {names[-1]: int(given[0])} if given else {}

        def group(name: str, of: Mapping[str, Any] = config) -> Mapping[str, Any]:
            return of[name] if isinstance(of.get(name), Mapping) else {}

        def offloaded(name: str) -> bool:
            return group(name, zero).get("device", "none") != "none"

        return cls(
            stage=stage,
            offload_optimizer=offloaded("offload_optimizer"),
            offload_param=offloaded("offload_param"),
            # By default, DeepSpeed overlaps at stage 3 alone.
            overlap_comm=bool(zero.get("overlap_comm", stage == 3)) and zero.get("overlap_comm") != "auto",
            grad_accum_fp32=group("data_types").get("grad_accum_dtype") in ("fp32", "float32"),
            autocast=group("torch_autocast").get("enabled") is True,
            **number("reduce_bucket_size"),
            **number("stage3_prefetch_bucket_size", "prefetch_bucket_size"),
            **number("stage3_max_live_parameters", "max_live_parameters"),
            **number("stage3_max_reuse_distance", "max_reuse_distance"),
            **number("sub_group_size"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run that determine memory.

    Attributes:
        deepspeed: DeepSpeed runs it, rather than plain torch on one process.
        teacher: How the original is stored, or that the method has none.
        augmented: Forget images are augmented, so the original stays in memory and nothing is cached.
        contrast: Outputs that are cached: logits or features.
        forget: Number of forget samples.
        watched: The collapse guard is on.
        also: Bytes of what the method holds in addition, by name (`Method.held_bytes`).
    """

    zero: Zero
    ranks: int
    batch_size: int
    accumulation: int
    bf16: bool
    deepspeed: bool
    device: Literal["cpu", "cuda"]
    teacher: Literal["replicated", "sharded", "none"]
    augmented: bool
    contrast: str
    forget: int
    watched: bool
    also: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def by_autocast(self) -> bool:
        """Whether bf16 is autocast over float32 weights."""
        return self.zero.stage == 0 or self.zero.autocast


@dataclasses.dataclass(frozen=True)
class Part:
    """Bytes of one item.

    Attributes:
        name: Name of the item.
        bytes: Its size.
        place: Where it is stored.
        why: The formula and the reason.
    """

    name: str
    bytes: int
    place: Place
    why: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a rank at the moment of the peak, and the totals of the other moments.

    On the CPU there is one memory: all parts are "device", and the sum is the resident memory of a rank.

    Attributes:
        moment: Moment of the peak.
        parts: Parts at the peak.
        moments: Totals by moment and place.
    """

    moment: str
    parts: list[Part]
    moments: dict[str, dict[Place, int]]

    def total(self, place: Place = "device") -> int:
        """Return the bytes at the peak in one place."""
        return sum(part.bytes for part in self.parts if part.place == place)

    @property
    def host_peak(self) -> int:
        """Peak of host memory over all moments."""
        return max(totals["host"] for totals in self.moments.values())


def count_memory(cost: Cost, run: Run, baseline: int | None = None) -> Memory:
    """Count all parts at the peak.

    Args:
        cost: Cost of a pass.
        run: The run.
        baseline: Bytes of the interpreter and libraries, on the CPU.
    """
    held = _held(cost, run, baseline)
    also = [Part(name, size, "device", "held by the method in all of its steps") for name, size in run.also.items()]
    states, gradients, reduction = _states(cost, run), _gradients(cost, run), _reduction(cost, run)
    moments = {
        "loading": [*held, _read(cost)],
        "teacher pass": [*held, *_teacher(cost, run, passing=True), *states],
        "backward": [
            *held,
            *_teacher(cost, run),
            *states,
            *_moments(cost, run),
            *gradients,
            *reduction,
            *_activations(cost, run),
            *_kept(cost, run),
            *_guard(cost, run),
            *also,
        ],
        "optimizer step": [
            *held,
            *_teacher(cost, run),
            *states,
            *_moments(cost, run),
            *gradients,
            *_step(cost, run),
            *_kept(cost, run, stepping=True),
            *_guard(cost, run),
            *also,
        ],
        "handing back": [*held, *states, *_moments(cost, run), _whole(cost)],
    }
    if run.device == "cpu":
        moments = {name: [dataclasses.replace(p, place="device") for p in parts] for name, parts in moments.items()}
    if run.teacher == "none":
        del moments["teacher pass"]
    totals: dict[str, dict[Place, int]] = {
        name: {"device": _sum(parts, "device"), "host": _sum(parts, "host")} for name, parts in moments.items()
    }
    peak = max(totals, key=lambda name: totals[name]["device"])
    return Memory(peak, [part for part in moments[peak] if part.bytes], totals)


def _sum(parts: list[Part], place: Place) -> int:
    return sum(part.bytes for part in parts if part.place == place)


def _width(run: Run) -> int:
    """Return w, the bytes of a weight in the passes."""
    return 2 if run.bf16 and not run.by_autocast else 4


def _held(cost: Cost, run: Run, baseline: int | None) -> list[Part]:
    parts = [
        Part("original checkpoint", 4 * cost.parameters, "host", "4 P: the caller's model, kept for the evaluation")
    ]
    if not run.deepspeed and run.device == "cpu":
        # Nothing is copied to another device or partition: the teacher shares the caller's weights.
        parts[0] = dataclasses.replace(parts[0], why="4 P: the caller's model, which is the teacher too")
    if baseline is not None:
        parts.insert(
            0, Part("interpreter and libraries", baseline, "host", "measured: a process with the same imports")
        )
    return parts


def _read(cost: Cost) -> Part:
    return Part(
        "checkpoint being read", 4 * cost.parameters, "host", "4 P: model.safetensors, in addition to the built model"
    )


def _whole(cost: Cost) -> Part:
    return Part("unlearned model", 4 * cost.parameters, "device", "4 P: gathered whole on every rank at the end")


def _states(cost: Cost, run: Run) -> list[Part]:
    """Return the parts of weights and float32 master weights."""
    P, N, w, zero = cost.parameters, run.ranks, _width(run), run.zero
    on: Place = "host" if zero.offload_optimizer else "device"
    if zero.stage == 3:
        where: Place = "host" if zero.offload_param else "device"
        return [
            Part("weights", _share(w * P, N), where, "w P / N: this rank's partition"),
            Part("master weights", _share(4 * P, N), on, "4 P / N: float32 copy of the partition, kept in fp32 too"),
        ]
    weights = Part("weights", w * P, "device", "w P: whole on every rank")
    if zero.stage == 0:
        return [weights]
    return [
        weights,
        Part("master weights", _share(4 * P, N), on, "4 P / N: float32 copy of the partition, kept in fp32 too"),
    ]


def _moments(cost: Cost, run: Run) -> list[Part]:
    shared = run.zero.stage > 0
    return [
        Part(
            "optimizer state",
            _share(8 * cost.parameters, run.ranks if shared else 1),
            "host" if run.zero.offload_optimizer else "device",
            "8 P / N: AdamW's two moments of the partition" if shared else "8 P: AdamW's two moments",
        )
    ]


def _gradients(cost: Cost, run: Run) -> list[Part]:
    P, N, w, zero = cost.parameters, run.ranks, _width(run), run.zero
    g = 4 if zero.grad_accum_fp32 else w
    on: Place = "host" if zero.offload_optimizer else "device"
    if zero.stage == 0:
        return [Part("gradients", w * P, "device", "w P: whole on every rank")]
    if zero.stage == 1:
        return [Part("gradients", g * P, "device", "g P: whole until they are reduced")]
    if zero.stage == 2:
        if not zero.offload_optimizer:
            return [Part("gradients", _share(g * P, N), "device", "g P / N: the partition, averaged")]
        parts = [
            Part("gradients", _share(4 * P, N), "host", "4 P / N: float32 partition that the optimizer reads"),
            Part("weights to copy back", _share(w * P, N), "host", "w P / N: buffer of the updated partition"),
        ]
        if run.accumulation > 1:
            parts.append(Part("accumulated gradients", _share(4 * P, N), "host", "4 P / N: sum of micro-batches"))
        return parts
    own = min(_share(P, N), zero.sub_group_size)
    return [
        Part("gradients", _share(g * P, N), on, "g P / N: flat buffer of the averaged partition"),
        Part(
            "gradients of the optimizer",
            4 * (_share(P, N) if zero.offload_optimizer else own),
            on,
            "4 bytes a weight of a sub-group: float32 gradients that the optimizer reads",
        ),
    ]


def _reduction(cost: Cost, run: Run) -> list[Part]:
    """Return the buffers for averaging gradients and gathering weights."""
    P, w, zero = cost.parameters, _width(run), run.zero
    if not run.deepspeed or (run.ranks == 1 and zero.stage == 0):
        return []
    if zero.stage == 0:
        return [Part("reduce bucket", w * min(P, _ALLREDUCE), "device", "w min(P, 5e8): gradients laid end to end")]
    filled = min(P, zero.reduce_bucket_size)
    # The host allocates pages when they are first written, so the part that gradients do not fill takes no memory.
    bucket = filled if run.device == "cpu" else zero.reduce_bucket_size
    doubled = zero.overlap_comm and zero.stage < 3 and run.device == "cuda"
    parts = [
        Part(
            "reduce bucket",
            w * bucket * (2 if doubled else 1),
            "device",
            f"w reduce_bucket_size{' x 2 for overlap_comm' if doubled else ''}: gradients waiting to be averaged",
        ),
        Part(
            "bucket in flight", w * filled, "device", "w min(P, reduce_bucket_size): a flat copy while it is averaged"
        ),
    ]
    if zero.stage == 3:
        live = min(P, zero.max_live_parameters, zero.max_reuse_distance)
        if run.device == "cpu":
            parts.append(
                Part("gloo's copy", w * filled, "device", "w min(P, reduce_bucket_size): reduce-scatter by gloo")
            )
        parts += [
            Part(
                "gathered weights",
                w * live,
                "device",
                "w min(P, max_live_parameters, max_reuse_distance): not dropped within a pass",
            ),
            Part(
                "weights in flight",
                w * min(P, zero.prefetch_bucket_size),
                "device",
                "w min(P, prefetch_bucket_size): being gathered",
            ),
        ]
    return parts


def _activations(cost: Cost, run: Run) -> list[Part]:
    return [
        Part(
            "activations",
            cost.activations.at(run.batch_size),
            "device",
            "counted on fake tensors: peak of forward and backward, batch included; as if it met the gradients' peak",
        )
    ]


def _step(cost: Cost, run: Run) -> list[Part]:
    """Return the float32 gradients that exist at the step alone; those of the partition under ZeRO."""
    if _width(run) == 4 or run.zero.offload_optimizer or run.zero.stage == 3:
        return []
    own = _share(4 * cost.parameters, run.ranks)
    return [Part("float32 gradients", own, "device", "4 P / N: for the optimizer, at the step")]


def _kept(cost: Cost, run: Run, stepping: bool = False) -> list[Part]:
    """Return the small blocks that stay with the process on the CPU after they were freed, and are reused if their
    sizes fit.

    These are the weights as they were loaded, freed when ZeRO flattens them, and the teacher's. Activations are
    allocated there, and so are gradients that wait whole; at stage 3 gathering allocates blocks of other sizes all the
    time.
    """
    if run.device == "cuda":
        return []
    P, activations = cost.parameters, cost.activations.at(run.batch_size)
    reused = {0: 0, 1: activations + _width(run) * P, 2: activations, 3: 0}[run.zero.stage]
    kept = max((4 * P if run.zero.stage else 0) - reused, 0)
    # At stage 0 the copy that replaces the last good weights reuses the teacher's blocks.
    if run.deepspeed and run.teacher == "replicated" and not run.augmented and not (run.watched and not run.zero.stage):
        kept += 4 * P
    kept += activations if stepping else 0
    why = "small blocks the allocator keeps: 4 P of weights as loaded, 4 P of the teacher, less what is used again"
    return [Part("freed, not returned", kept, "device", why)]


def _teacher(cost: Cost, run: Run, passing: bool = False) -> list[Part]:
    """Return the parts of the original as the teacher: in its own pass before the phase, or cached outputs in it."""
    P, w = cost.parameters, _width(run)
    if run.teacher == "none":
        return []
    width = cost.outputs if run.contrast == "logits" else cost.features
    cache = Part("teacher outputs", 2 * 4 * run.forget * width, "host", "2 float32 rows a forget sample, on every rank")
    if not passing and not run.augmented:
        return [cache]
    shared = not run.deepspeed and run.device == "cpu"
    copy = Part("teacher", 0 if shared else w * P, "device", "w P: frozen copy of the original")
    if run.teacher == "sharded":
        copy = Part(
            "teacher",
            _share(w * P, run.ranks) + w * cost.largest_layer,
            "device",
            "w P / N and the layer being gathered: frozen, ZeRO-3",
        )
    if not passing:
        return [copy]
    guided = Part(
        "teacher activations",
        cost.guided.at(run.batch_size),
        "device",
        "counted on fake tensors: q and k of all blocks are kept for the masks",
    )
    return [copy, cache, guided]


def _guard(cost: Cost, run: Run) -> list[Part]:
    if not run.watched:
        return []
    why = "4 P on the main rank: restored after a collapse"
    return [Part("last good weights", 4 * cost.parameters, "host", why)]


def _share(total: int, ranks: int) -> int:
    return math.ceil(total / ranks)
