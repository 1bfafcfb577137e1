"""Which sources a measurement belongs to. Needs neither torch nor the package."""

import glob
import hashlib
import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def csrc_hash() -> str:
    """Twelve hex digits over the names and contents of csrc/, as setup.py computes them when it builds."""
    digest = hashlib.sha256()
    for path in sorted(os.path.relpath(path, ROOT) for path in glob.glob(f"{ROOT}/csrc/**/*.*", recursive=True)):
        digest.update(path.encode())
        digest.update((ROOT / path).read_bytes())
    return digest.hexdigest()[:12]


def slug(name: str) -> str:
    """A GPU's name as a file's: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "gpu"


def commit() -> str:
    """The checked-out commit, with `+` where tracked files differ from it; "unknown" outside a git checkout."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)

    try:
        head = git("rev-parse", "--short=12", "HEAD")
    except FileNotFoundError:
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+" if git("diff", "--quiet", "HEAD").returncode else "")
