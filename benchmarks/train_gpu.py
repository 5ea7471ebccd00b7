"""benchmarks/speed/train_gpu.py, under the name that it had."""

import runpy
import sys
from pathlib import Path

script = Path(__file__).parent / "speed" / "train_gpu.py"
sys.path.insert(0, str(script.parent))  # it imports its neighbors
runpy.run_path(str(script), run_name="__main__")
