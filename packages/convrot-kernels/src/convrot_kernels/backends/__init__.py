"""Backends: modules with the functions of `reference`, `why_not(device)` and the two `preferred_*(device)`."""
