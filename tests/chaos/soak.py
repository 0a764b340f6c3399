"""All attacks in turn, in small doses, for as long as one likes: `make soak MINUTES=20`."""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.attacks import ATTACKS
from tests.chaos.victim import Victim


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        victim = Victim(Path(folder))
        ends, rounds = time.monotonic() + 60 * options.minutes, 0
        try:
            while time.monotonic() < ends:
                name = chance.choice(sorted(ATTACKS))
                attack, _, size = ATTACKS[name]
                told = attack(victim, size, chance)
                rounds += 1
                print(f"{name}: {told}; then {victim.check()}", flush=True)
        except BaseException:
            print(victim.said(), file=sys.stderr)
            raise
        finally:
            victim.close()
    print(f"{rounds} rounds in {options.minutes:g} minutes without a fault")
    return 0


if __name__ == "__main__":
    sys.exit(main())
