"""The report: differences, conclusions, tables."""

import re

import numpy as np
import pytest
from comparing import data, results, run_jobs_here, settings, whole

from gtsa.comparison import compare, conclusions, report, report_page
from gtsa.comparison.row_metrics import RowMetrics
from gtsa.evaluation import intervals
from gtsa.evaluation.intervals import Bootstrap

__all__ = ["data", "whole"]  # fixtures


def test_every_row_is_compared_with_every_other(whole):
    content = results(whole)
    mean = {line["row"]: line["metrics"]["primary"]["mean"] for line in content["rows"] if line["metrics"]}
    differences = {(d["row"], d["less_row"]): d for d in content["differences"]}
    assert set(differences) == {(one, other) for one in mean for other in mean if one != other}
    for (one, other), d in differences.items():
        assert d["mean"] == pytest.approx(mean[one] - mean[other])
        assert (d["low"], d["high"]) == pytest.approx(
            (-differences[other, one]["high"], -differences[other, one]["low"])
        )
    reference = {
        line["row"]: line["less_reference"]["primary"] for line in content["rows"] if line.get("less_reference")
    }
    assert reference and all(differences[row, "gtsa"]["low"] == pytest.approx(d["low"]) for row, d in reference.items())


def test_every_row_is_compared_with_the_untrained_network(whole):
    rows = {line["row"]: line for line in results(whole)["rows"]}
    assert "less_untrained" not in rows["untrained"]
    for row in ("gtsa", "dino", "colour"):
        differences = rows[row]["less_untrained"]
        assert differences.keys() == rows[row]["metrics"].keys()
        for name, value in differences.items():
            mean, untrained = (rows[r]["metrics"][name]["mean"] for r in (row, "untrained"))
            assert value["mean"] == pytest.approx(mean - untrained)
    assert rows["untrained"]["less_reference"].keys() == rows["gtsa"]["less_untrained"].keys()


def test_differences_are_paired_by_seed():
    draws = np.random.default_rng(0).normal(size=(5, 3, 1))

    def make_metrics(seeds, values):
        indices = list(range(len(seeds)))
        return RowMetrics(seeds, {"primary": Bootstrap(np.array(values)[:, None], draws[:, indices], 7, 7)})

    whole, without = make_metrics((0, 1, 2), [1.0, 10.0, 100.0]), make_metrics((0, 2), [3.0, 400.0])
    assert without.subtract(whole, "primary").values[:, 0].tolist() == [2.0, 300.0]
    assert whole.subtract(without, "primary").drawn[:, 1, 0] == pytest.approx(draws[:, 2, 0] - draws[:, 1, 0])
    assert whole.subtract(make_metrics((3,), [1.0]), "primary") is None and whole.subtract(without, "mAP") is None
    one = intervals.estimate(whole.subtract(make_metrics((1,), [1.0]), "primary"))
    assert (one.mean, one.low, one.seeds) == (9.0, -np.inf, 1)  # only common seeds count


def test_the_smallest_difference_follows_from_the_pairs_of_trained_rows(whole):
    smallest = results(whole)["smallest_difference"]
    assert smallest["seeds"] == 2 and smallest["pairs"] == 1  # GTSA and DINO; all runs of the other row failed
    intervals_of = {(d["row"], d["less_row"]): d for d in results(whole)["differences"]}
    assert smallest["value"] > intervals_of["dino", "gtsa"]["high"] - intervals_of["dino", "gtsa"]["mean"]
    text = f"2 seeds see a true difference of {smallest['value']:.2f} on the primary metric with a probability of 80 %"
    assert text in " ".join((whole / "report.html").read_text().split())
    (line,) = [line for line in (whole / "results.csv").read_text().splitlines() if "smallest" in line]
    assert line == f',images,,primary,,,"smallest difference, 2 seeds",{smallest["value"]!r},1'


