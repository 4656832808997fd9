"""The real command line on a machine that runs out of something."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_config

pytestmark = pytest.mark.usefixtures("left")

LEANCLIP = f"{sys.executable} -c 'from leanclip.cli import main; main()'"
TRAIN = f"{LEANCLIP} train -c config.yaml -o evaluate.retrieval=null"


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the shell; one that waits without end fails."""
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False
    )


def assert_said(done: subprocess.CompletedProcess[str], word: str) -> None:
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert len(said) == 1, done.stderr
    assert word in said[0]


@pytest.fixture
def workers(workplace: Path) -> None:
    make_config(
        workplace / "config.yaml",
        data={"workers": 2},
        model={"image_resolution": 224, "vision_patch_size": 32},
        train={"batch_size": 12, "epochs": 4},
    )


@pytest.mark.usefixtures("workers")
def test_too_little_shared_memory_is_said() -> None:
    alone = "unshare --mount bash -c"
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    if not shutil.which("unshare") or shell(f'{alone} "{mount}"').returncode:
        pytest.skip("NOT TESTED: this user may not mount a small /dev/shm (unshare --mount)")
    done = shell(f'{alone} "{mount} && exec {TRAIN}"')
    assert_said(done, "not enough shared memory")
    assert not list(Path().glob("**/*.tmp*"))


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_too_few_open_files_are_said() -> None:
    codes = []
    for limit in (18, 23):  # what fails first differs
        done = shell(f"ulimit -n {limit}; exec {TRAIN} --output-dir {limit}")
        codes.append(done.returncode)
        if done.returncode:
            assert_said(done, "open")
    assert 2 in codes


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoints_before(workplace: Path) -> None:
    """A file may have 600 kB, a checkpoint's weights have more: as on a disk with no room."""
    config = "-o train.epochs=3 -o evaluate.retrieval=null -o train.report_to=null"
    first = shell(f"{LEANCLIP} train -c config.yaml {config} -o train.epochs=1")
    assert first.returncode == 0, first.stderr
    before = sorted(path.name for path in Path("runs/config/checkpoints").iterdir())
    done = shell(
        f"ulimit -f 600; exec {LEANCLIP} train -c config.yaml {config} --load runs/config "
        "--output-dir full"
    )
    assert done.returncode != 0
    assert "no checkpoint at step 3" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(Path("full/checkpoints").glob("*")) == []
    assert sorted(path.name for path in Path("runs/config/checkpoints").iterdir()) == before
