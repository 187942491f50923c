"""Where tests find real engines: on PATH, or where `make engines-…` put them."""

import os
import shutil
from pathlib import Path

ENGINES = Path(__file__).resolve().parent.parent / ".engines"


def _found(variable: str, name: str, made: Path) -> str:
    """The program's path; empty where there is none, and tests that need it are skipped."""
    return os.environ.get(variable) or shutil.which(name) or (str(made) if made.exists() else "")


LLAMA_SERVER = _found("TIDEGATE_TEST_LLAMA_SERVER", "llama-server", ENGINES / "llamacpp" / "llama-server")
# Asked for by name only: each of its starts takes as long as a whole folder of other tests.
VLLM_PYTHON = os.environ.get("TIDEGATE_TEST_VLLM_PYTHON", "")
