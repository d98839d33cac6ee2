"""Margins by text: what each form makes, and one line for each that makes nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

from expface_kernels import ArcFace, CombinedMargin, CosFace, ExpFace, NormFace, SphereFace
from expface_kernels.margin_spec import MARGINS, margin_argument, parse_margin
from expface_kernels.margins import Margin

OWN = """
import torch

class Halved:
    def __call__(self, theta):
        return torch.cos(theta) / 2

class Inner:
    class Nested(Halved):
        pass

def plain(theta):
    return torch.cos(theta)

class Needs:
    def __init__(self, m):
        self.m = m

number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_margins_of_a_user.py").write_text(OWN)
    (tmp_path / "broken_margins_of_a_user.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("own_margins_of_a_user", "broken_margins_of_a_user"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "own_margins_of_a_user"


@pytest.mark.parametrize(
    ("text", "margin"),
    [
        ("expface", ExpFace()),
        ("ExpFace:0.5", ExpFace(0.5)),
        ("arcface:0.4", ArcFace(0.4)),
        (" arcface:m = 0.3 , boundary = monotonic ", ArcFace(0.3, boundary="monotonic")),
        ("arcface:0.3,easy", ArcFace(0.3, boundary="easy")),
        ("arcface:boundary=easy", ArcFace(boundary="easy")),
        ("cosface:.2", CosFace(0.2)),
        ("sphereface:4", SphereFace(4.0)),
        ("combined:1.1,0.3,0.2", CombinedMargin(1.1, 0.3, 0.2)),
        ("combined:m3=0.2", CombinedMargin(m3=0.2)),
        ("combined:1.1,m3=0.2", CombinedMargin(1.1, m3=0.2)),
        ("normface", NormFace()),
        ("expface_kernels.margins:CosFace", CosFace()),
    ],
)
def test_a_text_makes_the_margin_that_it_names(text: str, margin: Margin) -> None:
    assert repr(parse_margin(text)) == repr(margin)


def test_every_margin_of_the_package_has_a_name() -> None:
    assert set(MARGINS.values()) == set(Margin.__subclasses__())


def test_margins_of_a_users_module(own: str) -> None:
    theta = torch.linspace(0.1, 3, 5, dtype=torch.float64)
    for name, factor in (("Halved", 0.5), ("Inner.Nested", 0.5), ("plain", 1.0)):
        assert torch.equal(parse_margin(f"{own}:{name}")(theta), factor * torch.cos(theta))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nothing", "nothing"),
        ("", "expface, arcface"),
        ("arcface:28.6", "radians"),
        ("arcface:0.5,none,3", "2 parameters"),
        ("arcface:k=1", r"\(m, boundary\)"),
        ("arcface:0.5,m=0.4", "'m' twice"),
        ("arcface:m=x", "m must be a float"),
        ("arcface:boundary=hard", "boundary"),
        ("expface:nan", "finite"),
        ("normface:1", r"\(none\)"),
        ("math:pi", "callable"),
        ("math:nothing", "nothing"),
        ("no_such_module_anywhere:X", "no_such_module_anywhere"),
        (":X", ":X"),
        ("own_margins_of_a_user:Needs", "Needs"),
        ("own_margins_of_a_user:number", "int"),
        ("broken_margins_of_a_user:X", "ZeroDivisionError"),
    ],
)
def test_a_text_that_makes_none_says_why_in_one_line(text: str, named: str, own: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        parse_margin(text)
    message = str(caught.value)
    assert message.startswith("margin: ")
    assert "\n" not in message
    with pytest.raises(argparse.ArgumentTypeError, match=named):
        margin_argument(text)
