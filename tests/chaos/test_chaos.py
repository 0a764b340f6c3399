"""Every attack in a shortened form, on one server: it must look afterwards as before (`make chaos`)."""

import random

import pytest

from tests.chaos.attacks import ATTACKS
from tests.chaos.victim import Victim

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    victim = Victim(tmp_path_factory.mktemp("chaos"))
    yield victim
    victim.close()


@pytest.mark.parametrize("name", ATTACKS)
def test_one_mistake_hurts_one_caller(victim, name, capsys):
    attack, size, _ = ATTACKS[name]
    told = attack(victim, size, random.Random(name))
    state = victim.check()
    with capsys.disabled():
        print(f"\n{name}: {told}; then {state}")
