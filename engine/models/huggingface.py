"""Image classifiers of Hugging Face transformers: open, wrap and write them.

`HuggingFaceClassifier` keeps the transformers module as it is and adds the attributes of a timm classifier. Its
checkpoint is a `save_pretrained` folder, which `AutoModelForImageClassification.from_pretrained` opens. A TimmWrapper
is opened as the timm model that it holds.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.models.image_processor import (
    PROCESSOR,
    UNKNOWN_PREPROCESSING,
    processor_of,
    processor_text,
    read_preprocessing,
    resolved_preprocessing,
)
from engine.models.info import ModelInfo, pair
from engine.models.spec import ModelSpec, set_folder, set_spec
from engine.models.vit import ViTInfo

logger = logging.getLogger(__name__)

_INSTALL = "pip install 'lethe-unlearning[huggingface]'"
_TIMM_WRAPPER = "TimmWrapperForImageClassification"
# Prefix of the library's placeholder names of labels.
_PLACEHOLDER = "LABEL_"


@dataclasses.dataclass(frozen=True)
class Family:
    """Properties of a supported class of models.

    Attributes:
        prefix: Tokens before the patch tokens, without registers.
        pool: See `ViTInfo`.
        heads: Attributes of the classifiers; logits are their mean.
        any_size: Position embeddings are resized to the image, or there are none.
    """

    prefix: int
    pool: Literal["token", "avg"]
    heads: tuple[str, ...] = ("classifier",)
    any_size: bool = False


FAMILIES = {
    "ViTForImageClassification": Family(1, "token"),
    "DeiTForImageClassification": Family(2, "token"),
    "DeiTForImageClassificationWithTeacher": Family(2, "token", heads=("cls_classifier", "distillation_classifier")),
    "Dinov2ForImageClassification": Family(1, "token", any_size=True),
    "Dinov2WithRegistersForImageClassification": Family(1, "token", any_size=True),
    "BeitForImageClassification": Family(1, "avg"),
    "SwinForImageClassification": Family(0, "avg", any_size=True),
    "Swinv2ForImageClassification": Family(0, "avg", any_size=True),
    "CLIPForImageClassification": Family(1, "avg"),
    "SiglipForImageClassification": Family(0, "avg"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceSpec(ModelSpec):
    """All that is needed to build and to write a transformers classifier. `architecture` is its class.

    Attributes:
        config: `PreTrainedConfig.to_dict()`.
        processor: Text of preprocessor_config.json, empty if there is none.
        processor_cfg: The `pretrained_cfg` that is equivalent to `processor`.
    """

    config: dict[str, Any]
    processor: str = ""
    processor_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def label_names(self) -> list[str]:
        """Class names by label from `id2label`; empty if they are the library's placeholders."""
        if self.extra.get("label_names"):  # set after loading
            return [str(name) for name in self.extra["label_names"]]
        names = self.config.get("label_names")  # TimmWrapper
        if names is None:
            id2label = {int(label): str(name) for label, name in (self.config.get("id2label") or {}).items()}
            if sorted(id2label) != list(range(len(id2label))):
                raise UserError(
                    f"config.json: id2label has the labels {sorted(id2label)[:6]}, expected 0 to {len(id2label) - 1}; "
                    "correct it, or class names belong to other outputs"
                )
            names = [id2label[label] for label in sorted(id2label)]
        placeholders = [f"{_PLACEHOLDER}{label}" for label in range(len(names))]
        return [] if names == placeholders or len(names) != self.num_classes else [str(name) for name in names]

    def module(self) -> nn.Module:
        """Build the transformers module with fresh weights."""
        transformers = require_transformers()
        config = copy.deepcopy(self.config)
        if self.num_classes != _count_labels(config):
            for key in ("id2label", "label2id", "label_names", "num_classes"):
                config.pop(key, None)
            config["num_labels" if self.architecture != _TIMM_WRAPPER else "num_classes"] = self.num_classes
        config_class = type(transformers.AutoConfig.for_model(config["model_type"]))
        built = config_class.from_dict(config)
        if self.architecture == _TIMM_WRAPPER:
            return getattr(transformers, self.architecture)(built)
        return getattr(transformers, self.architecture)._from_config(built)

    def build(self, seed: int | None = None) -> nn.Module:
        with torch.random.fork_rng(devices=[], enabled=seed is not None), _quiet():
            if seed is not None:
                torch.manual_seed(seed)
            return _adapt(self.module().float(), self)

    def write(self, model: nn.Module, folder: Path) -> Path:
        """Write a `save_pretrained` folder: config.json, model.safetensors, preprocessor_config.json.

        Each file is written elsewhere and renamed, so a failure (no space left) leaves the earlier file whole.
        """
        folder.mkdir(parents=True, exist_ok=True)
        module, text = self.module_of(model), self.processor
        if self.architecture != _TIMM_WRAPPER:
            text = processor_text(text, self.processor_cfg, self.pretrained_cfg)
        elif self.pretrained_cfg != self.processor_cfg:  # its processor reads config.json
            module.config.pretrained_cfg = {**(self.config.get("pretrained_cfg") or {}), **self.pretrained_cfg}  # type: ignore[union-attr]
        if names := self.extra.get("label_names"):
            named = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
            vars(module.config).update(named | ({"label_names": names} if self.architecture == _TIMM_WRAPPER else {}))
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as temporary, _quiet():
            module.save_pretrained(temporary, max_shard_size="1000GB")  # type: ignore[operator]
            if text:
                (Path(temporary) / PROCESSOR).write_text(text, encoding="utf-8")
            # Weights first: a folder whose config.json is new holds weights that fit it.
            for file in sorted(Path(temporary).iterdir(), key=lambda path: (path.suffix != ".safetensors", path.name)):
                os.replace(file, folder / file.name)
        return folder

    def module_of(self, model: nn.Module) -> nn.Module:
        """Return the transformers module with the weights of `model`, for `save_pretrained`."""
        if isinstance(model, HuggingFaceClassifier):
            return model.model
        with torch.device("meta"), _quiet():
            module = self.module()
        module.timm_model = copy.deepcopy(model).cpu()
        return module.eval()


