"""Real host networks, one at a time: their populations are not batched."""
