"""What can be wrong with a source of weights or with the disk they go to. Every text is safe to show a tenant."""

from tidegate.domain.errors import WeightFault


class SourceMissing(WeightFault):
    """No such repository, revision, bucket, prefix or file; asking again will not help."""


class SourceDenied(WeightFault):
    """The source wants credentials, or refuses the ones it was given."""


class SourceUnavailable(WeightFault):
    """The source does not answer, or not now. `retry_after_ms` is its own word, 0 when it gave none."""

    def __init__(self, reason: str, retry_after_ms: int = 0) -> None:
        super().__init__(reason)
        self.retry_after_ms = retry_after_ms


class SourceChanged(WeightFault):
    """What the source gives now is not what was applied."""


class Corrupt(WeightFault):
    """Bytes that do not match their checksum; they were put into quarantine."""


class DiskFull(WeightFault):
    """The weights do not fit the cache's budget or the disk."""


class Stopped(WeightFault):
    """Nobody wants these weights any more; what is there stays for the next time."""
