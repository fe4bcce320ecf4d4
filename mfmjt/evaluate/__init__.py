"""How good generated sound is: examples with a known truth, metrics, judges and reports."""
