"""`python -m trainers.evaluate`: the entry point; what it does is in `trainers.evaluating`."""

from __future__ import annotations

import sys

from trainers.preemption import early


def main() -> None:
    """Console entry point."""
    with early():
        # Here, since these imports take seconds in which a signal may come.
        from trainers.progress import announce

        announce()
        from trainers import evaluating

        sys.exit(evaluating.run())


if __name__ == "__main__":
    main()
