"""Check with schemathesis that a service answers as its own OpenAPI document says.

Every run of the same tests sends the same requests: the document, the number of examples and the
strings in the loaded modules decide what is generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import requests
import schemathesis
from hypothesis import strategies as st
from requests import PreparedRequest, Session
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.errors import InvalidSchema
from schemathesis.core.result import Err, Ok
from schemathesis.specs.openapi import checks

Document = dict[str, Any]
Operation = APIOperation[Any, Any, Any, Any]

# The HTTP server itself interprets these headers, and refuses bad ones in its own format.
_FRAMING = {"connection", "content-length", "expect", "host", "te", "transfer-encoding", "upgrade"}
# The limit for a whole answer: an event stream must end by itself.
TIMEOUT_S = 300
_CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


@dataclass(frozen=True)
class Service:
    """The URL of a service, a token for it, and known values by parameter name, such as ids that
    exist."""

    url: str
    token: str | None = None
    known: Mapping[str, Any] = field(default_factory=dict)

    def document(self) -> Document:
        found: Document = requests.get(f"{self.url}/openapi.json", timeout=TIMEOUT_S).json()
        return found

    def session(self) -> Session:
        """Return a session that sends the token even if a request sets its own Authorization
        header."""
        session = Session()
        session.trust_env = False
        if self.token is not None:
            session.auth = self._sign
        return session

    def _sign(self, request: PreparedRequest) -> PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self.token}"
        return request


def demand_conformance(service: Service, document: Document, examples: int) -> dict[str, set[int]]:
    """Send up to `examples` requests to each operation, and return the statuses of the answers.

    The requests include valid and invalid ones. Raises schemathesis's failures.
    """
    schema = schemathesis.openapi.from_dict(document)
    with service.session() as session:
        return {
            operation.label: _statuses(service, operation, session, examples)
            for operation in map(_readable, schema.get_all_operations())
        }


def _readable(found: Ok[Operation] | Err[InvalidSchema]) -> Operation:
    if isinstance(found, Err):
        raise found.err()
    return found.ok()


def _statuses(service: Service, operation: Operation, session: Session, examples: int) -> set[int]:
    statuses: set[int] = set()

    @hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        case=st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode)),
        is_informed=st.booleans(),
    )
    def attempt(case: Case[Any], is_informed: bool) -> None:
        if is_informed:
            _inform(case, service.known)
        for name in [name for name in case.headers or () if name.lower() in _FRAMING]:
            del case.headers[name]
        answer = case.call(base_url=service.url, session=session, timeout=TIMEOUT_S)
        statuses.add(answer.status_code)
        case.validate_response(answer, checks=_CHECKS)

    attempt()
    return statuses


def _inform(case: Case[Any], known: Mapping[str, Any]) -> None:
    """Replace generated values in the path and in a form by known ones."""
    for values in (case.path_parameters, case.body):
        if isinstance(values, dict):
            for name in values.keys() & known.keys():
                value = known[name]
                values[name] = [value] if isinstance(values[name], list) else value
