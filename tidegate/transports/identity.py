"""Who is at the other end of a TLS connection: a role, a name and a region, in one URI of the certificate."""

import re
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

CONTROL, NODE, GATEWAY = "control", "node", "gateway"
NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Identity:
    """One part of a platform. As text ``role/name/region``."""

    role: str
    name: str
    region: str

    def __str__(self) -> str:
        return f"{self.role}/{self.name}/{self.region}"

    @property
    def uri(self) -> str:
        """The subject alternative name (RFC 5280 4.2.1.6) that certificates carry."""
        return f"tidegate://{self}"


def parse(uri: str) -> Identity | None:
    """None for any URI that is not one of ours."""
    found = urlsplit(uri)
    name, _, region = found.path.removeprefix("/").partition("/")
    if found.scheme != "tidegate" or found.netloc not in (CONTROL, NODE, GATEWAY):
        return None
    return Identity(found.netloc, name, region) if NAME.fullmatch(name) and NAME.fullmatch(region) else None


@dataclass(frozen=True, slots=True)
class Peer:
    """Whom a verified certificate names, and the number of that certificate."""

    identity: Identity
    serial: int


def peer_of(tls: ssl.SSLObject | ssl.SSLSocket) -> Peer | None:
    """None without a certificate, or with one of the same authority that names no part of a platform."""
    certificate: dict[str, Any] = tls.getpeercert() or {}
    names = certificate.get("subjectAltName", ())
    found = [identity for kind, uri in names if kind == "URI" and (identity := parse(uri)) is not None]
    return Peer(found[0], int(certificate["serialNumber"], 16)) if len(found) == 1 else None
