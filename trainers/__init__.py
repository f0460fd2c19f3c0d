"""Entry points: `python -m trainers.train`, `python -m trainers.evaluate`."""
