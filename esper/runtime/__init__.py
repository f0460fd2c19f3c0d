"""Seeding, checkpoints and telemetry. Nothing here knows about graphs, growth or PPO."""
