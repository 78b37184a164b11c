#!/usr/bin/env bash
# The model of PyTorch's Graviton tutorial, from torch.export's file to a bundle, with the command line alone.
#
#   bash examples/tutorial_mlp_cli.sh [FOLDER]      (250 MB; by default a new temporary folder)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# `make demo` installs into .venv: take armopt from there unless one is active already.
command -v armopt >/dev/null || PATH=$here/../.venv/bin:$PATH
work=${1:-$(mktemp -d)}
mkdir -p "$work"
cd "$work"

echo "== 1. Export the model. Only this step needs its source."
python - "$here" <<'PYTHON'
import sys

sys.path.insert(0, sys.argv[1])

import torch
from tutorial_mlp import TutorialMLP

torch.manual_seed(0)
batch = torch.export.Dim("batch", min=1)  # any batch size
example = (torch.rand(256, 64, 64),)
torch.export.save(torch.export.export(TutorialMLP().eval(), example, dynamic_shapes=({0: batch},)), "mlp.pt2")
PYTHON
ls -sh mlp.pt2

echo
echo "== 2. Optimize it for Graviton3, for requests of 32 and of 256: the best kernels are not the same."
armopt optimize mlp.pt2 --target graviton3 --batch 32,256 -o mlp.armopt --force

echo
echo "== 3. Which kernel did each layer get, and why?"
armopt inspect mlp.armopt

echo
echo "== 4. Is it still the same model? The original file in FP32 against the bundle."
armopt validate mlp.armopt --against mlp.pt2 --min-cosine 0.999

cat <<NEXT

== Next
Copy $work/mlp.armopt to a Graviton3 server (c7g, m7g, r7g) and there:
  pip install -r mlp.armopt/requirements.txt
  armopt run mlp.armopt -- python serve.py      # sets what oneDNN reads when torch is imported
with, in serve.py:
  model = armopt.load("mlp.armopt")
  model(torch.rand(32, 64, 64))
NEXT
