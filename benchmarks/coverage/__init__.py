"""Optimizes every model that armopt is measured on, one process each, and writes docs/coverage.md.

The lists are in torchvision.py, timm.py and huggingface.py; measure.py has what is done with a model, processes.py how
each gets a process of its own, and page.py what becomes of the results.
"""
