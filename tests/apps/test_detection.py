"""The functions of docs/tutorials/detection.md, taken from the page, which test_docs.py runs."""

from __future__ import annotations

import ast
import itertools
import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from test_docs import blocks

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "detection.md"


def definitions() -> SimpleNamespace:
    """The names that the page defines. Its loops and calls, which train and draw, are left out."""
    scope = {"__name__": "detection"}
    for block in blocks(PAGE):
        if block.language == "python":
            tree = ast.parse("\n" * block.line + block.text)
            tree.body = [one for one in tree.body if not isinstance(one, ast.For | ast.Expr)]
            exec(compile(tree, str(PAGE), "exec"), scope)
    return SimpleNamespace(**scope)


page = definitions()


# -- boxes and scenes ----------------------------------------------------------------------------

SIDE = 12
spans = st.tuples(st.integers(0, SIDE - 1), st.integers(1, SIDE)).map(
    lambda span: (span[0], min(span[0] + span[1], SIDE))
)
box_lists = st.lists(
    st.tuples(spans, spans).map(lambda pair: (pair[0][0], pair[1][0], pair[0][1], pair[1][1])),
    max_size=4,
)


def tensor_of(boxes):
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def pixels(box):
    left, top, right, bottom = box
    return set(itertools.product(range(left, right), range(top, bottom)))


def counted_iou(one, other) -> Fraction:
    return Fraction(len(pixels(one) & pixels(other)), len(pixels(one) | pixels(other)))


@given(box_lists, box_lists)
def test_iou_is_that_of_counted_pixels(some, others):
    found = page.iou(tensor_of(some), tensor_of(others))
    assert found.shape == (len(some), len(others))
    for row, one in zip(found.tolist(), some, strict=True):
        assert row == pytest.approx([float(counted_iou(one, other)) for other in others])


def test_boxes_without_an_area_overlap_nothing():
    wrong = tensor_of([(5, 5, 5, 9), (9, 9, 1, 1), (20, 20, 30, 30)])
    assert page.iou(wrong, tensor_of([(0, 0, 10, 10)])).tolist() == [[0], [0], [0]]


def test_boxes_enclose_the_ink():
    """Digits of strong ink, in comparison with which there is no noise."""
    images = torch.zeros(3, 8, 8)
    images[0] = images[1, 2:6, 3:5] = images[2, 1:3] = 1000.0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        image, boxes, classes = page.scene(images, torch.tensor([4, 7, 9]), generator)
        assert image.shape == (1, 64, 64)
        assert 1 <= len(boxes) == len(classes) <= 5
        overlap = page.iou(boxes, boxes) - torch.eye(len(boxes))
        assert overlap.max() <= 0.05
        inked = image[0] > 10  # a weaker pixel may be at a border, where ink ends
        outside = inked.clone()
        for (left, top, right, bottom), digit in zip(boxes.int().tolist(), classes, strict=True):
            outside[top:bottom, left:right] = False
            assert inked[top:bottom, left:right].any(0).float().mean() > 0.9
            assert inked[top:bottom, left:right].any(1).float().mean() > 0.9
            shape = {4: 1, 7: 0.5, 9: 4}[int(digit)]  # about: ink is spread by at most a pixel
            assert shape / 2 < (right - left) / (bottom - top) < shape * 2
        assert not outside.any()


