"""The tenant's stores on a real PostgreSQL server: the tests that they pass on SQLite, one by one.

The tests are those of other files; what is different here is the database that their fixtures open.
"""

from __future__ import annotations

import pytest

from tests.concurrency import test_round_writes
from tests.support.postgres import PostgresServer
from tests.unit import test_alarms_store, test_guest_enrolment, test_tenant_records

pytestmark = pytest.mark.needs_postgres
SAME = (test_alarms_store, test_guest_enrolment, test_round_writes, test_tenant_records)


@pytest.fixture
def store_url(postgres: PostgresServer) -> str:
    """An empty database on the server."""
    return postgres.new_database()


for module in SAME:
    found = {name: value for name, value in vars(module).items() if name.startswith("test_")}
    assert not found.keys() & globals().keys(), "two tests of one name"
    globals().update(
        found | {name: vars(module)[name] for name in ("database", "registry", "store") if name in vars(module)}
    )
