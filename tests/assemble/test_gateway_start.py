"""A gateway that cannot start says why and ends, as a part that has joined does too."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import uvloop
from tidegate.assemble.gateway import GatewayProcess, serve
from tidegate.assemble.sockets import listen_tcp
from tidegate.domain.errors import Fault
from tidegate.engines.process import Lifeline
from tidegate.gateway.limits import GatewayLimits

async def main():
    listener, lifeline = listen_tcp("127.0.0.1", 0), Lifeline()
    nowhere, journal = "unix:/nowhere", sys.argv[1] + "/journal"
    try:
        await serve(GatewayProcess(
            listen_fd=listener.fileno(), lifeline_fd=lifeline.read_fd, region="local", control_address=nowhere,
            admin_address=nowhere, journal_dir=journal, limits=GatewayLimits(),
        ))
    finally:
        lifeline.close()
        listener.close()

try:
    uvloop.run(main())
except Fault as fault:
    print(fault.reason)
"""


def test_without_a_journal_it_is_refused_in_words(tmp_path: Path) -> None:
    """In a process of its own: it was aborted by the event loop, whose lifeline was closed while it was read."""
    (tmp_path / "file").write_text("no directory")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "file")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "the journal directory cannot be created: Not a directory\n"), ended
