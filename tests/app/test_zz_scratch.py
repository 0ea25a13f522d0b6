import asyncio, time
import pytest
from migration.ownership import Outcome
from deployments.engine_loop import EngineDead
from tests.app.ingress import at_once
from tests.virtual import virtually
from tests.app.test_watch import HUNG, HANG_S

@virtually
async def test_b2_moved_back(start):
    ingress = start(hang_s=HANG_S)
    await ingress.begin(10)
    ingress.replicas.hung = {"a"}
    await asyncio.sleep(HUNG)
    await ingress.go_on("r1~2", 11, first=1)
    ingress.replicas.hung.clear()
    await asyncio.sleep(HUNG)
    ingress.replicas.own("r1~2", "a")
    ingress.replicas.leave("r1~2", Outcome("moved", "a"))
    await at_once()
    ingress.replicas.hung = {"a"}
    await asyncio.sleep(3*HUNG)
    assert "r1~3" in ingress.replicas.submitted

@virtually
async def test_b2b_nowhere_then_somewhere(start):
    ingress = start(replicas="a", hang_s=HANG_S)
    await ingress.begin(10)
    ingress.replicas.hung = {"a"}
    await asyncio.sleep(HUNG)
    ingress.replicas.hung.clear()
    await ingress.go_on("r1~2", 11, first=1)
    ingress.replicas._names = "ab"
    await asyncio.sleep(HUNG)
    ingress.replicas.hung = {"a"}
    await asyncio.sleep(3*HUNG)
    assert "r1~3" in ingress.replicas.submitted

@virtually
async def test_b3_uncounted(start):
    ingress = start("abc")
    await ingress.begin(10)
    ingress.replicas.die("a")
    await at_once()
    ingress.replicas.leave("r1~2", Outcome("moved", "c"))
    await at_once()
    ingress.replicas.own("r1~2", "b")
    ingress.replicas.own("r1~2", "c")
    await at_once()
    assert ingress.shown()["recoveries"] == 1
    assert ingress.shown()["replicas"] == ["a", "b", "c"]

@virtually
async def test_b4_engine_dead(start):
    ingress = start()
    async def abort(*_): raise EngineDead("x")
    ingress.replicas.handle._methods["abort"] = abort
    await ingress.client._keeper.abort("a", "r1")

@virtually
async def test_b5(start):
    ingress = start()
    a = await ingress.add()
    await at_once()
    for n in range(50):
        ingress.replicas.send("r1", n, [n])
        await asyncio.sleep(1)
    assert a.refusal is None

@virtually
async def test_b6(start):
    ingress = start("abc")
    await ingress.begin(10)
    ingress.replicas.own("r1", "b")
    ingress.replicas.own("r1", "c")
    await at_once()
    ingress.replicas.leave("r1", Outcome("moved", "b"))
    await at_once()
    ingress.replicas.leave("r1", Outcome("moved", "c"))
    await at_once()
    assert ingress.shown()["replicas"] == ["a", "b", "c"]

@virtually
async def test_b8_source_hangs_after_commit(start):
    ingress = start(hang_s=HANG_S)
    await ingress.begin(10)
    ingress.replicas.own("r1", "b")
    ingress.replicas.hung = {"a"}
    await asyncio.sleep(30)
    assert ingress.replicas.attached == [("b", "r1")]

@virtually
async def test_b9(start):
    ingress = start()
    await ingress.begin(10)
    ingress.replicas.die("a")
    await at_once()
    await ingress.client.abort_requests_async(["r1"])
    await at_once()
    assert ingress.replicas.aborted == [("b", "r1~2")]

@virtually
async def test_b12(start, monkeypatch):
    ingress = start()
    a = await ingress.add()
    await asyncio.sleep(1)
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + 100)
    await asyncio.sleep(.6)
    assert a.refusal is None

@virtually
async def test_b13_resume_then_finished_ownership_lost(start):
    ingress = start()
    await ingress.begin(10)
    ingress.replicas.die("a")
    await at_once()
    ingress.replicas.send("r1~2", 1, [11, 12], last=True)
    await at_once()
    assert ingress.shown()["state"] == "finished"
    assert ingress.shown()["recoveries"] == 1
