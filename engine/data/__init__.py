"""Data sources, forget requests and loaders."""

from engine.data.forget import ForgetRequest, read_forget_request
from engine.data.loading import Batch, Loader, Preprocessing
from engine.data.samples import BadImageError, Samples, from_dataset
from engine.data.sources import Source, open_source

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
]
