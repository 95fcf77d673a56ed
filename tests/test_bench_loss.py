"""The comparison of the loss on a CPU: what it prints, and that its peaks are what they say. No times are asserted."""

import re

import pytest
import torch
from torch import Tensor

from bench import loss


def test_it_prints_a_row_for_each_side(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--rows", "600", "--channels", "16", "--vocab", "4096", "--rounds", "1", "--no-compile"]
    assert loss.main(small) == 0
    page = capsys.readouterr().out
    assert "600 rows x 16 channels x 4096 words" in page
    rows = dict(re.findall(r"^(\S+), eager .*?x plain +(\d+) MiB$", page, re.MULTILINE))
    assert rows.keys() == {"plain", "ours"}
    assert int(rows["ours"]) < int(rows["plain"])


def test_a_peak_is_what_is_held_beyond_the_gradients() -> None:
    x, weight = torch.ones(2, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True)

    def four_mebibytes(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
        room = torch.zeros(2**20)
        return x.sum() + weight.sum() + room[0]

    peak = loss.peak_bytes(four_mebibytes, (x, weight, torch.zeros(2)))
    assert abs(peak - 4 * 2**20) < 4096
