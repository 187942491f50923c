"""The platform's own certificate authority, the join tokens it has given out, and who has joined: files of one folder.

    ca.pem, ca.key          made at the first start, or the operator's own
    tokens/DIGEST           one open join token: whom it lets in and until when; removed when it is used
    members/ROLE.NAME       the numbers of a part's last two certificates; without this file it is refused
    removed/SERIAL          a certificate of a part that was sent away, until it would have ended

A token is for one part, once, and carries the digest of the authority, so that whoever joins knows whom it talks to.
Keys are on the curve P-256; certificates name a part (`transports.identity`), never a machine.
"""

import base64
import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tidegate.domain.errors import LinkFault
from tidegate.transports.identity import NAME, Identity
from tidegate.transports.tls import CA_FILE, IDENTITY_FILE, Credentials

CA_DAYS = 3_650
CERTIFICATE_DAYS = 30
EARLY = timedelta(days=1)  # a machine whose clock is behind must not find its certificate not yet valid
TOKENS_MAX = 1_024
SERIALS_KEPT = 2  # after a renewal, connections with the certificate before it go on
PREFIX = "tg1."
_KEY_FORMAT = (
    serialization.Encoding.PEM,
    serialization.PrivateFormat.PKCS8,
    serialization.NoEncryption(),
)


class Token(msgspec.Struct, frozen=True):
    """What a join token says: where the platform is, the digest of its authority, whom it lets in, and the secret."""

    address: str
    authority: str
    role: str
    name: str
    region: str
    secret: str

    def __str__(self) -> str:
        return PREFIX + base64.urlsafe_b64encode(msgspec.json.encode(self)).decode().rstrip("=")

    @property
    def identity(self) -> Identity:
        return Identity(self.role, self.name, self.region)


def read_token(text: str) -> Token:
    """Raises LinkFault for what is not a whole join token."""
    body = text.strip().removeprefix(PREFIX)
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)), type=Token)
    except (ValueError, msgspec.DecodeError) as error:
        raise LinkFault("this is not a whole join token; `tidegate join token` prints one") from error


class _Open(msgspec.Struct, frozen=True):
    role: str
    name: str
    region: str
    expires_ms: int


class _Member(msgspec.Struct, frozen=True):
    region: str
    serials: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Authority:
    """`digest` is the hex SHA-256 of the authority's certificate (DER)."""

    folder: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.certificate.public_bytes(serialization.Encoding.DER)).hexdigest()

    # --- tokens ---------------------------------------------------------------------------------------------------

    def token(self, identity: Identity, address: str, valid_ms: int) -> str:
        """A new join token for one part. Raises LinkFault for a name that cannot be one, or with too many open."""
        check(identity)
        folder = self.folder / "tokens"
        if len(self._open()) >= TOKENS_MAX:
            raise LinkFault(f"{TOKENS_MAX} join tokens are open; they end when they are used or expire")
        secret = secrets.token_urlsafe(24)
        opened = _Open(identity.role, identity.name, identity.region, _now_ms() + valid_ms)
        _write(folder / _digest(secret), msgspec.json.encode(opened))
        return str(Token(address, self.digest, identity.role, identity.name, identity.region, secret))

    def redeem(self, secret: str) -> Identity:
        """Whom the token lets in; it is used up by this. Raises LinkFault."""
        file = self.folder / "tokens" / _digest(secret)
        try:
            opened = msgspec.json.decode(file.read_bytes(), type=_Open)
            file.unlink()  # of two who try at once, one gets past this
        except FileNotFoundError:
            raise LinkFault("the join token was used already, has expired, or is another platform's") from None
        if opened.expires_ms < _now_ms():
            raise LinkFault("the join token has expired; `tidegate join token` prints a new one")
        return Identity(opened.role, opened.name, opened.region)

    def _open(self) -> Sequence[Path]:
        """Files of tokens that may still be used; those that expired are removed."""
        left = []
        for file in (self.folder / "tokens").iterdir():
            with contextlib.suppress(FileNotFoundError):  # used in this instant
                if msgspec.json.decode(file.read_bytes(), type=_Open).expires_ms < _now_ms():
                    file.unlink()
                else:
                    left.append(file)
        return left

    # --- members --------------------------------------------------------------------------------------------------

    def issue(self, request: bytes, identity: Identity) -> bytes:
        """A certificate (PEM) for the key of a signing request (PEM); what else the request says is not looked at.

        Raises LinkFault for a request that is not one.
        """
        try:
            asked = x509.load_pem_x509_csr(request)
            public, good = asked.public_key(), asked.is_signature_valid
        except (ValueError, InvalidSignature) as error:
            raise LinkFault("this is not a certificate signing request") from error
        if not good or not isinstance(public, ec.EllipticCurvePublicKey):
            raise LinkFault("the signing request is not signed by its own P-256 key")
        certificate = self._sign(public, identity)
        file = self._member_file(identity)
        known = self._member(identity)
        serials = (f"{certificate.serial_number:x}", *(known.serials if known is not None else ()))
        _write(file, msgspec.json.encode(_Member(identity.region, serials[:SERIALS_KEPT])))
        return certificate.public_bytes(serialization.Encoding.PEM)

    def admitted(self, identity: Identity, serial: int) -> bool:
        """Whether this certificate is one of the last two of a part that was not sent away."""
        known = self._member(identity)
        return known is not None and known.region == identity.region and f"{serial:x}" in known.serials

    def members(self) -> list[Identity]:
        """All parts that may come in, by role and name."""
        found = []
        for file in sorted((self.folder / "members").glob("[!.]*")):
            role, _, name = file.name.partition(".")
            if (known := self._member(Identity(role, name, ""))) is not None:
                found.append(Identity(role, name, known.region))
        return found

    def remove(self, role: str, name: str) -> bool:
        """From now on its certificates are refused, here at once. False when there is no such part."""
        known = self._member(Identity(role, name, ""))
        if known is None:
            return False
        for serial in known.serials:
            (self.folder / "removed" / serial).touch(0o600)
        self._member_file(Identity(role, name, "")).unlink(missing_ok=True)
        return True

    def removed(self) -> tuple[str, ...]:
        """Numbers (hex) of certificates that have not ended and must not be let in anywhere."""
        oldest_s, found = time.time() - timedelta(days=CERTIFICATE_DAYS).total_seconds(), []
        for file in (self.folder / "removed").iterdir():
            if file.stat().st_mtime < oldest_s:
                file.unlink(missing_ok=True)
            else:
                found.append(file.name)
        return tuple(sorted(found))

    def own(self, identity: Identity, folder: Path) -> Credentials:
        """Credentials of a part on this machine, made new: it needs no token."""
        key, request = new_request()
        keep_identity(folder, self.pem, key, self.issue(request, identity))
        return Credentials(folder)

    def _member(self, identity: Identity) -> _Member | None:
        try:
            return msgspec.json.decode(self._member_file(identity).read_bytes(), type=_Member)
        except FileNotFoundError:
            return None

    def _member_file(self, identity: Identity) -> Path:
        return self.folder / "members" / f"{identity.role}.{identity.name}"

    def _sign(self, public: ec.EllipticCurvePublicKey, identity: Identity) -> x509.Certificate:
        usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
        return (
            _builder(public, f"{identity.role}/{identity.name}"[:64], self.certificate.subject, CERTIFICATE_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri)]), critical=False)
            .add_extension(usages, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )


