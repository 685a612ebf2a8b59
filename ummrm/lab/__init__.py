"""The reward-hacking laboratory."""
