"""The template process: imports torch and transformers once, then forks an engine for every order.

An order is one line of JSON on its Unix socket (`options.from_order`), the reply one line: ``{"pid": N}`` or
``{"error": "…"}``. It stays single-threaded, because a fork copies one thread only: no torch operation runs here, and
an order is refused if a second thread ever appeared. Engines outlive it; both end with the lifeline.
"""

import argparse
import contextlib
import gc
import json
import logging
import os
import select
import signal
import socket
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from tidegate.torch_engine import environment, faults, imports, options, shared

environment.prepare()

ORDER_BYTES_MAX = 64 << 10
ORDER_MS_MAX = 5_000
_FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "bert")
_OURS = (signal.SIGCHLD, signal.SIGTERM)
log = logging.getLogger("tidegate.template")


def _preload(*, light: bool) -> None:
    """Everything an engine imports, the lazily imported model classes included."""
    with imports.light() if light else contextlib.nullcontext():
        import_module("tidegate.torch_engine.server")
        for family in _FAMILIES:
            import_module(f"transformers.models.{family}.modeling_{family}")
        import_module("transformers.models.qwen2.tokenization_qwen2")
        import_module("transformers.models.auto.tokenization_auto")
    import_module("uvloop")
    gc.collect()
    gc.freeze()  # the children's collectors never touch these pages, so they stay shared


def _thread_count() -> int:
    return len(os.listdir("/proc/self/task"))


class Template:
    """Accepts orders one after the other: a fork takes milliseconds."""

    def __init__(self, path: str, lifeline: int) -> None:
        self._path = path
        self._lifeline = lifeline
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._reaper, self._reaped = os.pipe()
        self._copies = shared.SharedCopies()

    def serve(self) -> int:
        """Until the lifeline ends or SIGTERM comes. In a forked child: the engine's exit code, and it is not back."""
        mask = os.umask(0o177)
        try:
            Path(self._path).unlink(missing_ok=True)  # a predecessor's, which cannot remove it any more
            self._listener.bind(self._path)
        except OSError as error:
            log.error("the socket could not be bound: %s", error.strerror)
            return faults.EXIT_SOCKET
        finally:
            os.umask(mask)
        self._listener.listen(64)
        os.set_blocking(self._reaped, False)
        signal.set_wakeup_fd(self._reaped)
        signal.signal(signal.SIGCHLD, _noted)
        signal.signal(signal.SIGTERM, _noted)
        log.info("template ready")
        while True:
            listening = self._listener.fileno()
            readable, _, _ = select.select([listening, self._lifeline, self._reaper], [], [])
            if self._lifeline in readable and not os.read(self._lifeline, 64):
                return faults.EXIT_OK
            if self._reaper in readable and signal.SIGTERM in os.read(self._reaper, 4096):
                return faults.EXIT_OK
            self._reap()
            if listening in readable:
                self._take_order()

    def _take_order(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(ORDER_MS_MAX / 1000)
            try:
                engine = options.from_order(_read_order(connection))
                if _thread_count() > 1:
                    raise ValueError("the template process has more than one thread and must not fork")
                pid = self._fork(engine, connection)
                reply = {"pid": pid}
            except (ValueError, OSError) as error:
                self._copies.let_go()
                reply = {"error": str(error)[:300]}  # type: ignore[dict-item]
            with contextlib.suppress(OSError):  # the asker left: the engine it asked for is its supervisor's to find
                connection.sendall(json.dumps(reply).encode() + b"\n")

    def _fork(self, engine: options.Options, connection: socket.socket) -> int:
        """Signals wait meanwhile: one that met the child before it let go of the wake-up pipe would ring here."""
        copy = self._copies.of(engine.model)
        signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)
        try:
            pid = os.fork()
            if pid == 0:
                self._become(replace(engine, lifeline=self._lifeline, host_copy=copy), connection)
            self._copies.forked(pid, copy)
            return pid
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)

    def _become(self, engine: options.Options, connection: socket.socket) -> None:
        """In the child: let go of everything of the template's, run the engine, never return."""
        code = faults.EXIT_BUG
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)
            connection.close()
            self._listener.close()
            os.close(self._reaper)
            os.close(self._reaped)
            os.setsid()  # a signal to the template's group is not meant for its engines
            assert engine.host_copy is not None
            self._copies.keep_only(engine.host_copy)
            from tidegate.torch_engine import server

            code = server.run(engine)
        finally:
            logging.shutdown()
            os._exit(code)


    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):  # no children at all
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                self._copies.ended(pid)
                log.info("engine %d ended: %d", pid, os.waitstatus_to_exitcode(status))


def _noted(number: int, frame: object) -> None:
    """The wake-up pipe has the signal's number; the loop acts on it."""


def _read_order(connection: socket.socket) -> dict[str, object]:
    data = b""
    while not data.endswith(b"\n"):
        piece = connection.recv(ORDER_BYTES_MAX)
        data += piece
        if not piece or len(data) > ORDER_BYTES_MAX:
            raise ValueError("an order is one line of JSON")
    order = json.loads(data)
    if not isinstance(order, dict):
        raise ValueError("an order is a JSON object")
    return order


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tidegate.torch_engine.template", description=__doc__)
    parser.add_argument("--socket", required=True, help="the Unix socket for orders (created with mode 0600)")
    parser.add_argument("--lifeline", type=int, required=True, help="a pipe's read end: when it ends, all engines do")
    parser.add_argument("--plain", action="store_true", help="import everything, also what is never used")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s[%(process)d] %(levelname)s %(message)s")
    try:
        _preload(light=not arguments.plain)
    except Exception as error:  # whatever another torch or transformers does at its import
        if arguments.plain:
            raise
        # Half imported, nothing can be mended here: the same process begins anew, with every import as it comes.
        kind = type(error).__name__
        log.warning("light imports do not suit this torch and transformers (%s): importing everything", kind)
        os.execv(sys.executable, [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--plain"])
    if _thread_count() > 1:
        log.error("imports started %d threads: a fork would lose them", _thread_count() - 1)
        return faults.EXIT_BUG
    return Template(arguments.socket, arguments.lifeline).serve()


if __name__ == "__main__":
    sys.exit(main())
