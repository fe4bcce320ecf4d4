"""One file per op: the cases on which it is timed, what they cost, and the peers beside it."""
