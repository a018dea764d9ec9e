"""Durable state: SQLite on every node."""

from netstore.store.database import Store, connect
from netstore.store.tables import Table, Transaction

__all__ = ["Store", "Table", "Transaction", "connect"]
