"""What can end an engine, and the exit codes that tell its supervisor which it was."""

EXIT_OK = 0  # the lifeline closed, or it was told to stop
EXIT_MODEL = 65  # the model directory is missing, damaged, or of a kind we refuse (EX_DATAERR)
EXIT_MEMORY = 66  # weights and the least KV cache do not fit the memory given
EXIT_SOCKET = 67  # the socket could not be bound
EXIT_BUG = 70  # a bug of ours (EX_SOFTWARE)


class EngineError(Exception):
    """Why an engine cannot serve. `reason` is safe to show: file names within the model, never a path or a text."""

    exit_code = EXIT_MODEL

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ModelFault(EngineError):
    """The model directory cannot be served as it is."""


class MemoryFault(EngineError):
    """The model does not fit the memory it was given."""

    exit_code = EXIT_MEMORY
