"""Runs a bundle in a PyTorch that lacks what armopt uses of its private functions; test_guards.py starts it."""

import sys

import torch
import torch._C._dynamo.guards
import torch.nn.functional
import torch.overrides
import torch.utils._device

del torch._C._dynamo.guards.TensorGuards
for name in ("_len_torch_function_stack", "_is_any_autocast_enabled", "_VariableFunctions"):
    delattr(torch._C, name)

import armopt  # noqa: E402
from armopt.runtime import guards  # noqa: E402

model = armopt.load(sys.argv[1])
x, y = torch.randn(2, 3), torch.randn(2, 3)
expected = torch.relu(x) + y
calls = [model(x, y)]
with torch.autocast("cpu"):
    calls.append(model(x, y))
with torch.device("meta"):
    calls.append(model(x, y))
torch.set_default_dtype(torch.float64)
calls.append(model(x, y))
assert all(torch.equal(found, expected) for found in calls)
assert guards.of([("x", (2, 3), torch.float32)]) is guards.of([("y", (2, 3), torch.float32)])
print(f"{len(calls)} calls, none looked at in one call of C")
