"""Jobs in separate processes: devices, cores, and requests to stop."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from comparing import data, results, run_jobs_here, settings, validate

from gtsa.cli.main import run
from gtsa.comparison import compare, jobs, queue, report
from gtsa.comparison.rows import make_rows
from gtsa.comparison.stages import list_final_jobs
from gtsa.core.errors import UserError
from gtsa.core.settings_file import plain_yaml

__all__ = ["data"]  # fixtures


def test_jobs_run_at_the_same_time(data, tmp_path, monkeypatch):
    """One as a process, the other here, which saves its imports."""
    both = threading.Barrier(2, timeout=60)  # fails if one job waits for the other
    run_apart = queue.run_in_process
    run_jobs_here(monkeypatch)
    run_here = queue.run_in_process

    def run_job(job, config, devices):
        both.wait()
        return (run_here if job.number else run_apart)(job, config, devices)

    monkeypatch.setattr(queue, "run_in_process", run_job)
    compare.compare(**settings(data, tmp_path, methods=("mae",), seeds=2, controls=(), jobs=2))


@pytest.mark.parametrize(
    ("gpus", "at_once", "threads", "workers"),
    [(2, 2, "2", 3), (1, 1, None, 15), (0, 4, "4", "auto"), (0, 1, None, "auto")],
)
def test_gpus_and_cores_are_shared(data, tmp_path, monkeypatch, gpus, at_once, threads, workers):
    """With 16 cores: on a GPU half of the cores of a run are for threads; all but one are for reading images."""
    given = []

    def run(self, command, env, **_):
        time.sleep(0.2)  # so that no device is free before all are in use
        given.append(
            (env.get("CUDA_VISIBLE_DEVICES"), env.get("OMP_NUM_THREADS"), jobs.read_job(Path(command[-1]))[1].workers)
        )
        return 1

    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for module in ("gtsa.comparison.queue", "gtsa.training.devices"):
        monkeypatch.setattr(f"{module}.cores", lambda: 16)
    monkeypatch.setattr(queue.Processes, "run", run)
    config = validate(data, tmp_path, device="auto", seeds=4, jobs=at_once, methods=("mae",), controls=())
    queue.run_jobs("runs", list(list_final_jobs(make_rows(config), config)), config)
    devices = sorted(str(number % gpus) if gpus else "" for number in range(4))
    assert sorted(device or "" for device, *_ in given) == devices
    assert {used for _, used, _ in given} == {threads}
    assert {readers for *_, readers in given} == {workers}


def test_no_job_is_started_after_a_stop(data, tmp_path, monkeypatch, capsys):
    started = []
    run_jobs_here(monkeypatch)
    monkeypatch.setattr(
        queue,
        "run_in_process",
        lambda job, config, devices, run_here=queue.run_in_process: (
            started.append(job.name),
            run_here(job, config, devices),
        )[1],
    )

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "write_report", interrupted)  # Ctrl-C during the first report
    with pytest.raises(UserError, match="^stopped on request; the same command resumes the comparison$") as caught:
        compare.compare(**settings(data, tmp_path, methods=("mae",), seeds=8, controls=()))
    assert caught.value.code == 75
    assert len(started) < 4  # the first, and those started by then
    assert "stopping: no more networks are started" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_leaves_a_report_and_no_process(data, tmp_path, monkeypatch, capsys, number):
    """The control is done; the first training runs as a process of an hour."""
    run_jobs_here(monkeypatch)
    run_here, codes = queue.run_in_process, []

    def run_job_here(job, config, devices):
        if job.row.source:
            return run_here(job, config, devices)
        threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
        codes.append(devices.processes.run([sys.executable, "-c", "import time; time.sleep(3600)"]))
        raise UserError("stopped on request", 75)

    monkeypatch.setattr(queue, "run_in_process", run_job_here)
    arguments = settings(data, tmp_path, methods=("mae",), seeds=1, controls=("position",))
    (tmp_path / "c.yaml").write_text(plain_yaml(arguments))
    assert run(["compare", "--config", str(tmp_path / "c.yaml")]) == 75
    assert codes == [-signal.SIGTERM]
    errors = capsys.readouterr().err.splitlines()
    page = tmp_path / "report.html"
    assert errors == [f"gtsa: stopped on request; the same command resumes the comparison; results so far: {page}"]
    assert [line["row"] for line in results(tmp_path)["rows"]] == ["position"] and page.exists()


def test_a_failed_mkdir_frees_the_device(tmp_path, monkeypatch):
    """Otherwise the next network would wait forever."""
    (tmp_path / "file").touch()
    devices = queue.Devices([""])
    monkeypatch.setattr(queue, "folder_of", lambda *_: tmp_path / "file" / "cell")
    with pytest.raises(NotADirectoryError):
        queue.run_in_process(None, None, devices)
    assert devices.qsize() == 1


def test_a_fault_of_the_page_does_not_end_the_comparison(data, tmp_path, monkeypatch, capsys):
    run_jobs_here(monkeypatch)
    pages = []

    def broken(*_):
        pages.append(1)
        raise KeyError("a fault\nof gtsa")

    arguments = settings(data, tmp_path, methods=("mae",), seeds=2, controls=("position",))
    with monkeypatch.context() as patch:
        patch.setattr("gtsa.comparison.report_page.make_page", broken)
        with pytest.raises(UserError, match="^the report could not be written .*The results are kept in") as caught:
            compare.compare(**arguments)
    assert caught.value.code == 7 and len(pages) > 2
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "could not be written" in line] == [
        "report: could not be written (KeyError: 'a fault\\nof gtsa'); the comparison continues without it"
    ]
    assert "report: /" not in out and not (tmp_path / "report.html").exists()
    assert {line["row"]: line["seeds"] for line in results(tmp_path)["rows"]}.keys() == {"mae", "position"}
    monkeypatch.setattr(queue, "run_in_process", lambda *_: pytest.fail("a network was trained again"))
    assert compare.compare(**arguments).exists()
