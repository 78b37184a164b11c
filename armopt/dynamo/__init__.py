"""torch.compile's backend, and ``armopt.compile``: programs made while a model runs."""
