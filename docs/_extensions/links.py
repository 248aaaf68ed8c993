"""Links that pages need not write: of names to the API, of pictures to their full size, and to each error."""

from collections.abc import Iterator
import inspect
import re

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

import numpyro_vimco
from numpyro_vimco import control_variates, plots


def public_names() -> Iterator[tuple[str, str]]:
    """What a page writes for a name, and the full name under which the page of the API has it."""
    for name in numpyro_vimco.__all__:
        value = getattr(numpyro_vimco, name)
        yield (
            name,
            value.__name__ if inspect.ismodule(value) else f"numpyro_vimco.{name}",
        )
    for name in vars(numpyro_vimco.Posterior):
        if not name.startswith("_"):
            full = f"numpyro_vimco.Posterior.{name}"
            yield from ((f"posterior.{name}", full), (f"Posterior.{name}", full))
    yield "to_arviz", "numpyro_vimco.Posterior.to_arviz"
    for module in (plots, control_variates):
        for name, value in vars(module).items():
            if inspect.isfunction(value) and not name.startswith("_"):
                full = f"{value.__module__}.{name}"
                yield from (
                    (name, full),
                    (f"{module.__name__.split('.')[-1]}.{name}", full),
                )


class LinkNames(SphinxTransform):
    """A public name in code font, with arguments or without, links to its place in the API."""

    default_priority = (
        410  # after footnotes and substitutions, before cross-references are resolved
    )
    targets = dict(public_names())

    def apply(self, **kwargs) -> None:
        """Called by Sphinx, once for each page."""
        for literal in list(self.document.findall(nodes.literal)):
            name = re.fullmatch(r"([\w.]+)(\(.*\))?", literal.astext(), flags=re.DOTALL)
            target = self.targets.get(name[1]) if name else None
            if target is None or inside(
                literal, (nodes.reference, nodes.title, addnodes.pending_xref)
            ):
                continue
            link = addnodes.pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=target,
                refexplicit=True,
                refwarn=True,
            )
            link["refdoc"] = self.env.docname
            literal.replace_self(link)
            link += literal


class EnlargePictures(SphinxTransform):
    """A picture is as wide as the column at most, and links to its full size. Those of cards are left alone."""

    default_priority = 411

    def apply(self, **kwargs) -> None:
        """Called by Sphinx, once for each page."""
        for image in self.document.findall(nodes.image):
            of_card = any(name.startswith("sd-") for name in image["classes"])
            if not of_card and not inside(image, (nodes.reference,)):
                image.setdefault("width", "100%")  # Sphinx links what is scaled


class AnchorErrors(SphinxTransform):
    """Each message of the index of errors has an anchor, made of its first words that are the library's own."""

    default_priority = 412

    def apply(self, **kwargs) -> None:
        """Called by Sphinx, once for each page."""
        if self.env.docname != "errors":
            return
        for quotation in list(self.document.findall(nodes.block_quote)):
            first = quotation.next_node(nodes.paragraph)
            kind = first.next_node(nodes.strong) if first is not None else None
            if kind is None or not first.astext().startswith(kind.astext()):
                continue
            words = re.findall(r"\w+", first.astext().replace("…", ""))[1:9]
            anchor = unique(nodes.make_id(" ".join(words)), self.document.ids)
            quotation["ids"].append(anchor)
            self.document.ids[anchor] = quotation
            first += nodes.reference(
                "",
                "#",
                refid=anchor,
                internal=True,
                classes=["headerlink", "error-link"],
            )


class AnchorSources(SphinxTransform):
    """The pages of source code link each object of a module under the prefix of the first that the API has of it."""

    default_priority = 413

    def apply(self, **kwargs) -> None:
        """Called by Sphinx, once for each page."""
        for signature in self.document.findall(addnodes.desc_signature):
            name = f"numpyro_vimco.{signature.get('fullname')}"
            if "fullname" in signature and name not in self.document.ids:
                signature["ids"].append(name)
                self.document.ids[name] = signature


def unique(anchor: str, taken) -> str:
    """The anchor, with a number if another has it."""
    number = 1
    while (numbered := anchor if number == 1 else f"{anchor}-{number}") in taken:
        number += 1
    return numbered


def inside(node: nodes.Node, kinds: tuple[type, ...]) -> bool:
    """Whether a node has a parent of one of these kinds."""
    while node.parent is not None:
        node = node.parent
        if isinstance(node, kinds):
            return True
    return False


def setup(app) -> dict[str, bool]:
    """Called by Sphinx."""
    for transform in (LinkNames, EnlargePictures, AnchorErrors, AnchorSources):
        app.add_transform(transform)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
