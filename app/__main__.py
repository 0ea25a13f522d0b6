"""`python -m app check|model|wait`: what the Makefile runs around `serve run`."""

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m app", description="Tools around `serve run`.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="validate a Serve YAML file")
    check.add_argument("file", type=Path)
    model = commands.add_parser("model", help="build the tiny model in a new folder")
    model.add_argument("folder", type=Path)
    wait = commands.add_parser("wait", help="wait until the fleet answers, then say how to use it")
    wait.add_argument("target", help="its URL, or the YAML file that it is started from")
    options = parser.parse_args()

    # Each imports only what it needs: a wrong file is to be named at once.
    match options.command:
        case "check":
            from app import check as checker

            return checker.main(options.file)
        case "model":
            from app import tiny_model

            return tiny_model.main(options.folder)
        case _:
            from app import wait as waiter

            return waiter.main(options.target)


if __name__ == "__main__":
    sys.exit(main())
