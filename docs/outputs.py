"""Write into pages what their code prints.

    python docs/outputs.py docs/quick_start.md docs/bad_to_good.md

The Python blocks of a page run one after the other. A `text` block right after one is replaced by what it printed; it
is an error if it printed nothing. Pictures are for each page to save.
"""

from contextlib import redirect_stdout
from io import StringIO
import os
from pathlib import Path
import re
import sys

import matplotlib

matplotlib.use("agg")
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?P<between>\n(?:prints.*?\n\n)?)?(?:^```text\n.*?^```\n)?",
    re.M | re.S,
)


def with_outputs(page: Path) -> str:
    """The text of a page with what its code prints now."""
    namespace: dict = {}

    def run(match: re.Match) -> str:
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile(match["code"], str(page), "exec"), namespace)
        if not match[0].endswith("```\n") or "```text" not in match[0]:
            return match[0]
        lines = [line.rstrip() for line in printed.getvalue().rstrip().splitlines()]
        if not lines:
            raise ValueError(f"{page}: nothing is printed by\n{match['code']}")
        before = match[0][: match[0].index("```text\n")]
        return before + "\n".join(["```text", *lines, "```\n"])

    return BLOCK.sub(run, page.read_text())


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    for name in sys.argv[1:]:
        page = Path(name)
        page.write_text(with_outputs(page))
        print(f"wrote {page}")
