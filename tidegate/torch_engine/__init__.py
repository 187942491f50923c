"""The built-in engine: one process is one replica. Serves a safetensors directory over HTTP on a Unix socket.

Started by `engines.builtin` through the template process (`template`), or by hand: ``python -m tidegate.torch_engine``.
Knows `tidegate.wire` and its weights, nothing else of tidegate.
"""
