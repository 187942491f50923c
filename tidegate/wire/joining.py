"""Messages of parts on other machines, beside those of `wire.internal`: joining the platform, and shipping journals."""

from dataclasses import dataclass

JOURNAL_PIECE_BYTES_MAX = 256 << 10


@dataclass(frozen=True, slots=True)
class AskAuthority:
    """Who signs here? Asked before there is anybody to trust; the answer is held against a digest."""


@dataclass(frozen=True, slots=True)
class AuthorityTold:
    pem: str


@dataclass(frozen=True, slots=True)
class Enrol:
    """Asks for a certificate for the key of a signing request (PEM). `secret` is a join token's; without one it is a
    renewal, for whom the connection's own certificate names.
    """

    request: str
    secret: str = ""


@dataclass(frozen=True, slots=True)
class Enrolled:
    certificate: str


@dataclass(frozen=True, slots=True)
class NotEnrolled:
    """`reason` is safe to show."""

    reason: str


@dataclass(frozen=True, slots=True)
class AskRemoved:
    """A node asks whose certificates are refused though they have not ended."""


@dataclass(frozen=True, slots=True)
class RemovedTold:
    """Numbers of certificates, hex."""

    serials: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class JournalOffered:
    """A gateway has a journal of this boot; answered by JournalHeld."""

    boot: str


@dataclass(frozen=True, slots=True)
class JournalPiece:
    """Bytes of one segment of a journal, as they lie on the gateway's disk; answered by JournalHeld."""

    boot: str
    segment: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class JournalEnded:
    """The gateway of this boot is gone and all it wrote was shipped; answered by JournalHeld."""

    boot: str


@dataclass(frozen=True, slots=True)
class JournalHeld:
    """How far a journal is on disk here: everything before `offset` of `segment`; segment 0: nothing of it."""

    boot: str
    segment: int
    offset: int


Joining = (
    AskAuthority
    | AuthorityTold
    | Enrol
    | Enrolled
    | NotEnrolled
    | AskRemoved
    | RemovedTold
    | JournalOffered
    | JournalPiece
    | JournalEnded
    | JournalHeld
)
