"""Exact counts of retired instructions on an emulated Arm core. Start with counts.py; models.py counts whole models."""