class HuggingFaceClassifier(nn.Module):
    """A transformers image classifier with the interface of a timm classifier.

    Args:
        model: Module of a class in `FAMILIES`; it is kept, not copied.
        pretrained_cfg: timm's keys for its preprocessing (mean, std, input_size, interpolation, crop_pct, crop_mode).

    Example:
        >>> model = as_classifier(ViTForImageClassification.from_pretrained("me/my-vit"))
        >>> model(images).shape  # [B, num_classes]
    """

    crop_rounds_down = True  # for Preprocessing: the place of the centre crop in Hugging Face's processors

    def __init__(self, model: nn.Module, pretrained_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.model: Any = model
        self.pretrained_cfg = dict(pretrained_cfg)
        self.num_classes = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
        self.family = FAMILIES[type(model).__name__]
        heads = self.get_classifier()
        self.num_features = int((heads[0] if isinstance(heads, tuple) else heads).in_features)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, num_classes] of normalised images [B, C, H, W]."""
        return self.model(pixel_values=images).logits

    def get_classifier(self) -> Any:
        """Return the linear layer whose outputs are the logits; a tuple of two if the logits are their mean."""
        heads = tuple(getattr(self.model, name) for name in self.family.heads)
        return heads if len(heads) > 1 else heads[0]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        kind = "activation" if hasattr(self.model, "activation_checkpointing_enable") else "gradient"  # its older name
        if enable:
            options = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
            getattr(self.model, f"{kind}_checkpointing_enable")(**options)
        else:
            getattr(self.model, f"{kind}_checkpointing_disable")()

    def set_attention(self, implementation: str) -> str:
        """Set the implementation of attention (sdpa, eager) if the model has a choice; return the previous one."""
        before = str(getattr(self.model.config, "_attn_implementation", "eager"))
        choice = getattr(self.model, "_supports_sdpa", False) and hasattr(self.model, "set_attn_implementation")  # 4.54
        if choice and implementation != before:
            with _quiet():  # it warns about CLIP's text model, which the classifier does not have
                self.model.set_attn_implementation(implementation)
        return before

    @property
    def backbone(self) -> nn.Module:
        """The module before the classifier."""
        return next(module for name, module in self.model.named_children() if name not in self.family.heads)

    @property
    def patch_embed(self) -> nn.Module:
        """The module that computes the tokens of the first block."""
        return self.backbone.embeddings  # type: ignore[return-value]

    @property
    def blocks(self) -> nn.ModuleList:
        """All blocks in the order of the forward pass, over all stages of a Swin."""
        return nn.ModuleList(block for part in self._parts() for block in getattr(part, "blocks", [part]))

    @property
    def layers(self) -> list[Any]:
        """Stages of a Swin with the downsampling before each, as in timm; empty for other models."""
        stages = [part for part in self._parts() if hasattr(part, "blocks")]
        joints = [None, *(getattr(stage, "downsample", None) for stage in stages)]
        return [SimpleNamespace(blocks=s.blocks, downsample=joint) for s, joint in zip(stages, joints, strict=False)]

    @property
    def tail(self) -> list[nn.Module]:
        """The modules after the blocks: norms, pooling, heads."""
        before = ("embeddings", "pre_layrnorm", "encoder", "layers")
        children = [module for name, module in self.backbone.named_children() if name not in before]
        heads = self.get_classifier()
        return [*children, *(heads if isinstance(heads, tuple) else (heads,))]

    def _parts(self) -> list[nn.Module]:
        """Return the outermost list of layers: the blocks, or the stages of a Swin."""
        named = self.backbone.named_modules()
        return list(
            next(m for name, m in named if isinstance(m, nn.ModuleList) and name.split(".")[-1] in ("layer", "layers"))
        )

    @property
    def attention_problem(self) -> str:
        """Why attention cannot be read; empty if it can."""
        name = type(self.model).__name__
        return f"{name} attends within windows, whose maps are no chain over all patches" if self.layers else ""

    def vit_info(self) -> ModelInfo:
        """Return the geometry of the patches.

        Raises:
            UserError: The input size of the preprocessing does not fit the model.
        """
        config = vision_config(self.model.config)
        input_size = self.pretrained_cfg.get("input_size")
        height, width = pair(input_size[1:] if input_size else config.image_size)
        own, patch = pair(config.image_size), pair(config.patch_size)
        name = type(self.model).__name__
        if (height, width) != own and not self.family.any_size:
            raise UserError(
                f"{name} takes images of {own[0]} x {own[1]} pixels (image_size of its config.json), but its "
                f"preprocessing gives {height} x {width}; set size in preprocessor_config.json"
            )
        stages = len(self.layers)
        if stages:  # a maskable patch is a token of the last stage, as for timm's Swin
            patch = (patch[0] * 2 ** (stages - 1), patch[1] * 2 ** (stages - 1))
        grid = (height // patch[0], width // patch[1])
        if not stages and (grid[0] * patch[0], grid[1] * patch[1]) != (height, width):
            raise UserError(
                f"{name}: an input of {height} x {width} pixels is not a whole number of {patch[0]} x {patch[1]} "
                "patches; set another size in preprocessor_config.json"
            )
        general = ModelInfo(in_chans=int(config.num_channels), input_size=(height, width), width=self.num_features)
        if self.attention_problem:
            return general
        pool = self.family.pool
        if not getattr(config, "use_mean_pooling", True):
            pool = "token"  # BEiT
        return ViTInfo(
            patch_size=patch,
            grid=grid,
            num_prefix_tokens=self.family.prefix + int(getattr(config, "num_register_tokens", 0)),
            pool=pool,
            windowed=False,
            **dataclasses.asdict(general),
        )


def vision_config(config: Any) -> Any:
    """Return the part of a configuration for images: `vision_config` of CLIP and SigLIP, else all of it."""
    return getattr(config, "vision_config", config)


def require_transformers() -> Any:
    """Return the transformers package.

    Raises:
        UserError: It is not installed; the message has the command.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(f"this is a model of Hugging Face transformers, which is not installed: {_INSTALL}") from None
    return transformers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars of transformers, and log its errors alone, within the context."""
    transformers_logging = require_transformers().utils.logging
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def is_transformers_model(model: Any) -> bool:
    """Return whether a model is a module of transformers; imports nothing."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, getattr(transformers, "PreTrainedModel", ()))


