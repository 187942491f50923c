"""What services stand on: the database in the data directory, and the stores in it."""

from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from tidegate.assemble.folders import Folders
from tidegate.config import Config
from tidegate.stores.batches import SqlBatchStore
from tidegate.stores.contracts import SqlContracts
from tidegate.stores.database import migrate, open_database
from tidegate.stores.journal_reader import SegmentJournalReader
from tidegate.stores.ledger import SqlLedger
from tidegate.stores.prices import SqlPriceBook
from tidegate.stores.service_counts import SqlServiceCounts
from tidegate.stores.state import SqlStateStore

DATABASE_FILE = "tidegate.db"


@dataclass(frozen=True, slots=True)
class Ground:
    """Directories (all of mode 0700) and stores. `run` is for sockets, `journal` for usage records of every gateway."""

    data: Path
    run: Path
    logs: Path
    journal: Path
    log_file: Path
    state: SqlStateStore
    ledger: SqlLedger
    prices: SqlPriceBook
    contracts: SqlContracts
    journal_reader: SegmentJournalReader
    batches: SqlBatchStore
    service_counts: SqlServiceCounts


def prepare(config: Config, folders: Folders, stack: AsyncExitStack) -> Ground:
    """Opens what is in the data directory; `stack` closes it. Raises StoreFault."""
    data, journal = folders.data, folders.data / "journal"
    journal.mkdir(mode=0o700, exist_ok=True)
    url = config.database_url.get_secret_value() if config.database_url else f"sqlite:///{data / DATABASE_FILE}"
    engine = open_database(url)
    stack.callback(engine.dispose)
    migrate(engine)
    return Ground(
        data=data,
        run=folders.run,
        logs=folders.logs,
        journal=journal,
        log_file=folders.log_file,
        state=SqlStateStore(engine),
        ledger=SqlLedger(engine),
        prices=SqlPriceBook(engine),
        contracts=SqlContracts(engine),
        journal_reader=SegmentJournalReader(journal),
        batches=SqlBatchStore(engine),
        service_counts=SqlServiceCounts(engine),
    )
