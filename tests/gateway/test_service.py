"""What a gateway tells control of the service it gave: counts that only grow, told anew as a baseline on each link."""

import asyncio
from pathlib import Path

from tests.gateway.engine import die, refuse
from tests.gateway.rig import Rig, chat, endpoint, rig, run
from tests.loop import until
from tidegate.domain.endpoint import EndpointState, Slo
from tidegate.wire.internal import ServiceReported


def reports(r: Rig) -> list[ServiceReported]:
    return [m for m in r.control.messages if isinstance(m, ServiceReported)]


async def told(r: Rig, served: int, attained: int, failed: int) -> None:
    def matches() -> bool:
        last = reports(r)[-1:]
        return bool(last) and (last[0].served, last[0].attained, last[0].failed) == (served, attained, failed)

    await until(matches, f"{served} served, {attained} attained, {failed} failed; told {reports(r)[-1:]}")


def test_served_attained_and_failed_are_counted_and_what_a_client_did_wrong_is_not(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            r.control.endpoints = (endpoint(slo=Slo(ttft_ms=5_000, tpot_ms=20)),)
            await r.control.publish()
            await asyncio.sleep(0.05)
            assert (await r.ask(chat())).status == 200
            await told(r, 1, 1, 0)
            assert (await r.ask(chat(stream=True, max_tokens=4, pause=0.15))).status == 200
            await told(r, 2, 1, 0)
            r.engine.script.append(refuse(400, "invalid_request"))
            assert (await r.ask(chat())).status == 400
            r.engine.script.extend([die, die])
            await r.control.route(r.target())
            assert (await r.ask(chat(), X_Scale_Up_Timeout="0")).status >= 500
            await told(r, 2, 1, 1)
            await r.control.route(state=EndpointState.FAILED)
            assert (await r.ask(chat())).status == 503
            await told(r, 2, 1, 2)
            assert not any(report.baseline for report in reports(r))

    run(main())


def test_a_new_link_begins_with_a_baseline(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            assert (await r.ask(chat())).status == 200
            await told(r, 1, 1, 0)
            await r.control.links[-1].close()
            await r.control.accept()
            await until(lambda: any(report.baseline for report in reports(r)), "the baseline")
            assert (await r.ask(chat())).status == 200
            await told(r, 2, 2, 0)
            assert not reports(r)[-1].baseline

    run(main())