def test_the_page_needs_no_external_file(whole):
    page = (whole / "report.html").read_text()
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]+)', page))
    assert {"gtsa", "dino", "untrained", "colour"} <= set(re.findall(r"<figcaption>(\w+), seed 0", page))


def test_the_report_grows_with_every_network(data, tmp_path, monkeypatch):
    run_jobs_here(monkeypatch)
    counts, write = [], report.write_report

    def count_rows(*arguments):
        page = write(*arguments)
        counts.append(len(results(tmp_path)["rows"]))
        return page

    monkeypatch.setattr(report, "write_report", count_rows)
    compare.compare(**settings(data, tmp_path, methods=("mae",), controls=("colour", "position"), seeds=2))
    assert counts[0] in (1, 2)  # the next network does not wait for a report
    assert counts == sorted(counts) and counts[-1] == 3
    assert [line["row"] for line in results(tmp_path)["rows"]] == ["mae", "colour", "position"]


def test_metrics_not_above_untrained_are_marked():
    """Significantly above: no mark. Below, and not distinguishable: a mark. One seed: no interval and no mark."""

    def line(row, **less):
        metrics = {name: {"mean": 50.0, "low": 49.0, "high": 51.0} for name in ("a", "b", "c", "d")}
        differences = {n: {"mean": m, "low": low, "high": high} for n, (m, low, high) in less.items()}
        return {"row": row, "stage": "images", "seeds": [0, 1], "metrics": metrics, "less_untrained": differences}

    rows = [line("gtsa", a=(2, 1, 3), b=(0.5, -1, 2), c=(-2, -3, -1), d=(9, None, None)), line("untrained")]
    del rows[1]["less_untrained"]
    table = report_page._make_metrics_table(rows)
    a, b, c, d = table.split('<tr><th scope="row">gtsa')[1].split("<tr>")[0].split("<td>")[2:]
    assert "untrained" not in a + d
    assert "not distinguishable from untrained" in b and "significantly below untrained" in c
    assert "untrained" not in table.split('<tr><th scope="row">untrained')[1]
    assert "95 % interval of the difference from the untrained network contains 0" in " ".join(table.split())


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (999.0, "999 FLOPs"),
        (999_999.0, "1 MFLOPs"),
        (3.9e9, "3.9 GFLOPs"),
        (2.3e20, "230 EFLOPs"),
        (1e25, "1e+04 ZFLOPs"),
    ],
)
def test_operations_have_a_suitable_prefix(count, text):
    assert report_page._format_flops(count) == text


def test_the_page_begins_with_collapse_untrained_and_losses():
    def line(row, mean, low, high, **runs):
        less = {"primary": {"mean": mean, "low": low, "high": high}}
        return {"row": row, "stage": "images", "less_reference": less, "costs": {"verdicts": runs} if runs else {}}

    rows = [
        line("dino", -3.0, -4.0, -2.0, learning=1, collapsing=2),
        line("untrained", 0.1, -1.0, 1.0),
        line("colour", 5.0, 4.0, 6.0),
    ]
    collapsed, *others = conclusions.describe_verdicts("gtsa", rows)
    assert "2 of 3 runs of dino collapsed" in collapsed
    assert "gtsa is not distinguishable from untrained on the primary metric" in others[0]
    assert "significantly worse than colour" in others[1] and "-5.00 (95 % interval -6.00 to -4.00)" in others[1]
    assert "significantly better than dino" in others[2] and "+3.00 (95 % interval +2.00 to +4.00)" in others[2]


@pytest.mark.parametrize(
    ("part", "value"), [("knn:top1, k = 10", 3.0), ("knn", 2.0), ("knn:top1", None), ("linear", None)]
)
def test_a_primary_metric_without_a_name_is_the_first_metric_of_its_task_in_a_curve(part, value):
    entry = {"step": 5, "knn: top1, k = 20": 2.0, "knn: top1, k = 10": 3.0}
    assert report_page._read_curve_value(entry, part) == value
