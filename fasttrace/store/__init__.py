"""Results on disk: a ledger that survives kills, pictures beside it, one Parquet table."""

from fasttrace.store.manifest import Call, Manifest
from fasttrace.store.schema import COLUMNS, SCHEMA_VERSION
from fasttrace.store.settled import SettledRecord, SettledSite
from fasttrace.store.store import Shard, Store, merge, read_rows, require

__all__ = [
    "COLUMNS",
    "SCHEMA_VERSION",
    "Call",
    "Manifest",
    "SettledRecord",
    "SettledSite",
    "Shard",
    "Store",
    "merge",
    "read_rows",
    "require",
]
