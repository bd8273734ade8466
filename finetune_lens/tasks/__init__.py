"""The synthetic tasks: exact oracles for what a tiny model is trained to do."""
