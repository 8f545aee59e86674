"""Certificates for servers that speak TLS: an authority of the tests' own, made with ``openssl``."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.servers.processes import HOST, CannotStart, find_program

_AUTHORITY = """[req]
distinguished_name = name
x509_extensions = extensions
prompt = no
[name]
CN = an authority for tests
[extensions]
basicConstraints = critical, CA:true
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
"""

_SIGNED = """[extensions]
basicConstraints = critical, CA:false
subjectAltName = IP:{host}, DNS:localhost
authorityKeyIdentifier = keyid
"""


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files: an authority, a server's certificate for this host and a client's, both signed by the authority."""

    authority: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path


def make_certificates(directory: Path) -> Certificates:
    """Make them in ``directory``, valid for some days. Raises CannotStart where there is no ``openssl``."""
    program = find_program("openssl")
    if program is None:
        raise CannotStart("openssl is not installed: apt-get install openssl")
    directory.mkdir(parents=True, exist_ok=True)
    authority, authority_key = directory / "authority.pem", directory / "authority.key"
    (directory / "authority.cnf").write_text(_AUTHORITY)
    (directory / "signed.cnf").write_text(_SIGNED.format(host=HOST))
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]

    def openssl(*arguments: str | Path) -> None:
        subprocess.run([program, *map(str, arguments)], check=True, capture_output=True, timeout=60)

    openssl("req", "-x509", *new_key, "-days", "3", "-config", directory / "authority.cnf",
            "-keyout", authority_key, "-out", authority)  # fmt: skip
    made: dict[str, tuple[Path, Path]] = {}
    for name in ("server", "client"):
        certificate, key, request = (directory / f"{name}{suffix}" for suffix in (".pem", ".key", ".csr"))
        openssl("req", "-new", *new_key, "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        openssl("x509", "-req", "-in", request, "-CA", authority, "-CAkey", authority_key, "-CAcreateserial",
                "-days", "3", "-extfile", directory / "signed.cnf", "-extensions", "extensions",
                "-out", certificate)  # fmt: skip
        key.chmod(0o644)  # a server may run as another user
        made[name] = certificate, key
    return Certificates(authority, *made["server"], *made["client"])