def as_classifier(model: nn.Module, processor: Any = None) -> nn.Module:
    """Return the model for the engine: a transformers classifier is wrapped, any other model is returned unchanged.

    Args:
        model: A module of transformers, which is wrapped, not copied; or any other module.
        processor: Its image processor, whose mean, std and size are the preprocessing. None: the one in the folder or
            the local cache that the model was loaded from, if there is one.

    Raises:
        UserError: The class is not supported, or the model does not predict one label for each image.
    """
    if not is_transformers_model(model):
        return model
    name, config = type(model).__name__, model.config.to_dict()  # type: ignore[operator, union-attr]
    _check_supported(name, config, f"the model {name}")
    if processor is None:
        processor = processor_of(str(getattr(model.config, "_name_or_path", "")))
    return _adapt(model, _spec(name, config, processor, ""))


def as_given(model: nn.Module, given: Any) -> nn.Module:
    """Return a result in the type of the caller's model: a transformers module if `given` is one."""
    if not is_transformers_model(given):
        return model
    if isinstance(model, HuggingFaceClassifier):
        return model.model
    if getattr(given, "timm_model", None) is model:
        return given
    result = copy.copy(given)  # a TimmWrapper around another timm model
    result._modules = {**given._modules, "timm_model": model}
    return result


def load(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    """Open a `save_pretrained` folder, in eval mode, float32, on the CPU.

    Args:
        folder: Folder with config.json and weights: model.safetensors, shards with their index, or pytorch_model.bin.
        config: Contents of config.json.

    Raises:
        UserError: transformers is missing, the class is not supported, or the weights do not fit.
    """
    where = f"checkpoint {folder}"
    transformers = require_transformers()
    name = _class_name(config, where)
    _check_supported(name, config, where)
    with _quiet():
        module, info = _from_pretrained(getattr(transformers, name), folder, where)
    for key, found, expected in sorted(info["mismatched_keys"], key=str):
        raise UserError(
            f"{where}: {key} has shape {tuple(found)}, but by its config.json {tuple(expected)}; give the config.json "
            "that was saved with these weights"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{where}: the weights lack {missing[0]} ({len(missing)} of the tensors of {name}), which transformers "
            "would draw at random; give the folder of a fine-tuned image classifier"
        )
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {key} holds values that are not finite; take an earlier checkpoint")
    text = (folder / PROCESSOR).read_text(encoding="utf-8") if (folder / PROCESSOR).is_file() else ""
    model = _adapt(module, _spec(name, module.config.to_dict(), processor_of(str(folder)), text))
    set_folder(model, folder)
    return model.eval()


def _from_pretrained(model_class: Any, folder: Path, where: str) -> tuple[Any, dict[str, Any]]:
    try:
        return model_class.from_pretrained(
            folder,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `load` raises the error
            **{_dtype_option(): torch.float32},
        )
    except Exception as error:  # the library raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{where}: transformers cannot open it as {model_class.__name__} ({type(error).__name__}: {reason})"
        ) from None


