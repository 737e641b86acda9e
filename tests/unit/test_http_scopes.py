"""The effect of a token's scopes, for each route in the OpenAPI document."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import uuid4

import pytest

from restoration.jobs import JobStatus
from serve_app.auth.scopes import USER_SCOPES, Scope, granted
from tests.fakes.site import API, Site

BATCHES = "/api/v1/batches"
BOTH = frozenset(USER_SCOPES)


async def _operations(site: Site) -> list[tuple[str, str, str]]:
    """Return (method, path with unused identifiers, scope) of each operation with a token."""
    async with site.client() as client:
        document = (await client.get("/openapi.json")).json()
    return list(_guarded(document))


def _guarded(document: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for requirement in operation.get("security", []):
                names = [each["name"] for each in operation.get("parameters", [])]
                filled = path.format_map({name: str(uuid4()) for name in names})
                yield method, filled, requirement["bearer"][0]


@pytest.mark.auth
async def test_every_route_refuses_a_token_without_its_scope(site: Site) -> None:
    """With every scope but the needed one the answer is 403 and names it, before the rest of the
    request is checked; with that one alone it is not."""
    operations = await _operations(site)
    assert len(operations) > 10
    for method, path, needed in operations:
        lacking = set(Scope) - {needed, Scope.ADMIN}
        async with site.client(scopes=lacking) as client:
            refused = await client.request(method, path)
        async with site.client(scopes=[needed]) as client:
            allowed = await client.request(method, path)
        assert (refused.status_code, refused.json()["code"]) == (403, "insufficient_scope"), path
        assert refused.json()["details"] == {"scope": needed}
        assert refused.headers["www-authenticate"] == (
            f'Bearer realm="comfy-restore", error="insufficient_scope", scope="{needed}"'
        )
        assert allowed.status_code not in (401, 403), path


@pytest.mark.auth
async def test_a_token_without_scopes_opens_nothing(site: Site) -> None:
    """A valid signature alone opens no route."""
    async with site.client(scopes=[]) as client:
        for method, path, _ in await _operations(site):
            assert (await client.request(method, path)).status_code == 403, path


@pytest.mark.auth
async def test_a_photo_is_not_read_for_a_token_that_may_not_send_it(site: Site) -> None:
    """A submission without the scope to write is refused before its body arrives."""

    async def endless() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    async with site.client(scopes=[Scope.READ]) as client:
        for path in (API, BATCHES):
            headers = {"Content-Type": "multipart/form-data; boundary=x"}
            answer = await client.post(path, content=endless(), headers=headers)
            assert answer.status_code == 403


@pytest.mark.auth
@pytest.mark.parametrize(
    ("claims", "scopes"),
    [
        ({"scope": "restorations:read restorations:write"}, BOTH),
        ({"permissions": ["restorations:read", "restorations:write"]}, BOTH),
        ({"scope": "openid restorations:read", "permissions": ["restorations:write"]},
         BOTH | {"openid"}),
        ({"scope": "admin"}, BOTH | {"admin"}),
        ({"permissions": ["admin"]}, BOTH | {"admin"}),
        ({"scope": "restorations:readx RESTORATIONS:WRITE"},
         {"restorations:readx", "RESTORATIONS:WRITE"}),
        ({"scope": "  restorations:read   restorations:write "}, BOTH),
        ({"scope": " "}, set()),
        ({}, set()),
    ],
)  # fmt: skip
def test_both_claims_count(claims: dict[str, Any], scopes: set[str]) -> None:
    """Auth0 puts permissions of roles in one claim and requested scopes in another; admin includes
    the users' scopes, and no scope includes workflows:run."""
    assert granted(claims) == scopes


@pytest.mark.parametrize(
    "code",
    [0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x1C, 0x1D, 0x1E, 0x1F, 0x2C, 0x85, 0xA0, 0x1680, 0x2003, 0x2028,
     0x2029, 0x202F, 0x205F, 0x3000],
)  # fmt: skip
def test_scopes_are_parted_by_spaces_alone(code: int) -> None:
    """RFC 6749 has one separator; with any other the claim is one name."""
    claim = f"openid{chr(code)}admin"
    assert granted({"scope": f"{claim} restorations:read"}) == {claim, "restorations:read"}
    assert granted({"permissions": [claim, "openid admin"]}) == {claim, "openid admin"}


@pytest.mark.auth
@pytest.mark.parametrize(
    "claims",
    [{"scope": ["admin"]}, {"scope": None}, {"permissions": "admin"}, {"permissions": [["admin"]]},
     {"permissions": {"admin": True}}],
)  # fmt: skip
def test_scopes_of_other_types_are_refused(claims: dict[str, Any]) -> None:
    """A claim of a wrong type is not interpreted."""
    with pytest.raises(ValueError, match=r"must be a (string|list of strings)"):
        granted(claims)


@pytest.mark.auth
async def test_an_admin_sees_and_cancels_everybodys_jobs(site: Site) -> None:
    """The owners' routes work for an admin by identifier; its own listing shows its own jobs."""
    job_id = await site.submit("ann")
    async with site.client("root", scopes=[Scope.ADMIN]) as admin:
        assert (await admin.get(f"{API}/{job_id}")).json()["status"] == "queued"
        assert (await admin.get(API)).json()["restorations"] == []
        assert (await admin.post(f"{API}/{job_id}/cancel")).json()["status"] == "cancelled"
        sent_again = (await admin.post(f"{API}/{job_id}/retry")).json()
    assert site.jobs.rows[job_id].status is JobStatus.CANCELLED
    async with site.client("ann") as ann:  # the job's owner stays the same
        assert (await ann.get(f"{API}/{sent_again['id']}")).status_code == 200


@pytest.mark.auth
@pytest.mark.parametrize("path", [API, BATCHES])
async def test_an_admin_lists_an_owners_jobs(site: Site, path: str) -> None:
    """`owner` selects the owner, on every page; for others than oneself it requires admin."""
    ids = [str(await site.submit("ann")) for _ in range(3)]
    async with site.client("root", scopes=[Scope.ADMIN]) as admin:
        page = (await admin.get(f"{path}?owner=ann&limit=2")).json()
        if path == API:
            rest = (await admin.get(page["next"])).json()
            shown = [each["id"] for each in page["restorations"] + rest["restorations"]]
            assert sorted(shown) == sorted(ids)
    async with site.client("bob") as bob:
        assert (await bob.get(f"{path}?owner=bob")).status_code == 200
        refused = await bob.get(f"{path}?owner=ann")
    assert (refused.status_code, refused.json()["details"]) == (403, {"scope": "admin"})
