"""Task metrics, by hand and against slow references."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from armopt.accuracy import Checker, compare_callables, gates, tasks
from armopt.accuracy.tasks import Outputs, Sample
from armopt.accuracy.tasks.detection import box_iou, mask_iou
from armopt.errors import InputError


def measure(name: str, reference: Outputs, found: Outputs, inputs: Outputs | None = None) -> dict[str, float]:
    task = tasks.TASKS[name]()
    task.update(Sample(inputs or {}, reference, found, lambda given: reference, lambda given: found))
    return task.results()


IMAGE = {"x": torch.zeros(2, 3, 32, 32)}
TOKENS = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
BOXES = {"0.boxes": torch.zeros(0, 4), "0.labels": torch.zeros(0, dtype=torch.int64), "0.scores": torch.zeros(0)}


@pytest.mark.parametrize(
    ("inputs", "outputs", "task"),
    [
        (IMAGE, {"output": torch.zeros(2, 1000)}, "classification"),
        (IMAGE, {"logits": torch.zeros(2, 10), "aux": torch.zeros(2, 10)}, "classification"),
        (IMAGE, {"out": torch.zeros(2, 21, 32, 32), "aux": torch.zeros(2, 21, 32, 32)}, "segmentation"),
        (IMAGE, {"output": torch.zeros(2, 21, 8, 8)}, None),
        (IMAGE, BOXES, "detection"),
        (IMAGE, {"image_embeds": torch.zeros(2, 64)}, "embedding"),
        (TOKENS, {"logits": torch.zeros(1, 4, 100)}, "language"),
        (TOKENS, {"last_hidden_state": torch.zeros(1, 4, 64), "pooler_output": torch.zeros(1, 64)}, "embedding"),
        (TOKENS, {"logits": torch.zeros(1, 2)}, "classification"),
        ({}, {"output": torch.zeros(3)}, None),
        ({}, {"output": torch.zeros(4, 2, dtype=torch.int64)}, None),
    ],
)
def test_a_task_is_found(inputs: Outputs, outputs: Outputs, task: str | None) -> None:
    found, _ = tasks.task_for("", inputs, outputs)
    assert found is (None if task is None else tasks.TASKS[task])


def test_a_task_is_asked_for() -> None:
    outputs = {"output": torch.zeros(2, 64)}
    assert tasks.task_for("embedding", IMAGE, outputs)[0] is tasks.TASKS["embedding"]
    assert tasks.task_for("none", IMAGE, outputs)[0] is None
    with pytest.raises(InputError, match=r"unknown task 'clasification'.*classification"):
        tasks.task_for("clasification", IMAGE, outputs)
    with pytest.raises(InputError, match=r"don't fit segmentation: output \(2, 64\).*needs an output \[batch, classes"):
        tasks.task_for("segmentation", IMAGE, outputs)


def test_classification_by_hand() -> None:
    reference = torch.tensor([[0.0, 1, 2, 3, 4, 5, 10], [5, 4.9, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
    found = torch.tensor([[9.0, 8, 7, 6, 5, 4, 0], [4.9, 5, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
    figures = measure("classification", {"y": reference}, {"y": found})
    assert (figures["top1"], figures["top5"], figures["margin_flips"]) == (1 / 3, 2 / 3, 2.0)
    assert figures["flip_margin"] == pytest.approx(1.0)  # from the highest of all to the lowest


def test_segmentation_by_hand() -> None:
    wanted = torch.tensor([[[0, 0], [1, 1]]])
    won = torch.tensor([[[0, 1], [1, 1]]])
    one_hot = [torch.nn.functional.one_hot(side, 4).permute(0, 3, 1, 2).float() for side in (wanted, won)]
    figures = measure("segmentation", {"out": one_hot[0]}, {"out": one_hot[1]})
    assert figures == {
        "miou": pytest.approx((1 / 2 + 2 / 3) / 2),
        "mask_iou": pytest.approx(1 / 2),
        "pixel_agreement": pytest.approx(3 / 4),
    }


def test_language_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    reference, found = ({"logits": side.log().repeat(1, 4, 1)} for side in (p, q))
    ids = {"input_ids": torch.tensor([[0, 1, 1, 2]])}
    figures = measure("language", reference, found, ids)
    assert figures["next_token"] == 0.0
    assert figures["kl"] == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    # tokens 1, 1, 2 are twice, twice and once as likely: the perplexity falls by 4^(1/3)
    assert figures["perplexity_drift"] == pytest.approx(1 - 4 ** (-1 / 3))
    assert figures["greedy_tokens"] == 0.0


class Chain:
    """A causal model: the next token is one more than the last, but from `wrong_from` on, two more."""

    def __init__(self, wrong_from: int) -> None:
        self.wrong_from = wrong_from
        self.calls = 0

    def __call__(self, given: Outputs) -> Outputs:
        self.calls += 1
        ids = given["ids"]
        step = torch.where(torch.arange(ids.shape[1]) >= self.wrong_from, 2, 1)
        return {"logits": torch.nn.functional.one_hot((ids + step) % 100, 100).float() * 9}


@pytest.mark.parametrize(("wrong_from", "share"), [(99, 1.0), (7, 0.0), (10, 3 / 8), (14, 7 / 8), (15, 1.0)])
def test_where_greedy_generation_diverges(wrong_from: int, share: float) -> None:
    """Of 16 tokens 8 are given, so steps predict at positions 7 to 14. Compared with generating on both sides."""
    ids = torch.arange(16).reshape(1, 16)
    good, bad = Chain(99), Chain(wrong_from)
    task = tasks.TASKS["language"]()
    task.update(Sample({"ids": ids}, good({"ids": ids}), bad({"ids": ids}), good, bad))
    assert task.results()["greedy_tokens"] == pytest.approx(share)
    assert bad.calls == 2
    sequences = []
    for side in (good, bad):
        own = ids.clone()
        for step in range(8, 16):
            own[:, step] = side({"ids": own})["logits"][:, step - 1].argmax(-1)
        sequences.append(own[0, 8:])
    alike = (sequences[0] == sequences[1]).long().cumprod(0).sum()
    assert float(alike) / 8 == pytest.approx(share)


def test_the_original_generates_once_for_all_candidates() -> None:
    ids = torch.arange(16).reshape(1, 16)
    good = Chain(99)
    checker = Checker(good, None, (), "language", keep=True)
    for wrong_from in (10, 14):
        figures = checker.figures("static", [{"ids": ids}], Chain(wrong_from))
        assert figures.task["greedy_tokens"] == pytest.approx((wrong_from - 7) / 8)
    assert good.calls == 1 + 1 + 7  # the logits, whether it is causal, and a token each but for the first


def test_a_model_that_takes_fewer_tokens_than_it_gives_does_not_generate() -> None:
    ids = torch.arange(16).reshape(1, 16)
    good = Chain(99)

    def run(given: Outputs) -> Outputs:
        if int(given["ids"].max()) > 15:
            raise InputError("the model fails on these inputs")
        return good(given)

    task = tasks.TASKS["language"]()
    task.update(Sample({"ids": ids}, run({"ids": ids}), run({"ids": ids}), run, run))
    assert task.results()["next_token"] == 1.0
    assert "greedy_tokens" not in task.results()


def test_a_model_that_looks_ahead_does_not_generate() -> None:
    def run(given: Outputs) -> Outputs:
        mean = given["ids"].float().mean()
        return {"logits": torch.stack([mean, -mean]).repeat(1, 8, 100)}

    ids = {"ids": torch.arange(8).reshape(1, 8)}
    task = tasks.TASKS["language"]()
    task.update(Sample(ids, run(ids), run(ids), run, run))
    assert "greedy_tokens" not in task.results()


def test_embedding_by_hand() -> None:
    angles = torch.tensor([0.0, 0.1, 0.3, 1.0])
    reference = torch.stack([angles.cos(), angles.sin()], 1)
    other = torch.tensor([0.0, 0.1, -0.05, 1.0])  # the third moves to the other side of the first
    found = torch.stack([other.cos(), other.sin()], 1)
    figures = measure("embedding", {"y": reference}, {"y": found})
    assert figures["embedding_cosine"] == pytest.approx(math.cos(0.35), abs=1e-6)
    # the neighbours of 1: in FP32 2, 3, 4; now 3, 2, 4. Of 2: 1, 3, 4 both. Of 3: 2, 1, 4; now 1, 2, 4. Of 4: 3, 2, 1;
    # now 2, 1, 3
    assert figures["nearest"] == 1 / 4
    assert figures["ranking"] == pytest.approx((2 + 3 + 2 + 1) / 12)


def detections(
    boxes: list[list[float]], labels: list[int], scores: list[float], prefix: str = "0."
) -> dict[str, Tensor]:
    return {
        f"{prefix}boxes": torch.tensor(boxes).reshape(-1, 4),
        f"{prefix}labels": torch.tensor(labels, dtype=torch.int64),
        f"{prefix}scores": torch.tensor(scores),
    }


def test_detection_by_hand() -> None:
    reference = detections([[0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]], [1, 2, 3], [0.9, 0.8, 0.1])
    # in another order; the second has another class; one box is new
    found = detections(
        [[20, 20, 30, 30], [0, 0, 10, 5.5], [70, 70, 80, 80], [50, 50, 60, 60]], [1, 1, 5, 3], [0.8, 0.7, 0.6, 0.1]
    )
    figures = measure("detection", reference, found)
    assert figures == {
        "box_recall": 1 / 2,
        "box_precision": 1 / 3,
        "box_iou": pytest.approx(0.55),
        "score_drift": pytest.approx(0.2),
    }


def test_nothing_detected_on_both_sides_agrees() -> None:
    figures = measure("detection", BOXES, BOXES)
    assert (figures["box_recall"], figures["box_precision"]) == (1.0, 1.0)


def test_a_box_is_matched_once() -> None:
    reference = detections([[0, 0, 10, 10], [0, 0, 10, 9]], [1, 1], [0.9, 0.8])
    figures = measure("detection", reference, detections([[0, 0, 10, 10]], [1], [0.9]))
    assert (figures["box_recall"], figures["box_precision"]) == (0.5, 1.0)


def test_overlaps_against_a_slow_count() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 16, (2, 6, 2, 2), generator=generator)
    boxes = torch.cat([corners.amin(2), corners.amax(2)], -1)
    grids = []
    for side in boxes:
        cells = torch.zeros(6, 16, 16, dtype=torch.bool)
        for cell, (x0, y0, x1, y1) in zip(cells, side.tolist(), strict=True):
            cell[y0:y1, x0:x1] = True
        grids.append(cells)
    found = box_iou(boxes[0].float(), boxes[1].float())
    for i in range(6):
        for j in range(6):
            both, either = (grids[0][i] & grids[1][j]).sum(), (grids[0][i] | grids[1][j]).sum()
            assert float(found[i, j]) == pytest.approx(float(both) / max(1.0, float(either)))
    expected = [
        float((a & b).sum()) / max(1, int((a | b).sum())) if (a | b).any() else 1.0 for a, b in zip(*grids, strict=True)
    ]
    assert mask_iou(*grids).tolist() == pytest.approx(expected)


def test_detectors_that_find_another_number_of_boxes_are_compared() -> None:
    """What `validate` does with a model that is no single graph: lists of dictionaries, matched before metrics."""
    first = [{name.removeprefix("0."): value for name, value in detections([[0, 0, 8, 8]], [1], [0.9]).items()}]
    second = [
        {
            name.removeprefix("0."): value
            for name, value in detections([[30, 30, 40, 40], [0, 0, 8, 8.5]], [4, 1], [0.3, 0.8]).items()
        }
    ]
    outcome, _ = compare_callables(
        lambda images: first,
        lambda images: second,
        [([torch.zeros(3, 32, 32)],)],
        gates=[gates.parse("box_recall>=1"), gates.parse("score_drift<=0.05")],
    )
    assert outcome.task == "detection"
    assert [verdict.passed for verdict in outcome.verdicts] == [True, False]
    assert {entry.output: entry.max_abs for entry in outcome.entries} == {
        "0.boxes": 0.5,
        "0.labels": 0.0,
        "0.scores": pytest.approx(0.1),
    }
