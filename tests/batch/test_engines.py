"""Lines over engines that are lost: none is forgotten or asked twice at a time, and one that ends every process fails
alone."""

import asyncio

import pytest

from llama.batch.engines import MAX_LOSSES, EngineLostError, Engines
from llama.batch.lines import Line

PATIENCE = 60


def line(custom_id) -> Line:
    return Line(f"batch_req_{custom_id}", str(custom_id))


class Engine:
    """One process: it ends with all that it has under way once a line of `poison` is among it."""

    def __init__(self, farm: "Farm") -> None:
        self.farm = farm
        self.running: set[str] = set()
        self.death = asyncio.get_running_loop().create_future()
        self.is_ended = False

    async def load(self) -> None:
        await asyncio.sleep(0)
        self.farm.loads += 1
        if self.farm.load_error is not None:
            raise self.farm.load_error

    async def answer(self, line: Line) -> dict:
        name = line.custom_id
        assert name not in self.farm.under_way and not self.is_ended
        self.farm.under_way.add(name)
        self.running.add(name)
        self.farm.most = max(self.farm.most, len(self.running))
        self.farm.asked.append(name)
        try:
            work = asyncio.ensure_future(asyncio.sleep(0.002))
            await asyncio.wait([work, self.death], return_when=asyncio.FIRST_COMPLETED)
            if name in self.farm.poison:
                self.die()
            if self.death.done():
                raise EngineLostError("gone")
        finally:
            self.farm.under_way.discard(name)
            self.running.discard(name)
        return line.answered(200, {})

    def die(self) -> None:
        if not self.death.done():
            self.farm.deaths.append(len(self.running))
            self.death.set_result(None)

    def end(self) -> None:
        self.is_ended = True


class Farm:
    def __init__(self, poison=(), load_error=None) -> None:
        self.poison, self.load_error = set(poison), load_error
        self.loads = self.most = 0
        self.under_way: set[str] = set()
        self.asked: list[str] = []
        self.deaths: list[int] = []
        self.engines: list[Engine] = []

    def start(self) -> Engine:
        self.engines.append(Engine(self))
        return self.engines[-1]


def answer_all(farm: Farm, names, count=2, room=64, also=None) -> dict:
    async def main():
        async with Engines(farm.start, count, room) as engines:
            tasks = [asyncio.ensure_future(engines(line(name))) for name in names]
            if also is not None:
                await also(farm)
            found = await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
        assert all(engine.is_ended for engine in farm.engines) and not farm.under_way
        return {each["custom_id"]: each for each in found}

    return asyncio.run(main())


def test_engines_share_the_lines_and_none_has_too_many():
    farm = Farm()
    found = answer_all(farm, range(300), count=3, room=16)
    assert len(found) == len(farm.asked) == 300 and farm.loads == 3
    assert farm.most == 16 and all(each["error"] is None for each in found.values())


def test_what_a_lost_engine_had_under_way_is_asked_again():
    async def kill(farm):
        while len(farm.asked) < 40:
            await asyncio.sleep(0)
        farm.engines[0].die()

    farm = Farm()
    found = answer_all(farm, range(200), also=kill)
    assert all(each["error"] is None for each in found.values()) and len(found) == 200
    assert len(farm.asked) == 200 + farm.deaths[0] and farm.loads == 3


@pytest.mark.parametrize("count", [1, 2])
def test_a_line_that_ends_every_process_fails_alone(count):
    farm = Farm(poison=["7", "77"])
    found = answer_all(farm, range(300), count=count, room=300)
    failed = {name: each["error"]["code"] for name, each in found.items() if each["error"]}
    assert failed == {"7": "engine_lost", "77": "engine_lost"} and len(found) == 300
    assert farm.asked.count("7") == farm.asked.count("77") == MAX_LOSSES
    assert len(farm.deaths) <= 2 * MAX_LOSSES and farm.deaths[-1] == 1  # the company shrinks until it is alone


def test_what_loading_raises_ends_the_run():
    with pytest.raises(ValueError, match="no such model"):
        answer_all(Farm(load_error=ValueError("no such model")), range(5))


def test_a_process_that_ends_while_it_loads_is_not_started_for_ever():
    farm = Farm(load_error=EngineLostError("killed for memory"))
    with pytest.raises(RuntimeError, match="3 processes ended while they loaded the model: killed for memory"):
        answer_all(farm, range(5), count=1)
    assert farm.loads == 3