def open_authority(folder: Path, ca_file: Path | None = None, key_file: Path | None = None) -> Authority:
    """The authority of `folder`, made if it is not there; with both files given, the operator's own.

    Raises LinkFault for files that cannot be used.
    """
    for part in (folder, folder / "tokens", folder / "members", folder / "removed"):
        part.mkdir(mode=0o700, parents=True, exist_ok=True)
    ca, key = ca_file or folder / CA_FILE, key_file or folder / "ca.key"
    if ca_file is None and not ca.exists():
        _make_authority(folder)
    try:
        certificate = x509.load_pem_x509_certificate(ca.read_bytes())
        private = serialization.load_pem_private_key(key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise LinkFault(f"the authority {ca} with the key {key} cannot be read ({type(error).__name__})") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey) or private.public_key() != certificate.public_key():
        raise LinkFault(f"{key} is not the elliptic-curve key of {ca}")
    return Authority(folder, certificate, private)


def keep_identity(folder: Path, ca_pem: bytes, key: bytes, certificate: bytes) -> None:
    """What a part shows from now on, all PEM; one file, so that it never shows one with the key of another."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(folder / CA_FILE, ca_pem)
    _write(folder / IDENTITY_FILE, key + certificate)


def new_request() -> tuple[bytes, bytes]:
    """A new key and a signing request for it, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tidegate part")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return key.private_bytes(*_KEY_FORMAT), request.public_bytes(serialization.Encoding.PEM)


def check(identity: Identity) -> None:
    """Raises LinkFault for a name or region that does not fit into a certificate's URI."""
    for what, name in (("name", identity.name), ("region", identity.region)):
        if not NAME.fullmatch(name):
            raise LinkFault(f"{what} {name!r} is refused; accepted: a-z, 0-9 and . _ - inside, at most 63 characters")


def _make_authority(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tidegate platform")])
    others = "digital_signature content_commitment key_encipherment data_encipherment key_agreement encipher_only"
    uses = dict.fromkeys([*others.split(), "decipher_only"], False)
    certificate = (
        _builder(key.public_key(), "tidegate platform", name, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **uses), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(folder / "ca.key", key.private_bytes(*_KEY_FORMAT))
    _write(folder / CA_FILE, certificate.public_bytes(serialization.Encoding.PEM))


def _builder(public: ec.EllipticCurvePublicKey, subject: str, issuer: x509.Name, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLY)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, and only for this user."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
