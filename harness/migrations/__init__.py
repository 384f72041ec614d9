"""Migrations of each component's tables, which `harness.store` applies when a database is opened.

One folder a component, one file a schema: revision ``0002`` makes schema 2 of schema 1. The files are read by alembic
from the folder, not imported.

Invariants:
    1. A file of a released schema is not changed: databases that it made are out there.
    2. ``upgrade`` changes tables through the ``op`` it is given, and nothing else; it runs inside one transaction.
    3. The last schema is what the component's ``tables.py`` describes, on SQLite and on PostgreSQL.

Spec: docs/adr/0008 (how a schema version and a revision go together, and how to write the next one).
"""
