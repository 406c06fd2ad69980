"""The train engine with DeepSpeed: ZeRO stages 0 to 3, offload, half-precision weights.

Optimizer (torch's AdamW, also with offloaded states), rates, batch sizes and clipping are options of the run. The
DeepSpeed file sets how weights, gradients and states are distributed. If it has one of the run's options, the value
must be "auto" or equal to the run's.

At stages 1 to 3, bf16 is that of DeepSpeed: weights and gradients in bf16, a float32 copy in the optimizer. At stage 0,
and if the file enables `torch_autocast`, weights are float32 under autocast, as on one process.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.config import RunConfig
from engine.errors import UserError
from engine.run.train_engine import TrainEngine
from engine.runtime.process_group import ProcessGroup, backends


def require_deepspeed() -> Any:
    """Import the package deepspeed.

    Returns:
        The package.

    Raises:
        UserError: It cannot be imported; the message has the command that installs it.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"--deepspeed needs the package deepspeed ({error}); pip install 'lethe-unlearning[distributed]'"
        ) from None
    return deepspeed


def read_deepspeed(config: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Read a DeepSpeed configuration.

    Args:
        config: JSON file, or the configuration itself.

    Returns:
        The configuration, a copy.

    Raises:
        UserError: The file does not exist or is not a JSON object.
    """
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    path = Path(config)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--deepspeed {path}: no such file; take one of configs/, such as configs/zero2.json") from None
    except (ValueError, OSError) as error:
        raise UserError(f"--deepspeed {path}: is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"--deepspeed {path}: expected an object of DeepSpeed's options")
    return values


def resolve_deepspeed(given: Mapping[str, Any], run: RunConfig, ranks: int) -> dict[str, Any]:
    """Fill in a DeepSpeed configuration from the options of the run.

    Args:
        given: The configuration.
        run: Options of the run.
        ranks: Number of ranks.

    Returns:
        The configuration with a value in place of every "auto".

    Raises:
        UserError: The ZeRO stage is not 0 to 3. Or values contradict the run, or are not supported: fp16, which needs
            loss scaling; states or weights on NVMe, with which a phase cannot start afresh. The message lists all such
            values.
    """
    config: dict[str, Any] = copy.deepcopy(dict(given))
    zero = _section(config, "zero_optimization")
    stage = zero.setdefault("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise UserError(f"--deepspeed: zero_optimization.stage is {stage!r}, expected 0, 1, 2 or 3")
    problems: list[str] = []

    def settle(section: dict[str, Any], key: str, value: Any, of: str, name: str | None = None) -> None:
        given = section.get(key, "auto")
        if given != "auto" and given != value:
            problems.append(f"{name or key} is {json.dumps(given)}, the run's {of} {json.dumps(value)}")
        section[key] = value

    settle(config, "train_micro_batch_size_per_gpu", run.batch_size, "batch_size is")
    settle(config, "gradient_accumulation_steps", run.accumulation_steps, "accumulation_steps is")
    product = run.batch_size * run.accumulation_steps * ranks
    settle(config, "train_batch_size", product, f"batch_size x accumulation_steps x {ranks} ranks is")
    settle(config, "gradient_clipping", run.grad_clip, "grad_clip is")
    _settle_optimizer(config.pop("optimizer", {}), run, problems)
    if config.pop("scheduler", None):
        problems.append("scheduler is set, but every phase of a method has its own schedule")
    if _section(config, "fp16").get("enabled") is True:
        problems.append("fp16.enabled is true, but the engine has no loss scaling: precision is fp32 or bf16")
    half = run.precision == "bf16"
    by_autocast = half and (stage == 0 or _section(config, "torch_autocast").get("enabled") is True)
    settle(_section(config, "torch_autocast"), "enabled", by_autocast, "way to precision is", "torch_autocast.enabled")
    settle(
        _section(config, "bf16"), "enabled", half and not by_autocast, f"precision={run.precision} is", "bf16.enabled"
    )
    if by_autocast:
        config["torch_autocast"].setdefault("dtype", "bfloat16")
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device") == "nvme":
            problems.append(f"zero_optimization.{key}.device is nvme, which cannot start a phase afresh; use cpu")
    if problems:
        raise UserError(
            f'--deepspeed contradicts the run: {"; ".join(problems)}. Write "auto" or leave them out, and set them '
            "by --set"
        )
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW runs on the CPU too, without compiling
    return config


def _settle_optimizer(given: Mapping[str, Any], run: RunConfig, problems: list[str]) -> None:
    if not given:
        return
    if given.get("type", "AdamW") != "AdamW":
        problems.append(f'optimizer.type is {json.dumps(given["type"])}, the run\'s is "AdamW"')
    owned = {"weight_decay": run.weight_decay, "betas": [0.9, 0.999], "eps": 1e-8, "torch_adam": True}
    for key, value in given.get("params", {}).items():
        if value != "auto" and value != owned.get(key):
            own = json.dumps(owned[key]) if key in owned else "that of each phase"
            problems.append(f"optimizer.params.{key} is {json.dumps(value)}, the run's is {own}")


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    return config.setdefault(name, {})


def half_weights(config: Mapping[str, Any]) -> bool:
    """Return whether the model's own weights are in bf16 under a resolved configuration."""
    return bool(config["bf16"]["enabled"])


def shard_frozen(model: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """Shard a frozen model: each rank holds an equal part of the weights (ZeRO-3), gathered layer by layer.

    Args:
        model: The frozen model.
        config: Resolved DeepSpeed configuration of the run.

    Returns:
        The model in a DeepSpeed engine.
    """
    deepspeed = require_deepspeed()
    kept = {key: config[key] for key in ("train_micro_batch_size_per_gpu", "train_batch_size", "bf16")}
    offload = config["zero_optimization"].get("offload_param")
    zero = {"stage": 3, **({"offload_param": offload} if offload else {})}
    kept["gradient_accumulation_steps"] = config["gradient_accumulation_steps"]
    return deepspeed.initialize(model=model, config={**kept, "zero_optimization": zero})[0]


def release_frozen(model: nn.Module) -> None:
    """Free the memory of the weights of a frozen model, sharded or not; its other attributes stay available."""
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.data = parameter.ds_tensor.data.new_empty(0)


class ZeroTrainEngine(TrainEngine):
    """`TrainEngine` with a DeepSpeed engine. Every method is a collective operation: all ranks call it.

    Args:
        model: The model.
        run: Options of the run.
        config: DeepSpeed configuration from `resolve_deepspeed`.
    """

    def __init__(self, model: nn.Module, run: RunConfig, config: Mapping[str, Any]) -> None:
        deepspeed = require_deepspeed()
        self._skeleton = _skeleton(model)
        super().__init__(model, run)
        if not dist.is_initialized():  # one process that no launcher started
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backends(run.device), store=store, rank=0, world_size=1)
        self._deepspeed, self._config, self._world = deepspeed, dict(config), ProcessGroup.current()
        self._stage = config["zero_optimization"]["stage"]
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=self._config)
        self.model = self._engine
        self._micro = 0

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        self._micro += 1
        if self._micro % self.run.accumulation_steps:
            self._engine.step()  # counts the micro-batch; the optimizer takes no step yet

    def step(self) -> Tensor | float:
        norm = None
        if self._stage == 0:  # DeepSpeed stores no norm at stage 0; the gradients are summed over ranks by now
            norm = nn.utils.get_total_norm([p.grad for p in self._engine.module.parameters() if p.grad is not None])
        self._engine.step()
        return norm if norm is not None else self._engine.get_global_grad_norm()

    def weights(self) -> dict[str, Tensor] | None:
        kept = {}
        for name, tensor in self._whole():
            if self._world.is_main:
                kept[name] = tensor.to("cpu", copy=True)
        return kept if self._world.is_main else None

    def _whole(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor) of every weight and buffer, one at a time, on every rank.

        A weight is float32 if the optimizer holds a float32 copy.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self._engine.module.named_parameters():
            if parameter.requires_grad and self._stage > 0:
                yield name, safe_get_full_fp32_param(parameter)
            else:
                with self._gathered(parameter):
                    yield name, parameter.data
        yield from self._engine.module.named_buffers()

    def _gathered(self, parameter: nn.Parameter, changed: bool = False) -> Any:
        return self._deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0 if changed else None, enabled=self._stage == 3
        )

    def load_weights(self, weights: dict[str, Tensor] | None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        for name, parameter in self._engine.module.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            value = torch.empty(shape, dtype=torch.float32, device=self._engine.device)
            if weights is not None:
                value.copy_(weights[name])
            dist.broadcast(value, src=0)
            with torch.no_grad(), self._gathered(parameter, changed=True):
                parameter.data.copy_(value)
            if parameter.requires_grad and self._stage > 0:
                safe_set_full_fp32_param(parameter, value)

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)

    def load(self, folder: Path) -> None:
        self._engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)

    @staticmethod
    def read_weights(folder: Path) -> dict[str, Tensor]:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        if any(folder.glob("*_optim_states.pt")):
            return get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
        # At stage 0 the weights are whole. A file that the run itself wrote is unpickled, as DeepSpeed does to resume.
        return torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]

    def finish(self) -> nn.Module:
        for hook in self.hooks:
            hook.remove()
        model, device = self._skeleton, torch.device(self.run.device)
        for name, tensor in self._whole():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            held = getattr(module, leaf)
            if isinstance(held, nn.Parameter):
                whole = tensor.to(device, held.dtype, copy=True)
                setattr(module, leaf, nn.Parameter(whole, requires_grad=held.requires_grad))
            elif held.dtype == tensor.dtype:  # DeepSpeed has rounded the others to bf16
                held.copy_(tensor)
        self._engine.destroy()
        del self.model, self.module, self._engine
        gc.collect()
        return model.to(device)


def _skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose weights take no memory (device "meta")."""
    memo = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)
