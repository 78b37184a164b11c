"""Two thousand inputs that were made to do harm, and a few runs of `optimize` that are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.fuzz import kills, mutations, run
from tests.fuzz.reader import Reader

#: Of all readers, in `make test`; `make fuzz N=100000` takes more.
COUNT = int(os.environ.get("ARMOPT_FUZZ", "2000"))


@pytest.mark.slow
@pytest.mark.parametrize("name", run.readers())
def test_every_input_is_read_or_refused(name: str) -> None:
    seed = int(os.environ.get("ARMOPT_FUZZ_SEED", "0"))
    shares = {each.name: each.share for each in run.readers().values()}
    _, findings = run.fuzz(COUNT * shares[name] // sum(shares.values()), seed, [name])
    assert not findings, f"again: python -m tests.fuzz.run --seed {seed} --reader '{name}' --only {findings[0].number}"


@pytest.mark.slow
def test_a_killed_run_leaves_the_old_or_the_new_bundle(tmp_path: Path) -> None:
    found = kills.kill(tmp_path, 4, seed=0)
    assert not [each for each in found if each.startswith("wrong")], found
    assert found.total() == 4


# --- the fuzzer itself: what it finds where there is something to find ---


def _seed(folder: Path) -> list[Path]:
    (folder / "seed").write_bytes(b"0123456789" * 4)
    return [folder / "seed"]


HARM = {
    "traceback": lambda path: 1 / 0,
    "crash": lambda path: os.kill(os.getpid(), signal.SIGSEGV),
    "hang": lambda path: time.sleep(60),
    "hang at work": lambda path: sum(1 for _ in iter(int, 1)),
    "allocation": lambda path: b"x" * (1 << 36),
    "touched": lambda path: subprocess.run(["true"], check=False),
    "read": lambda path: path.read_bytes(),
}
TOUCHES = {
    "a file outside": lambda path: open("/tmp/armopt-fuzz-canary", "a").close(),
    "a link to one": lambda path: (path.parent / "link").symlink_to("/etc/passwd") or (path.parent / "link").open("a"),
    "a folder outside": lambda path: os.mkdir("/tmp/armopt-fuzz-canary"),
    "a secret": lambda path: open("/root/.bash_history").close(),
    "a shell": lambda path: os.system("true"),
    "beside its folder": lambda path: (path.parents[2] / "more").write_text("x"),
}


def outcomes(read: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(run, "SECONDS", 1.0)
    monkeypatch.setattr(run, "WAITING", 2.0)
    job = run.Job(Reader("harm", _seed, read, None), _seed(tmp_path), 0)  # type: ignore[arg-type]
    return [what for _, what, _ in run.run(job, range(2))]


@pytest.mark.parametrize("expected", HARM)
def test_it_tells_what_became_of_an_input(expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcomes(HARM[expected], tmp_path, monkeypatch) == [expected.split()[0]] * 2


@pytest.mark.parametrize("name", TOUCHES)
def test_it_notices_what_is_touched(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "touched" in outcomes(TOUCHES[name], tmp_path, monkeypatch)


def test_an_input_is_made_of_its_number_alone(tmp_path: Path) -> None:
    job = run.Job(Reader("none", _seed, Path.read_bytes, None), _seed(tmp_path), 3)
    made = []
    for i, number in enumerate((5, 2, 5)):
        (tmp_path / str(i)).mkdir()
        made.append(job.make(number, tmp_path / str(i)).read_bytes())
    assert made[0] == made[2] != made[1]


def test_changes_of_json_reach_every_place() -> None:
    content = {"a": [1, 2.5, {"b": None}], "c": "x", "d": True}
    seen = set()
    for i in range(300):
        changed = {"a": [1, 2.5, {"b": None}], "c": "x", "d": True}
        mutations.change_json(random.Random(i), changed)
        seen |= {key for key in content if mutations.as_json(changed.get(key)) != mutations.as_json(content[key])}
    assert seen == {"a", "c", "d"}


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "security.md"
    page.write_text(f"before\n{run.BEGIN}\nold\n{run.END}\nafter\n")
    monkeypatch.setattr(run, "PAGE", page)
    text = run.as_table({"one": run.Counter(read=2, crash=1)}, 7)
    run.write(text)
    assert "| one | 3 | 2 | 0 | 0 | 1 | 0 | 0 | 0 |" in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
