"""Beyond one machine: benchmark.py --ray on a cluster of two nodes on this one, of which one is killed while
it runs agents, and the README's array job.
"""

import os
import re
import shlex
import subprocess
import sys
import threading
import time

import benchmark
import pytest
import test_scripts
from test_scripts import bench  # noqa: F401  a fixture

from zoo.common.cli import script_args

HANGS = 'os.environ.get("STUB_HANG")'  # the environment of a node is not the test's


@pytest.fixture
def cluster():
    pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # on a busy machine a worker takes longer to start than Ray waits for it
        patch.setenv("RAY_worker_register_timeout_seconds", "600")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        yield made
        made.shutdown()


@pytest.fixture
def hanging(monkeypatch, tmp_path):
    """A file while which exists the stub's runs go no further than their first checkpoint."""
    file = tmp_path / "agents" / "hang"
    monkeypatch.setattr(test_scripts, "STUB", test_scripts.STUB.replace(HANGS, f'Path("{file}").exists()'))
    return file


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_node_that_is_lost_loses_no_run_and_none_is_made_twice(cluster, hanging, bench, monkeypatch):  # noqa: F811
    node = cluster.add_node(num_cpus=1)
    hanging.touch()
    record, recorded = benchmark.record, []
    monkeypatch.setattr(
        benchmark, "record", lambda job, *more: (recorded.append(job.seed), record(job, *more))[1]
    )
    lost = []

    def begun():
        return {path.parent.name for path in bench.runs.glob("seed_*/checkpoint.pt")}

    def wait(tasks, timeout, original=None):
        if not lost and len(begun()) == 2:  # a run on each node
            cluster.remove_node(node, allow_graceful=False)
            lost.append(True)
            hanging.unlink()
        return ray_wait(tasks, timeout=timeout)

    import ray

    ray_wait = ray.wait
    monkeypatch.setattr(ray, "wait", wait)
    assert bench("--ray", cluster.address, seeds="1-4") == 0
    assert lost and sorted(recorded) == [1, 2, 3, 4]
    calls = bench.calls()
    # what was begun on the lost node went on from its checkpoint, unless it lived on by itself
    fresh = [call for call in calls if call.endswith("fresh")]
    assert fresh == [f"CartPole-v1 {seed} fresh" for seed in (1, 2, 3, 4)]
    assert sum(call.endswith("resume") for call in calls) <= 1
    assert sorted(bench.meta()["seeds"]) == ["1", "2", "3", "4"]
    assert [len(bench.curve(seed)) for seed in (1, 2, 3, 4)] == [200] * 4
    monkeypatch.setattr(ray, "wait", ray_wait)
    assert bench("--ray", cluster.address, seeds="1-4") == 0 and bench.calls() == calls


def test_a_failed_run_is_told_and_the_others_are_made(cluster, bench, monkeypatch, capsys):  # noqa: F811
    script = bench.results.parents[2] / "agents" / "stub.py"
    fails = 'os.environ.get("STUB_FAIL") == str(args.seed)'
    script.write_text(script.read_text().replace(fails, "args.seed == 2"))
    assert bench("--ray", cluster.address, seeds="2,3") == 1
    assert "stub CartPole-v1 seed 2: exit status 1: error: the loss became nan" in capsys.readouterr().err
    assert sorted(bench.meta()["seeds"]) == ["3"]


def test_an_address_without_a_cluster_is_one_line(bench, capsys):  # noqa: F811
    pytest.importorskip("ray")
    for address in ("127.0.0.1:1", "127.0.0.1:99999", "nonsense"):
        assert bench("--ray", address) == 2
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith(f"error: --ray {address}: ") and not bench.calls()


def test_without_ray_a_line_names_what_to_install(bench, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    assert bench("--ray", "auto") == 2
    assert capsys.readouterr().err == "error: --ray needs Ray: pip install -e '.[ray]'\n"
    assert not bench.calls()


@pytest.mark.parametrize("left", ["in use", "trained, not evaluated"])
def test_a_run_that_goes_on_elsewhere_is_waited_for(bench, tmp_path, left):  # noqa: F811
    """Without a cluster: what a node does that is given a run of a lost one."""
    assert bench(seeds="1") == 0
    job = benchmark.plan(script_args(benchmark.Args, None, bench.argv(seeds="1")))[0]
    calls, progress = bench.calls(), job.folder / "progress.csv"
    assert benchmark.is_finished(job) and benchmark.run_here(job) == "" and bench.calls() == calls
    if left == "in use":
        holder, begun = benchmark.lock_folder(job.folder, ""), time.monotonic()
        assert benchmark.in_use(job.folder)
        threading.Timer(0.3, holder.close).start()
        assert benchmark.run_here(job) == "" and time.monotonic() - begun > 0.3
        assert not benchmark.in_use(job.folder) and bench.calls() == calls
    else:
        rows = progress.read_text().splitlines(keepends=True)
        progress.write_text("".join([*rows[:-1], rows[-1].replace("10.5,1.25", ",")]))
        (job.folder / "checkpoint.pt").write_text("600")
        assert not benchmark.is_finished(job) and benchmark.run_here(job) == ""
        assert bench.calls() == [*calls, "CartPole-v1 1 resume"]


def test_the_array_job_of_the_readme_goes_on_and_is_taken_into_results(tmp_path, capsys):
    text = (benchmark.REPOSITORY / "README.md").read_text()
    script = re.findall(r"^```bash\n(#!/bin/bash\n#SBATCH.*?)^```", text, re.M | re.S)[0].replace(
        "HalfCheetah-v4", "CartPole-v1"
    )
    short = "--total-steps 1024 --no-compile --eval-episodes 1"
    script = script.replace('"$run"\n', f'"$run" {short}\n').replace(
        "zoo/ppo.py", f"{benchmark.REPOSITORY}/zoo/ppo.py"
    )
    python = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}\n'
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "2", "PYTHONPATH": str(benchmark.REPOSITORY)}
    said = []
    for _ in range(2):  # the second time it was requeued
        made = subprocess.run(
            ["bash", "-ec", python + script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert made.returncode == 0, made.stderr
        said.append("resumed at step 1,024" in made.stdout + made.stderr)
    assert said == [False, True]
    where = ["--runs", str(tmp_path / "runs" / "benchmark"), "--results", str(tmp_path / "results")]
    asked = ["--agent", "ppo", "--env", "CartPole-v1", "--seeds", "2", f"--args={short}", *where]
    assert benchmark.main(asked) == 0
    assert "ppo    CartPole-v1  1,024" in capsys.readouterr().out
    assert (tmp_path / "results" / "ppo" / "CartPole-v1" / "seed_2.csv").exists()