def test_scenes_are_repeatable():
    one, same, other = page.scenes(2, 3), page.scenes(2, 3), page.scenes(2, 3, test=True)
    for first, second, third in zip(one, same, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
        assert not torch.equal(first[0], third[0])


# -- what the detector learns --------------------------------------------------------------------


def slow_targets(boxes, classes, height, width):
    """The same, position by position, in float64."""
    heat = torch.zeros(10, height, width, dtype=torch.float64)
    distances = torch.zeros(4, height, width, dtype=torch.float64)
    weight = torch.zeros(height, width, dtype=torch.float64)
    for row, column in itertools.product(range(height), range(width)):
        x, y = 4 * column + 2, 4 * row + 2
        for (left, top, right, bottom), digit in zip(boxes, classes, strict=True):
            middle_x = 4 * int((left + right) / 2 // 4) + 2
            middle_y = 4 * int((top + bottom) / 2 // 4) + 2
            away = ((x - middle_x) / (right - left)) ** 2 + ((y - middle_y) / (bottom - top)) ** 2
            near = math.exp(-32 * away)
            heat[digit, row, column] = max(heat[digit, row, column], near)
            if near > weight[row, column]:
                weight[row, column] = near
                sides = [x - left, y - top, right - x, bottom - y]
                distances[:, row, column] = torch.tensor(sides) / 4
    return heat, distances, weight


def some_scenes(count):
    return [page.scene(page.digits.test, page.digits.test_labels, g) for g in seeded(count)]


def seeded(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_targets_position_by_position():
    for _, boxes, classes in some_scenes(2):
        fast = page.targets(boxes, classes, 16, 16)
        slow = slow_targets(boxes.tolist(), classes.tolist(), 16, 16)
        for got, wanted in zip(fast, slow, strict=True):
            near = slow[2] > 1e-12  # far away the weight is 0, and the distances do not matter
            torch.testing.assert_close(got.double() * near, wanted * near, rtol=1e-5, atol=1e-6)


def slow_loss(logits, distances, batch):
    found, centres, error, weights = 0.0, 0, 0.0, 0.0
    for i, (_, boxes, classes) in enumerate(batch):
        heat, wanted, weight = slow_targets(boxes.tolist(), classes.tolist(), 16, 16)
        for at in itertools.product(range(10), range(16), range(16)):
            p, y = logits[(i, *at)].sigmoid(), float(heat[at])
            if y == 1:
                centres += 1
                found = found - (1 - p) ** 2 * p.log()
            else:
                found = found - (1 - y) ** 4 * p**2 * (1 - p).log()
        error = error + (weight * (distances[i] - wanted).abs().sum(0) / 4).sum()
        weights = weights + weight.sum()
    return found / centres + error / weights


def test_the_loss_and_its_gradients_position_by_position():
    torch.manual_seed(3)
    batch = some_scenes(1)
    inputs = [torch.randn(1, n, 16, 16, dtype=torch.float64, requires_grad=True) for n in (10, 4)]
    losses = [loss(*inputs, batch) for loss in (page.loss_of, slow_loss)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    fast, slow = (torch.autograd.grad(loss, inputs) for loss in losses)
    for got, wanted in zip(fast, slow, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


def test_what_is_learned_gives_the_boxes_back():
    batch = some_scenes(8)
    heat, distances, _ = (
        torch.stack(part)
        for part in zip(*(page.targets(b, c, 16, 16) for _, b, c in batch), strict=True)
    )
    found = page.decode(torch.logit(heat.clamp(1e-6, 1 - 1e-6)), distances)
    torch.testing.assert_close(page.mean_average_precision(found, batch), torch.ones(10))
    for (boxes, classes, scores), (_, true, labels) in zip(found, batch, strict=True):
        many = len(true)
        assert scores[:many].min() > 0.99
        assert scores[many:].max() < 0.99
        by_place = [
            sorted(zip(b.round().tolist(), c.tolist(), strict=True))
            for b, c in ((boxes[:many], classes[:many]), (true, labels))
        ]
        assert by_place[0] == by_place[1]


@pytest.mark.parametrize("name", ["resnet26", "acmix_resnet26", "swin_tiny", "acmix_swin_tiny"])
def test_every_parameter_learns(name):
    torch.manual_seed(1)
    batch = page.scenes(2, 0)
    model = page.small(name, 0)
    page.loss_of(*model(torch.stack([image for image, *_ in batch])), batch).backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.isfinite().all(), parameter


# -- mean average precision ----------------------------------------------------------------------

HERE, THERE, FAR = (0, 0, 10, 10), (20, 20, 30, 30), (40, 40, 50, 50)


def measured(found, true):
    """The mAP of scenes with (box, class, score) found and (box, class) true."""
    found = [
        (
            tensor_of([box for box, *_ in one]),
            torch.tensor([k for _, k, _ in one], dtype=torch.int64),
            torch.tensor([score for *_, score in one]),
        )
        for one in found
    ]
    true = [
        (
            None,
            tensor_of([box for box, _ in one]),
            torch.tensor([k for _, k in one], dtype=torch.int64),
        )
        for one in true
    ]
    return page.mean_average_precision(found, true)


@pytest.mark.parametrize(
    ("found", "true", "wanted"),
    [
        # all, and nothing
        ([[(HERE, 3, 0.9), (THERE, 4, 0.1)]], [[(HERE, 3), (THERE, 4)]], 1),
        ([[]], [[(HERE, 3)]], 0),
        # one of two: a precision of 1 at the recalls 0, 0.01, …, 0.5
        ([[(HERE, 3, 0.9)]], [[(HERE, 3), (THERE, 3)]], 51 / 101),
        # a wrong place with a higher score halves the precision; with a lower one it does nothing
        ([[(FAR, 3, 0.9), (HERE, 3, 0.8)]], [[(HERE, 3)]], 1 / 2),
        ([[(FAR, 3, 0.7), (HERE, 3, 0.8)]], [[(HERE, 3)]], 1),
        # a second detection of the same box is wrong: precision 1 up to a recall of 0.5, then 2/3
        (
            [[(HERE, 3, 0.9), (HERE, 3, 0.8), (THERE, 3, 0.7)]],
            [[(HERE, 3), (THERE, 3)]],
            (51 + 50 * 2 / 3) / 101,
        ),
        # the better precision at a higher recall counts for lower ones, too
        (
            [[(FAR, 3, 0.9), (HERE, 3, 0.8), (THERE, 3, 0.7)]],
            [[(HERE, 3), (THERE, 3)]],
            2 / 3,
        ),
        # the right place and another class: both classes of true boxes have their own AP
        ([[(HERE, 5, 0.9)]], [[(HERE, 3)]], 0),
        ([[(THERE, 3, 0.9), (HERE, 3, 0.8)]], [[(HERE, 3), (THERE, 4)]], 1 / 4),
        # the scores of all scenes are sorted together, and boxes belong to their scene
        ([[(FAR, 3, 0.9)], [(HERE, 3, 0.8)]], [[], [(HERE, 3)]], 1 / 2),
        ([[(HERE, 3, 0.9)], []], [[], [(HERE, 3)]], 0),
    ],
)
def test_precision_computed_by_hand(found, true, wanted):
    torch.testing.assert_close(measured(found, true), torch.full((10,), float(wanted)))


def test_each_threshold_counts_alone():
    """An IoU of 0.6 is enough for three thresholds of ten."""
    found = measured([[((0, 0, 10, 6), 3, 0.9)]], [[(HERE, 3)]])
    assert found.tolist() == [1] * 3 + [0] * 7


def slow_map(found, true, threshold: Fraction) -> float:
    """mAP at one threshold, from the definition, in exact fractions."""
    aps = []
    for k in sorted({digit for one in true for _, digit in one}):
        count = sum(digit == k for one in true for _, digit in one)
        every = [(i, *one) for i, each in enumerate(found) for one in each if one[1] == k]
        every.sort(key=lambda one: -one[3])
        taken, right, points = set(), 0, []
        for tried, (i, box, _, _) in enumerate(every, 1):
            best, at = Fraction(0), None
            for j, (other, digit) in enumerate(true[i]):
                if digit == k and (i, j) not in taken and counted_iou(box, other) > best:
                    best, at = counted_iou(box, other), j
            if best >= threshold:
                taken.add((i, at))
                right += 1
            points.append((Fraction(right, count), Fraction(right, tried)))
        at_recall = [
            max((p for recall, p in points if recall >= Fraction(r, 100)), default=Fraction(0))
            for r in range(101)
        ]
        aps.append(sum(at_recall) / 101)
    return float(sum(aps) / len(aps))


true_lists = box_lists.flatmap(
    lambda boxes: st.tuples(*[st.tuples(st.just(box), st.integers(0, 1)) for box in boxes])
)


@st.composite
def scenes_with_detections(draw):
    """True boxes, and detections of which many lie near one of them."""
    true = [draw(true_lists) for _ in range(3)]
    found = []
    for one in true:
        each = []
        for _ in range(draw(st.integers(0, 5))):
            boxes = [box for box, _ in one] + draw(box_lists) + [(0, 0, SIDE, SIDE)]
            left, top, right, bottom = draw(st.sampled_from(boxes))
            longer = draw(st.integers(0, 2))
            score = draw(st.integers(1, 4)) / 4  # with equal ones
            each.append(((left, top, right + longer, bottom), draw(st.integers(0, 1)), score))
        found.append(each)
    return found, true


@given(scenes_with_detections())
def test_mean_average_precision_from_its_definition(drawn):
    found, true = drawn
    if any(true):
        wanted = [slow_map(found, true, Fraction(t, 100)) for t in range(50, 100, 5)]
        assert measured(found, true).tolist() == pytest.approx(wanted, abs=1e-6)


# -- the picture ---------------------------------------------------------------------------------


def test_a_picture_with_right_and_wrong_boxes(tmp_path):
    batch = page.scenes(2, 0)
    boxes = [(b, c, torch.full((len(b),), 0.5)) for _, b, c in batch]
    wrong = [(b + 20, c, s) for b, c, s in boxes]
    page.draw(str(tmp_path / "boxes.png"), batch, {"right": boxes, "wrong": wrong})
    assert (tmp_path / "boxes.png").read_bytes().startswith(b"\x89PNG")
