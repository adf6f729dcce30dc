"""``python -m pretrain [CONFIG] [key=value ...]``, also under ``torchrun -m`` and ``accelerate launch -m``."""

import sys

from vitssl.report import program


def main(argv: list[str]) -> int:
    """torch is imported only once there is something to run."""
    from pretrain.config import read

    config, command = read(argv)
    if config is None:
        return 0
    from pretrain.run import run

    return run(config, command)


if __name__ == "__main__":
    sys.exit(program(main, sys.argv[1:]))
