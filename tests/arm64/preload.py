"""What an emulated process imports once, before it forks one for each job: torch, then what most jobs use of armopt."""

import torch  # noqa: F401
from numpy import random  # noqa: F401

import armopt.deploy.doctor
import armopt.runtime.load
import armopt.runtime.onednn_log  # noqa: F401
