"""Every message that the library raises is in docs/errors.md, word for word, and nothing else is."""

import ast
from pathlib import Path
import re

import pytest

import numpyro_vimco

PACKAGE = Path(numpyro_vimco.__file__).parent
PAGE = Path(__file__).parent.parent / "docs" / "errors.md"


# In `warn` itself.
WARN = "warnings.warn(message, stacklevel=level)"


def template(node):
    """A message with … for each of its values; None for what is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        parts = [node.value]
    elif isinstance(node, ast.JoinedStr):
        parts = [value.value if isinstance(value, ast.Constant) else "…" for value in node.values]
    else:
        return None
    return " ".join("".join(parts).split())


def messages_of(source):
    """Messages by type, and the texts that calls of checks and of makers of errors fill in; both must be literal."""
    messages, texts = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            is_warning = name in ("warn", "warnings.warn") and ast.unparse(node) != WARN
            if is_warning or re.fullmatch(r"[A-Z]\w*(Error|Exception|Warning)", name):
                message = template(node.args[0])
                assert message, f"line {node.lineno}: write the message where it is raised, for docs/errors.md"
                messages.add(("UserWarning" if is_warning else name, message))
            elif re.fullmatch(r"check_\w+|\w+_error", name):
                texts |= {text for text in map(template, node.args) if text and " " in text}
        elif isinstance(node, ast.Raise) and node.exc is not None:
            kind = ast.unparse(node.exc.func) if isinstance(node.exc, ast.Call) else ""
            assert re.fullmatch(r"[A-Z]\w*(Error|Exception)|\w+_error", kind), f"line {node.lineno}: raise a new error"
    return messages, texts


def of_package():
    messages, texts = zip(*(messages_of(path.read_text()) for path in PACKAGE.rglob("*.py")))
    return set().union(*messages), set().union(*texts)


def of_page():
    """The same from the page: quotations that begin with a type, and the lists inside of them."""
    messages, texts = set(), set()
    for quotation in re.findall(r"(?:^>.*\n)+", PAGE.read_text(), flags=re.MULTILINE):
        message, *rest = re.split(r"^- ", re.sub(r"^> ?", "", quotation, flags=re.MULTILINE), flags=re.MULTILINE)
        kind, message = re.fullmatch(r"\*\*(\w+)\*\* (.*)", message, flags=re.DOTALL).groups()
        messages.add((kind, " ".join(message.split())))
        texts |= {" ".join(text.split()) for text in rest}
    return messages, texts


@pytest.mark.parametrize("what", [0, 1], ids=["messages", "texts"])
def test_page_lists_what_is_raised(what):
    raised, listed = of_package()[what], of_page()[what]
    assert raised - listed == set(), "add these to docs/errors.md, with cause and cure"
    assert listed - raised == set(), "remove these from docs/errors.md"
    assert len(raised) > (40, 4)[what]  # what is sought is found


def test_message_that_is_not_literal_is_found():
    for source in ("raise ValueError(message)", "raise error", "raise make(1)", "warn(message)"):
        with pytest.raises(AssertionError, match="line 1"):
            messages_of(source)
