"""All tables of docs/benchmarks.md, each section in a process of its own.

python benchmarks
"""

from pathlib import Path
import subprocess
import sys

SECTIONS = (
    "step_time enumeration scale after_the_fit digits phylogenetics structures chains moving_supports proposals plans"
)

for section in SECTIONS.split():
    print(f"\n== {section}", flush=True)
    subprocess.run([sys.executable, Path(__file__).with_name(f"{section}.py")], check=True)
