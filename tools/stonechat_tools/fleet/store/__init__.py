"""The fleet's database: SQLite by default, PostgreSQL by URL, and the only SQL in the tree.

store.py      Store: what the other modules call
ingest.py     what a batch of reports and statuses does to the database, decided in memory
known.py      what is remembered of each device between batches, in columns
rejections.py  messages that were not taken, counted
schema.py     tables, versions, migrations
read.py       what is read for tables, plots and checks
sqlite.py     the file: opened, locked, moved, damaged
postgres.py   the server: connected, lost, connected again
releases.py   signed models that were published
rollouts.py   their roll-outs, and what each device did with them
retention.py  roll-ups by hour and day, and what is deleted after how long
"""

from .base import CONFLICT, DUPLICATE, STORED, Row, StoreError
from .retention import Keep
from .store import URLS, Store

__all__ = ["CONFLICT", "DUPLICATE", "STORED", "URLS", "Keep", "Row", "Store", "StoreError"]
