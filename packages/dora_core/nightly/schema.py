"""The tables of the history's SQLite file, and how it is opened."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 60.0
_PROVENANCE = """
  night TEXT NOT NULL,
  pipeline TEXT NOT NULL,
  entry TEXT NOT NULL,
  time TEXT NOT NULL,           -- UTC, ISO 8601
  commit_hash TEXT NOT NULL,
  hardware TEXT NOT NULL,
  versions TEXT NOT NULL,       -- JSON
  config_hash TEXT NOT NULL,
  data_hash TEXT NOT NULL,      -- training rows, and for a score evaluation rows
  verdict TEXT NOT NULL,
"""
_TABLES = f"""
CREATE TABLE runs ({_PROVENANCE}
  num_rows INTEGER NOT NULL,
  config TEXT NOT NULL,         -- JSON
  curve BLOB NOT NULL,          -- zlib of JSON: [[step, loss], ...]
  UNIQUE (night, pipeline, entry)
);
CREATE TABLE measurements ({_PROVENANCE}
  metric TEXT NOT NULL,
  value REAL NOT NULL,
  stderr REAL,
  n INTEGER NOT NULL,
  higher_is_better INTEGER NOT NULL,
  evaluation_hash TEXT NOT NULL,
  reason TEXT NOT NULL,
  outcomes BLOB,                -- zlib of JSON: [[value, question, right, given], ...]
  UNIQUE (night, pipeline, entry, metric)
);
"""


class HistoryError(ValueError):
    """The file is no history, or one of another schema."""


def open_database(path: Path) -> sqlite3.Connection:
    """Open a history, made if it is not there.

    Raises ``HistoryError`` for a schema other than this version's: nothing is migrated in silence.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    try:
        with transaction(database):
            (version,) = database.execute("PRAGMA user_version").fetchone()
            (num_tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if version == 0 and num_tables == 0:
                for statement in _TABLES.split(";")[:-1]:
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                version = SCHEMA_VERSION
    except sqlite3.DatabaseError as error:
        database.close()
        raise HistoryError(
            f"{path} cannot be read as a history ({error}); it must be a file that dora nightly wrote. Give another "
            "--history."
        ) from None
    if version != SCHEMA_VERSION:
        database.close()
        raise HistoryError(
            f"{path} has schema {version}; this version reads and writes {SCHEMA_VERSION}. Use the version that "
            "wrote it, or give another --history to begin anew."
        )
    return database


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All or nothing; others who write wait, ``BUSY_TIMEOUT_S`` at most."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")
