"""What an edit does along lambda, drawn and as a table."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from fasttrace_edit_pages import evaluation, fill, page_of, path_of, text_of

from fasttrace.report.judged import judge
from fasttrace.report.lambda_path import path_chart


def test_a_path_is_drawn_in_order_over_log_lambda():
    chart = path_chart([(p.lam, p.figures) for p in path_of()], 0.01)
    assert chart is not None
    assert chart.lams == [1e-4, 0.01, 10.0]
    [ua] = chart.series
    assert ua.name == "UA"
    assert [p.figure.value for p in ua.points] == [100, 50, 0]
    a, b, c = (p.x for p in ua.points)
    assert (b - a) / (c - b) == pytest.approx(2 / 3)  # two decades, then three
    assert chart.chosen == b
    assert [p.y for p in ua.points] == pytest.approx(
        [chart.top, (chart.top + chart.bottom) / 2, chart.bottom]
    )
    assert [text for _, text in chart.ys] == ["0 %", "25 %", "50 %", "75 %", "100 %"]


def test_a_path_without_classifiers_draws_score_changes():
    chart = path_chart([(p.lam, p.figures) for p in path_of(classes=False)])
    assert chart is not None
    assert not chart.shares
    assert [s.name for s in chart.series] == ["phrase", "target"]
    assert [p.figure.value for p in chart.series[0].points] == [-6, -3, 0]
    ends = [float(text) for _, text in chart.ys]
    assert ends[0] <= -6
    assert ends[-1] >= 3
    assert chart.chosen is None


def test_lambda_zero_and_a_single_lambda_have_a_place():
    figures = path_of()[0].figures
    chart = path_chart([(0.0, figures), (0.1, figures), (1.0, figures)])
    assert chart is not None
    xs = [x for x, _ in chart.xs]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1])
    assert path_chart([(0.0, figures)]) is not None
    assert path_chart([]) is None


def test_names_at_the_lines_ends_do_not_overlap():
    [one] = judge(evaluation())
    chart = path_chart([(0.1, one), (1.0, replace(one, ua=one.ira, cra=one.ira))])
    assert chart is not None
    places = sorted(s.label_y for s in chart.series)
    assert len(places) == 3
    assert all(b - a >= 14 for a, b in pairwise(places))


def test_the_page_draws_the_path_and_gives_it_as_a_table(tmp_path: Path):
    page = page_of(fill(tmp_path, evaluation()), path=path_of())
    assert page.count("<polyline") == 1
    assert 'aria-label="UA, IRA and CRA by lambda' in page
    assert "lambda UA 0.0001 100 % [100, 100] % 0.01 50 % [17, 83] % 10 0 % [0, 0] %" in text_of(
        page
    )
