"""What the end-to-end tests of foreign engines ask and read; `tenant`'s key is the one their configuration declares."""

from typing import Any

import httpx

from tests.e2e.platform import Platform


def client(platform: Platform, tenant: str) -> httpx.Client:
    headers = {"authorization": f"Bearer key-of-{tenant}-0123456789"}
    return httpx.Client(base_url=platform.base_url, headers=headers, timeout=900)


def body(name: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "how many words make a long sound"}]
    return {"model": name, "messages": messages, "max_tokens": 5, "temperature": 0, "ignore_eos": True, **more}


def usage(platform: Platform) -> dict[str, tuple[int, int]]:
    with platform.admin() as admin:
        rows = admin.get("/api/v1/usage", params={"by": "endpoint"}).json()["rows"]
    return {row["group"]: (row["input_tokens"], row["output_tokens"]) for row in rows}
