"""`python -m load_tests.idle`: CPU of each process of a fleet that has nothing to do."""

import argparse
import sys
import time
from pathlib import Path

from load_tests.cpu import CpuMeter, Share
from load_tests.servers import PROJECT, ServerFailed, fleet, heed_signals

LIMIT = 3.0
"""Percent of one core."""

SETTLE_S = 10.0
"""Serve and Ray still start things just after the first answer."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m load_tests.idle", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--limit", type=float, default=LIMIT, help="percent of a core")
    parser.add_argument("--config", type=Path, default=PROJECT / "serve_configs/llama.yaml")
    parser.add_argument("--pid", type=int, help="look at this running `serve run` instead")
    options = parser.parse_args()
    heed_signals()
    if options.pid is not None:
        shares = watch(options.pid, options.seconds)
    else:
        print(f"==> starting the fleet of {options.config}", flush=True)
        try:
            with fleet(options.config, {}, {}, PROJECT / "results/idle-fleet.log") as server:
                print(f"==> letting it settle for {SETTLE_S:.0f} s", flush=True)
                time.sleep(SETTLE_S)
                shares = watch(server.pid, options.seconds)
        except ServerFailed as error:
            print(error, file=sys.stderr)
            return 1
    return report(shares, options.limit)


def watch(pid: int, seconds: float) -> list[Share]:
    """The processes under `pid` over so many seconds."""
    print(f"==> watching for {seconds:.0f} s", flush=True)
    meter = CpuMeter(pid)
    time.sleep(seconds)
    return meter.shares()


def report(shares: list[Share], limit: float) -> int:
    """Prints all of them. The exit code is 0 where none is over the limit."""
    for share in shares:
        mark = "  <-- over the limit" if share.percent > limit else ""
        print(f"{share.percent:6.1f} %  {share.pid:>8}  {share.name}{mark}")
    print(f"{sum(share.percent for share in shares):6.1f} %  together")
    return int(any(share.percent > limit for share in shares))


if __name__ == "__main__":
    sys.exit(main())
