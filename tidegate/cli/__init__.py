"""The command line: one file a noun, every verb with ``-o json``. `main` is the ``tidegate`` command."""

import sys


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
