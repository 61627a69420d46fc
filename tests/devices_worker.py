"""Runs jobs one after another in one process of several; `devices.py` starts it by torchrun."""

import json
import sys
from pathlib import Path

from lab import compose_raw

from neo.train import train


def main() -> None:
    for overrides in json.loads(Path(sys.argv[1]).read_text()):
        train(compose_raw(*overrides))


if __name__ == "__main__":
    main()
