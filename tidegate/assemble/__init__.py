"""The only place that builds real adapters and plugs them into services.

`platform` is the `up` process (control, node, billing); `gateway` is the gateway process, a module of its own so that
it starts without SQL, pydantic or a web framework. This package file imports nothing for the same reason.
"""
