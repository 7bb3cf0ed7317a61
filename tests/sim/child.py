"""`python -m tests.sim.child MODE [MUTANT]`: seeds on standard input, results as JSON on standard output."""

from __future__ import annotations

import json
import sys

from tests.sim import mutants
from tests.sim.faults import families
from tests.sim.world import make_plan, run


def main() -> None:
    """Until the input ends."""
    sys.setrecursionlimit(10_000)
    dense, mutant = sys.argv[1] == "dense", "".join(sys.argv[2:])
    with mutants.planted(mutant):
        for line in sys.stdin:
            plan = make_plan(int(line), dense=dense)
            result = run(plan)
            answer = {
                "seed": result.seed,
                "digest": result.digest,
                "violations": [(one.invariant, one.detail, one.at_s) for one in result.violations],
                "counts": dict(result.counts),
                "virtual_s": result.virtual_s,
                "faults": families(plan.faults),
            }
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
