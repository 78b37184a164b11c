"""What an emulated process imports once, before it forks one for each job: torch, then what most jobs use of armopt."""

import torch
import torch.fx.experimental.symbolic_shapes  # noqa: F401  what runs without data work with
from numpy import random  # noqa: F401

import armopt.deploy.doctor
import armopt.runtime.load
import armopt.runtime.onednn_log  # noqa: F401
