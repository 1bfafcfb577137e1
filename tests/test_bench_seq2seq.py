"""The README's part on sequence to sequence: what enters it, and what is refused."""

import json

import pytest

pytest.importorskip("rich")

from bench import report

LINE = {
    "case": "greedy-b1", "cpu": "X", "isa": "avx2", "threads": 2, "torch": "2.13.0", "commit": "abc", "csrc": "old",
    "ms": 1.0, "peer_ms": 4.0, "us_step": 50.0, "us_peer_step": 200.0, "ratio": 4.0, "ratio_low": 3.9,
    "ratio_high": 4.1, "quick": False, "others": 0.0,
}  # fmt: skip
G2P = {
    "protocol": "p", "wer_greedy": 28.123, "wer_beam": 27.456, "per": 6.5, "train_seconds": 3600, "params": 4_162_346,
    "commit": "abc", "threads": 2, "train_threads": 1,
}  # fmt: skip


def fill(folder, lines, g2p=True):
    (folder / "decoding.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if g2p:
        (folder / "g2p.json").write_text(json.dumps(G2P))
    readme = folder / "README.md"
    readme.write_text(f"a\n{report.SEQ2SEQ_BEGIN}\nold\n{report.SEQ2SEQ_END}\nb\n")
    return readme


def test_lines_and_g2p_results_enter_the_readme(tmp_path):
    slow = LINE | {"case": "beam-b1", "ratio": 0.9, "ratio_low": 0.8, "others": 1.5}
    wrong = {k: v for k, v in LINE.items() if not k.startswith(("ratio", "ms", "us", "peer"))}
    wrong |= {"case": "beam-b2", "wrong": "2 rows differ"}
    readme = fill(tmp_path, [LINE | {"ratio": 9.0}, LINE, slow, wrong])
    assert report.main([str(tmp_path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("a\n") and text.endswith("\nb\n") and "old\n" not in text
    assert "| greedy-b1 | 50 | 200 | 4.00 (3.90 to 4.10) |" in text and "9.00" not in text
    assert "**0.90 (0.80" in text and "WRONG: 2 rows differ" in text
    assert "Geometric mean 1.90" in text and "up to 1.5 cores" in text and "other sources" in text
    assert "| 4.16 M | 28.12 | 27.46 | 60.0 min, 1 thread |" in text and "30.2" in text


@pytest.mark.parametrize(
    "lines, reason",
    [([LINE | {"quick": True}], "--quick"), ([{"case": "a"}], "decoding.jsonl:1"), ([], "no results")],
)
def test_what_is_no_result_leaves_the_readme_alone(tmp_path, capsys, lines, reason):
    readme = fill(tmp_path, lines, g2p=False)
    assert report.main([str(tmp_path), "--readme", str(readme)]) == 2
    assert "old\n" in readme.read_text() and reason in capsys.readouterr().out
