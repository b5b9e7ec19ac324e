"""Launch recipes: they parse, and say what the package's own contract needs of them."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from readme_jax.cli.guard import BAD_INPUT
from readme_jax.parallel.distributed import PORT

ROOT = Path(__file__).parents[2]
RECIPE = "configs/recipes/readme_llama2_7b.gin"


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda p: p.name)
def test_shell_parses(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


def dry(script: str, *arguments: str, **variables: str) -> list[str]:
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    ran = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
    (line,) = ran.stdout.strip().splitlines()
    return shlex.split(line)


def test_slurm_dry_run():
    line = dry("slurm.sh", "--gin_file", RECIPE, "--gin_param", "Run.seed = 3", DRY_RUN="1", CHECKOUT="/repo")
    assert line[0] == "srun" and "--kill-on-bad-exit=1" in line
    assert line[-5:] == ["/repo/train.py", "--gin_file", RECIPE, "--gin_param", "Run.seed = 3"]
    options = [x for x in (ROOT / "launch" / "slurm.sh").read_text().splitlines() if x.startswith("#SBATCH")]
    assert "#SBATCH --ntasks-per-node=1" in options and "#SBATCH --requeue" in options


def test_xpk_dry_run():
    line = dry("xpk.sh", "--gin_file", RECIPE, PRINT_ONLY="1", DRY_RUN="1", CLUSTER="c", IMAGE="r/i:1")
    assert line[:3] == ["xpk", "workload", "create"] and "--dry-run" in line
    assert line[line.index("--command") + 1] == f"python train.py --gin_file {RECIPE}"


def test_jobset():
    content = yaml.safe_load((ROOT / "launch" / "jobset_tpu.yaml").read_text())
    assert content["kind"] == "JobSet"
    (replicated,) = content["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    assert job["completions"] == job["parallelism"] == chips // container["resources"]["limits"]["google.com/tpu"]
    assert job["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [BAD_INPUT] and rule["onExitCodes"]["containerName"] == container["name"]
    assert [port["containerPort"] for port in container["ports"]] == [PORT, PORT + 1]
    gin = next(x for x in container["command"] if x.startswith("--gin_file="))
    assert (ROOT / gin.partition("=")[2]).is_file() and (ROOT / container["command"][1]).is_file()
