"""The benchmark suite: `convrot-bench ops | quality | report`, one JSON Lines format, tables made from it."""
