"""The comparison with cuDNN without a GPU: the driver with the device faked, the report from made-up lines, plain
terminals, the primitives' build and page."""

import importlib.util
import json
import os
import sys
from dataclasses import replace

import pytest

from bench import cudnn, gpu, gpu_measure, primitives, report, run
from bench.cases import Case

H200 = cudnn.Gpu(9, 0, 132, 91501)
CASE = Case("lstm-fp16", "lstm", 16, 256, 1024, 1024, dtype="fp16", passes="train")


def gpu_line(case: Case, ratio: float, engine: str = "grid", **more):
    chosen = {f"cudnn_{way}": name for way, name in cudnn.algorithms(case, H200).items()}
    times = {"ms": 1.0, "p10": 0.9, "p90": 1.1, "peer_ms": ratio, "peer_p10": ratio, "peer_p90": ratio, "ratio": ratio}
    times |= {"ratio_low": ratio * 0.95, "ratio_high": ratio * 1.05, "us_step": 3.9, "us_peer_step": 3.9 * ratio}
    times |= {"graph_ms": 0.5, "graph_peer_ms": ratio, "graph_ratio": 2 * ratio, "error": 0.5}
    place = {"gpu": "NVIDIA H200", "cpu": "X", "isa": "avx2", "threads": 1, "device": "cuda", "peer": "torch"}
    facts = {
        "driver": "580",
        "clock_sm": 1980.0,
        "clock_sm_max": 1980.0,
        "csrc": "old",
        "commit": "abc",
        "quick": False,
    }
    return run.describe_case(case) | chosen | times | place | facts | {"engine": engine} | more


@pytest.fixture
def fake_driver(monkeypatch):
    monkeypatch.setattr(run, "device_problem", lambda device: None)
    monkeypatch.setattr(gpu, "describe", lambda: {"gpu": "NVIDIA H200"})
    monkeypatch.setattr(gpu_measure, "measure", lambda case, quick: gpu_line(case, 2.0))


