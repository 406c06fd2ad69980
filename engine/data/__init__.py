"""Data: sources, samples with ids, forget requests, and loaders."""

from engine.data.forget import ForgetRequest, read_forget_request
from engine.data.loading import Batch, Loader
from engine.data.preprocessing import Preprocessing
from engine.data.samples import BadImageError, Samples
from engine.data.sources import Source, open_source
from engine.data.userset import from_dataset, refuse_overlap

__all__ = [
    "BadImageError",
    "Batch",
    "ForgetRequest",
    "Loader",
    "Preprocessing",
    "Samples",
    "Source",
    "from_dataset",
    "open_source",
    "read_forget_request",
    "refuse_overlap",
]
