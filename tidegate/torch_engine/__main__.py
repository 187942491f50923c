"""``python -m tidegate.torch_engine --model DIR --socket PATH``: one engine without a template process."""

import argparse
import logging
import os
import sys
from pathlib import Path

from tidegate.torch_engine import environment
from tidegate.torch_engine.options import PREFILL_TOKENS_MAX, SLOTS, WAITING_REQUESTS_MAX, Options


def _parse(arguments: list[str]) -> Options:
    parser = argparse.ArgumentParser(prog="python -m tidegate.torch_engine", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face-layout safetensors directory")
    parser.add_argument("--socket", required=True, help="the Unix socket to serve on (created with mode 0600)")
    parser.add_argument("--name", default="", help="the id GET /v1/models shows")
    parser.add_argument("--memory-bytes", type=int, help="cap of weights and KV cache together")
    parser.add_argument("--context-tokens-max", type=int, help="upper bound of the context")
    parser.add_argument("--slots", type=int, default=SLOTS, help="sequences in one step")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of the model (0: all cores)")
    parser.add_argument("--prefill-tokens-max", type=int, default=PREFILL_TOKENS_MAX)
    parser.add_argument("--waiting-requests-max", type=int, default=WAITING_REQUESTS_MAX)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:N]")
    parser.add_argument("--lifeline", type=int, help="a pipe's read end: when it ends, so does the engine")
    return Options(**vars(parser.parse_args(arguments)))


def main() -> int:
    options = _parse(sys.argv[1:])
    environment.prepare()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    from tidegate.torch_engine import server

    return server.run(options)


if __name__ == "__main__":
    # The step thread may be inside a forward; nothing is owed to anybody once the server has closed.
    code = main()
    logging.shutdown()
    os._exit(code)