def test_driver_writes_lines_beside_the_gpus_name(fake_driver, tmp_path):
    argv = ["--device", "cuda", "--json", str(tmp_path), "--limit", "0", "--engine", "step", "--report"]
    assert run.main([*argv, "--cases", "small"]) == 0
    lines = [json.loads(text) for text in (tmp_path / "nvidia-h200.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and all(x["case"].endswith("-step") and x["forced"] == "step" for x in lines)
    assert "H64" in (tmp_path / "nvidia-h200.md").read_text()


def test_driver_stops_at_its_limit_and_when_the_device_is_lost(fake_driver, monkeypatch, tmp_path, capsys):
    argv = ["--device", "cuda", "--json", str(tmp_path), "--quick"]
    assert run.main([*argv, "--limit", "1e-9"]) == 0
    assert "20 of 20 cases were not reached" in " ".join(capsys.readouterr().err.split())

    def lost(case, quick):
        raise gpu_measure.Lost("gone")

    monkeypatch.setattr(gpu_measure, "measure", lost)
    assert run.main(argv) == 1
    assert "gone" in capsys.readouterr().err
    assert run.main(["--device", "cpu", "--engine", "step"]) == 2 == run.main([*argv, "--memory"])


def test_report_and_readme(tmp_path, capsys, monkeypatch):
    lstm = replace(CASE, dtype="bf16", passes="infer")
    lines = [gpu_line(lstm, 4.0), gpu_line(replace(lstm, hidden=512, input=512), 1.0), gpu_line(CASE, 0.8)]
    lines += [gpu_line(replace(lstm, engine="step"), 0.5, "step"), gpu_line(replace(lstm, hidden=192), 3.0)]
    lines.append(gpu_line(replace(lstm, passes="train"), 2.5, engine_backward="step"))
    wrong = gpu_line(replace(lstm, batch=8), 1.0) | {"wrong": "seqkern: y is off"}
    lines.append({key: value for key, value in wrong.items() if key not in ("ms", "ratio", "peer_ms")})
    path = tmp_path / "nvidia-h200.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    readme = tmp_path / "README.md"
    text = f"a\n{report.BEGIN}\ncpu table\n{report.END}\nb\n{report.GPU_BEGIN}\nno figures\n{report.GPU_END}\nc\n"
    readme.write_text(text)
    monkeypatch.setitem(sys.modules, "bench.plot", None)  # as without matplotlib
    assert report.main([str(path), "--readme", str(readme)]) == 1  # a wrong case
    assert "matplotlib is not installed" in capsys.readouterr().out
    text = readme.read_text()
    assert "cpu table" in text and "no figures" not in text and text.endswith(f"{report.GPU_END}\nc\n")
    assert "| per-step | grid | 2.00 (1.00), 2 |  | 4.00 (2.00), 2 |  |" in text
    assert "| per-step | grid, backward step |  | 2.50 (2.50), 1 |" in text
    assert "| persistent | grid |  | **0.80 (0.80), 1** |" in text
    assert "| grid against cuDNN per-step, forward | 3.0 | 2.00 of 2, **missed** |" in text
    assert "| step against cuDNN per-step, forward | 1.0 | 0.50 of 1, **missed** |" in text
    assert "step (step against per-step: 0.50)" in text and ": WRONG)" in text and "other sources" in text
    page = path.with_suffix(".md").read_text()
    assert "| B=16 H=1024 | grid | 1.1 to 2 | 1.95 | 1.0 |" in page and "seqkern: y is off" in page


@pytest.mark.parametrize("more", [{"quick": True}, {"engine": "reference"}], ids=str)
def test_readme_refuses(tmp_path, capsys, more):
    path, readme = tmp_path / "x.jsonl", tmp_path / "README.md"
    path.write_text(json.dumps(gpu_line(CASE, 2.0, **more)) + "\n")
    readme.write_text("")
    assert report.main([str(path), "--readme", str(readme)]) == 2 and readme.read_text() == ""
    assert "is left as it is" in capsys.readouterr().out


def test_readme_has_its_gpu_markers():
    text = (report.ROOT / "README.md").read_text()
    assert "table" in report.replace_between_markers(text, "table", report.GPU_BEGIN, report.GPU_END)
    if not list((report.ROOT / "bench" / "results").glob("nvidia-*.jsonl")):
        assert "No GPU figures" in text.partition(report.GPU_BEGIN)[2].partition(report.GPU_END)[0]


def test_terminal_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    spec = importlib.util.spec_from_file_location("plain_terminal", report.ROOT / "bench" / "terminal.py")
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    console = plain.Console(stderr=True, soft_wrap=True, highlight=False)
    with plain.progress_bar(console) as progress:
        task = progress.add_task("", total=2)
        progress.update(task, description="x")
        progress.console.print("[bold red]bad[/] [64, 4]")
        progress.advance(task)
        progress.console.print("[raw]", markup=False)
    table = plain.Table(title="T", title_justify="left")
    for name in ("case", "ratio"):
        table.add_column(name, justify="left")
    table.add_row("a", "[red]0.50[/]", style="red")
    console.print(table)
    assert capsys.readouterr().err.split("\n") == ["1/2 bad [64, 4]", "2/2 [raw]", "T", "case  ratio", "a     0.50", ""]


FIGURES = """{"name": "device", "gpu": "NVIDIA H200", "capability": "9.0", "sms": 132}
{"name": "mma_sync", "n": 8, "warps": 4, "macs_per_clock_sm": 512.5, "tflops": 260}
{"name": "cluster_barrier", "ctas": 8, "ordered": 1, "ns": 310.25, "cycles": 600}
{"name": "cluster_barrier", "ctas": 16, "ordered": 1, "skipped": "needs compute capability 9.0"}
"""


def test_primitives_page(tmp_path):
    written = primitives.write(primitives.parse(FIGURES), tmp_path)
    assert written.name == "nvidia-h200-primitives.md" and written.with_suffix(".json").exists()
    text = written.read_text()
    assert text.index("## cluster_barrier") < text.index("## mma_sync")
    assert "| 8 | 1 | 310.2 | 600 |  |" in text and "| 16 | 1 |  |  | needs compute capability 9.0 |" in text
    assert "| 8 | 4 | 512.5 | 260 |" in text
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\nprintf \'{"name": "device", "gpu": "G"}\\n{"na\'\nexec sleep 60\n')
    program.chmod(0o755)
    status, text, said = primitives.execute(program, timeout=0.5)
    assert status and "not done after 0.5 s" in said and primitives.parse(text) == [{"name": "device", "gpu": "G"}]
    for broken in ("", "x\n", '{"n": 1}\n', '{"name": "mma_sync"}\n'):
        with pytest.raises(ValueError, match="line|first"):
            primitives.parse(broken)


def test_primitives_architecture_and_build(capsys):
    assert primitives.architecture("9.0") == "arch=compute_90a,code=sm_90a"
    assert primitives.architecture("12.0\n") == "arch=compute_120,code=sm_120"
    for wrong in ("7.5", "sm_90", ""):
        with pytest.raises(ValueError, match="compute capability"):
            primitives.architecture(wrong)
    if primitives.nvcc() is None:
        pytest.skip("no nvcc")
    assert primitives.main(["--arch", "9.0", "--build-only"]) == 0
    assert os.access(capsys.readouterr().out.strip(), os.X_OK)
