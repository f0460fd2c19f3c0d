"""Tamiyo, the controller: its encoder, heads and action distribution, the actor, and the baseline controllers."""
