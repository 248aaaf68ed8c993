"""Write into pages what their code prints and draws.

    python docs/outputs.py docs/quick_start.md docs/bad_to_good.md

The Python blocks of a page run one after the other. A `text` block after one is replaced by what it printed, and a
picture after one by the figure that it drew. Between a block and its output there may be one short line.
"""

from contextlib import redirect_stdout
from io import StringIO
import os
from pathlib import Path
import re
import sys

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n"
    r"(?P<after>\n(?:[^\n`]+\n\n)?(?:```text\n.*?^```\n|!\[[^\]]*\]\((?P<picture>images/\w+\.png)\)\n))?",
    flags=re.DOTALL | re.MULTILINE,
)


def with_outputs(page: Path) -> str:
    """The text of a page with what its code prints now; pictures are saved."""
    namespace: dict = {}

    def run(match: re.Match) -> str:
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile(match["code"], str(page), "exec"), namespace)
        if match["picture"]:
            plt.gcf().savefig(ROOT / "docs" / match["picture"], dpi=100)
            plt.close("all")
        if "```text" not in (match["after"] or ""):
            return match[0]
        lines = [line.rstrip() for line in printed.getvalue().rstrip().splitlines()]
        if not lines:
            raise ValueError(f"{page}: nothing is printed by\n{match['code']}")
        before = match[0][: match[0].index("```text\n")]
        return before + "\n".join(["```text", *lines, "```\n"])

    return BLOCK.sub(run, page.read_text())


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    sys.path.append(str(ROOT))
    for name in sys.argv[1:]:
        page = Path(name)
        page.write_text(with_outputs(page))
        print(f"wrote {page}")
