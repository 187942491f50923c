"""The console's files: served without a key, holding no data, able to run nothing but themselves."""

import re
from pathlib import Path

from tests.control.world import running
from tests.loop import on_loop

STATIC = Path(__file__).parents[2] / "tidegate" / "control" / "static"


@on_loop
async def test_the_page_and_its_files_are_served_with_a_strict_policy(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        assert (await world.http.get("/console")).headers["location"] == "/console/"
        page = await world.http.get("/console/", headers={"authorization": ""})
        assert page.status_code == 200
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        for file in re.findall(r'(?:src|href)="(/console/[^"]+)"', page.text):
            answer = await world.http.get(file, headers={"authorization": ""})
            assert answer.status_code == 200
            assert answer.headers["content-security-policy"] == policy


def test_nothing_is_fetched_from_elsewhere_and_text_never_becomes_markup() -> None:
    html, css, script = ((STATIC / f"console.{kind}").read_text() for kind in ("html", "css", "js"))
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", html)
    assert "url(" not in css
    assert "@import" not in css
    assert re.findall(r"https?://[^\"']+", script) == ["http://www.w3.org/2000/svg"]
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert sink not in script
    assert "localStorage" not in script, "the key is kept in the tab's session only"
    assert not re.findall(r"\son\w+=|style=", html), "inline handlers and styles are forbidden by the policy"
