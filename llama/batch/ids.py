"""IdSet: a set of texts that takes no memory to speak of, however many there are."""

import sqlite3


class IdSet:
    """In a database of its own, which SQLite keeps in a temporary file that goes with the connection."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("CREATE TABLE ids (id TEXT PRIMARY KEY) WITHOUT ROWID")
        # Never committed: a transaction for each id would cost a write for each.
        self._database.execute("BEGIN")
        self._len = 0

    def add(self, text: str) -> bool:
        """Whether it is new."""
        is_new = self._database.execute("INSERT OR IGNORE INTO ids VALUES (?)", (text,)).rowcount == 1
        self._len += is_new
        return is_new

    def __contains__(self, text: str) -> bool:
        return self._database.execute("SELECT 1 FROM ids WHERE id = ?", (text,)).fetchone() is not None

    def __len__(self) -> int:
        return self._len
