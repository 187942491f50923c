"""Without torch there is no engine to test; the rest of the project is tested all the same."""

import importlib.util

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["*.py"]
