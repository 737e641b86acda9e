"""`python -m tests.support.audit`: report known vulnerabilities of the locked packages (pip-audit).

Fails if there are any, or if pip-audit itself fails. If PyPI's database cannot be reached, it
prints one line and passes, so that work without a network stays possible.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx

LOCK = Path(__file__).parents[2] / "requirements.lock"
# This release has known vulnerabilities: a mirror that lists none for it has no database.
WEAK_RELEASE = "https://pypi.org/pypi/jinja2/2.10/json"
PROBE_TIMEOUT_S = 3.0
AUDIT_TIMEOUT_S = 60.0


def main() -> int:
    """Print one line for each vulnerability, or one summary line, and return the exit status."""
    if not _database_answers():
        return _passed("pip-audit did not run: its database (pypi.org) cannot be reached")
    options = ["--no-deps", "--disable-pip", "--progress-spinner=off", "--format=json"]
    try:
        audit = subprocess.run(
            [sys.executable, "-m", "pip_audit", "--requirement", LOCK, *options],
            capture_output=True,
            text=True,
            timeout=AUDIT_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return _passed("pip-audit did not end: its database stopped answering")
    try:
        report = json.loads(audit.stdout)
    except ValueError:
        if not _database_answers():
            return _passed("pip-audit did not end: its database stopped answering")
        sys.stderr.write(f"pip-audit failed, with its database there:\n{audit.stderr}")
        return 1
    weaknesses = [
        f"{package['name']} {package['version']}: {found['id']}, "
        f"fixed in {' or '.join(found['fix_versions']) or 'no version'}"
        for package in report["dependencies"]
        for found in package.get("vulns", ())
    ]
    if weaknesses:
        sys.stderr.write("\n".join(weaknesses) + "\n")
        return 1
    unknown = sum("skip_reason" in package for package in report["dependencies"])
    known = len(report["dependencies"]) - unknown
    return _passed(f"pip-audit: nothing is known against {known} packages, {unknown} are not known")


def _database_answers() -> bool:
    try:
        answer = httpx.get(WEAK_RELEASE, timeout=PROBE_TIMEOUT_S)
        return bool(answer.raise_for_status().json()["vulnerabilities"])
    except (httpx.HTTPError, ValueError, KeyError):
        return False


def _passed(message: str) -> int:
    sys.stderr.write(message + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
