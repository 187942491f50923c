"""The command line: one file a noun, every verb with ``-o json``. `main` is the ``tidegate`` command."""

import os
import sys
from types import TracebackType


def main() -> None:
    """Runs one verb. Exit codes: 0 done, 1 a refusal or fault (one clear line), 2 wrong usage or configuration."""
    from tidegate.cli.app import app
    from tidegate.cli.output import Problem

    try:
        app()
    except Problem as problem:
        sys.stderr.write(f"tidegate: {problem}\n")
        sys.exit(problem.exit_code)
    except BrokenPipeError:
        # `tidegate usage | head`: the reader went away, which is not our fault to report.
        sys.stderr.close()
        sys.exit(1)
    except Exception:
        if not os.environ.get("TIDEGATE_DEBUG"):
            sys.excepthook = _one_line  # now, because the verb's framework set one of its own
        raise


def _one_line(kind: type[BaseException], bug: BaseException, _traceback: TracebackType | None) -> None:
    """A bug is ours, not the user's: one line, and how to see the rest for a report."""
    sys.stderr.write(f"tidegate: internal error ({kind.__name__}: {bug}); TIDEGATE_DEBUG=1 shows where\n")
