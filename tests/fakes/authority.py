"""TLS for tests: a certificate authority, and a TLS front for servers that speak no TLS
themselves."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Preamble = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True)
class Authority:
    """A certificate authority that signs server certificates and configures clients to trust only
    it."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    folder: Path

    @classmethod
    def create(cls, folder: Path) -> Self:
        key = ec.generate_private_key(ec.SECP256R1())
        return cls(_certificate("an authority of these tests", key, None, key), key, folder)

    @property
    def path(self) -> Path:
        """Write the authority's certificate to a file, and return its path."""
        path = self.folder / "authority"
        path.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        return path

    def client(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.path)

    def server(self, name: str, seen: list[str | None] | None = None) -> ssl.SSLContext:
        """Return a server context for `name`; `seen` collects the server name of each handshake."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(name, key, self.certificate.subject, self.key)
        path = self.folder / name
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        if seen is not None:
            context.sni_callback = lambda _socket, asked, _context: seen.append(asked)
        return context


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name | None,
    signer: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    )
    return builder.sign(signer, hashes.SHA256())


@asynccontextmanager
async def relaying(
    to_port: int, tls: ssl.SSLContext, preamble: Preamble | None = None
) -> AsyncIterator[int]:
    """Relay TLS connections to `to_port` on loopback; yield the port that accepts them.

    `preamble` runs before TLS starts, for protocols that begin in plain text.
    """

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if preamble is not None:
            await preamble(reader, writer)
            try:
                await writer.start_tls(tls)
            except OSError:
                writer.close()  # the client rejected the certificate
                return
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", to_port)
        pumps = [_pump(reader, to_writer), _pump(to_reader, writer)]
        await asyncio.wait([asyncio.create_task(each) for each in pumps])

    at_once = None if preamble else tls
    server = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=at_once)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass  # the other direction ends with its own connection
    finally:
        writer.close()
