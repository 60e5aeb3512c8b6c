"""Every error that onnxcomp raises on purpose, with the exit code that the command line gives for it.

    OnnxcompError                 1  a bug in onnxcomp
    ├── UsageError                2  wrong option, pass name, option value or order of passes
    ├── RejectedError             3  the file or the data cannot be used
    │   ├── ModelError            3  not ONNX, malformed, unsafe, or of an unsupported version
    │   └── DataError             3  calibration or evaluation data do not fit the model
    ├── VerificationError         4  the optimized model does not do the job of the original
    ├── TargetError               5  a size, speed or quality target was not met
    ├── ProviderError             6  the execution provider is missing or did not run the model
    ├── InconclusiveError         7  too little data or too much noise for a verdict
    └── ResourceError             8  out of memory, time or disk

A message is one or two sentences: what, where (file, pass, node, tensor), what was found against what was
expected, and what to do.
"""

from __future__ import annotations

__all__ = [
    "DataError",
    "InconclusiveError",
    "ModelError",
    "OnnxcompError",
    "ProviderError",
    "RejectedError",
    "ResourceError",
    "TargetError",
    "UsageError",
    "VerificationError",
]


class OnnxcompError(Exception):
    """Base of all errors raised on purpose; raised itself only for a defect in onnxcomp."""

    exit_code = 1


class UsageError(OnnxcompError, ValueError):
    """The caller asked for something that does not exist or does not make sense."""

    exit_code = 2


class RejectedError(OnnxcompError):
    """A model, a data set or an output path cannot be used."""

    exit_code = 3


class ModelError(RejectedError):
    """The model file is missing, malformed, unsafe, or of a version that cannot be handled."""


class DataError(RejectedError):
    """Calibration or evaluation data are missing or do not fit the model's inputs."""


class VerificationError(OnnxcompError):
    """The optimized model differs from the original by more than was allowed."""

    exit_code = 4


class TargetError(OnnxcompError):
    """A size, speed or quality target was not met."""

    exit_code = 5


class ProviderError(OnnxcompError):
    """The execution provider asked for is not installed, failed to load, or ran nothing."""

    exit_code = 6


class InconclusiveError(OnnxcompError):
    """The measurement is too noisy, or the data too few, for the verdict asked for."""

    exit_code = 7


class ResourceError(OnnxcompError):
    """Memory, time or disk space ran out."""

    exit_code = 8
