"""The report: its table, its plot, and what may enter the README."""

import json
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from bench import report, summary


def line(case, ratio, peer="torch", **more):
    base = {
        "group": case.rsplit("-", 1)[0],
        "pass": "infer",
        "dtype": "fp32",
        "device": "cpu",
        "cpu": "X",
        "isa": "avx2",
    }
    times = {"ms": 1.0, "p10": 0.9, "p90": 1.1, "peer_ms": ratio, "ratio": ratio, "threads": 2, "torch": "2.13.0"}
    interval = {"ratio_low": ratio * 0.9, "ratio_high": ratio * 1.05, "csrc": "old", "commit": "abc", "load": 0.5}
    return {"case": case, "peer": peer, **base, **times, **interval, **more}


def write(path: Path, lines) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in lines))
    return path


def test_report_makes_table_plot_and_readme(tmp_path, capsys):
    lines = [line("lstm-a", 9.0), line("lstm-a", 2.0), line("lstm-b", 0.5), line("gru-a", 1.0)]
    lines += [
        line("lstm-a", 3.0, "onnxruntime"),
        line("lstm-a", 1.5, "openvino"),
        line("gru-b", 4.0, **{"pass": "train"}),
    ]
    path = write(tmp_path / "cpu.jsonl", lines)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.main([str(path), "--readme", str(readme)]) == 0
    shown = capsys.readouterr().out
    assert "0.50 slower" in shown and "1.00 ~" in shown
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old\n" not in text
    assert "| lstm | **1.00 (0.50)** |  | 1.50 |" in text  # the later of two lines; the faster of two peers
    assert "lstm-b (torch: 0.50 slower)" in text and "other sources" in text and "cpu.png" in text
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "cpu.md").read_text().count("\n| ") == 1 + 1 + 6


@pytest.mark.parametrize(
    "more, reason", [({"quick": True}, "--quick"), ({"isa": "reference"}, "without the extension")]
)
def test_readme_takes_full_runs_of_the_extension_only(tmp_path, capsys, more, reason):
    path = write(tmp_path / "cpu.jsonl", [line("lstm-a", 2.0, **more)])
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert report.main([str(path), "--readme", str(readme)]) == 2
    assert reason in capsys.readouterr().out
    assert readme.read_text() == f"{report.BEGIN}\n{report.END}\n"


def test_readme_has_its_markers():
    text = (report.ROOT / "README.md").read_text()
    replaced = report.replace_between_markers(text, "new table")
    assert "new table" in replaced and replaced.startswith(text.partition(report.BEGIN)[0] + report.BEGIN)
    assert replaced.endswith(report.END + text.partition(report.END)[2])


def test_report_names_broken_lines_and_missing_markers(tmp_path):
    path = tmp_path / "cpu.jsonl"
    path.write_text('{"case": 1}\n')
    with pytest.raises(ValueError, match="cpu.jsonl:1: lacks device"):
        summary.read([path])
    with pytest.raises(ValueError, match="once each"):
        report.replace_between_markers("no markers", "x")
