"""The benchmark suite: `convrot-bench ops | model | quality | report`, one JSON Lines format, tables made from it."""
