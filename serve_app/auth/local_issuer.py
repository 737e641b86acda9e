"""The local stack's token issuer: an RSA key in a folder, its public half served over HTTP.

Anyone who can read the key file can mint tokens; there is no other secret and no login. Run it with
`python -m serve_app.auth.local_issuer --state-dir DIR --port N`. It listens on loopback only.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import logging
import os
import signal
import stat
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import MappingProxyType
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from jose import jwt

from serve_app.auth.scopes import USER_SCOPES

log = logging.getLogger(__name__)

LOCAL_AUDIENCE = "comfy-restore"
KEY_FILE = "issuer-key.pem"
_HOST = "127.0.0.1"
_ALGORITHM = "RS256"


def issuer_url(port: int) -> str:
    """Return the issuer's address: LOCAL_ISSUER_URL, and `iss` in its tokens."""
    return f"http://{_HOST}:{port}"


def mint_token(
    key_dir: Path,
    issuer: str,
    audience: str,
    sub: str,
    scopes: Iterable[str] = USER_SCOPES,
    lifetime_s: int = 3600,
    more_claims: Mapping[str, object] = MappingProxyType({}),
) -> str:
    """Return a token for `sub`, signed with the key in `key_dir`; a missing key is created."""
    now = int(time.time())
    claims = {
        **more_claims,
        "iss": issuer,
        "aud": audience,
        "sub": sub,
        "scope": " ".join(scopes),
        "iat": now,
        "exp": now + lifetime_s,
    }
    key = ensure_key(key_dir)
    headers = {"kid": _public_jwk(key)["kid"]}
    return jwt.encode(claims, _pem(key).decode(), algorithm=_ALGORITHM, headers=headers)


def ensure_key(key_dir: Path) -> rsa.RSAPrivateKey:
    """Return the private key in `key_dir`, creating it on first use.

    Processes that create it at the same time end up with the same key. The folder's mode becomes
    0700 and the file's 0600, whatever they were before. Raises TypeError if the file holds another
    kind of key.
    """
    path = key_dir / KEY_FILE
    if not path.exists():
        key_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=key_dir) as draft:  # 0600 from the start
            draft.write(_pem(rsa.generate_private_key(public_exponent=65537, key_size=2048)))
            draft.flush()
            os.fsync(draft.fileno())
            # another process may have created it meanwhile
            with suppress(FileExistsError):
                os.link(draft.name, path)
    for private, mode in ((key_dir, 0o700), (path, 0o600)):
        if stat.S_IMODE(private.stat().st_mode) != mode:
            private.chmod(mode)
    key = load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, rsa.RSAPrivateKey):
        raise TypeError(f"{path} does not hold an RSA key")
    return key


def jwks(key_dir: Path) -> dict[str, Any]:
    """Return the JSON Web Key Set (RFC 7517) that verifies the tokens of `mint_token`."""
    return {"keys": [_public_jwk(ensure_key(key_dir))]}


def _public_jwk(key: rsa.RSAPrivateKey) -> dict[str, str]:
    numbers = key.public_key().public_numbers()
    required = {"e": _base64url_uint(numbers.e), "kty": "RSA", "n": _base64url_uint(numbers.n)}
    # RFC 7638: the thumbprint is the hash of exactly these members in this order
    canonical = json.dumps(required, separators=(",", ":"), sort_keys=True).encode()
    thumbprint = _base64url(hashlib.sha256(canonical).digest())
    return {**required, "kid": thumbprint, "use": "sig", "alg": _ALGORITHM}


def _base64url_uint(value: int) -> str:
    return _base64url(value.to_bytes((value.bit_length() + 7) // 8, "big"))


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _pem(key: rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


class IssuerServer(ThreadingHTTPServer):
    """HTTP server of the public key on loopback. Port 0 takes any free port."""

    daemon_threads = True

    def __init__(self, key_dir: Path, port: int) -> None:
        super().__init__((_HOST, port), _Handler)
        self.url = issuer_url(self.server_port)
        discovery = {
            "issuer": self.url,
            "jwks_uri": f"{self.url}/.well-known/jwks.json",
            "id_token_signing_alg_values_supported": [_ALGORITHM],
            "response_types_supported": ["token"],
            "subject_types_supported": ["public"],
        }
        self.documents: Mapping[str, bytes] = {
            "/.well-known/jwks.json": json.dumps(jwks(key_dir)).encode(),
            "/.well-known/openid-configuration": json.dumps(discovery).encode(),
        }


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, IssuerServer)  # noqa: S101 # only it uses this handler
        body = self.server.documents.get(self.path)
        if body is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Serve the local token issuer's public key.")
    parser.add_argument("--state-dir", type=Path, required=True, help="folder of the key file")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(0))
    with IssuerServer(arguments.state_dir, arguments.port) as server:
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
