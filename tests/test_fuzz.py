"""Over a hundred hostile inputs against the contract of the command line; `tests/fuzz.py` takes thousands."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_no_input_breaks_the_contract() -> None:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GUIDEGEN")}
    command = [sys.executable, str(HERE / "fuzz.py"), "--count", "160"]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=900, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