def _dtype_option() -> str:
    """Return the name of from_pretrained's option for the type of the weights."""
    version = require_transformers().__version__.split(".")
    return "dtype" if (int(version[0]), int(version[1])) >= (4, 56) else "torch_dtype"


def _class_name(config: Mapping[str, Any], where: str) -> str:
    """Return the class of an image classifier for a config.json; UserError for a model of another task."""
    named = [str(name) for name in config.get("architectures") or []]
    if named:
        return named[0]
    kind = str(config["model_type"]).replace("_", "")
    for name in FAMILIES:
        if name.lower() == f"{kind}forimageclassification":
            return name
    raise UserError(f"{where}: config.json names no `architectures`, and model_type {config['model_type']!r} none")


def _check_supported(name: str, config: Mapping[str, Any], where: str) -> None:
    if config.get("auto_map"):
        raise UserError(
            f"{where}: its code comes with it (auto_map, trust_remote_code) and is not run; give a model of a class "
            "that transformers itself has"
        )
    if name not in (*FAMILIES, _TIMM_WRAPPER):
        hint = "" if name.endswith("ForImageClassification") else " is no image classifier, or"
        raise UserError(f"{where}: {name}{hint} is not supported; supported: {', '.join(FAMILIES)}, {_TIMM_WRAPPER}")
    if config.get("quantization_config"):
        raise UserError(f"{where}: its weights are quantized and cannot be trained; give the weights in full precision")
    problem, labels = config.get("problem_type"), _count_labels(config)
    if problem not in (None, "single_label_classification") or labels == 1:
        kind = problem or "regression (one label)"
        raise UserError(f"{where}: its problem_type is {kind}; only models that give one class an image can be used")


def _count_labels(config: Mapping[str, Any]) -> int:
    if config.get("id2label"):
        return len(config["id2label"])
    return int(config.get("num_classes") or config.get("num_labels") or 2)


def _spec(name: str, config: dict[str, Any], processor: Any, text: str) -> HuggingFaceSpec:
    if name == _TIMM_WRAPPER and type(processor).__name__ in ("NoneType", "TimmWrapperImageProcessor"):
        pretrained_cfg = resolved_preprocessing(config.get("pretrained_cfg"))
    elif name == _TIMM_WRAPPER:
        pretrained_cfg = read_preprocessing(processor, int((config.get("model_args") or {}).get("in_chans", 3)))
    else:
        vision = vision_of(config)
        channels = int(vision.get("num_channels", 3))
        pretrained_cfg = {"input_size": (channels, *pair(vision["image_size"]))}
        pretrained_cfg |= read_preprocessing(processor, channels)
        if processor is not None and not text:
            text = processor.to_json_string()
    return HuggingFaceSpec(
        architecture=name,
        num_classes=_count_labels(config),
        model_args={},
        pretrained_cfg=pretrained_cfg,
        config=config,
        processor=text,
        processor_cfg=pretrained_cfg,
    )


def vision_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a configuration for images, as `vision_config` does, for a configuration as a dict."""
    return config.get("vision_config") or config


def _adapt(module: nn.Module, spec: HuggingFaceSpec) -> nn.Module:
    model: Any
    if spec.architecture == _TIMM_WRAPPER:
        model = module.timm_model
        model.pretrained_cfg = {**(model.pretrained_cfg or {}), **spec.pretrained_cfg}
    else:
        model = HuggingFaceClassifier(module, spec.pretrained_cfg)
    if "mean" not in spec.pretrained_cfg:
        setattr(model, UNKNOWN_PREPROCESSING, True)
    set_spec(model, spec)
    return model
