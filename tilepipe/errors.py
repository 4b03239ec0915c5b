"""What users can get wrong, as error types: each message gives the value, what is legal, and the remedy."""

from __future__ import annotations


class TilepipeError(ValueError):
    """Base of every error that is the caller's to mend; the command line prints it in one line."""

    exit_code = 3
    """The process's exit status: 1 a retry may help, 2 usage, 3 bad input, 75 and 130 stopped but resumable."""


class UsageError(TilepipeError):
    """An option or argument whose value is not legal, alone or beside the others."""

    exit_code = 2


class PlanError(UsageError):
    """A plan that the options, the network or the memory limits do not allow."""


class InputError(TilepipeError):
    """A raster, mask or array that cannot be used as it is."""


class ReadError(InputError):
    """Pixels that could not be read; names the file and the window."""


class ModelError(TilepipeError):
    """A model file or network that cannot be used."""


class GeometryError(ModelError):
    """A network whose geometry cannot be derived, or does not allow what was asked; names the layer."""


class StoreError(TilepipeError):
    """An output store that cannot be created, resumed or written."""


class StoreBusyError(StoreError):
    """An output store that another process is writing to."""

    exit_code = 1


class RunError(TilepipeError):
    """A job that stopped for a reason which may pass: a lost worker, memory, a full disk."""

    exit_code = 1


class StoppedError(TilepipeError):
    """A job that was told to stop; its finished blocks are kept and the same command resumes it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
