"""A zoo of single-file reinforcement-learning agents; see README.md."""
