"""What the template leaves out of transformers' imports, and that what is left out is there for whoever asks."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

pytestmark = pytest.mark.e2e

LIGHT = """
import sys
from tidegate.torch_engine import template
template._preload(light=True)
assert not {"torch._dynamo", "sympy", "torch.distributed.tensor"} & set(sys.modules), "the compiler was imported"
import torch
assert "disable" in torch.compiler.disable.__qualname__, "torch's own again"
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2.0, 2.0]
assert torch._dynamo.assume_constant_result.__module__.startswith("torch._dynamo"), "the real one, on demand"
"""


def test_the_compiler_is_left_out_and_can_still_be_had() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_another_transformers_is_imported_as_it_comes(tmp_path: Path) -> None:
    """A template whose light imports fail begins anew with all of them, as the same process."""
    other = "def light():\n    raise AttributeError('module torch has no attribute compiler')\n"
    script = (
        "import runpy, sys\n"
        "from tidegate.torch_engine import imports\n"
        f"exec({other!r}, imports.__dict__)\n"
        f"sys.argv = ['template', '--socket', {str(tmp_path / 'no' / 'template.sock')!r}, '--lifeline', '0']\n"
        "runpy.run_module('tidegate.torch_engine.template', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "importing everything" in done.stderr
    assert "the socket could not be bound" in done.stderr, "it came as far as a template does"
